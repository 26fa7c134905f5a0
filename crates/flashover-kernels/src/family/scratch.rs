//! The scratch buffer: everything a kernel reads besides its large operands, in one binding of 32-bit words.
//!
//! WebGPU guarantees 8 storage buffers and CubeCL takes one, so the row statistics, the per-head numbers and the packed
//! mask share a buffer, which small kernels fill on the device. Floats are stored by their bits. Word 0 is in no section, so
//! that an offset of 0 says that one is absent; where a section is copied, so where there is a plan, it starts as 0, and a kernel may
//! count with it.

use cubecl::prelude::*;

use super::element::Numbers;
use super::element::is_minus_infinity;
use super::launcher::{Launcher, Outputs, SUM_UNITS, binding_facts, numbers};
use crate::device::DeviceTensor;
use crate::operands::Operands;
use crate::problem::Problem;

/// Offsets of the sections, in words; 0 for one that is absent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Layout {
    /// `lse`, `delta` and `norm`, `[B, Hq, Sq]` each; backward only.
    pub lse: usize,
    pub delta: usize,
    pub norm: usize,
    /// ALiBi slopes `[Hq]`.
    pub slopes: usize,
    /// Learned sinks `[Hq]`.
    pub sinks: usize,
    /// Key lengths `[B]`.
    pub lengths: usize,
    /// Partial sums of the slopes' gradient, one a query tile and head.
    pub slope_partials: usize,
    /// Partial sums of the bias's gradient, each in the bias's own shape.
    pub bias_partials: usize,
    /// Parameters of the user's score function `[n]`.
    pub parameters: usize,
    /// Partial sums of their gradient.
    pub parameter_partials: usize,
    /// The block plan in [`flat`](crate::block_plan::flat) form.
    pub plan: usize,
    /// The mask in its own shape, each row of keys padded to whole words; 1 is visible.
    pub mask: usize,
    /// Words of all sections.
    pub words: usize,
}

/// Words of the partial sums of a backward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Partials {
    /// Of the slopes' gradient.
    pub slopes: usize,
    /// Of the bias's gradient.
    pub bias: usize,
    /// Of the gradient of the parameters of the user's score function.
    pub parameters: usize,
}

impl Layout {
    /// Sections for a forward, or for a backward and its partial sums.
    pub fn of(problem: &Problem, backward: Option<Partials>) -> Self {
        let rows = backward.map_or(0, |_| problem.batch * problem.heads_q * problem.seq_q);
        let mut layout = Layout { words: 1, ..Layout::default() };
        let mut section = |on: bool, words: usize| {
            let at = layout.words;
            layout.words += if on { words } else { 0 };
            if layout.words > at { at } else { 0 }
        };
        let (lse, delta, norm) = (section(true, rows), section(true, rows), section(true, rows));
        let slopes = section(problem.alibi, problem.heads_q);
        let sinks = section(problem.learned_sinks, problem.heads_q);
        let lengths = section(problem.key_lengths, problem.batch);
        let slope_partials = section(true, backward.map_or(0, |partials| partials.slopes));
        let bias_partials = section(true, backward.map_or(0, |partials| partials.bias));
        let parameters = section(true, problem.score.map_or(0, |score| score.parameters));
        let parameter_partials = section(true, backward.map_or(0, |partials| partials.parameters));
        let plan = section(true, problem.plan.map_or(0, |plan| plan.words));
        let mask = section(true, problem.mask.map_or(0, |[b, h, q, k]| b * h * q * k.div_ceil(32)));
        Layout {
            lse,
            delta,
            norm,
            slopes,
            sinks,
            lengths,
            slope_partials,
            bias_partials,
            parameters,
            parameter_partials,
            plan,
            mask,
            ..layout
        }
    }

    /// Bytes of all sections.
    pub fn bytes(&self) -> usize {
        self.words * size_of::<u32>()
    }
}

/// Allocates the scratch buffer and fills the sections that come from operands.
pub(crate) fn build(
    launcher: &Launcher,
    problem: &Problem,
    operands: &Operands<DeviceTensor>,
    plan: Option<&DeviceTensor>,
    layout: &Layout,
) -> DeviceTensor {
    let word = u32::elem_type_native();
    let scratch = DeviceTensor::empty(launcher.client, &[layout.words], word);
    for (source, at) in [
        (problem.alibi.then_some(operands.alibi_slopes.as_ref()).flatten(), layout.slopes),
        (problem.learned_sinks.then_some(operands.learned_sinks.as_ref()).flatten(), layout.sinks),
        (problem.key_lengths.then_some(operands.key_lengths.as_ref()).flatten(), layout.lengths),
        (problem.score.and(operands.score_parameters.as_ref()), layout.parameters),
        (problem.plan.and(plan), layout.plan),
    ] {
        let Some(source) = source.filter(|source| source.elements() > 0) else { continue };
        launcher.note_small("copy", 2, 0);
        // SAFETY: the kernel reads `elements` elements of `source` and writes as many words from `at` on.
        unsafe {
            copy_words::launch_unchecked(
                launcher.client,
                launcher.cubes(source.elements().div_ceil(SUM_UNITS)),
                CubeDim::new_1d(SUM_UNITS as u32),
                source.address_type().max(scratch.address_type()),
                source.arg(),
                scratch.buffer(),
                at,
                source.elements() as u32,
            );
        }
    }
    if let (Some(shape), Some(mask)) = (problem.mask, &operands.mask)
        && mask.elements() > 0
    {
        let words = layout.words - layout.mask;
        launcher.note_small("pack_mask", 2, 0);
        // SAFETY: the kernel stops at `words` words and tests keys against the mask's own shape.
        unsafe {
            pack_mask::launch_unchecked(
                launcher.client,
                launcher.cubes(words.div_ceil(SUM_UNITS)),
                CubeDim::new_1d(SUM_UNITS as u32),
                mask.address_type().max(scratch.address_type()),
                mask.arg(),
                scratch.buffer(),
                layout.mask,
                words,
                shape[1] as u32,
                shape[2] as u32,
                shape[3] as u32,
                mask.elem,
            );
        }
    }
    scratch
}

