//! How ranks exchange tensors: collectives over named mesh axes, as one rank calls them.
//!
//! A transport knows ranks and buffers, not specs: the [executor](crate::execute) cuts a tensor into pieces and puts
//! pieces together. Every rank of a group calls the same operations in the same order with tensors of one shape.
//! [`Simulated`] is the only one so far; real GPUs and hosts come behind the same trait.

mod ledger;
mod simulated;

use burn::tensor::Tensor;
use serde::Serialize;

use crate::error::ShardError;
use crate::mesh::Axis;

pub use ledger::{Key, Ledger, Row, Section, rows};
pub use simulated::Simulated;

/// How an all-reduce combines the ranks' elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reduction {
    /// The sum, in the order of the group.
    Sum,
    /// The maximum.
    Max,
}

/// Bytes that one rank moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Traffic {
    /// Bytes as the paper counts them (A.1), taken from the buffers that went in or came out: the output of an
    /// all-gather, the input of a reduce-scatter, both of an all-reduce, the input of an all-to-all or a send.
    pub payload: u64,
    /// Bytes of the buffers that went to other ranks.
    pub sent: u64,
    /// Bytes of the buffers that came from other ranks.
    pub received: u64,
}

impl Traffic {
    /// What was moved since an earlier reading of the same counter.
    #[must_use]
    pub fn since(self, before: Traffic) -> Traffic {
        Traffic {
            payload: self.payload - before.payload,
            sent: self.sent - before.sent,
            received: self.received - before.received,
        }
    }
}

impl core::ops::AddAssign for Traffic {
    fn add_assign(&mut self, other: Traffic) {
        self.payload += other.payload;
        self.sent += other.sent;
        self.received += other.received;
    }
}

/// One rank's end of a network. A group is the ranks that differ only along `axes`; its order is that of
/// [`Mesh::index`](crate::mesh::Mesh::index) over `axes` as they are given. A group of one moves nothing.
///
/// # Errors
///
/// Every operation fails if the mesh lacks an axis, a tensor of another rank has another shape, the number of pieces is
/// not that of the group, or another rank has stopped.
pub trait Transport {
    /// The rank whose end this is.
    fn rank(&self) -> usize;

    /// Every rank's tensor, in the order of the group.
    fn all_gather(&mut self, axes: &[Axis], tensor: Tensor<4>) -> Result<Vec<Tensor<4>>, ShardError>;

    /// From a piece for every rank of the group, the sum of what all have for this one.
    fn reduce_scatter(&mut self, axes: &[Axis], pieces: Vec<Tensor<4>>) -> Result<Tensor<4>, ShardError>;

    /// The sum or the maximum of all ranks' tensors, bit for bit the same on every rank.
    fn all_reduce(&mut self, axes: &[Axis], tensor: Tensor<4>, reduction: Reduction) -> Result<Tensor<4>, ShardError>;

    /// From a piece for every rank of the group, what each of them has for this one.
    fn all_to_all(&mut self, axes: &[Axis], pieces: Vec<Tensor<4>>) -> Result<Vec<Tensor<4>>, ShardError>;

    /// Sends to the next rank of the group, and receives from the one before, cyclically.
    fn send_receive(&mut self, axes: &[Axis], tensor: Tensor<4>) -> Result<Tensor<4>, ShardError>;

    /// The tensor of the rank with index `root` in the group, which alone gives one.
    fn broadcast(&mut self, axes: &[Axis], root: usize, tensor: Option<Tensor<4>>) -> Result<Tensor<4>, ShardError>;

    /// Bytes that this rank has moved since the transport was made.
    fn traffic(&self) -> Traffic;
}

/// Bytes of a tensor's elements.
pub(crate) fn bytes(tensor: &Tensor<4>) -> u64 {
    (tensor.dims().iter().product::<usize>() * tensor.dtype().size()) as u64
}
