//! Memory of results. A new page costs a fault, some microseconds each, and glibc gives large blocks back as soon as they are
//! freed: where little is computed (block plans, windows) faults would take longer than attention. With pages of 2 MiB they are
//! five hundred times fewer.

use bytemuck::Zeroable;

/// Bytes of a result from which large pages are asked for: fewer cost little either way.
const LARGE: usize = 4 << 20;

/// So many zeros.
pub(super) fn zeros<T: Zeroable>(len: usize) -> Vec<T> {
    // Not written: the system gives zeros page by page, when they are first touched.
    let data = bytemuck::zeroed_vec(len);
    advise(&data);
    data
}

/// Asks for large pages, where the system leaves the choice to programs. That it may refuse changes no result.
#[cfg(target_os = "linux")]
fn advise<T>(data: &[T]) {
    /// What addresses are asked about in.
    const PAGE: usize = 4096;
    let start = (data.as_ptr() as usize).next_multiple_of(PAGE);
    let end = (data.as_ptr() as usize + size_of_val(data)) / PAGE * PAGE;
    if size_of_val(data) >= LARGE && start < end {
        // SAFETY: the pages lie within the vector's own memory, and the advice changes nothing that they hold.
        unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE) };
    }
}

#[cfg(not(target_os = "linux"))]
fn advise<T>(_: &[T]) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_are_zeros_and_can_be_written() {
        for len in [0, 1, 1000, LARGE / 4, LARGE + 12_345] {
            let mut data: Vec<f32> = zeros(len);
            assert!(data.len() == len && data.iter().all(|&x| x == 0.0));
            data.fill(1.0);
            assert!(data.iter().all(|&x| x == 1.0));
        }
    }
}
