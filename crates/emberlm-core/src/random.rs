//! Random numbers without state: a key and a counter name every draw.

use std::f64::consts::TAU;

/// A key into a family of random sequences; the same key and counter always give the same number.
///
/// There is no state to thread through a program or to save in a checkpoint. A dropout mask, for
/// instance, is drawn again in the backward pass from the key of its step and layer, and element
/// `i` of a tensor uses counter `i`, in any order and on any number of threads.
///
/// # Construction
///
/// With `mix` the finaliser of splitmix64 (Steele, Lea and Flood 2014,
/// <https://doi.org/10.1145/2660193.2660195>, in Stafford's variant 13), `G` its odd constant
/// `2^64 / golden ratio` and one constant `domain` for each purpose, everything is
///
/// `draw(key, word) = mix(key ^ mix(word * G + domain))`
///
/// Both `mix` and the map from word to draw are bijections: one key never repeats a draw in `2^64`
/// counters, and distinct words fold to distinct keys. The generator of the paper is `mix(key +
/// counter * G)`, in which all keys walk one common orbit and can overlap in long runs; the inner
/// `mix` here removes that, at the price of a second round.
///
/// That is enough for dropout, initialisation and sampling, where the numbers must look independent
/// to the computation that uses them. It is not cryptography: `mix` is easily inverted.
///
/// # Reproducibility
///
/// [`bits`](Self::bits), [`uniform`](Self::uniform) and [`below`](Self::below) are exact on every
/// machine. [`normal`](Self::normal) uses the logarithm and the cosine of the platform, which may
/// differ in the last bit. The sequence is part of the public interface.
///
/// ```
/// use emberlm_core::RandomKey;
///
/// let dropout = RandomKey::new(42).fold_str("dropout");
/// let mask_of = |step: u64, layer: u64| -> Vec<bool> {
///     let key = dropout.fold(step).fold(layer);
///     (0..8).map(|element| key.uniform(element) < 0.5).collect()
/// };
/// assert_eq!(mask_of(3, 0), mask_of(3, 0));
/// assert_ne!(mask_of(3, 0), mask_of(3, 1));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RandomKey(u64);

/// `2^64` divided by the golden ratio, made odd: the increment of splitmix64.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

// The domains are arbitrary; they only have to be far apart, so that the small words of one purpose
// never meet the small words of another. These are the first hexadecimal digits of pi.
const DOMAIN_BITS: u64 = 0x243f_6a88_85a3_08d3;
const DOMAIN_FOLD: u64 = 0x1319_8a2e_0370_7344;
const DOMAIN_ANGLE: u64 = 0xa409_3822_299f_31d0;

impl RandomKey {
    /// The key of a seed. Neighbouring seeds are as unrelated as any two.
    pub fn new(seed: u64) -> Self {
        Self(0).fold(seed)
    }

    /// The key derived from this one for `word`: a step, a layer, a stream of elements.
    ///
    /// The order of several folds matters: `key.fold(1).fold(2)` is not `key.fold(2).fold(1)`.
    pub fn fold(&self, word: u64) -> Self {
        Self(self.draw(word, DOMAIN_FOLD))
    }

    /// The key derived from this one for a name, such as the path of a parameter.
    ///
    /// Folds the 64-bit FNV-1a hash of the name: a few million names share no hash in all
    /// likelihood, but names chosen with intent can.
    pub fn fold_str(&self, name: &str) -> Self {
        // Offset basis and prime of <https://datatracker.ietf.org/doc/draft-eastlake-fnv>.
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        self.fold(hash)
    }

    /// 64 random bits.
    ///
    /// [`uniform`](Self::uniform), [`normal`](Self::normal) and [`below`](Self::below) are made from
    /// these bits: two of them with the same key and the same counter depend on each other.
    pub fn bits(&self, counter: u64) -> u64 {
        self.draw(counter, DOMAIN_BITS)
    }

    /// A uniform number in `[0, 1)`: a multiple of `2^-53`.
    pub fn uniform(&self, counter: u64) -> f64 {
        unit(self.bits(counter))
    }

