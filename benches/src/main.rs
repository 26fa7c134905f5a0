//! `bench SUITE [--json FILE]`: flashover against its peers, in one run, on the same inputs.
//!
//! Every case passes a correctness gate before it is timed. Ours and the peer are timed alternately and compared by
//! their medians, because machines are noisy and a run's two halves need not be alike.

mod case;
mod gate;
mod gemm;
mod memory;
mod report;
mod sparse;
mod suites;
mod timing;
mod torch;

use std::path::PathBuf;
use std::process::ExitCode;

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
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let plan = suites::Plan { repeats: arguments.repeats.max(1), only: arguments.only };
    let measured = report::Report::new(arguments.json).and_then(|mut report| {
        let ended = match arguments.suite {
            Suite::Flex => suites::flex(&plan, &mut report),
            Suite::Gpu => suites::gpu(&plan, &mut report),
        };
        report::table(report.rows());
        ended
    });
    match measured {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}
