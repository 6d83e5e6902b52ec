//! What generation asks of a cache, and the key/value cache of incremental decoding, dense or bounded.

use burn::tensor::{Tensor, s};
use thiserror::Error;

use crate::{CacheSlots, Horizon, Pattern, operators::indices};

/// The state of a batch of texts in a [`CachedModel`](crate::CachedModel).
pub trait DecodingCache {
    /// Number of positions held, padding included; the same in all rows.
    fn len(&self) -> usize;

    /// Whether nothing is held yet.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Forgets all but the first `len` positions; does nothing if there are fewer.
    ///
    /// # Panics
    ///
    /// If a cache of bounded memory has forgotten what stood before.
    fn truncate(&mut self, len: usize);

    /// Number of rows, where that is settled: by the first pass, by padding, or by a source.
    fn batch_size(&self) -> Option<usize>;

    /// Row `i` becomes what row `rows[i]` was: rows are reordered, repeated and dropped, with all that belongs to them,
    /// which is one copy. Does nothing while there are no rows.
    ///
    /// # Panics
    ///
    /// If there is no such row.
    fn select(&mut self, rows: &[usize]);

    /// Says how many of the first positions of each row hold no token, so that texts of different lengths end
    /// together. Whatever is passed there is seen by no token, and positions count from the first token. Comes before
    /// the first pass.
    ///
    /// # Panics
    ///
    /// If something is held already, or there are rows and their number is another.
    fn set_padding(&mut self, padding: &[usize]);
}

/// What a position is where a cache has forgotten some that came before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CachePositions {
    /// Its place in the sequence: decoding gives what a pass over the whole gives.
    Absolute,
    /// Its place in the cache, as StreamingLLM counts (Xiao et al. 2023, <https://arxiv.org/abs/2309.17453>, section
    /// 3.2): no distance is longer than the cache, so that a model can go on far beyond the lengths it was trained on.
    InCache,
}

/// A layer or a model that cannot do with a cache of bounded memory.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RingError {
    /// A pattern without a bound on the past.
    #[error(
        "the pattern {pattern} may look back to any position: a ring cache needs a window, with sinks or global positions at most"
    )]
    Unbounded {
        /// The pattern.
        pattern: String,
    },
    /// Rotary frequencies that change all keys as the sequence grows.
    #[error(
        "rotary frequencies that change with the length need a dense cache, or positions that are counted in the cache"
    )]
    ChangesWithLength,
    /// A table of positions, which ends.
    #[error(
        "the model has {max_seq_length} learned positions, which a text without end runs past: rotary positions or ALiBi are needed"
    )]
    LearnedPositions {
        /// Rows of the table.
        max_seq_length: usize,
    },
    /// A layer whose keys cannot be moved.
    #[error("this layer's keys are held as they are turned once: positions must be absolute")]
    InCache,
    /// A bias of the scores that the stack makes.
    #[error("a relative bias needs a dense cache: use rotary positions or ALiBi")]
    RelativeBias,
}

/// Keys and values of the positions so far.
///
/// A dense cache holds all of them, in storage that is allocated once, at the first append. A ring forgets what its
/// [`Horizon`] allows: its memory stays bounded, however long the sequence becomes.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use emberlm_core::{CachePositions, KvCache, Pattern};
///
/// let device = Device::flex();
/// let mut cache = KvCache::new(8);
/// let new = Tensor::ones([1, 2, 3, 4], &device); // batch, kv heads, length, d_head
/// let (keys, _) = cache.append(new.clone(), new.clone());
/// assert_eq!(keys.dims(), [1, 2, 3, 4]);
/// cache.truncate(1);
/// assert_eq!(cache.len(), 1);
///
/// let pattern: Pattern = "causal & (window:4:0 | sinks:1)".parse()?;
/// let mut ring = KvCache::ring(&pattern, CachePositions::Absolute)?;
/// for _ in 0..1000 {
///     ring.append(new.clone(), new.clone());
/// }
/// assert_eq!(ring.len(), 3000);
/// assert!(ring.slots().n_slots() < 200);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct KvCache {
    keys: Storage,
    values: Storage,
    /// Slots that are allocated.
    capacity: usize,
    slots: CacheSlots,
    ring: Option<Ring>,
}

