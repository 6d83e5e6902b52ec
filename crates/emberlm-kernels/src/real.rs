use std::ops::{Add, AddAssign, Div, Mul, Neg, Sub};

use pulp::Simd;

use crate::math;

/// A floating-point type as vectors of whatever width the machine has.
///
/// Every method of vectors takes the proof `simd` that the instructions exist. All of them are inlined into the
/// function that was entered with [`pulp::Arch::dispatch`], which is the only place where the width is chosen.
pub trait Real:
    Copy
    + Default
    + PartialOrd
    + Send
    + Sync
    + Add<Output = Self>
    + AddAssign
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + 'static
{
    /// A vector of these.
    type Vector<S: Simd>: Copy;

    /// Negative infinity.
    const NEG_INFINITY: Self;
    /// Below this `tanh` is the sum of six terms of its series.
    const TANH_TAYLOR_LIMIT: f64;

    /// The nearest value.
    fn from_f64(x: f64) -> Self;
    /// The same value as `f64`.
    fn to_f64(self) -> f64;

    /// A vector of equal elements.
    fn splat<S: Simd>(simd: S, x: Self) -> Self::Vector<S>;
    /// Reads a vector from `from`, which need not be aligned.
    ///
    /// # Safety
    ///
    /// [`lanes`] elements can be read from `from`.
    unsafe fn load<S: Simd>(simd: S, from: *const Self) -> Self::Vector<S>;
    /// Writes a vector to `to`, which need not be aligned.
    ///
    /// # Safety
    ///
    /// [`lanes`] elements can be written to `to`.
    unsafe fn store<S: Simd>(simd: S, to: *mut Self, x: Self::Vector<S>);

    /// `a b + c`, rounded once where the machine can.
    fn vmul_add<S: Simd>(
        simd: S,
        a: Self::Vector<S>,
        b: Self::Vector<S>,
        c: Self::Vector<S>,
    ) -> Self::Vector<S>;
    /// `a + b`
    fn vadd<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    /// `a - b`
    fn vsub<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    /// `a b`
    fn vmul<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    /// `a / b`
    fn vdiv<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    /// The larger of the two; where one is NaN, either.
    fn vmax<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    /// `sqrt a`
    fn vsqrt<S: Simd>(simd: S, a: Self::Vector<S>) -> Self::Vector<S>;
    /// `|a|`
    fn vabs<S: Simd>(simd: S, a: Self::Vector<S>) -> Self::Vector<S>;
    /// Elements of `then` where `a < b`, of `otherwise` elsewhere (also where one of the two is NaN).
    fn select_less<S: Simd>(
        simd: S,
        a: Self::Vector<S>,
        b: Self::Vector<S>,
        then: Self::Vector<S>,
        otherwise: Self::Vector<S>,
    ) -> Self::Vector<S>;
    /// The largest element.
    fn reduce_max<S: Simd>(simd: S, a: Self::Vector<S>) -> Self;
    /// The sum of the elements.
    fn reduce_sum<S: Simd>(simd: S, a: Self::Vector<S>) -> Self;
    /// `e^x`; zero where it is below the smallest normal number, NaN for NaN.
    ///
    /// Relative error at most 2e-7 for `f32`, the standard library's for `f64`. The argument is at most 88 for `f32`.
    fn vexp<S: Simd>(simd: S, x: Self::Vector<S>) -> Self::Vector<S>;
    /// The error function `erf x = 2 / sqrt(pi) int_0^x e^(-t^2) dt`.
    ///
    /// Error at most 1.5 units in the last place for `f32`, that of `libm` for `f64` (below one).
    fn verf<S: Simd>(simd: S, x: Self::Vector<S>) -> Self::Vector<S>;
    /// `1 - Phi(x)` and `phi(x)`: the upper tail and the density of the standard normal distribution.
    ///
    /// The argument is from 0 to 40, or NaN, which gives NaN. For `f32` the tail's error is at most 7 units in the last
    /// place and the density's 3, where both are normal numbers (`x <= 12.9`); both 70 on machines without a fused
    /// multiply-add. For `f64` the tail's error is at most the larger of 8 and `2 x^2` units.
    fn vnormal<S: Simd>(simd: S, x: Self::Vector<S>) -> (Self::Vector<S>, Self::Vector<S>);
    /// The natural logarithm of one element.
    fn ln(self) -> Self;
    /// The square root of one element.
    fn sqrt(self) -> Self;
    /// `e^x` of one element.
    fn exp(self) -> Self;

    /// Reads `n` elements, at most a vector of them, and zeros behind them.
    ///
    /// # Safety
    ///
    /// `n` elements can be read from `from`.
    #[inline(always)]
    unsafe fn load_some<S: Simd>(simd: S, from: *const Self, n: usize) -> Self::Vector<S> {
        // Safety: the caller's; a copy of few elements is as long as the longest vector.
        unsafe {
            if n >= lanes::<Self, S>() {
                return Self::load(simd, from);
            }
            let mut some = [Self::default(); MAX_LANES];
            std::ptr::copy_nonoverlapping(from, some.as_mut_ptr(), n);
            Self::load(simd, some.as_ptr())
        }
    }

    /// Writes the first `n` elements, at most a vector of them.
    ///
    /// # Safety
    ///
    /// `n` elements can be written to `to`.
    #[inline(always)]
    unsafe fn store_some<S: Simd>(simd: S, to: *mut Self, x: Self::Vector<S>, n: usize) {
        // Safety: as above.
        unsafe {
            if n >= lanes::<Self, S>() {
                return Self::store(simd, to, x);
            }
            let mut some = [Self::default(); MAX_LANES];
            Self::store(simd, some.as_mut_ptr(), x);
            std::ptr::copy_nonoverlapping(some.as_ptr(), to, n);
        }
    }

    /// `tanh x`, with an error of at most 3e-7 of its value for `f32`.
    #[inline(always)]
    fn vtanh<S: Simd>(simd: S, x: Self::Vector<S>) -> Self::Vector<S> {
        let constant = |x| Self::splat(simd, Self::from_f64(x));
        // tanh x = (1 - e^-2x) / (1 + e^-2x) for x >= 0.
        let magnitude = Self::vabs(simd, x);
        let power = Self::vexp(simd, Self::vmul(simd, magnitude, constant(-2.0)));
        let one = constant(1.0);
        let large = Self::vdiv(
            simd,
            Self::vsub(simd, one, power),
            Self::vadd(simd, one, power),
        );
        let negative = Self::vsub(simd, constant(0.0), large);
        let large = Self::select_less(simd, x, constant(0.0), negative, large);
        // That loses digits near zero. Taylor's polynomial does not; at the limit its next term, 0.0036 x^13, is
        // below the type's rounding.
        let limit = Self::TANH_TAYLOR_LIMIT;
        let square = Self::vmul(simd, x, x);
        let mut sum = constant(0.0);
        for coefficient in [
            -1382.0 / 155_925.0,
            62.0 / 2835.0,
            -17.0 / 315.0,
            2.0 / 15.0,
            -1.0 / 3.0,
            1.0,
        ] {
            sum = Self::vmul_add(simd, sum, square, constant(coefficient));
        }
        let small = Self::vmul(simd, sum, x);
        Self::select_less(simd, magnitude, constant(limit), small, large)
    }
}

