//! What generation asks of a cache, and the dense key/value cache of incremental decoding.

use burn::tensor::{Tensor, TensorData, s};

/// The state of a batch of texts in a [`CachedModel`](crate::CachedModel).
pub trait DecodingCache {
    /// Number of positions held, padding included; the same in all rows.
    fn len(&self) -> usize;

    /// Whether nothing is held yet.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Forgets all but the first `len` positions; does nothing if there are fewer.
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

/// Keys and values of all positions so far, in storage that is allocated once, at the first append.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use emberlm_core::KvCache;
///
/// let device = Device::flex();
/// let mut cache = KvCache::new(8);
/// let new = Tensor::ones([1, 2, 3, 4], &device); // batch, kv heads, length, d_head
/// let (keys, _) = cache.append(new.clone(), new);
/// assert_eq!(keys.dims(), [1, 2, 3, 4]);
/// cache.truncate(1);
/// assert_eq!(cache.len(), 1);
/// ```
#[derive(Clone, Debug)]
pub struct KvCache {
    keys: Storage,
    values: Storage,
    capacity: usize,
    len: usize,
}

impl KvCache {
    /// An empty cache for `capacity` positions.
    pub fn new(capacity: usize) -> Self {
        Self {
            keys: Storage(None),
            values: Storage(None),
            capacity,
            len: 0,
        }
    }

    /// Adds the keys and values of the next positions and returns those of all positions so far.
    ///
    /// # Shapes
    ///
    /// - `key`, `value`: `[batch_size, n_kv_heads, length, d_head]`
    /// - output: twice `[batch_size, n_kv_heads, len() + length, d_head]`
    ///
    /// # Panics
    ///
    /// If the capacity is exceeded.
    pub fn append(&mut self, key: Tensor<4>, value: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
        let length = key.dims()[2];
        let start = self.len;
        assert!(
            start + length <= self.capacity,
            "cache length: {start} + {length} positions exceed the capacity of {}",
            self.capacity
        );
        self.len += length;
        (
            self.keys.write(key, start, self.capacity),
            self.values.write(value, start, self.capacity),
        )
    }

    /// Number of positions held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is held yet.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Number of positions that fit.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets all but the first `len` positions; does nothing if there are fewer.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
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
    let indices: Vec<i64> = rows.iter().map(|row| *row as i64).collect();
    let indices = Tensor::from_data(TensorData::new(indices, [rows.len()]), &x.device());
    x.select(0, indices)
}

/// `[batch_size, n_kv_heads, capacity, d_head]`.
#[derive(Clone, Debug)]
struct Storage(Option<Tensor<4>>);

impl Storage {
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

    fn select(&mut self, rows: &[usize]) {
        self.0 = self.0.take().map(|all| select_rows(all, rows));
    }
}
