//! `bench peers` and `bench sparse`: our kernels by name, Burn's attention, and PyTorch's FlashAttention-2, cuDNN and
//! FlexAttention, in one session on the same operands.
//!
//! Every contestant's results are judged first, at full size, against f64: the outputs and gradients of the first and the last
//! head. Then all of them are timed in turns, each alone on the GPU, and compared by medians. Those of other libraries run in
//! processes of their own with a limit of time, so that one that hangs takes only its own figures with it.

pub mod child;
pub mod contestant;
pub mod figures;
pub mod kernels;
pub mod operands;
pub mod pattern;
mod plot;
mod sparse;
pub mod tensors;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use flashover::kernels::problem::Element;
use flashover::kernels::select::KernelChoice;
use flashover_testing::tolerance::FLOOR;

use crate::report::{Absent, Report, Run};
use crate::suites::{Plan, cuda_card};
use crate::timing;
use child::Child;
use contestant::{Contestant, Pass, Spec};
use figures::{Figure, Unit};
use kernels::Kernels;
use operands::Folder;
use pattern::Pattern;

/// The script of the contestants in PyTorch.
const SCRIPT: &str = include_str!("../peers.py");

/// Calls of the short run that is taken off a long one, so that what waiting costs does not count.
const FEW: usize = 2;

/// Milliseconds that a timed run lasts about, and the least and most calls of one.
const SPAN_MS: f64 = 25.0;
const CALLS: [f64; 2] = [3.0, 200.0];

/// Who can take part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Name {
    /// Our kernels for Hopper GPUs.
    Hopper,
    /// The same where dq need not have the same bits in every run; their forward is that of the others.
    HopperUnordered,
    /// Our kernels for tensor cores.
    Mma,
    /// Our kernels for cooperative matrices.
    Cmma,
    /// Our kernels for every GPU.
    Portable,
    /// `flashover::attention`, as a Burn user calls it, beside Burn's.
    Flashover,
    /// Burn's own attention.
    Burn,
    /// PyTorch's FlashAttention-2.
    Fa2,
    /// cuDNN's attention, through PyTorch.
    Cudnn,
    /// PyTorch's FlexAttention, compiled.
    FlexAttention,
}

impl Name {
    /// Those that take part in the suite sparse unless others are named.
    pub const SPARSE: [Name; 4] = [Name::Hopper, Name::HopperUnordered, Name::Mma, Name::FlexAttention];

    /// Those that take part in the suite peers unless others are named.
    pub const USUAL: [Name; 8] = [
        Name::Mma,
        Name::Hopper,
        Name::HopperUnordered,
        Name::Fa2,
        Name::Cudnn,
        Name::FlexAttention,
        Name::Flashover,
        Name::Burn,
    ];

    /// As it is written.
    pub const fn text(self) -> &'static str {
        match self {
            Name::Hopper => "hopper",
            Name::HopperUnordered => "hopper_unordered",
            Name::Mma => "mma",
            Name::Cmma => "cmma",
            Name::Portable => "portable",
            Name::Flashover => "flashover",
            Name::Burn => "burn",
            Name::Fa2 => "fa2",
            Name::Cudnn => "cudnn",
            Name::FlexAttention => "flex_attention",
        }
    }

    const fn is_ours(self) -> bool {
        !matches!(self, Name::Burn | Name::Fa2 | Name::Cudnn | Name::FlexAttention)
    }

    /// What it is compared in. Burn's attention works on f16 tiles, and in bf16 its tuning panics or does not end.
    const fn element(self) -> Element {
        match self {
            Name::Flashover | Name::Burn => Element::F16,
            _ => Element::BF16,
        }
    }
}

/// Who takes part, and how.
pub struct Choice {
    pub names: Vec<Name>,
    /// How long an answer of another process may take.
    pub limit: Duration,
    /// Where the picture goes.
    pub plot: Option<PathBuf>,
}

