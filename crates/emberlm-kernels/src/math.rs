//! Activation functions of vectors with their derivatives, and what they are made of.

use pulp::Simd;

use crate::real::{Real, lanes};

/// A function of one real number, applied to every element of a vector.
///
/// A kernel takes it as a type parameter, so that each function gets its own loop. NaN gives NaN.
pub trait Function: Copy + Send + Sync + 'static {
    /// The function's values.
    ///
    /// This is the first of what [`Self::with_derivative`] gives; the rest of the work there falls away in inlining.
    #[inline(always)]
    fn value<R: Real, S: Simd>(simd: S, x: R::Vector<S>) -> R::Vector<S> {
        Self::with_derivative::<R, S>(simd, x).0
    }

    /// The function's values and derivatives.
    fn with_derivative<R: Real, S: Simd>(simd: S, x: R::Vector<S>) -> (R::Vector<S>, R::Vector<S>);
}

/// `x` itself.
#[derive(Clone, Copy, Debug)]
pub struct Identity;

impl Function for Identity {
    #[inline(always)]
    fn with_derivative<R: Real, S: Simd>(simd: S, x: R::Vector<S>) -> (R::Vector<S>, R::Vector<S>) {
        (x, constant::<R, S>(simd, 1.0))
    }
}

/// `max(x, 0)`, with the derivative 0 at 0. Exact.
#[derive(Clone, Copy, Debug)]
pub struct Relu;

impl Function for Relu {
    #[inline(always)]
    fn with_derivative<R: Real, S: Simd>(simd: S, x: R::Vector<S>) -> (R::Vector<S>, R::Vector<S>) {
        let zero = constant::<R, S>(simd, 0.0);
        // Not a maximum, which may drop NaN.
        let value = R::select_less(simd, x, zero, zero, x);
        // What is not above zero is zero or NaN here, and so is its derivative.
        let derivative = R::select_less(simd, zero, x, constant::<R, S>(simd, 1.0), value);
        (value, derivative)
    }
}

/// `max(x, 0)^2`, with the derivative `2 max(x, 0)`. Each is rounded once.
///
/// From <https://arxiv.org/abs/2109.08668>.
#[derive(Clone, Copy, Debug)]
pub struct SquaredRelu;

impl Function for SquaredRelu {
    #[inline(always)]
    fn with_derivative<R: Real, S: Simd>(simd: S, x: R::Vector<S>) -> (R::Vector<S>, R::Vector<S>) {
        let positive = Relu::value::<R, S>(simd, x);
        (
            R::vmul(simd, positive, positive),
            R::vadd(simd, positive, positive),
        )
    }
}

/// `x Phi(x)`, where `Phi` is the standard normal distribution: `Phi(x) = (1 + erf(x / sqrt(2))) / 2`. The derivative
/// is `Phi(x) + x phi(x)`, where `phi` is the density.
///
/// From <https://arxiv.org/abs/1606.08415>.
///
/// For `f32` the value's error is at most 1.6e-7 of `|x|` and the derivative's at most 1.6e-7. The value keeps its
/// digits in the tail: its error is at most 8 units in the last place where `x >= -12.9`, 70 on machines without a
/// fused multiply-add. For `f64` the errors are at most 4e-16 of `|x|` and 4e-16.
///
/// The value at negative infinity is NaN, the product of infinity and zero; the derivative there is 0.
#[derive(Clone, Copy, Debug)]
pub struct Gelu;

impl Function for Gelu {
    #[inline(always)]
    fn with_derivative<R: Real, S: Simd>(simd: S, x: R::Vector<S>) -> (R::Vector<S>, R::Vector<S>) {
        // Both results are zero from here on.
        let magnitude = bounded_magnitude::<R, S>(simd, x, 40.0);
        let (tail, density) = R::vnormal(simd, magnitude);
        let below = reflected::<R, S>(simd, x, tail);
        // The derivative at -|x|.
        let derivative = R::vsub(simd, tail, R::vmul(simd, magnitude, density));
        (
            R::vmul(simd, x, below),
            reflected::<R, S>(simd, x, derivative),
        )
    }
}

/// The approximation `0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))` of [`Gelu`], with the derivative of this
/// formula.
///
/// From <https://arxiv.org/abs/1606.08415>. As `(1 + tanh u) / 2` is the logistic sigmoid of `2 u`, no digits are lost
/// where `tanh` is close to -1.
///
/// For `f32` the value's error is at most 1.6e-7 of `|x|` and the derivative's at most 1.6e-7; for `f64` 4e-16 both. In
/// the tail the value's error grows with `u`, to 220 units in the last place of `f32` at `x = -10`; below, the value
/// falls to zero.
///
/// The value at negative infinity is NaN, the product of infinity and zero; the derivative there is 0.
#[derive(Clone, Copy, Debug)]
pub struct GeluTanh;

