//! Random masks from a seed, for the tests of masks and of plans.

use super::super::*;

/// SplitMix64 (Steele et al., "Fast Splittable Pseudorandom Number Generators", 2014).
pub(crate) struct Random(pub u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ x >> 31
    }

    /// A number of `low ..= high`.
    pub(crate) fn within(&mut self, low: u32, high: u32) -> u32 {
        low + (self.next() % u64::from(high - low + 1)) as u32
    }

    pub(crate) fn chance(&mut self, percent: u32) -> bool {
        self.within(1, 100) <= percent
    }
}

/// Functions by head, batch element and position.
pub(crate) fn every_third(b: u32, h: u32, i: u32, j: u32) -> bool {
    (i + 2 * j + b + h).is_multiple_of(3)
}

pub(crate) fn checkers(_: u32, _: u32, i: u32, j: u32) -> bool {
    (i / 16 + j / 24).is_multiple_of(2)
}

/// The kinds of primitive that [`primitive`] makes.
pub(crate) const FAMILIES: [&str; 15] = [
    "everything or nothing",
    "causal",
    "window",
    "sliding window",
    "sinks",
    "prefix_lm",
    "documents",
    "dilated",
    "strided",
    "butterfly",
    "bigbird",
    "longformer",
    "from_blocks",
    "from_dense",
    "band",
];

/// A random primitive of a family whose numbers suit the lengths.
pub(crate) fn primitive(family: &str, extent: Extent, r: &mut Random) -> Mask {
    let Extent { batch, heads, seq_q, seq_kv } = extent;
    let longest = seq_q.max(seq_kv).max(1);
    match family {
        "everything or nothing" => [Mask::Everything, Mask::Nothing][r.within(0, 1) as usize].clone(),
        "causal" => Mask::causal(),
        "window" => Mask::window(r.within(0, longest), r.within(0, longest / 2)),
        "sliding window" => Mask::sliding_window(r.within(1, longest)),
        "sinks" => Mask::sinks(r.within(0, longest)),
        "prefix_lm" => Mask::prefix_lm(r.within(0, longest)),
        "documents" => documents(extent, r),
        "dilated" => Mask::dilated(r.within(0, longest / 2), r.within(0, longest / 2), r.within(1, 12)),
        "strided" => Mask::strided(r.within(1, longest)),
        "butterfly" => Mask::butterfly(r.within(1, longest.min(20))),
        "bigbird" => Mask::bigbird(BigBird {
            block: r.within(1, longest.min(20)),
            global: r.within(0, 2),
            window: r.within(0, 3),
            random: r.within(0, 3),
            seed: r.next(),
        }),
        "longformer" => {
            let tokens = r.within(0, 4);
            let length = r.within(1, 9);
            let starts: Vec<u32> = (0..tokens).map(|_| r.within(0, longest)).collect();
            let global = starts.iter().flat_map(|&start| (start..start + length).rev()).collect();
            Mask::longformer(r.within(0, longest / 2), global)
        }
        "from_blocks" => from_blocks(extent, r),
        "from_dense" => {
            let [batch, heads] = [batch, heads].map(|n| if r.chance(50) { n } else { 1 });
            let mut visible = Vec::new();
            // Runs of equal points, alike in neighbouring rows, so that tiles of every kind occur.
            let length = r.within(1, 30);
            let mut row: Vec<bool> = Vec::new();
            for i in 0..batch * heads * seq_q {
                if i % length == 0 {
                    row.clear();
                    while row.len() < seq_kv as usize {
                        let run = r.within(1, 30);
                        let value = r.chance(50);
                        row.extend((0..run).map(|_| value));
                    }
                }
                visible.extend_from_slice(&row[..seq_kv as usize]);
            }
            Mask::from_dense([batch, heads, seq_q, seq_kv], &visible).unwrap()
        }
        "band" => Mask::Band(Band {
            causal: r.chance(50),
            left: r.within(0, longest),
            right: r.within(0, longest / 2),
            sinks: r.within(0, longest / 2),
        }),
        other => unreachable!("{other}"),
    }
}

fn documents(extent: Extent, r: &mut Random) -> Mask {
    let batch = if r.chance(50) { extent.batch } else { 1 };
    let names = r.within(1, 5);
    let longest_run = r.within(1, 40);
    let mut ids = |length: u32| -> Vec<u32> {
        let mut ids = Vec::new();
        while ids.len() < length as usize {
            let id = if r.chance(10) { PADDING } else { 1000 - r.within(0, names) };
            ids.extend((0..r.within(1, longest_run)).map(|_| id));
        }
        ids.truncate(length as usize);
        ids
    };
    Mask::Documents(Documents {
        queries: (0..batch).map(|_| ids(extent.seq_q)).collect(),
        keys: (0..batch).map(|_| ids(extent.seq_kv)).collect(),
    })
}

fn from_blocks(extent: Extent, r: &mut Random) -> Mask {
    let [batch, heads] = [extent.batch, extent.heads].map(|n| if r.chance(50) { n } else { 1 });
    let block = [r.within(1, 24), r.within(1, 24)];
    let percent = r.within(10, 90);
    let (mut starts, mut columns) = (vec![0], Vec::new());
    for _ in 0..batch * heads * extent.seq_q.div_ceil(block[0]) {
        columns.extend((0..extent.seq_kv.div_ceil(block[1])).filter(|_| r.chance(percent)));
        starts.push(columns.len() as u32);
    }
    Mask::from_blocks(BlockTable { block, batch, heads, starts, columns })
}

/// A random expression of at most `depth` operations on a path.
pub(crate) fn expression(depth: u32, extent: Extent, r: &mut Random) -> Mask {
    if depth == 0 || r.chance(15) {
        if r.chance(8) {
            return match r.within(0, 1) {
                0 => Mask::function("every_third", every_third).unwrap(),
                _ => Mask::function_of_positions("checkers", checkers).unwrap(),
            };
        }
        return primitive(FAMILIES[r.within(1, FAMILIES.len() as u32 - 1) as usize], extent, r);
    }
    match r.within(0, 11) {
        0..4 => expression(depth - 1, extent, r) & expression(depth - 1, extent, r),
        4..8 => expression(depth - 1, extent, r) | expression(depth - 1, extent, r),
        8..10 => !expression(depth - 1, extent, r),
        10 => Mask::per_head((0..extent.heads).map(|_| expression(depth - 1, extent, r)).collect()),
        _ => Mask::per_batch((0..extent.batch).map(|_| expression(depth - 1, extent, r)).collect()),
    }
}