/// Elements of the longest vector: 64 bytes of `f32`.
const MAX_LANES: usize = 16;

/// Runs a block for each vector of some elements of type `R`, with the begin and the number of elements of the vector;
/// the last may be shorter. The number of the others is a constant, so that [`Real::load_some`] becomes a plain load.
///
/// ```
/// use emberlm_kernels::{Real, each_vector, kernel};
///
/// kernel! {
///     /// Doubles every element.
///     fn double<'a, R: Real>(simd: S, x: &'a mut [R]) -> () {
///         let x_at = x.as_mut_ptr();
///         // Safety: `n` elements from `j` on are in the slice.
///         each_vector!(R, S, x.len(), |j, n| unsafe {
///             let vector = R::load_some(simd, x_at.add(j), n);
///             R::store_some(simd, x_at.add(j), R::vadd(simd, vector, vector), n);
///         });
///     }
/// }
///
/// let mut x = [1.0_f32; 37];
/// double(&mut x);
/// assert_eq!(x, [2.0; 37]);
/// ```
#[macro_export]
macro_rules! each_vector {
    ($real:ty, $simd:ty, $len:expr, |$first:ident, $n:pat_param| $body:expr) => {{
        let len: usize = $len;
        let lanes = $crate::lanes::<$real, $simd>();
        let mut next = 0;
        while next + lanes <= len {
            let ($first, $n) = (next, lanes);
            $body;
            next += lanes;
        }
        if next < len {
            let ($first, $n) = (next, len - next);
            $body;
        }
    }};
}