impl Function for GeluTanh {
    #[inline(always)]
    fn with_derivative<R: Real, S: Simd>(simd: S, x: R::Vector<S>) -> (R::Vector<S>, R::Vector<S>) {
        // 2 sqrt(2 / pi)
        const SCALE: f64 = std::f64::consts::FRAC_2_SQRT_PI * std::f64::consts::SQRT_2;
        const CUBE: f64 = 0.044_715 * SCALE;
        // e^-u is zero from here on.
        let magnitude = bounded_magnitude::<R, S>(simd, x, 25.0);
        let square = R::vmul(simd, magnitude, magnitude);
        let argument = horner::<R, S, 2>(simd, square, [CUBE, SCALE]);
        let slope = horner::<R, S, 2>(simd, square, [3.0 * CUBE, SCALE]);
        let argument = R::vmul(simd, magnitude, argument);
        let slope = R::vmul(simd, magnitude, slope);
        times_sigmoid::<R, S>(simd, x, argument, slope)
    }
}

/// `x / (1 + e^-x)`, also called Swish. With the logistic sigmoid `s`, the derivative is `s(x) (1 + x s(-x))`.
///
/// From <https://arxiv.org/abs/1702.03118>.
///
/// For `f32` the value's error is at most 4 units in the last place, where `x >= -87.33`; below, it is zero. The
/// derivative's error is at most 1.6e-7. For `f64` the errors are 4 units and 4e-16.
///
/// The value at negative infinity is NaN, the product of infinity and zero; the derivative there is 0.
#[derive(Clone, Copy, Debug)]
pub struct Silu;

impl Function for Silu {
    #[inline(always)]
    fn with_derivative<R: Real, S: Simd>(simd: S, x: R::Vector<S>) -> (R::Vector<S>, R::Vector<S>) {
        // e^-x is zero from here on.
        let magnitude = bounded_magnitude::<R, S>(simd, x, 800.0);
        times_sigmoid::<R, S>(simd, x, magnitude, magnitude)
    }
}

/// The logistic sigmoid `1 / (1 + e^-x)`.
///
/// For `f32` the error is at most 3 units in the last place where `x >= -87.33`, so that the result is a normal number;
/// below, it is zero. For `f64` it is at most 4 units.
#[inline(always)]
pub fn vsigmoid<R: Real, S: Simd>(simd: S, x: R::Vector<S>) -> R::Vector<S> {
    let magnitude = R::vabs(simd, x);
    let (tail, rest) = sigmoid_tail::<R, S>(simd, magnitude);
    R::select_less(simd, x, constant::<R, S>(simd, 0.0), tail, rest)
}

/// The sigmoid of `-x` and of `x`, where `x >= 0`.
#[inline(always)]
fn sigmoid_tail<R: Real, S: Simd>(simd: S, x: R::Vector<S>) -> (R::Vector<S>, R::Vector<S>) {
    let one = constant::<R, S>(simd, 1.0);
    // Of -x and not of x: this cannot overflow.
    let power = R::vexp(simd, R::vsub(simd, constant::<R, S>(simd, 0.0), x));
    let rest = R::vdiv(simd, one, R::vadd(simd, one, power));
    (R::vmul(simd, power, rest), rest)
}

/// `x s(u(x))` and its derivative, where `s` is the sigmoid and `u` an odd function, from `u(|x|)` and
/// `|x| u'(|x|)`.
#[inline(always)]
fn times_sigmoid<R: Real, S: Simd>(
    simd: S,
    x: R::Vector<S>,
    argument: R::Vector<S>,
    slope: R::Vector<S>,
) -> (R::Vector<S>, R::Vector<S>) {
    let (tail, rest) = sigmoid_tail::<R, S>(simd, argument);
    let sigmoid = R::select_less(simd, x, constant::<R, S>(simd, 0.0), tail, rest);
    // At -|x|: s'(u) = s(u) s(-u).
    let one = constant::<R, S>(simd, 1.0);
    let factor = R::vsub(simd, one, R::vmul(simd, slope, rest));
    let derivative = R::vmul(simd, tail, factor);
    (
        R::vmul(simd, x, sigmoid),
        reflected::<R, S>(simd, x, derivative),
    )
}

/// `f(x)` from `f(-|x|)`, where `f(x) + f(-x) = 1`.
#[inline(always)]
fn reflected<R: Real, S: Simd>(
    simd: S,
    x: R::Vector<S>,
    at_negative: R::Vector<S>,
) -> R::Vector<S> {
    let at_positive = R::vsub(simd, constant::<R, S>(simd, 1.0), at_negative);
    R::select_less(
        simd,
        x,
        constant::<R, S>(simd, 0.0),
        at_negative,
        at_positive,
    )
}

