//! Chips as a mesh of named axes, `X × Y × Z` in the paper (§3.1).
//!
//! A rank is a chip's number: its coordinates read as digits, the first axis being the most significant.

use core::fmt;
use core::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::ShardError;

/// Name of a mesh axis: a lower-case letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "char", into = "char")]
pub struct Axis(u8);

impl Axis {
    /// The first axis of a torus.
    pub const X: Axis = Axis(b'x');
    /// The second axis of a torus.
    pub const Y: Axis = Axis(b'y');
    /// The third axis of a torus.
    pub const Z: Axis = Axis(b'z');

    /// The letter.
    pub const fn letter(self) -> char {
        self.0 as char
    }
}

impl TryFrom<char> for Axis {
    type Error = ShardError;

    fn try_from(letter: char) -> Result<Self, ShardError> {
        if letter.is_ascii_lowercase() {
            Ok(Axis(letter as u8))
        } else {
            Err(ShardError::Mesh { expected: "axes named by lower-case letters", found: letter.to_string() })
        }
    }
}

impl From<Axis> for char {
    fn from(axis: Axis) -> char {
        axis.letter()
    }
}

impl fmt::Display for Axis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.letter())
    }
}

/// Named axes and their sizes in chips.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "Vec<(Axis, usize)>", into = "Vec<(Axis, usize)>")]
pub struct Mesh {
    axes: Vec<(Axis, usize)>,
}

impl Mesh {
    /// A mesh of these axes, the most significant digit of a rank first.
    ///
    /// # Errors
    ///
    /// Without axes, with a name twice, with a size of zero, or with more chips than a `u32` counts.
    pub fn new(axes: impl IntoIterator<Item = (Axis, usize)>) -> Result<Self, ShardError> {
        let axes: Vec<_> = axes.into_iter().collect();
        let refuse = |expected| ShardError::Mesh { expected, found: print(&axes) };
        if axes.is_empty() {
            return Err(refuse("at least one axis"));
        }
        if axes.iter().any(|&(_, size)| size == 0) {
            return Err(refuse("axes of at least one chip"));
        }
        if axes.iter().enumerate().any(|(i, (axis, _))| axes[..i].iter().any(|(other, _)| other == axis)) {
            return Err(refuse("every axis once"));
        }
        let chips = axes.iter().try_fold(1_u32, |n, &(_, size)| n.checked_mul(u32::try_from(size).ok()?));
        if chips.is_none() {
            return Err(refuse("at most 4294967295 chips"));
        }
        Ok(Mesh { axes })
    }

    /// The paper's `X × Y × Z`.
    ///
    /// # Errors
    ///
    /// If a size is zero.
    pub fn torus(x: usize, y: usize, z: usize) -> Result<Self, ShardError> {
        Mesh::new([(Axis::X, x), (Axis::Y, y), (Axis::Z, z)])
    }

    /// Every ordered factorization of `chips` into `X × Y × Z`; empty for zero chips.
    pub fn factorizations(chips: usize) -> Vec<Mesh> {
        let divisors = |n: usize| (1..=n).filter(move |&d| n.is_multiple_of(d));
        let pairs = divisors(chips).flat_map(|x| divisors(chips / x).map(move |y| (x, y)));
        let axes = |(x, y): (usize, usize)| vec![(Axis::X, x), (Axis::Y, y), (Axis::Z, chips / x / y)];
        pairs.map(|pair| Mesh { axes: axes(pair) }).collect()
    }

    /// The axes in order, with their sizes.
    pub fn axes(&self) -> &[(Axis, usize)] {
        &self.axes
    }

    /// Number of chips.
    pub fn chips(&self) -> usize {
        self.axes.iter().map(|&(_, size)| size).product()
    }

    /// Chips along `axis`.
    ///
    /// # Errors
    ///
    /// If the mesh has no such axis.
    pub fn size(&self, axis: Axis) -> Result<usize, ShardError> {
        let found = self.axes.iter().find(|(name, _)| *name == axis);
        found.map(|&(_, size)| size).ok_or_else(|| ShardError::UnknownAxis { axis, mesh: self.to_string() })
    }

    /// Product of the sizes of `axes`: chips of a group that communicates over them.
    ///
    /// # Errors
    ///
    /// If the mesh lacks one of the axes.
    pub fn group_size(&self, axes: &[Axis]) -> Result<usize, ShardError> {
        axes.iter().try_fold(1, |n, &axis| Ok(n * self.size(axis)?))
    }

    /// A rank's coordinate along `axis`.
    ///
    /// # Errors
    ///
    /// If the mesh has no such axis.
    pub fn coordinate(&self, rank: usize, axis: Axis) -> Result<usize, ShardError> {
        let size = self.size(axis)?;
        let minor = self.axes.iter().rev().take_while(|(name, _)| *name != axis);
        Ok(rank / minor.map(|&(_, size)| size).product::<usize>() % size)
    }

    /// A rank's number within the group over `axes`: its coordinates as digits, the first axis most significant. This
    /// is also the number of the block that it holds of a dimension sharded over `axes`.
    ///
    /// # Errors
    ///
    /// If the mesh lacks one of the axes.
    pub fn index(&self, rank: usize, axes: &[Axis]) -> Result<usize, ShardError> {
        axes.iter().try_fold(0, |index, &axis| Ok(index * self.size(axis)? + self.coordinate(rank, axis)?))
    }

