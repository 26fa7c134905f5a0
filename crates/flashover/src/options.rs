//! [`AttentionOptions`]: everything that shapes attention beyond its three operands.

use burn::tensor::{Bool, Int, Tensor};
use flashover_kernels::dropout::Dropout;
use flashover_kernels::mask::{Band, Mask, MaskError, UNBOUNDED};
use flashover_kernels::problem::{Precision, ProblemError};
use flashover_kernels::score::{ScoreCode, ScoreFunction};
use flashover_kernels::select::KernelChoice;

use crate::SparsePlan;

/// Options of [`attention`](crate::attention). The default is plain attention at scale `1/√D`.
///
/// A score passes, in this order: `q·k · scale` → [`softcap`](Self::softcap) →
/// `+` [`alibi`](Self::alibi_slopes) `+` [`bias`](Self::bias) → [`score_function`](Self::score_function) → masks → softmax.
///
/// ```
/// use flashover::AttentionOptions;
///
/// let options = AttentionOptions::new().causal().sliding_window(1024).visible_sinks(4);
/// ```
#[derive(Debug, Clone, Default)]
pub struct AttentionOptions {
    pub(crate) scale: Option<f64>,
    pub(crate) softcap: Option<f64>,
    pub(crate) band: Band,
    pub(crate) empty_window: bool,
    pub(crate) mask: Option<Tensor<4, Bool>>,
    pub(crate) bias: Option<Tensor<4>>,
    pub(crate) alibi_slopes: Option<Tensor<1>>,
    pub(crate) learned_sinks: Option<Tensor<1>>,
    pub(crate) key_lengths: Option<Tensor<1, Int>>,
    pub(crate) dropout: Option<Dropout>,
    pub(crate) score_function: Option<(ScoreCode, Tensor<1>)>,
    pub(crate) plan: Option<SparsePlan>,
    pub(crate) another_mask: Option<MaskError>,
    pub(crate) precision: Precision,
    pub(crate) kernel: KernelChoice,
    pub(crate) unordered: bool,
}

impl AttentionOptions {
    /// Plain attention.
    pub fn new() -> Self {
        Self::default()
    }

    /// Factor of `q·k`; `1/√D` unless given. Must be finite.
    pub fn scale(mut self, scale: f64) -> Self {
        self.scale = Some(scale);
        self
    }

    /// Caps scores to `(−cap, cap)` by `cap · tanh(s / cap)` (Gemma 2). Must be positive.
    pub fn softcap(mut self, cap: f64) -> Self {
        self.softcap = Some(cap);
        self
    }

    /// Hides the keys after each query. Aligned to the bottom right: the last query sees the last key.
    pub fn causal(mut self) -> Self {
        self.band.causal = true;
        self
    }

    /// Query `i` sees keys `i − left … i + right` (after bottom-right alignment): `left` and `right` count neighbours,
    /// not the query's own key.
    pub fn window(mut self, left: usize, right: usize) -> Self {
        self.band.left = neighbours(left);
        self.band.right = neighbours(right);
        self.empty_window = false;
        self
    }

    /// Causal order and a window of `keys` keys, the query's own included (Mistral's convention). Must not be 0.
    pub fn sliding_window(mut self, keys: usize) -> Self {
        self = self.causal().window(keys.saturating_sub(1), 0);
        self.empty_window = keys == 0;
        self
    }

    /// The first `keys` keys stay visible outside the window (StreamingLLM). They bypass the window and nothing else.
    pub fn visible_sinks(mut self, keys: usize) -> Self {
        self.band.sinks = neighbours(keys);
        self
    }

    /// Boolean mask in Burn's convention, `true` hides; each dimension that of `[B, Hq, Sq, Skv]` or 1.
    pub fn mask(mut self, mask: Tensor<4, Bool>) -> Self {
        self.mask = Some(mask);
        self
    }

    /// Added to the scores; each dimension that of `[B, Hq, Sq, Skv]` or 1, dtype that of `q`. Its gradient is reduced
    /// over the broadcast dimensions.
    pub fn bias(mut self, bias: Tensor<4>) -> Self {
        self.bias = Some(bias);
        self
    }

