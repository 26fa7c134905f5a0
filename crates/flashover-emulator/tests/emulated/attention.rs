//! Attention by a family that is asked for by name, as `flashover` runs it on a CubeCL device.

use cubecl::client::Client;
use cubecl::prelude::*;
use flashover_kernels::block_plan::BlockPlan;
use flashover_kernels::device::{DeviceLimits, DeviceTensor, KernelError};
use flashover_kernels::family::Outputs;
use flashover_kernels::hopper;
use flashover_kernels::launch_log::{self, Launch};
use flashover_kernels::operands::{Gradients, Operands, Wanted};
use flashover_kernels::problem::{Element, Precision, Problem};
use flashover_kernels::select::{self, KernelChoice, Selection, select};
use flashover_testing::data::Inputs;
use flashover_testing::layout::Layout;

use crate::{device, tensors};

/// A family, and the products of f32 that it is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    Mma,
    Hopper,
    Cmma,
    /// [`Mma`](Self::Mma) with elements of f32, a product being three of tf32.
    Tf32,
}

impl Family {
    /// The element type of most problems, and the other one, if there is.
    pub fn elements(self) -> [Element; 2] {
        if self == Family::Tf32 { [Element::F32; 2] } else { [Element::BF16, Element::F16] }
    }

    fn choice(self) -> KernelChoice {
        match self {
            Family::Mma | Family::Tf32 => KernelChoice::Mma,
            Family::Hopper => KernelChoice::Hopper,
            Family::Cmma => KernelChoice::Cmma,
        }
    }

    /// The problem at the family's precision.
    pub fn problem(self, problem: &Problem) -> Problem {
        let precision = if self == Family::Tf32 { Precision::Tf32x3 } else { Precision::Exact };
        Problem { precision, ..problem.clone() }
    }

    /// The kernel that every forward launches.
    fn forward(self) -> &'static str {
        match self {
            Family::Mma | Family::Tf32 => "forward_mma",
            Family::Hopper => "forward_hopper",
            Family::Cmma => "forward_cmma",
        }
    }
}

/// How a problem is run.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    pub family: Family,
    /// How q, k and v lie.
    pub layouts: [Layout; 3],
    /// Once more, for the same bits.
    pub twice: bool,
    /// Which gradients are taken, of those whose operands the problem has.
    pub wanted: Wanted,
    /// What becomes of the choice that the library makes.
    pub choose: fn(&mut Selection),
}

impl Call {
    /// A family's, of all gradients.
    pub fn by(family: Family) -> Self {
        let wanted = Wanted {
            q: true,
            k: true,
            v: true,
            bias: true,
            alibi_slopes: true,
            learned_sinks: true,
            score_parameters: true,
        };
        Call { family, layouts: [Layout::default(); 3], twice: false, wanted, choose: |_| () }
    }

    /// With a backward that walks the queries and the keys apart.
    pub fn in_two_passes(self) -> Self {
        Call { choose: |selection| selection.one_pass = None, ..self }
    }
}

/// What attention gave, in f64.
pub struct Results {
    pub o: Vec<f64>,
    pub lse: Vec<f64>,
    pub gradients: Gradients<Vec<f64>>,
}

