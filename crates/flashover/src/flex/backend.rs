//! The native path behind Burn's Flex backend: tensors in, views of their storage as it lies; vectors back, as tensors.

use burn::backend::Flex;
use burn::backend::tensor::FloatTensor;
use burn::tensor::{BoolStore, Bytes, DType, Element as BurnElement, Shape};
use burn_flex::{FlexTensor, Layout};
use bytemuck::Pod;
use flashover_kernels::operands::Wanted;
use flashover_kernels::problem::{Element, Problem};

use super::pages::zeros;
use super::{Float, Inputs, View, backward, forward};
use crate::SparsePlan;
use crate::backend::{AttentionBackend, Extras, ForwardState, InputGradients, MaybeFloat, Plan};

/// Calls `$function::<T>` with the storage type `T` of an element type.
macro_rules! with_storage_type {
    ($element:expr, $function:ident($($argument:expr),* $(,)?)) => {
        match $element {
            Element::F64 => $function::<f64>($($argument),*),
            Element::F32 => $function::<f32>($($argument),*),
            Element::F16 => $function::<half::f16>($($argument),*),
            Element::BF16 => $function::<half::bf16>($($argument),*),
        }
    };
}

impl AttentionBackend for Flex {
    fn flashover_forward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        extras: Extras<Self>,
        plan: Plan,
    ) -> FloatTensor<Self> {
        let operands = Stored::new(q, k, v, extras, plan.blocks);
        with_storage_type!(plan.problem.element, run_forward(&operands, &plan.problem, false)).0
    }

    fn flashover_forward_state(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        extras: Extras<Self>,
        plan: Plan,
        _for_backward: bool,
    ) -> ForwardState<Self> {
        let operands = Stored::new(q, k, v, extras, plan.blocks);
        let (o, lse) = with_storage_type!(plan.problem.element, run_forward(&operands, &plan.problem, true));
        ForwardState { o, lse: lse.expect("the log-sum-exp was asked for"), rest: MaybeFloat::Absent }
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
        let operands = Stored::new(q, k, v, extras, plan.blocks);
        let saved =
            SavedTensors { o: state.o, lse: contiguous(state.lse), do_, dlse: dlse.into_option().map(contiguous) };
        with_storage_type!(plan.problem.element, run_backward(&operands, &saved, &plan.problem, wanted))
    }
}

/// The operands, the one-dimensional ones contiguous.
struct Stored {
    q: FlexTensor,
    k: FlexTensor,
    v: FlexTensor,
    bias: Option<FlexTensor>,
    mask: Option<FlexTensor>,
    alibi_slopes: Option<FlexTensor>,
    learned_sinks: Option<FlexTensor>,
    score_parameters: Option<FlexTensor>,
    key_lengths: Option<FlexTensor>,
    blocks: Option<SparsePlan>,
}

struct SavedTensors {
    o: FlexTensor,
    lse: FlexTensor,
    do_: FlexTensor,
    dlse: Option<FlexTensor>,
}

impl Stored {
    fn new(q: FlexTensor, k: FlexTensor, v: FlexTensor, extras: Extras<Flex>, blocks: Option<SparsePlan>) -> Self {
        let Extras { bias, mask, alibi_slopes, learned_sinks, score_parameters, key_lengths } = extras;
        Stored {
            q,
            k,
            v,
            bias: bias.into_option(),
            mask: mask.into_option(),
            alibi_slopes: alibi_slopes.into_option().map(contiguous),
            learned_sinks: learned_sinks.into_option().map(contiguous),
            score_parameters: score_parameters.into_option().map(contiguous),
            key_lengths: key_lengths.into_option().map(contiguous),
            blocks,
        }
    }

