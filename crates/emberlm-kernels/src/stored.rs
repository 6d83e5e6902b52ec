use burn::tensor::Element;
use half::{bf16, f16};

use crate::Real;

/// An element type of tensors, and the type that sums over it are made in: 16-bit floats are computed as `f32`.
///
/// No other type can implement it: that any bits are a valid element is relied upon.
pub trait Stored: Element + Copy + Send + Sync + sealed::Sealed + 'static {
    /// What it is computed in.
    type Real: Real;

    /// Exact.
    fn to_real(self) -> Self::Real;
    /// The nearest value.
    fn from_real(x: Self::Real) -> Self;
    /// The same elements, if they are computed as they are stored.
    fn as_reals(elements: &[Self]) -> Option<&[Self::Real]>;
    /// The nearest values, without a copy if they are computed as they are stored.
    fn from_reals(reals: Vec<Self::Real>) -> Vec<Self>;
}

mod sealed {
    use half::{bf16, f16};

    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
    impl Sealed for f16 {}
    impl Sealed for bf16 {}
}

impl Stored for f32 {
    type Real = f32;

    #[inline(always)]
    fn to_real(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_real(x: f32) -> f32 {
        x
    }
    fn as_reals(elements: &[f32]) -> Option<&[f32]> {
        Some(elements)
    }
    fn from_reals(reals: Vec<f32>) -> Vec<f32> {
        reals
    }
}

impl Stored for f64 {
    type Real = f64;

    #[inline(always)]
    fn to_real(self) -> f64 {
        self
    }
    #[inline(always)]
    fn from_real(x: f64) -> f64 {
        x
    }
    fn as_reals(elements: &[f64]) -> Option<&[f64]> {
        Some(elements)
    }
    fn from_reals(reals: Vec<f64>) -> Vec<f64> {
        reals
    }
}

impl Stored for f16 {
    type Real = f32;

    #[inline(always)]
    fn to_real(self) -> f32 {
        self.to_f32()
    }
    #[inline(always)]
    fn from_real(x: f32) -> f16 {
        f16::from_f32(x)
    }
    fn as_reals(_: &[f16]) -> Option<&[f32]> {
        None
    }
    fn from_reals(reals: Vec<f32>) -> Vec<f16> {
        reals.into_iter().map(f16::from_f32).collect()
    }
}

impl Stored for bf16 {
    type Real = f32;

    #[inline(always)]
    fn to_real(self) -> f32 {
        self.to_f32()
    }
    #[inline(always)]
    fn from_real(x: f32) -> bf16 {
        bf16::from_f32(x)
    }
    fn as_reals(_: &[bf16]) -> Option<&[f32]> {
        None
    }
    fn from_reals(reals: Vec<f32>) -> Vec<bf16> {
        reals.into_iter().map(bf16::from_f32).collect()
    }
}
