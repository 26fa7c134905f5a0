//! A mask together with the lengths and heads it covers: the form that answers questions.

use std::ops::Range;

use super::primitive::{Constant, FirstKeys, Plane, Primitive, Reach};
use super::spans::Span;
use super::{Band, BoundBand, Extent, Mask, MaskError, TileKind};
use crate::problem::ProblemError;

/// A mask over given lengths and heads, checked: see [`Mask::bind`].
pub struct BoundMask<'a> {
    extent: Extent,
    root: Node<'a>,
}

enum Node<'a> {
    Primitive(Box<dyn Primitive + 'a>),
    PerHead(Vec<Node<'a>>),
    PerBatch(Vec<Node<'a>>),
    And(Box<Node<'a>>, Box<Node<'a>>),
    Or(Box<Node<'a>>, Box<Node<'a>>),
    Not(Box<Node<'a>>),
}

impl Mask {
    /// Checks the mask against lengths and heads, looks its functions up, and indexes its documents.
    ///
    /// Takes time of the mask's own data: its nodes, its segment ids, its block lists; not of the number of points.
    pub fn bind(&self, extent: Extent) -> Result<BoundMask<'_>, MaskError> {
        extent.validate()?;
        Ok(BoundMask { extent, root: self.node(extent)? })
    }

    fn node(&self, extent: Extent) -> Result<Node<'_>, MaskError> {
        let shift = extent.shift();
        Ok(match self {
            Mask::Everything => leaf(Constant(true)),
            Mask::Nothing => leaf(Constant(false)),
            Mask::Band(band) => {
                band.validate()?;
                leaf(BoundBand { band: *band, shift })
            }
            Mask::SlidingWindow { keys: 0 } => return Err(ProblemError::EmptyWindow.into()),
            Mask::SlidingWindow { keys } => {
                let band = Band { left: keys - 1, right: 0, ..Band::default() };
                band.validate()?;
                leaf(BoundBand { band, shift })
            }
            Mask::Sinks { keys } => leaf(FirstKeys(*keys)),
            Mask::Dilated(shape) => leaf(shape.bind(shift)?),
            Mask::Documents(documents) => leaf(documents.bind(extent)?),
            Mask::Butterfly(shape) => leaf(shape.bind(shift)?),
            Mask::BigBird(shape) => leaf(shape.bind(extent)?),
            Mask::Longformer(shape) => leaf(shape.bind(shift)?),
            Mask::Blocks(table) => leaf(table.bind(extent)?),
            Mask::Dense(points) => leaf(points.bind(extent)?),
            Mask::Function(function) => leaf(function.bind()?),
            Mask::PerHead(masks) => Node::PerHead(each("per_head", masks, extent.heads, extent)?),
            Mask::PerBatch(masks) => Node::PerBatch(each("per_batch", masks, extent.batch, extent)?),
            Mask::And(l, r) => Node::And(Box::new(l.node(extent)?), Box::new(r.node(extent)?)),
            Mask::Or(l, r) => Node::Or(Box::new(l.node(extent)?), Box::new(r.node(extent)?)),
            Mask::Not(mask) => Node::Not(Box::new(mask.node(extent)?)),
        })
    }
}

fn leaf<'a>(primitive: impl Primitive + 'a) -> Node<'a> {
    Node::Primitive(Box::new(primitive))
}

/// One node for each of `expected` heads or batch elements.
fn each<'a>(what: &'static str, masks: &'a [Mask], expected: u32, extent: Extent) -> Result<Vec<Node<'a>>, MaskError> {
    let found = masks.len();
    if found != expected as usize {
        return Err(MaskError::Operands { what, expected, found });
    }
    masks.iter().map(|mask| mask.node(extent)).collect()
}

impl BoundMask<'_> {
    /// The lengths and heads that the mask was bound to.
    pub fn extent(&self) -> Extent {
        self.extent
    }

    /// Whether query `i` of head `h` of batch element `b` sees key `j`.
    ///
    /// # Panics
    /// May panic if an index is out of the extent.
    pub fn allows(&self, b: u32, h: u32, i: u32, j: u32) -> bool {
        self.root.allows(Plane { b, h }, i, j)
    }

    /// How a tile lies in the mask, without visiting its points.
    ///
    /// Exact for a primitive other than a function. For anything else conservative: Empty and Full are certain, Partial
    /// may turn out to be either. A tile without points is Empty.
    ///
    /// # Panics
    /// May panic if a range leaves the extent.
    pub fn classify(&self, b: u32, h: u32, queries: Range<u32>, keys: Range<u32>) -> TileKind {
        if queries.is_empty() || keys.is_empty() {
            return TileKind::Empty;
        }
        let keys = Span { start: keys.start, end: keys.end };
        let reach = self.reach(Plane { b, h }, queries, keys);
        if reach.any.is_empty() {
            TileKind::Empty
        } else if reach.all.is_all(keys) {
            TileKind::Full
        } else {
            TileKind::Partial
        }
    }

    /// Every point of a tile: a row of `⌈keys / 32⌉` words for each query, lowest bit first.
    ///
    /// # Panics
    /// May panic if a range leaves the extent.
    pub fn bits(&self, b: u32, h: u32, queries: Range<u32>, keys: Range<u32>) -> Vec<u32> {
        if queries.is_empty() || keys.is_empty() {
            return Vec::new();
        }
        let keys = Span { start: keys.start, end: keys.end };
        self.root.bits(Plane { b, h }, queries, keys)
    }

    /// What `queries` see of `keys`; neither is empty.
    pub(crate) fn reach(&self, plane: Plane, queries: Range<u32>, keys: Span) -> Reach {
        self.root.reach(plane, queries, keys)
    }

    /// Words that determine the bits of a tile, given its size; `false` if there are none. Neither range is empty.
    pub(crate) fn signature(&self, plane: Plane, queries: Range<u32>, keys: Span, out: &mut Vec<u32>) -> bool {
        self.root.signature(plane, queries, keys, out)
    }
}

