//! How far a long piece of work is.

/// Bytes of text that are done, and all there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes done: never fewer than told before.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
}
