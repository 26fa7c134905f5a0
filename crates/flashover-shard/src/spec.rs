//! The paper's notation (§3.1) as a type: which axes shard each dimension of a tensor, and which sums are still owed.
//!
//! `BLE_xyz` is a tensor `[B, L, E]` whose last dimension is split over the axes x, y and z; a chip holds
//! `[B, L, E/(XYZ)]`, and an axis that is not named replicates. `BLF_yz partialsum-x` is one term of a sum over x.
//!
//! The paper's subscripts are sets. Here they are ordered, most significant first: in `E_xzy` a chip holds block
//! `(x·Z + z)·Y + y`. So an axis can be gathered only from the end of a subscript and scattered only to its end;
//! anything else would leave a strided piece that no spec describes. [`Spec::same_sets`] compares as the paper does.

use core::fmt;
use core::ops::Range;
use core::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::ShardError;
use crate::mesh::{Axis, Mesh};

/// A dimension by its letter (§2.2, and a few that the paper needs no name for).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Dim {
    /// Sequences of the batch.
    B,
    /// Tokens of each sequence that go through the model now.
    L,
    /// Tokens of each sequence that the cache holds, those that go through the model now included.
    M,
    /// Tokens of each sequence whose logits are wanted, the last ones.
    T,
    /// Model dimension, `d_model`.
    E,
    /// Feed-forward dimension, `d_ff`.
    F,
    /// Query heads, padding included.
    H,
    /// Key and value heads, padding included.
    K,
    /// Head dimension, `d_head`.
    Q,
    /// Vocabulary, padding included.
    V,
    /// Statistics that a norm needs of a row: 1 (sum of squares) or 2 (and the sum).
    S,
}

impl Dim {
    /// How many dimensions there are.
    pub const COUNT: usize = 11;
    /// All of them, in order.
    pub const ALL: [Dim; Dim::COUNT] =
        [Dim::B, Dim::L, Dim::M, Dim::T, Dim::E, Dim::F, Dim::H, Dim::K, Dim::Q, Dim::V, Dim::S];
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// The global size of every dimension. A dimension that a program does not use may have any size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Sizes([usize; Dim::COUNT]);

impl Sizes {
    /// All sizes 1, to be overwritten.
    pub const fn ones() -> Self {
        Sizes([1; Dim::COUNT])
    }

    /// The same with `dim` of another size.
    #[must_use]
    pub const fn with(mut self, dim: Dim, size: usize) -> Self {
        self.0[dim as usize] = size;
        self
    }

    /// The size of a dimension.
    pub const fn get(&self, dim: Dim) -> usize {
        self.0[dim as usize]
    }
}

/// A dimension and the axes that shard it, most significant first.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SpecDim {
    /// The dimension.
    pub dim: Dim,
    /// Its axes; empty if every chip holds all of it.
    pub axes: Vec<Axis>,
}

/// How a tensor lies on a mesh. Every axis appears at most once, over all dimensions and the owed sums.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Spec {
    dims: Vec<SpecDim>,
    partial: Vec<Axis>,
}

impl Spec {
    /// A spec from its dimensions and the axes over which a sum is owed.
    ///
    /// # Errors
    ///
    /// If an axis or a dimension is named twice.
    pub fn new(
        dims: impl IntoIterator<Item = (Dim, Vec<Axis>)>,
        partial: impl IntoIterator<Item = Axis>,
    ) -> Result<Self, ShardError> {
        let mut partial: Vec<_> = partial.into_iter().collect();
        partial.sort_unstable();
        let spec = Spec { dims: dims.into_iter().map(|(dim, axes)| SpecDim { dim, axes }).collect(), partial };
        let named: Vec<_> = spec.dims.iter().flat_map(|d| &d.axes).chain(&spec.partial).collect();
        if let Some(i) = (1..named.len()).find(|&i| named[..i].contains(&named[i])) {
            return Err(ShardError::AxisTwice { spec: spec.to_string(), axis: *named[i] });
        }
        if let Some(i) = (1..spec.dims.len()).find(|&i| spec.dims[..i].iter().any(|d| d.dim == spec.dims[i].dim)) {
            return Err(ShardError::DimTwice { spec: spec.to_string(), dim: spec.dims[i].dim });
        }
        Ok(spec)
    }

    /// The dimensions in the order in which the tensor stores them.
    pub fn dims(&self) -> &[SpecDim] {
        &self.dims
    }

    /// Axes over which a sum (or the merge of a softmax) is owed, sorted.
    pub fn partial(&self) -> &[Axis] {
        &self.partial
    }

    /// The axes that shard `dim`; empty if it is whole or absent.
    pub fn axes(&self, dim: Dim) -> &[Axis] {
        self.dims.iter().find(|d| d.dim == dim).map_or(&[], |d| &d.axes)
    }

    /// Whether the tensor has the dimension.
    pub fn has(&self, dim: Dim) -> bool {
        self.dims.iter().any(|d| d.dim == dim)
    }

    /// Position of a dimension in the tensor's shape.
    pub fn position(&self, dim: Dim) -> Option<usize> {
        self.dims.iter().position(|d| d.dim == dim)
    }

