//! The operands of a run as raw files: what every contestant reads, in whatever process and language it runs.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use flashover::kernels::problem::Element;
use flashover_testing::data::Rng;
use half::{bf16, f16};

/// The tensors: `NAME.bf16` and `NAME.f16` hold the same numbers, each rounded from f32.
pub const NAMES: [&str; 4] = ["q", "k", "v", "do"];

/// Elements that one stream of random numbers gives.
const CHUNK: usize = 1 << 18;

/// A folder of operands. One that was created is removed when it is dropped.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    created: bool,
}

impl Folder {
    /// Normally distributed operands of so many elements each, in a folder for temporary files.
    pub fn create(elements: usize, kinds: &[Element]) -> Result<Self, String> {
        let path = std::env::temp_dir().join(format!("flashover-bench-{}", std::process::id()));
        std::fs::create_dir_all(&path).map_err(|error| format!("creating {}: {error}", path.display()))?;
        let folder = Folder { path, created: true };
        for (n, name) in NAMES.iter().enumerate() {
            let numbers = normal(n as u64, elements);
            for &kind in kinds {
                let path = folder.file(name, kind);
                let written = File::create(&path).and_then(|mut file| file.write_all(&stored(&numbers, kind)));
                written.map_err(|error| format!("writing {}: {error}", path.display()))?;
            }
        }
        Ok(folder)
    }

    /// One that another process made.
    pub fn open(path: PathBuf) -> Self {
        Folder { path, created: false }
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The first `elements` of a tensor, as they are stored.
    pub fn read(&self, name: &str, kind: Element, elements: usize) -> Result<Vec<u8>, String> {
        let path = self.file(name, kind);
        let mut bytes = vec![0; elements * kind.bytes()];
        let read = File::open(&path).and_then(|mut file| file.read_exact(&mut bytes));
        read.map_err(|error| format!("reading {elements} elements of {}: {error}", path.display()))?;
        Ok(bytes)
    }

    fn file(&self, name: &str, kind: Element) -> PathBuf {
        self.path.join(format!("{name}.{}", kind.name()))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if self.created {
            // Nothing can be done about a folder that stays.
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}

/// Standard normal numbers; each seed gives others. The same on every machine, however many threads it has.
fn normal(seed: u64, elements: usize) -> Vec<f32> {
    let mut numbers = vec![0.0; elements];
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut chunks: Vec<(usize, &mut [f32])> = numbers.chunks_mut(CHUNK).enumerate().collect();
    let share = chunks.len().div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        for part in chunks.chunks_mut(share) {
            scope.spawn(move || {
                for (n, chunk) in part {
                    let mut rng = Rng::new(seed << 32 | *n as u64);
                    chunk.fill_with(|| rng.normal() as f32);
                }
            });
        }
    });
    numbers
}

fn stored(numbers: &[f32], kind: Element) -> Vec<u8> {
    match kind {
        Element::BF16 => numbers.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
        Element::F16 => numbers.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
        other => unreachable!("peers are compared in 16 bits, not in {}", other.name()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_read_the_same_numbers_and_the_folder_goes() {
        let elements = CHUNK + 100;
        let folder = Folder::create(elements, &[Element::BF16, Element::F16]).expect("room for files");
        let other = Folder::open(folder.path().to_path_buf());
        let read = |name, kind| -> Vec<f32> {
            let bytes = other.read(name, kind, elements).expect("there");
            let pairs = bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
            match kind {
                Element::BF16 => pairs.map(|b| bf16::from_le_bytes(b).to_f32()).collect(),
                _ => pairs.map(|b| f16::from_le_bytes(b).to_f32()).collect(),
            }
        };
        let (q, k) = (read("q", Element::BF16), read("k", Element::BF16));
        assert!(q != k && q[..100] != q[CHUNK..], "tensors and chunks differ");
        let close = q.iter().zip(read("q", Element::F16)).all(|(x, y)| (x - y).abs() <= 0.005 * x.abs() + 1e-6);
        assert!(close, "both types hold the same numbers");
        let mean_square = q.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / elements as f64;
        assert!((mean_square - 1.0).abs() < 0.02, "{mean_square}");
        let message = other.read("q", Element::F16, elements + 1).expect_err("not so many");
        assert!(message.contains("q.f16"), "{message}");
        let path = folder.path().to_path_buf();
        drop(other);
        assert!(path.exists());
        drop(folder);
        assert!(!path.exists());
    }
}
