//! Who takes part in a comparison: something that computes attention's forward and backward on the operands of a run.

use std::path::Path;

use flashover::kernels::launch_log::Launch;
use flashover::kernels::problem::{Element, Problem};
use serde::{Deserialize, Serialize};

use super::pattern::Pattern;

/// What is timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pass {
    /// Output and log-sum-exp.
    Forward,
    /// dq, dk and dv of saved outputs.
    Backward,
    /// Both.
    ForwardBackward,
}

impl Pass {
    /// All of them.
    pub const ALL: [Pass; 3] = [Pass::Forward, Pass::Backward, Pass::ForwardBackward];

    /// Name for people.
    pub const fn name(self) -> &'static str {
        match self {
            Pass::Forward => "forward",
            Pass::Backward => "backward",
            Pass::ForwardBackward => "forward + backward",
        }
    }

    /// Names of its figures: milliseconds and TFLOP/s.
    pub const fn metrics(self) -> [&'static str; 2] {
        match self {
            Pass::Forward => ["forward_ms", "forward_tflops"],
            Pass::Backward => ["backward_ms", "backward_tflops"],
            Pass::ForwardBackward => ["forward_backward_ms", "forward_backward_tflops"],
        }
    }

    /// Operations as the field counts them, in those of a forward: a backward has five products where a forward has two,
    /// whatever a kernel really multiplies.
    pub const fn flops(self) -> f64 {
        match self {
            Pass::Forward => 1.0,
            Pass::Backward => 2.5,
            Pass::ForwardBackward => 3.5,
        }
    }
}

/// A problem as contestants in other processes and languages are told it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    pub batch: usize,
    pub heads: usize,
    pub seq: usize,
    pub dim: usize,
    pub pattern: Pattern,
    pub element: String,
}

impl Spec {
    /// Self-attention of `heads` heads over `seq` positions.
    pub fn new(pattern: Pattern, batch: usize, heads: usize, seq: usize, dim: usize, element: Element) -> Self {
        Spec { batch, heads, seq, dim, pattern, element: element.name().into() }
    }

    /// Its name, which spells the problem.
    pub fn name(&self) -> String {
        let Spec { batch, heads, seq, dim, pattern, element } = self;
        format!("{}_b{batch}_hq{heads}_hkv{heads}_s{seq}_d{dim}_{element}", pattern.name(*seq))
    }

    /// The problem, without the block plan of its [pattern](Pattern::mask).
    pub fn problem(&self) -> Result<Problem, String> {
        let elements = [Element::F16, Element::BF16];
        let element = elements.into_iter().find(|element| element.name() == self.element);
        let element = element.ok_or_else(|| format!("element type: expected f16 or bf16, got {}", self.element))?;
        let shape = [self.batch, self.heads, self.seq, self.dim];
        let plain = Problem::new(shape, shape, shape, element).map_err(|error| error.to_string())?;
        Ok(Problem { band: self.pattern.band(), ..plain })
    }

    /// Elements of each operand.
    pub fn elements(&self) -> usize {
        self.batch * self.heads * self.seq * self.dim
    }

    /// Bytes of one head of an operand.
    pub fn head_bytes(&self) -> usize {
        self.seq * self.dim * size_of::<u16>()
    }

    /// Where the heads that are judged begin in an operand, in bytes: the first and the last, where a wrong stride shows.
    pub fn judged(&self) -> [usize; 2] {
        [0, (self.batch * self.heads - 1) * self.head_bytes()]
    }
}

/// See the module. Errors are reasons for people.
pub trait Contestant {
    /// Its name in tables and rows.
    fn name(&self) -> &'static str;

    /// Takes up a case.
    fn load(&mut self, spec: &Spec) -> Result<(), String>;

    /// Writes o, and dq, dk, dv unless the pass is the forward, of the [judged](Spec::judged) heads: raw elements.
    fn results(&mut self, pass: Pass, path: &Path) -> Result<(), String>;

    /// Milliseconds of so many calls in a row, waited for once.
    fn milliseconds(&mut self, pass: Pass, calls: usize) -> Result<f64, String>;

    /// The kernels that a pass launches, in order; none where nobody can tell.
    fn launches(&self, _pass: Pass) -> Result<Vec<Launch>, String> {
        Ok(Vec::new())
    }
}

/// Writes the judged heads of contiguous tensors, given as bytes.
pub fn write_judged(path: &Path, spec: &Spec, tensors: &[impl AsRef<[u8]>]) -> Result<(), String> {
    let mut bytes = Vec::new();
    for tensor in tensors {
        for start in spec.judged() {
            bytes.extend_from_slice(&tensor.as_ref()[start..start + spec.head_bytes()]);
        }
    }
    std::fs::write(path, bytes).map_err(|error| format!("writing {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use flashover_testing::grid::case_name;

    use super::*;

    fn spec() -> Spec {
        Spec { batch: 2, heads: 3, seq: 4, dim: 8, pattern: Pattern::Causal, element: "bf16".into() }
    }

    #[test]
    fn a_spec_is_a_problem() {
        let problem = spec().problem().expect("sound");
        assert!(problem.band.causal && problem.element == Element::BF16);
        assert_eq!(spec().name(), case_name(&problem));
        let message = Spec { element: "f8".into(), ..spec() }.problem().expect_err("no such element");
        assert_eq!(message, "element type: expected f16 or bf16, got f8");
    }

    #[test]
    fn the_first_and_the_last_head_are_judged() {
        let path = std::env::temp_dir().join(format!("flashover-judged-{}", std::process::id()));
        let bytes: Vec<u8> = (0..spec().elements() * 2).map(|n| (n / spec().head_bytes()) as u8).collect();
        write_judged(&path, &spec(), &[bytes.clone(), bytes]).expect("written");
        let written = std::fs::read(&path).expect("there");
        std::fs::remove_file(&path).expect("there");
        let heads: Vec<u8> = written.chunks(spec().head_bytes()).map(|head| head[0]).collect();
        assert_eq!(heads, [0, 5, 0, 5]);
    }
}