impl Node<'_> {
    fn allows(&self, plane: Plane, i: u32, j: u32) -> bool {
        match self {
            Node::Primitive(primitive) => primitive.allows(plane, i, j),
            Node::PerHead(masks) => masks[plane.h as usize].allows(plane, i, j),
            Node::PerBatch(masks) => masks[plane.b as usize].allows(plane, i, j),
            Node::And(l, r) => l.allows(plane, i, j) && r.allows(plane, i, j),
            Node::Or(l, r) => l.allows(plane, i, j) || r.allows(plane, i, j),
            Node::Not(mask) => !mask.allows(plane, i, j),
        }
    }

    /// See the top of `primitive.rs` for what is exact here.
    fn reach(&self, plane: Plane, queries: Range<u32>, keys: Span) -> Reach {
        match self {
            Node::Primitive(primitive) => primitive.reach(plane, queries, keys),
            Node::PerHead(masks) => masks[plane.h as usize].reach(plane, queries, keys),
            Node::PerBatch(masks) => masks[plane.b as usize].reach(plane, queries, keys),
            Node::And(l, r) => {
                let (l, r) = (l.reach(plane, queries.clone(), keys), r.reach(plane, queries, keys));
                Reach { any: l.any.intersection(&r.any), all: l.all.intersection(&r.all) }
            }
            Node::Or(l, r) => {
                let (l, r) = (l.reach(plane, queries.clone(), keys), r.reach(plane, queries, keys));
                Reach { any: l.any.union(&r.any), all: l.all.union(&r.all) }
            }
            Node::Not(mask) => {
                let seen = mask.reach(plane, queries, keys);
                Reach { any: seen.all.complement(keys), all: seen.any.complement(keys) }
            }
        }
    }

    fn signature(&self, plane: Plane, queries: Range<u32>, keys: Span, out: &mut Vec<u32>) -> bool {
        match self {
            Node::Primitive(primitive) => primitive.signature(plane, queries, keys, out),
            // Which operand speaks is part of what determines the bits.
            Node::PerHead(masks) => {
                out.push(plane.h);
                masks[plane.h as usize].signature(plane, queries, keys, out)
            }
            Node::PerBatch(masks) => {
                out.push(plane.b);
                masks[plane.b as usize].signature(plane, queries, keys, out)
            }
            Node::And(l, r) | Node::Or(l, r) => {
                l.signature(plane, queries.clone(), keys, out) && r.signature(plane, queries, keys, out)
            }
            Node::Not(mask) => mask.signature(plane, queries, keys, out),
        }
    }

    fn bits(&self, plane: Plane, queries: Range<u32>, keys: Span) -> Vec<u32> {
        let columns = keys.end - keys.start;
        let words = columns.div_ceil(32) as usize;
        match self {
            Node::Primitive(primitive) => {
                let mut out = vec![0; queries.len() * words];
                primitive.bits(plane, queries, keys, &mut out);
                out
            }
            Node::PerHead(masks) => masks[plane.h as usize].bits(plane, queries, keys),
            Node::PerBatch(masks) => masks[plane.b as usize].bits(plane, queries, keys),
            Node::And(l, r) => {
                let mut out = l.bits(plane, queries.clone(), keys);
                out.iter_mut().zip(r.bits(plane, queries, keys)).for_each(|(l, r)| *l &= r);
                out
            }
            Node::Or(l, r) => {
                let mut out = l.bits(plane, queries.clone(), keys);
                out.iter_mut().zip(r.bits(plane, queries, keys)).for_each(|(l, r)| *l |= r);
                out
            }
            Node::Not(mask) => {
                let mut out = mask.bits(plane, queries, keys);
                // Bits past the last key stay 0.
                let last = u32::MAX >> ((32 - columns % 32) % 32);
                for row in out.chunks_exact_mut(words) {
                    row.iter_mut().for_each(|word| *word = !*word);
                    row[words - 1] &= last;
                }
                out
            }
        }
    }
}