/// `scratch[at + x] = source[x]`, bits as they are, for any 4-byte element type, and `scratch[0] = 0`.
#[cube(launch_unchecked, address_type = "dynamic")]
fn copy_words(source: &Tensor<u32>, scratch: &mut [u32], at: usize, len: u32) {
    if ABSOLUTE_POS < len as usize {
        scratch[at + ABSOLUTE_POS] = source[ABSOLUTE_POS * source.stride(0)];
    }
    if ABSOLUTE_POS == 0 {
        scratch[0] = 0u32;
    }
}

/// Packs 32 keys of a mask in Burn's convention (`true` hides) into a word in ours (1 is visible). A unit a word.
#[cube(launch_unchecked, address_type = "dynamic")]
fn pack_mask<B: Int>(
    mask: &Tensor<B>,
    scratch: &mut [u32],
    at: usize,
    words: usize,
    heads: u32,
    queries: u32,
    keys: u32,
    #[define(B)] _dtype: ElemType,
) {
    let x = ABSOLUTE_POS;
    if x < words {
        let row_words = keys.div_ceil(32u32) as usize;
        let (row, j0) = (x / row_words, (x % row_words) as u32 * 32u32);
        let (i, head) = (row % queries as usize, row / queries as usize);
        let (h, b) = (head % heads as usize, head / heads as usize);
        let from = b * mask.stride(0) + h * mask.stride(1) + i * mask.stride(2);
        let mut word = 0u32;
        for bit in 0..32u32 {
            let j = j0 + bit;
            if j < keys {
                let hidden = u32::cast_from(mask[from + j as usize * mask.stride(3)]) != 0;
                word |= select(hidden, 0u32, 1u32) << bit;
            }
        }
        scratch[at + x] = word;
    }
}

/// `lse`, `−dlse` and 1 into the scratch buffer, the starts of `lse`, `delta` and `norm`: the gradient of `lse` enters every
/// score's gradient as `p · dlse`, and the walk that takes `delta` does the rest. A unit a row; a row that
/// saw nothing keeps 0 and 1.
#[cube(launch_unchecked, address_type = "dynamic")]
fn row_statistics(
    lse: &Tensor<f32>,
    dlse: ComptimeOption<&Tensor<f32>>,
    scratch: &mut [u32],
    n: Numbers,
    #[comptime] with_dlse: bool,
) {
    let row = ABSOLUTE_POS;
    if row < n.batch as usize * n.heads_q as usize * n.seq_q as usize {
        let (i, head) = (row % n.seq_q as usize, row / n.seq_q as usize);
        let (h, b) = (head % n.heads_q as usize, head / n.heads_q as usize);
        let row_lse = lse[b * lse.stride(0) + h * lse.stride(1) + i * lse.stride(2)];
        let mut delta = 0.0f32;
        if with_dlse {
            if !is_minus_infinity(row_lse) {
                let dlse = dlse.unwrap();
                delta = -dlse[b * dlse.stride(0) + h * dlse.stride(1) + i * dlse.stride(2)];
            }
        }
        scratch[n.lse_at + row] = u32::reinterpret(row_lse);
        scratch[n.delta_at + row] = u32::reinterpret(delta);
        scratch[n.norm_at + row] = u32::reinterpret(1.0f32);
    }
}

/// Launches [`row_statistics`] over all rows, which `outputs` were [checked](super::checks::check_outputs) to have.
pub(crate) fn fill_row_statistics(
    launcher: &Launcher,
    problem: &Problem,
    outputs: &Outputs,
    scratch: &DeviceTensor,
    layout: &Layout,
) {
    let Outputs { lse, dlse, .. } = outputs;
    let (bindings, address) = binding_facts([lse, scratch].into_iter().chain(dlse));
    launcher.note_small("row_statistics", bindings, 0);
    let rows = problem.batch * problem.heads_q * problem.seq_q;
    // SAFETY: rows are tested against the problem, whose shapes `check_outputs` held against the tensors.
    unsafe {
        row_statistics::launch_unchecked(
            launcher.client,
            launcher.cubes(rows.div_ceil(SUM_UNITS)),
            CubeDim::new_1d(SUM_UNITS as u32),
            address,
            lse.arg(),
            dlse.as_ref().map(DeviceTensor::arg).into(),
            scratch.buffer(),
            numbers(problem, layout),
            dlse.is_some(),
        );
    }
}
