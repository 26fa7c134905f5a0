//! Chips and what connects them.
//!
//! A mesh axis is a physical one: on a torus an axis has its own links, so that a collective over two axes has twice the
//! bandwidth of one over one axis. Behind a switch all axes share a chip's one port.

mod file;

use serde::{Deserialize, Serialize};

use crate::error::ShardError;
use crate::mesh::{Axis, Mesh};
use crate::program::Collective;

/// How chips are connected.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Network {
    /// Rings along every axis.
    Torus {
        /// Axes that a chip has links for.
        axes: usize,
        /// Bytes a second that a chip sends along one axis, both directions of the ring together.
        axis_bandwidth: f64,
    },
    /// Every chip of a domain reaches every other at full bandwidth, as behind NVLink switches.
    Switch {
        /// Bytes a second that a chip sends.
        bandwidth: f64,
        /// Chips of a domain.
        domain: usize,
        /// Bytes a second that a chip sends beyond its domain.
        outer_bandwidth: f64,
    },
}

/// A chip: peak rates, memory, network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Hardware {
    /// Name, as in `tpu-v4`.
    pub name: String,
    /// Dense bf16 FLOPs a second.
    pub peak_flops: f64,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Bytes a second between memory and chip.
    pub memory_bandwidth: f64,
    /// The network.
    pub network: Network,
    /// Seconds from one chip to the next, for each hop of a collective; 0 if it is not known.
    pub hop_latency: f64,
}

/// Names of the built-in chips.
pub const NAMES: [&str; 5] = ["tpu-v4", "tpu-v5e", "a100", "h100", "h200"];

const GIB: f64 = (1_u64 << 30) as f64;

/// A built-in chip by name.
///
/// # Errors
///
/// If the name is unknown; the message suggests the nearest one.
pub fn by_name(name: &str) -> Result<Hardware, ShardError> {
    let nvlink = |bandwidth, outer_bandwidth| Network::Switch { bandwidth, domain: 8, outer_bandwidth };
    // A TPU's hop is about a microsecond ("How to Scale Your Model", part 2); no figure is at hand for NVLink.
    let (tflops, memory, memory_gbs, network, hop_latency) = match name {
        // §4: 275 TFLOPS, 32 GiB at 1200 GB/s, 270 GB/s over three axes.
        "tpu-v4" => (275.0, 32.0 * GIB, 1200.0, Network::Torus { axes: 3, axis_bandwidth: 90e9 }, 1e-6),
        // "How to Scale Your Model", part 2.
        "tpu-v5e" => (197.0, 16e9, 820.0, Network::Torus { axes: 2, axis_bandwidth: 90e9 }, 1e-6),
        // NVIDIA's data sheets: SXM, dense bf16; NVLink a direction; 200 and 400 Gb/s a GPU between hosts.
        "a100" => (312.0, 80.0 * GIB, 2039.0, nvlink(300e9, 25e9), 0.0),
        "h100" => (989.4, 80.0 * GIB, 3350.0, nvlink(450e9, 50e9), 0.0),
        "h200" => (989.4, 141e9, 4800.0, nvlink(450e9, 50e9), 0.0),
        _ => return Err(ShardError::unknown("hardware", name, &NAMES)),
    };
    Ok(Hardware {
        name: name.to_owned(),
        peak_flops: tflops * 1e12,
        memory_bytes: memory as u64,
        memory_bandwidth: memory_gbs * 1e9,
        network,
        hop_latency,
    })
}

impl Hardware {
    /// Bytes a second that a chip sends over all its links: the paper's "network bandwidth" (A.1).
    pub fn total_bandwidth(&self) -> f64 {
        match self.network {
            Network::Torus { axes, axis_bandwidth } => axes as f64 * axis_bandwidth,
            Network::Switch { bandwidth, .. } => bandwidth,
        }
    }

    /// Whether a mesh can be laid on the network: a torus has so many axes and no more.
    pub fn accepts(&self, mesh: &Mesh) -> Result<(), ShardError> {
        let used = mesh.axes().iter().filter(|(_, size)| *size > 1).count();
        match self.network {
            Network::Torus { axes, .. } if used > axes => {
                let expected = format!("at most {axes} axes of more than one chip, as {} has", self.name);
                Err(ShardError::field("mesh", expected, mesh))
            }
            _ => Ok(()),
        }
    }

    /// Bytes a second that a chip sends in a collective over `axes`.
    ///
    /// Behind switches, ranks next to each other share a domain: the last axis of the mesh is the innermost.
    pub fn bandwidth(&self, mesh: &Mesh, axes: &[Axis]) -> f64 {
        match self.network {
            Network::Torus { axis_bandwidth, .. } => {
                let used = axes.iter().filter(|&&axis| mesh.size(axis).is_ok_and(|size| size > 1));
                axis_bandwidth * used.count().max(1) as f64
            }
            Network::Switch { bandwidth, domain, outer_bandwidth } => {
                if span(mesh, axes) > domain {
                    outer_bandwidth
                } else {
                    bandwidth
                }
            }
        }
    }

    /// Seconds of a collective in which every chip sends `sent` bytes, over `axes`.
    ///
    /// An all-to-all on a ring of `K` chips with links both ways takes `K/4` of what a chip holds ("How to Scale Your
    /// Model", part 3): the middle link is the narrow place. Behind a switch it takes what a chip sends.
    pub fn collective_seconds(&self, kind: Collective, mesh: &Mesh, axes: &[Axis], sent: f64) -> f64 {
        if sent == 0.0 {
            return 0.0;
        }
        let sizes = axes.iter().filter_map(|&axis| mesh.size(axis).ok());
        let (group, longest) = sizes.fold((1, 1), |(group, longest), size| (group * size, longest.max(size)));
        let bandwidth = self.bandwidth(mesh, axes);
        let ring = match (kind, self.network) {
            (Collective::AllToAll, Network::Torus { axis_bandwidth, .. }) => {
                let held = sent * group as f64 / (group - 1) as f64;
                held * longest as f64 / 4.0 / axis_bandwidth
            }
            _ => 0.0,
        };
        self.hops(kind, mesh, axes) * self.hop_latency + ring.max(sent / bandwidth)
    }

    /// Hops that the last byte takes: half of each ring on a torus with links both ways, a step of a ring algorithm for
    /// every other chip behind a switch.
    fn hops(&self, kind: Collective, mesh: &Mesh, axes: &[Axis]) -> f64 {
        let sizes = axes.iter().filter_map(|&axis| mesh.size(axis).ok());
        let through: usize = match self.network {
            Network::Torus { .. } => sizes.map(|size| size / 2).sum(),
            Network::Switch { .. } => sizes.product::<usize>() - 1,
        };
        match kind {
            Collective::AllReduce | Collective::AllReduceMax => 2.0 * through as f64,
            Collective::Send => 1.0,
            Collective::AllToAll if matches!(self.network, Network::Switch { .. }) => 1.0,
            _ => through as f64,
        }
    }
}

/// How far apart in rank the members of a group are, in chips: the group lies in a domain that holds so many.
fn span(mesh: &Mesh, axes: &[Axis]) -> usize {
    let mut stride = 1;
    let mut reach = 1;
    for &(axis, size) in mesh.axes().iter().rev() {
        if axes.contains(&axis) && size > 1 {
            reach = stride * size;
        }
        stride *= size;
    }
    reach
}
