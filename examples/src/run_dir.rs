//! The directory of a training run: its configuration, its checkpoints, its logs.

use std::fs;
use std::path::{Path, PathBuf};

use burn::config::{Config, config_to_json};
use burn::optim::OptimizerRecord;
use burn::optim::lr_scheduler::LrSchedulerRecord;
use burn::store::ModuleRecord;

use crate::Result;
use crate::model::ModelConfig;

const CONFIG: &str = "config.json";
const CHECKPOINT: &str = "checkpoint";
const PARTS: [&str; 3] = ["model", "optim", "scheduler"];
/// What a run writes, and a fresh start removes.
const FOLDERS: [&str; 3] = [CHECKPOINT, "train", "valid"];
const FILES: [&str; 2] = [CONFIG, "experiment.log"];

/// What a checkpoint depends on.
#[derive(Config, Debug, PartialEq)]
pub struct RunConfig {
    /// Folder of the text.
    pub text: String,
    /// Shape of the model.
    pub model: ModelConfig,
    /// Windows of a batch.
    pub batch: usize,
    /// Batches of an epoch.
    pub steps: usize,
    /// Highest learning rate, reached after the warm-up.
    pub learning_rate: f64,
    /// Steps over which the learning rate rises; it then falls with the square root of the step.
    #[config(default = 30)]
    pub warm_up: usize,
    /// Seed of the weights and the batches.
    #[config(default = 42)]
    pub seed: u64,
}

/// Opens `directory` for a run of `config` and returns the last epoch that it has a checkpoint of, 0 if none. `fresh`
/// removes what an earlier run left there.
///
/// # Errors
///
/// If the directory cannot be written, or holds checkpoints of another configuration.
pub fn open(directory: &Path, config: &RunConfig, fresh: bool) -> Result<usize> {
    let cannot = |error| format!("run directory: cannot write {}: {error}", directory.display());
    fs::create_dir_all(directory).map_err(cannot)?;
    if fresh {
        clear(directory).map_err(cannot)?;
    }
    let epoch = last_checkpoint(directory);
    if epoch > 0 {
        same_configuration(directory, config)?;
    }
    config.save(directory.join(CONFIG)).map_err(cannot)?;
    Ok(epoch)
}

fn clear(directory: &Path) -> std::io::Result<()> {
    let present = |name: &&&str| directory.join(name).exists();
    for name in FOLDERS.iter().filter(present) {
        fs::remove_dir_all(directory.join(name))?;
    }
    for name in FILES.iter().filter(present) {
        fs::remove_file(directory.join(name))?;
    }
    Ok(())
}

fn same_configuration(directory: &Path, config: &RunConfig) -> Result<()> {
    let start_over = "pass --fresh to start over, or --out with another directory";
    let saved = RunConfig::load(directory.join(CONFIG)).map_err(|error| {
        format!(
            "run directory: expected the configuration of the checkpoints in {}: {error}; {start_over}",
            directory.display()
        )
    })?;
    if saved == *config {
        return Ok(());
    }
    let (saved, asked) = (config_to_json(&saved), config_to_json(config));
    let differences: Vec<String> = saved
        .lines()
        .zip(asked.lines())
        .filter(|(saved, asked)| saved != asked)
        .map(|(saved, asked)| {
            let value = asked.split_once(": ").map_or(asked, |(_, value)| value);
            format!("{} there, {} asked for", saved.trim().trim_end_matches(','), value.trim_end_matches(','))
        })
        .collect();
    Err(format!(
        "run directory: the checkpoints in {} are of another configuration ({}); {start_over}",
        directory.display(),
        differences.join("; ")
    )
    .into())
}

/// The last epoch whose checkpoint can be read whole; what cannot be read (the program was stopped while it wrote) is
/// reported and passed over.
fn last_checkpoint(directory: &Path) -> usize {
    let folder = directory.join(CHECKPOINT);
    let names = fs::read_dir(&folder).into_iter().flatten().flatten().map(|entry| entry.file_name());
    let mut epochs: Vec<usize> =
        names.filter_map(|name| name.to_str()?.strip_prefix("model-")?.strip_suffix(".bpk")?.parse().ok()).collect();
    epochs.sort_unstable_by(|a, b| b.cmp(a));
    for epoch in epochs {
        match readable(&folder, epoch) {
            Ok(()) => return epoch,
            Err(error) => println!("Checkpoint of epoch {epoch} passed over: {error}"),
        }
    }
    0
}

fn readable(folder: &Path, epoch: usize) -> Result<()> {
    let [model, optimizer, scheduler] = PARTS.map(|part| folder.join(format!("{part}-{epoch}.bpk")));
    let in_file = |path: &PathBuf, error: String| format!("{}: {error}", path.display());
    ModuleRecord::load(&model).map_err(|error| in_file(&model, error.to_string()))?;
    OptimizerRecord::load(&optimizer).map_err(|error| in_file(&optimizer, error.to_string()))?;
    LrSchedulerRecord::load(&scheduler).map_err(|error| in_file(&scheduler, error.to_string()))?;
    Ok(())
}
