//! T5's relative positions: a learned bias of the scores for each bucket of distances.

use burn::{
    config::Config,
    module::{Module, Param},
    nn::Initializer,
    tensor::{Device, Int, Tensor, TensorData},
};

use crate::{InvalidConfig, Lengths, assert_valid};

/// The bucket of the distance from a query to a key, `relative_position = j - i`.
///
/// Of the `n` buckets of a direction, the first `n / 2` hold one distance each; the others hold ranges that grow
/// geometrically up to `max_distance`, and the last one everything from there on:
/// `min(n - 1, e + floor(ln(distance / e) / ln(max_distance / e) (n - e)))` with `e = n / 2`. If `bidirectional`, keys
/// after the query have the second half of `n_buckets`; else they count as distance 0.
///
/// Raffel et al. 2020, section 2.1, <https://arxiv.org/abs/1910.10683>. As in transformers the logarithm is that of f32,
/// which decides distances that stand on a border.
///
/// ```
/// use emberlm_core::relative_bucket;
///
/// assert_eq!(relative_bucket(-3, true, 32, 128), 3);
/// assert_eq!(relative_bucket(3, true, 32, 128), 16 + 3);
/// assert_eq!(relative_bucket(-1000, false, 32, 128), 31);
/// ```
///
/// # Panics
///
/// If a direction has fewer than two buckets, or `max_distance` is not above half of them.
pub fn relative_bucket(
    relative_position: i64,
    bidirectional: bool,
    n_buckets: usize,
    max_distance: usize,
) -> usize {
    Buckets::new(bidirectional, n_buckets, max_distance).of(relative_position)
}

/// [`relative_bucket`] with its sizes taken apart.
#[derive(Debug, Clone, Copy)]
struct Buckets {
    bidirectional: bool,
    /// Buckets of one direction.
    n: usize,
    /// Distances that have a bucket of their own.
    n_exact: usize,
    max_distance: usize,
}

impl Buckets {
    fn new(bidirectional: bool, n_buckets: usize, max_distance: usize) -> Self {
        let n = if bidirectional {
            n_buckets / 2
        } else {
            n_buckets
        };
        let n_exact = n / 2;
        assert!(
            n_exact > 0,
            "n_buckets: a direction needs at least two, of {n_buckets} it has {n}"
        );
        assert!(
            max_distance > n_exact,
            "max_distance: {max_distance} is not above the {n_exact} distances that have a bucket of their own"
        );
        Self {
            bidirectional,
            n,
            n_exact,
            max_distance,
        }
    }

    fn of(&self, relative_position: i64) -> usize {
        let is_after = relative_position > 0;
        let distance = match is_after && !self.bidirectional {
            true => 0,
            false => usize::try_from(relative_position.unsigned_abs()).unwrap_or(usize::MAX),
        };
        let bucket = match distance < self.n_exact {
            true => distance,
            false => self.of_range(distance).min(self.n - 1),
        };
        match is_after && self.bidirectional {
            true => self.n + bucket,
            false => bucket,
        }
    }

    /// The bucket of a distance that shares it.
    fn of_range(&self, distance: usize) -> usize {
        let n_exact = self.n_exact as f32;
        let whole = (self.max_distance as f64 / self.n_exact as f64).ln() as f32;
        let share = ln(distance as f32 / n_exact) / whole;
        self.n_exact + (share * (self.n - self.n_exact) as f32) as usize
    }
}

/// The logarithm rounded to f32 once, so that every platform has the same.
fn ln(x: f32) -> f32 {
    f64::from(x).ln() as f32
}

/// Configuration of [`RelativeBias`]. The defaults are T5's.
#[derive(Config, Debug)]
pub struct RelativeBiasConfig {
    /// Number of query heads.
    pub n_heads: usize,
    /// Number of buckets, of both directions together. Default: 32.
    #[config(default = 32)]
    pub n_buckets: usize,
    /// Distance from which on all share the last bucket. Default: 128.
    #[config(default = 128)]
    pub max_distance: usize,
    /// Whether keys after the query have buckets of their own, as in an encoder; else they share that of distance 0, as
    /// in a causal decoder. Default: true.
    #[config(default = true)]
    pub bidirectional: bool,
}