/// A contestant, and how far it may be from f64, in errors of the naive reference: ours as everywhere in this repository,
/// others by FlashAttention's own tests of gradients.
struct Entrant {
    name: Name,
    contestant: Box<dyn Contestant>,
}

impl Entrant {
    const fn factor(&self) -> f64 {
        if self.name.is_ours() { 2.0 } else { 3.0 }
    }
}

/// D 64 and 128, nothing masked and causal, short to long, at the same H · D and B · S; in f16, where Burn tunes itself for
/// many seconds a shape, D 128 alone.
fn cases(element: Element) -> Vec<Spec> {
    let mut cases = Vec::new();
    let dims: &[usize] = if element == Element::F16 { &[128] } else { &[64, 128] };
    for &dim in dims {
        for pattern in [Pattern::Full, Pattern::Causal] {
            for (batch, seq) in [(16, 1024), (4, 4096), (1, 16_384)] {
                cases.push(Spec::new(pattern, batch, 2048 / dim, seq, dim, element));
            }
        }
    }
    cases
}

/// The suite `peers`.
pub fn run(plan: &Plan, choice: &Choice, report: &mut Report) -> Result<(), String> {
    let kinds = [Element::BF16, Element::F16].into_iter().filter(|&kind| choice.has(kind));
    let measured = measure("peers", kinds.flat_map(cases), plan, choice, report)?;
    println!("\n{}", figures::table(&measured.figures, Unit::Tflops));
    if let Some(path) = &choice.plot {
        plot::of_lengths(path, &measured.title("Attention, H · D = 2048"), &measured.figures)?;
    }
    measured.right()
}

/// The suite `sparse`.
pub fn run_sparse(plan: &Plan, choice: &Choice, report: &mut Report) -> Result<(), String> {
    let measured = measure("sparse", sparse::cases().into_iter(), plan, choice, report)?;
    println!("\n{}", figures::table(&measured.figures, Unit::Milliseconds));
    let rows = sparse::rows(&measured.run, &measured.figures);
    println!("\n{}", sparse::table(&rows));
    for row in rows {
        report.push(row)?;
    }
    if let Some(path) = &choice.plot {
        plot::of_densities(path, &measured.title("Random blocks of 128 × 128"), &measured.figures)?;
    }
    measured.right()
}

/// What came of a suite.
struct Measured {
    run: Run,
    figures: Vec<Figure>,
    /// Results of ours that were wrong.
    wrong: Vec<String>,
}

impl Measured {
    fn title(&self, of: &str) -> String {
        let Run { device, driver, revision, .. } = &self.run;
        format!("{of}, on {device}, driver {}, revision {revision}", driver.as_deref().unwrap_or("unknown"))
    }

    fn right(self) -> Result<(), String> {
        if self.wrong.is_empty() {
            return Ok(());
        }
        Err(format!("results of ours that are wrong:\n{}", self.wrong.join("\n")))
    }
}

