//! [`Attention`]: what the modules do between their projections, and its configuration.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use burn::config::Config;
use burn::module::{Module, Param};
use burn::nn::{Dropout, DropoutConfig, Initializer};
use burn::tensor::{Bool, DType, Device, Distribution, Int, Tensor, TensorData};
use flashover_kernels::mask::Mask;
use flashover_kernels::problem::MAX_HEAD_DIM;

use super::plans::{Plans, hidden_rows};
use super::{RotaryEmbedding, RotaryEmbeddingConfig};
use crate::{AttentionError, AttentionOptions};

/// What shapes a module's attention besides its projections; the same options as [`AttentionOptions`], and rotary
/// embedding. The default is plain attention.
///
/// ```
/// use flashover::nn::{AttentionConfig, MultiHeadAttentionConfig, RotaryEmbeddingConfig};
///
/// let attention = AttentionConfig::new()
///     .with_sliding_window(Some(1024))
///     .with_visible_sinks(4)
///     .with_rotary(Some(RotaryEmbeddingConfig::new(8192)));
/// let config = MultiHeadAttentionConfig::new(512, 8).with_n_heads_kv(Some(2)).with_attention(attention);
/// ```
#[derive(Config, Debug)]
pub struct AttentionConfig {
    /// Hides the keys after each query (aligned to the bottom right).
    #[config(default = false)]
    pub causal: bool,
    /// Neighbours that a query sees to the left and to the right, its own key not counted.
    pub window: Option<(usize, usize)>,
    /// Causal order and a window of this many keys, the query's own included.
    pub sliding_window: Option<usize>,
    /// First keys that stay visible outside the window.
    #[config(default = 0)]
    pub visible_sinks: usize,
    /// A mask whose block plan is walked. It is bound to the lengths of each call, and the plan is made when lengths are first
    /// met, and kept. What the other settings hide stays hidden.
    ///
    /// With a cache the mask is bound to all positions so far, as in a call that computes all of them; the new rows are then
    /// hidden by a dense mask of `new · Skv` points. Nothing of a mask is a parameter, and records do not hold it.
    pub mask: Option<Mask>,
    /// Queries and keys of a tile of the mask's plans.
    #[config(default = "[128, 128]")]
    pub mask_tile: [usize; 2],
    /// Caps scores to `(−cap, cap)` by `cap · tanh(s / cap)`.
    pub softcap: Option<f64>,
    /// Factor of `q·k`; `1/√d_k` unless given.
    pub scale: Option<f64>,
    /// Subtracts `slope · |i − j|` from the scores, with the slopes of the ALiBi paper (arXiv 2108.12409).
    #[config(default = false)]
    pub alibi: bool,
    /// A trained logit per query head in the softmax's denominator. It starts at zero, which is quiet softmax.
    #[config(default = false)]
    pub learned_sinks: bool,
    /// Rotary embedding of queries and keys.
    pub rotary: Option<RotaryEmbeddingConfig>,
}

impl AttentionConfig {
    /// The module for `n_heads` query heads of dimension `d_k`.
    ///
    /// # Panics
    ///
    /// If two settings exclude each other or a value is out of range.
    pub(super) fn init(&self, heads: usize, d_k: usize, dropout: f64, quiet: bool, device: &Device) -> Attention {
        assert_head_dim(d_k);
        assert!(
            self.window.is_none() || self.sliding_window.is_none(),
            "attention: expected window or sliding_window, got both"
        );
        assert!(self.sliding_window != Some(0), "attention: expected a sliding_window of at least 1 key, got 0");
        assert!(
            !(quiet && self.learned_sinks),
            "attention: expected quiet_softmax (a sink fixed at zero) or learned_sinks (trained from zero), got both"
        );
        let slopes = || {
            let slopes: Vec<f32> = alibi_slopes(heads).into_iter().map(|slope| slope as f32).collect();
            Tensor::from_data(TensorData::new(slopes, [heads]), (device, DType::F32))
        };
        Attention {
            learned_sinks: self.learned_sinks.then(|| Initializer::Zeros.init([heads], device)),
            alibi_slopes: self.alibi.then(slopes),
            rotary: self.rotary.as_ref().map(|rotary| rotary.init(d_k, device)),
            dropout: DropoutConfig::new(dropout).init(),
            quiet_softmax: quiet,
            config: self.clone(),
            seeds: DropoutSeeds::default(),
            plans: Plans::default(),
        }
    }
}

