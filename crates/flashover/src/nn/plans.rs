//! Block plans of a module's mask, made when lengths are first met and kept.

use std::sync::{Arc, Mutex, PoisonError};

use burn::tensor::{Bool, Device, Tensor, TensorData};
use flashover_kernels::block_plan::TileSize;
use flashover_kernels::mask::{Extent, Mask};

use crate::{AttentionError, SparsePlan};

/// Plans that are kept: those of the lengths that were last used. A training run has one or two; evaluation adds some.
const KEPT: usize = 8;

/// The plans of one mask. Clones share them.
#[derive(Debug, Clone, Default)]
pub(super) struct Plans(Arc<Mutex<Vec<Known>>>);

/// A plan and the shape of the scores that it was made for; 1 where the mask does not tell batch elements or heads apart.
#[derive(Debug)]
struct Known {
    shape: [usize; 4],
    plan: SparsePlan,
}

impl Plans {
    /// The plan over scores `[B, Hq, Sq, Skv]`.
    pub fn get(&self, mask: &Mask, tile: [usize; 2], shape: [usize; 4]) -> Result<SparsePlan, AttentionError> {
        let [batch, heads, queries, keys] = shape;
        let batch = if mask.varies_by_batch() { batch } else { 1 };
        let shape = [batch, if mask.varies_by_head() { heads } else { 1 }, queries, keys];
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = match known.iter().position(|known| known.shape == shape) {
            Some(at) => known.remove(at),
            None => {
                let [bq, bk] = tile.map(|n| u32::try_from(n).unwrap_or(u32::MAX));
                Known { shape, plan: SparsePlan::with_tile(mask, shape, TileSize { bq, bk })? }
            }
        };
        let plan = entry.plan.clone();
        known.push(entry);
        if known.len() > KEPT {
            known.remove(0);
        }
        Ok(plan)
    }

    /// Plans that it keeps.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}

/// What the mask hides from the queries from `first` on, of scores `[B, Hq, Sq, Skv]`, as a boolean mask of these rows in Burn's
/// convention.
pub(super) fn hidden_rows(
    mask: &Mask,
    [batch, heads, queries, keys]: [usize; 4],
    first: usize,
    device: &Device,
) -> Result<Tensor<4, Bool>, AttentionError> {
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let extent = Extent { batch: count(batch), heads: count(heads), seq_q: count(queries), seq_kv: count(keys) };
    let bound = mask.bind(extent)?;
    let batch = if mask.varies_by_batch() { batch } else { 1 };
    let heads = if mask.varies_by_head() { heads } else { 1 };
    let mut hides = Vec::with_capacity(batch * heads * (queries - first) * keys);
    for b in 0..count(batch) {
        for h in 0..count(heads) {
            for i in count(first)..count(queries) {
                hides.extend((0..count(keys)).map(|j| !bound.allows(b, h, i, j)));
            }
        }
    }
    Ok(Tensor::from_data(TensorData::new(hides, [batch, heads, queries - first, keys]), device))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_are_made_once_and_the_last_are_kept() {
        let (plans, mask) = (Plans::default(), Mask::causal() & Mask::window(20, 0));
        let get = |plans: &Plans, shape| plans.get(&mask, [32, 32], shape).unwrap();
        let first = get(&plans, [2, 4, 100, 100]);
        // Neither batch nor heads matter to this mask; a clone of the module has the same plans.
        let again = get(&plans.clone(), [3, 8, 100, 100]);
        assert!(std::ptr::eq(first.block_plan(), again.block_plan()));
        for queries in 1..20 {
            get(&plans, [1, 1, queries, 100]);
            get(&plans, [1, 1, 100, 100]);
        }
        assert_eq!(plans.len(), KEPT);
        assert!(std::ptr::eq(first.block_plan(), get(&plans, [1, 1, 100, 100]).block_plan()), "used all the time");
        let per_head = Mask::per_head(vec![Mask::causal(), Mask::sinks(3)]);
        assert_eq!(plans.get(&per_head, [32, 32], [5, 2, 64, 64]).unwrap().block_plan().heads(), 2);
        assert!(plans.get(&per_head, [32, 32], [5, 3, 64, 64]).is_err());
    }
}
