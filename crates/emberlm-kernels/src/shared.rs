use std::marker::PhantomData;

/// A slice that several threads write at once, each at places of its own.
#[derive(Debug, Clone, Copy)]
pub struct Shared<'a, T> {
    first: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

// Safety: what each thread writes is its own, as `part` demands.
unsafe impl<T: Send> Send for Shared<'_, T> {}
// Safety: as above.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    /// Shares a slice for as long as it is borrowed.
    pub fn new(slice: &'a mut [T]) -> Self {
        Self {
            first: slice.as_mut_ptr(),
            len: slice.len(),
            slice: PhantomData,
        }
    }

    /// # Safety
    ///
    /// The memory of `len` elements is there for `'a`, for nobody else. What is not written yet must not be read.
    pub(crate) unsafe fn from_raw(first: *mut T, len: usize) -> Self {
        Self {
            first,
            len,
            slice: PhantomData,
        }
    }

    /// The elements from `start` on.
    ///
    /// # Safety
    ///
    /// No two threads, and no two results in one thread, have an element at the same time.
    ///
    /// # Panics
    ///
    /// If the slice ends before.
    pub unsafe fn part(&self, start: usize, len: usize) -> &'a mut [T] {
        // Safety: inside the slice, and the caller's alone.
        unsafe { std::slice::from_raw_parts_mut(self.at(start, len), len) }
    }

    /// The place of element `start`.
    ///
    /// # Panics
    ///
    /// If the slice ends before `start + len`.
    pub(crate) fn at(&self, start: usize, len: usize) -> *mut T {
        assert!(
            start.checked_add(len).is_some_and(|end| end <= self.len),
            "elements {start} to {start} + {len} of {}",
            self.len
        );
        // Safety: inside the slice, or its end.
        unsafe { self.first.add(start) }
    }
}
