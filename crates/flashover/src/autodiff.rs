//! The derivative of attention: hand-written, saves q, k, v and what the forward returned, recomputes the rest
//! (FlashAttention, Algorithm 4).
//!
//! `o` and `lse` are two nodes over the same saved state, because Burn's backward step finishes one output. A loss that
//! uses both walks the backward twice; plain attention never makes the second node.

use burn::backend::TensorMetadata;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend};
use burn_autodiff::NodeId;
use burn_autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn_autodiff::grads::Gradients as GradientStore;
use burn_autodiff::ops::{Backward, NodeGuard, Ops, OpsKind};
use flashover_kernels::operands::Wanted;

use crate::backend::{AttentionBackend, Extras, ForwardState, InputGradients, MaybeBool, MaybeFloat, MaybeInt, Plan};

/// The operands that can be tracked, in the order in which they become parents when they are present.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operand {
    Q,
    K,
    V,
    Bias,
    AlibiSlopes,
    LearnedSinks,
    ScoreParameters,
}

/// Which of the two outputs a node stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Output {
    O,
    Lse,
}

#[derive(Debug, Clone)]
struct Saved<B: Backend> {
    plan: Plan,
    output: Output,
    /// One for each parent, in the same order: how the operand is retrieved (it may be recomputed by checkpointing).
    operands: Vec<(Operand, NodeId)>,
    mask: MaybeBool<B>,
    key_lengths: MaybeInt<B>,
    state: ForwardState<B>,
}

#[derive(Debug)]
struct AttentionBackward;

impl<B: AttentionBackend, const N: usize> Backward<B, N> for AttentionBackward {
    type State = Saved<B>;

    fn backward(self, ops: Ops<Saved<B>, N>, grads: &mut GradientStore, checkpointer: &mut Checkpointer) {
        let saved = ops.state;
        let grad = grads.consume::<B>(&ops.node);
        let mut values = [const { None }; 7];
        let mut wanted = Wanted::default();
        for (&(operand, id), parent) in saved.operands.iter().zip(&ops.parents) {
            values[operand as usize] = Some(checkpointer.retrieve_node_output::<FloatTensor<B>>(id));
            *flag(&mut wanted, operand) = parent.is_some();
        }
        let [q, k, v, bias, alibi_slopes, learned_sinks, score_parameters] = values;
        let present = "q, k and v are always saved";
        let extras = Extras {
            bias: MaybeFloat::from_option(bias),
            mask: saved.mask,
            alibi_slopes: MaybeFloat::from_option(alibi_slopes),
            learned_sinks: MaybeFloat::from_option(learned_sinks),
            score_parameters: MaybeFloat::from_option(score_parameters),
            key_lengths: saved.key_lengths,
        };
        let (do_, dlse) = match saved.output {
            Output::O => (grad, MaybeFloat::Absent),
            Output::Lse => {
                let o = &saved.state.o;
                let zeros = B::float_zeros(o.shape(), &o.device(), o.dtype().into());
                (zeros, MaybeFloat::Present(grad))
            }
        };
        let InputGradients { q: dq, k: dk, v: dv, bias, alibi_slopes, learned_sinks, score_parameters } =
            B::flashover_backward(
                q.expect(present),
                k.expect(present),
                v.expect(present),
                extras,
                saved.state,
                do_,
                dlse,
                saved.plan,
                wanted,
            );
        let gradients = [dq, dk, dv, bias, alibi_slopes, learned_sinks, score_parameters];
        let mut gradients = gradients.map(MaybeFloat::into_option);
        for ((operand, _), parent) in saved.operands.into_iter().zip(ops.parents) {
            if let Some(node) = parent {
                let gradient = gradients[operand as usize].take().expect("a wanted gradient was computed");
                grads.register::<B>(node.id, gradient);
            }
        }
    }
}

fn flag(wanted: &mut Wanted, operand: Operand) -> &mut bool {
    match operand {
        Operand::Q => &mut wanted.q,
        Operand::K => &mut wanted.k,
        Operand::V => &mut wanted.v,
        Operand::Bias => &mut wanted.bias,
        Operand::AlibiSlopes => &mut wanted.alibi_slopes,
        Operand::LearnedSinks => &mut wanted.learned_sinks,
        Operand::ScoreParameters => &mut wanted.score_parameters,
    }
}

/// The tracked operands of a call, those that are present.
struct Tracked<B: AttentionBackend, C: CheckpointStrategy>(Vec<(Operand, FloatTensor<Autodiff<B, C>>)>);

impl<B: AttentionBackend, C: CheckpointStrategy> Tracked<B, C> {
    fn new(
        q: FloatTensor<Autodiff<B, C>>,
        k: FloatTensor<Autodiff<B, C>>,
        v: FloatTensor<Autodiff<B, C>>,
        extras: &Extras<Autodiff<B, C>>,
    ) -> Self {
        let optional = [
            (Operand::Bias, &extras.bias),
            (Operand::AlibiSlopes, &extras.alibi_slopes),
            (Operand::LearnedSinks, &extras.learned_sinks),
            (Operand::ScoreParameters, &extras.score_parameters),
        ];
        let mut operands = vec![(Operand::Q, q), (Operand::K, k), (Operand::V, v)];
        operands.extend(optional.into_iter().filter_map(|(operand, maybe)| match maybe {
            MaybeFloat::Absent => None,
            MaybeFloat::Present(tensor) => Some((operand, tensor.clone())),
        }));
        Tracked(operands)
    }

