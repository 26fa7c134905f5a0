//! Why a mask or a block plan is not sound.

use crate::problem::ProblemError;

/// Why a mask or a block plan is not sound. Each message gives what was expected and what came.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum MaskError {
    /// A window or the lengths are not sound.
    #[error(transparent)]
    Problem(#[from] ProblemError),
    /// A number below what makes sense.
    #[error("{what}: expected at least {limit}, got {found}")]
    TooSmall {
        /// Which number.
        what: &'static str,
        /// Smallest accepted value.
        limit: u32,
        /// The value that came.
        found: u32,
    },
    /// A number beyond what positions can reach.
    #[error("{what}: expected at most {limit}, got {found}")]
    TooLarge {
        /// Which number.
        what: &'static str,
        /// Largest accepted value.
        limit: u64,
        /// The value that came.
        found: u64,
    },
    /// A mask or plan has a number of batch elements or heads that does not broadcast.
    #[error("{what}: expected {dimension} of {expected} or 1, got {found}")]
    Broadcast {
        /// Which mask, or `plan`.
        what: &'static str,
        /// `batch` or `heads`.
        dimension: &'static str,
        /// The number that the problem has.
        expected: u32,
        /// The number that came.
        found: usize,
    },
    /// `per_head` or `per_batch` with another number of masks than there are heads or batch elements.
    #[error("{what}: expected {expected} masks, got {found}")]
    Operands {
        /// `per_head` or `per_batch`.
        what: &'static str,
        /// Heads or batch elements.
        expected: u32,
        /// Masks that came.
        found: usize,
    },
    /// Segment ids of another number than there are tokens.
    #[error("segment ids of the {what}: expected {expected}, got {found}")]
    SegmentIds {
        /// `queries` or `keys`.
        what: &'static str,
        /// Tokens.
        expected: u32,
        /// Ids that came.
        found: usize,
    },
    /// A dense mask with another number of values than its shape has.
    #[error("from_dense {shape:?}: expected {expected} {unit}, got {found}")]
    DenseLength {
        /// `[B, H, Sq, Skv]`.
        shape: [u32; 4],
        /// `booleans`, or `words` of a mask that was read.
        unit: &'static str,
        /// Values of the shape.
        expected: usize,
        /// Values that came.
        found: usize,
    },
    /// A mask or plan made for other lengths.
    #[error("{what}: expected [Sq, Skv] = {expected:?}, got {found:?}")]
    Lengths {
        /// Which mask, or `plan`.
        what: &'static str,
        /// Lengths of the problem.
        expected: [u32; 2],
        /// Lengths of the mask or plan.
        found: [u32; 2],
    },
    /// A mask names a function that nobody registered.
    #[error("mask function: expected one of the registered {known:?}, got {name:?}")]
    UnknownFunction {
        /// The name.
        name: String,
        /// The names that are registered.
        known: Vec<String>,
    },
    /// A name is registered for another function already.
    #[error("mask function {name:?}: expected a name that is not taken, got one registered for another function")]
    FunctionTaken {
        /// The name.
        name: String,
    },
    /// A list of row starts of the wrong length.
    #[error("{what}: expected {expected} row starts (rows + 1), got {found}")]
    Starts {
        /// Which list.
        what: &'static str,
        /// Rows + 1.
        expected: usize,
        /// Starts that came.
        found: usize,
    },
    /// A row that starts elsewhere than it must.
    #[error("{what}: start of row {row}: expected {expected}, got {found}")]
    StartOutOfPlace {
        /// Which list.
        what: &'static str,
        /// The row.
        row: usize,
        /// What is expected.
        expected: String,
        /// The start that came.
        found: u32,
    },
    /// A block index beyond the last block.
    #[error("{what}: row {row}: expected block indices below {limit}, got {found}")]
    OutOfRange {
        /// Which list.
        what: &'static str,
        /// The row.
        row: usize,
        /// Blocks.
        limit: u32,
        /// The index that came.
        found: u32,
    },
    /// A block that is listed twice.
    #[error("{what}: row {row}: expected every block once, got {found} twice")]
    Duplicate {
        /// Which list.
        what: &'static str,
        /// The row.
        row: usize,
        /// The block.
        found: u32,
    },
    /// Blocks out of order.
    #[error("{what}: row {row}: expected ascending block indices, got {found} after {before}")]
    Unsorted {
        /// Which list.
        what: &'static str,
        /// The row.
        row: usize,
        /// The index before.
        before: u32,
        /// The index that came.
        found: u32,
    },
    /// A padded array of indices or counts with another number of elements than its shape has.
    #[error("{what}: expected {expected} elements, got {found}")]
    ArrayLength {
        /// Which array.
        what: &'static str,
        /// Elements of the shape.
        expected: usize,
        /// Elements that came.
        found: usize,
    },
    /// A count beyond the padded width.
    #[error("{what}: row {row}: expected a count of at most {limit}, got {found}")]
    Count {
        /// Which array.
        what: &'static str,
        /// The row.
        row: usize,
        /// Columns of the padded array.
        limit: usize,
        /// The count that came.
        found: u32,
    },
    /// A block that is listed as full and as partial.
    #[error("row {row}: expected every block to be full or partial, got {found} in both lists")]
    BothKinds {
        /// The row.
        row: usize,
        /// The block.
        found: u32,
    },
    /// Partial blocks came without the mask that says what is visible in them.
    #[error("partial blocks: expected a mask that gives their points, got {found} blocks and none")]
    PartialWithoutMask {
        /// Partial blocks.
        found: usize,
    },
    /// An entry refers to a bitmap that the plan does not have.
    #[error("plan: expected bitmap indices below {limit}, got {found}")]
    Bitmap {
        /// Bitmaps.
        limit: usize,
        /// The index that came.
        found: u32,
    },
    /// A plan shows points outside the tensors.
    #[error("row {row}: expected only points inside the tensors to be visible, got others in block {found}")]
    CutOff {
        /// The row.
        row: usize,
        /// The block.
        found: u32,
    },
    /// Partial tiles differ so much that their bitmaps exceed the limit.
    #[error(
        "bitmaps of partial tiles: expected at most {limit} bytes ({each} for each distinct tile), got more; raise \
         PlanOptions::max_bitmap_bytes"
    )]
    Bitmaps {
        /// Accepted bytes.
        limit: usize,
        /// Bytes of one bitmap.
        each: usize,
    },
    /// A plan for tiles of another size.
    #[error("plan: expected tiles of {expected:?} queries and keys, got {found:?}")]
    TileSize {
        /// Tiles of the kernel.
        expected: [u32; 2],
        /// Tiles of the plan.
        found: [u32; 2],
    },
    /// A plan for another mask.
    #[error("plan: expected one for the mask {expected:#018x}, got one for {}", name(.found))]
    AnotherMask {
        /// [`fingerprint`](crate::mask::Mask::fingerprint) of the mask.
        expected: u64,
        /// That of the plan's mask; `None` if it was imported without one.
        found: Option<u64>,
    },
}