/// Everybody in every case.
fn measure(
    suite: &'static str,
    cases: impl Iterator<Item = Spec>,
    plan: &Plan,
    choice: &Choice,
    report: &mut Report,
) -> Result<Measured, String> {
    let client = kernels::cuda()?;
    let (device, driver) = cuda_card().ok_or("expected nvidia-smi to name the card and its driver, found none")?;
    let run = Run::new(suite, device, Some(driver));
    let cases: Vec<Spec> = cases.filter(|case| plan.takes_name(&case.name())).collect();
    let elements = cases.iter().map(Spec::elements).max().ok_or("no case of that name")?;
    let kinds: Vec<Element> = [Element::BF16, Element::F16].into_iter().filter(|&kind| choice.has(kind)).collect();
    let folder = Rc::new(Folder::create(elements, &kinds)?);
    let script = Script::write(folder.path())?;
    let mut judge = script.child("judge", choice.limit)?;
    let mut entrants = Vec::new();
    for &name in &choice.names {
        let own = |choice| Kernels::new(name.text(), choice, client.clone(), folder.clone());
        let contestant: Box<dyn Contestant> = match name {
            Name::Hopper => Box::new(own(KernelChoice::Hopper)),
            Name::HopperUnordered => Box::new(own(KernelChoice::Hopper).unordered()),
            Name::Mma => Box::new(own(KernelChoice::Mma)),
            Name::Cmma => Box::new(own(KernelChoice::Cmma)),
            Name::Portable => Box::new(own(KernelChoice::Portable)),
            Name::Flashover | Name::Burn => Box::new(own_process(name, folder.path(), choice.limit)?),
            Name::Fa2 | Name::Cudnn | Name::FlexAttention => Box::new(script.child(name.text(), choice.limit)?),
        };
        entrants.push(Entrant { name, contestant });
    }
    println!("judged by {}", judge.about()?);
    let (mut figures, mut wrong) = (Vec::new(), Vec::new());
    let start = Instant::now();
    for spec in &cases {
        let (seconds, reason) = (start.elapsed().as_secs(), Kernels::reason(&client, spec)?);
        println!("[{seconds} s] {}: checking, then timing; Auto: {reason}", spec.name());
        spec.pattern.write_blocks(folder.path(), spec.heads, spec.seq)?;
        let field = Field { run: &run, spec, repeats: plan.repeats, results: folder.path().join("results") };
        figures.extend(field.measure(&mut entrants, &mut judge, report, &mut wrong)?);
    }
    Ok(Measured { run, figures, wrong })
}

impl Choice {
    fn has(&self, element: Element) -> bool {
        self.names.iter().any(|name| name.element() == element)
    }
}

/// `peers.py` in the folder, and the interpreter: `$FLASHOVER_PYTHON`, or `python3`.
pub struct Script {
    pub python: OsString,
    path: PathBuf,
    folder: PathBuf,
}

impl Script {
    /// Writes it there.
    pub fn write(folder: &Path) -> Result<Self, String> {
        let path = folder.join("peers.py");
        std::fs::write(&path, SCRIPT).map_err(|error| format!("writing {}: {error}", path.display()))?;
        let python = std::env::var_os("FLASHOVER_PYTHON").unwrap_or_else(|| "python3".into());
        Ok(Script { python, path, folder: folder.into() })
    }

    /// Its arguments for a contestant, the script first.
    pub fn arguments(&self, name: &str) -> Vec<OsString> {
        vec![self.path.clone().into(), self.folder.clone().into(), name.into()]
    }

    /// A contestant's process.
    pub fn child(&self, name: &'static str, limit: Duration) -> Result<Child, String> {
        let command = [self.python.clone()].into_iter().chain(self.arguments(name)).collect();
        Child::start(name, command, &self.folder, limit)
    }
}

/// This program, serving.
fn own_process(name: Name, folder: &Path, limit: Duration) -> Result<Child, String> {
    let program = std::env::current_exe().map_err(|error| format!("finding this program: {error}"))?;
    let arguments = ["peers".into(), "--serve".into(), name.text().into(), "--data".into(), folder.into()];
    Child::start(name.text(), [program.into()].into_iter().chain(arguments).collect(), folder, limit)
}

/// One case.
struct Field<'a> {
    run: &'a Run,
    spec: &'a Spec,
    repeats: usize,
    /// Where results are written to be judged.
    results: PathBuf,
}

