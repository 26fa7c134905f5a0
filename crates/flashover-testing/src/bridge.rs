//! A case as Burn sees it: its inputs as tensors, attention through the public entry, results back as plain f64.

use burn::tensor::{Bool, Device, Int, Tensor, TensorData};
use flashover::kernels::operands::{Gradients, Operands};
use flashover::kernels::problem::{Element, Problem};
use flashover::kernels::score::ScoreCode;
use flashover::{AttentionError, AttentionOptions};

use crate::data::{Inputs, Rng};
pub use crate::head::sum;
use crate::layout::Layout;
use crate::score::{Buckets, Waves};

/// A case's inputs on a device.
pub struct Tensors {
    /// Queries.
    pub q: Tensor<4>,
    /// Keys.
    pub k: Tensor<4>,
    /// Values.
    pub v: Tensor<4>,
    /// Bias.
    pub bias: Option<Tensor<4>>,
    /// Mask, `true` hides.
    pub mask: Option<Tensor<4, Bool>>,
    /// ALiBi slopes.
    pub alibi_slopes: Option<Tensor<1>>,
    /// Learned sinks.
    pub learned_sinks: Option<Tensor<1>>,
    /// Parameters of the user's score function.
    pub score_parameters: Option<Tensor<1>>,
    /// Key lengths.
    pub key_lengths: Option<Tensor<1, Int>>,
    /// Gradient of the output.
    pub do_: Tensor<4>,
    /// Gradient of the log-sum-exp.
    pub dlse: Tensor<3>,
}

/// What attention gave, in f64.
#[derive(Debug)]
pub struct Results {
    /// Output.
    pub o: Vec<f64>,
    /// Log-sum-exp.
    pub lse: Vec<f64>,
    /// Gradients of `<o, do> + <lse, dlse>`, if the device is an autodiff one.
    pub gradients: Gradients<Vec<f64>>,
}

/// Normal numbers of this deviation, the same for a seed. Not a device's own: its generator is one for all tests of a process, and
/// others draw from it meanwhile.
pub fn normal<const D: usize>(seed: u64, deviation: f64, shape: [usize; D], device: &Device) -> Tensor<D> {
    let mut rng = Rng::new(seed);
    let data: Vec<f32> = (0..shape.iter().product()).map(|_| (deviation * rng.normal()) as f32).collect();
    Tensor::from_data(TensorData::new(data, shape), device)
}

/// The tensor of that content that lies so.
fn laid_out(layout: Layout, data: &[f64], shape: [usize; 4], element: Element, device: &Device) -> Tensor<4> {
    if data.is_empty() || layout == Layout::default() {
        return floats(data, shape, element, device);
    }
    let (stored, outer) = layout.stored(data, shape);
    let stored = floats(&stored, outer, element, device);
    let row = layout.before..layout.before + shape[3];
    let rows = stored.slice([0..outer[0], 0..outer[1], 0..outer[2], row]);
    if layout.heads_inner { rows.swap_dims(1, 2) } else { rows }
}

impl Tensors {
    /// Puts the inputs on `device`. Floats that can have a gradient are tracked if the device is an autodiff one.
    pub fn new(problem: &Problem, inputs: &Inputs, device: &Device) -> Self {
        Self::laid_out(problem, inputs, [Layout::default(); 3], device)
    }

    /// [`new`](Self::new) with q, k and v that lie as told.
    pub fn laid_out(problem: &Problem, inputs: &Inputs, layouts: [Layout; 3], device: &Device) -> Self {
        let p = problem;
        let Operands { q, k, v, bias, mask, alibi_slopes, learned_sinks, score_parameters, key_lengths } =
            &inputs.operands;
        let tracked4 = |data: &[f64], shape: [usize; 4]| track(floats(data, shape, p.element, device));
        let statistic = if p.element == Element::F64 { Element::F64 } else { Element::F32 };
        let tracked1 =
            |data: &Option<Vec<f64>>| data.as_ref().map(|x| track(floats(x, [p.heads_q], statistic, device)));
        let [q_lies, k_lies, v_lies] = layouts;
        let laid_out = |data: &[f64], layout: Layout, heads, seq, dim| {
            track(self::laid_out(layout, data, [p.batch, heads, seq, dim], p.element, device))
        };
        Tensors {
            q: laid_out(q, q_lies, p.heads_q, p.seq_q, p.head_dim),
            k: laid_out(k, k_lies, p.heads_kv, p.seq_kv, p.head_dim),
            v: laid_out(v, v_lies, p.heads_kv, p.seq_kv, p.value_dim),
            bias: bias.as_ref().map(|x| tracked4(x, p.bias.expect("the problem has a bias"))),
            mask: mask.as_ref().map(|x| {
                let shape = p.mask.expect("the problem has a mask");
                Tensor::from_data(TensorData::new(x.clone(), shape), device)
            }),
            alibi_slopes: tracked1(alibi_slopes),
            learned_sinks: tracked1(learned_sinks),
            score_parameters: score_parameters.as_ref().map(|x| track(floats(x, [x.len()], statistic, device))),
            key_lengths: key_lengths.as_ref().map(|x| Tensor::from_data(TensorData::new(x.clone(), [p.batch]), device)),
            do_: floats(&inputs.do_, p.output_shape(), p.element, device),
            dlse: floats(&inputs.dlse, p.lse_shape(), Element::F32, device),
        }
    }

