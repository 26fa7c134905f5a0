//! `bench SUITE [--json FILE]`: flashover against its peers, in one run, on the same inputs.
//!
//! Every case passes a correctness gate before it is timed. Ours and the peer are timed alternately and compared by
//! their medians, because machines are noisy and a run's two halves need not be alike.

mod case;
mod gate;
mod gemm;
mod io;
mod memory;
mod peers;
mod report;
mod sparse;
mod suites;
mod timing;
mod torch;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, ValueEnum};

#[global_allocator]
static ALLOCATOR: memory::Counting = memory::Counting;

/// What can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Suite {
    /// The native CPU path against Burn's Flex, a GEMM, and PyTorch where it is at hand.
    Flex,
    /// The GPU that the build's features choose, against Burn's own attention.
    Gpu,
    /// An NVIDIA GPU: our kernels by name, Burn's attention, and through PyTorch FlashAttention-2, cuDNN and FlexAttention.
    Peers,
    /// An NVIDIA GPU: block plans of windows, documents and random blocks beside dense attention and FlexAttention.
    Sparse,
    /// An NVIDIA GPU: operations, bytes of memory by hardware counters, and time, of standard attention and of ours.
    Io,
}

/// flashover against its peers.
#[derive(Debug, Parser)]
struct Arguments {
    /// The suite to run.
    suite: Suite,
    /// Write one JSON row per figure to this file.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Times each figure is taken; the median counts.
    #[arg(long, default_value_t = 5)]
    repeats: usize,
    /// Only cases whose name contains this.
    #[arg(long)]
    only: Option<String>,
    /// Suites peers and sparse: who takes part; all but portable, or hopper, mma and flex_attention, unless named.
    #[arg(long, value_delimiter = ',')]
    contestants: Vec<peers::Name>,
    /// Suites peers, sparse and io: seconds that an answer of another library may take.
    #[arg(long, default_value_t = 90)]
    limit: u64,
    /// Suites peers and sparse: draw TFLOP/s against length, or time against density, into this PNG or SVG file.
    #[arg(long)]
    plot: Option<PathBuf>,
    /// Answer as this contestant to the process that started this one.
    #[arg(long, hide = true, requires = "data")]
    serve: Option<String>,
    /// Suite io: run this once and nothing else, for a profiler.
    #[arg(long, hide = true, requires = "data")]
    once: Option<String>,
    /// Where the operands lie.
    #[arg(long, hide = true)]
    data: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<(), String> {
    let data = arguments.data.unwrap_or_default();
    if let Some(name) = arguments.serve {
        return peers::serve(&name, data);
    }
    if let Some(name) = arguments.once {
        return io::once(&name, data);
    }
    let plan = suites::Plan { repeats: arguments.repeats.max(1), only: arguments.only };
    let limit = Duration::from_secs(arguments.limit);
    let mut report = report::Report::new(arguments.json)?;
    let ended = match arguments.suite {
        Suite::Flex => suites::flex(&plan, &mut report),
        Suite::Gpu => suites::gpu(&plan, &mut report),
        Suite::Peers | Suite::Sparse => {
            let sparse = arguments.suite == Suite::Sparse;
            let names = match arguments.contestants {
                names if !names.is_empty() => names,
                _ if sparse => peers::Name::SPARSE.into(),
                _ => peers::Name::USUAL.into(),
            };
            let choice = peers::Choice { names, limit, plot: arguments.plot };
            let run = if sparse { peers::run_sparse } else { peers::run };
            run(&plan, &choice, &mut report)
        }
        Suite::Io => io::run(&plan, limit, &mut report),
    };
    // Peers have tables of their own.
    if !matches!(arguments.suite, Suite::Peers | Suite::Sparse) {
        report::table(report.rows());
    }
    ended
}
