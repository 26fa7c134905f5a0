//! Tensor maps: descriptors of tensors in global memory, from which the copy engine takes boxes into shared memory and
//! puts them back. CUDA Driver API, "Tensor Map Object Management"; PTX ISA, "Tensor mode" of the asynchronous copies.
//!
//! A dimension of index 0 is the innermost. Shared memory is a window whose byte `a` has the address `a`.

use std::array::from_fn;
use std::ops::Range;

use crate::memory;

/// Most dimensions that a tensor has.
pub const RANK: usize = 5;
/// Bytes of a descriptor, CUDA's `CUtensorMap`.
pub const SIZE: usize = 128;
/// Bytes that a copy of a box moves as one, and that a swizzle permutes.
const ATOM: usize = 16;
/// Most elements of a box along a dimension.
const LONGEST: u32 = 256;
/// Alignment in bytes of a box in shared memory.
const BOX_ALIGNMENT: u32 = 128;
/// The first word of a descriptor.
const MAGIC: u64 = u64::from_le_bytes(*b"flashmap");

/// Type of the elements, as `CUtensorMapDataType` numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Element {
    /// Bytes of an element.
    pub bytes: u64,
    /// Whether it is a float.
    pub float: bool,
}

impl Element {
    /// The type that has the number `code`; `None` for the packed ones of 4 and 6 bits, which are of sm_100.
    pub fn from_code(code: u32) -> Option<Element> {
        let (bytes, float) = match code {
            0 => (1, false),               // UINT8
            1 => (2, false),               // UINT16
            2 | 3 => (4, false),           // UINT32, INT32
            4 | 5 => (8, false),           // UINT64, INT64
            6 | 9 => (2, true),            // FLOAT16, BFLOAT16
            7 | 10 | 11 | 12 => (4, true), // FLOAT32, FLOAT32_FTZ, TFLOAT32, TFLOAT32_FTZ
            8 => (8, true),                // FLOAT64
            _ => return None,
        };
        Some(Element { bytes, float })
    }
}

/// What is asked of [`TensorMap::encode`], in the terms of `cuTensorMapEncodeTiled`.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// Type of the elements.
    pub element: Element,
    /// Address of the first element in global memory.
    pub address: u64,
    /// Elements along each dimension.
    pub dims: &'a [u64],
    /// Bytes between neighbours along each dimension but the innermost.
    pub strides: &'a [u64],
    /// Elements of a box along each dimension.
    pub boxes: &'a [u32],
    /// Every how many elements one is taken, along each dimension.
    pub element_strides: &'a [u32],
    /// `CUtensorMapInterleave`
    pub interleave: u32,
    /// `CUtensorMapSwizzle`
    pub swizzle: u32,
    /// Whether elements outside the tensor are NaN instead of zero.
    pub nan: bool,
}

/// A descriptor. In memory it is 16 words of 8 bytes, see [`TensorMap::to_bytes`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorMap {
    rank: usize,
    /// Address of the first element.
    address: u64,
    /// Elements along each dimension; 1 beyond the rank.
    dims: [u64; RANK],
    /// Bytes between neighbours; those of an element for the innermost dimension.
    strides: [u64; RANK],
    /// Elements of a box; 1 beyond the rank.
    boxes: [u32; RANK],
    /// Bytes of the rows that are swizzled: 32, 64 or 128; 0 without a swizzle.
    span: u32,
    nan: bool,
}

/// A row of a box: what lies side by side in shared memory.
struct Row {
    /// Its address in shared memory, before the swizzle.
    shared: u32,
    /// Address of its first byte in global memory that is inside the tensor.
    global: u64,
    /// Its bytes that are inside the tensor.
    inside: Range<usize>,
}

fn check(holds: bool, otherwise: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(otherwise()) }
}