#[derive(Clone, Debug)]
struct Ring {
    /// What it was made for.
    pattern: Pattern,
    horizon: Horizon,
    positions: CachePositions,
}

/// Slots that a ring of absolute positions has beyond those it needs, at least: it is tidied once in so many steps.
const ROOM: usize = 64;

impl Ring {
    /// What may be forgotten before the next position.
    fn forget(&self, slots: &CacheSlots) -> CacheSlots {
        let Horizon {
            back,
            first,
            positions,
            from,
            alignment,
        } = &self.horizon;
        if slots.len() < *from {
            return slots.clone();
        }
        let start = slots.len().saturating_sub(*back);
        slots.forget(start, *alignment, |position| {
            position < *first || positions.binary_search(&position).is_ok()
        })
    }
}

impl KvCache {
    /// An empty cache for `capacity` positions.
    pub fn new(capacity: usize) -> Self {
        Self::empty(capacity, None)
    }

    /// An empty cache that keeps what later queries of a pattern see, for sequences of any length.
    ///
    /// # Errors
    ///
    /// [`RingError::Unbounded`] where the pattern has no [horizon](Pattern::horizon).
    ///
    /// # Panics
    ///
    /// On a pattern that [`Pattern::validate`] rejects.
    pub fn ring(pattern: &Pattern, positions: CachePositions) -> Result<Self, RingError> {
        let horizon = pattern.horizon().ok_or_else(|| RingError::Unbounded {
            pattern: pattern.to_string(),
        })?;
        let ring = Ring {
            pattern: pattern.clone(),
            horizon,
            positions,
        };
        Ok(Self::empty(0, Some(ring)))
    }

    fn empty(capacity: usize, ring: Option<Ring>) -> Self {
        Self {
            keys: Storage(None),
            values: Storage(None),
            capacity,
            slots: CacheSlots::default(),
            ring,
        }
    }

    /// Adds the keys and values of the next positions and returns those of all positions that are held, in the order of
    /// their [`slots`](Self::slots).
    ///
    /// # Shapes
    ///
    /// - `key`, `value`: `[batch_size, n_kv_heads, length, d_head]`
    /// - output: twice `[batch_size, n_kv_heads, slots().n_slots(), d_head]`
    ///
    /// # Panics
    ///
    /// If the capacity of a dense cache is exceeded, or batch_size, heads or widths are not those of what is held: the cache
    /// was filled by another layer.
    pub fn append(&mut self, key: Tensor<4>, value: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
        self.keys.check("keys", &key);
        self.values.check("values", &value);
        let length = key.dims()[2];
        let start = self.slots.n_slots();
        if start + length > self.capacity || self.counts_in_cache() {
            self.make_room(length);
        }
        let start = self.slots.n_slots();
        self.slots.grow(length);
        (
            self.keys.write(key, start, self.capacity),
            self.values.write(value, start, self.capacity),
        )
    }

    /// Checks that what a layer sees is what the cache keeps. A dense one keeps everything.
    ///
    /// # Panics
    ///
    /// If it is a ring that was made for another pattern.
    pub fn check_pattern(&self, of_layer: impl FnOnce() -> Pattern) {
        if let Some(Ring { pattern, .. }) = &self.ring {
            let of_layer = of_layer();
            assert!(
                *pattern == of_layer,
                "cache: it keeps what {pattern} sees, but the layer attends by {of_layer}: make it by that layer"
            );
        }
    }

    /// Forgets what may be forgotten, and allocates slots for `length` more positions.
    fn make_room(&mut self, length: usize) {
        let Some(ring) = &self.ring else {
            panic!(
                "cache length: {} + {length} positions exceed the capacity of {}",
                self.len(),
                self.capacity
            );
        };
        let slots = ring.forget(&self.slots);
        let keep: Vec<usize> = (slots.kept().iter().copied())
            .chain(slots.start()..slots.len())
            .filter_map(|position| self.slots.of(position))
            .collect();
        // Where slots are positions, no step may find one that is to be forgotten. Elsewhere there is room for as many
        // again as a query sees: the copy then costs a step no more than its attention.
        let room = match ring.positions {
            CachePositions::InCache => 0,
            CachePositions::Absolute => slots.n_slots().max(ROOM),
        };
        self.capacity = slots.n_slots() + length.max(room);
        self.keys.keep(&keep, self.capacity);
        self.values.keep(&keep, self.capacity);
        self.slots = slots;
    }

