//! `bench io`: what Figure 2 of the first FlashAttention paper (arXiv 2205.14135) accounts for: operations, bytes of memory and
//! time of standard attention and of ours, forward and backward at GPT-2 medium's shape, and both against the block size.
//!
//! Bytes are those of the hardware's counters, beside what [`cost`](flashover::kernels::cost) predicts. Where the counters
//! cannot be read, the record says so and has no bytes.

mod counters;

use std::ffi::OsString;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use burn::tensor::{DType, Device, Tensor};
use flashover::kernels::mma::MmaTile;
use flashover::kernels::problem::Element;
use flashover::kernels::select::KernelChoice;
use flashover::{AttentionOptions, explain};

use crate::case::Case;
use crate::peers::contestant::{Contestant, Pass, Spec};
use crate::peers::kernels::{self, Kernels};
use crate::peers::operands::Folder;
use crate::peers::pattern::Pattern;
use crate::peers::{Script, Turn, interleave, judged};
use crate::report::{Absent, Report, Run};
use crate::suites::{Plan, cuda_card};
use crate::timing;
use counters::Launch;

/// GPT-2 medium's attention at the batch of the paper, nothing masked.
fn spec() -> Spec {
    Spec::new(Pattern::Full, 64, 16, 1024, 64, Element::BF16)
}

/// Families that are accounted for.
const OURS: [(&str, KernelChoice); 2] = [("mma", KernelChoice::Mma), ("hopper", KernelChoice::Hopper)];

/// Forward tiles of the mma family, by rows and columns.
const TILES: [MmaTile; 6] =
    [tile(2, 1, 32), tile(4, 1, 32), tile(4, 1, 64), tile(4, 2, 32), tile(4, 2, 64), tile(4, 2, 128)];

const fn tile(warps: usize, blocks: usize, cols: usize) -> MmaTile {
    MmaTile { warps, blocks, cols, part: cols }
}

/// The suite.
pub fn run(plan: &Plan, limit: Duration, report: &mut Report) -> Result<(), String> {
    let client = kernels::cuda()?;
    let (device, driver) = cuda_card().ok_or("expected nvidia-smi to name the card and its driver, found none")?;
    let run = Run::new("io", device, Some(driver));
    let spec = spec();
    let case = Case { problem: spec.problem()? };
    let folder = Rc::new(Folder::create(spec.elements(), &[Element::BF16])?);
    let script = Script::write(folder.path())?;
    let (mut judge, mut standard) = (script.child("judge", limit)?, script.child("standard", limit)?);
    println!("{}: judged by {}", case.name(), judge.about()?);
    judge.load(&spec)?;
    let mut account = Account { run: &run, case: &case, folder: &folder, judge: &mut judge, report };

    let mut ours: Vec<Kernels> = Vec::new();
    for (name, choice) in OURS {
        let mut kernels = Kernels::new(name, choice, client.clone(), folder.clone());
        kernels.load(&spec)?;
        account.judge(&mut kernels, 2.0)?;
        let launches = kernels.launches(Pass::ForwardBackward)?;
        println!("{name}: {}", launches.iter().map(|launch| launch.kernel).collect::<Vec<_>>().join(", "));
        ours.push(kernels);
    }
    standard.load(&spec)?;
    // Standard attention is what the naive reference computes.
    account.judge(&mut standard, 2.0)?;
    account.time(&mut ours, &mut standard, plan.repeats)?;
    account.operations()?;
    account.bytes(&script)?;
    account.block_sizes(&mut Kernels::new("mma", KernelChoice::Mma, client, folder.clone()), &spec, plan.repeats)
}

/// Runs our kernels once for the profiler: a family by name, or the forward of every tile that runs.
pub fn once(name: &str, data: PathBuf) -> Result<(), String> {
    let (client, folder, spec) = (kernels::cuda()?, Rc::new(Folder::open(data)), spec());
    if name == "tiles" {
        let mut kernels = Kernels::new("mma", KernelChoice::Mma, client, folder);
        for tile in TILES {
            kernels.with_tile(tile);
            kernels.load(&spec)?;
            // What cannot run launches nothing, here as when it was timed.
            let _ = kernels.forward_once();
        }
        return Ok(());
    }
    let (name, choice) = OURS
        .into_iter()
        .find(|(known, _)| *known == name)
        .ok_or_else(|| format!("--once: expected tiles or one of {:?}, got {name}", OURS.map(|(name, _)| name)))?;
    let mut kernels = Kernels::new(name, choice, client, folder);
    kernels.load(&spec)?;
    kernels.once()
}

/// The account of one case.
struct Account<'a> {
    run: &'a Run,
    case: &'a Case,
    folder: &'a Folder,
    judge: &'a mut crate::peers::child::Child,
    report: &'a mut Report,
}