    /// The same with other axes on `dim`.
    ///
    /// # Errors
    ///
    /// If an axis is then named twice.
    pub fn with(&self, dim: Dim, axes: &[Axis]) -> Result<Self, ShardError> {
        let dims = self.dims.iter().map(|d| (d.dim, if d.dim == dim { axes.to_vec() } else { d.axes.clone() }));
        Spec::new(dims, self.partial.iter().copied())
    }

    /// The same with other owed sums.
    ///
    /// # Errors
    ///
    /// If an axis is then named twice.
    pub fn with_partial(&self, partial: &[Axis]) -> Result<Self, ShardError> {
        Spec::new(self.dims.iter().map(|d| (d.dim, d.axes.clone())), partial.iter().copied())
    }

    /// The same with dimension `from` called `to`.
    ///
    /// # Errors
    ///
    /// If there already is a `to`.
    pub fn renamed(&self, from: Dim, to: Dim) -> Result<Self, ShardError> {
        let name = |dim| if dim == from { to } else { dim };
        Spec::new(self.dims.iter().map(|d| (name(d.dim), d.axes.clone())), self.partial.iter().copied())
    }

    /// Whether two specs agree when subscripts are sets, as in the paper.
    pub fn same_sets(&self, other: &Spec) -> bool {
        let set = |axes: &[Axis]| {
            let mut axes = axes.to_vec();
            axes.sort_unstable();
            axes
        };
        self.partial == other.partial
            && self.dims.len() == other.dims.len()
            && self.dims.iter().zip(&other.dims).all(|(a, b)| a.dim == b.dim && set(&a.axes) == set(&b.axes))
    }

    /// Checks that the mesh has every axis and that the axes divide the sizes. `what` names the tensor in the message.
    ///
    /// # Errors
    ///
    /// If an axis is missing or a dimension is zero or does not divide.
    pub fn check(&self, what: &'static str, mesh: &Mesh, sizes: &Sizes) -> Result<(), ShardError> {
        mesh.group_size(&self.partial)?;
        for SpecDim { dim, axes } in &self.dims {
            let (by, found) = (mesh.group_size(axes)?, sizes.get(*dim));
            if found == 0 {
                return Err(ShardError::field(format!("{what}: {dim}"), "a positive size", found));
            }
            if !found.is_multiple_of(by) {
                return Err(ShardError::Indivisible { what, spec: self.to_string(), dim: *dim, by, found });
            }
        }
        Ok(())
    }

    /// Shape of what one chip holds, in the tensor's order of dimensions.
    ///
    /// # Errors
    ///
    /// As [`check`](Self::check).
    pub fn local_shape(&self, mesh: &Mesh, sizes: &Sizes) -> Result<Vec<usize>, ShardError> {
        self.check("spec", mesh, sizes)?;
        self.dims.iter().map(|d| Ok(sizes.get(d.dim) / mesh.group_size(&d.axes)?)).collect()
    }

    /// Bytes of what one chip holds, elements of `bits` bits packed without gaps.
    ///
    /// # Errors
    ///
    /// As [`check`](Self::check).
    pub fn local_bytes(&self, mesh: &Mesh, sizes: &Sizes, bits: u64) -> Result<u64, ShardError> {
        let elements: u64 = self.local_shape(mesh, sizes)?.into_iter().map(|n| n as u64).product();
        Ok((elements * bits).div_ceil(8))
    }

    /// The block of the global tensor that `rank` holds: a range of each dimension.
    ///
    /// # Errors
    ///
    /// As [`check`](Self::check).
    pub fn block(&self, mesh: &Mesh, sizes: &Sizes, rank: usize) -> Result<Vec<Range<usize>>, ShardError> {
        let shape = self.local_shape(mesh, sizes)?;
        let range = |(d, local): (&SpecDim, usize)| {
            let index = mesh.index(rank, &d.axes)?;
            Ok(index * local..(index + 1) * local)
        };
        self.dims.iter().zip(shape).map(range).collect()
    }
}

impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for SpecDim { dim, axes } in &self.dims {
            write!(f, "{dim}{}", if axes.is_empty() { "" } else { "_" })?;
            axes.iter().try_for_each(|axis| write!(f, "{axis}"))?;
        }
        if !self.partial.is_empty() {
            f.write_str(" partialsum-")?;
            self.partial.iter().try_for_each(|axis| write!(f, "{axis}"))?;
        }
        Ok(())
    }
}

impl FromStr for Spec {
    type Err = ShardError;

