//! The CubeCL kernels behind Burn's CubeCL backend.

use burn::backend::cubecl::{dtype_to_storage_type, elem_type_to_dtype};
use burn::backend::tensor::FloatTensor;
use burn::tensor::Shape;
use burn_cubecl::kernel::{into_contiguous, untile};
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeDevice};
use cubecl::client::Client;
use flashover_kernels::device::{DeviceTensor, KernelError};
use flashover_kernels::family::Outputs;
use flashover_kernels::hopper;
use flashover_kernels::operands::{Operands, Wanted};
use flashover_kernels::select::{Call, Selection};

use crate::backend::{AttentionBackend, Extras, ForwardState, InputGradients, MaybeFloat, Plan};

impl AttentionBackend for CubeBackend {
    fn flashover_forward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        extras: Extras<Self>,
        plan: Plan,
    ) -> FloatTensor<Self> {
        forward(q, k, v, extras, &plan, false, false).0
    }

    fn flashover_forward_state(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        extras: Extras<Self>,
        plan: Plan,
        for_backward: bool,
    ) -> ForwardState<Self> {
        let (o, lse, rest) = forward(q, k, v, extras, &plan, true, for_backward && plan.keeps_rest());
        ForwardState { o, lse: lse.expect("the log-sum-exp was asked for"), rest: MaybeFloat::from_option(rest) }
    }

    fn flashover_backward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        extras: Extras<Self>,
        state: ForwardState<Self>,
        do_: FloatTensor<Self>,
        dlse: MaybeFloat<Self>,
        plan: Plan,
        wanted: Wanted,
    ) -> InputGradients<Self> {
        let place = Place::of(&q);
        let selection = selection(&plan);
        let blocks = place.blocks(&plan);
        let ForwardState { o, lse, rest } = state;
        let rest = rest.into_option();
        let (q, k, v, do_) = if selection.backward_copies(wanted, rest.is_some()) {
            (copied_in(q), copied_in(k), copied_in(v), copied_in(do_))
        } else {
            (q, k, v, do_)
        };
        let operands = operands(q, k, v, extras);
        let outputs = Outputs {
            o: on_device(o),
            lse: on_device(lse),
            do_: on_device(do_),
            dlse: dlse.into_option().map(on_device),
        };
        let rest = rest.map(on_device);
        let call = Call { client: &place.client, problem: &plan.problem, operands: &operands, plan: blocks.as_ref() };
        let gradients = selection.backward(call, &outputs, rest, wanted);
        let gradients = gradients.unwrap_or_else(|error| refused(&error));
        let maybe = |x: Option<DeviceTensor>| MaybeFloat::from_option(x.map(|x| place.tensor(x)));
        InputGradients {
            q: maybe(gradients.q),
            k: maybe(gradients.k),
            v: maybe(gradients.v),
            bias: maybe(gradients.bias),
            alibi_slopes: maybe(gradients.alibi_slopes),
            learned_sinks: maybe(gradients.learned_sinks),
            score_parameters: maybe(gradients.score_parameters),
        }
    }
}

fn forward(
    q: CubeTensor,
    k: CubeTensor,
    v: CubeTensor,
    extras: Extras<CubeBackend>,
    plan: &Plan,
    with_lse: bool,
    with_rest: bool,
) -> (CubeTensor, Option<CubeTensor>, Option<CubeTensor>) {
    let place = Place::of(&q);
    let selection = selection(plan);
    let (q, k, v) = if selection.forward_copies() { (copied_in(q), copied_in(k), copied_in(v)) } else { (q, k, v) };
    let operands = operands(q, k, v, extras);
    let blocks = place.blocks(plan);
    let call = Call { client: &place.client, problem: &plan.problem, operands: &operands, plan: blocks.as_ref() };
    let outputs = selection.forward(call, with_lse, with_rest);
    let (o, lse, rest) = outputs.unwrap_or_else(|error| refused(&error));
    let maybe = |tensor: Option<DeviceTensor>| tensor.map(|tensor| place.tensor(tensor));
    (place.tensor(o), maybe(lse), maybe(rest))
}

fn selection(plan: &Plan) -> &Selection {
    plan.selection.as_ref().expect("the boundary selects a kernel for every CubeCL device")
}

fn refused(error: &KernelError) -> ! {
    panic!("flashover: a call that passed the boundary was refused by its kernel: {error}")
}

/// Where results are put.
struct Place {
    client: Client,
    device: CubeDevice,
}

impl Place {
    fn of(tensor: &CubeTensor) -> Self {
        Place { client: tensor.client.clone(), device: tensor.device.clone() }
    }

    /// The call's block plan here.
    fn blocks(&self, plan: &Plan) -> Option<DeviceTensor> {
        plan.blocks.as_ref().map(|blocks| blocks.on_device(&self.client, &self.device))
    }

    fn tensor(&self, tensor: DeviceTensor) -> CubeTensor {
        let dtype = elem_type_to_dtype(tensor.elem);
        let shape = Shape::from(tensor.shape);
        CubeTensor::new_contiguous(self.client.clone(), self.device.clone(), shape, tensor.handle, dtype)
    }
}

fn operands(q: CubeTensor, k: CubeTensor, v: CubeTensor, extras: Extras<CubeBackend>) -> Operands<DeviceTensor> {
    let Extras { bias, mask, alibi_slopes, learned_sinks, score_parameters, key_lengths } = extras;
    Operands {
        q: on_device(q),
        k: on_device(k),
        v: on_device(v),
        bias: bias.into_option().map(on_device),
        mask: mask.into_option().map(on_device),
        alibi_slopes: alibi_slopes.into_option().map(on_device),
        learned_sinks: learned_sinks.into_option().map(on_device),
        score_parameters: score_parameters.into_option().map(on_device),
        key_lengths: key_lengths.into_option().map(on_device),
    }
}

/// The tensor, copied if the copy engine cannot read it in place.
fn copied_in(tensor: CubeTensor) -> CubeTensor {
    if hopper::reads_in_place(&on_device(tensor.clone())) { tensor } else { into_contiguous(tensor) }
}

/// The tensor as the kernels read it: in place, whatever its strides; only storage tiles are laid out as rows first.
fn on_device(tensor: CubeTensor) -> DeviceTensor {
    let tensor = untile(tensor);
    DeviceTensor {
        shape: tensor.meta.shape().to_vec(),
        strides: tensor.meta.strides().to_vec(),
        elem: dtype_to_storage_type(tensor.dtype),
        handle: tensor.handle,
    }
}