/// The smaller of `|x|` and `limit`, which keeps infinity out of products with zero; NaN for NaN.
#[inline(always)]
fn bounded_magnitude<R: Real, S: Simd>(simd: S, x: R::Vector<S>, limit: f64) -> R::Vector<S> {
    let magnitude = R::vabs(simd, x);
    let limit = constant::<R, S>(simd, limit);
    // Not a minimum, which may drop NaN.
    R::select_less(simd, limit, magnitude, limit, magnitude)
}

/// The error function, in two parts.
///
/// Below 1 it is `x + x p(x^2)`, where `p` approximates `erf(x) / x - 1`. Above it is `1 - e^q(|x|)`, where `q`
/// approximates `ln erfc`. Both polynomials are least-squares fits at 600 and 800 Chebyshev nodes of 40-digit values,
/// with Lawson's weights, which lead to the smallest maximal error: 1.3e-9 of `erf` for `p`, 1.1e-9 for `q`.
#[inline(always)]
pub(crate) fn erf_f32<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    const SMALL: [f64; 7] = [
        7.853_861_167e-5,
        -8.010_193_568e-4,
        5.188_327_679e-3,
        -2.685_381_193e-2,
        1.128_358_515e-1,
        -3.761_262_582e-1,
        1.283_791_657e-1,
    ];
    const LARGE: [f64; 7] = [
        1.855_743_375e-4,
        -2.939_610_43e-3,
        2.180_533_05e-2,
        -1.030_373_935e-1,
        -6.382_256_495e-1,
        -1.127_040_052,
        -3.537_155_75e-4,
    ];
    let square = simd.mul_f32s(x, x);
    let small = horner::<f32, S, 7>(simd, square, SMALL);
    // At the end, so that only this addition rounds the leading digits. It keeps the sign of zero too.
    let small = simd.mul_add_e_f32s(x, small, x);
    // From here on the result rounds to 1.
    let magnitude = bounded_magnitude::<f32, S>(simd, x, 4.0);
    let rest = f32::vexp(simd, horner::<f32, S, 7>(simd, magnitude, LARGE));
    let zero = simd.splat_f32s(0.0);
    let one = simd.splat_f32s(1.0);
    let large = f32::select_less(
        simd,
        x,
        zero,
        simd.sub_f32s(rest, one),
        simd.sub_f32s(one, rest),
    );
    f32::select_less(simd, magnitude, one, small, large)
}

/// `libm`'s, element by element: precision matters here, not speed.
#[inline(always)]
pub(crate) fn erf_f64<S: Simd>(_: S, x: S::f64s) -> S::f64s {
    each::<S>(x, libm::erf)
}

/// The tail is `e^(-x^2 / 2)` times a ratio of polynomials, as in Cody's
/// <https://doi.org/10.1090/S0025-5718-1969-0247736-4>.
///
/// The ratio is a least-squares fit at 1100 Chebyshev nodes of 40-digit values for x from 0 to 13.3, with Lawson's
/// weights; its largest error is 5e-9 of the value. All coefficients are positive, so that no digits cancel.
#[inline(always)]
pub(crate) fn normal_f32<S: Simd>(simd: S, x: S::f32s) -> (S::f32s, S::f32s) {
    const NUMERATOR: [f64; 5] = [
        4.020_197_114e-3,
        3.998_421_844e-2,
        1.813_069_001e-1,
        4.356_865_162e-1,
        0.5,
    ];
    const DENOMINATOR: [f64; 6] = [
        1.007_699_654e-2,
        1.002_329_536e-1,
        4.643_807_053e-1,
        1.194_484_811,
        1.669_257_951,
        1.0,
    ];
    let square = simd.mul_f32s(x, x);
    // What the square's rounding lost: it would be 4e-6 of the power at x = 12. Zero where the machine rounds twice.
    let lost = simd.mul_add_e_f32s(x, x, simd.neg_f32s(square));
    let half = simd.splat_f32s(-0.5);
    let power = f32::vexp(simd, simd.mul_f32s(square, half));
    let power = simd.mul_add_e_f32s(simd.mul_f32s(power, half), lost, power);
    let ratio = simd.div_f32s(
        horner::<f32, S, 5>(simd, x, NUMERATOR),
        horner::<f32, S, 6>(simd, x, DENOMINATOR),
    );
    let density = simd.mul_f32s(power, constant::<f32, S>(simd, DENSITY_AT_ZERO));
    (simd.mul_f32s(power, ratio), density)
}

