//! Masks as plain data: what a query sees, put together from few primitives.
//!
//! `true` attends here, everywhere below the public boundary; Burn's boolean masks (`true` hides) are converted
//! once, where they enter. Positions are aligned to the bottom right: query `i` stands at `a = i + Skv − Sq` on the
//! key axis, so that the last query sees the last key.
//!
//! A [`Mask`] is an expression that can be kept in a file. [`Mask::bind`] checks it against lengths and heads; the
//! [`BoundMask`] says of a point whether it is visible, and of a tile whether it is Empty, Full or Partial, without
//! visiting its points. A [`BlockPlan`](crate::block_plan::BlockPlan) lists the tiles that a kernel walks.
//!
//! ```
//! use flashover_kernels::mask::{Extent, Mask, TileKind};
//!
//! // StreamingLLM: the last 64 keys and the first four.
//! let mask = Mask::causal() & (Mask::sliding_window(64) | Mask::sinks(4));
//! let bound = mask.bind(Extent { batch: 1, heads: 8, seq_q: 1000, seq_kv: 1000 })?;
//! assert!(bound.allows(0, 0, 500, 3) && !bound.allows(0, 0, 500, 4));
//! assert_eq!(bound.classify(0, 0, 512..544, 480..512), TileKind::Full);
//! assert_eq!(bound.classify(0, 0, 512..544, 128..160), TileKind::Empty);
//! # Ok::<(), flashover_kernels::mask::MaskError>(())
//! ```

#[allow(missing_docs)] // CubeCL's macros generate public items without docs; ours have theirs.
mod band;
mod bigbird;
mod blocks;
mod bound;
mod butterfly;
mod dense;
mod dilated;
mod documents;
pub(crate) mod error;
mod fingerprint;
mod function;
mod longformer;
pub(crate) mod primitive;
mod reduce;
pub(crate) mod spans;
mod table;
#[cfg(test)]
pub(crate) mod tests;

use serde::{Deserialize, Serialize};

use self::band::BoundBand;
pub use self::band::{Band, TileKind, UNBOUNDED, band_allows, band_keys, band_tile_empty, band_tile_full};
pub use self::bigbird::BigBird;
pub use self::bound::BoundMask;
pub use self::butterfly::Butterfly;
pub use self::dense::DenseMask;
pub use self::dilated::Dilated;
pub use self::documents::{Documents, PADDING};
pub use self::error::MaskError;
use self::fingerprint::Fingerprint;
pub use self::function::{Function, PointFunction, register};
pub use self::longformer::Longformer;
pub use self::table::BlockTable;
use crate::problem::{Problem, ProblemError};

/// Lengths and heads that a mask covers: `[B, Hq, Sq, Skv]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Extent {
    /// Batch elements.
    pub batch: u32,
    /// Query heads.
    pub heads: u32,
    /// Queries.
    pub seq_q: u32,
    /// Keys.
    pub seq_kv: u32,
}

impl Extent {
    /// `Skv − Sq`: what turns a query's index into its position on the key axis.
    pub fn shift(&self) -> i32 {
        self.seq_kv as i32 - self.seq_q as i32
    }

    /// Batch elements times heads.
    pub(crate) fn planes(&self) -> usize {
        self.batch as usize * self.heads as usize
    }

    pub(crate) fn validate(&self) -> Result<(), MaskError> {
        for (what, length) in [("queries", self.seq_q), ("keys", self.seq_kv)] {
            if length > i32::MAX as u32 / 4 {
                return Err(ProblemError::TooLong { what, found: length as usize }.into());
            }
        }
        Ok(())
    }
}

impl From<&Problem> for Extent {
    fn from(problem: &Problem) -> Self {
        // A validated problem has lengths that fit; so have a batch and heads of any tensor that exists.
        let [batch, heads, seq_q, seq_kv] = problem.score_shape().map(|n| n.try_into().unwrap_or(u32::MAX));
        Extent { batch, heads, seq_q, seq_kv }
    }
}