fn name(fingerprint: &Option<u64>) -> String {
    fingerprint.map_or("blocks without a mask".into(), |number| format!("{number:#018x}"))
}

pub(super) fn at_least(what: &'static str, limit: u32, found: u32) -> Result<(), MaskError> {
    if found < limit { Err(MaskError::TooSmall { what, limit, found }) } else { Ok(()) }
}

pub(crate) fn at_most(what: &'static str, limit: u32, found: u32) -> Result<(), MaskError> {
    if found > limit { Err(MaskError::TooLarge { what, limit: limit.into(), found: found.into() }) } else { Ok(()) }
}

pub(crate) fn broadcasts(
    what: &'static str,
    dimension: &'static str,
    expected: u32,
    found: usize,
) -> Result<(), MaskError> {
    if found == 1 || found == expected as usize {
        Ok(())
    } else {
        Err(MaskError::Broadcast { what, dimension, expected, found })
    }
}

/// Checks compressed rows: `rows + 1` starts from 0 to the number of columns, and ascending columns below `limit`.
pub(crate) fn sorted_rows(
    what: &'static str,
    starts: &[u32],
    columns: &[u32],
    rows: usize,
    limit: u32,
) -> Result<(), MaskError> {
    if starts.len() != rows + 1 {
        return Err(MaskError::Starts { what, expected: rows + 1, found: starts.len() });
    }
    let misplaced = |row, expected: String, found| MaskError::StartOutOfPlace { what, row, expected, found };
    if starts[0] != 0 {
        return Err(misplaced(0, "0".into(), starts[0]));
    }
    if let Some(row) = (1..=rows).find(|&row| starts[row] < starts[row - 1]) {
        return Err(misplaced(row, format!("at least {}", starts[row - 1]), starts[row]));
    }
    if starts[rows] as usize != columns.len() {
        return Err(misplaced(rows, format!("{}, the end of the indices", columns.len()), starts[rows]));
    }
    for row in 0..rows {
        let columns = &columns[starts[row] as usize..starts[row + 1] as usize];
        if let Some(&found) = columns.iter().find(|&&column| column >= limit) {
            return Err(MaskError::OutOfRange { what, row, limit, found });
        }
        for pair in columns.windows(2) {
            let [before, found] = [pair[0], pair[1]];
            if before == found {
                return Err(MaskError::Duplicate { what, row, found });
            }
            if before > found {
                return Err(MaskError::Unsorted { what, row, before, found });
            }
        }
    }
    Ok(())
}