/// `libm`'s tail, element by element.
#[inline(always)]
pub(crate) fn normal_f64<S: Simd>(simd: S, x: S::f64s) -> (S::f64s, S::f64s) {
    let tail = each::<S>(x, |x| 0.5 * libm::erfc(x * std::f64::consts::FRAC_1_SQRT_2));
    let half_square = simd.mul_f64s(simd.mul_f64s(x, x), simd.splat_f64s(-0.5));
    let power = f64::vexp(simd, half_square);
    (tail, simd.mul_f64s(power, simd.splat_f64s(DENSITY_AT_ZERO)))
}

/// `1 / sqrt(2 pi)`
const DENSITY_AT_ZERO: f64 =
    0.5 * std::f64::consts::FRAC_1_SQRT_2 * std::f64::consts::FRAC_2_SQRT_PI;

/// A polynomial, whose coefficient of the highest power is first.
#[inline(always)]
fn horner<R: Real, S: Simd, const N: usize>(
    simd: S,
    x: R::Vector<S>,
    coefficients: [f64; N],
) -> R::Vector<S> {
    let mut sum = constant::<R, S>(simd, coefficients[0]);
    for coefficient in &coefficients[1..] {
        sum = R::vmul_add(simd, sum, x, constant::<R, S>(simd, *coefficient));
    }
    sum
}

#[inline(always)]
fn constant<R: Real, S: Simd>(simd: S, x: f64) -> R::Vector<S> {
    R::splat(simd, R::from_f64(x))
}

#[inline(always)]
fn each<S: Simd>(mut x: S::f64s, f: impl Fn(f64) -> f64) -> S::f64s {
    let elements = (&raw mut x).cast::<f64>();
    for i in 0..lanes::<f64, S>() {
        // Safety: a vector is its elements one after another.
        unsafe { *elements.add(i) = f(*elements.add(i)) };
    }
    x
}

