//! Counts what is allocated, so that memory is measured and not guessed: on the host by the allocator, on a device by
//! the pools of its runtime.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use burn::tensor::Device;

static CURRENT: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator with two counters.
pub struct Counting;

// SAFETY: every call goes to the system's allocator unchanged; the counters do not touch memory.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise about `layout` is passed on.
        let pointer = unsafe { System.alloc(layout) };
        if !pointer.is_null() {
            grow(layout.size());
        }
        pointer
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        let pointer = unsafe { System.alloc_zeroed(layout) };
        if !pointer.is_null() {
            grow(layout.size());
        }
        pointer
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: `pointer` came from this allocator, which is the system's.
        unsafe { System.dealloc(pointer, layout) };
        CURRENT.fetch_sub(layout.size(), Ordering::Relaxed);
    }
}

fn grow(bytes: usize) {
    let now = CURRENT.fetch_add(bytes, Ordering::Relaxed) + bytes;
    PEAK.fetch_max(now, Ordering::Relaxed);
}

/// Runs `work` and returns the most bytes that were held during it beyond those held before.
pub fn peak_extra<R>(work: impl FnOnce() -> R) -> (R, usize) {
    let before = CURRENT.load(Ordering::SeqCst);
    PEAK.store(before, Ordering::SeqCst);
    let result = work();
    (result, PEAK.load(Ordering::SeqCst).saturating_sub(before))
}

/// Looks at a device's pools from time to time; see [`DevicePeak::start`].
pub struct DevicePeak<'a> {
    device: &'a Device,
    occupied: u64,
    peak: u64,
}

impl<'a> DevicePeak<'a> {
    /// Starts counting from what is alive on the device now; `None` if its backend reports no pools (the CPU ones).
    ///
    /// What is counted is the memory that CubeCL's pools took from the driver, less what live tensors occupied at the
    /// start: an upper bound of what the work needed, and what a user sees gone. Pages are a megabyte larger than the
    /// largest allocation so far of the thread (each has pools of its own), and one that is partly filled counts whole.
    /// So the work should have run once before on the same thread, for then pages have their final size, kernels are
    /// compiled and tuned; and the thread should be a fresh one, for pages never shrink. Between two looks the pools
    /// return only outdated pages, so that looking after each step misses nothing else.
    pub fn start(device: &'a Device) -> Option<Self> {
        device.sync().expect("the device answers");
        device.memory_cleanup();
        let usage = device.memory_pool_usage()?;
        Some(DevicePeak { device, occupied: usage.bytes_in_use + usage.bytes_padding, peak: usage.bytes_reserved })
    }

    /// Looks.
    pub fn look(&mut self) {
        self.device.sync().expect("the device answers");
        let usage = self.device.memory_pool_usage().expect("it reported its pools before");
        self.peak = self.peak.max(usage.bytes_reserved);
    }

    /// The most bytes that the pools held beyond what was alive at the start.
    pub fn bytes(&self) -> u64 {
        self.peak.saturating_sub(self.occupied)
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Tensor;

    use super::*;

    const MIB: usize = 1 << 20;

    fn tensor(mib: usize, device: &Device) -> Tensor<1> {
        Tensor::zeros([mib * MIB / 4], device)
    }

    /// The allocator counts for all threads, and a device's threads free what they like when they like: the host's turn
    /// comes before there is one.
    #[test]
    fn what_is_freed_again_is_counted() {
        the_host_counts_what_is_freed_again();
        a_device_counts_what_is_freed_again();
    }

    fn the_host_counts_what_is_freed_again() {
        let (_, bytes) = peak_extra(|| drop(vec![1u8; 32 * MIB]));
        // The harness's own threads allocate and free a little meanwhile.
        assert!(bytes.abs_diff(32 * MIB) < 64 * 1024, "{bytes}");
    }

    /// On the GPU of the build; without one there is nothing to look at, which is what `start` has to say.
    fn a_device_counts_what_is_freed_again() {
        let device = Device::default();
        let kept = tensor(16, &device);
        // Pages get their final size.
        drop(tensor(16, &device));
        let Some(mut peak) = DevicePeak::start(&device) else { return assert_eq!(device, Device::flex()) };
        let work = [tensor(16, &device), tensor(16, &device)];
        peak.look();
        drop(work);
        peak.look();
        let (bytes, page) = (peak.bytes() as usize, 16 * MIB);
        // One page more for what is partly filled, and one of the pool of small allocations.
        assert!((32 * MIB..=32 * MIB + page + 8 * MIB).contains(&bytes), "{bytes}");
        drop(kept);
    }
}
