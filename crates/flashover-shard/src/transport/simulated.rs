//! Logical ranks on one device: every rank a thread, every message a tensor through a channel.

use std::collections::{HashMap, VecDeque};
use std::sync::mpsc::{Receiver, Sender, channel};

use burn::tensor::Tensor;

use super::{Reduction, Traffic, Transport, bytes};
use crate::error::ShardError;
use crate::mesh::{Axis, Mesh};

struct Message {
    from: usize,
    /// `None` when the rank's end is dropped: nothing comes from it any more.
    tensor: Option<Tensor<4>>,
}

/// The ranks of a group in order, and which of them is this one.
#[derive(Clone)]
struct Group {
    ranks: Vec<usize>,
    index: usize,
}

impl Group {
    fn others(&self) -> impl Iterator<Item = (usize, usize)> {
        self.ranks.iter().copied().enumerate().filter(|&(index, _)| index != self.index)
    }
}

/// One rank's end of a mesh of threads. Each message goes straight to its receiver, so that a rank sends what a ring
/// would make it send, in fewer hops.
pub struct Simulated {
    rank: usize,
    mesh: Mesh,
    mailbox: Receiver<Message>,
    peers: Vec<Sender<Message>>,
    /// Tensors that came before they were asked for, by sender.
    early: Vec<VecDeque<Tensor<4>>>,
    stopped: Vec<bool>,
    groups: HashMap<Vec<Axis>, Group>,
    traffic: Traffic,
}

impl Simulated {
    /// The ends of all ranks of a mesh, in order.
    pub fn ends(mesh: &Mesh) -> Vec<Simulated> {
        let chips = mesh.chips();
        let (peers, mailboxes): (Vec<_>, Vec<_>) = (0..chips).map(|_| channel()).unzip();
        let end = |(rank, mailbox)| Simulated {
            rank,
            mesh: mesh.clone(),
            mailbox,
            peers: peers.clone(),
            early: (0..chips).map(|_| VecDeque::new()).collect(),
            stopped: vec![false; chips],
            groups: HashMap::new(),
            traffic: Traffic::default(),
        };
        mailboxes.into_iter().enumerate().map(end).collect()
    }

    fn group(&mut self, axes: &[Axis]) -> Result<Group, ShardError> {
        if let Some(group) = self.groups.get(axes) {
            return Ok(group.clone());
        }
        let group = Group { ranks: self.mesh.group(self.rank, axes)?, index: self.mesh.index(self.rank, axes)? };
        self.groups.insert(axes.to_vec(), group.clone());
        Ok(group)
    }

    fn send(&mut self, to: usize, tensor: Tensor<4>) -> Result<(), ShardError> {
        let size = bytes(&tensor);
        let message = Message { from: self.rank, tensor: Some(tensor) };
        self.peers[to].send(message).map_err(|_| ShardError::Stopped { rank: self.rank, peer: to })?;
        self.traffic.sent += size;
        Ok(())
    }

    /// The next tensor from a rank, which must have this shape.
    fn receive(&mut self, peer: usize, shape: [usize; 4]) -> Result<Tensor<4>, ShardError> {
        let tensor = self.receive_any(peer)?;
        if tensor.dims() != shape {
            let field = format!("rank {}: tensor of rank {peer}", self.rank);
            return Err(ShardError::field(field, format!("{shape:?}"), format!("{:?}", tensor.dims())));
        }
        Ok(tensor)
    }

    /// The next tensor from a rank.
    fn receive_any(&mut self, peer: usize) -> Result<Tensor<4>, ShardError> {
        loop {
            if let Some(tensor) = self.early[peer].pop_front() {
                self.traffic.received += bytes(&tensor);
                return Ok(tensor);
            }
            if self.stopped[peer] {
                return Err(ShardError::Stopped { rank: self.rank, peer });
            }
            match self.mailbox.recv() {
                Ok(Message { from, tensor: Some(tensor) }) => self.early[from].push_back(tensor),
                Ok(Message { from, tensor: None }) => self.stopped[from] = true,
                Err(_) => return Err(ShardError::Stopped { rank: self.rank, peer }),
            }
        }
    }

    /// Counts payload; a group of one moves nothing.
    fn count(&mut self, group: &Group, payload: &[Tensor<4>]) {
        if group.ranks.len() > 1 {
            self.traffic.payload += payload.iter().map(bytes).sum::<u64>();
        }
    }

    /// One piece to each rank of the group, and one from each: the one at this rank's place stays.
    fn exchange(&mut self, group: &Group, mut pieces: Vec<Tensor<4>>) -> Result<Vec<Tensor<4>>, ShardError> {
        if pieces.len() != group.ranks.len() {
            let field = format!("rank {}: pieces", self.rank);
            return Err(ShardError::field(field, format!("{} of a group", group.ranks.len()), pieces.len()));
        }
        for (index, rank) in group.others() {
            self.send(rank, pieces[index].clone())?;
        }
        let shape = pieces[group.index].dims();
        for (index, rank) in group.others() {
            pieces[index] = self.receive(rank, shape)?;
        }
        Ok(pieces)
    }
}