impl Account<'_> {
    fn judge(&mut self, contestant: &mut dyn Contestant, factor: f64) -> Result<(), String> {
        judged(contestant, self.judge, Pass::Backward, &self.folder.path().join("results"), factor)
    }

    fn time(&mut self, ours: &mut [Kernels], standard: &mut dyn Contestant, repeats: usize) -> Result<(), String> {
        for pass in Pass::ALL {
            let mut turns = vec![Turn::new(&mut *standard, pass)?];
            let (mut names, mut taken) = (Vec::new(), Vec::new());
            for kernels in &mut *ours {
                // A family may leave a pass to another's kernels.
                let launches = kernels.launches(pass)?;
                if !taken.contains(&launches) {
                    taken.push(launches);
                    names.push(kernels.name());
                    turns.push(Turn::new(kernels, pass)?);
                }
            }
            interleave(&mut turns, repeats);
            let medians = turns.into_iter().map(|turn| turn.outcome.map(timing::median));
            let medians = medians.collect::<Result<Vec<f64>, String>>()?;
            for (name, ms) in names.into_iter().zip(&medians[1..]) {
                let row = self.run.less(&self.case.name(), pass.metrics()[0], *ms, Some(("standard", medians[0])));
                self.report.push(row.of(name))?;
            }
        }
        Ok(())
    }

    /// What the products of a forward and a backward cost: six of standard attention, more of ours, which computes scores
    /// again.
    fn operations(&mut self) -> Result<(), String> {
        let standard = 3.0 * self.case.forward_flops() / 1e9;
        for (name, choice) in OURS {
            let (flops, _) = self.predicted(choice)?;
            let row = self.run.less(&self.case.name(), "gflop", flops / 1e9, Some(("standard", standard)));
            self.report.push(row.of(name))?;
        }
        Ok(())
    }

    /// Operations and bytes of a forward and a backward, by `explain`, which asks `cost`.
    fn predicted(&self, choice: KernelChoice) -> Result<(f64, f64), String> {
        let p = &self.case.problem;
        let device = Device::default().autodiff();
        let shape = [p.batch, p.heads_q, p.seq_q, p.head_dim];
        let q = Tensor::<4>::empty(shape, (&device, DType::BF16));
        let answer = explain(&q, &q, &q, &AttentionOptions::new().kernel(choice)).map_err(|error| error.to_string())?;
        let steps = || answer.forward.iter().chain(&answer.backward);
        Ok((steps().map(|step| step.flops as f64).sum(), steps().map(|step| step.bytes as f64).sum()))
    }

    /// Bytes of a forward and a backward by the counters, of standard attention and of ours, and beside ours what is predicted.
    fn bytes(&mut self, script: &Script) -> Result<(), String> {
        let case = serde_json::to_string(&spec()).expect("plain data");
        let mut command = vec![script.python.clone()];
        command.extend(script.arguments("standard"));
        command.extend(["once".into(), case.into()]);
        let standard = self.counted("standard", &command, true)?;
        for (name, choice) in OURS {
            let predicted = self.predicted(choice)?.1;
            println!("{name}: {:.3} GB predicted", predicted / 1e9);
            let Some(launches) = self.counted(name, &this_program(name, self.folder)?, false)? else { continue };
            let measured: f64 = launches.iter().map(Launch::bytes).sum();
            let standard = standard.as_ref().map(|launches| launches.iter().map(Launch::bytes).sum());
            let row =
                self.run.less(&self.case.name(), "hbm_bytes", measured, standard.map(|bytes| ("standard", bytes)));
            self.report.push(row.of(name))?;
            let row = self.run.less(&self.case.name(), "hbm_bytes_predicted", predicted, Some(("counters", measured)));
            self.report.push(row.of(name))?;
        }
        Ok(())
    }

    /// Time and bytes of the forward with each tile of the mma family.
    fn block_sizes(&mut self, kernels: &mut Kernels, spec: &Spec, repeats: usize) -> Result<(), String> {
        let launches = self.counted("tiles", &this_program("tiles", self.folder)?, false)?;
        let mut launches = launches.map(Vec::into_iter);
        for tile in TILES {
            let name = format!("{}_tile{}x{}", self.case.name(), tile.rows(), tile.cols);
            kernels.with_tile(tile);
            kernels.load(spec)?;
            if let Err(reason) = kernels.forward_once() {
                self.absent(&name, "mma", "forward", reason)?;
                continue;
            }
            let launch = match &mut launches {
                Some(launches) => Some(launches.next().ok_or("ncu: expected a launch of every tile that runs")?),
                None => None,
            };
            let results = self.folder.path().join("results");
            if let Err(reason) = judged(kernels, self.judge, Pass::Forward, &results, 2.0) {
                self.absent(&name, "mma", "forward", reason)?;
                continue;
            }
            let mut turns = [Turn::new(kernels, Pass::Forward)?];
            interleave(&mut turns, repeats);
            let [turn] = turns;
            self.report.push(self.run.less(&name, "forward_ms", timing::median(turn.outcome?), None).of("mma"))?;
            if let Some(launch) = launch {
                self.report.push(self.run.less(&name, "hbm_bytes", launch.bytes(), None).of("mma"))?;
            }
        }
        Ok(())
    }

    /// The launches of a program by the counters; `None`, and a note, where they cannot be read.
    fn counted(&mut self, of: &str, command: &[OsString], marked: bool) -> Result<Option<Vec<Launch>>, String> {
        match counters::measure(command, marked, &self.folder.path().join("ncu.csv")) {
            Ok(launches) => {
                for Launch { kernel, read, written } in &launches {
                    println!("{of}: {:.3} GB read, {:.3} GB written by {kernel:.60}", read / 1e9, written / 1e9);
                }
                Ok(Some(launches))
            }
            Err(reason) => {
                self.absent(&self.case.name(), of, "hbm_bytes", format!("not available: {reason}"))?;
                Ok(None)
            }
        }
    }

    fn absent(&mut self, case: &str, of: &str, what: &str, reason: String) -> Result<(), String> {
        self.report.absent(&Absent {
            suite: self.run.suite,
            case: case.into(),
            of: of.into(),
            what: what.into(),
            not_measured: reason,
        })
    }
}

/// This program, running `name` once.
fn this_program(name: &str, folder: &Folder) -> Result<Vec<OsString>, String> {
    let program = std::env::current_exe().map_err(|error| format!("finding this program: {error}"))?;
    Ok(vec![program.into(), "io".into(), "--once".into(), name.into(), "--data".into(), folder.path().into()])
}