    /// The ranks that differ from `rank` only along `axes`, itself included, in the order of [`index`](Self::index).
    ///
    /// # Errors
    ///
    /// If the mesh lacks one of the axes.
    pub fn group(&self, rank: usize, axes: &[Axis]) -> Result<Vec<usize>, ShardError> {
        self.group_size(axes)?;
        let others = |r: usize| {
            let differ = self.axes.iter().filter(|(axis, _)| !axes.contains(axis));
            differ.map(|&(axis, _)| self.coordinate(r, axis)).collect::<Result<Vec<_>, _>>()
        };
        let mine = others(rank)?;
        let mut group = Vec::new();
        for r in 0..self.chips() {
            if others(r)? == mine {
                group.push((self.index(r, axes)?, r));
            }
        }
        group.sort_unstable();
        Ok(group.into_iter().map(|(_, r)| r).collect())
    }
}

fn print(axes: &[(Axis, usize)]) -> String {
    let parts: Vec<_> = axes.iter().map(|(axis, size)| format!("{axis}={size}")).collect();
    parts.join(",")
}

impl fmt::Display for Mesh {
    /// `x=4,y=4,z=4`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&print(&self.axes))
    }
}

impl FromStr for Mesh {
    type Err = ShardError;

    /// Parses `x=4,y=4,z=4`, or `4x4x4` for a torus.
    fn from_str(text: &str) -> Result<Self, ShardError> {
        let refuse = || ShardError::Mesh { expected: "`x=4,y=4,z=4` or `4x4x4`", found: format!("`{text}`") };
        if !text.contains('=') {
            let sizes: Result<Vec<usize>, _> = text.split('x').map(|part| part.trim().parse()).collect();
            let sizes = sizes.ok().filter(|sizes| sizes.len() <= 3).ok_or_else(refuse)?;
            return Mesh::new([Axis::X, Axis::Y, Axis::Z].into_iter().zip(sizes.into_iter().chain([1, 1])));
        }
        let axis = |part: &str| {
            let (name, size) = part.split_once('=')?;
            let mut letters = name.trim().chars();
            let axis = Axis::try_from(letters.next()?).ok()?;
            Some((axis, size.trim().parse().ok()?)).filter(|_| letters.next().is_none())
        };
        let axes: Option<Vec<_>> = text.split(',').map(axis).collect();
        Mesh::new(axes.ok_or_else(refuse)?)
    }
}

impl TryFrom<Vec<(Axis, usize)>> for Mesh {
    type Error = ShardError;

    fn try_from(axes: Vec<(Axis, usize)>) -> Result<Self, ShardError> {
        Mesh::new(axes)
    }
}

impl From<Mesh> for Vec<(Axis, usize)> {
    fn from(mesh: Mesh) -> Self {
        mesh.axes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_digits() {
        let mesh = Mesh::torus(2, 3, 4).unwrap();
        assert_eq!(mesh.chips(), 24);
        let coordinates = |rank| [Axis::X, Axis::Y, Axis::Z].map(|axis| mesh.coordinate(rank, axis).unwrap());
        assert_eq!(coordinates(23), [1, 2, 3]);
        assert_eq!(coordinates(13), [1, 0, 1]);
        assert_eq!(mesh.index(13, &[Axis::Z, Axis::X]).unwrap(), 3);
        for rank in 0..24 {
            assert_eq!(mesh.index(rank, &[Axis::X, Axis::Y, Axis::Z]).unwrap(), rank);
            for axes in [vec![], vec![Axis::Y], vec![Axis::Z, Axis::X]] {
                let group = mesh.group(rank, &axes).unwrap();
                assert_eq!(group.len(), mesh.group_size(&axes).unwrap());
                assert_eq!(group[mesh.index(rank, &axes).unwrap()], rank);
            }
        }
    }

    #[test]
    fn factorizations_are_complete() {
        // Ordered triples of product 2^k: (k + 1)(k + 2) / 2.
        assert_eq!([1, 64, 128, 256].map(|n| Mesh::factorizations(n).len()), [1, 28, 36, 45]);
        assert!(Mesh::factorizations(96).iter().all(|mesh| mesh.chips() == 96));
        assert!(Mesh::factorizations(0).is_empty());
    }

    #[test]
    fn text_and_back() {
        let mesh = Mesh::torus(4, 2, 1).unwrap();
        assert_eq!(mesh.to_string().parse::<Mesh>().unwrap(), mesh);
        assert_eq!("4x2".parse::<Mesh>().unwrap(), mesh);
        for bad in ["", "x=0", "x=2,x=2", "X=2", "2x0x1", "x=-1", "2x2x2x2", "xy=2", "x=99999999,y=99999999"] {
            assert!(bad.parse::<Mesh>().is_err(), "{bad}");
        }
        assert_eq!("x=2,x=2".parse::<Mesh>().unwrap_err().to_string(), "mesh: expected every axis once, got x=2,x=2");
        assert!(mesh.size(Axis::try_from('w').unwrap()).is_err());
    }
}
