//! Trains a small byte-level language model with flashover's attention, then compares it with Burn's own.
//!
//! ```sh
//! cargo run --release --bin quickstart
//! ```

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use examples::data::Corpus;
use examples::device::{self, Chosen};
use examples::memory::{Counted, CountingAllocator};
use examples::model::ModelConfig;
use examples::run_dir::{self, RunConfig};
use examples::train::{self, Span};
use examples::{Result, compare, plot, report, sample};

/// Attention heads of a block.
const HEADS: u32 = 4;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

/// Trains a small byte-level language model on a folder of text, writes a sample, and compares Burn's own attention with
/// flashover's. A second run goes on from the last checkpoint of the first.
#[derive(Parser, Debug, Clone)]
struct Arguments {
    /// Folder of text: all UTF-8 files beneath it [default: this repository's documentation and sources]
    #[arg(long, value_name = "DIR")]
    text: Option<PathBuf>,
    /// Where checkpoints, logs and the picture go
    #[arg(long, value_name = "DIR", default_value = "target/quickstart")]
    out: PathBuf,
    /// Start over: remove what an earlier run left in the directory
    #[arg(long)]
    fresh: bool,
    /// Device: flex, or cuda, rocm, metal, vulkan, webgpu if built in [default: the best of the build]
    #[arg(long, value_name = "NAME")]
    device: Option<String>,
    /// Epochs to train in this run
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    epochs: u32,
    /// Batches of an epoch
    #[arg(long, default_value_t = 150, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// Begin no epoch that would end after so many minutes of training
    #[arg(long, default_value_t = 2.5)]
    minutes: f64,
    /// Width of the model, a multiple of its 4 heads
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(4..=4096))]
    width: u32,
    /// Transformer blocks of the model
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=64))]
    layers: u32,
    /// Bytes that the model sees at once
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(2..=65536))]
    context: u32,
    /// Windows of a batch
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..))]
    batch: u32,
    /// Highest learning rate, reached after the warm-up
    #[arg(long, default_value_t = 3e-3)]
    learning_rate: f64,
    /// Text that the sample begins with [default: a piece of the held-out text]
    #[arg(long)]
    prompt: Option<String>,
    /// Bytes of the sample
    #[arg(long, default_value_t = 400)]
    sample: usize,
    /// Temperature of the sample: below 1 likelier, above 1 wilder
    #[arg(long, default_value_t = 0.8)]
    temperature: f64,
    /// Lengths of the comparison, growing
    #[arg(long, value_delimiter = ',', default_values_t = [256, 512, 1024, 2048, 4096])]
    lengths: Vec<usize>,
    /// Seconds that Burn's side may take for one line of the comparison; beyond, it is skipped, and says so
    #[arg(long, default_value_t = 45)]
    limit: u64,
    /// Only the comparison
    #[arg(long)]
    only_compare: bool,
    /// Plain lines instead of the terminal display
    #[arg(long)]
    plain: bool,
    /// A small run for tests: trains, resumes and compares within seconds
    #[arg(long)]
    smoke: bool,
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(mut arguments: Arguments) -> Result<()> {
    let start = Instant::now();
    check(&arguments)?;
    if let Some(name) = &arguments.device {
        // A loaded optimizer's state lies on Burn's default device at first: make that the chosen one, too.
        // SAFETY: no other thread runs yet.
        unsafe { std::env::set_var("BURN_DEVICE", name) };
    }
    let chosen = device::choose(arguments.device.as_deref())?;
    println!("Device: {}.", chosen.name);
    if arguments.smoke {
        arguments = smoke(arguments);
        train_and_sample(&arguments, &chosen)?;
        // The second run must find the first one's checkpoint.
        arguments.fresh = false;
        let from = train_and_sample(&arguments, &chosen)?;
        if from != arguments.epochs as usize {
            return Err(format!("smoke: expected to resume from epoch {}, got {from}", arguments.epochs).into());
        }
    } else if !arguments.only_compare {
        train_and_sample(&arguments, &chosen)?;
    }
    compare_and_draw(&arguments, &chosen)?;
    println!("Done in {:.0} s.", start.elapsed().as_secs_f64());
    Ok(())
}