fn reduce(pieces: Vec<Tensor<4>>, reduction: Reduction) -> Tensor<4> {
    let both = |a: Tensor<4>, b: Tensor<4>| match reduction {
        Reduction::Sum => a + b,
        Reduction::Max => a.max_pair(b),
    };
    pieces.into_iter().reduce(both).expect("a group has at least one rank")
}

impl Transport for Simulated {
    fn rank(&self) -> usize {
        self.rank
    }

    fn all_gather(&mut self, axes: &[Axis], tensor: Tensor<4>) -> Result<Vec<Tensor<4>>, ShardError> {
        let group = self.group(axes)?;
        let copies = vec![tensor; group.ranks.len()];
        let all = self.exchange(&group, copies)?;
        self.count(&group, &all);
        Ok(all)
    }

    fn reduce_scatter(&mut self, axes: &[Axis], pieces: Vec<Tensor<4>>) -> Result<Tensor<4>, ShardError> {
        let group = self.group(axes)?;
        self.count(&group, &pieces);
        Ok(reduce(self.exchange(&group, pieces)?, Reduction::Sum))
    }

    /// A reduce-scatter and an all-gather of the flat tensor, in pieces of equal length, the last one filled up.
    fn all_reduce(&mut self, axes: &[Axis], tensor: Tensor<4>, reduction: Reduction) -> Result<Tensor<4>, ShardError> {
        let group = self.group(axes)?;
        let chips = group.ranks.len();
        if chips == 1 {
            return Ok(tensor);
        }
        let (shape, elements) = (tensor.dims(), tensor.dims().iter().product::<usize>());
        let piece = elements.div_ceil(chips);
        let before = bytes(&tensor);
        let mut flat: Tensor<1> = tensor.reshape([elements]);
        if piece * chips > elements {
            let filling = Tensor::zeros([piece * chips - elements], (&flat.device(), flat.dtype()));
            flat = Tensor::cat(vec![flat, filling], 0);
        }
        let cut = |index: usize| flat.clone().narrow(0, index * piece, piece).reshape([1, 1, 1, piece]);
        let mine = reduce(self.exchange(&group, (0..chips).map(cut).collect())?, reduction);
        let all = self.exchange(&group, vec![mine; chips])?;
        let after = Tensor::cat(all, 3).narrow(3, 0, elements).reshape(shape);
        self.traffic.payload += before + bytes(&after);
        Ok(after)
    }

    fn all_to_all(&mut self, axes: &[Axis], pieces: Vec<Tensor<4>>) -> Result<Vec<Tensor<4>>, ShardError> {
        let group = self.group(axes)?;
        self.count(&group, &pieces);
        self.exchange(&group, pieces)
    }

    fn send_receive(&mut self, axes: &[Axis], tensor: Tensor<4>) -> Result<Tensor<4>, ShardError> {
        let Group { ranks, index } = self.group(axes)?;
        let chips = ranks.len();
        if chips == 1 {
            return Ok(tensor);
        }
        let shape = tensor.dims();
        self.traffic.payload += bytes(&tensor);
        self.send(ranks[(index + 1) % chips], tensor)?;
        self.receive(ranks[(index + chips - 1) % chips], shape)
    }

    fn broadcast(&mut self, axes: &[Axis], root: usize, tensor: Option<Tensor<4>>) -> Result<Tensor<4>, ShardError> {
        let group = self.group(axes)?;
        let field = || format!("rank {}: tensor to broadcast", self.rank);
        if root >= group.ranks.len() {
            return Err(ShardError::field("root", format!("below {}", group.ranks.len()), root));
        }
        let tensor = match (tensor, group.index == root) {
            (Some(tensor), true) => {
                for (_, rank) in group.others() {
                    self.send(rank, tensor.clone())?;
                }
                tensor
            }
            (None, false) => self.receive_any(group.ranks[root])?,
            (Some(_), false) => return Err(ShardError::field(field(), "one at the root only", "one")),
            (None, true) => return Err(ShardError::field(field(), "one at the root", "none")),
        };
        self.count(&group, core::slice::from_ref(&tensor));
        Ok(tensor)
    }

    fn traffic(&self) -> Traffic {
        self.traffic
    }
}

impl Drop for Simulated {
    /// A rank that fails or panics must not leave the others waiting.
    fn drop(&mut self) {
        for peer in &self.peers {
            // Who has stopped already does not need to know.
            let _ = peer.send(Message { from: self.rank, tensor: None });
        }
    }
}
