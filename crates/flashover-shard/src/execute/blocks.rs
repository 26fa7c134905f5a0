//! Blocks of global tensors: cutting one out of another, and putting pieces together.

use std::collections::BTreeMap;

use burn::tensor::Tensor;

/// What a block that begins at `start` has of the block `(start, shape)`, both in global coordinates; `None` if nothing.
pub(super) fn overlap(x: &Tensor<4>, start: [usize; 4], (from, shape): ([usize; 4], [usize; 4])) -> Option<Tensor<4>> {
    let mut cut = x.clone();
    let held = x.dims();
    for d in 0..4 {
        let first = start[d].max(from[d]);
        let end = (start[d] + held[d]).min(from[d] + shape[d]);
        let length = end.checked_sub(first).filter(|&length| length > 0)?;
        if length < held[d] {
            cut = cut.narrow(d, first - start[d], length);
        }
    }
    Some(cut)
}

/// The block that pieces make, each with where it begins in global coordinates. Pieces that do not fill a block make one
/// of another shape, which its spec then refuses.
pub(super) fn assemble(pieces: impl Iterator<Item = ([usize; 4], Tensor<4>)>) -> Tensor<4> {
    let mut pieces: BTreeMap<[usize; 4], Tensor<4>> = pieces.collect();
    for d in (0..4).rev() {
        let mut rows: BTreeMap<[usize; 4], Vec<Tensor<4>>> = BTreeMap::new();
        for (mut start, piece) in pieces {
            start[d] = 0;
            rows.entry(start).or_default().push(piece);
        }
        let join = |mut row: Vec<Tensor<4>>| if row.len() == 1 { row.remove(0) } else { Tensor::cat(row, d) };
        pieces = rows.into_iter().map(|(start, row)| (start, join(row))).collect();
    }
    pieces.into_values().next().expect("a group has at least one rank")
}
