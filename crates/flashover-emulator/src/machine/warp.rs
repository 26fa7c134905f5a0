//! A warp: its lanes, in groups that stand at the same instruction, and what it started and has not waited for.

use std::collections::VecDeque;

use super::registers::{LANES, Registers};
use super::warpgroup::Product;
use crate::ptx::Error;

/// Whether lanes can go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Ready,
    /// Until others come to the same instruction.
    Together,
    /// Until a barrier of the block lets them.
    Wait(usize),
}

/// Lanes at the same instruction.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Group {
    pub at: usize,
    pub mask: u32,
    pub state: State,
}

/// Groups of what a lane, or a warp, started: an open one and those that were closed and not waited for.
pub(crate) struct Pending<T> {
    pub open: Vec<T>,
    pub closed: VecDeque<Vec<T>>,
}

impl<T> Default for Pending<T> {
    fn default() -> Self {
        Pending { open: Vec::new(), closed: VecDeque::new() }
    }
}

impl<T> Pending<T> {
    pub(crate) fn close(&mut self) {
        self.closed.push_back(std::mem::take(&mut self.open));
    }

    /// All but the last `left` groups.
    pub(crate) fn take(&mut self, left: usize) -> Vec<T> {
        let count = self.closed.len().saturating_sub(left);
        self.closed.drain(..count).flatten().collect()
    }
}

/// A copy of a thread: `cp.async`.
pub(crate) struct Copy {
    pub to: u64,
    pub from: u64,
    pub size: usize,
    /// Bytes that are read; zeros follow.
    pub read: usize,
}

/// A write of the copy engine.
pub(crate) struct Bulk {
    pub to: u64,
    pub from: u64,
    pub bytes: usize,
    /// Whether floats are added, not written.
    pub adds: bool,
}

/// A warp.
pub(crate) struct Warp {
    pub registers: Registers,
    pub groups: Vec<Group>,
    pub number: u32,
    local: Vec<u8>,
    local_size: usize,
    pub copies: Vec<Pending<Copy>>,
    pub bulk: Vec<Pending<Bulk>>,
    pub products: Pending<Product>,
}

impl Warp {
    pub(crate) fn new(registers: Registers, number: u32, mask: u32, local_size: usize) -> Self {
        Warp {
            registers,
            groups: vec![Group { at: 0, mask, state: State::Ready }],
            number,
            // 16 more, for alignment.
            local: vec![0xa5; local_size * LANES + 16],
            local_size,
            copies: (0..LANES).map(|_| Pending::default()).collect(),
            bulk: (0..LANES).map(|_| Pending::default()).collect(),
            products: Pending::default(),
        }
    }

    /// Lanes that have not ended.
    pub(crate) fn live(&self) -> u32 {
        self.groups.iter().fold(0, |all, group| all | group.mask)
    }

    pub(crate) fn local(&mut self, lane: usize, at: u64, len: usize) -> Result<*mut u8, Error> {
        if at.saturating_add(len as u64) > self.local_size as u64 {
            return Err(format!("{len} bytes at {at:#x} of local memory, which has {}", self.local_size));
        }
        let start = self.local.as_mut_ptr();
        let align = start.align_offset(16);
        Ok(start.wrapping_add(align + lane * self.local_size + at as usize))
    }
}