impl TensorMap {
    /// Makes a descriptor.
    ///
    /// # Errors
    ///
    /// What the real driver refuses, and what is not emulated: strides of elements, interleaving, swizzles of sm_100,
    /// rows shorter than the swizzle.
    pub fn encode(request: &Request) -> Result<TensorMap, String> {
        let Request { element, address, dims, strides, boxes, element_strides, .. } = *request;
        let rank = dims.len();
        check((1..=RANK).contains(&rank), || format!("expected a rank from 1 to {RANK}, got {rank}"))?;
        check(strides.len() + 1 == rank && boxes.len() == rank && element_strides.len() == rank, || {
            format!("expected lengths for rank {rank}, got {strides:?}, {boxes:?} and {element_strides:?}")
        })?;
        check(request.interleave == 0, || "interleaving is not emulated".into())?;
        check(address.is_multiple_of(16), || {
            format!("expected an address that is a multiple of 16, got {address:#x}")
        })?;
        check(dims.iter().all(|dim| (1..=1 << 32).contains(dim)), || {
            format!("expected dimensions from 1 to 2^32, got {dims:?}")
        })?;
        check(strides.iter().all(|stride| stride.is_multiple_of(16) && *stride < 1 << 40), || {
            format!("expected strides that are multiples of 16 below 2^40, got {strides:?}")
        })?;
        check(boxes.iter().all(|len| (1..=LONGEST).contains(len)), || {
            format!("expected boxes of 1 to {LONGEST} elements along a dimension, got {boxes:?}")
        })?;
        check(element_strides.iter().all(|stride| *stride == 1), || {
            format!("strides of elements are not emulated, got {element_strides:?}")
        })?;
        check(element.float || !request.nan, || "only floats are filled with NaN".into())?;
        let row = boxes[0] as u64 * element.bytes;
        check(row.is_multiple_of(ATOM as u64), || format!("expected rows of a multiple of 16 bytes, got {row}"))?;
        let span = match request.swizzle {
            0 => 0,
            1 => 32,
            2 => 64,
            3 => 128,
            other => return Err(format!("swizzle {other} is not emulated")),
        };
        check(span == 0 || row <= span as u64, || format!("expected rows of at most {span} bytes, got {row}"))?;
        check(span == 0 || row == span as u64, || {
            format!("rows of {row} bytes in a swizzle of {span} are not emulated")
        })?;
        Ok(TensorMap {
            rank,
            address,
            dims: from_fn(|d| dims.get(d).copied().unwrap_or(1)),
            strides: from_fn(|d| d.checked_sub(1).map_or(element.bytes, |d| strides.get(d).copied().unwrap_or(0))),
            boxes: from_fn(|d| boxes.get(d).copied().unwrap_or(1)),
            span,
            nan: request.nan,
        })
    }

    /// The descriptor as it lies in memory, little-endian: a magic word; rank, swizzle and fill; address; dimensions;
    /// strides; box.
    pub fn to_bytes(&self) -> [u8; SIZE] {
        let mut words = [0; SIZE / 8];
        words[0] = MAGIC;
        words[1] = self.rank as u64 | (self.span as u64) << 8 | (self.nan as u64) << 16;
        words[2] = self.address;
        words[3..8].copy_from_slice(&self.dims);
        words[8..13].copy_from_slice(&self.strides);
        for (d, &len) in self.boxes.iter().enumerate() {
            words[13 + d / 4] |= (len as u64) << (16 * (d % 4));
        }
        let mut bytes = [0; SIZE];
        bytes.chunks_exact_mut(8).zip(words).for_each(|(to, word)| to.copy_from_slice(&word.to_le_bytes()));
        bytes
    }

    /// The descriptor that lies in these bytes.
    ///
    /// # Errors
    ///
    /// Bytes that [`TensorMap::to_bytes`] did not make.
    pub fn from_bytes(bytes: &[u8; SIZE]) -> Result<TensorMap, String> {
        let word = |i: usize| u64::from_le_bytes(from_fn(|byte| bytes[8 * i + byte]));
        check(word(0) == MAGIC, || "this is no tensor map".into())?;
        Ok(TensorMap {
            rank: (word(1) & 0xff) as usize,
            span: (word(1) >> 8 & 0xff) as u32,
            nan: word(1) >> 16 & 1 == 1,
            address: word(2),
            dims: from_fn(|d| word(3 + d)),
            strides: from_fn(|d| word(8 + d)),
            boxes: from_fn(|d| (word(13 + d / 4) >> (16 * (d % 4)) & 0xffff) as u32),
        })
    }

    /// Dimensions of the tensor.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Bytes of a box in shared memory. A barrier counts all of them, those outside the tensor included.
    pub fn box_bytes(&self) -> u32 {
        self.boxes.iter().product::<u32>() * self.strides[0] as u32
    }