    /// A standard normal number, always finite and below 8.6 in size.
    ///
    /// The cosine half of Box and Muller (1958); the sine half is left unused, so that one counter
    /// is one number.
    pub fn normal(&self, counter: u64) -> f64 {
        // In (0, 1] instead of [0, 1): the logarithm of zero is not finite.
        let radius = 1.0 - self.uniform(counter);
        let angle = unit(self.draw(counter, DOMAIN_ANGLE));
        (-2.0 * radius.ln()).sqrt() * (TAU * angle).cos()
    }

    /// A uniform integer in `0..n`.
    ///
    /// Takes the high word of `bits * n`, after Lemire (<https://arxiv.org/abs/1805.10941>) without
    /// his rejection step, since a draw is one counter: a value's probability is off by less than
    /// `2^-64`.
    ///
    /// # Panics
    ///
    /// If `n` is 0.
    pub fn below(&self, counter: u64, n: u64) -> u64 {
        assert!(n > 0, "there is no integer below 0: n must be at least 1");
        ((u128::from(self.bits(counter)) * u128::from(n)) >> 64) as u64
    }

    fn draw(&self, word: u64, domain: u64) -> u64 {
        mix(self.0 ^ mix(word.wrapping_mul(GOLDEN).wrapping_add(domain)))
    }
}

