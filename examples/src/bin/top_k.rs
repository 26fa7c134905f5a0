//! What choosing key tiles by pooled scores costs on real attention: trains the byte-level model of `quickstart` briefly, and
//! takes its attention on held-out text.
//!
//! ```sh
//! cargo run --release --bin top_k
//! ```

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use examples::Result;
use examples::data::Corpus;
use examples::device;
use examples::model::ModelConfig;
use examples::run_dir::{self, RunConfig};
use examples::top_k::{Choice, measure};
use examples::train::{self, Span};

/// Attention heads of a block, and blocks.
const HEADS: usize = 4;
const LAYERS: usize = 3;

/// Trains a small byte-level language model, then replaces its attention by attention over the best tiles of keys and tables
/// what is lost.
#[derive(Parser, Debug, Clone)]
struct Arguments {
    /// Folder of text: all UTF-8 files beneath it [default: this repository's documentation and sources]
    #[arg(long, value_name = "DIR")]
    text: Option<PathBuf>,
    /// Where checkpoints and logs go
    #[arg(long, value_name = "DIR", default_value = "target/top_k")]
    out: PathBuf,
    /// Device: flex, or cuda, rocm, metal, vulkan, webgpu if built in [default: the best of the build]
    #[arg(long, value_name = "NAME")]
    device: Option<String>,
    /// Without ALiBi, which TopK does not look at
    #[arg(long)]
    no_alibi: bool,
    /// Epochs of 150 batches to train
    #[arg(long, default_value_t = 4)]
    epochs: usize,
    /// Bytes that the model sees at once in training
    #[arg(long, default_value_t = 512)]
    context: usize,
    /// Bytes of the windows of held-out text that attention is measured on
    #[arg(long, default_value_t = 2048)]
    length: usize,
    /// Windows
    #[arg(long, default_value_t = 4)]
    windows: usize,
    /// Queries and keys of a tile
    #[arg(long, default_value_t = 64)]
    tile: u32,
    /// Key tiles that a query tile keeps, one row of the table each
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2, 4, 8, 16])]
    blocks: Vec<u32>,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let Arguments { context, length, windows, tile, .. } = *arguments;
    if context < 2 || length == 0 || windows == 0 || arguments.epochs == 0 {
        return Err("expected a --context of at least 2, and --length, --windows and --epochs of at least 1".into());
    }
    if let Some(name) = &arguments.device {
        // SAFETY: no other thread runs yet.
        unsafe { std::env::set_var("BURN_DEVICE", name) };
    }
    let chosen = device::choose(arguments.device.as_deref())?;
    let longest = context.max(length);
    let corpus = match &arguments.text {
        Some(folder) => Corpus::read(folder, longest)?,
        None => Corpus::own_repository(longest)?,
    };
    let model = ModelConfig::new(128, 512, HEADS, LAYERS, context).with_alibi(!arguments.no_alibi);
    let config = RunConfig::new(corpus.folder.display().to_string(), model, 2, 150, 3e-3);
    let from = run_dir::open(&arguments.out, &config, true)?;
    let span = Span { from, epochs: arguments.epochs, limit: Duration::from_secs(3600), plain: true };
    let model = train::train(&arguments.out, &config, &corpus, span, &chosen.device)?;

    let most = (corpus.valid.len() - length - 1) / windows.max(2).saturating_sub(1);
    let held_out: Vec<Vec<u8>> = (0..windows).map(|n| corpus.valid[n * most..][..length + 1].to_vec()).collect();
    println!(
        "\n{}; {LAYERS} blocks of {HEADS} heads of 32, {}, trained for {} steps of 2 × {context} bytes; {windows} windows \
         of {length} held-out bytes, tiles of {tile} × {tile}.\n",
        chosen.name,
        if arguments.no_alibi { "no positions" } else { "ALiBi" },
        150 * arguments.epochs,
    );
    println!("| key tiles | density | mass kept | worst head | output error | bits/byte |\n|---|---|---|---|---|---|");
    let best = arguments.blocks.iter().map(|&n| Choice::Best(n));
    let last = arguments.blocks.iter().map(|&n| Choice::Last(n));
    for choice in best.chain(last).chain([Choice::Dense]) {
        println!("{}", measure(&model, &held_out, tile, choice, &chosen.device)?);
    }
    Ok(())
}