    /// Parses `E_xF_yz`, or with owed sums `BLF_yz partialsum-x` (in parentheses, too, as the paper prints it).
    fn from_str(text: &str) -> Result<Self, ShardError> {
        let refuse = |expected, found: &dyn fmt::Display| ShardError::Notation {
            text: text.to_owned(),
            expected,
            found: format!("`{found}`"),
        };
        let axes = |letters: &str| {
            let parse = |c| Axis::try_from(c).map_err(|_| refuse("axes as lower-case letters", &c));
            letters.chars().map(parse).collect::<Result<Vec<_>, _>>()
        };
        let (body, owed) = text.trim().split_once(char::is_whitespace).unwrap_or((text.trim(), ""));
        let owed = owed.trim().trim_start_matches('(').trim_end_matches(')');
        let partial = match owed.strip_prefix("partialsum-") {
            Some("") => return Err(refuse("the axes of the sum that is owed", &owed)),
            Some(letters) => axes(letters)?,
            None if owed.is_empty() => Vec::new(),
            None => return Err(refuse("`partialsum-` and its axes", &owed)),
        };
        let mut dims = Vec::new();
        let mut rest = body;
        while let Some(letter) = rest.chars().next() {
            let name = letter.to_string();
            let dim = Dim::ALL.into_iter().find(|dim| dim.to_string() == name);
            let dim = dim.ok_or_else(|| refuse("a dimension (B L M T E F H K Q V S)", &letter))?;
            rest = &rest[1..];
            let mut named = Vec::new();
            if let Some(subscript) = rest.strip_prefix('_') {
                let end = subscript.find(|c: char| c.is_ascii_uppercase()).unwrap_or(subscript.len());
                named = axes(&subscript[..end])?;
                rest = &subscript[end..];
                if named.is_empty() {
                    return Err(refuse("axes after `_`", &rest));
                }
            }
            dims.push((dim, named));
        }
        Spec::new(dims, partial)
    }
}

impl TryFrom<String> for Spec {
    type Error = ShardError;

    fn try_from(text: String) -> Result<Self, ShardError> {
        text.parse()
    }
}

impl From<Spec> for String {
    fn from(spec: Spec) -> String {
        spec.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(text: &str) -> Spec {
        text.parse().unwrap()
    }

    #[test]
    fn the_papers_notation_parses_and_prints() {
        for text in ["BLE_xyz", "E_xF_yz", "BLF_yz partialsum-x", "B_xLHQ", "BLE", "B_xyLE_z"] {
            assert_eq!(spec(text).to_string(), text);
        }
        assert_eq!(spec("BLF_yz (partialsum-x)"), spec("BLF_yz partialsum-x"));
        assert!(spec("E_xF_zy").same_sets(&spec("E_xF_yz")) && spec("E_xF_zy") != spec("E_xF_yz"));
        assert!(!spec("E_xF_zy").same_sets(&spec("E_yF_zx")));
    }

    #[test]
    fn what_is_not_notation_is_refused() {
        for (text, message) in [
            ("BLE_xx", "spec BLE_xx: expected every axis at most once, got x twice"),
            ("B_xLE_yx", "spec B_xLE_yx: expected every axis at most once, got x twice"),
            ("BLF_x partialsum-x", "spec BLF_x partialsum-x: expected every axis at most once, got x twice"),
            ("BLB", "spec BLB: expected every dimension at most once, got B twice"),
            ("BLW", "spec `BLW`: expected a dimension (B L M T E F H K Q V S), got `W`"),
            ("BL_", "spec `BL_`: expected axes after `_`, got ``"),
            ("BL_1", "spec `BL_1`: expected axes as lower-case letters, got `1`"),
            ("BL partial-x", "spec `BL partial-x`: expected `partialsum-` and its axes, got `partial-x`"),
        ] {
            assert_eq!(text.parse::<Spec>().unwrap_err().to_string(), message);
        }
    }

    #[test]
    fn a_shard_has_a_shape_bytes_and_a_block() {
        let mesh = Mesh::torus(2, 3, 4).unwrap();
        let sizes = Sizes::ones().with(Dim::B, 4).with(Dim::L, 5).with(Dim::E, 48);
        let e = spec("B_xLE_zy");
        assert_eq!(e.local_shape(&mesh, &sizes).unwrap(), [2, 5, 4]);
        assert_eq!(e.local_bytes(&mesh, &sizes, 16).unwrap(), 80);
        assert_eq!(spec("BL").local_bytes(&mesh, &sizes.with(Dim::B, 1), 4).unwrap(), 3);
        // Rank 22 stands at x 1, y 2, z 2: block 2·3 + 2 = 8 of E.
        assert_eq!(e.block(&mesh, &sizes, 22).unwrap(), [2..4, 0..5, 32..36]);
        let error = e.local_shape(&mesh, &sizes.with(Dim::E, 50)).unwrap_err().to_string();
        assert_eq!(error, "spec: dimension E of B_xLE_zy: expected a multiple of 12, got 50");
        assert!(e.local_shape(&mesh, &sizes.with(Dim::L, 0)).is_err());
        assert!(spec("BLE_w").local_shape(&mesh, &sizes).is_err());
    }

    #[test]
    fn blocks_tile_the_tensor() {
        let mesh = Mesh::torus(2, 3, 2).unwrap();
        let sizes = Sizes::ones().with(Dim::E, 6).with(Dim::F, 12);
        let weight = spec("E_yF_zx");
        let mut held = vec![0; 6 * 12];
        for rank in 0..mesh.chips() {
            let block = weight.block(&mesh, &sizes, rank).unwrap();
            for e in block[0].clone() {
                block[1].clone().for_each(|f| held[e * 12 + f] += 1);
            }
        }
        assert!(held.iter().all(|&n| n == 1));
    }
}