impl Results {
    /// The results by name, in the order in which messages list them.
    pub fn named(&self) -> [(&'static str, Option<&Vec<f64>>); 9] {
        let g = &self.gradients;
        [
            ("o", Some(&self.o)),
            ("lse", Some(&self.lse)),
            ("dq", g.q.as_ref()),
            ("dk", g.k.as_ref()),
            ("dv", g.v.as_ref()),
            ("dbias", g.bias.as_ref()),
            ("dalibi_slopes", g.alibi_slopes.as_ref()),
            ("dlearned_sinks", g.learned_sinks.as_ref()),
            ("dscore_parameters", g.score_parameters.as_ref()),
        ]
    }

    /// Which results are not the same, bit for bit.
    pub fn differing(&self, other: &Results) -> Vec<&'static str> {
        let bits = |x: Option<&Vec<f64>>| x.map(|x| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
        let pairs = self.named().into_iter().zip(other.named());
        pairs.filter(|((_, x), (_, y))| bits(*x) != bits(*y)).map(|((name, _), _)| name).collect()
    }
}

/// Runs a problem, whose precision is the family's, forward and backward; what was launched for it.
pub fn run(
    problem: &Problem,
    inputs: &Inputs,
    plan: Option<&BlockPlan>,
    call: Call,
) -> Result<(Results, Vec<Launch>), String> {
    let client = device::client();
    let selection = select(problem, &DeviceLimits::of(&client), call.family.choice());
    let mut selection = selection.map_err(|error| format!("refused: {error}"))?;
    (call.choose)(&mut selection);
    // One run at a time: the log is one of the whole process.
    let (results, launches) = launch_log::listen(|| {
        let placed = Placed::new(&client, problem, inputs, plan, &selection, call.layouts);
        placed.run(inputs, wanted(problem, call))
    });
    let results = results.map_err(|error| format!("refused: {error}"))?;
    if !problem.is_empty() && !ran(&launches, call.family.forward()) {
        return Err(format!("{} was not launched: {launches:?}", call.family.forward()));
    }
    Ok((results, launches))
}

/// Whether a kernel was launched.
pub fn ran(launches: &[Launch], kernel: &str) -> bool {
    launches.iter().any(|launch| launch.kernel == kernel)
}

/// The gradients that a call wants and the problem has.
pub fn wanted(problem: &Problem, Call { wanted, .. }: Call) -> Wanted {
    Wanted {
        bias: wanted.bias && problem.bias.is_some(),
        alibi_slopes: wanted.alibi_slopes && problem.alibi,
        learned_sinks: wanted.learned_sinks && problem.learned_sinks,
        score_parameters: wanted.score_parameters && problem.score.is_some(),
        ..wanted
    }
}

/// A problem on the device.
struct Placed<'a> {
    client: &'a Client,
    problem: &'a Problem,
    selection: &'a Selection,
    operands: Operands<DeviceTensor>,
    /// The block plan.
    blocks: Option<DeviceTensor>,
}

impl<'a> Placed<'a> {
    fn new(
        client: &'a Client,
        problem: &'a Problem,
        inputs: &Inputs,
        plan: Option<&BlockPlan>,
        selection: &'a Selection,
        layouts: [Layout; 3],
    ) -> Self {
        let mut operands = tensors::operands(client, problem, inputs, layouts);
        if selection.forward_copies() {
            let x = &inputs.operands;
            // What the copy engine cannot read where it lies is copied.
            for (tensor, data) in [(&mut operands.q, &x.q), (&mut operands.k, &x.k), (&mut operands.v, &x.v)] {
                if !hopper::reads_in_place(tensor) {
                    *tensor = tensors::floats(client, data, &tensor.shape, problem.element);
                }
            }
        }
        let blocks = plan.map(|plan| {
            let words = plan.to_words();
            let handle = client.create_from_slice(u32::as_bytes(&words));
            DeviceTensor::contiguous(handle, &[words.len()], u32::elem_type_native())
        });
        Placed { client, problem, selection, operands, blocks }
    }

    fn run(&self, inputs: &Inputs, wanted: Wanted) -> Result<Results, KernelError> {
        let Placed { client, problem, selection, ref operands, ref blocks } = *self;
        let call = select::Call { client, problem, operands, plan: blocks.as_ref() };
        let (o, lse, rest) = selection.forward(call, true, selection.one_pass.is_some())?;
        let lse = lse.expect("it was asked for");
        let dlse = inputs.dlse.iter().any(|&x| x != 0.0);
        let outputs = Outputs {
            o,
            lse,
            do_: tensors::floats(client, &inputs.do_, &problem.output_shape(), problem.element),
            dlse: dlse.then(|| tensors::floats(client, &inputs.dlse, &problem.lse_shape(), Element::F32)),
        };
        let gradients = selection.backward(call, &outputs, rest, wanted)?;
        let read = |tensor: &DeviceTensor| tensors::read(client, tensor);
        Ok(Results {
            o: read(&outputs.o),
            lse: read(&outputs.lse),
            gradients: Gradients {
                q: gradients.q.as_ref().map(read),
                k: gradients.k.as_ref().map(read),
                v: gradients.v.as_ref().map(read),
                bias: gradients.bias.as_ref().map(read),
                alibi_slopes: gradients.alibi_slopes.as_ref().map(read),
                learned_sinks: gradients.learned_sinks.as_ref().map(read),
                score_parameters: gradients.score_parameters.as_ref().map(read),
            },
        })
    }
}
