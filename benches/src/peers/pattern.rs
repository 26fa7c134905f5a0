//! Which keys the queries of a case see, as every contestant is told it.

use std::path::Path;

use flashover::SparsePlan;
use flashover::kernels::block_plan::TileSize;
use flashover::kernels::mask::{Band, BlockTable, Mask, UNBOUNDED};
use flashover_testing::data::Rng;
use serde::{Deserialize, Serialize};

/// Queries and keys of a random block.
const BLOCK: usize = SparsePlan::TILE.bq as usize;

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Pattern {
    /// All keys.
    Full,
    /// Those up to the query.
    Causal,
    /// The last `keys` up to the query, itself included.
    Window { keys: usize },
    /// Those of the query's own document; each has `length` positions. Up to the query, if `causal`.
    Documents { length: usize, causal: bool },
    /// `listed` random blocks of 128 × 128 in each block row of each head.
    RandomBlocks { listed: usize },
}

impl Pattern {
    /// Blocks of a row for about that fraction of all.
    pub fn listed(seq: usize, density: f64) -> usize {
        (density * seq.div_ceil(BLOCK) as f64).round() as usize
    }

    /// As a case's name begins.
    pub fn name(self, seq: usize) -> String {
        match self {
            Pattern::Full => "full".into(),
            Pattern::Causal => "causal".into(),
            Pattern::Window { keys } => format!("window{keys}"),
            Pattern::Documents { length, causal: false } => format!("documents{length}"),
            Pattern::Documents { length, causal: true } => format!("causal_documents{length}"),
            Pattern::RandomBlocks { .. } => format!("density{:.3}", self.visible(seq)),
        }
    }

    /// The band of a kernel's problem.
    pub fn band(self) -> Band {
        match self {
            Pattern::Causal => Band::causal(),
            Pattern::Window { keys } => Band { causal: true, left: keys as u32 - 1, right: UNBOUNDED, sinks: 0 },
            Pattern::Full | Pattern::Documents { .. } | Pattern::RandomBlocks { .. } => Band::default(),
        }
    }

    /// The mask of a kernel's block plan, if it takes one.
    pub fn mask(self, heads: usize, seq: usize) -> Option<Mask> {
        match self {
            Pattern::Full | Pattern::Causal | Pattern::Window { .. } => None,
            Pattern::Documents { length, causal } => {
                let ids: Vec<u32> = (0..seq).map(|i| (i / length) as u32).collect();
                let documents = Mask::documents(ids.clone(), ids);
                Some(if causal { documents & Mask::causal() } else { documents })
            }
            Pattern::RandomBlocks { listed } => Some(Mask::from_blocks(random_blocks(heads, seq, listed))),
        }
    }

    /// Visible points as a fraction of all, `causal` counted as the field counts it: a half.
    pub fn visible(self, seq: usize) -> f64 {
        let triangle = |n: usize| n as f64 * (n + 1) as f64 / 2.0;
        let points = match self {
            Pattern::Full => return 1.0,
            Pattern::Causal => return 0.5,
            Pattern::Window { keys } => triangle(keys.min(seq)) + seq.saturating_sub(keys) as f64 * keys as f64,
            Pattern::Documents { length, causal } => {
                let document = |n: usize| if causal { triangle(n) } else { (n * n) as f64 };
                (seq / length) as f64 * document(length) + document(seq % length)
            }
            Pattern::RandomBlocks { listed } => return listed as f64 / seq.div_ceil(BLOCK) as f64,
        };
        points / (seq as f64).powi(2)
    }

    /// Writes `blocks.u8` for contestants in other languages: a byte a block, `[heads, rows, columns]`.
    pub fn write_blocks(self, folder: &Path, heads: usize, seq: usize) -> Result<(), String> {
        let Pattern::RandomBlocks { listed } = self else { return Ok(()) };
        let columns = seq.div_ceil(BLOCK);
        let table = random_blocks(heads, seq, listed);
        let mut bytes = vec![0u8; heads * columns * columns];
        for (row, bytes) in bytes.chunks_exact_mut(columns).enumerate() {
            table.columns[row * listed..(row + 1) * listed].iter().for_each(|&column| bytes[column as usize] = 1);
        }
        let path = folder.join("blocks.u8");
        std::fs::write(&path, bytes).map_err(|error| format!("writing {}: {error}", path.display()))
    }
}

/// So many random blocks of 128 × 128 in each block row of each head.
fn random_blocks(heads: usize, seq: usize, listed: usize) -> BlockTable {
    let TileSize { bq, bk } = SparsePlan::TILE;
    let columns = seq.div_ceil(BLOCK);
    let mut rng = Rng::new(11);
    let (mut starts, mut all) = (vec![0], Vec::new());
    for _ in 0..heads * columns {
        let mut free: Vec<u32> = (0..columns as u32).collect();
        let mut row: Vec<u32> = (0..listed).map(|_| free.swap_remove(rng.below(free.len()))).collect();
        row.sort_unstable();
        all.append(&mut row);
        starts.push(all.len() as u32);
    }
    BlockTable { block: [bq, bk], batch: 1, heads: heads as u32, starts, columns: all }
}

#[cfg(test)]
mod tests {
    use flashover::kernels::block_plan::BlockPlan;
    use flashover::kernels::mask::Extent;

    use super::*;

    const ALL: [Pattern; 7] = [
        Pattern::Full,
        Pattern::Causal,
        Pattern::Window { keys: 100 },
        Pattern::Window { keys: 1000 },
        Pattern::Documents { length: 200, causal: false },
        Pattern::Documents { length: 200, causal: true },
        Pattern::RandomBlocks { listed: 2 },
    ];

    #[test]
    fn what_is_visible_is_counted() {
        for pattern in ALL {
            let seq = 768;
            let band = pattern.band();
            let points = match pattern.mask(2, seq) {
                None => {
                    let row = |i: usize| (0..seq).filter(|&j| band.allows(i as i32, j as i32)).count();
                    (0..seq).map(row).sum::<usize>() as f64
                }
                Some(mask) => {
                    let extent = Extent { batch: 1, heads: 2, seq_q: seq as u32, seq_kv: seq as u32 };
                    let plan = BlockPlan::new(&mask, extent, SparsePlan::TILE).expect("sound");
                    plan.points() as f64 / f64::from(plan.heads())
                }
            };
            // The diagonal is what the field does not count.
            let diagonal = if pattern == Pattern::Causal { seq as f64 / 2.0 } else { 0.0 };
            let counted = pattern.visible(seq) * (seq * seq) as f64;
            assert!((counted + diagonal - points).abs() < 1e-6, "{pattern:?}: {counted}, not {points}");
        }
        assert_eq!(ALL[6].name(768), "density0.333");
    }

    #[test]
    fn written_blocks_are_those_of_the_mask() {
        let folder = std::env::temp_dir().join(format!("flashover-blocks-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("room for files");
        let (heads, seq, listed) = (3, 1000, 5);
        Pattern::RandomBlocks { listed }.write_blocks(&folder, heads, seq).expect("written");
        let bytes = std::fs::read(folder.join("blocks.u8")).expect("there");
        std::fs::remove_dir_all(&folder).expect("there");
        let table = random_blocks(heads, seq, listed);
        for (row, bytes) in bytes.chunks(8).enumerate() {
            let listed: Vec<u32> = (0..8).filter(|&column| bytes[column as usize] == 1).collect();
            let range = table.starts[row] as usize..table.starts[row + 1] as usize;
            assert_eq!(listed, table.columns[range], "row {row}");
        }
        assert_eq!(bytes.len(), heads * 8 * 8);
    }
}
