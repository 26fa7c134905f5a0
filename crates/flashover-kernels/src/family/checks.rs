//! What a launch is refused for: tensors that are not what the problem says.

use cubecl::prelude::*;

use super::launcher::BINDINGS;
use super::launcher::Outputs;
use crate::device::{DeviceLimits, DeviceTensor, KernelError, element_type};
use crate::operands::Operands;
use crate::problem::Problem;

/// Holds what any kernel needs against what the device has.
pub(crate) fn check_room(
    kernel: &'static str,
    limits: &DeviceLimits,
    shared_bytes: usize,
    units: usize,
) -> Result<(), KernelError> {
    check_limit(kernel, limits, "bytes of shared memory", limits.max_shared_bytes, shared_bytes)?;
    check_limit(kernel, limits, "units", limits.max_units, units)?;
    check_limit(kernel, limits, "bindings", limits.max_bindings, BINDINGS)
}

/// Holds what a kernel needs of something against what there is of it.
pub(crate) fn check_limit(
    kernel: &'static str,
    limits: &DeviceLimits,
    what: &'static str,
    limit: usize,
    found: usize,
) -> Result<(), KernelError> {
    if found > limit {
        return Err(KernelError::Limit { kernel, what, device: limits.name.clone(), limit, found });
    }
    Ok(())
}

/// Holds a plan, in [`flat`](crate::block_plan::flat) form, against the problem's.
pub(crate) fn check_plan(problem: &Problem, plan: Option<&DeviceTensor>) -> Result<(), KernelError> {
    let shape = problem.plan.map(|plan| [plan.words]);
    let word = |tensor: &DeviceTensor| tensor.elem == u32::elem_type_native();
    check("plan", plan, shape.as_ref().map(|shape| &shape[..]), "u32", word)
}

pub(crate) fn check_operands(problem: &Problem, operands: &Operands<DeviceTensor>) -> Result<(), KernelError> {
    let Problem { batch, heads_q, heads_kv, seq_q, seq_kv, head_dim, value_dim, .. } = *problem;
    let elem = element_type(problem.element);
    let word = |tensor: &DeviceTensor| tensor.elem.size() == size_of::<u32>();
    let mask = |tensor: &DeviceTensor| matches!(tensor.elem, ElemType::UInt(_) | ElemType::Int(_));
    let float = |tensor: &DeviceTensor| tensor.elem == elem;
    check("q", Some(&operands.q), Some(&[batch, heads_q, seq_q, head_dim]), "that of the problem", float)?;
    check("k", Some(&operands.k), Some(&[batch, heads_kv, seq_kv, head_dim]), "that of the problem", float)?;
    check("v", Some(&operands.v), Some(&[batch, heads_kv, seq_kv, value_dim]), "that of the problem", float)?;
    let shape = problem.bias.as_ref().map(|shape| &shape[..]);
    check("bias", operands.bias.as_ref(), shape, "that of the problem", float)?;
    let shape = problem.mask.as_ref().map(|shape| &shape[..]);
    check("mask", operands.mask.as_ref(), shape, "an integer", mask)?;
    let (heads, batch) = ([heads_q], [batch]);
    check("alibi_slopes", operands.alibi_slopes.as_ref(), problem.alibi.then_some(&heads[..]), "f32", word)?;
    check("learned_sinks", operands.learned_sinks.as_ref(), problem.learned_sinks.then_some(&heads[..]), "f32", word)?;
    let parameters = problem.score.map(|score| [score.parameters]);
    let shape = parameters.as_ref().map(|shape| &shape[..]);
    check("score_parameters", operands.score_parameters.as_ref(), shape, "f32", word)?;
    check("key_lengths", operands.key_lengths.as_ref(), problem.key_lengths.then_some(&batch[..]), "i32", word)
}

pub(crate) fn check_outputs(problem: &Problem, outputs: &Outputs) -> Result<(), KernelError> {
    let elem = element_type(problem.element);
    let float = |tensor: &DeviceTensor| tensor.elem == elem;
    let word = |tensor: &DeviceTensor| tensor.elem == f32::elem_type_native();
    check("o", Some(&outputs.o), Some(&problem.output_shape()), "that of the problem", float)?;
    check("do", Some(&outputs.do_), Some(&problem.output_shape()), "that of the problem", float)?;
    check("lse", Some(&outputs.lse), Some(&problem.lse_shape()), "f32", word)?;
    let lse_shape = problem.lse_shape();
    check("dlse", outputs.dlse.as_ref(), outputs.dlse.as_ref().map(|_| &lse_shape[..]), "f32", word)
}

/// Of a backward in one pass: holds what rounding took from the output against it, and that both lie without gaps.
pub(crate) fn check_rest(problem: &Problem, outputs: &Outputs, rest: &DeviceTensor) -> Result<(), KernelError> {
    let elem = element_type(problem.element);
    check("rest", Some(rest), Some(&problem.output_shape()), "that of the problem", |tensor| tensor.elem == elem)?;
    for (operand, tensor) in [("o", &outputs.o), ("rest", rest)] {
        if !tensor.is_contiguous() {
            return Err(KernelError::Layout { operand, found: tensor.strides.clone() });
        }
    }
    Ok(())
}

/// Holds an operand against its shape by the problem: `None` where the problem has none.
fn check(
    operand: &'static str,
    tensor: Option<&DeviceTensor>,
    shape: Option<&[usize]>,
    elements: &'static str,
    element_fits: impl Fn(&DeviceTensor) -> bool,
) -> Result<(), KernelError> {
    let name = |present: bool| if present { "a tensor" } else { "none" };
    match (tensor, shape) {
        (None, None) => Ok(()),
        (Some(tensor), Some(shape)) if tensor.shape != shape => {
            Err(KernelError::Shape { operand, expected: shape.to_vec(), found: tensor.shape.clone() })
        }
        (Some(tensor), Some(_)) if !element_fits(tensor) => {
            Err(KernelError::OperandElement { operand, expected: elements, found: format!("{:?}", tensor.elem) })
        }
        (Some(_), Some(_)) => Ok(()),
        (tensor, shape) => {
            Err(KernelError::Presence { operand, expected: name(shape.is_some()), found: name(tensor.is_some()) })
        }
    }
}
