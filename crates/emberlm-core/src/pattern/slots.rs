//! Which positions of a sequence a cache still holds.

/// The positions in the slots of a cache, in order: some that were kept, then all from a first one on.
///
/// A cache that forgets nothing holds every position in the slot of its number.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CacheSlots {
    kept: Vec<usize>,
    start: usize,
    len: usize,
}

impl CacheSlots {
    /// Number of positions that the sequence has so far, forgotten ones included.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no position yet.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Number of slots in use.
    pub fn n_slots(&self) -> usize {
        self.kept.len() + self.len - self.start
    }

    /// The first position of the contiguous rest.
    pub fn start(&self) -> usize {
        self.start
    }

    /// Positions before the contiguous rest that are still there, rising.
    pub fn kept(&self) -> &[usize] {
        &self.kept
    }

    /// Number of positions that are gone: how much a position of the contiguous rest is above its slot.
    pub fn gap(&self) -> usize {
        self.start - self.kept.len()
    }

    /// The slot of a position, if it is still there.
    pub fn of(&self, position: usize) -> Option<usize> {
        if position < self.start {
            self.kept.binary_search(&position).ok()
        } else {
            (position < self.len).then(|| position - self.gap())
        }
    }

    pub(crate) fn grow(&mut self, n: usize) {
        self.len += n;
    }

    /// Forgets the last positions, down to `len` of them.
    ///
    /// # Panics
    ///
    /// If what is left would end in what is gone.
    pub(crate) fn truncate(&mut self, len: usize) {
        if len == 0 {
            *self = Self::default();
        } else if len < self.len {
            assert!(
                len >= self.start || self.gap() == 0,
                "cache length: the positions before {} are gone, {len} cannot be gone back to",
                self.start
            );
            self.len = len;
        }
    }

    /// Moves the start of the contiguous rest to `start` or, so that the gap is a multiple of `alignment`, a little
    /// before it; of what lies before, `stays` says what is kept.
    pub(crate) fn forget(
        &self,
        start: usize,
        alignment: usize,
        stays: impl Fn(usize) -> bool,
    ) -> Self {
        let mut kept = self.kept.clone();
        let (mut best, mut n_kept) = (self.start, kept.len());
        for position in self.start..start.min(self.len) {
            if stays(position) {
                kept.push(position);
            }
            if (position + 1 - kept.len()).is_multiple_of(alignment) {
                (best, n_kept) = (position + 1, kept.len());
            }
        }
        kept.truncate(n_kept);
        Self {
            kept,
            start: best,
            len: self.len,
        }
    }
}