impl RelativeBiasConfig {
    /// Checks the fields against each other.
    ///
    /// # Errors
    ///
    /// No heads, fewer than two buckets a direction, or a largest distance that is not above half of a direction's.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        InvalidConfig::require_positive(&[("n_heads", self.n_heads)])?;
        let (least, range, n_directions) = match self.bidirectional {
            true => (4, "at least 4 for both directions", 2),
            false => (2, "at least 2", 1),
        };
        if self.n_buckets < least {
            return Err(InvalidConfig::Range {
                field: "n_buckets",
                range,
                value: self.n_buckets as f64,
            });
        }
        if self.max_distance <= self.n_buckets / n_directions / 2 {
            return Err(InvalidConfig::Range {
                field: "max_distance",
                range: "above half of the buckets of a direction",
                value: self.max_distance as f64,
            });
        }
        Ok(())
    }

    /// Makes the module, from N(0, 0.02). T5 begins with N(0, `d_model^-0.5`).
    ///
    /// # Panics
    ///
    /// If the config is invalid.
    pub fn init(&self, device: &Device) -> RelativeBias {
        assert_valid(self.validate());
        let initializer = Initializer::Normal {
            mean: 0.0,
            std: 0.02,
        };
        RelativeBias {
            weight: initializer.init([self.n_buckets, self.n_heads], device),
            max_distance: self.max_distance,
            bidirectional: self.bidirectional,
        }
    }
}

/// A bias of the scores: query `i` and key `j` get `weight[relative_bucket(j - i), head]`.
///
/// Raffel et al. 2020, <https://arxiv.org/abs/1910.10683>. One table serves all layers of a stack: the bias is computed
/// once a pass and handed to them by [`Context::with_bias`](crate::Context::with_bias). T5's scores have no
/// `1 / sqrt(d_head)`, so its attention has a scale of 1; its cross-attention has no bias.
///
/// ```
/// use burn::tensor::Device;
/// use emberlm_core::{Context, Lengths, RelativeBiasConfig};
///
/// let lengths = Lengths::square(5);
/// let bias = RelativeBiasConfig::new(2).init(&Device::flex()).forward(&lengths);
/// assert_eq!(bias.dims(), [1, 2, 5, 5]);
/// let context = Context::new(lengths).with_bias(Some(bias));
/// ```
#[derive(Module, Debug)]
pub struct RelativeBias {
    /// `[n_buckets, n_heads]`
    pub weight: Param<Tensor<2>>,
    max_distance: usize,
    bidirectional: bool,
}

impl RelativeBias {
    /// The bias of all pairs of queries, from `lengths.first_position` on, and keys.
    ///
    /// # Shapes
    ///
    /// - output: `[1, n_heads, query_length, key_length]`
    pub fn forward(&self, lengths: &Lengths) -> Tensor<4> {
        let weight = self.weight.val();
        let [n_buckets, n_heads] = weight.dims();
        let (n_queries, n_keys) = (lengths.query_length, lengths.key_length);
        let buckets = Buckets::new(self.bidirectional, n_buckets, self.max_distance);
        let rows = indices(buckets, lengths);
        let rows = TensorData::new(rows, [n_queries * n_keys]);
        let rows = Tensor::<1, Int>::from_data(rows, &weight.device());
        weight
            .transpose()
            .select(1, rows)
            .reshape([1, n_heads, n_queries, n_keys])
    }
}

/// The bucket of every pair, query by query.
fn indices(buckets: Buckets, lengths: &Lengths) -> Vec<i64> {
    let n_keys = lengths.key_length;
    // A pair's bucket depends on its diagonal alone. The last query sees key 0 on the first of them.
    let last = lengths.query_end().saturating_sub(1) as i64;
    let n_diagonals = (lengths.query_length + n_keys).saturating_sub(1);
    let on_diagonal: Vec<i64> = (0..n_diagonals as i64)
        .map(|diagonal| buckets.of(diagonal - last) as i64)
        .collect();
    let from_last = (0..lengths.query_length).rev();
    from_last
        .flat_map(|before| on_diagonal[before..before + n_keys].iter().copied())
        .collect()
}
