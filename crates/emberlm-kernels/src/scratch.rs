use std::sync::{Mutex, PoisonError};

/// Private memory of tasks, which is used again by one task after another.
///
/// It is made by the calling thread, whose freed memory programs keep (see
/// [`keep_freed_memory`](crate::keep_freed_memory)); what the threads of a pool make and free goes back to the system,
/// and comes again page by page.
#[derive(Debug)]
pub struct Scratch<T, M> {
    free: Mutex<Vec<T>>,
    make: M,
}

impl<T, M: Fn() -> T> Scratch<T, M> {
    /// Memory for as many of `n_tasks` tasks as the current pool runs at once.
    pub fn new(n_tasks: usize, make: M) -> Self {
        let n = n_tasks.min(rayon::current_num_threads());
        Self {
            free: Mutex::new((0..n).map(|_| make()).collect()),
            make,
        }
    }

    /// Lends the memory, new or as the task before left it.
    pub fn lend<O>(&self, work: impl FnOnce(&mut T) -> O) -> O {
        let free = || self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = free().pop();
        let mut memory = taken.unwrap_or_else(&self.make);
        let output = work(&mut memory);
        free().push(memory);
        output
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_back_is_lent_again_and_more_is_made_where_it_lacks() {
        let scratch = Scratch::new(1, Vec::new);
        scratch.lend(|memory| memory.push(1));
        scratch.lend(|memory| {
            assert_eq!(*memory, [1]);
            scratch.lend(|other| assert!(other.is_empty()));
        });
    }
}
