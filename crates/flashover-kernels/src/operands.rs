//! The tensors of a problem, in whatever form a backend holds them, and the gradients that are wanted of them.

/// Inputs of attention. `F` is a float tensor, `M` a boolean one, `I` an integer one.
#[derive(Debug, Clone)]
pub struct Operands<F, M = F, I = F> {
    /// Queries `[B, Hq, Sq, D]`.
    pub q: F,
    /// Keys `[B, Hkv, Skv, D]`.
    pub k: F,
    /// Values `[B, Hkv, Skv, Dv]`.
    pub v: F,
    /// Additive bias, broadcastable to `[B, Hq, Sq, Skv]`, of the element type of `q`.
    pub bias: Option<F>,
    /// Boolean mask, likewise broadcastable, in Burn's convention: `true` hides.
    pub mask: Option<M>,
    /// ALiBi slopes `[Hq]`: f32, or f64 in an f64 problem.
    pub alibi_slopes: Option<F>,
    /// Learned sink logits `[Hq]`: f32, or f64 in an f64 problem.
    pub learned_sinks: Option<F>,
    /// Parameters of the user's score function `[n]`, f32.
    pub score_parameters: Option<F>,
    /// Visible keys of each batch element `[B]`, i32: key `j` is hidden when `j ≥ length`.
    pub key_lengths: Option<I>,
}

/// Which gradients a backward computes. The others cost nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Wanted {
    /// Gradient of the queries.
    pub q: bool,
    /// Gradient of the keys.
    pub k: bool,
    /// Gradient of the values.
    pub v: bool,
    /// Gradient of the bias, in the bias's own (unbroadcast) shape.
    pub bias: bool,
    /// Gradient of the ALiBi slopes.
    pub alibi_slopes: bool,
    /// Gradient of the learned sinks.
    pub learned_sinks: bool,
    /// Gradient of the parameters of the user's score function.
    pub score_parameters: bool,
}

impl Wanted {
    /// Whether the gradients of queries, keys and values are all wanted.
    pub fn operands_together(&self) -> bool {
        self.q && self.k && self.v
    }

    /// Those of q, k and v.
    pub fn operands(self) -> Self {
        let Wanted { q, k, v, .. } = self;
        Wanted { q, k, v, ..Wanted::default() }
    }

    /// The others.
    pub fn parameters(self) -> Self {
        Wanted { q: false, k: false, v: false, ..self }
    }

    /// Whether nothing is wanted.
    pub fn is_empty(self) -> bool {
        self == Wanted::default()
    }
}

/// The gradients that were [`Wanted`], each in the shape and element type of its operand, contiguous.
#[derive(Debug, Clone)]
pub struct Gradients<F> {
    /// Gradient of the queries.
    pub q: Option<F>,
    /// Gradient of the keys.
    pub k: Option<F>,
    /// Gradient of the values.
    pub v: Option<F>,
    /// Gradient of the bias.
    pub bias: Option<F>,
    /// Gradient of the ALiBi slopes.
    pub alibi_slopes: Option<F>,
    /// Gradient of the learned sinks.
    pub learned_sinks: Option<F>,
    /// Gradient of the parameters of the user's score function.
    pub score_parameters: Option<F>,
}

impl<F> Default for Gradients<F> {
    fn default() -> Self {
        Gradients {
            q: None,
            k: None,
            v: None,
            bias: None,
            alibi_slopes: None,
            learned_sinks: None,
            score_parameters: None,
        }
    }
}