/// Number of elements in a vector of `T`.
#[inline(always)]
pub const fn lanes<T: Real, S: Simd>() -> usize {
    size_of::<T::Vector<S>>() / size_of::<T>()
}

macro_rules! real {
    ($real:ident, $vector:ident, $splat:ident, $mul_add:ident, $add:ident, $sub:ident, $mul:ident, $div:ident,
     $max:ident, $sqrt:ident, $abs:ident, $less:ident, $select:ident, $reduce_max:ident, $reduce_sum:ident, $exp:ident,
     $erf:path, $normal:path, $tanh_limit:literal) => {
        impl Real for $real {
            type Vector<S: Simd> = S::$vector;

            const NEG_INFINITY: Self = $real::NEG_INFINITY;
            const TANH_TAYLOR_LIMIT: f64 = $tanh_limit;

            #[inline(always)]
            fn from_f64(x: f64) -> Self {
                x as $real
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                f64::from(self)
            }
            #[inline(always)]
            fn splat<S: Simd>(simd: S, x: Self) -> S::$vector {
                simd.$splat(x)
            }
            #[inline(always)]
            unsafe fn load<S: Simd>(_: S, from: *const Self) -> S::$vector {
                // Safety: the caller's.
                unsafe { from.cast::<S::$vector>().read_unaligned() }
            }
            #[inline(always)]
            unsafe fn store<S: Simd>(_: S, to: *mut Self, x: S::$vector) {
                // Safety: the caller's.
                unsafe { to.cast::<S::$vector>().write_unaligned(x) }
            }
            #[inline(always)]
            fn vmul_add<S: Simd>(
                simd: S,
                a: S::$vector,
                b: S::$vector,
                c: S::$vector,
            ) -> S::$vector {
                simd.$mul_add(a, b, c)
            }
            #[inline(always)]
            fn vadd<S: Simd>(simd: S, a: S::$vector, b: S::$vector) -> S::$vector {
                simd.$add(a, b)
            }
            #[inline(always)]
            fn vsub<S: Simd>(simd: S, a: S::$vector, b: S::$vector) -> S::$vector {
                simd.$sub(a, b)
            }
            #[inline(always)]
            fn vmul<S: Simd>(simd: S, a: S::$vector, b: S::$vector) -> S::$vector {
                simd.$mul(a, b)
            }
            #[inline(always)]
            fn vdiv<S: Simd>(simd: S, a: S::$vector, b: S::$vector) -> S::$vector {
                simd.$div(a, b)
            }
            #[inline(always)]
            fn vmax<S: Simd>(simd: S, a: S::$vector, b: S::$vector) -> S::$vector {
                simd.$max(a, b)
            }
            #[inline(always)]
            fn vsqrt<S: Simd>(simd: S, a: S::$vector) -> S::$vector {
                simd.$sqrt(a)
            }
            #[inline(always)]
            fn vabs<S: Simd>(simd: S, a: S::$vector) -> S::$vector {
                simd.$abs(a)
            }
            #[inline(always)]
            fn select_less<S: Simd>(
                simd: S,
                a: S::$vector,
                b: S::$vector,
                then: S::$vector,
                otherwise: S::$vector,
            ) -> S::$vector {
                simd.$select(simd.$less(a, b), then, otherwise)
            }
            #[inline(always)]
            fn reduce_max<S: Simd>(simd: S, a: S::$vector) -> Self {
                simd.$reduce_max(a)
            }
            #[inline(always)]
            fn reduce_sum<S: Simd>(simd: S, a: S::$vector) -> Self {
                simd.$reduce_sum(a)
            }
            #[inline(always)]
            fn vexp<S: Simd>(simd: S, x: S::$vector) -> S::$vector {
                $exp(simd, x)
            }
            #[inline(always)]
            fn verf<S: Simd>(simd: S, x: S::$vector) -> S::$vector {
                $erf(simd, x)
            }
            #[inline(always)]
            fn vnormal<S: Simd>(simd: S, x: S::$vector) -> (S::$vector, S::$vector) {
                $normal(simd, x)
            }
            #[inline(always)]
            fn ln(self) -> Self {
                self.ln()
            }
            #[inline(always)]
            fn sqrt(self) -> Self {
                self.sqrt()
            }
            #[inline(always)]
            fn exp(self) -> Self {
                self.exp()
            }
        }
    };
}