impl Field<'_> {
    fn measure(
        &self,
        entrants: &mut [Entrant],
        judge: &mut Child,
        report: &mut Report,
        wrong: &mut Vec<String>,
    ) -> Result<Vec<Figure>, String> {
        let spec = self.spec;
        judge.load(spec)?;
        let mut all = Vec::new();
        let mut here: Vec<&mut Entrant> = Vec::new();
        for entrant in entrants.iter_mut().filter(|entrant| entrant.name.element().name() == spec.element) {
            match entrant.contestant.load(spec) {
                Ok(()) => here.push(entrant),
                Err(reason) => self.absent(report, entrant.name, "every pass", reason)?,
            }
        }
        // Who was right in the backward was right in both.
        let mut right: Vec<Name> = Vec::new();
        for pass in Pass::ALL {
            if pass != Pass::ForwardBackward {
                right.clear();
                for entrant in &mut here {
                    match self.judge(entrant, judge, pass) {
                        Ok(()) => right.push(entrant.name),
                        Err(reason) => {
                            if entrant.name.is_ours() {
                                wrong.push(format!("{}: {reason}", spec.name()));
                            }
                            self.absent(report, entrant.name, pass.name(), reason)?;
                        }
                    }
                }
            }
            let (mut names, mut turns, mut taken) = (Vec::new(), Vec::new(), Vec::new());
            for entrant in here.iter_mut().filter(|entrant| right.contains(&entrant.name)) {
                let name = entrant.name;
                // A family may leave a pass to another's kernels.
                let launches = entrant.contestant.launches(pass)?;
                if !launches.is_empty() && taken.contains(&launches) {
                    let names: Vec<&str> = launches.iter().map(|launch| launch.kernel).collect();
                    let reason = format!("the kernels are another family's: {}", names.join(", "));
                    self.absent(report, name, pass.name(), reason)?;
                    continue;
                }
                taken.push(launches);
                match Turn::new(&mut *entrant.contestant, pass) {
                    Ok(turn) => {
                        names.push(name);
                        turns.push(turn);
                    }
                    Err(reason) => self.absent(report, name, pass.name(), reason)?,
                }
            }
            interleave(&mut turns, self.repeats);
            let mut figures = Vec::new();
            for (name, turn) in names.into_iter().zip(turns) {
                match turn.outcome {
                    Ok(samples) => figures.push(Figure {
                        case: spec.name(),
                        spec: spec.clone(),
                        name: name.text(),
                        ours: name.is_ours(),
                        pass,
                        ms: timing::median(samples),
                    }),
                    Err(reason) => self.absent(report, name, pass.name(), reason)?,
                }
            }
            for row in figures::rows(self.run, &figures) {
                report.push(row)?;
            }
            all.append(&mut figures);
        }
        Ok(all)
    }

    fn judge(&self, entrant: &mut Entrant, judge: &mut Child, pass: Pass) -> Result<(), String> {
        let factor = entrant.factor();
        judged(&mut *entrant.contestant, judge, pass, &self.results, factor)
    }

    fn absent(&self, report: &mut Report, name: Name, what: &str, reason: String) -> Result<(), String> {
        report.absent(&Absent {
            suite: self.run.suite,
            case: self.spec.name(),
            of: name.text().into(),
            what: what.into(),
            not_measured: reason,
        })
    }
}

/// Whether a contestant's results are within `factor` errors of the naive reference, and the floor, of f64.
pub fn judged(
    contestant: &mut dyn Contestant,
    judge: &mut Child,
    pass: Pass,
    results: &Path,
    factor: f64,
) -> Result<(), String> {
    contestant.results(pass, results)?;
    for (tensor, [error, naive]) in judge.judge(pass, results)? {
        let budget = factor * naive + FLOOR;
        if error > budget {
            let name = contestant.name();
            return Err(format!(
                "{name}: {tensor}: error {error:.3e}, budget {budget:.3e} ({factor} × naive + {FLOOR})"
            ));
        }
    }
    Ok(())
}

/// A contestant's turns at one pass.
pub struct Turn<'a> {
    contestant: &'a mut dyn Contestant,
    pass: Pass,
    calls: usize,
    /// Milliseconds of a call, by turn, or why there are none.
    pub outcome: Result<Vec<f64>, String>,
}