    fn any(&self) -> bool {
        self.0.iter().any(|(_, tensor)| tensor.is_tracked())
    }

    fn guards<const N: usize>(&self) -> [NodeGuard; N] {
        std::array::from_fn(|n| self.0[n].1.node())
    }

    /// Makes `output` a node whose parents are the operands.
    fn record<const N: usize>(
        &self,
        output: FloatTensor<B>,
        saved: impl FnOnce(Vec<(Operand, NodeId)>) -> Saved<B>,
    ) -> FloatTensor<Autodiff<B, C>> {
        let prep = Backward::<B, N>::prepare::<C>(AttentionBackward, self.guards::<N>());
        match prep.compute_bound().stateful() {
            OpsKind::UnTracked(prep) => prep.finish(output),
            OpsKind::Tracked(mut prep) => {
                let operands = self.0.iter().map(|(operand, tensor)| (*operand, prep.checkpoint(tensor))).collect();
                prep.finish(saved(operands), output)
            }
        }
    }

    fn record_any(
        &self,
        output: FloatTensor<B>,
        saved: impl FnOnce(Vec<(Operand, NodeId)>) -> Saved<B>,
    ) -> FloatTensor<Autodiff<B, C>> {
        match self.0.len() {
            3 => self.record::<3>(output, saved),
            4 => self.record::<4>(output, saved),
            5 => self.record::<5>(output, saved),
            6 => self.record::<6>(output, saved),
            7 => self.record::<7>(output, saved),
            n => unreachable!("attention has 3 to 7 float operands, not {n}"),
        }
    }
}

fn inner_extras<B: AttentionBackend, C: CheckpointStrategy>(extras: Extras<Autodiff<B, C>>) -> Extras<B> {
    let inner = |maybe: MaybeFloat<Autodiff<B, C>>| {
        MaybeFloat::from_option(maybe.into_option().map(|tensor| tensor.into_primitive()))
    };
    Extras {
        bias: inner(extras.bias),
        mask: MaybeBool::from_option(extras.mask.into_option()),
        alibi_slopes: inner(extras.alibi_slopes),
        learned_sinks: inner(extras.learned_sinks),
        score_parameters: inner(extras.score_parameters),
        key_lengths: MaybeInt::from_option(extras.key_lengths.into_option()),
    }
}

impl<B: AttentionBackend, C: CheckpointStrategy> AttentionBackend for Autodiff<B, C> {
    fn flashover_forward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        extras: Extras<Self>,
        plan: Plan,
    ) -> FloatTensor<Self> {
        let tracked = Tracked::<B, C>::new(q.clone(), k.clone(), v.clone(), &extras);
        let extras = inner_extras(extras);
        let (q, k, v) = (q.into_primitive(), k.into_primitive(), v.into_primitive());
        if !tracked.any() {
            let o = B::flashover_forward(q, k, v, extras, plan);
            return tracked.record_any(o, |_| unreachable!("nothing is tracked"));
        }
        let state = B::flashover_forward_state(q, k, v, extras.clone(), plan.clone(), true);
        let Extras { mask, key_lengths, .. } = extras;
        let o = state.o.clone();
        tracked.record_any(o, |operands| Saved { plan, output: Output::O, operands, mask, key_lengths, state })
    }

    fn flashover_forward_state(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        extras: Extras<Self>,
        plan: Plan,
        _for_backward: bool,
    ) -> ForwardState<Self> {
        let tracked = Tracked::<B, C>::new(q.clone(), k.clone(), v.clone(), &extras);
        let extras = inner_extras(extras);
        let (q, k, v) = (q.into_primitive(), k.into_primitive(), v.into_primitive());
        let state = B::flashover_forward_state(q, k, v, extras.clone(), plan.clone(), tracked.any());
        let Extras { mask, key_lengths, .. } = extras;
        let saved = |output| {
            let (plan, mask, key_lengths, state) = (plan.clone(), mask.clone(), key_lengths.clone(), state.clone());
            move |operands| Saved { plan, output, operands, mask, key_lengths, state }
        };
        ForwardState {
            o: tracked.record_any(state.o.clone(), saved(Output::O)),
            lse: tracked.record_any(state.lse.clone(), saved(Output::Lse)),
            rest: MaybeFloat::Absent,
        }
    }

    fn flashover_backward(
        _q: FloatTensor<Self>,
        _k: FloatTensor<Self>,
        _v: FloatTensor<Self>,
        _extras: Extras<Self>,
        _state: ForwardState<Self>,
        _do: FloatTensor<Self>,
        _dlse: MaybeFloat<Self>,
        _plan: Plan,
        _wanted: Wanted,
    ) -> InputGradients<Self> {
        // Burn's Autodiff hands its backward steps tensors of the inner backend, so only a caller who reaches past
        // `flashover::attention` can come here.
        panic!("flashover: the backward of attention has no derivative of its own (no second-order gradients)")
    }
}
