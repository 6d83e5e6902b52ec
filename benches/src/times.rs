//! Timing a call again and again.

use std::{
    error::Error,
    time::{Duration, Instant},
};

use burn::tensor::Device;
use peak_alloc::PeakAlloc;

/// Repeats that do not count: the first ones allocate.
const UNCOUNTED: usize = 2;
/// However short a call is, it is repeated for so long: a few milliseconds would show the moment, not the operator.
const AT_LEAST: Duration = Duration::from_millis(300);

/// What was measured of a call.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// Median over the repeats.
    pub median_ms: f64,
    /// Least of the repeats.
    pub min_ms: f64,
    /// Bytes at the peak of any repeat, beyond what was there before it.
    pub peak_bytes: usize,
}

/// Times `call` at least `repeats` times and for 0.3 seconds, after two repeats that do not count. `memory` is the
/// program's allocator.
///
/// # Errors
///
/// The device's.
pub fn time(
    memory: &PeakAlloc,
    device: &Device,
    repeats: usize,
    mut call: impl FnMut(),
) -> Result<Times, Box<dyn Error>> {
    let mut times = Vec::with_capacity(repeats);
    let mut peak_bytes = 0;
    let start = Instant::now();
    while times.len() < UNCOUNTED + repeats || start.elapsed() < AT_LEAST {
        let before = memory.current_usage();
        memory.reset_peak_usage();
        let begin = Instant::now();
        call();
        device.sync()?;
        times.push(begin.elapsed().as_secs_f64() * 1e3);
        peak_bytes = peak_bytes.max(memory.peak_usage().saturating_sub(before));
    }
    times.drain(..UNCOUNTED);
    Ok(Times {
        min_ms: times.iter().copied().fold(f64::INFINITY, f64::min),
        median_ms: median(times),
        peak_bytes,
    })
}

/// The median of some numbers: of an even number the mean of the middle two.
///
/// # Panics
///
/// If there are none.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    (values[(values.len() - 1) / 2] + values[values.len() / 2]) / 2.0
}