/// Panics unless a head dimension is one that attention takes.
pub(super) fn assert_head_dim(dim: usize) {
    assert!(
        (1..=MAX_HEAD_DIM).contains(&dim),
        "attention: expected a head dimension of 1 to {MAX_HEAD_DIM}, got {dim}"
    );
}

/// Operands of [`Attention`], rotated already.
pub(super) struct Heads {
    /// Queries `[B, Hq, Sq, Dk]`.
    pub q: Tensor<4>,
    /// Keys `[B, Hkv, Skv, Dk]`.
    pub k: Tensor<4>,
    /// Values `[B, Hkv, Skv, Dv]`.
    pub v: Tensor<4>,
    /// Broadcasts to `[B, Hq, Sq, Skv]`, `true` hides.
    pub mask: Option<Tensor<4, Bool>>,
    /// Queries before these, whose outputs a cache holds.
    pub before: usize,
}

/// Attention without projections: the options of [`AttentionConfig`] with their parameters and tables, and dropout.
///
/// Made by the modules that hold it.
#[derive(Module, Debug)]
pub struct Attention {
    /// The trained logits `[heads]`, if configured.
    pub learned_sinks: Option<Param<Tensor<1>>>,
    /// The slopes of ALiBi `[heads]`, if configured. Not trained, not in records.
    pub alibi_slopes: Option<Tensor<1>>,
    /// Rotary embedding, if configured. May be replaced, by one with scaled frequencies for instance.
    pub rotary: Option<RotaryEmbedding>,
    /// Dropout of the probabilities.
    pub dropout: Dropout,
    /// Adds 1 to the softmax's denominator.
    pub quiet_softmax: bool,
    #[module(skip)]
    config: AttentionConfig,
    #[module(skip)]
    seeds: DropoutSeeds,
    #[module(skip)]
    plans: Plans,
}

impl Attention {
    /// Whether queries never see later keys.
    pub fn is_causal(&self) -> bool {
        self.config.causal || self.config.sliding_window.is_some()
    }

    /// Keys `[B, Hkv, S, D]` that stand at `start`, rotated if so configured.
    pub(super) fn keys(&self, k: Tensor<4>, start: usize) -> Tensor<4> {
        match &self.rotary {
            Some(rotary) => rotary.apply(k, start),
            None => k,
        }
    }

    /// Queries `[B, Hq, Sq, D]`, rotated if so configured. They are the last of `keys` positions, as for causal order.
    pub(super) fn queries(&self, q: Tensor<4>, keys: usize) -> Tensor<4> {
        let Some(rotary) = &self.rotary else { return q };
        let queries = q.dims()[2];
        assert!(
            queries <= keys,
            "rotary embedding: expected at most as many queries as keys ({keys}), since the last query stands at the \
             last key, got {queries}"
        );
        rotary.apply(q, keys - queries)
    }

    /// Attention of heads, `[B, Hq, Sq, Dv]`.
    pub(super) fn forward(&self, heads: Heads) -> Tensor<4> {
        let options = self.options(&heads);
        let Heads { q, k, v, .. } = heads;
        attend(q, k, v, &options)
    }

    /// [`forward`](Self::forward) and the probabilities `[B, Hq, Sq, Skv]`, dropout included.
    ///
    /// A row of the probabilities is the output for values that are unit vectors, so the same kernel gives them, one
    /// block of keys after the other.
    pub(super) fn forward_with_weights(&self, heads: Heads) -> (Tensor<4>, Tensor<4>) {
        let options = self.options(&heads);
        let Heads { q, k, v, .. } = heads;
        let ([batch, heads_q, queries, _], [_, heads_kv, keys, _]) = (q.dims(), k.dims());
        let device = q.device();
        let block = |j0: usize| {
            let j1 = (j0 + MAX_HEAD_DIM).min(keys);
            let rows = Tensor::<1, Int>::arange(0..keys as i64, &device).reshape([1, 1, keys, 1]);
            let columns = Tensor::<1, Int>::arange(j0 as i64..j1 as i64, &device).reshape([1, 1, 1, j1 - j0]);
            let units = rows.equal(columns).float().cast(q.dtype());
            attend(q.clone(), k.clone(), units.expand([batch, heads_kv, keys, j1 - j0]), &options)
        };
        let weights = match batch * queries * keys {
            0 => Tensor::zeros([batch, heads_q, queries, keys], (&device, q.dtype())),
            _ => Tensor::cat((0..keys).step_by(MAX_HEAD_DIM).map(block).collect(), 3),
        };
        (attend(q, k, v, &options), weights)
    }

