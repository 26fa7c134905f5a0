//! Our kernels by name, called as the backend calls them: no autodiff, no Fusion, no Burn tensors between the clock and the
//! launches.

use std::path::Path;
use std::rc::Rc;
use std::time::Instant;

use flashover::SparsePlan;
use flashover::kernels::block_plan::BlockPlan;
use flashover::kernels::cubecl;
use flashover::kernels::cubecl::client::Client;
use flashover::kernels::cubecl::future::block_on;
use flashover::kernels::cubecl::prelude::*;
use flashover::kernels::cubecl::server::Handle;
use flashover::kernels::device::{DeviceLimits, DeviceTensor, KernelError, element_type};
use flashover::kernels::family::Outputs;
use flashover::kernels::launch_log::{self, Launch};
use flashover::kernels::mask::Extent;
use flashover::kernels::mma::MmaTile;
use flashover::kernels::operands::{Gradients, Operands, Wanted};
use flashover::kernels::problem::{Element, Problem};
use flashover::kernels::select::{self, KernelChoice, Selection, select};

use super::contestant::{Contestant, Pass, Spec, write_judged};
use super::operands::{Folder, NAMES};

/// A kernel family as a contestant.
pub struct Kernels {
    name: &'static str,
    choice: KernelChoice,
    /// Another forward tile than the family's own, if that family is mma.
    tile: Option<MmaTile>,
    /// Whether gradients may differ from run to run.
    unordered: bool,
    client: Client,
    folder: Rc<Folder>,
    /// The operands that were read last: the cases of a run are mostly other shapes of the same elements.
    kept: Option<(Element, usize, [Handle; 4])>,
    call: Option<Call>,
}

/// A case on the device.
struct Call {
    spec: Spec,
    problem: Problem,
    selection: Selection,
    operands: Operands<DeviceTensor>,
    do_: DeviceTensor,
    /// The block plan as kernels read it.
    plan: Option<DeviceTensor>,
}

/// What a forward returned, and the gradient of its output.
struct Made {
    outputs: Outputs,
    /// What rounding took from the output, where a Hopper backward follows.
    rest: Option<DeviceTensor>,
}

/// The NVIDIA GPU of a CUDA build. The error says what is missing.
pub fn cuda() -> Result<Client, String> {
    let device =
        cubecl::Device::cuda(0).map_err(|error| format!("no CUDA device ({error}); see scripts/cuda-build"))?;
    Ok(device.client())
}

/// The plan of a spec's mask, which the problem then knows of.
fn planned(spec: &Spec, problem: &mut Problem) -> Result<Option<BlockPlan>, String> {
    let Some(mask) = spec.pattern.mask(spec.heads, spec.seq) else { return Ok(None) };
    let plan = BlockPlan::new(&mask, Extent::from(&*problem), SparsePlan::TILE).map_err(|error| error.to_string())?;
    let plan = plan.refine();
    problem.plan = Some(plan.shape(plan.points(), [problem.batch, problem.heads_q]));
    Ok(Some(plan))
}

impl Kernels {
    /// The family of that name.
    pub fn new(name: &'static str, choice: KernelChoice, client: Client, folder: Rc<Folder>) -> Self {
        Kernels { name, choice, tile: None, unordered: false, client, folder, kept: None, call: None }
    }

    /// The same where gradients may differ from run to run.
    pub fn unordered(self) -> Self {
        Kernels { unordered: true, ..self }
    }

    /// The same with another forward tile of the mma family, from the next case on.
    pub fn with_tile(&mut self, tile: MmaTile) {
        self.tile = Some(tile);
    }

    /// What `Auto` takes for a case here, and why.
    pub fn reason(client: &Client, spec: &Spec) -> Result<String, String> {
        let mut problem = spec.problem()?;
        planned(spec, &mut problem)?;
        let selection = select(&problem, &DeviceLimits::of(client), KernelChoice::Auto);
        Ok(selection.map_or_else(|error| error.to_string(), |selection| selection.reason))
    }

    /// One forward and backward, and nothing else that launches kernels.
    pub fn once(&self) -> Result<(), String> {
        let call = self.call()?;
        let made = self.forward(call, true)?;
        self.backward(call, &made)?;
        self.sync()
    }

    /// One forward.
    pub fn forward_once(&self) -> Result<(), String> {
        self.forward(self.call()?, false)?;
        self.sync()
    }

    fn call(&self) -> Result<&Call, String> {
        self.call.as_ref().ok_or_else(|| format!("{}: no case was loaded", self.name))
    }

    /// A plan as kernels read it.
    fn upload(&self, plan: &BlockPlan) -> DeviceTensor {
        let words = plan.to_words();
        let handle = self.client.create_from_slice(u32::as_bytes(&words));
        DeviceTensor::contiguous(handle, &[words.len()], u32::elem_type_native())
    }

