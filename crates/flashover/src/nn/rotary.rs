//! [`RotaryEmbedding`]: positions as rotations of pairs of features (RoFormer, arXiv 2104.09864), in both layouts.

use burn::config::Config;
use burn::module::Module;
use burn::tensor::{DType, Device, Tensor, TensorData, assert_shape};

/// Which two features form pair `i` of `d/2`. Weights trained with one do not fit the other.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum RotaryConvention {
    /// `(2i, 2i + 1)`: the paper, Burn's `RotaryEncoding`, Meta's Llama.
    Interleaved,
    /// `(i, i + d/2)`: Hugging Face, GPT-NeoX.
    HalfRotated,
}

/// Configuration of a [`RotaryEmbedding`].
#[derive(Config, Debug)]
pub struct RotaryEmbeddingConfig {
    /// Positions that the tables hold, `0 .. max_positions`.
    pub max_positions: usize,
    /// Base of the frequencies: pair `i` turns by `theta^(−2i/d)` a position.
    #[config(default = 10000.0)]
    pub theta: f64,
    /// Which features form a pair.
    #[config(default = "RotaryConvention::Interleaved")]
    pub convention: RotaryConvention,
}

impl RotaryEmbeddingConfig {
    /// The embedding of heads of `d_head` features.
    ///
    /// # Panics
    ///
    /// If `d_head` is odd or zero, or `theta` is not positive.
    pub fn init(&self, d_head: usize, device: &Device) -> RotaryEmbedding {
        self.init_with_frequency_scaling(d_head, |_, frequency| frequency, device)
    }

    /// [`init`](Self::init) with `scaling(i, frequency)` as the frequency of pair `i`, in radians a position: linear
    /// interpolation, Llama 3's scaling by parts, YaRN and the like.
    ///
    /// # Panics
    ///
    /// As [`init`](Self::init).
    pub fn init_with_frequency_scaling(
        &self,
        d_head: usize,
        scaling: impl Fn(usize, f64) -> f64,
        device: &Device,
    ) -> RotaryEmbedding {
        assert!(
            d_head > 0 && d_head.is_multiple_of(2),
            "rotary embedding: expected an even number of features, got {d_head}"
        );
        assert!(self.theta > 0.0, "rotary embedding: expected a positive theta, got {}", self.theta);
        let pairs = d_head / 2;
        let frequency = |i: usize| scaling(i, self.theta.powf(-2.0 * i as f64 / d_head as f64));
        let frequencies: Vec<f64> = (0..pairs).map(frequency).collect();
        // In f64 on the host: a device's f32 angles and trigonometry lose digits as positions grow.
        let table = |f: fn(f64) -> f64| {
            let angles = (0..self.max_positions).flat_map(|at| frequencies.iter().map(move |w| at as f64 * w));
            let data = TensorData::new(angles.map(|angle| f(angle) as f32).collect(), [self.max_positions, pairs]);
            Tensor::<2>::from_data(data, (device, DType::F32))
        };
        RotaryEmbedding { cos: table(f64::cos), sin: table(f64::sin), convention: self.convention }
    }
}

/// Rotates pairs of features by angles that grow with the position, so that a product of a query and a key depends on
/// their distance. It has tables and no parameters: records do not hold it.
#[derive(Module, Debug)]
pub struct RotaryEmbedding {
    /// `[max_positions, d/2]`
    cos: Tensor<2>,
    sin: Tensor<2>,
    #[module(skip)]
    convention: RotaryConvention,
}

impl RotaryEmbedding {
    /// Rotates `[.., S, d]`, the first row as position 0.
    ///
    /// # Panics
    ///
    /// As [`apply`](Self::apply).
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        self.apply(x, 0)
    }

    /// Rotates `[.., S, d]`, the first row as position `start` (what a cache holds already).
    ///
    /// # Panics
    ///
    /// If the last dimension is not the `d_head` of the tables, or a position lies beyond them.
    pub fn apply<const D: usize>(&self, x: Tensor<D>, start: usize) -> Tensor<D> {
        let [positions, pairs] = self.cos.dims();
        assert_shape!(x, [.., _, 2 * pairs]);
        let (shape, dtype) = (x.dims(), x.dtype());
        let length = shape[D - 2];
        let end = start + length;
        assert!(end <= positions, "rotary embedding: expected at most {positions} positions, got {end}");
        let rows = shape[..D - 2].iter().product();
        if rows * length == 0 {
            // Burn's reshape reads a zero as "the size that was there".
            return x;
        }
        // Either layout is a dimension of two beside one of d/2; which comes first is all that differs.
        let (split, turn, axis) = match self.convention {
            RotaryConvention::Interleaved => ([rows, length, pairs, 2], [1, length, pairs, 1], 3),
            RotaryConvention::HalfRotated => ([rows, length, 2, pairs], [1, length, 1, pairs], 2),
        };
        let rows_of = |table: &Tensor<2>| table.clone().slice_dim(0, start..end).cast(dtype).reshape(turn);
        let (cos, sin) = (rows_of(&self.cos), rows_of(&self.sin));
        let x = x.reshape(split);
        let (re, im) = (x.clone().slice_dim(axis, 0..1), x.slice_dim(axis, 1..2));
        // (re + i·im) · (cos + i·sin)
        let rotated_re = re.clone() * cos.clone() - im.clone() * sin.clone();
        let rotated_im = re * sin + im * cos;
        Tensor::cat(vec![rotated_re, rotated_im], axis).reshape(shape)
    }
}