    /// The options with the configured mask, and with that of the call.
    fn masked(&self, options: AttentionOptions, heads: &Heads) -> Result<AttentionOptions, AttentionError> {
        let Heads { q, k, mask, before, .. } = heads;
        let with = |options: AttentionOptions, mask: Option<Tensor<4, Bool>>| match mask {
            Some(mask) => options.mask(mask),
            None => options,
        };
        let ([batch, heads, queries, _], keys) = (q.dims(), k.dims()[2]);
        let Some(configured) = self.config.mask.as_ref().filter(|_| batch * queries * keys > 0) else {
            return Ok(with(options, mask.clone()));
        };
        let shape = [batch, heads, before + queries, keys];
        if *before == 0 {
            let plan = self.plans.get(configured, self.config.mask_tile, shape)?;
            return Ok(with(options, mask.clone()).plan(&plan));
        }
        let hidden = hidden_rows(configured, shape, *before, &q.device())?;
        Ok(options.mask(match mask {
            Some(mask) => {
                let both = |x: [usize; 4], y: [usize; 4]| std::array::from_fn(|axis| x[axis].max(y[axis]));
                let shape: [usize; 4] = both(hidden.dims(), mask.dims());
                hidden.expand(shape).bool_or(mask.clone().expand(shape))
            }
            None => hidden,
        }))
    }

    fn options(&self, heads: &Heads) -> AttentionOptions {
        let (config, device) = (&self.config, heads.q.device());
        let mut options = AttentionOptions::new().visible_sinks(config.visible_sinks);
        if config.causal {
            options = options.causal();
        }
        if let Some((left, right)) = config.window {
            options = options.window(left, right);
        }
        if let Some(keys) = config.sliding_window {
            options = options.sliding_window(keys);
        }
        if let Some(cap) = config.softcap {
            options = options.softcap(cap);
        }
        if let Some(scale) = config.scale {
            options = options.scale(scale);
        }
        if let Some(slopes) = &self.alibi_slopes {
            options = options.alibi_slopes(slopes.clone());
        }
        if let Some(sinks) = &self.learned_sinks {
            options = options.learned_sinks(sinks.val());
        }
        if self.quiet_softmax {
            options = options.learned_sinks(Tensor::zeros([heads.q.dims()[1]], &device));
        }
        options = self.masked(options, heads).unwrap_or_else(|error| panic!("attention: {error}"));
        let training = self.dropout.training.is_enabled() && device.is_autodiff();
        if training && self.dropout.prob > 0.0 {
            options = options.dropout(self.dropout.prob, self.seeds.next(&device));
        }
        options
    }
}

/// [`attention`](crate::attention), with a panic where it has an error.
fn attend(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, options: &AttentionOptions) -> Tensor<4> {
    crate::attention(q, k, v, options).unwrap_or_else(|error| panic!("attention: {error}"))
}

/// Seeds of the forward calls: a counter that starts where the device's randomness says.
#[derive(Debug, Clone, Default)]
struct DropoutSeeds(Arc<OnceLock<AtomicU64>>);

impl DropoutSeeds {
    fn next(&self, device: &Device) -> u64 {
        self.0.get_or_init(|| AtomicU64::new(random_seed(device))).fetch_add(1, Ordering::Relaxed)
    }
}

/// 64 random bits from the device: three words of 24, which every float and int type of a generator holds exactly.
fn random_seed(device: &Device) -> u64 {
    let distribution = Distribution::Uniform(0.0, f64::from(1 << 24));
    let words = Tensor::<1, Int>::random([3], distribution, device).into_data();
    words.iter::<i64>().fold(0, |seed, word| seed << 24 | word as u64)
}

/// The slopes of Press et al.: a geometric sequence from `2^(−8/n)` for `n` a power of two; for other `n`, those of the
/// power of two below, then every second one of the power of two above.
fn alibi_slopes(heads: usize) -> Vec<f64> {
    let power = if heads.is_power_of_two() { heads } else { heads.next_power_of_two() / 2 };
    let below = (1..=power).map(|h| h as f64 / power as f64);
    let between = (0..heads - power).map(|h| (2 * h + 1) as f64 / (2 * power) as f64);
    below.chain(between).map(|exponent| (-8.0 * exponent).exp2()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alibi_slopes_are_those_of_the_paper() {
        assert_eq!(alibi_slopes(8), (1..=8).map(|h| 0.5f64.powi(h)).collect::<Vec<_>>());
        // Of the authors' code: get_slopes_power_of_2(4) + get_slopes(8)[0::2][:2].
        assert_eq!(alibi_slopes(6), [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]);
    }
}
