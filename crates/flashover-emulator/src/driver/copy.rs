//! Memory of the device and of the host, and copies between them.

use std::alloc::{Layout, alloc, dealloc};
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::{Mutex, PoisonError};

use super::device::current;
use super::handle::{Array, Handle, Out};
use super::status::Status::{self, InvalidValue, NotSupported, OutOfMemory};
use super::status::{Answer, driver, refuse};
use super::{device, stream};
use crate::memory;

/// Pinned memory of the host: start and bytes.
static PINNED: Mutex<BTreeMap<usize, usize>> = Mutex::new(BTreeMap::new());
/// Alignment in bytes of pinned memory, that of a page.
const PAGE: usize = 4096;

fn allocate(out: Out<u64>, bytes: usize) -> Answer {
    if bytes == 0 {
        return Err(InvalidValue);
    }
    out.put(memory::allocate(bytes as u64).ok_or(OutOfMemory)?)
}

/// Waits for the kernel that runs, as the real driver does.
fn free(start: u64) -> Answer {
    let _device = device();
    if start == 0 || memory::free(start) {
        return Ok(());
    }
    Err(refuse(InvalidValue, format_args!("nothing is allocated at {start:#x}, yet it was to be freed")))
}

fn pin(out: Out<*mut c_void>, bytes: usize) -> Answer {
    if bytes == 0 {
        return Err(InvalidValue);
    }
    let layout = Layout::from_size_align(bytes, PAGE).map_err(|_| OutOfMemory)?;
    // SAFETY: the layout has a size, as was checked above.
    let start = unsafe { alloc(layout) };
    if start.is_null() {
        return Err(OutOfMemory);
    }
    PINNED.lock().unwrap_or_else(PoisonError::into_inner).insert(start as usize, bytes);
    out.put(start.cast())
}

/// Bytes at the host, or on the device, where they are allocated as a whole.
#[derive(Clone, Copy)]
pub(super) struct Bytes {
    start: *mut u8,
    count: usize,
}

impl Bytes {
    fn host(start: *const c_void, count: usize) -> Result<Bytes, Status> {
        if start.is_null() && count > 0 {
            Err(InvalidValue)
        } else {
            Ok(Bytes { start: start.cast_mut().cast(), count })
        }
    }

    fn device(start: u64, count: usize) -> Result<Bytes, Status> {
        if count > 0 && !memory::holds(&memory::snapshot(), start, count as u64) {
            return Err(refuse(
                InvalidValue,
                format_args!("{count} bytes at {start:#x} are not allocated on the device, yet were to be copied"),
            ));
        }
        Ok(Bytes { start: start as *mut u8, count })
    }

    fn fill(self, byte: u8) {
        // SAFETY: made by one of the functions above, so allocated or the caller's.
        unsafe { self.start.write_bytes(byte, self.count) }
    }
}

fn copy(to: impl FnOnce() -> Result<Bytes, Status>, from: impl FnOnce() -> Result<Bytes, Status>) -> Answer {
    let _device = device();
    let (to, from) = (to()?, from()?);
    // SAFETY: both are as many bytes, and allocated or the caller's.
    unsafe { std::ptr::copy(from.start, to.start, from.count.min(to.count)) };
    Ok(())
}

/// A side of a copy of rows: `CUDA_MEMCPY2D` has its fields in this order.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Side {
    pub x: usize,
    pub y: usize,
    /// `CUmemorytype`: 1 for the host, 2 for the device, 4 where the address says which.
    pub kind: u32,
    pub host: *mut c_void,
    pub device: u64,
    pub array: Handle,
    pub pitch: usize,
}

impl Side {
    fn row(&self, row: usize, width: usize) -> Result<Bytes, Status> {
        let offset = (self.y + row) * self.pitch + self.x;
        match self.kind {
            1 => Bytes::host(self.host.wrapping_byte_add(offset), width),
            2 | 4 => Bytes::device(self.device + offset as u64, width),
            kind => Err(refuse(NotSupported, format_args!("copies to or from memory of type {kind} are not emulated"))),
        }
    }
}

/// `CUDA_MEMCPY2D`
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Rows {
    pub from: Side,
    pub to: Side,
    pub width: usize,
    pub height: usize,
}

