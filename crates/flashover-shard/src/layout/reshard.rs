//! From one spec to another of the same tensor: how a cache that prefill wrote comes to where decoding reads it.

use crate::error::ShardError;
use crate::mesh::Axis;
use crate::program::Collective;
use crate::spec::{Dim, Spec};

/// A stage of a reshard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stage {
    /// A collective over the axes, whose result has this spec.
    Collective(Collective, Vec<Axis>, Spec),
    /// A local split, whose result has this spec.
    Split(Spec),
}

/// Stages from `from` to `to`: for each dimension, axes that leave the end of its subscript move to where `to` wants them
/// by all-to-all if they stand next there, and are gathered otherwise; axes that nothing holds are split off locally.
/// Few stages, not the fewest bytes.
///
/// # Errors
///
/// If the dimensions differ or a sum is owed.
pub fn reshard(from: &Spec, to: &Spec) -> Result<Vec<Stage>, ShardError> {
    let same = from.dims().iter().map(|d| d.dim).eq(to.dims().iter().map(|d| d.dim));
    if !same || !from.partial().is_empty() || !to.partial().is_empty() {
        let expected = format!("a complete tensor of the dimensions of {from}");
        return Err(ShardError::field("reshard", expected, to));
    }
    let mut stages = Vec::new();
    let mut at = from.clone();
    while let Some((dim, axis)) = surplus(&at, to) {
        let shorter = at.with(dim, &at.axes(dim)[..at.axes(dim).len() - 1])?;
        let goal = to.dims().iter().find(|d| d.axes.contains(&axis) && next(&shorter, to, d.dim) == Some(axis));
        let (kind, spec) = match goal {
            Some(goal) if goal.dim != dim => {
                let grown = [shorter.axes(goal.dim), &[axis]].concat();
                (Collective::AllToAll, shorter.with(goal.dim, &grown)?)
            }
            _ => (Collective::AllGather, shorter),
        };
        stages.push(Stage::Collective(kind, vec![axis], spec.clone()));
        at = spec;
    }
    if at != *to {
        stages.push(Stage::Split(to.clone()));
    }
    Ok(stages)
}

/// The last axis of a dimension whose subscript is not the beginning of what it shall become.
fn surplus(at: &Spec, to: &Spec) -> Option<(Dim, Axis)> {
    let wrong = at.dims().iter().find(|d| !to.axes(d.dim).starts_with(&d.axes))?;
    Some((wrong.dim, *wrong.axes.last()?))
}

/// The axis that `dim` lacks next, if it is on the way to `to`.
fn next(at: &Spec, to: &Spec, dim: Dim) -> Option<Axis> {
    to.axes(dim).strip_prefix(at.axes(dim))?.first().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stages(from: &str, to: &str) -> Vec<Stage> {
        reshard(&from.parse().unwrap(), &to.parse().unwrap()).unwrap()
    }

    #[test]
    fn multiquery_caches_are_split_locally() {
        // Head-sharded prefill replicates the one key head; batch-sharded decoding takes its sequences from it.
        assert_eq!(stages("BMKQ", "B_xyzMKQ"), [Stage::Split("B_xyzMKQ".parse().unwrap())]);
        assert!(stages("B_xyMK_zQ", "B_xyMK_zQ").is_empty());
    }

    #[test]
    fn heads_move_to_sequences() {
        let spec = |text: &str| text.parse::<Spec>().unwrap();
        let all_to_all = |axis, to| Stage::Collective(Collective::AllToAll, vec![axis], spec(to));
        let gather = |axis, to| Stage::Collective(Collective::AllGather, vec![axis], spec(to));
        assert_eq!(
            stages("BMK_zyxQ", "B_xyzMKQ"),
            [all_to_all(Axis::X, "B_xMK_zyQ"), all_to_all(Axis::Y, "B_xyMK_zQ"), all_to_all(Axis::Z, "B_xyzMKQ"),]
        );
        assert_eq!(stages("BMK_zyQ", "BM_xK_zQ"), [gather(Axis::Y, "BMK_zQ"), Stage::Split(spec("BM_xK_zQ"))]);
        assert!(reshard(&spec("BMKQ"), &spec("BLKQ")).is_err());
    }
}
