//! What is timed: a named problem, its tensors, and the calls of ours and of the peer.

use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{Device, Distribution, Tensor};
use flashover::AttentionOptions;
use flashover::kernels::mask::Band;
use flashover::kernels::problem::{Element, Problem};
use flashover_testing::grid::case_name;

/// A problem to time.
#[derive(Debug, Clone)]
pub struct Case {
    /// What is computed.
    pub problem: Problem,
}

/// Tensors of a case, on an autodiff device or not.
pub struct Tensors {
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
}

impl Case {
    /// Self-attention of `heads` heads over `seq` positions.
    pub fn new(band: Band, batch: usize, heads: usize, seq: usize, dim: usize, element: Element) -> Self {
        let shape = [batch, heads, seq, dim];
        let plain = Problem::new(shape, shape, shape, element).expect("a benchmark's problem is sound");
        Case { problem: Problem { band, ..plain } }
    }

    /// The case's name, which spells the problem.
    pub fn name(&self) -> String {
        case_name(&self.problem)
    }

    /// The same with another length: what the correctness gate checks.
    pub fn shortened(&self, seq: usize) -> Case {
        let p = &self.problem;
        Case::new(p.band, p.batch, p.heads_q, p.seq_q.min(seq), p.head_dim, p.element)
    }

    /// Floating-point operations of the forward as the field counts them: `4·B·H·D` a visible score.
    pub fn forward_flops(&self) -> f64 {
        let p = &self.problem;
        let row = |i: usize| {
            let a = i as i32 + p.alignment();
            (0..p.seq_kv as i32).filter(|&j| p.band.allows(a, j)).count() as f64
        };
        // The two extremes are known; a window is counted.
        let scores = match (p.band.is_unbounded(), p.band == Band::causal()) {
            (true, _) => p.seq_q as f64 * p.seq_kv as f64,
            (_, true) => p.seq_q as f64 * p.seq_kv as f64 / 2.0,
            _ => (0..p.seq_q).map(row).sum(),
        };
        2.0 * (p.batch * p.heads_q) as f64 * (p.head_dim + p.value_dim) as f64 * scores
    }

    /// Random operands, the same for all contestants.
    pub fn tensors(&self, device: &Device) -> Tensors {
        let p = &self.problem;
        device.seed(1);
        let dtype = match p.element {
            Element::F64 => burn::tensor::DType::F64,
            Element::F32 => burn::tensor::DType::F32,
            Element::F16 => burn::tensor::DType::F16,
            Element::BF16 => burn::tensor::DType::BF16,
        };
        let normal = |shape: [usize; 4]| {
            let x = Tensor::<4>::random(shape, Distribution::Normal(0.0, 1.0), device).cast(dtype);
            if device.is_autodiff() { x.detach().require_grad() } else { x }
        };
        Tensors {
            q: normal([p.batch, p.heads_q, p.seq_q, p.head_dim]),
            k: normal([p.batch, p.heads_kv, p.seq_kv, p.head_dim]),
            v: normal([p.batch, p.heads_kv, p.seq_kv, p.value_dim]),
        }
    }

    /// Our call.
    pub fn ours(&self, t: &Tensors) -> Tensor<4> {
        self.ours_with(t, AttentionOptions::new())
    }

    /// Our call with more options than a case has.
    pub fn ours_with(&self, t: &Tensors, options: AttentionOptions) -> Tensor<4> {
        let band = self.problem.band;
        let mut options = options.window(band.left as usize, band.right as usize);
        if band.causal {
            options = options.causal();
        }
        flashover::attention(t.q.clone(), t.k.clone(), t.v.clone(), &options).expect("a benchmark's call is sound")
    }

    /// What a Burn user calls today. `None` where Burn has no such attention (a window).
    pub fn burn(&self, t: &Tensors) -> Option<Tensor<4>> {
        let band = self.problem.band;
        let plain = Band { causal: false, ..band };
        plain.is_unbounded().then(|| {
            let options = AttentionModuleOptions { is_causal: band.causal, ..Default::default() };
            burn::tensor::module::attention(t.q.clone(), t.k.clone(), t.v.clone(), None, None, options)
        })
    }
}