    /// ALiBi: subtracts `slope · |i − j|` (after bottom-right alignment), a slope per query head, `[Hq]`.
    pub fn alibi_slopes(mut self, slopes: Tensor<1>) -> Self {
        self.alibi_slopes = Some(slopes);
        self
    }

    /// A learned logit per query head, `[Hq]`, that stands in the softmax's denominator and has no value.
    pub fn learned_sinks(mut self, logits: Tensor<1>) -> Self {
        self.learned_sinks = Some(logits);
        self
    }

    /// Keys of each batch element, `[B]`: key `j` is hidden from the whole element when `j ≥ length`. The causal
    /// alignment stays that of the full `Skv`.
    pub fn key_lengths(mut self, lengths: Tensor<1, Int>) -> Self {
        self.key_lengths = Some(lengths);
        self
    }

    /// Drops probabilities with `probability` (in `[0, 1)`), as a pure function of `seed` and the score's place: the
    /// same on every backend, forward and backward.
    pub fn dropout(mut self, probability: f64, seed: u64) -> Self {
        self.dropout = Some(Dropout { probability, seed });
        self
    }

    /// A score function of the caller's own, the last before the masks, and its parameters: f32, of any shape, counted in
    /// row-major order. Their gradient has that shape.
    ///
    /// The type says everything: a value without fields is only there to name it. Wherever position lets a key be seen, the
    /// function must read a parameter that exists; see
    /// [`ScoreUse::check_parameters`](flashover_kernels::score::ScoreUse::check_parameters) for how far that is checked beforehand. A
    /// score of −∞ is as good as hidden. For f32, f16 and bf16: a function is f32 code. There can be one; a later call replaces
    /// it.
    ///
    /// ```
    /// use burn::tensor::{Device, Distribution, Tensor};
    /// use flashover::kernels::cubecl;
    /// use flashover::kernels::cubecl::prelude::*;
    /// use flashover::kernels::score::{Position, ScoreFunction};
    /// use flashover::{AttentionOptions, attention};
    ///
    /// /// A factor for each of 4 heads: a temperature.
    /// struct Temperature;
    ///
    /// #[cube]
    /// impl ScoreFunction for Temperature {
    ///     fn parameter(at: Position) -> u32 {
    ///         at.head
    ///     }
    ///
    ///     fn value(s: f32, _at: Position, parameter: f32) -> f32 {
    ///         s * parameter
    ///     }
    ///
    ///     fn derivative(_s: f32, _at: Position, parameter: f32) -> f32 {
    ///         parameter
    ///     }
    ///
    ///     fn parameter_derivative(s: f32, _at: Position, _parameter: f32) -> f32 {
    ///         s
    ///     }
    /// }
    ///
    /// let device = Device::flex().autodiff();
    /// let q = Tensor::<4>::random([1, 4, 50, 8], Distribution::Default, &device);
    /// let factors = Tensor::<1>::ones([4], &device).require_grad();
    /// let options = AttentionOptions::new().score_function(Temperature, factors.clone());
    /// let o = attention(q.clone(), q.clone(), q, &options)?;
    /// assert!(factors.grad(&o.sum().backward()).is_some());
    /// # Ok::<(), flashover::AttentionError>(())
    /// ```
    pub fn score_function<F: ScoreFunction, const D: usize>(mut self, _: F, parameters: Tensor<D>) -> Self {
        const { assert!(size_of::<F>() == 0, "a score function is a type without fields: its parameters are a tensor") };
        let parameters = match parameters.shape().num_elements() {
            // Burn's reshape reads a zero as "the size that was there".
            0 => Tensor::zeros([0], (&parameters.device(), parameters.dtype())),
            // No node of autodiff's, so that a leaf stays one.
            _ if D == 1 => Tensor::from_dispatch(parameters.into_dispatch()),
            n => parameters.reshape([n]),
        };
        self.score_function = Some((ScoreCode::of::<F>(), parameters));
        self
    }

