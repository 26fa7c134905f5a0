//! `flashover`, the command line.

mod font;
mod masks;
mod plan;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use masks::MasksError;
use plan::PlanError;

#[derive(Parser)]
#[command(name = "flashover", version, about = "Masks of block-sparse attention, and partitioned inference, for Burn")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Plan partitioned inference: which layout, on which mesh, at which batch, and why.
    Plan(Box<plan::Arguments>),
    /// List the patterns of block-sparse attention; describe and draw a mask and its plan.
    Masks(masks::Arguments),
}

/// Why a subcommand failed.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Plan(PlanError),
    #[error(transparent)]
    Masks(MasksError),
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Plan(arguments) => plan::run(&arguments).map_err(Failure::Plan),
        Command::Masks(arguments) => masks::run(&arguments).map_err(Failure::Masks),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        // A reader that has seen enough, as in `flashover plan | head`, is no failure.
        Err(Failure::Plan(PlanError::Output(error)) | Failure::Masks(MasksError::Output(error)))
            if error.kind() == std::io::ErrorKind::BrokenPipe =>
        {
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("flashover: {error}");
            ExitCode::FAILURE
        }
    }
}