    /// Copies a box from global memory to the address `shared_base` of shared memory. Elements outside the tensor are
    /// zero, or NaN when the descriptor says so.
    ///
    /// # Errors
    ///
    /// Another number of coordinates than the rank, a box that does not lie in shared memory or is not aligned to 128
    /// bytes there, and elements of the tensor that do not lie in allocated memory.
    pub fn read_box(&self, coords: &[i32], shared_base: u32, shared: &mut [u8]) -> Result<(), String> {
        let regions = memory::snapshot();
        let fill = if self.nan { 0xff } else { 0 };
        let mut bytes = vec![fill; self.row_bytes()];
        for row in self.rows(coords, shared_base, shared.len())? {
            bytes.fill(fill);
            if !row.inside.is_empty() {
                self.check_global(&regions, &row)?;
                // SAFETY: device memory is host memory, and all of these bytes are allocated, as was checked above.
                let from = unsafe { std::slice::from_raw_parts(row.global as *const u8, row.inside.len()) };
                bytes[row.inside].copy_from_slice(from);
            }
            for (atom, from) in bytes.chunks_exact(ATOM).enumerate() {
                let to = self.swizzle(row.shared + (atom * ATOM) as u32);
                shared[to..to + ATOM].copy_from_slice(from);
            }
        }
        Ok(())
    }

    /// Copies a box from the address `shared_base` of shared memory to global memory. Elements outside the tensor are
    /// left out.
    ///
    /// # Errors
    ///
    /// Those of [`TensorMap::read_box`].
    pub fn write_box(&self, coords: &[i32], shared_base: u32, shared: &[u8]) -> Result<(), String> {
        let regions = memory::snapshot();
        let mut bytes = vec![0; self.row_bytes()];
        for row in self.rows(coords, shared_base, shared.len())?.filter(|row| !row.inside.is_empty()) {
            self.check_global(&regions, &row)?;
            for (atom, to) in bytes.chunks_exact_mut(ATOM).enumerate() {
                let from = self.swizzle(row.shared + (atom * ATOM) as u32);
                to.copy_from_slice(&shared[from..from + ATOM]);
            }
            let from = &bytes[row.inside];
            // SAFETY: device memory is host memory, and all of these bytes are allocated, as was checked above.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), row.global as *mut u8, from.len()) };
        }
        Ok(())
    }

    fn row_bytes(&self) -> usize {
        self.boxes[0] as usize * self.strides[0] as usize
    }

    fn check_global(&self, regions: &[(u64, u64)], row: &Row) -> Result<(), String> {
        let (start, bytes) = (row.global, row.inside.len());
        check(memory::holds(regions, start, bytes as u64), || {
            format!("the tensor of this map reaches outside of allocated memory, {bytes} bytes at {start:#x}: {self:?}")
        })
    }

    /// Where the bytes of an address in shared memory lie: its bits from 4 on are combined with those from 7 on, as
    /// many as the swizzle has.
    fn swizzle(&self, address: u32) -> usize {
        let bits = (self.span / ATOM as u32).saturating_sub(1);
        (address ^ (address >> 3 & bits << 4)) as usize
    }

    /// The rows of a box.
    fn rows(&self, coords: &[i32], shared_base: u32, shared: usize) -> Result<impl Iterator<Item = Row> + '_, String> {
        check(coords.len() == self.rank, || format!("expected {} coordinates, got {coords:?}", self.rank))?;
        check(shared_base.is_multiple_of(BOX_ALIGNMENT), || {
            format!("expected a box at a multiple of {BOX_ALIGNMENT} in shared memory, got {shared_base:#x}")
        })?;
        check(shared_base as usize + self.box_bytes() as usize <= shared, || {
            format!(
                "a box of {} bytes at {shared_base:#x} leaves the shared memory of {shared} bytes",
                self.box_bytes()
            )
        })?;
        let coords: [i64; RANK] = from_fn(|d| coords.get(d).copied().unwrap_or(0) as i64);
        let ahead = (-coords[0]).clamp(0, self.boxes[0] as i64);
        let end = (self.dims[0] as i64 - coords[0]).clamp(ahead, self.boxes[0] as i64);
        let inside = ahead as usize * self.strides[0] as usize..end as usize * self.strides[0] as usize;
        let count: u32 = self.boxes[1..].iter().product();
        Ok((0..count).map(move |x| {
            let mut rest = x;
            let mut global = self.address.wrapping_add_signed((coords[0] + ahead) * self.strides[0] as i64);
            let mut exists = true;
            for (d, &first) in coords.iter().enumerate().skip(1) {
                let i = first + (rest % self.boxes[d]) as i64;
                rest /= self.boxes[d];
                exists &= (0..self.dims[d] as i64).contains(&i);
                global = global.wrapping_add_signed(i.wrapping_mul(self.strides[d] as i64));
            }
            let inside = if exists { inside.clone() } else { 0..0 };
            Row { shared: shared_base + x * self.row_bytes() as u32, global, inside }
        }))
    }
}

#[cfg(test)]
mod tests;