impl<'a> Turn<'a> {
    /// Warms up, compiles and tunes what must be, and finds how many calls make a timed run.
    pub fn new(contestant: &'a mut dyn Contestant, pass: Pass) -> Result<Self, String> {
        contestant.milliseconds(pass, FEW)?;
        let estimate = contestant.milliseconds(pass, FEW)? / FEW as f64;
        let calls = FEW + (SPAN_MS / estimate).clamp(CALLS[0], CALLS[1]).round() as usize;
        Ok(Turn { contestant, pass, calls, outcome: Ok(Vec::new()) })
    }

    fn take(&mut self) {
        let Ok(samples) = &mut self.outcome else { return };
        let mut run = |calls| self.contestant.milliseconds(self.pass, calls);
        match run(FEW).and_then(|few| Ok((few, run(self.calls)?))) {
            Ok((few, many)) => samples.push((many - few) / (self.calls - FEW) as f64),
            Err(reason) => self.outcome = Err(reason),
        }
    }
}

/// Everybody in turn, so many times. Each waits for the GPU before it answers, so that nobody's work runs beside another's.
pub fn interleave(turns: &mut [Turn], repeats: usize) {
    for _ in 0..repeats {
        turns.iter_mut().for_each(Turn::take);
    }
}

/// Serves Burn's or our attention to another process.
pub fn serve(name: &str, data: PathBuf) -> Result<(), String> {
    let library = match name {
        "burn" => tensors::Library::Burn,
        "flashover" => tensors::Library::Flashover,
        other => return Err(format!("--serve: expected burn or flashover, got {other}")),
    };
    child::serve(&mut tensors::Tensors::new(library, Folder::open(data)), "Burn 0.22");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes `wait` ms to wait and `call` ms a call.
    struct Clock {
        wait: f64,
        call: f64,
        asked: Vec<usize>,
    }

    impl Contestant for Clock {
        fn name(&self) -> &'static str {
            "clock"
        }

        fn load(&mut self, _: &Spec) -> Result<(), String> {
            Ok(())
        }

        fn results(&mut self, _: Pass, _: &Path) -> Result<(), String> {
            Ok(())
        }

        fn milliseconds(&mut self, _: Pass, calls: usize) -> Result<f64, String> {
            self.asked.push(calls);
            if self.asked.len() > 8 { Err("tired".into()) } else { Ok(self.wait + self.call * calls as f64) }
        }
    }

    #[test]
    fn what_waiting_costs_does_not_count() {
        let mut clock = Clock { wait: 3.0, call: 1.0, asked: Vec::new() };
        let mut turns = vec![Turn::new(&mut clock, Pass::Forward).expect("it runs")];
        interleave(&mut turns, 3);
        let samples = turns.remove(0).outcome.expect("it runs");
        assert!(samples.len() == 3 && samples.iter().all(|ms| (ms - 1.0).abs() < 1e-9), "{samples:?}");
        // Estimated at 2.5 ms a call, waiting included.
        assert_eq!(clock.asked, [2, 2, 2, 12, 2, 12, 2, 12]);
    }

    #[test]
    fn who_fails_has_no_figure() {
        let mut clock = Clock { wait: 0.0, call: 1.0, asked: Vec::new() };
        let mut turns = vec![Turn::new(&mut clock, Pass::Forward).expect("it runs")];
        interleave(&mut turns, 5);
        assert_eq!(turns.remove(0).outcome, Err("tired".into()));
    }

    #[test]
    fn the_cases_are_those_of_the_issue() {
        let cases = cases(Element::BF16);
        assert_eq!((cases.len(), super::cases(Element::F16).len()), (12, 6));
        for case in &cases {
            assert_eq!((case.heads * case.dim, case.batch * case.seq), (2048, 16_384), "{}", case.name());
        }
        assert_eq!(cases[11].name(), "causal_b1_hq16_hkv16_s16384_d128_bf16");
        for name in Name::value_variants() {
            assert_eq!(name.to_possible_value().expect("not hidden").get_name(), name.text());
        }
    }
}
