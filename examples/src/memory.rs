//! Peak memory, counted: on the CPU by the global allocator, on a GPU bounded by what Burn's memory pools
//! reserve.

use std::alloc::{GlobalAlloc, Layout, System};
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use burn::tensor::Device;

static CURRENT: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator with a count of the bytes in use. A program turns it on by declaring it as its
/// `#[global_allocator]`; without that, [`peak_extra`] does not count on the CPU.
pub struct CountingAllocator;

fn grow(bytes: usize) {
    let current = CURRENT.fetch_add(bytes, Relaxed) + bytes;
    PEAK.fetch_max(current, Relaxed);
}

// SAFETY: every method forwards its arguments to `System` and returns what it returned; counting allocates nothing.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises about `layout` are those that `System` asks for.
        let pointer = unsafe { System.alloc(layout) };
        if !pointer.is_null() {
            grow(layout.size());
        }
        pointer
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as in `alloc`.
        let pointer = unsafe { System.alloc_zeroed(layout) };
        if !pointer.is_null() {
            grow(layout.size());
        }
        pointer
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        CURRENT.fetch_sub(layout.size(), Relaxed);
        // SAFETY: `pointer` came from `System` through this allocator, with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as in `dealloc`; `size` is valid by the caller's promise.
        let moved = unsafe { System.realloc(pointer, layout, size) };
        if !moved.is_null() {
            // Old and new may live side by side while the bytes are copied: count the worst case.
            grow(size);
            CURRENT.fetch_sub(layout.size(), Relaxed);
        }
        moved
    }
}

/// How [`peak_extra`] counts on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Counted {
    /// Bytes in use, by the global allocator.
    Allocator,
    /// An upper bound: what the device's memory pools reserve, in whole pages, less what was in use before.
    Pools,
    /// This device does not say.
    Not,
}

impl Counted {
    /// What holds on `device`.
    pub fn on(device: &Device) -> Self {
        if device.memory_pool_usage().is_some() {
            Counted::Pools
        } else if CURRENT.load(Relaxed) > 0 {
            Counted::Allocator
        } else {
            Counted::Not
        }
    }
}

impl fmt::Display for Counted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Counted::Allocator => "bytes in use, counted by the global allocator",
            Counted::Pools => "at most: pages that the device's pools reserve, less what was in use",
            Counted::Not => "not counted on this device",
        })
    }
}

/// Runs `work` and returns its result with the peak of the memory in bytes that it held beyond what was in use before.
/// What it returns is part of that.
pub fn peak_extra<R>(device: &Device, work: impl FnOnce() -> R) -> (R, Option<usize>) {
    match Counted::on(device) {
        Counted::Not => (work(), None),
        Counted::Allocator => {
            let before = CURRENT.load(Relaxed);
            PEAK.store(before, Relaxed);
            let result = work();
            (result, Some(PEAK.load(Relaxed).saturating_sub(before)))
        }
        Counted::Pools => {
            // Pools keep their pages: with the empty ones given back first, what they reserve afterwards held the peak.
            device.memory_cleanup();
            let before = device.memory_pool_usage();
            let result = work();
            let both = device.memory_pool_usage().zip(before);
            (result, both.map(|(after, before)| after.bytes_reserved.saturating_sub(before.bytes_in_use) as usize))
        }
    }
}
