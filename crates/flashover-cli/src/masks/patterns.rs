//! The patterns by name: what the command line offers of the mask algebra.

use std::io::{self, Write};
use std::ops::RangeInclusive;

use flashover::kernels::mask::{BigBird, Extent, Mask};

/// A pattern.
pub struct Pattern {
    pub name: &'static str,
    /// Its numbers, as they are written after the colon.
    pub numbers: &'static str,
    /// How many it takes.
    pub count: RangeInclusive<usize>,
    /// What the query at position `a` sees.
    pub meaning: &'static str,
    pub make: fn(&[u32], Extent) -> Mask,
}

/// All of them.
pub const PATTERNS: [Pattern; 13] = [
    Pattern { name: "everything", numbers: "", count: 0..=0, meaning: "every key", make: |_, _| Mask::Everything },
    Pattern { name: "nothing", numbers: "", count: 0..=0, meaning: "no key", make: |_, _| Mask::Nothing },
    Pattern {
        name: "causal",
        numbers: "",
        count: 0..=0,
        meaning: "keys up to its own position",
        make: |_, _| Mask::causal(),
    },
    Pattern {
        name: "sliding_window",
        numbers: "KEYS",
        count: 1..=1,
        meaning: "the last KEYS keys, its own included",
        make: |n, _| Mask::sliding_window(n[0]),
    },
    Pattern {
        name: "window",
        numbers: "LEFT,RIGHT",
        count: 2..=2,
        meaning: "LEFT keys before its own and RIGHT behind",
        make: |n, _| Mask::window(n[0], n[1]),
    },
    Pattern {
        name: "sinks",
        numbers: "KEYS",
        count: 1..=1,
        meaning: "the first KEYS keys (StreamingLLM)",
        make: |n, _| Mask::sinks(n[0]),
    },
    Pattern {
        name: "prefix_lm",
        numbers: "KEYS",
        count: 1..=1,
        meaning: "the first KEYS keys, and keys up to its own position (T5)",
        make: |n, _| Mask::prefix_lm(n[0]),
    },
    Pattern {
        name: "documents",
        numbers: "LENGTH",
        count: 1..=1,
        meaning: "its own document, documents being LENGTH tokens long",
        make: documents,
    },
    Pattern {
        name: "dilated",
        numbers: "LEFT,RIGHT,STEP",
        count: 3..=3,
        meaning: "every STEP-th key, LEFT of them before its own and RIGHT behind (Longformer)",
        make: |n, _| Mask::dilated(n[0], n[1], n[2]),
    },
    Pattern {
        name: "strided",
        numbers: "STEP",
        count: 1..=1,
        meaning: "every STEP-th key (Sparse Transformers)",
        make: |n, _| Mask::strided(n[0]),
    },
    Pattern {
        name: "butterfly",
        numbers: "BLOCK",
        count: 1..=1,
        meaning: "blocks whose number differs from its own in at most one binary digit (FlashAttention)",
        make: |n, _| Mask::butterfly(n[0]),
    },
    Pattern {
        name: "bigbird",
        numbers: "BLOCK,GLOBAL,WINDOW,RANDOM[,SEED]",
        count: 4..=5,
        meaning: "GLOBAL first blocks, WINDOW blocks on each side, RANDOM ones (BigBird)",
        make: |n, _| {
            let seed = n.get(4).copied().map_or(0, u64::from);
            Mask::bigbird(BigBird { block: n[0], global: n[1], window: n[2], random: n[3], seed })
        },
    },
    Pattern {
        name: "longformer",
        numbers: "WINDOW[,TOKEN…]",
        count: 1..=usize::MAX,
        meaning: "WINDOW keys on each side; the TOKENs see, and are seen by, everything (Longformer)",
        make: |n, _| Mask::longformer(n[0], n[1..].to_vec()),
    },
];

/// Documents of `n[0]` tokens; a length of 0 is one document, which the numbers' check refuses before.
fn documents(n: &[u32], extent: Extent) -> Mask {
    let keys: Vec<u32> = (0..extent.seq_kv).map(|j| j / n[0].max(1)).collect();
    // Queries before the first key, if there are more queries than keys, belong to the first document.
    let shift = i64::from(extent.seq_kv) - i64::from(extent.seq_q);
    let query = |i: u32| (i64::from(i) + shift).max(0) as u32 / n[0].max(1);
    Mask::documents((0..extent.seq_q).map(query).collect(), keys)
}

/// Prints the patterns.
pub fn list(out: &mut impl Write) -> io::Result<()> {
    writeln!(out, "A query sees, by pattern:\n")?;
    for Pattern { name, numbers, meaning, .. } in &PATTERNS {
        let written = if numbers.is_empty() { name.to_string() } else { format!("{name}:{numbers}") };
        writeln!(out, "  {written:<42} {meaning}")?;
    }
    writeln!(out, "\nThey combine with & (both), | (either), ! (not) and parentheses:\n")?;
    writeln!(out, "  flashover masks \"causal & (sliding_window:512 | sinks:64)\" --length 4096 --plot mask.png")
}