    fn operands_of(&mut self, spec: &Spec, element: Element) -> Result<[Handle; 4], String> {
        let elements = spec.elements();
        match &self.kept {
            Some((kept, count, handles)) if (*kept, *count) == (element, elements) => Ok(handles.clone()),
            _ => {
                // What was kept goes first: both may not fit.
                self.kept = None;
                let read = |name| Ok(self.client.create_from_slice(&self.folder.read(name, element, elements)?));
                let handles = NAMES.iter().map(|name| read(name)).collect::<Result<Vec<_>, String>>()?;
                let handles = <[Handle; 4]>::try_from(handles).expect("four names");
                self.kept = Some((element, elements, handles.clone()));
                Ok(handles)
            }
        }
    }

    fn on_device<'a>(&'a self, Call { problem, operands, plan, .. }: &'a Call) -> select::Call<'a> {
        select::Call { client: &self.client, problem, operands, plan: plan.as_ref() }
    }

    /// A forward; `for_backward` if a backward follows it, as in training.
    fn forward(&self, call: &Call, for_backward: bool) -> Result<Made, String> {
        let outputs =
            call.selection.forward(self.on_device(call), true, for_backward && call.selection.one_pass.is_some());
        let (o, lse, rest) = outputs.map_err(|error| self.refused(&error))?;
        let lse = lse.expect("it was asked for");
        Ok(Made { outputs: Outputs { o, lse, do_: call.do_.clone(), dlse: None }, rest })
    }

    fn backward(&self, call: &Call, made: &Made) -> Result<Gradients<DeviceTensor>, String> {
        let wanted = Wanted { q: true, k: true, v: true, ..Wanted::default() };
        let gradients = call.selection.backward(self.on_device(call), &made.outputs, made.rest.clone(), wanted);
        gradients.map_err(|error| self.refused(&error))
    }

    fn refused(&self, error: &KernelError) -> String {
        format!("{}: {error}", self.name)
    }

    fn sync(&self) -> Result<(), String> {
        block_on(self.client.sync()).map_err(|error| format!("{}: {error:?}", self.name))
    }

    fn read(&self, tensor: DeviceTensor) -> Result<Vec<u8>, String> {
        let bytes = self.client.read_one(tensor.handle).map_err(|error| format!("{}: {error:?}", self.name))?;
        Ok(bytes.to_vec())
    }
}

impl Contestant for Kernels {
    fn name(&self) -> &'static str {
        self.name
    }

    fn load(&mut self, spec: &Spec) -> Result<(), String> {
        self.call = None;
        let mut problem = Problem { unordered: self.unordered, ..spec.problem()? };
        let plan = planned(spec, &mut problem)?.map(|plan| self.upload(&plan));
        let selection = select(&problem, &DeviceLimits::of(&self.client), self.choice);
        let mut selection = selection.map_err(|error| error.to_string())?;
        if let (Some(tile), Some(tiles)) = (self.tile, &mut selection.mma) {
            tiles.forward = tile;
        }
        let handles = self.operands_of(spec, problem.element)?;
        let shape = [spec.batch, spec.heads, spec.seq, spec.dim];
        let [q, k, v, do_] =
            handles.map(|handle| DeviceTensor::contiguous(handle, &shape, element_type(problem.element)));
        let operands = Operands {
            q,
            k,
            v,
            bias: None,
            mask: None,
            alibi_slopes: None,
            learned_sinks: None,
            score_parameters: None,
            key_lengths: None,
        };
        self.call = Some(Call { spec: spec.clone(), problem, selection, operands, do_, plan });
        Ok(())
    }

    fn results(&mut self, pass: Pass, path: &Path) -> Result<(), String> {
        let call = self.call()?;
        let made = self.forward(call, pass != Pass::Forward)?;
        let mut tensors = vec![made.outputs.o.clone()];
        if pass != Pass::Forward {
            let Gradients { q, k, v, .. } = self.backward(call, &made)?;
            tensors.extend([q, k, v].into_iter().flatten());
        }
        let tensors = tensors.into_iter().map(|tensor| self.read(tensor)).collect::<Result<Vec<_>, String>>()?;
        write_judged(path, &call.spec, &tensors)
    }

    fn milliseconds(&mut self, pass: Pass, calls: usize) -> Result<f64, String> {
        let call = self.call()?;
        let made = (pass == Pass::Backward).then(|| self.forward(call, true)).transpose()?;
        self.sync()?;
        let start = Instant::now();
        for _ in 0..calls {
            match &made {
                None if pass == Pass::Forward => drop(self.forward(call, false)?),
                None => drop(self.backward(call, &self.forward(call, true)?)?),
                Some(made) => drop(self.backward(call, made)?),
            }
        }
        self.sync()?;
        Ok(start.elapsed().as_secs_f64() * 1e3)
    }

    fn launches(&self, pass: Pass) -> Result<Vec<Launch>, String> {
        let call = self.call()?;
        let made = self.forward(call, true)?;
        let (ran, launches) = launch_log::listen(|| match pass {
            Pass::Forward => self.forward(call, false).map(drop),
            Pass::Backward => self.backward(call, &made).map(drop),
            Pass::ForwardBackward => self.forward(call, true).and_then(|made| self.backward(call, &made).map(drop)),
        });
        ran.map(|()| launches)
    }
}