    /// The options that make `problem` of these tensors.
    pub fn options(&self, problem: &Problem) -> AttentionOptions {
        let p = problem;
        let mut options = AttentionOptions::new().scale(p.scale);
        if p.band.causal {
            options = options.causal();
        }
        options = options.window(p.band.left as usize, p.band.right as usize).visible_sinks(p.band.sinks as usize);
        if let Some(cap) = p.softcap {
            options = options.softcap(cap);
        }
        if let Some(bias) = &self.bias {
            options = options.bias(bias.clone());
        }
        if let Some(mask) = &self.mask {
            options = options.mask(mask.clone());
        }
        if let Some(slopes) = &self.alibi_slopes {
            options = options.alibi_slopes(slopes.clone());
        }
        if let Some(sinks) = &self.learned_sinks {
            options = options.learned_sinks(sinks.clone());
        }
        if let (Some(parameters), Some(score)) = (self.score_parameters.clone(), p.score) {
            options = match score.code {
                code if code == ScoreCode::of::<Buckets>() => options.score_function(Buckets, parameters),
                code if code == ScoreCode::of::<Waves>() => options.score_function(Waves, parameters),
                code => panic!("a function of the tests, not {code:?}"),
            };
        }
        if let Some(lengths) = &self.key_lengths {
            options = options.key_lengths(lengths.clone());
        }
        if let Some(dropout) = p.dropout {
            options = options.dropout(dropout.probability, dropout.seed);
        }
        options.deterministic(!p.unordered)
    }
}

impl Tensors {
    fn gradients(&self, loss: &Tensor<1>) -> Gradients<Vec<f64>> {
        let mut store = loss.backward();
        let mut take = |x: &Tensor<4>| x.grad_remove(&mut store).map(vec);
        let (q, k, v) = (take(&self.q), take(&self.k), take(&self.v));
        let bias = self.bias.as_ref().and_then(take);
        let mut take = |x: &Tensor<1>| x.grad_remove(&mut store).map(vec);
        let alibi_slopes = self.alibi_slopes.as_ref().and_then(&mut take);
        let learned_sinks = self.learned_sinks.as_ref().and_then(&mut take);
        let score_parameters = self.score_parameters.as_ref().and_then(take);
        Gradients { q, k, v, bias, alibi_slopes, learned_sinks, score_parameters }
    }
}

/// Runs the case: output and log-sum-exp, and on an autodiff device the gradients; through the log-sum-exp as well if
/// `lse_gradient`.
pub fn run(problem: &Problem, inputs: &Inputs, lse_gradient: bool, device: &Device) -> Result<Results, AttentionError> {
    run_with(problem, inputs, lse_gradient, device, |options| options)
}

/// [`run`] with options that a problem does not tell: a block plan.
pub fn run_with(
    problem: &Problem,
    inputs: &Inputs,
    lse_gradient: bool,
    device: &Device,
    more: impl FnOnce(AttentionOptions) -> AttentionOptions,
) -> Result<Results, AttentionError> {
    run_on(problem, &Tensors::new(problem, inputs, device), lse_gradient, more)
}

/// [`run_with`] of tensors that are there already.
pub fn run_on(
    problem: &Problem,
    t: &Tensors,
    lse_gradient: bool,
    more: impl FnOnce(AttentionOptions) -> AttentionOptions,
) -> Result<Results, AttentionError> {
    let device = &t.q.device();
    let options = more(t.options(problem));
    let (o, lse) = flashover::attention_with_lse(t.q.clone(), t.k.clone(), t.v.clone(), &options)?;
    let mut gradients = Gradients::default();
    if device.is_autodiff() {
        // The two outputs are two nodes, whose gradients Burn would add in the element type; here they are added in f64,
        // so that what is judged is attention's.
        let loss = (o.clone() * t.do_.clone()).cast(burn::tensor::DType::F32).sum();
        gradients = t.gradients(&loss);
        if lse_gradient {
            // 0 · −∞ is not 0: rows that see nothing are left out of the loss.
            let seen = lse.clone().greater_elem(f32::NEG_INFINITY);
            let zeros = Tensor::zeros(lse.shape(), device);
            let loss = zeros.mask_where(seen, lse.clone() * t.dlse.clone()).sum();
            gradients = sum(gradients, t.gradients(&loss));
        }
    }
    Ok(Results { o: vec(o), lse: vec(lse), gradients })
}

/// A tensor's elements in row-major order as f64.
pub fn vec<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    tensor.into_data().iter::<f64>().collect()
}

/// A float tensor of an element type.
pub fn floats<const D: usize>(data: &[f64], shape: [usize; D], element: Element, device: &Device) -> Tensor<D> {
    let dtype = match element {
        Element::F64 => burn::tensor::DType::F64,
        Element::F32 => burn::tensor::DType::F32,
        Element::F16 => burn::tensor::DType::F16,
        Element::BF16 => burn::tensor::DType::BF16,
    };
    Tensor::from_data(TensorData::new(data.to_vec(), shape).convert_dtype(dtype), (device, dtype))
}

fn track<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    if tensor.device().is_autodiff() { tensor.require_grad() } else { tensor }
}