fn check(arguments: &Arguments) -> Result<()> {
    if !arguments.width.is_multiple_of(HEADS) {
        return Err(format!("--width: expected a multiple of {HEADS}, got {}", arguments.width).into());
    }
    if !(arguments.temperature > 0.0 && arguments.temperature.is_finite()) {
        return Err(format!("--temperature: expected a number above 0, got {}", arguments.temperature).into());
    }
    if !(arguments.minutes > 0.0 && arguments.minutes < 1e6) {
        return Err(format!("--minutes: expected a number above 0, got {}", arguments.minutes).into());
    }
    if !(arguments.learning_rate > 0.0 && arguments.learning_rate.is_finite()) {
        return Err(format!("--learning-rate: expected a number above 0, got {}", arguments.learning_rate).into());
    }
    if arguments.lengths.contains(&0) || !arguments.lengths.is_sorted() {
        return Err(format!("--lengths: expected growing numbers above 0, got {:?}", arguments.lengths).into());
    }
    Ok(())
}

/// The sizes of the small run, in a directory of its own.
fn smoke(arguments: Arguments) -> Arguments {
    Arguments {
        out: arguments.out.join("smoke"),
        fresh: true,
        epochs: 2,
        steps: 20,
        width: 32,
        layers: 2,
        context: 64,
        sample: 40,
        lengths: vec![64, 128, 256],
        plain: true,
        ..arguments
    }
}

/// Returns the epoch that the run went on from.
fn train_and_sample(arguments: &Arguments, chosen: &Chosen) -> Result<usize> {
    let context = arguments.context as usize;
    let corpus = match &arguments.text {
        Some(folder) => Corpus::read(folder, context)?,
        None => Corpus::own_repository(context)?,
    };
    let kib = |bytes: &[u8]| bytes.len() as f64 / 1024.0;
    println!(
        "Text: {} files beneath {} ({} not UTF-8, skipped): {:.0} KiB to train on, {:.0} KiB held out.",
        corpus.files,
        corpus.folder.display(),
        corpus.skipped,
        kib(&corpus.train),
        kib(&corpus.valid)
    );
    let width = arguments.width as usize;
    let model = ModelConfig::new(width, 4 * width, HEADS as usize, arguments.layers as usize, context);
    let text = arguments.text.as_ref().map_or("(this repository)".into(), |_| corpus.folder.display().to_string());
    let (batch, steps) = (arguments.batch as usize, arguments.steps as usize);
    let config = RunConfig::new(text, model, batch, steps, arguments.learning_rate);
    let from = run_dir::open(&arguments.out, &config, arguments.fresh)?;
    let epochs = arguments.epochs as usize;
    let out = arguments.out.display();
    match from {
        0 => println!("Training from scratch: {epochs} epochs into {out}."),
        _ => println!("Resuming from epoch {from} of {out}: {epochs} more epochs (--fresh starts over)."),
    }

    let span = Span { from, epochs, limit: Duration::from_secs_f64(arguments.minutes * 60.0), plain: arguments.plain };
    let model = train::train(&arguments.out, &config, &corpus, span, &chosen.device)?;
    println!("\n{}", train::history(&arguments.out)?);

    let (prompt, temperature) = (prompt(arguments, &corpus), arguments.temperature);
    let text = sample::sample(&model, &prompt, arguments.sample, temperature, config.seed, &chosen.device)?;
    println!("Sample, temperature {temperature}; the model goes on after ‖:\n{prompt}‖{text}\n");
    Ok(from)
}

/// What the user gave, or some lines from the middle of the held-out text.
fn prompt(arguments: &Arguments, corpus: &Corpus) -> String {
    if let Some(prompt) = &arguments.prompt {
        return prompt.clone();
    }
    let middle = corpus.valid.len() / 2;
    let piece = &corpus.valid[middle - (arguments.context as usize / 2).min(160).min(middle)..middle];
    let text = String::from_utf8_lossy(piece).replace('\u{fffd}', "");
    text.split_once('\n').map_or(text.as_str(), |(_, lines)| lines).to_string()
}

fn compare_and_draw(arguments: &Arguments, chosen: &Chosen) -> Result<()> {
    let Arguments { lengths, out, limit, .. } = arguments;
    println!("{}", report::header(&chosen.name, Counted::on(&chosen.device), lengths));
    let show = |row: &compare::Row| println!("{}", report::row(row));
    let rows = compare::compare(&chosen.device, lengths, Duration::from_secs(*limit), show)?;
    let picture = out.join("attention.png");
    std::fs::create_dir_all(out).map_err(|error| format!("run directory: cannot write {}: {error}", out.display()))?;
    plot::draw(&rows, &chosen.name, &picture)?;
    println!("\nPicture: {}", absolute(&picture).display());
    Ok(())
}

fn absolute(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_path_buf())
}
