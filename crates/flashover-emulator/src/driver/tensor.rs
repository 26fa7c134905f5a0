//! Descriptors of tensors for the copy engine.

use super::device::emulated;
use super::handle::{Array, Out};
use super::status::Status::{InvalidValue, NotSupported};
use super::status::{driver, refuse};
use crate::tensor_map::{Element, RANK, Request, SIZE, TensorMap};

/// Alignment in bytes of a descriptor.
const ALIGNMENT: usize = 64;
/// `CU_DEVICE_ATTRIBUTE_TENSOR_MAP_ACCESS_SUPPORTED`
const SUPPORTED: u32 = 127;

driver! {
    fn cuTensorMapEncodeTiled(
        out: Out<[u8; SIZE]>,
        kind: u32,
        rank: u32,
        address: u64,
        dims: Array<u64>,
        strides: Array<u64>,
        boxes: Array<u32>,
        element_strides: Array<u32>,
        interleave: u32,
        swizzle: u32,
        _promotion: u32,
        fill: u32,
    ) {
        if emulated().attribute(SUPPORTED) != Some(1) {
            return Err(NotSupported);
        }
        let element = Element::from_code(kind).ok_or(InvalidValue)?;
        let rank = rank as usize;
        if !(1..=RANK).contains(&rank) || !out.aligned_to(ALIGNMENT) {
            return Err(InvalidValue);
        }
        let (dims, strides) = (dims.read(rank)?, strides.read(rank - 1)?);
        let (boxes, element_strides) = (boxes.read(rank)?, element_strides.read(rank)?);
        let request = Request {
            element,
            address,
            dims: &dims,
            strides: &strides,
            boxes: &boxes,
            element_strides: &element_strides,
            interleave,
            swizzle,
            nan: fill == 1,
        };
        let refused = |error| refuse(InvalidValue, format_args!("a tensor map was refused: {error}"));
        out.put(TensorMap::encode(&request).map_err(refused)?.to_bytes())
    }
}
