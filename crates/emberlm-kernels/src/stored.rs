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
}