/// Which keys each query sees: an expression over primitives, combined with `&`, `|` and `!`.
///
/// Plain data: numbers that make no sense are found by [`bind`](Mask::bind), whether they come from code or a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Mask {
    /// Every key.
    Everything,
    /// No key.
    Nothing,
    /// Causal order, a window, and sinks in one.
    Band(Band),
    /// The last `keys` keys, the query's own included.
    SlidingWindow {
        /// Number of keys.
        keys: u32,
    },
    /// The first `keys` keys.
    Sinks {
        /// Number of keys.
        keys: u32,
    },
    /// Every d-th key.
    Dilated(Dilated),
    /// The keys of the query's document.
    Documents(Documents),
    /// FlashAttention's fixed block pattern.
    Butterfly(Butterfly),
    /// Global, neighbouring and random blocks.
    BigBird(BigBird),
    /// A window and global tokens.
    Longformer(Longformer),
    /// Listed blocks.
    Blocks(BlockTable),
    /// Listed points.
    Dense(DenseMask),
    /// A registered function.
    Function(Function),
    /// A mask for each query head.
    PerHead(Vec<Mask>),
    /// A mask for each batch element.
    PerBatch(Vec<Mask>),
    /// What both see.
    And(Box<Mask>, Box<Mask>),
    /// What either sees.
    Or(Box<Mask>, Box<Mask>),
    /// What the other does not see.
    Not(Box<Mask>),
}

impl Mask {
    /// Keys up to the query's own position.
    pub fn causal() -> Self {
        Mask::Band(Band::causal())
    }

    /// The last `keys` keys, the query's own included: `a − keys < j ≤ a`. At least 1.
    pub fn sliding_window(keys: u32) -> Self {
        Mask::SlidingWindow { keys }
    }

    /// Keys with `a − left ≤ j ≤ a + right`.
    pub fn window(left: u32, right: u32) -> Self {
        Mask::Band(Band { left, right, ..Band::default() })
    }

    /// The first `keys` keys, for every query, also one before them: combine with `& causal()` where that matters
    /// (StreamingLLM, Xiao et al., arXiv 2309.17453). Per batch element, `per_batch` of these are key lengths.
    pub fn sinks(keys: u32) -> Self {
        Mask::Sinks { keys }
    }

    /// The first `keys` keys for every query, and causal order behind them (Raffel et al., arXiv 1910.10683, figure 4).
    pub fn prefix_lm(keys: u32) -> Self {
        // A window that reaches all that is before the query, and sinks that bypass it.
        Mask::Band(Band { right: 0, sinks: keys, ..Band::default() })
    }

    /// Tokens of equal segment id see each other, in all batch elements alike. Ids are any numbers in any order;
    /// [`PADDING`] sees nothing and is seen by nothing.
    pub fn documents(queries: Vec<u32>, keys: Vec<u32>) -> Self {
        Mask::Documents(Documents { queries: vec![queries], keys: vec![keys] })
    }

    /// Keys `a + t · dilation` for `−left ≤ t ≤ right` (Longformer's dilated window).
    pub fn dilated(left: u32, right: u32, dilation: u32) -> Self {
        Mask::Dilated(Dilated { left, right, dilation })
    }

    /// Keys at a multiple of `stride` from the query (Sparse Transformers' second head; the first is a window).
    pub fn strided(stride: u32) -> Self {
        Mask::Dilated(Dilated { left: UNBOUNDED, right: UNBOUNDED, dilation: stride })
    }

    /// FlashAttention's fixed butterfly of `block × block` blocks, see [`Butterfly`].
    pub fn butterfly(block: u32) -> Self {
        Mask::Butterfly(Butterfly { block })
    }

    /// BigBird's global, neighbouring and random blocks, see [`BigBird`].
    pub fn bigbird(shape: BigBird) -> Self {
        Mask::BigBird(shape)
    }

    /// A window of `window` keys on each side, and global tokens at the given positions, see [`Longformer`].
    pub fn longformer(window: u32, global: Vec<u32>) -> Self {
        Mask::Longformer(Longformer { window, global })
    }

    /// Listed blocks, see [`BlockTable`].
    pub fn from_blocks(table: BlockTable) -> Self {
        Mask::Blocks(table)
    }

    /// A dense mask, `shape` being `[B, H, Sq, Skv]` in row-major order with `B` and `H` possibly 1. `true` attends.
    ///
    /// Takes a bit a point.
    pub fn from_dense(shape: [u32; 4], visible: &[bool]) -> Result<Self, MaskError> {
        DenseMask::new(shape, visible).map(Mask::Dense)
    }

    /// A function `(b, h, i, j) → visible` of the user, registered under a name that the mask keeps.
    ///
    /// Nothing is known about it without calling it: a plan calls it for every point that the masks it is combined with
    /// leave open, in every batch element and head. Where it looks at neither, say so by
    /// [`function_of_positions`](Mask::function_of_positions).
    pub fn function(name: &str, function: impl PointFunction) -> Result<Self, MaskError> {
        register(name, function)?;
        Ok(Mask::Function(Function { name: name.into(), by_batch: true, by_head: true }))
    }