real!(
    f32,
    f32s,
    splat_f32s,
    mul_add_e_f32s,
    add_f32s,
    sub_f32s,
    mul_f32s,
    div_f32s,
    max_f32s,
    sqrt_f32s,
    abs_f32s,
    less_than_f32s,
    select_f32s,
    reduce_max_f32s,
    reduce_sum_f32s,
    exp_f32,
    math::erf_f32,
    math::normal_f32,
    0.3
);
real!(
    f64,
    f64s,
    splat_f64s,
    mul_add_e_f64s,
    add_f64s,
    sub_f64s,
    mul_f64s,
    div_f64s,
    max_f64s,
    sqrt_f64s,
    abs_f64s,
    less_than_f64s,
    select_f64s,
    reduce_max_f64s,
    reduce_sum_f64s,
    exp_f64,
    math::erf_f64,
    math::normal_f64,
    0.04
);

/// `e^x = 2^n e^r` with `n = round(x / ln 2)` and `|r| <= ln 2 / 2`; Taylor's polynomial of degree 7 for `e^r`.
#[inline(always)]
fn exp_f32<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    // Below this the result is not a normal number.
    const SMALLEST: f32 = -87.336_54;
    // ln 2 in two parts, of which the first has few digits, so that its product with n is exact.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    // Adding it rounds to an integer, which then stands in the lowest bits.
    const ROUND: f32 = 1.5 * (1 << 23) as f32;
    // Not a maximum, which may drop NaN.
    let small = simd.less_than_f32s(x, simd.splat_f32s(SMALLEST));
    let bounded = simd.select_f32s(small, simd.splat_f32s(SMALLEST), x);
    let rounded = simd.mul_add_e_f32s(
        bounded,
        simd.splat_f32s(std::f32::consts::LOG2_E),
        simd.splat_f32s(ROUND),
    );
    let n = simd.sub_f32s(rounded, simd.splat_f32s(ROUND));
    let r = simd.mul_add_e_f32s(n, simd.splat_f32s(-LN_2_HIGH), bounded);
    let r = simd.mul_add_e_f32s(n, simd.splat_f32s(-LN_2_LOW), r);
    let mut sum = simd.splat_f32s(1.0 / 5040.0);
    for factorial in [720.0, 120.0, 24.0, 6.0, 2.0, 1.0, 1.0] {
        sum = simd.mul_add_e_f32s(sum, r, simd.splat_f32s(1.0 / factorial));
    }
    // Adds n to the exponent.
    let exponent =
        simd.wrapping_dyn_shl_u32s(simd.transmute_u32s_f32s(rounded), simd.splat_u32s(23));
    let scaled = simd.transmute_f32s_u32s(simd.add_u32s(simd.transmute_u32s_f32s(sum), exponent));
    simd.select_f32s(small, simd.splat_f32s(0.0), scaled)
}

/// The standard library's, element by element: precision matters here, not speed.
#[inline(always)]
fn exp_f64<S: Simd>(_: S, mut x: S::f64s) -> S::f64s {
    let elements = (&raw mut x).cast::<f64>();
    for i in 0..lanes::<f64, S>() {
        // Safety: a vector is its elements one after another.
        unsafe { *elements.add(i) = (*elements.add(i)).exp() };
    }
    x
}

