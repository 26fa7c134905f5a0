//! Text as bytes: reading a folder, holding a part out, cutting windows, batching them.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::data::dataloader::batcher::Batcher;
use burn::data::dataloader::{DataLoader, DataLoaderBuilder};
use burn::data::dataset::transform::{SamplerDataset, SamplerDatasetOptions};
use burn::data::dataset::{Dataset, DatasetError};
use burn::tensor::{Device, Int, Tensor, TensorData};

use crate::Result;

/// More text than this is refused: it is held in memory.
const MOST_BYTES: usize = 256 << 20;
/// Of each file the last `1/HELD_OUT` is held out.
const HELD_OUT: usize = 10;
/// Endings that are read of this repository.
const OWN_ENDINGS: [&str; 3] = ["md", "rs", "toml"];

/// The text of a folder, each file's last tenth held out for validation.
#[derive(Debug)]
pub struct Corpus {
    /// The folder.
    pub folder: PathBuf,
    /// Files that were read.
    pub files: usize,
    /// Files that are not UTF-8 text.
    pub skipped: usize,
    /// Bytes to train on.
    pub train: Arc<[u8]>,
    /// Bytes held out.
    pub valid: Arc<[u8]>,
}

impl Corpus {
    /// All UTF-8 text files beneath `folder`, in the order of their paths; hidden ones and `target` folders aside.
    ///
    /// # Errors
    ///
    /// If the folder cannot be read, or holds too little text for windows of `context` bytes, or too much for memory.
    pub fn read(folder: &Path, context: usize) -> Result<Self> {
        Self::read_filtered(folder, context, |_| true)
    }

    /// The documentation and sources of this repository.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read); the repository must still lie where this program was built.
    pub fn own_repository(context: usize) -> Result<Self> {
        // Cargo says where it runs from; a program started by itself only knows where it was built, which with a shared
        // build cache may be another clone.
        let package = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
        let root = Path::new(&package).join("..");
        if !root.is_dir() {
            return Err(format!(
                "text: expected this repository at {}, where this program was built, found nothing; name a folder of \
                 text with --text",
                root.display()
            )
            .into());
        }
        let ending = |path: &Path| path.extension().is_some_and(|e| OWN_ENDINGS.iter().any(|own| e == *own));
        Self::read_filtered(&root, context, ending)
    }

    fn read_filtered(folder: &Path, context: usize, take: impl Fn(&Path) -> bool) -> Result<Self> {
        if !folder.is_dir() {
            let found = if folder.exists() { "a file" } else { "nothing" };
            return Err(format!("text: expected a folder at {}, found {found}", folder.display()).into());
        }
        let folder =
            &folder.canonicalize().map_err(|error| format!("text: cannot read {}: {error}", folder.display()))?;
        let mut paths = Vec::new();
        list(folder, &mut paths)?;
        paths.sort();
        let (mut train, mut valid) = (Vec::new(), Vec::new());
        let (mut files, mut skipped) = (0, 0);
        for path in paths.iter().filter(|path| take(path)) {
            let bytes = fs::read(path).map_err(|error| format!("text: cannot read {}: {error}", path.display()))?;
            if bytes.contains(&0) || str::from_utf8(&bytes).is_err() {
                skipped += 1;
                continue;
            }
            files += 1;
            let kept = bytes.len() - bytes.len() / HELD_OUT;
            train.extend_from_slice(&bytes[..kept]);
            valid.extend_from_slice(&bytes[kept..]);
            if train.len() + valid.len() > MOST_BYTES {
                return Err(format!(
                    "text: expected at most {} MiB of text in {}, found more",
                    MOST_BYTES >> 20,
                    folder.display()
                )
                .into());
            }
        }
        if valid.len() <= context {
            return Err(format!(
                "text: expected at least {} bytes of UTF-8 text in the files beneath {} (a tenth is held out, and must \
                 hold a window of {context} bytes and one more), found {} in {files} files ({skipped} files are not \
                 UTF-8 text)",
                (context + 1) * HELD_OUT,
                folder.display(),
                train.len() + valid.len(),
            )
            .into());
        }
        Ok(Corpus { folder: folder.to_path_buf(), files, skipped, train: train.into(), valid: valid.into() })
    }
}

fn list(folder: &Path, into: &mut Vec<PathBuf>) -> Result<()> {
    let cannot = |error| format!("text: cannot list {}: {error}", folder.display());
    for entry in fs::read_dir(folder).map_err(cannot)? {
        let entry = entry.map_err(cannot)?;
        let name = entry.file_name();
        let kind = entry.file_type().map_err(cannot)?;
        // Links are not followed: they may lead round in circles.
        if name.to_string_lossy().starts_with('.') || kind.is_symlink() {
            continue;
        }
        if kind.is_file() {
            into.push(entry.path());
        } else if kind.is_dir() && name != "target" {
            list(&entry.path(), into)?;
        }
    }
    Ok(())
}

/// Windows of `length` bytes of a text, one starting every `stride` bytes.
struct Windows {
    text: Arc<[u8]>,
    length: usize,
    stride: usize,
}

impl Dataset<Vec<u8>> for Windows {
    fn get(&self, index: usize) -> Result<Vec<u8>, DatasetError> {
        let start = index * self.stride;
        Ok(self.text[start..start + self.length].to_vec())
    }

    fn len(&self) -> usize {
        (self.text.len() + self.stride).saturating_sub(self.length) / self.stride
    }
}

/// Inputs and what follows them.
#[derive(Debug, Clone)]
pub struct Batch {
    /// Bytes, `[B, S]`.
    pub inputs: Tensor<2, Int>,
    /// The byte after each, `[B, S]`.
    pub targets: Tensor<2, Int>,
}

/// Makes a [`Batch`] of windows of `S + 1` bytes.
#[derive(Debug, Clone)]
struct ByteBatcher;

impl Batcher<Vec<u8>, Batch> for ByteBatcher {
    fn batch(&self, windows: Vec<Vec<u8>>, device: &Device) -> Batch {
        let (rows, length) = (windows.len(), windows[0].len() - 1);
        let part = |from: usize| {
            let bytes: Vec<i32> =
                windows.iter().flat_map(|w| w[from..from + length].iter().map(|byte| i32::from(*byte))).collect();
            Tensor::from_data(TensorData::new(bytes, [rows, length]), device)
        };
        Batch { inputs: part(0), targets: part(1) }
    }
}

/// An epoch of `steps` batches of `batch` windows, each of `context` bytes at a random place in the text.
pub fn train_loader(
    text: &Arc<[u8]>,
    context: usize,
    batch: usize,
    steps: usize,
    seed: u64,
    device: &Device,
) -> Arc<dyn DataLoader<Batch>> {
    let windows = Windows { text: text.clone(), length: context + 1, stride: 1 };
    let options = SamplerDatasetOptions::default().with_replacement().with_fixed_size(steps * batch).with_seed(seed);
    DataLoaderBuilder::new(ByteBatcher)
        .batch_size(batch)
        .set_device(device.clone())
        .build(SamplerDataset::new(windows, options))
}

/// At most `most` windows of `context` bytes, evenly spread over the text: the same in every epoch.
pub fn valid_loader(
    text: &Arc<[u8]>,
    context: usize,
    batch: usize,
    most: usize,
    device: &Device,
) -> Arc<dyn DataLoader<Batch>> {
    let stride = (text.len() / most).max(context + 1);
    let windows = Windows { text: text.clone(), length: context + 1, stride };
    DataLoaderBuilder::new(ByteBatcher).batch_size(batch).set_device(device.clone()).build(windows)
}
