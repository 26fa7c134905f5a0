//! The patterns by name: what the command line offers of the mask algebra.

use std::io::{self, Write};

use flashover::kernels::mask::{BigBird, Extent, Mask};

/// A pattern.
pub struct Pattern {
    pub name: &'static str,
    /// Its numbers, as they are written after the colon.
    pub numbers: &'static str,
    /// What the query at position `a` sees.
    pub meaning: &'static str,
    /// The mask of these numbers, if they are as many as it takes, and such that it can be put together.
    pub make: fn(&[u32], Extent) -> Option<Mask>,
}

const fn pattern(
    name: &'static str,
    numbers: &'static str,
    meaning: &'static str,
    make: fn(&[u32], Extent) -> Option<Mask>,
) -> Pattern {
    Pattern { name, numbers, meaning, make }
}

/// All of them.
pub const PATTERNS: [Pattern; 13] = [
    pattern("everything", "", "every key", |n, _| n.is_empty().then_some(Mask::Everything)),
    pattern("nothing", "", "no key", |n, _| n.is_empty().then_some(Mask::Nothing)),
    pattern("causal", "", "keys up to its own position", |n, _| n.is_empty().then(Mask::causal)),
    pattern("sliding_window", "KEYS", "the last KEYS keys, its own included", |n, _| one(n).map(Mask::sliding_window)),
    pattern("window", "LEFT,RIGHT", "LEFT keys before its own and RIGHT behind", |n, _| match *n {
        [left, right] => Some(Mask::window(left, right)),
        _ => None,
    }),
    pattern("sinks", "KEYS", "the first KEYS keys (StreamingLLM)", |n, _| one(n).map(Mask::sinks)),
    pattern("prefix_lm", "KEYS", "the first KEYS keys, and keys up to its own position (T5)", |n, _| {
        one(n).map(Mask::prefix_lm)
    }),
    pattern("documents", "LENGTH", "its own document, documents being LENGTH tokens long", documents),
    pattern(
        "dilated",
        "LEFT,RIGHT,STEP",
        "every STEP-th key, LEFT of them before its own and RIGHT behind (Longformer)",
        |n, _| match *n {
            [left, right, step] => Some(Mask::dilated(left, right, step)),
            _ => None,
        },
    ),
    pattern("strided", "STEP", "every STEP-th key (Sparse Transformers)", |n, _| one(n).map(Mask::strided)),
    pattern(
        "butterfly",
        "BLOCK",
        "blocks whose number differs from its own in at most one binary digit (FlashAttention)",
        |n, _| one(n).map(Mask::butterfly),
    ),
    pattern(
        "bigbird",
        "BLOCK,GLOBAL,WINDOW,RANDOM[,SEED]",
        "GLOBAL first blocks, WINDOW blocks on each side, RANDOM ones (BigBird)",
        |n, _| match *n {
            [block, global, window, random, ref seed @ ..] if seed.len() <= 1 => {
                let seed = seed.first().copied().map_or(0, u64::from);
                Some(Mask::bigbird(BigBird { block, global, window, random, seed }))
            }
            _ => None,
        },
    ),
    pattern(
        "longformer",
        "WINDOW[,TOKEN…]",
        "WINDOW keys on each side; the TOKENs see, and are seen by, everything (Longformer)",
        |n, _| n.split_first().map(|(&window, tokens)| Mask::longformer(window, tokens.to_vec())),
    ),
];

/// The number, if there is one.
fn one(numbers: &[u32]) -> Option<u32> {
    match *numbers {
        [number] => Some(number),
        _ => None,
    }
}

/// Documents of so many tokens, above 0.
fn documents(numbers: &[u32], extent: Extent) -> Option<Mask> {
    let length = one(numbers).filter(|&length| length > 0)?;
    let keys = (0..extent.seq_kv).map(|j| j / length).collect();
    // Queries before the first key, if there are more queries than keys, belong to the first document.
    let shift = i64::from(extent.seq_kv) - i64::from(extent.seq_q);
    let query = |i: u32| (i64::from(i) + shift).max(0) as u32 / length;
    Some(Mask::documents((0..extent.seq_q).map(query).collect(), keys))
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