    /// Number of positions so far, those that were forgotten included.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether there is no position yet.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// The positions that are held.
    pub fn slots(&self) -> &CacheSlots {
        &self.slots
    }

    /// Number of slots that are allocated, or will be at the first append.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Whether positions count within the cache.
    pub fn counts_in_cache(&self) -> bool {
        let ring = self.ring.as_ref();
        ring.is_some_and(|ring| ring.positions == CachePositions::InCache)
    }

    /// Forgets all but the first `len` positions; does nothing if there are fewer.
    ///
    /// # Panics
    ///
    /// If a ring would go back to where it has forgotten.
    pub fn truncate(&mut self, len: usize) {
        self.slots.truncate(len);
    }

    /// Number of rows: those of the first append, then of the last [`select`](Self::select).
    pub fn batch_size(&self) -> Option<usize> {
        self.keys.0.as_ref().map(|keys| keys.dims()[0])
    }

    /// Row `i` becomes what row `rows[i]` was; does nothing before the first append.
    ///
    /// # Panics
    ///
    /// If there is no such row.
    pub fn select(&mut self, rows: &[usize]) {
        self.keys.select(rows);
        self.values.select(rows);
    }
}

/// Takes the rows of a batch: row `i` of the output is row `rows[i]` of `x`.
///
/// # Shapes
///
/// - `x`: `[batch_size, ..]`
/// - output: `[rows.len(), ..]`
///
/// # Panics
///
/// If there is no such row.
pub fn select_rows<const D: usize>(x: Tensor<D>, rows: &[usize]) -> Tensor<D> {
    let n_rows = x.dims()[0];
    if rows.iter().copied().eq(0..n_rows) {
        return x;
    }
    if let Some(row) = rows.iter().find(|row| **row >= n_rows) {
        panic!("batch_size: row {row} is past the {n_rows} that there are");
    }
    let indices = indices(rows, &x.device());
    x.select(0, indices)
}

/// `[batch_size, n_kv_heads, capacity, d_head]`.
#[derive(Clone, Debug)]
struct Storage(Option<Tensor<4>>);

impl Storage {
    /// Checks that new heads are of the kind of those that are held.
    fn check(&self, what: &str, new: &Tensor<4>) {
        let Some(all) = &self.0 else {
            return;
        };
        let axes = ["batch_size", "n_kv_heads", "", "d_head"];
        for (axis, (held, new)) in axes.iter().zip(all.dims().iter().zip(new.dims())) {
            assert!(
                axis.is_empty() || *held == new,
                "cache: {what} of {axis} {held} are held, got {new}: it was filled by another layer"
            );
        }
    }

    /// Writes `new` at `start` and returns everything up to its end.
    fn write(&mut self, new: Tensor<4>, start: usize, capacity: usize) -> Tensor<4> {
        let [batch_size, n_heads, length, d_head] = new.dims();
        // Taken out while it is written, so that the backend sees its only owner and writes in place.
        let all = self.0.take().unwrap_or_else(|| {
            let shape = [batch_size, n_heads, capacity, d_head];
            Tensor::zeros(shape, (&new.device(), new.dtype()))
        });
        let all = all.slice_assign(s![.., .., start..start + length, ..], new);
        self.0 = Some(all.clone());
        all.slice(s![.., .., 0..start + length, ..])
    }

    /// New storage, with what is in these slots.
    fn keep(&mut self, slots: &[usize], capacity: usize) {
        let Some(all) = self.0.take() else {
            return;
        };
        let [batch_size, n_heads, _, d_head] = all.dims();
        let shape = [batch_size, n_heads, capacity, d_head];
        let new = Tensor::zeros(shape, (&all.device(), all.dtype()));
        let n_kept = slots.len();
        let slots = indices(slots, &all.device());
        let kept = all.select(2, slots);
        self.0 = Some(match n_kept {
            0 => new,
            n_kept => new.slice_assign(s![.., .., 0..n_kept, ..], kept),
        });
    }

    fn select(&mut self, rows: &[usize]) {
        self.0 = self.0.take().map(|all| select_rows(all, rows));
    }
}
