//! Memory that is never what a kernel would like to find there.

#![allow(
    unsafe_code,
    reason = "an allocator is the only place that sees memory before anything is written to it"
)]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicU8, Ordering::Relaxed},
};

/// Bytes of which all float types make NaN. Every test here runs on such memory, so that nothing that is read before it
/// is written can go unseen.
pub(crate) const NOT_A_NUMBER: u8 = 0xff;

static FILL: AtomicU8 = AtomicU8::new(NOT_A_NUMBER);

#[global_allocator]
static ALLOCATOR: Filled = Filled;

/// Fills new memory with a byte.
struct Filled;

// Safety: all memory is the system's.
unsafe impl GlobalAlloc for Filled {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // Safety: the caller's; what is written is the memory that was given.
        unsafe {
            let memory = System.alloc(layout);
            if !memory.is_null() {
                memory.write_bytes(FILL.load(Relaxed), layout.size());
            }
            memory
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // Safety: the caller's.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // Safety: the caller's.
        unsafe { System.dealloc(memory, layout) }
    }
}

/// Calls with new memory full of a byte. Other tests may run meanwhile: it is the same to them.
pub(crate) fn filled_with<T>(byte: u8, run: impl FnOnce() -> T) -> T {
    FILL.store(byte, Relaxed);
    let result = run();
    FILL.store(NOT_A_NUMBER, Relaxed);
    result
}

#[test]
fn new_memory_is_not_a_number() {
    let mut memory: Vec<f32> = Vec::with_capacity(1000);
    for element in memory.spare_capacity_mut() {
        // Safety: the allocator has written all of it.
        assert!(unsafe { element.as_ptr().read_volatile() }.is_nan());
    }
}
