//! The dense key/value cache of incremental decoding.

use burn::tensor::{Tensor, s};

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
}
