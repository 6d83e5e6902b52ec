//! What the process uses: processor time and memory.

use std::fs;

/// User and system time of all threads so far, in seconds; nothing where the system does not tell.
#[cfg(unix)]
pub fn cpu_seconds() -> Option<f64> {
    use nix::sys::{
        resource::{UsageWho, getrusage},
        time::TimeValLike,
    };

    let usage = getrusage(UsageWho::RUSAGE_SELF).ok()?;
    let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Some(micros as f64 * 1e-6)
}

/// User and system time of all threads so far, in seconds; nothing where the system does not tell.
#[cfg(not(unix))]
pub fn cpu_seconds() -> Option<f64> {
    None
}

/// How far the resident memory rises from here on.
#[derive(Debug)]
pub struct MemoryRise {
    resident: u64,
}

impl MemoryRise {
    /// Gives free memory back to the system and begins a new high-water mark; nothing where the system does not tell.
    pub fn begin() -> Option<Self> {
        // Else what the allocator keeps counts as resident before the steps that use it again.
        emberlm::kernels::give_back_freed_memory();
        let resident = status_bytes("VmRSS:")?;
        // Where this is not allowed the mark is that of the whole process.
        let _ = fs::write("/proc/self/clear_refs", "5");
        Some(Self { resident })
    }

    /// The highest mark above the beginning, in bytes.
    pub fn bytes(&self) -> Option<u64> {
        Some(peak_resident_bytes()?.saturating_sub(self.resident))
    }
}

/// The most that was resident of the process so far, in bytes; nothing where the system does not tell.
pub fn peak_resident_bytes() -> Option<u64> {
    status_bytes("VmHWM:")
}

/// A size from Linux's table of the process.
fn status_bytes(field: &str) -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib * 1024)
}