#[cfg(test)]
mod tests {
    use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_PI, FRAC_2_SQRT_PI, SQRT_2};

    use pulp::{Arch, Scalar, WithSimd};

    use super::*;

    /// Two results of one argument: the value and derivative of a [`Function`], or what else is tested.
    trait Pair {
        fn pair<R: Real, S: Simd>(simd: S, x: R::Vector<S>) -> (R::Vector<S>, R::Vector<S>);
    }

    impl<F: Function> Pair for F {
        #[inline(always)]
        fn pair<R: Real, S: Simd>(simd: S, x: R::Vector<S>) -> (R::Vector<S>, R::Vector<S>) {
            F::with_derivative::<R, S>(simd, x)
        }
    }

    /// What [`Function::value`] gives, twice.
    struct Value<F>(F);

    impl<F: Function> Pair for Value<F> {
        #[inline(always)]
        fn pair<R: Real, S: Simd>(simd: S, x: R::Vector<S>) -> (R::Vector<S>, R::Vector<S>) {
            let value = F::value::<R, S>(simd, x);
            (value, value)
        }
    }

    /// The error function and the sigmoid.
    struct ErfAndSigmoid;

    impl Pair for ErfAndSigmoid {
        #[inline(always)]
        fn pair<R: Real, S: Simd>(simd: S, x: R::Vector<S>) -> (R::Vector<S>, R::Vector<S>) {
            (R::verf(simd, x), vsigmoid::<R, S>(simd, x))
        }
    }

    /// The tail and density of the normal distribution.
    struct Normal;

    impl Pair for Normal {
        #[inline(always)]
        fn pair<R: Real, S: Simd>(simd: S, x: R::Vector<S>) -> (R::Vector<S>, R::Vector<S>) {
            R::vnormal(simd, x)
        }
    }

    /// What the rounding of `x^2` lost, if `vmul_add` rounds once; else zero.
    struct LostInSquare;

    impl Pair for LostInSquare {
        #[inline(always)]
        fn pair<R: Real, S: Simd>(simd: S, x: R::Vector<S>) -> (R::Vector<S>, R::Vector<S>) {
            let square = R::vmul(simd, x, x);
            let lost = R::vmul_add(
                simd,
                x,
                x,
                R::vsub(simd, constant::<R, S>(simd, 0.0), square),
            );
            (lost, lost)
        }
    }

    struct Apply<'a, P, R> {
        x: &'a [R],
        first: &'a mut [R],
        second: &'a mut [R],
        pair: std::marker::PhantomData<P>,
    }

    impl<P: Pair, R: Real> WithSimd for Apply<'_, P, R> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let lanes = lanes::<R, S>();
            for ((x, first), second) in self
                .x
                .chunks_exact(lanes)
                .zip(self.first.chunks_exact_mut(lanes))
                .zip(self.second.chunks_exact_mut(lanes))
            {
                // Safety: a chunk holds as many elements as a vector.
                unsafe {
                    let (a, b) = P::pair::<R, S>(simd, R::load(simd, x.as_ptr()));
                    R::store(simd, first.as_mut_ptr(), a);
                    R::store(simd, second.as_mut_ptr(), b);
                }
            }
        }
    }

    #[derive(Clone, Copy, Debug)]
    enum Width {
        Machine,
        Scalar,
    }

    const WIDTHS: [Width; 2] = [Width::Machine, Width::Scalar];

    fn apply<P: Pair, R: Real>(width: Width, x: &[R]) -> (Vec<R>, Vec<R>) {
        let n = x.len();
        // Whole vectors of every width.
        let mut x = x.to_vec();
        x.resize(n.next_multiple_of(64), R::default());
        let (mut first, mut second) = (x.clone(), x.clone());
        let apply = Apply {
            x: &x,
            first: &mut first,
            second: &mut second,
            pair: std::marker::PhantomData::<P>,
        };
        match width {
            Width::Machine => Arch::new().dispatch(apply),
            Width::Scalar => apply.with_simd(Scalar),
        }
        first.truncate(n);
        second.truncate(n);
        (first, second)
    }

    /// Finite numbers of every exponent and both signs, and a dense grid from -16 to 16.
    fn inputs() -> Vec<f32> {
        let every_exponent = (0..=u32::MAX).step_by(40_009).map(f32::from_bits);
        let grid = (-16_384_i16..16_384).map(|i| f32::from(i) / 1024.0 + 3e-5);
        every_exponent
            .chain(grid)
            .filter(|x| x.is_finite())
            .collect()
    }

    /// A grid from -32 to 32, of which every square is exact.
    fn inputs_f64() -> Vec<f64> {
        (-2048..=2048).map(|i| f64::from(i) / 64.0).collect()
    }

    /// `|got - exact|` in units of the last place of `exact` as `R`.
    fn units<R: Real>(got: R, exact: f64) -> f64 {
        let (digits, smallest) = if size_of::<R>() == 4 {
            (23, -126)
        } else {
            (52, -1022)
        };
        let exponent = ((exact.to_bits() >> 52) & 0x7ff) as i32 - 1023;
        (got.to_f64() - exact).abs() / (2_f64.powi(exponent.max(smallest)) * 2_f64.powi(-digits))
    }

    /// The largest of `error(x, got, exact(x))` over all `x >= lowest`, NaN if there is one.
    fn worst<R: Real>(
        x: &[R],
        got: &[R],
        lowest: f64,
        exact: impl Fn(f64) -> f64,
        error: impl Fn(f64, R, f64) -> f64,
    ) -> f64 {
        let mut worst = 0.0;
        for (x, got) in x.iter().zip(got).filter(|(x, _)| x.to_f64() >= lowest) {
            let error = error(x.to_f64(), *got, exact(x.to_f64()));
            if worst < error || error.is_nan() {
                worst = error;
            }
            if worst.is_nan() {
                break;
            }
        }
        worst
    }

    /// `phi(x)`
    fn density(x: f64) -> f64 {
        (-0.5 * x * x).exp() * DENSITY_AT_ZERO
    }

    /// `erf x = 2 / sqrt(pi) e^(-x^2) (x + 2 x^3 / 3 + 4 x^5 / (3 5) + ...)`, and 1 less twice the tail above 3.
    fn erf(x: f64) -> f64 {
        if x.abs() > 3.0 {
            return (1.0 - 2.0 * tail(x.abs() * SQRT_2)).copysign(x);
        }
        let (mut sum, mut term, mut odd) = (x, x, 1.0);
        while term.abs() > 1e-18 * sum.abs() {
            odd += 2.0;
            term *= 2.0 * x * x / odd;
            sum += term;
        }
        FRAC_2_SQRT_PI * (-x * x).exp() * sum
    }

    /// `Phi(-x)` for `x >= 0`: near zero by the error function, else by Laplace's continued fraction
    /// `phi(x) / (x + 1 / (x + 2 / (x + ...)))`.
    fn tail(x: f64) -> f64 {
        if x < 1.0 {
            return 0.5 - 0.5 * erf(x * FRAC_1_SQRT_2);
        }
        let fraction = (1..600).rev().fold(x, |sum, i| x + f64::from(i) / sum);
        density(x) / fraction
    }

    fn sigmoid(x: f64) -> f64 {
        1.0 / (1.0 + (-x).exp())
    }

    /// Value and derivative, with the error function of `libm`.
    fn gelu(x: f64) -> (f64, f64) {
        let below = 0.5 * libm::erfc(-x * FRAC_1_SQRT_2);
        (x * below, below + x.clamp(-1e3, 1e3) * density(x))
    }

    /// Value and derivative, with `tanh` as far as it keeps its digits.
    fn gelu_tanh(x: f64) -> (f64, f64) {
        let bounded = x.clamp(-1e3, 1e3);
        let scale = FRAC_2_PI.sqrt();
        let u = scale * (bounded + 0.044_715 * bounded.powi(3));
        let slope = scale * (1.0 + 3.0 * 0.044_715 * bounded * bounded);
        let gate = if x < -1.0 {
            sigmoid(2.0 * u)
        } else {
            0.5 * (1.0 + u.tanh())
        };
        let cosh = u.cosh();
        (x * gate, gate + 0.5 * bounded * slope / (cosh * cosh))
    }

    /// Value and derivative.
    fn silu(x: f64) -> (f64, f64) {
        let gate = sigmoid(x);
        // (x e^x + e^x + e^2x) / (1 + e^x)^2, for -|x| by symmetry.
        let e = (-x.abs()).exp();
        let below = e * (1.0 + e - x.abs().min(1e3)) / ((1.0 + e) * (1.0 + e));
        (x * gate, if x < 0.0 { below } else { 1.0 - below })
    }

    fn rounds_once(width: Width) -> bool {
        let (lost, _) = apply::<LostInSquare, f32>(width, &[1.0 + f32::EPSILON]);
        lost[0] != 0.0
    }

    /// The errors that [`check`] allows.
    struct Bounds {
        /// Of the value, in units of the last place, where `x >= lowest`.
        units: f64,
        lowest: f64,
        /// Of the value, relative to `|x|`.
        value: f64,
        /// Of the derivative.
        derivative: f64,
    }

    fn check<F: Function, R: Real>(
        width: Width,
        x: &[R],
        exact: impl Fn(f64) -> (f64, f64) + Copy,
        bounds: &Bounds,
    ) {
        let (value, derivative) = apply::<F, R>(width, x);
        let all = f64::NEG_INFINITY;
        let in_units = worst(
            x,
            &value,
            bounds.lowest,
            |x| exact(x).0,
            |_, got, exact| units(got, exact),
        );
        assert!(in_units <= bounds.units, "{width:?}: {in_units} units");
        let of_value = worst(
            x,
            &value,
            all,
            |x| exact(x).0,
            |x, got, exact| (got.to_f64() - exact).abs() / x.abs().max(1e-30),
        );
        assert!(of_value <= bounds.value, "{width:?}: {of_value:e} of x");
        let of_derivative = worst(
            x,
            &derivative,
            all,
            |x| exact(x).1,
            |_, got, exact| (got.to_f64() - exact).abs(),
        );
        assert!(
            of_derivative <= bounds.derivative,
            "{width:?}: derivative {of_derivative:e}"
        );
        let (alone, _) = apply::<Value<F>, R>(width, x);
        assert!(
            alone.iter().zip(&value).all(|(a, b)| a == b),
            "{width:?}: value differs from that with derivative"
        );
    }

    #[test]
    fn erf_of_f32_is_right_to_one_and_a_half_units() {
        let x = inputs();
        for width in WIDTHS {
            let (got, _) = apply::<ErfAndSigmoid, f32>(width, &x);
            let all = f64::NEG_INFINITY;
            let worst = worst(&x, &got, all, libm::erf, |_, got, exact| units(got, exact));
            assert!(worst <= 1.5, "{width:?}: {worst} units");
        }
    }

    #[test]
    fn sigmoid_of_f32_is_right_to_three_units() {
        let x = inputs();
        for width in WIDTHS {
            let (_, got) = apply::<ErfAndSigmoid, f32>(width, &x);
            let units = worst(&x, &got, -87.33, sigmoid, |_, got, exact| units(got, exact));
            assert!(units <= 3.0, "{width:?}: {units} units");
            let all = f64::NEG_INFINITY;
            let error = worst(&x, &got, all, sigmoid, |_, got, exact| {
                (f64::from(got) - exact).abs()
            });
            assert!(error <= 1.3e-7, "{width:?}: {error:e}");
        }
    }

    #[test]
    fn normal_distribution_of_f32_keeps_its_digits_in_the_tail() {
        let mut x = inputs();
        x.retain(|x| (0.0..=12.9).contains(x));
        for width in WIDTHS {
            let (tails, densities) = apply::<Normal, f32>(width, &x);
            let allowed = if rounds_once(width) {
                [7.0, 3.0]
            } else {
                [70.0, 70.0]
            };
            let of_tail = worst(&x, &tails, 0.0, tail, |_, got, exact| units(got, exact));
            assert!(of_tail <= allowed[0], "{width:?}: tail {of_tail} units");
            let of_density = worst(&x, &densities, 0.0, density, |_, got, exact| {
                units(got, exact)
            });
            assert!(
                of_density <= allowed[1],
                "{width:?}: density {of_density} units"
            );
        }
    }

    #[test]
    fn normal_distribution_of_f64() {
        let mut x = inputs_f64();
        x.retain(|x| *x >= 0.0);
        for width in WIDTHS {
            let (tails, densities) = apply::<Normal, f64>(width, &x);
            // The argument's rounding counts x^2 times.
            let relative = |x: f64, got, exact| units(got, exact) / x.powi(2).max(4.0);
            let of_tail = worst(&x, &tails, 0.0, tail, relative);
            assert!(of_tail <= 2.0, "{width:?}: tail {of_tail} units");
            let of_density = worst(&x, &densities, 0.0, density, |_, got, exact| {
                units(got, exact)
            });
            assert!(of_density <= 1.0, "{width:?}: density {of_density} units");
        }
    }

    #[test]
    fn gelu_of_f32_keeps_its_digits_in_the_tail() {
        for width in WIDTHS {
            let bounds = Bounds {
                units: if rounds_once(width) { 8.0 } else { 70.0 },
                lowest: -12.9,
                value: 1.6e-7,
                derivative: 1.6e-7,
            };
            check::<Gelu, f32>(width, &inputs(), gelu, &bounds);
        }
    }

    #[test]
    fn gelu_tanh_of_f32() {
        let bounds = Bounds {
            units: 220.0,
            lowest: -10.0,
            value: 1.6e-7,
            derivative: 1.6e-7,
        };
        for width in WIDTHS {
            check::<GeluTanh, f32>(width, &inputs(), gelu_tanh, &bounds);
        }
        // The value's error grows with the exponent's in the tail; near zero it is small.
        let bounds = Bounds {
            units: 5.0,
            lowest: -0.5,
            ..bounds
        };
        for width in WIDTHS {
            check::<GeluTanh, f32>(width, &inputs(), gelu_tanh, &bounds);
        }
    }

    #[test]
    fn silu_of_f32_is_right_to_four_units() {
        let bounds = Bounds {
            units: 4.0,
            lowest: -87.33,
            value: 1.6e-7,
            derivative: 1.6e-7,
        };
        for width in WIDTHS {
            check::<Silu, f32>(width, &inputs(), silu, &bounds);
        }
    }

    #[test]
    fn functions_of_f64() {
        let x = inputs_f64();
        let bounds = |units, lowest| Bounds {
            units,
            lowest,
            value: 4e-16,
            derivative: 4e-16,
        };
        let gelu = |x: f64| {
            let below = if x < 0.0 { tail(-x) } else { 1.0 - tail(x) };
            (x * below, below + x * density(x))
        };
        for width in WIDTHS {
            check::<Gelu, f64>(width, &x, gelu, &bounds(1200.0, -32.0));
            check::<GeluTanh, f64>(width, &x, gelu_tanh, &bounds(150.0, -10.0));
            check::<Silu, f64>(width, &x, silu, &bounds(4.0, -32.0));
        }
    }

    #[test]
    fn erf_and_sigmoid_of_f64() {
        let x = inputs_f64();
        let all = f64::NEG_INFINITY;
        for width in WIDTHS {
            let (first, second) = apply::<ErfAndSigmoid, f64>(width, &x);
            let same = x.iter().zip(&first).all(|(x, erf)| *erf == libm::erf(*x));
            assert!(same, "{width:?}: not libm's");
            // The series has an error of some units itself.
            let of_erf = worst(&x, &first, all, erf, |_, got, exact| units(got, exact));
            assert!(of_erf <= 10.0, "{width:?}: erf {of_erf} units");
            let of_sigmoid = worst(&x, &second, all, sigmoid, |_, got, exact| units(got, exact));
            assert!(of_sigmoid <= 4.0, "{width:?}: sigmoid {of_sigmoid} units");
        }
    }

    /// The largest difference of the derivative and the slope between two points beside `x`.
    fn slope_error<F: Function>() -> f64 {
        const STEP: f64 = 1e-5;
        // No point is within a step of zero, where two of the functions have a kink.
        let x: Vec<f64> = (-400..400).map(|i| f64::from(i) / 32.0 + 0.01).collect();
        let beside = |step| {
            let x: Vec<f64> = x.iter().map(|x| x + step).collect();
            apply::<F, f64>(Width::Machine, &x).0
        };
        let (_, derivative) = apply::<F, f64>(Width::Machine, &x);
        let (before, after) = (beside(-STEP), beside(STEP));
        (0..x.len())
            .map(|i| (derivative[i] - (after[i] - before[i]) / (2.0 * STEP)).abs())
            .fold(0.0, f64::max)
    }

    #[test]
    fn derivatives_are_slopes() {
        let errors = [
            slope_error::<Identity>(),
            slope_error::<Relu>(),
            slope_error::<SquaredRelu>(),
            slope_error::<Gelu>(),
            slope_error::<GeluTanh>(),
            slope_error::<Silu>(),
        ];
        assert!(errors.iter().all(|error| *error < 2e-9), "{errors:?}");
    }

    #[test]
    fn relu_is_exact() {
        let x = inputs();
        for width in WIDTHS {
            let exact = |x: f32| if x > 0.0 { (x, 1.0) } else { (0.0, 0.0) };
            let (value, derivative) = apply::<Relu, f32>(width, &x);
            let (square, twice) = apply::<SquaredRelu, f32>(width, &x);
            let (identity, one) = apply::<Identity, f32>(width, &x);
            for (i, &x) in x.iter().enumerate() {
                assert_eq!((value[i], derivative[i]), exact(x), "{width:?}: {x}");
                let positive = exact(x).0;
                let expected = (positive * positive, 2.0 * positive);
                assert_eq!((square[i], twice[i]), expected, "{width:?}: {x}");
                assert_eq!((identity[i], one[i]), (x, 1.0), "{width:?}: {x}");
            }
        }
    }

    /// Checks `(x, value, derivative)`, where NaN equals NaN and zeros of both signs are equal.
    fn special<P: Pair, R: Real + std::fmt::Debug>(cases: &[[f64; 3]]) {
        let same = |got: R, expected: f64| {
            got.to_f64() == expected || (got.to_f64().is_nan() && expected.is_nan())
        };
        for width in WIDTHS {
            for case in cases {
                // In every place of a vector.
                let (first, second) = apply::<P, R>(width, &[R::from_f64(case[0]); 64]);
                for (first, second) in first.into_iter().zip(second) {
                    assert!(
                        same(first, case[1]) && same(second, case[2]),
                        "{width:?}: {first:?}, {second:?} instead of {case:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn special_values() {
        const NAN: f64 = f64::NAN;
        const INFINITY: f64 = f64::INFINITY;
        const LARGEST: f64 = f32::MAX as f64;
        // 2^100
        const HUGE: f64 = (1_u128 << 100) as f64;
        const SMALLEST: f64 = 1.401_298_464_324_817e-45;

        let smooth = [
            [NAN, NAN, NAN],
            [INFINITY, INFINITY, 1.0],
            [-INFINITY, NAN, 0.0],
            [0.0, 0.0, 0.5],
            [LARGEST, LARGEST, 1.0],
            [-LARGEST, 0.0, 0.0],
            [HUGE, HUGE, 1.0],
            [-HUGE, 0.0, 0.0],
        ];
        special::<Gelu, f32>(&smooth);
        special::<Gelu, f64>(&smooth);
        special::<GeluTanh, f32>(&smooth);
        special::<GeluTanh, f64>(&smooth);
        special::<Silu, f32>(&smooth);
        special::<Silu, f64>(&smooth);
        let relu = [
            [NAN, NAN, NAN],
            [INFINITY, INFINITY, 1.0],
            [-INFINITY, 0.0, 0.0],
            [0.0, 0.0, 0.0],
            [-0.0, 0.0, 0.0],
            [SMALLEST, SMALLEST, 1.0],
            [-SMALLEST, 0.0, 0.0],
        ];
        special::<Relu, f32>(&relu);
        special::<Relu, f64>(&relu);
        let squared = [
            [NAN, NAN, NAN],
            [INFINITY, INFINITY, INFINITY],
            [-INFINITY, 0.0, 0.0],
            [0.0, 0.0, 0.0],
        ];
        special::<SquaredRelu, f32>(&squared);
        special::<SquaredRelu, f64>(&squared);
        let identity = [[NAN, NAN, 1.0], [-INFINITY, -INFINITY, 1.0]];
        special::<Identity, f32>(&identity);
        special::<Identity, f64>(&identity);
        let erf_and_sigmoid = [
            [NAN, NAN, NAN],
            [INFINITY, 1.0, 1.0],
            [-INFINITY, -1.0, 0.0],
            [LARGEST, 1.0, 1.0],
            [-LARGEST, -1.0, 0.0],
            [0.0, 0.0, 0.5],
            [SMALLEST, SMALLEST, 0.5],
        ];
        special::<ErfAndSigmoid, f32>(&erf_and_sigmoid);
        special::<ErfAndSigmoid, f64>(&erf_and_sigmoid[..6]);
        special::<Normal, f32>(&[[NAN, NAN, NAN], [40.0, 0.0, 0.0]]);
        special::<Normal, f64>(&[[NAN, NAN, NAN]]);
    }

    #[test]
    fn erf_keeps_the_sign_of_zero() {
        for width in WIDTHS {
            let (erf, _) = apply::<ErfAndSigmoid, f32>(width, &[0.0, -0.0]);
            assert_eq!([erf[0], erf[1]].map(f32::is_sign_negative), [false, true]);
        }
    }
}
