//! The device's memory: host memory, of which it is known what is allocated, so that an access outside of it shows.

use std::alloc::{Layout, alloc, dealloc};
use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Bytes that the device has.
pub const TOTAL: u64 = 8 << 30;
/// Alignment of an allocation in bytes, that of the real driver.
pub const ALIGNMENT: usize = 512;
/// What fresh memory holds. As a float it is NaN, so that reading what nobody wrote shows.
const FRESH: u8 = 0xff;

/// Start and end of the allocations in bytes, the end excluded, in order.
pub type Regions = Vec<(u64, u64)>;

struct Registry {
    /// Start and length.
    regions: BTreeMap<u64, u64>,
    used: u64,
    /// The regions as they are now, once someone asked.
    snapshot: Option<Arc<Regions>>,
}

static REGISTRY: RwLock<Registry> = RwLock::new(Registry { regions: BTreeMap::new(), used: 0, snapshot: None });

fn read() -> RwLockReadGuard<'static, Registry> {
    REGISTRY.read().unwrap_or_else(PoisonError::into_inner)
}

fn write() -> RwLockWriteGuard<'static, Registry> {
    REGISTRY.write().unwrap_or_else(PoisonError::into_inner)
}

/// Allocates `bytes` and gives their address, a multiple of [`ALIGNMENT`]; `None` without bytes, or when the device has
/// not that many left.
pub fn allocate(bytes: u64) -> Option<u64> {
    let mut registry = write();
    if bytes == 0 || bytes > TOTAL - registry.used {
        return None;
    }
    let layout = Layout::from_size_align(bytes as usize, ALIGNMENT).ok()?;
    // SAFETY: the layout has a size, as was checked above.
    let start = unsafe { alloc(layout) };
    if start.is_null() {
        return None;
    }
    // SAFETY: these are the bytes that were allocated in the line above.
    unsafe { start.write_bytes(FRESH, layout.size()) };
    let start = start as u64;
    registry.regions.insert(start, bytes);
    registry.used += bytes;
    registry.snapshot = None;
    Some(start)
}

/// Frees the allocation that starts there; `false` when none does. The caller sees to it that no kernel runs.
pub fn free(start: u64) -> bool {
    let mut registry = write();
    let Some(bytes) = registry.regions.remove(&start) else { return false };
    registry.used -= bytes;
    registry.snapshot = None;
    let layout = Layout::from_size_align(bytes as usize, ALIGNMENT).expect("it was allocated with this layout");
    // SAFETY: the registry holds what `allocate` gave with this layout, and no longer holds it.
    unsafe { dealloc(start as *mut u8, layout) };
    true
}

/// Bytes that are allocated.
pub fn used() -> u64 {
    read().used
}

/// What is allocated now. Costs a reference count as long as nothing is allocated or freed.
pub fn snapshot() -> Arc<Regions> {
    if let Some(snapshot) = &read().snapshot {
        return snapshot.clone();
    }
    let mut registry = write();
    let regions = registry.regions.iter().map(|(&start, &bytes)| (start, start + bytes)).collect();
    registry.snapshot.insert(Arc::new(regions)).clone()
}

/// The region that holds all `bytes` from `start` on.
pub fn region(regions: &[(u64, u64)], start: u64, bytes: u64) -> Option<(u64, u64)> {
    let next = regions.partition_point(|region| region.0 <= start);
    let region = regions[next.checked_sub(1)?];
    (start.checked_add(bytes)? <= region.1).then_some(region)
}

/// Whether one of the regions holds all `bytes` from `start` on.
pub fn holds(regions: &[(u64, u64)], start: u64, bytes: u64) -> bool {
    region(regions, start, bytes).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fresh_memory_is_nan_and_aligned() {
        let start = allocate(1000).unwrap();
        assert_eq!(start % ALIGNMENT as u64, 0);
        // SAFETY: 1000 bytes were allocated there, and written.
        let bytes = unsafe { std::slice::from_raw_parts(start as *const u8, 1000) };
        assert!(bytes.chunks_exact(4).all(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()).is_nan()));
        assert!(free(start));
    }

    #[test]
    fn a_snapshot_holds_what_is_allocated() {
        let (a, b) = (allocate(100).unwrap(), allocate(1).unwrap());
        let regions = snapshot();
        assert!(regions.is_sorted());
        assert!(holds(&regions, a, 100) && holds(&regions, a + 99, 1) && holds(&regions, b, 1));
        assert!(!holds(&regions, a, 101) && !holds(&regions, a + 100, 1) && !holds(&regions, a - 1, 2));
        assert!(!holds(&regions, u64::MAX, 2) && !holds(&regions, 0, 1) && !holds(&[], a, 1));
        assert!(free(a) && free(b));
        let after = snapshot();
        assert!(!after.iter().any(|&(start, _)| start == a || start == b));
        assert!(regions.contains(&(a, a + 100)), "a snapshot stays as it was");
    }

    #[test]
    fn what_cannot_be_is_refused() {
        assert_eq!((allocate(0), allocate(TOTAL + 1)), (None, None));
        assert!(!free(0));
        let start = allocate(64).unwrap();
        assert!(!free(start + 16), "not the start");
        assert!(free(start));
    }
}
