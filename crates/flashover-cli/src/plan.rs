//! `flashover plan`: from arguments to a query, and from a sweep to a table, JSON, CSV, pictures and reasons.

mod arguments;
mod output;
mod plot;
mod simulation;

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Instant;

use flashover_shard::ShardError;
use flashover_shard::planner::{self, Query, Sweep};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

pub use arguments::Arguments;

/// Why a plan was not made or not written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// The planner refused.
    #[error(transparent)]
    Shard(#[from] ShardError),
    /// A file could not be read.
    #[error("{path}: {error}")]
    Read {
        /// Its path.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// Standard output could not be written.
    #[error("output: {0}")]
    Output(#[from] io::Error),
    /// JSON could not be made.
    #[error("output: {0}")]
    Json(#[from] serde_json::Error),
    /// A picture could not be drawn.
    #[error("plot: {0}")]
    Plot(String),
    /// No candidate fits.
    #[error("no layout fits: {0}")]
    NothingFits(String),
    /// A simulated run is not what was planned.
    #[error("simulation: {0}")]
    Simulation(String),
}

/// Runs the subcommand.
///
/// # Errors
///
/// If the arguments are not sound, nothing fits, or an output cannot be written.
pub fn run(arguments: &Arguments) -> Result<(), PlanError> {
    let query = arguments.query()?;
    let start = Instant::now();
    let sweep = sweep(&query)?;
    let seconds = start.elapsed().as_secs_f64();
    let points = output::frontier(&query, &sweep);
    if points.iter().all(|(_, plans)| plans.is_empty()) {
        return Err(PlanError::NothingFits(output::nearest(&query, &sweep)));
    }
    let simulations = if arguments.simulate { simulation::run(&query, &points)? } else { Vec::new() };
    let mut out = io::stdout().lock();
    if arguments.json {
        output::json(&mut out, &query, (&sweep, &points), &simulations, seconds)?;
    } else if arguments.csv {
        output::csv(&mut out, &sweep)?;
    } else {
        output::table(&mut out, &query, &sweep, &points, seconds)?;
        simulation::table(&mut out, &simulations)?;
    }
    if arguments.why {
        output::reasons(&mut out, &query, &sweep, &points)?;
    }
    if let Some(path) = &arguments.plot {
        plot::draw(path, &query, &sweep)?;
        if !arguments.json && !arguments.csv {
            writeln!(out, "\npicture: {}", path.display())?;
        }
    }
    out.flush()?;
    simulation::verdict(&simulations)
}

/// The sweep, with a bar on standard error if that is a terminal. It shows itself only when there is time to look at it.
fn sweep(query: &Query) -> Result<Sweep, ShardError> {
    let bar = ProgressBar::with_draw_target(Some(query.meshes.len() as u64), ProgressDrawTarget::stderr_with_hz(10));
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {pos}/{len} meshes, {eta} left") {
        bar.set_style(style);
    }
    let sweep = planner::sweep_with(query, |done| bar.set_position(done as u64));
    bar.finish_and_clear();
    sweep
}