    /// Visits only the tiles that a block plan lists, forward and backward, and hides what it does not show. Everything else
    /// still applies: a key is visible if the plan shows it and no other option hides it.
    ///
    /// The plan must have been made for the lengths of the call, and for its batch and query heads or for 1 of them.
    pub fn plan(mut self, plan: &SparsePlan) -> Self {
        self.plan = Some(plan.clone());
        self.another_mask = None;
        self
    }

    /// [`plan`](Self::plan), and the call is refused if the plan was made from another mask: for plans that were kept apart
    /// from their masks.
    pub fn plan_of(mut self, plan: &SparsePlan, mask: &Mask) -> Self {
        self = self.plan(plan);
        self.another_mask = plan.block_plan().check_mask(mask).err();
        self
    }

    /// How elements of f32 are multiplied; [`Precision::Exact`] unless given, and nothing else is taken for tensors of another
    /// type. With [`Precision::Tf32x3`] tensor cores take f32 as well, three products of tf32 for each, with errors close to f32's. It is a
    /// permission: the CPU, the portable kernels and a composition of the backend's operations multiply as they always do, and
    /// [`explain`](crate::explain()) says what runs. The gradients of bias, slopes, sinks and a score function's parameters are taken
    /// exactly everywhere.
    ///
    /// ```
    /// use burn::tensor::{DType, Device, Tensor};
    /// use flashover::{AttentionOptions, Precision, attention};
    ///
    /// let device = Device::flex();
    /// let options = AttentionOptions::new().precision(Precision::Tf32x3);
    /// let q = Tensor::<4>::zeros([1, 2, 64, 64], &device);
    /// attention(q.clone(), q.clone(), q, &options)?;
    ///
    /// let q = Tensor::<4>::zeros([1, 2, 64, 64], (&device, DType::F16));
    /// let error = attention(q.clone(), q.clone(), q, &options).unwrap_err();
    /// assert_eq!(error.to_string(), "precision Tf32x3: expected elements of type F32, got F16");
    /// # Ok::<(), flashover::AttentionError>(())
    /// ```
    pub fn precision(mut self, precision: Precision) -> Self {
        self.precision = precision;
        self
    }

    /// Asks for a kernel by name; [`KernelChoice::Auto`] unless given. The call is refused where that kernel cannot run: it
    /// never falls back to another. Names are those of the CubeCL kernels; on the CPU and where attention is composed of the
    /// backend's operations there is nothing to choose, and every name is refused.
    ///
    /// ```
    /// use burn::tensor::{Device, Tensor};
    /// use flashover::kernels::select::KernelChoice;
    /// use flashover::{AttentionOptions, attention};
    ///
    /// let q = Tensor::<4>::zeros([1, 2, 64, 64], &Device::flex());
    /// let options = AttentionOptions::new().kernel(KernelChoice::Mma);
    /// let error = attention(q.clone(), q.clone(), q, &options).unwrap_err();
    /// assert!(error.to_string().contains("Mma"), "{error}");
    /// ```
    pub fn kernel(mut self, choice: KernelChoice) -> Self {
        self.kernel = choice;
        self
    }

    /// Whether gradients have the same bits in every run; `true` unless given. `false` lets the gradient of `q` differ in its last bits
    /// from run to run, where that is faster: the backward of [`KernelChoice::Hopper`] then adds up its parts in any order, which took
    /// 1.2 to 1.4 times less under block plans and 1.3 times less above head dimension 128. All others always add in order.
    ///
    /// ```
    /// let fastest = flashover::AttentionOptions::new().causal().deterministic(false);
    /// ```
    pub fn deterministic(mut self, deterministic: bool) -> Self {
        self.unordered = !deterministic;
        self
    }

    /// The plan, or the error of one for another mask.
    pub(crate) fn checked_plan(&self) -> Result<Option<&SparsePlan>, MaskError> {
        self.another_mask.clone().map_or(Ok(self.plan.as_ref()), Err)
    }

    /// The band, or the error of a sliding window of no keys.
    pub(crate) fn checked_band(&self) -> Result<Band, ProblemError> {
        if self.empty_window { Err(ProblemError::EmptyWindow) } else { Ok(self.band) }
    }
}

/// Any count beyond what positions reach is the same as no bound.
fn neighbours(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(UNBOUNDED).min(UNBOUNDED)
}
