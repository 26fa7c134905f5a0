//! Packed sequences: a token sees the tokens of its own document.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::Extent;
use super::error::{MaskError, broadcasts};
use super::fingerprint::Fingerprint;
use super::primitive::{Plane, Primitive, Reach};
use super::spans::{Span, Spans};

/// The segment id of tokens that see nothing and that nothing sees.
pub const PADDING: u32 = u32::MAX;

/// Query `i` sees key `j` when both have the same segment id, and it is not [`PADDING`].
///
/// Ids are any numbers in any order; a document may lie in several pieces.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Documents {
    /// Ids of the queries, `Sq` for each batch element, or one list for all of them.
    pub queries: Vec<Vec<u32>>,
    /// Ids of the keys, `Skv` for each batch element, or one list for all of them.
    pub keys: Vec<Vec<u32>>,
}

impl Documents {
    pub(super) fn bind(&self, extent: Extent) -> Result<BoundDocuments, MaskError> {
        for (what, ids, length) in [("queries", &self.queries, extent.seq_q), ("keys", &self.keys, extent.seq_kv)] {
            broadcasts("documents", "batch", extent.batch, ids.len())?;
            if let Some(found) = ids.iter().map(Vec::len).find(|&found| found != length as usize) {
                return Err(MaskError::SegmentIds { what, expected: length, found });
            }
        }
        Ok(BoundDocuments {
            queries: self.queries.iter().map(|ids| Runs::of(ids)).collect(),
            keys: self.keys.iter().map(|ids| Runs::of(ids)).collect(),
        })
    }

    pub(super) fn varies_by_batch(&self) -> bool {
        self.queries.len() != 1 || self.keys.len() != 1
    }

    pub(super) fn fingerprint(&self, out: &mut Fingerprint) {
        for side in [&self.queries, &self.keys] {
            out.word(side.len() as u32);
            side.iter().for_each(|ids| out.list(ids));
        }
    }
}

/// Tokens of one id in a row.
#[derive(Clone, Copy)]
struct Run {
    id: u32,
    start: u32,
    end: u32,
}

/// The runs of a sequence, in order, and again by id.
struct Runs {
    in_order: Vec<Run>,
    by_id: Vec<Run>,
}

impl Runs {
    fn of(ids: &[u32]) -> Self {
        let mut in_order: Vec<Run> = Vec::new();
        for (at, &id) in (0..).zip(ids) {
            match in_order.last_mut() {
                Some(run) if run.id == id => run.end = at + 1,
                _ => in_order.push(Run { id, start: at, end: at + 1 }),
            }
        }
        let mut by_id = in_order.clone();
        by_id.sort_by_key(|run| run.id);
        Runs { in_order, by_id }
    }

    /// The run of a token.
    fn at(&self, token: u32) -> Run {
        self.in_order[self.in_order.partition_point(|run| run.end <= token)]
    }

    /// The runs that touch `tokens`.
    fn overlapping(&self, tokens: Range<u32>) -> &[Run] {
        let first = self.in_order.partition_point(|run| run.end <= tokens.start);
        let end = self.in_order.partition_point(|run| run.start < tokens.end);
        &self.in_order[first..end.max(first)]
    }

    /// The runs of a document that touch `tokens`, in order.
    fn of_document(&self, id: u32, tokens: Span) -> &[Run] {
        let first = self.by_id.partition_point(|run| (run.id, run.end) <= (id, tokens.start));
        let end = self.by_id.partition_point(|run| (run.id, run.start) < (id, tokens.end));
        &self.by_id[first..end.max(first)]
    }
}

/// [`Documents`] over given lengths.
pub(super) struct BoundDocuments {
    queries: Vec<Runs>,
    keys: Vec<Runs>,
}

/// The element of a list with one for each batch element, or one for all.
fn of_batch<T>(list: &[T], b: u32) -> &T {
    &list[if list.len() == 1 { 0 } else { b as usize }]
}

impl Primitive for BoundDocuments {
    fn allows(&self, plane: Plane, i: u32, j: u32) -> bool {
        let query = of_batch(&self.queries, plane.b).at(i).id;
        query != PADDING && query == of_batch(&self.keys, plane.b).at(j).id
    }

    fn reach(&self, plane: Plane, queries: Range<u32>, keys: Span) -> Reach {
        let runs = of_batch(&self.queries, plane.b).overlapping(queries);
        let mut ids: Vec<u32> = runs.iter().map(|run| run.id).collect();
        ids.sort_unstable();
        ids.dedup();
        let documents = of_batch(&self.keys, plane.b);
        let seen = ids.iter().filter(|&&id| id != PADDING).flat_map(|&id| documents.of_document(id, keys));
        let any = Spans::from_unsorted(seen.map(|run| Span { start: run.start, end: run.end }).collect(), keys);
        // A key belongs to one document, so queries of two documents have no key in common.
        if ids.len() == 1 { Reach::same(any) } else { Reach { any, all: Spans::none() } }
    }

    fn group_end(&self, plane: Plane, i: u32) -> u32 {
        of_batch(&self.queries, plane.b).at(i).end
    }
}
