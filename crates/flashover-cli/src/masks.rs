//! `flashover masks`: lists the patterns, and says and draws what a mask and its plan are.

mod draw;
mod expression;
mod patterns;

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use flashover::kernels::block_plan::picture::Picture;
use flashover::kernels::block_plan::{BlockPlan, TileSize};
use flashover::kernels::mask::{Extent, Mask, MaskError};

use expression::ExpressionError;

/// Arguments of `flashover masks`.
#[derive(Debug, Args)]
pub struct Arguments {
    /// A mask: patterns combined by `&`, `|`, `!` and parentheses, as in `causal & (sliding_window:512 | sinks:64)`. Without
    /// one, the patterns are listed.
    mask: Option<String>,
    /// Read the mask from a JSON file instead, as serde writes a `Mask`.
    #[arg(long, conflicts_with = "mask")]
    file: Option<PathBuf>,
    /// Number of keys, and of queries unless that is given.
    #[arg(long, default_value_t = 1024)]
    length: u32,
    /// Number of queries; the last one stands at the last key.
    #[arg(long)]
    queries: Option<u32>,
    /// Batch elements.
    #[arg(long, default_value_t = 1)]
    batch: u32,
    /// Query heads.
    #[arg(long, default_value_t = 1)]
    heads: u32,
    /// Queries and keys of a tile.
    #[arg(long, default_value = "128x128", value_parser = tile)]
    tile: TileSize,
    /// Draw points and tiles into this PNG or SVG file.
    #[arg(long)]
    plot: Option<PathBuf>,
    /// The head that is drawn.
    #[arg(long, default_value_t = 0)]
    head: u32,
    /// The batch element that is drawn.
    #[arg(long, default_value_t = 0)]
    element: u32,
    /// Print JSON, the mask itself included, which `--file` reads back.
    #[arg(long)]
    json: bool,
}

/// Why there is no mask, no plan, or no picture.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MasksError {
    /// The expression is none.
    #[error("mask: {0}")]
    Expression(#[from] ExpressionError),
    /// The mask does not fit the lengths.
    #[error("mask: {0}")]
    Mask(#[from] MaskError),
    /// A file could not be read.
    #[error("{path}: {error}")]
    Read {
        /// Its path.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// A file holds no mask.
    #[error("{path}: expected a mask as JSON: {error}")]
    File {
        /// Its path.
        path: PathBuf,
        /// Why.
        error: serde_json::Error,
    },
    /// A head or batch element that is not there.
    #[error("{what}: expected less than {limit}, got {found}")]
    OutOfRange {
        /// Which argument.
        what: &'static str,
        /// How many there are.
        limit: u32,
        /// What came.
        found: u32,
    },
    /// A picture could not be drawn.
    #[error("plot: {0}")]
    Plot(String),
    /// Standard output could not be written.
    #[error("output: {0}")]
    Output(#[from] io::Error),
}

/// Runs the subcommand.
///
/// # Errors
///
/// If the mask or its lengths are not sound, or an output cannot be written.
pub fn run(arguments: &Arguments) -> Result<(), MasksError> {
    let mut out = io::stdout().lock();
    let (queries, keys) = (arguments.queries.unwrap_or(arguments.length), arguments.length);
    let extent = Extent { batch: arguments.batch, heads: arguments.heads, seq_q: queries, seq_kv: keys };
    let mask = match (&arguments.mask, &arguments.file) {
        (Some(text), _) => expression::parse(text, extent)?,
        (None, Some(path)) => {
            let read = |error| MasksError::Read { path: path.clone(), error };
            let text = std::fs::read_to_string(path).map_err(read)?;
            mask_of_json(&text).map_err(|error| MasksError::File { path: path.clone(), error })?
        }
        (None, None) => {
            patterns::list(&mut out)?;
            return Ok(out.flush()?);
        }
    };
    for (what, limit, found) in
        [("--head", extent.heads, arguments.head), ("--element", extent.batch, arguments.element)]
    {
        if found >= limit {
            return Err(MasksError::OutOfRange { what, limit, found });
        }
    }
    let start = Instant::now();
    let plan = BlockPlan::new(&mask, extent, arguments.tile)?.refine();
    let seconds = start.elapsed().as_secs_f64();
    if let Some(path) = &arguments.plot {
        draw::draw(path, &Picture::new(&mask, extent, arguments.tile, arguments.element, arguments.head)?)?;
    }
    if arguments.json {
        let (full, partial) = plan.block_counts();
        let row = serde_json::json!({
            "mask": mask,
            "fingerprint": format!("{:016x}", mask.fingerprint()),
            "queries": queries,
            "keys": keys,
            "batch": plan.batch(),
            "heads": plan.heads(),
            "tile": arguments.tile,
            "full": full,
            "partial": partial,
            "bitmaps": plan.bitmap_count(),
            "density": plan.density(),
            "point_density": plan.point_density(),
            "bytes": plan.bytes(),
            "seconds": seconds,
        });
        writeln!(out, "{row}")?;
    } else {
        writeln!(out, "{queries} queries, {keys} keys: {plan}, built in {:.2} ms", seconds * 1e3)?;
        if let Some(path) = &arguments.plot {
            writeln!(out, "picture: {}", path.display())?;
        }
    }
    Ok(out.flush()?)
}

/// A mask by itself, or under `mask` in what `--json` prints.
fn mask_of_json(text: &str) -> serde_json::Result<Mask> {
    let value: serde_json::Value = serde_json::from_str(text)?;
    serde_json::from_value(value.get("mask").cloned().unwrap_or(value))
}

/// `64x128`.
fn tile(text: &str) -> Result<TileSize, String> {
    let sizes = text.split_once('x').and_then(|(bq, bk)| Some((bq.parse().ok()?, bk.parse().ok()?)));
    let (bq, bk) = sizes.ok_or_else(|| format!("expected queries x keys, as in 128x128, got {text:?}"))?;
    Ok(TileSize { bq, bk })
}
