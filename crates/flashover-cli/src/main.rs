//! `flashover`, the command line.

mod plan;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "flashover", version, about = "Attention and partitioned inference for Burn")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Plan partitioned inference: which layout, on which mesh, at which batch, and why.
    Plan(Box<plan::Arguments>),
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Plan(arguments) => plan::run(&arguments),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        // A reader that has seen enough, as in `flashover plan | head`, is no failure.
        Err(plan::PlanError::Output(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("flashover: {error}");
            ExitCode::FAILURE
        }
    }
}
