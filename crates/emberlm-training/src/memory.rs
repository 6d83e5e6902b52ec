//! How much memory the process has used.

/// Largest resident size of this process so far in bytes; nothing where the system does not tell.
#[cfg(unix)]
pub fn peak_memory_bytes() -> Option<u64> {
    use nix::sys::resource::{UsageWho, getrusage};

    // macOS counts bytes, the others KiB.
    let unit = if cfg!(target_os = "macos") { 1 } else { 1024 };
    let usage = getrusage(UsageWho::RUSAGE_SELF).ok()?;
    u64::try_from(usage.max_rss()).ok().map(|size| size * unit)
}

/// Largest resident size of this process so far in bytes; nothing where the system does not tell.
#[cfg(not(unix))]
pub fn peak_memory_bytes() -> Option<u64> {
    None
}