/// The finaliser of splitmix64: a bijection in which every input bit reaches every output bit.
fn mix(mut word: u64) -> u64 {
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// The upper 53 bits, as many as an `f64` holds, read as a fraction.
fn unit(bits: u64) -> f64 {
    const SCALE: f64 = 1.0 / (1_u64 << 53) as f64;
    (bits >> 11) as f64 * SCALE
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    /// Draws in each statistic. The standard error of a correlation is then `1 / 256`.
    const N: u64 = 1 << 16;
    /// Five standard errors: a sound mixer stays below, and the tests are deterministic.
    const BOUND: f64 = 5.0 / 256.0;

    fn moments(draw: impl Fn(u64) -> f64) -> [f64; 2] {
        mean_and_variance(&(0..N).map(draw).collect::<Vec<_>>())
    }

    fn mean_and_variance(draws: &[f64]) -> [f64; 2] {
        let n = draws.len() as f64;
        let mean = draws.iter().sum::<f64>() / n;
        let variance = draws.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
        [mean, variance]
    }

    fn correlation(a: impl Fn(u64) -> f64, b: impl Fn(u64) -> f64) -> f64 {
        let [a, b]: [Vec<f64>; 2] = [(0..N).map(a).collect(), (0..N).map(b).collect()];
        let [[mean_a, variance_a], [mean_b, variance_b]] = [&a, &b].map(|x| mean_and_variance(x));
        let products = a.iter().zip(&b).map(|(a, b)| (a - mean_a) * (b - mean_b));
        products.sum::<f64>() / N as f64 / (variance_a * variance_b).sqrt()
    }

    /// The largest correlation between neighbours of `source(key word, counter)`: counters a small
    /// lag or a power of two apart, and keys that differ by a small word or in one bit.
    fn largest_correlation(source: impl Fn(u64, u64) -> u64) -> f64 {
        let at = |key: u64, counter: u64| unit(source(key, counter));
        let lags = (1..=8).chain((4..64).step_by(4).map(|bit| 1_u64 << bit));
        lags.flat_map(|lag| {
            [
                correlation(|i| at(7, i), |i| at(7, i.wrapping_add(lag))),
                correlation(|i| at(i, 7), |i| at(i.wrapping_add(lag), 7)),
                correlation(|i| at(7, i), |i| at(7_u64.wrapping_add(lag), i)),
                correlation(|i| at(7, i), |i| at(7 ^ lag, i)),
            ]
        })
        .map(f64::abs)
        .fold(0.0, f64::max)
    }

    /// How far the probability that flipping input bit `i` flips output bit `o` lies from one half,
    /// at its largest over all `i` and `o`; `flip` returns the two outputs.
    fn worst_avalanche(flip: impl Fn(u64, u64) -> [u64; 2]) -> f64 {
        const TRIALS: u64 = 1 << 12;
        let mut worst = 0.0_f64;
        for input in 0..64 {
            let mut flips = [0_u32; 64];
            for trial in 0..TRIALS {
                let [before, after] = flip(trial, 1 << input);
                for (output, count) in flips.iter_mut().enumerate() {
                    *count += ((before ^ after) >> output & 1) as u32;
                }
            }
            for count in flips {
                worst = worst.max((f64::from(count) / TRIALS as f64 - 0.5).abs());
            }
        }
        worst
    }

    #[test]
    fn the_sequence_is_frozen() {
        // Computed by an independent implementation of the documented formula.
        let key = RandomKey::new(42);
        assert_eq!(key.0, 0xd49d_d834_4915_9f95);
        assert_eq!(key.bits(0), 0x69fc_476e_18de_5fac);
        assert_eq!(key.bits(1), 0x72b4_7843_3a1e_2937);
        assert_eq!(key.bits(2), 0xa1b8_7173_05ce_bfe8);
        assert_eq!(key.bits(u64::MAX), 0x2665_b772_1b83_14e9);
        assert_eq!(key.fold(7).0, 0x056d_d218_0a65_c0c2);
        assert_eq!(key.fold_str("decoder.0.weight").0, 0x9a41_7875_32b2_0260);
        assert_eq!(
            [0, 1, 2].map(|i| key.uniform(i)),
            [0.41400572240751765, 0.448066250241134, 0.6317206292931655]
        );
        assert_eq!([0, 1, 2].map(|i| key.below(i, 1000)), [414, 448, 631]);
        for (i, expected) in [-0.2513930061553001, -0.02570135851190598, -1.37135475009654]
            .into_iter()
            .enumerate()
        {
            assert!((key.normal(i as u64) - expected).abs() < 1e-14);
        }
    }

    #[test]
    fn mix_is_the_finaliser_of_splitmix64() {
        // The published first outputs of splitmix64 with seed 1234567.
        let state = |n: u64| 1_234_567_u64.wrapping_add(n.wrapping_mul(GOLDEN));
        assert_eq!(mix(state(1)), 6_457_827_717_110_365_317);
        assert_eq!(mix(state(2)), 3_203_168_211_198_807_973);
        assert_eq!(mix(state(3)), 9_817_491_932_198_370_423);
    }

    #[test]
    fn uniform_has_the_moments_of_a_uniform_number() {
        for seed in 0..4 {
            let key = RandomKey::new(seed);
            let [mean, variance] = moments(|i| key.uniform(i));
            // Standard errors: sqrt(1/12) / 256 = 0.0011 and sqrt(1/180) / 256 = 0.0003.
            assert!((mean - 0.5).abs() < 0.005, "mean {mean}");
            assert!(
                (variance - 1.0 / 12.0).abs() < 0.0015,
                "variance {variance}"
            );
            assert!((0..N).all(|i| (0.0..1.0).contains(&key.uniform(i))));
        }
    }

    #[test]
    fn unit_stays_below_one() {
        assert_eq!(unit(0), 0.0);
        assert_eq!(unit(u64::MAX), 1.0 - f64::EPSILON / 2.0);
    }

    #[test]
    fn normal_has_the_moments_of_a_normal_number() {
        for seed in 0..4 {
            let key = RandomKey::new(seed);
            let [mean, variance] = moments(|i| key.normal(i));
            let [_, fourth] = moments(|i| key.normal(i).powi(2));
            // Standard errors: 1/256 = 0.004, sqrt(2)/256 = 0.006 and sqrt(56)/256 = 0.03.
            assert!(mean.abs() < 0.02, "mean {mean}");
            assert!((variance - 1.0).abs() < 0.03, "variance {variance}");
            assert!((fourth - 2.0).abs() < 0.15, "variance of squares {fourth}");
            // P(|x| < 1) = 0.6827, with a standard error of 0.0018.
            let inside = (0..N).filter(|&i| key.normal(i).abs() < 1.0).count() as f64 / N as f64;
            assert!((inside - 0.6827).abs() < 0.009, "inside {inside}");
        }
    }

    #[test]
    fn neighbouring_normals_are_uncorrelated() {
        let [key, next] = [RandomKey::new(1), RandomKey::new(2)];
        for (a, b) in [(key, 1), (next, 0)] {
            let r = correlation(|i| key.normal(i), |i| a.normal(i + b));
            assert!(r.abs() < BOUND, "correlation {r}");
            let r = correlation(|i| key.normal(i).powi(2), |i| a.normal(i + b).powi(2));
            assert!(r.abs() < BOUND, "correlation of squares {r}");
        }
    }

    #[test]
    fn neighbouring_counters_and_keys_are_uncorrelated() {
        let seeds = largest_correlation(|seed, i| RandomKey::new(seed).bits(i));
        assert!(seeds < BOUND, "seeds: {seeds}");
        let folds = largest_correlation(|word, i| RandomKey::new(0).fold(word).bits(i));
        assert!(folds < BOUND, "folds: {folds}");
    }

    #[test]
    fn a_broken_mixer_fails_the_bounds() {
        // No mixing at all, a multiplication only, and the finaliser without its last product.
        let weyl = |key: u64, i: u64| key.wrapping_add(i.wrapping_mul(GOLDEN));
        let half = |word: u64| (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        assert!(largest_correlation(weyl) > BOUND);
        assert!(largest_correlation(|key, i| (key ^ i).wrapping_mul(GOLDEN)) > BOUND);
        assert!(largest_correlation(|key, i| half(weyl(key, i))) > BOUND);
        assert!(worst_avalanche(|trial, bit| [trial, trial ^ bit].map(half)) > 0.05);
    }

    #[test]
    fn every_input_bit_flips_every_output_bit_half_of_the_time() {
        // The standard error is 1/128 = 0.008, and 4096 pairs of bits have a largest one near 0.03.
        let key = RandomKey::new(3);
        let counters = worst_avalanche(|trial, bit| [trial, trial ^ bit].map(|i| key.bits(i)));
        assert!(counters < 0.05, "counters: {counters}");
        let folds = worst_avalanche(|trial, bit| [trial, trial ^ bit].map(|w| key.fold(w).bits(5)));
        assert!(folds < 0.05, "folds: {folds}");
    }

    #[test]
    fn pairs_of_neighbours_fill_the_square_evenly() {
        // A chi-square of 255 degrees of freedom: mean 255, standard deviation 22.6.
        let key = RandomKey::new(9);
        let mut cells = [0_u32; 256];
        for i in 0..N {
            cells[(key.below(i, 16) * 16 + key.below(i + 1, 16)) as usize] += 1;
        }
        let expected = N as f64 / 256.0;
        let chi_square: f64 = cells
            .iter()
            .map(|&n| (f64::from(n) - expected).powi(2) / expected)
            .sum();
        // Too even is as wrong as too uneven.
        assert!((142.0..368.0).contains(&chi_square), "{chi_square}");
    }

    #[test]
    fn keys_and_draws_do_not_meet() {
        let key = RandomKey::new(0);
        let mut seen = HashSet::new();
        for i in 0..1000 {
            assert!(seen.insert(key.bits(i)));
            assert!(seen.insert(key.fold(i).0));
            assert!(seen.insert(key.fold(i).fold(i + 1).0));
            assert!(seen.insert(key.fold(i + 1).fold(i).0));
            assert!(seen.insert(key.fold_str(&format!("layer.{i}")).0));
        }
    }

    #[test]
    fn below_reaches_every_value_and_no_other() {
        let key = RandomKey::new(5);
        let mut counts = [0_u32; 7];
        (0..7000).for_each(|i| counts[key.below(i, 7) as usize] += 1);
        // The standard deviation of a count is 29.
        assert!(counts.iter().all(|n| (850..1150).contains(n)), "{counts:?}");
        assert!((0..100).all(|i| key.below(i, 1) == 0));
        assert!((0..100).any(|i| key.below(i, u64::MAX) > u64::MAX / 2));
    }

    #[test]
    #[should_panic(expected = "n must be at least 1")]
    fn below_zero_panics() {
        RandomKey::new(0).below(0, 0);
    }
}