fn copy_rows(rows: Array<Rows>) -> Answer {
    let Rows { from, to, width, height } = rows.read(1)?[0];
    // A pitch of 0 stands for rows without a gap.
    let pitched = |side: Side| Side { pitch: if side.pitch == 0 { width } else { side.pitch }, ..side };
    let (from, to) = (pitched(from), pitched(to));
    if height > 1 && from.pitch.min(to.pitch) < width {
        return Err(refuse(
            InvalidValue,
            format_args!("rows of {width} bytes at pitches of {} and {}", from.pitch, to.pitch),
        ));
    }
    (0..height).try_for_each(|row| copy(|| to.row(row, width), || from.row(row, width)))
}

driver! {
    fn cuMemAlloc_v2(out: Out<u64>, bytes: usize) {
        current()?;
        allocate(out, bytes)
    }

    fn cuMemAllocAsync(out: Out<u64>, bytes: usize, stream: Handle) {
        stream::check(stream)?;
        allocate(out, bytes)
    }

    fn cuMemFree_v2(start: u64) {
        free(start)
    }

    fn cuMemFreeAsync(start: u64, _stream: Handle) {
        free(start)
    }

    fn cuMemGetInfo_v2(free: Out<usize>, total: Out<usize>) {
        current()?;
        free.offer((memory::TOTAL - memory::used()) as usize)?;
        total.offer(memory::TOTAL as usize)
    }

    fn cuMemAllocHost_v2(out: Out<*mut c_void>, bytes: usize) {
        current()?;
        pin(out, bytes)
    }

    fn cuMemHostAlloc(out: Out<*mut c_void>, bytes: usize, _flags: u32) {
        current()?;
        pin(out, bytes)
    }

    fn cuMemFreeHost(start: *mut c_void) {
        let known = PINNED.lock().unwrap_or_else(PoisonError::into_inner).remove(&(start as usize));
        let bytes = known.ok_or(InvalidValue)?;
        let layout = Layout::from_size_align(bytes, PAGE).expect("it was allocated with this layout");
        // SAFETY: it was allocated with this layout, and is no longer known.
        unsafe { dealloc(start.cast(), layout) };
        Ok(())
    }

    fn cuMemcpyHtoD_v2(to: u64, from: *const c_void, bytes: usize) {
        current()?;
        copy(|| Bytes::device(to, bytes), || Bytes::host(from, bytes))
    }

    fn cuMemcpyHtoDAsync_v2(to: u64, from: *const c_void, bytes: usize, stream: Handle) {
        stream::check(stream)?;
        copy(|| Bytes::device(to, bytes), || Bytes::host(from, bytes))
    }

    fn cuMemcpyDtoH_v2(to: *mut c_void, from: u64, bytes: usize) {
        current()?;
        copy(|| Bytes::host(to, bytes), || Bytes::device(from, bytes))
    }

    fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: u64, bytes: usize, stream: Handle) {
        stream::check(stream)?;
        copy(|| Bytes::host(to, bytes), || Bytes::device(from, bytes))
    }

    fn cuMemcpyDtoD_v2(to: u64, from: u64, bytes: usize) {
        current()?;
        copy(|| Bytes::device(to, bytes), || Bytes::device(from, bytes))
    }

    fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: Handle) {
        stream::check(stream)?;
        copy(|| Bytes::device(to, bytes), || Bytes::device(from, bytes))
    }

    fn cuMemcpy2D_v2(rows: Array<Rows>) {
        current()?;
        copy_rows(rows)
    }

    fn cuMemcpy2DAsync_v2(rows: Array<Rows>, stream: Handle) {
        stream::check(stream)?;
        copy_rows(rows)
    }

    fn cuMemsetD8_v2(start: u64, byte: u8, count: usize) {
        current()?;
        let _device = device();
        Bytes::device(start, count)?.fill(byte);
        Ok(())
    }

    fn cuMemsetD8Async(start: u64, byte: u8, count: usize, stream: Handle) {
        stream::check(stream)?;
        let _device = device();
        Bytes::device(start, count)?.fill(byte);
        Ok(())
    }
}
