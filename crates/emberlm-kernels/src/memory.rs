//! What becomes of freed memory.

/// Makes the C library keep the memory that a program frees, for its next allocations, instead of giving it back to the
/// system.
///
/// A training step allocates and frees the same large tensors over and over. By default glibc gets each of more than
/// 32 MiB from the system and gives it back at once, and the system fills it with zeros, page by page: a fifth of the
/// step of a small model. A program calls this once, first in `main`; its resident size then stays near its peak.
/// Does nothing where the C library is not glibc.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // Safety: both set a number, under glibc's own lock.
    unsafe {
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
    }
}

/// Gives what is freed back to the system now, so that the resident size is that of what lives. Does nothing where the C
/// library is not glibc.
pub fn give_back_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // Safety: it may be called at any time, from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}
