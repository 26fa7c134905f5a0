//! The tensors of a case on the device, and results back as f64.

use cubecl::client::Client;
use cubecl::ir::{ElemType, FloatKind};
use cubecl::prelude::*;
use flashover_kernels::device::{DeviceTensor, element_type};
use flashover_kernels::operands::Operands;
use flashover_kernels::problem::{Element, Problem};
use flashover_testing::data::Inputs;
use flashover_testing::layout::Layout;
use half::{bf16, f16};

/// The operands of a problem, q, k and v as told.
pub fn operands(client: &Client, problem: &Problem, inputs: &Inputs, layouts: [Layout; 3]) -> Operands<DeviceTensor> {
    let Problem { batch, heads_q, heads_kv, seq_q, seq_kv, head_dim, value_dim, element, .. } = *problem;
    let x = &inputs.operands;
    let vector = |data: &Vec<f64>| floats(client, data, &[data.len()], Element::F32);
    Operands {
        q: laid_out(client, &x.q, [batch, heads_q, seq_q, head_dim], layouts[0], element),
        k: laid_out(client, &x.k, [batch, heads_kv, seq_kv, head_dim], layouts[1], element),
        v: laid_out(client, &x.v, [batch, heads_kv, seq_kv, value_dim], layouts[2], element),
        bias: x.bias.as_ref().map(|x| floats(client, x, &problem.bias.expect("the problem has a bias"), element)),
        mask: x.mask.as_ref().map(|x| {
            let bytes: Vec<u8> = x.iter().map(|&hides| hides.into()).collect();
            let shape = problem.mask.expect("the problem has a mask");
            DeviceTensor::contiguous(client.create_from_slice(&bytes), &shape, u8::elem_type_native())
        }),
        alibi_slopes: x.alibi_slopes.as_ref().map(vector),
        learned_sinks: x.learned_sinks.as_ref().map(vector),
        score_parameters: x.score_parameters.as_ref().map(vector),
        key_lengths: x.key_lengths.as_ref().map(|x| {
            DeviceTensor::contiguous(client.create_from_slice(i32::as_bytes(x)), &[x.len()], i32::elem_type_native())
        }),
    }
}

/// A contiguous tensor.
pub fn floats(client: &Client, data: &[f64], shape: &[usize], element: Element) -> DeviceTensor {
    let bytes: Vec<u8> = match element {
        Element::F16 => data.iter().flat_map(|&x| f16::from_f64(x).to_le_bytes()).collect(),
        Element::BF16 => data.iter().flat_map(|&x| bf16::from_f64(x).to_le_bytes()).collect(),
        Element::F32 => data.iter().flat_map(|&x| (x as f32).to_le_bytes()).collect(),
        Element::F64 => unreachable!("no kernel has f64"),
    };
    DeviceTensor::contiguous(client.create_from_slice(&bytes), shape, element_type(element))
}

/// A `[B, H, S, D]` tensor that lies as told.
fn laid_out(client: &Client, data: &[f64], shape: [usize; 4], layout: Layout, element: Element) -> DeviceTensor {
    if data.is_empty() {
        return floats(client, data, &shape, element);
    }
    let (stored, outer) = layout.stored(data, shape);
    let all = floats(client, &stored, &outer, element);
    let mut strides = all.strides;
    if layout.heads_inner {
        strides.swap(1, 2);
    }
    let handle = match layout.before * element.bytes() {
        0 => all.handle,
        offset => all.handle.offset_start(offset as u64),
    };
    DeviceTensor { handle, shape: shape.to_vec(), strides, elem: all.elem }
}

/// The elements of a contiguous tensor.
pub fn read(client: &Client, tensor: &DeviceTensor) -> Vec<f64> {
    assert!(tensor.is_contiguous(), "{tensor:?}");
    if tensor.elements() == 0 {
        return Vec::new();
    }
    let bytes = client.read_one(tensor.handle.clone()).expect("a tensor that was written");
    let bytes = &bytes[..tensor.elements() * tensor.elem.size()];
    match tensor.elem {
        ElemType::Float(FloatKind::F16) => elements(bytes, |x| f16::from_le_bytes(x).to_f64()),
        ElemType::Float(FloatKind::BF16) => elements(bytes, |x| bf16::from_le_bytes(x).to_f64()),
        ElemType::Float(FloatKind::F32) => elements(bytes, |x| f32::from_le_bytes(x).into()),
        other => panic!("no result has elements of {other:?}"),
    }
}

fn elements<const SIZE: usize>(bytes: &[u8], wide: impl Fn([u8; SIZE]) -> f64) -> Vec<f64> {
    bytes.as_chunks::<SIZE>().0.iter().map(|&x| wide(x)).collect()
}
