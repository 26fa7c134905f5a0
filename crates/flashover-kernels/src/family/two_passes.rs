//! A backward of the matrix kernels in two passes: a kernel that owns queries takes `dq`, and `delta` for the other, which owns keys and takes
//! `dk` and `dv`. A family has the two launches; everything around them stands here.

use cubecl::prelude::*;

use super::checks::{check_operands, check_outputs, check_plan};
use super::element::NumbersLaunch;
use super::launcher::{Launcher, Outputs, numbers};
use super::scratch::{self, Layout, Partials, fill_row_statistics};
use crate::device::{DeviceTensor, KernelError};
use crate::operands::{Gradients, Operands, Wanted};
use crate::problem::{MAX_HEAD_DIM, Problem};

/// Keys below which a backward multiplies weights and gradients of scores twice, rounded and what rounding took from them: with
/// so few, gradients largely consist of that. A forward does not: its weights are exact where it matters, and values may be
/// infinite, of which even a rest of 0 would make NaN.
pub(crate) const FEW_KEYS: usize = 16;

/// What both launches of a backward have.
pub(crate) struct Call<'a> {
    pub launcher: Launcher<'a>,
    pub problem: &'a Problem,
    pub operands: &'a Operands<DeviceTensor>,
    pub outputs: &'a Outputs,
    pub scratch: DeviceTensor,
    layout: Layout,
}

impl<'a> Call<'a> {
    /// Builds the scratch buffer and fills in the statistics of rows.
    fn prepare(
        client: &'a Client,
        problem: &'a Problem,
        operands: &'a Operands<DeviceTensor>,
        outputs: &'a Outputs,
        plan: Option<&DeviceTensor>,
    ) -> Self {
        let layout = layout(problem);
        let launcher = Launcher { client, scratch_bytes: layout.bytes() };
        let scratch = scratch::build(&launcher, problem, operands, plan, &layout);
        fill_row_statistics(&launcher, problem, outputs, &scratch, &layout);
        Call { launcher, problem, operands, outputs, scratch, layout }
    }

    pub fn numbers(&self) -> NumbersLaunch {
        numbers(self.problem, &self.layout)
    }
}

/// Those of `dq`, `dk` and `dv` that are [`Wanted`], by `queries(call, dq)` and `keys(call, dk, dv)`. The operands are checked; whether the
/// device can run the problem is the caller's to check before.
pub(crate) fn gradients(
    client: &Client,
    problem: &Problem,
    operands: &Operands<DeviceTensor>,
    outputs: &Outputs,
    plan: Option<&DeviceTensor>,
    wanted: Wanted,
    queries: impl Fn(&Call, Option<&DeviceTensor>),
    keys: impl Fn(&Call, Option<&DeviceTensor>, Option<&DeviceTensor>),
) -> Result<Gradients<DeviceTensor>, KernelError> {
    check_operands(problem, operands)?;
    check_plan(problem, plan)?;
    check_outputs(problem, outputs)?;
    let scores = problem.batch * problem.heads_q * problem.seq_q * problem.seq_kv;
    let new = |operand: &DeviceTensor| {
        let make = if scores == 0 { DeviceTensor::zeros } else { DeviceTensor::empty };
        make(client, &operand.shape, operand.elem)
    };
    let gradients = Gradients {
        q: wanted.q.then(|| new(&operands.q)),
        k: wanted.k.then(|| new(&operands.k)),
        v: wanted.v.then(|| new(&operands.v)),
        ..Gradients::default()
    };
    let Gradients { q, k, v, .. } = &gradients;
    if scores == 0 || !(wanted.q || wanted.k || wanted.v) {
        return Ok(gradients);
    }
    let call = Call::prepare(client, problem, operands, outputs, plan);
    if wanted.q || wanted.k {
        queries(&call, q.as_ref());
    }
    if keys_fused(problem) {
        if wanted.k || wanted.v {
            keys(&call, k.as_ref(), v.as_ref());
        }
    } else {
        if wanted.k {
            keys(&call, k.as_ref(), None);
        }
        if wanted.v {
            keys(&call, None, v.as_ref());
        }
    }
    Ok(gradients)
}

fn layout(problem: &Problem) -> Layout {
    Layout::of(problem, Some(Partials::default()))
}

/// Bytes of the scratch buffer.
pub(crate) fn scratch_bytes(problem: &Problem) -> usize {
    layout(problem).bytes()
}

/// Whether `dk` and `dv` come from one launch: seven bindings hold both outputs or a bias, and a unit has registers for sums over
/// 256 elements of a row. Rows are whole matrices of 16 elements.
pub(crate) fn keys_fused(problem: &Problem) -> bool {
    let padded = |dim: usize| dim.next_multiple_of(16);
    problem.bias.is_none() && padded(problem.head_dim) + padded(problem.value_dim) <= MAX_HEAD_DIM
}