    /// A function that looks at the query and the key only. It is called with `b = h = 0`.
    pub fn function_of_positions(name: &str, function: impl PointFunction) -> Result<Self, MaskError> {
        register(name, function)?;
        Ok(Mask::Function(Function { name: name.into(), by_batch: false, by_head: false }))
    }

    /// A mask for each query head.
    pub fn per_head(masks: Vec<Mask>) -> Self {
        Mask::PerHead(masks)
    }

    /// A mask for each batch element.
    pub fn per_batch(masks: Vec<Mask>) -> Self {
        Mask::PerBatch(masks)
    }

    /// Whether batch elements may differ. If not, one plan serves them all.
    pub fn varies_by_batch(&self) -> bool {
        match self {
            Mask::Documents(documents) => documents.varies_by_batch(),
            Mask::Blocks(table) => table.batch != 1,
            Mask::Dense(points) => points.shape()[0] != 1,
            Mask::Function(function) => function.by_batch,
            Mask::PerBatch(_) => true,
            _ => self.operands().iter().any(|mask| mask.varies_by_batch()),
        }
    }

    /// Whether query heads may differ. If not, one plan serves them all.
    pub fn varies_by_head(&self) -> bool {
        match self {
            Mask::Blocks(table) => table.heads != 1,
            Mask::Dense(points) => points.shape()[1] != 1,
            Mask::Function(function) => function.by_head,
            Mask::PerHead(_) => true,
            _ => self.operands().iter().any(|mask| mask.varies_by_head()),
        }
    }

    /// The masks that this one is put together from.
    fn operands(&self) -> Vec<&Mask> {
        match self {
            Mask::PerHead(masks) | Mask::PerBatch(masks) => masks.iter().collect(),
            Mask::And(l, r) | Mask::Or(l, r) => vec![l, r],
            Mask::Not(mask) => vec![mask],
            _ => Vec::new(),
        }
    }

    /// A number that tells masks apart, the same on every machine. A function counts by its name.
    pub fn fingerprint(&self) -> u64 {
        let mut out = Fingerprint::new();
        self.feed(&mut out);
        out.finish()
    }

    fn feed(&self, out: &mut Fingerprint) {
        let operands = self.operands();
        out.words(&[self.tag(), operands.len() as u32]);
        operands.iter().for_each(|mask| mask.feed(out));
        match self {
            Mask::Band(band) => band.fingerprint(out),
            Mask::SlidingWindow { keys } | Mask::Sinks { keys } => out.word(*keys),
            Mask::Dilated(shape) => shape.fingerprint(out),
            Mask::Documents(documents) => documents.fingerprint(out),
            Mask::Butterfly(shape) => shape.fingerprint(out),
            Mask::BigBird(shape) => shape.fingerprint(out),
            Mask::Longformer(shape) => shape.fingerprint(out),
            Mask::Blocks(table) => table.fingerprint(out),
            Mask::Dense(points) => points.fingerprint(out),
            Mask::Function(function) => function.fingerprint(out),
            Mask::Everything | Mask::Nothing | Mask::PerHead(_) | Mask::PerBatch(_) => {}
            Mask::And(..) | Mask::Or(..) | Mask::Not(_) => {}
        }
    }

    /// A number for each kind of node, which fingerprints depend on: never reuse one.
    fn tag(&self) -> u32 {
        match self {
            Mask::Everything => 1,
            Mask::Nothing => 2,
            Mask::Band(_) => 3,
            Mask::SlidingWindow { .. } => 4,
            Mask::Sinks { .. } => 5,
            Mask::Dilated(_) => 6,
            Mask::Documents(_) => 7,
            Mask::Butterfly(_) => 8,
            Mask::BigBird(_) => 9,
            Mask::Longformer(_) => 10,
            Mask::Blocks(_) => 11,
            Mask::Dense(_) => 12,
            Mask::Function(_) => 13,
            Mask::PerHead(_) => 14,
            Mask::PerBatch(_) => 15,
            Mask::And(..) => 16,
            Mask::Or(..) => 17,
            Mask::Not(_) => 18,
        }
    }
}

impl std::ops::BitAnd for Mask {
    type Output = Mask;

    fn bitand(self, other: Mask) -> Mask {
        Mask::And(Box::new(self), Box::new(other))
    }
}

impl std::ops::BitOr for Mask {
    type Output = Mask;

    fn bitor(self, other: Mask) -> Mask {
        Mask::Or(Box::new(self), Box::new(other))
    }
}

impl std::ops::Not for Mask {
    type Output = Mask;

    fn not(self) -> Mask {
        Mask::Not(Box::new(self))
    }
}

impl From<Band> for Mask {
    fn from(band: Band) -> Self {
        Mask::Band(band)
    }
}
