/// Memory for the elements of a result, of which nothing is written yet.
///
/// Filling it with zeros first would be another pass over it.
#[derive(Debug)]
pub struct Buffer<T> {
    elements: Vec<T>,
    len: usize,
}

impl<T: Copy> Buffer<T> {
    /// Memory for `len` elements.
    pub fn new(len: usize) -> Self {
        Self {
            elements: Vec::with_capacity(len),
            len,
        }
    }

    /// The memory, for several threads.
    pub fn shared(&mut self) -> crate::Shared<'_, T> {
        // Safety: the vector has the memory.
        unsafe { crate::Shared::from_raw(self.elements.as_mut_ptr(), self.len) }
    }

    /// The elements.
    ///
    /// # Safety
    ///
    /// All of them are written.
    pub unsafe fn finish(mut self) -> Vec<T> {
        // Safety: within the capacity; written, says the caller.
        unsafe { self.elements.set_len(self.len) };
        self.elements
    }
}