#[cfg(test)]
mod tests {
    use pulp::{Arch, Scalar, WithSimd};

    use super::*;

    /// `exp` of every element, with the machine's own width.
    struct Exp<'a, T>(&'a mut [T]);

    impl<T: Real> WithSimd for Exp<'_, T> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let lanes = lanes::<T, S>();
            for chunk in self.0.chunks_exact_mut(lanes) {
                // Safety: a chunk holds as many elements as a vector.
                unsafe {
                    let x = T::load(simd, chunk.as_ptr());
                    T::store(simd, chunk.as_mut_ptr(), T::vexp(simd, x));
                }
            }
        }
    }

    fn worst_relative_error(run: impl Fn(&mut [f32])) -> f64 {
        let inputs: Vec<f32> = (0..1 << 16).map(|i| -87.0 + i as f32 * 0.002_6).collect();
        let mut outputs = inputs.clone();
        run(&mut outputs);
        inputs
            .iter()
            .zip(&outputs)
            .map(|(x, y)| {
                let exact = f64::from(*x).exp();
                ((f64::from(*y) - exact) / exact).abs()
            })
            .fold(0.0, f64::max)
    }

    #[test]
    fn exp_of_f32_is_right_to_two_units_of_the_last_place() {
        let vectors = worst_relative_error(|x| Arch::new().dispatch(Exp(x)));
        assert!(vectors < 2e-7, "largest relative error {vectors:e}");
        let scalars = worst_relative_error(|x| Exp(x).with_simd(Scalar));
        assert!(scalars < 2e-7, "largest relative error {scalars:e}");
    }

    #[test]
    fn exp_of_special_values() {
        let run: [fn(&mut [f32]); 2] = [
            |x| Arch::new().dispatch(Exp(x)),
            |x| Exp(x).with_simd(Scalar),
        ];
        for run in run {
            let mut x = [0.0; 64];
            [x[0], x[1], x[2], x[3]] = [f32::NEG_INFINITY, -1e30, f32::NAN, -0.0];
            run(&mut x);
            assert_eq!((x[0], x[1], x[3]), (0.0, 0.0, 1.0));
            assert!(x[2].is_nan());
        }
    }

    /// `tanh` of every element.
    struct Tanh<'a, T>(&'a mut [T]);

    impl<T: Real> WithSimd for Tanh<'_, T> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            for chunk in self.0.chunks_exact_mut(lanes::<T, S>()) {
                // Safety: a chunk holds as many elements as a vector.
                unsafe {
                    let x = T::load(simd, chunk.as_ptr());
                    T::store(simd, chunk.as_mut_ptr(), T::vtanh(simd, x));
                }
            }
        }
    }

    fn worst_tanh<T: Real>() -> f64 {
        let inputs: Vec<T> = (0..1 << 14)
            .map(|i| T::from_f64((f64::from(i) - 8192.0) * 0.000_7 + 1e-7))
            .collect();
        let mut outputs = inputs.clone();
        Arch::new().dispatch(Tanh(&mut outputs));
        inputs
            .iter()
            .zip(&outputs)
            .map(|(x, y)| {
                let exact = x.to_f64().tanh();
                ((y.to_f64() - exact) / exact).abs()
            })
            .fold(0.0, f64::max)
    }

    #[test]
    fn tanh_keeps_its_digits_near_zero() {
        let (f32, f64) = (worst_tanh::<f32>(), worst_tanh::<f64>());
        assert!(f32 < 4e-7, "largest relative error of f32 {f32:e}");
        assert!(f64 < 4e-15, "largest relative error of f64 {f64:e}");
    }

    #[test]
    fn exp_of_f64_is_the_standard_one() {
        let mut x: Vec<f64> = (0..64).map(|i| f64::from(i) * -0.37).collect();
        let expected: Vec<f64> = x.iter().map(|x| x.exp()).collect();
        Arch::new().dispatch(Exp(&mut x));
        assert_eq!(x, expected);
    }
}