    fn inputs<T: Storage>(&self) -> Inputs<'_, T>
    where
        T::Compute: Storage,
    {
        Inputs {
            q: view(&self.q),
            k: view(&self.k),
            v: view(&self.v),
            bias: self.bias.as_ref().map(view),
            mask: self.mask.as_ref().map(mask_view),
            alibi_slopes: self.alibi_slopes.as_ref().map(elements),
            learned_sinks: self.learned_sinks.as_ref().map(elements),
            score_parameters: self.score_parameters.as_ref().map(elements),
            key_lengths: self.key_lengths.as_ref().map(elements),
            plan: self.blocks.as_ref().map(SparsePlan::block_plan),
        }
    }
}

/// A type that both Burn's storage and the native path know.
trait Storage: BurnElement + Pod + Float {}
impl<T: BurnElement + Pod + Float> Storage for T {}

fn run_forward<T: Storage>(stored: &Stored, problem: &Problem, with_lse: bool) -> (FlexTensor, Option<FlexTensor>)
where
    T::Compute: Storage,
{
    let mut o = zeros::<T>(problem.output_shape().iter().product());
    let mut lse = with_lse.then(|| zeros::<f32>(problem.lse_shape().iter().product()));
    forward(problem, &stored.inputs::<T>(), &mut o, lse.as_deref_mut());
    (tensor(o, problem.output_shape()), lse.map(|lse| tensor(lse, problem.lse_shape())))
}

fn run_backward<T: Storage>(
    stored: &Stored,
    saved: &SavedTensors,
    problem: &Problem,
    wanted: Wanted,
) -> InputGradients<Flex>
where
    T::Compute: Storage,
{
    let gradients = backward(
        problem,
        &stored.inputs::<T>(),
        view(&saved.o),
        elements(&saved.lse),
        view(&saved.do_),
        saved.dlse.as_ref().map(elements),
        wanted,
    );
    let p = problem;
    fn maybe<E: BurnElement + Pod, const D: usize>(data: Option<Vec<E>>, shape: [usize; D]) -> MaybeFloat<Flex> {
        MaybeFloat::from_option(data.map(|data| tensor(data, shape)))
    }
    InputGradients {
        q: maybe(gradients.q, [p.batch, p.heads_q, p.seq_q, p.head_dim]),
        k: maybe(gradients.k, [p.batch, p.heads_kv, p.seq_kv, p.head_dim]),
        v: maybe(gradients.v, [p.batch, p.heads_kv, p.seq_kv, p.value_dim]),
        bias: maybe(gradients.bias, p.bias.unwrap_or_default()),
        alibi_slopes: maybe(gradients.alibi_slopes, [p.heads_q]),
        learned_sinks: maybe(gradients.learned_sinks, [p.heads_q]),
        score_parameters: maybe(gradients.score_parameters, [p.score.map_or(0, |score| score.parameters)]),
    }
}

fn view<T: BurnElement + Pod>(tensor: &FlexTensor) -> View<'_, T> {
    let layout = tensor.layout();
    View::new(tensor.storage::<T>(), layout.start_offset(), four(layout.shape()), four(layout.strides()))
}

fn mask_view(tensor: &FlexTensor) -> View<'_, u8> {
    assert!(
        matches!(tensor.dtype(), DType::Bool(BoolStore::Native | BoolStore::U8)),
        "mask: expected booleans of one byte, as Flex stores them, got {:?}",
        tensor.dtype()
    );
    let layout = tensor.layout();
    View::new(tensor.bytes(), layout.start_offset(), four(layout.shape()), four(layout.strides()))
}

fn four<T: Copy>(items: &[T]) -> [T; 4] {
    items.try_into().expect("attention's operands have four dimensions")
}

fn contiguous(tensor: FlexTensor) -> FlexTensor {
    tensor.to_contiguous()
}

fn elements<T: BurnElement + Pod>(tensor: &FlexTensor) -> &[T] {
    tensor.as_slice::<T>().expect("made contiguous, of the dtype that the boundary cast it to")
}

fn tensor<T: BurnElement + Pod, const D: usize>(data: Vec<T>, shape: [usize; D]) -> FlexTensor {
    FlexTensor::new(Bytes::from_elems(data), Layout::contiguous(Shape::from(shape)), T::dtype())
}
