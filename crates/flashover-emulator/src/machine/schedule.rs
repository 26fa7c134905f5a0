//! Who runs: lanes of a warp in groups, warps of a block in turn, blocks side by side on the host's threads.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::Launch;
use super::block::Block;
use super::code::{Function, Step, Then};
use super::memory::give;
use super::registers::{LANES, Registers};
use super::warp::{Group, State, Warp};
use crate::ptx::Error;

/// Instructions of a warp before the next has its turn: one of these by chance, so that warps meet in many ways.
const TURNS: [usize; 4] = [16, 64, 256, 1024];
/// Blocks that a thread of the host runs side by side: those that wait for one another must be among them, or before.
const BLOCKS: usize = 4;
/// Readings of what others may write, after which a block is taken to wait for what never comes.
const PATIENCE: u64 = 20_000_000;

/// A block that runs.
struct Running<'a> {
    function: &'a Function,
    block: Block,
    warps: Vec<Warp>,
    index: [u32; 3],
    yields: u64,
}

/// Runs all blocks of a launch, which may touch these parts of global memory.
pub(crate) fn run(function: &Function, launch: &Launch, allocations: Arc<Vec<(u64, u64)>>) -> Result<(), Error> {
    let [x, y, z] = launch.grid.map(|n| n as usize);
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let params: Arc<[u8]> = launch.params.clone().into();
    let host = std::thread::available_parallelism().map_or(1, |n| n.get()).min(x * y * z);
    let work = || {
        let result = work(function, launch, &params, &allocations, &next, &failed);
        if result.is_err() {
            failed.store(true, Ordering::Relaxed);
        }
        result
    };
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..host).map(|_| scope.spawn(work)).collect();
        let own = work();
        others
            .into_iter()
            .fold(own, |first, other| first.and(other.join().unwrap_or_else(|_| Err("a thread panicked".into()))))
    })
}

fn work(
    function: &Function,
    launch: &Launch,
    params: &Arc<[u8]>,
    allocations: &Arc<Vec<(u64, u64)>>,
    next: &AtomicUsize,
    failed: &AtomicBool,
) -> Result<(), Error> {
    let [x, y, z] = launch.grid.map(|n| n as usize);
    let mut running: Vec<Running> = Vec::new();
    loop {
        while running.len() < BLOCKS {
            let at = next.fetch_add(1, Ordering::Relaxed);
            if at >= x * y * z {
                break;
            }
            let index = [at % x, at / x % y, at / x / y].map(|n| n as u32);
            running.push(Running::new(function, launch, params.clone(), allocations.clone(), index, at as u64));
        }
        if running.is_empty() || failed.load(Ordering::Relaxed) {
            return Ok(());
        }
        let mut at = 0;
        while at < running.len() {
            if running[at].turn()? {
                running.remove(at);
            } else {
                at += 1;
            }
        }
    }
}

impl<'a> Running<'a> {
    fn new(
        function: &'a Function,
        launch: &Launch,
        params: Arc<[u8]>,
        allocations: Arc<Vec<(u64, u64)>>,
        index: [u32; 3],
        seed: u64,
    ) -> Self {
        let threads: u32 = launch.block.iter().product();
        let warps = (0..threads.div_ceil(LANES as u32)).map(|number| {
            let mut registers = Registers::new(function.registers, function.predicates);
            for &(what, slot) in &function.given {
                give(&mut registers, what, slot, index, launch, number);
            }
            let left = threads - number * LANES as u32;
            let mask = if left >= LANES as u32 { u32::MAX } else { (1 << left) - 1 };
            Warp::new(registers, number, mask, function.local)
        });
        let shared = function.static_shared + launch.dynamic_shared;
        let warps = warps.collect();
        let block = Block::new(shared, params, allocations, threads, seed);
        Running { function, block, warps, index, yields: 0 }
    }

    /// Each warp for a while; whether the block has ended.
    fn turn(&mut self) -> Result<bool, Error> {
        let mut moved = false;
        let (count, first) = (self.warps.len(), self.block.random() as usize);
        for at in 0..count {
            let turn = TURNS[self.block.random() as usize % TURNS.len()];
            moved |= self.run_warp((first.wrapping_add(at)) % count, turn)?;
        }
        moved |= self.block.load(!moved).map_err(|e| self.located(e, None))? > 0;
        if self.warps.iter().all(|warp| warp.groups.is_empty()) {
            self.block.load(true).map_err(|e| self.located(e, None))?;
            return Ok(true);
        }
        if !moved {
            return Err(self.located(self.stuck(), None));
        }
        Ok(false)
    }

    fn located(&self, error: Error, at: Option<(u32, usize)>) -> Error {
        let line = at.map(|(warp, at)| format!(", warp {warp}, line {} of the PTX", self.function.code[at].line));
        format!("block {:?}{}: {error}", self.index, line.unwrap_or_default())
    }

    fn stuck(&self) -> Error {
        let mut text = format!("all threads wait; {}", self.block.waiting());
        for warp in &self.warps {
            for group in &warp.groups {
                let line = self.function.code[group.at].line;
                text += &format!("\n  warp {} lanes {:08x} line {line}: {:?}", warp.number, group.mask, group.state);
            }
        }
        text
    }

    /// At most so many instructions of a warp; whether it moved.
    fn run_warp(&mut self, at: usize, turn: usize) -> Result<bool, Error> {
        let (mut moved, mut stalled) = (false, 0u32);
        for _ in 0..turn {
            let warp = &mut self.warps[at];
            let ready = |group: &&Group| group.state == State::Ready && group.mask & stalled == 0;
            let Some(group) = (match &warp.groups[..] {
                [one] => Some(*one).filter(|group| ready(&group)),
                all => all.iter().filter(ready).min_by_key(|group| group.at).copied(),
            }) else {
                break;
            };
            let then = step(self.function, warp, &mut self.block, group);
            let number = warp.number;
            match then.map_err(|error| self.located(error, Some((number, group.at))))? {
                Then::Again => stalled |= group.mask,
                Then::Yield => {
                    moved = true;
                    self.yields += 1;
                    if self.yields > PATIENCE {
                        let error = "waits for what another block never writes".into();
                        return Err(self.located(error, Some((number, group.at))));
                    }
                    break;
                }
                Then::Next | Then::Wait(_) => moved = true,
            }
            if self.block.released != 0 {
                self.release();
            }
        }
        Ok(moved)
    }

    /// Lanes at barriers that have let them go.
    fn release(&mut self) {
        let released = std::mem::take(&mut self.block.released);
        for warp in &mut self.warps {
            for group in &mut warp.groups {
                if let State::Wait(id) = group.state
                    && released >> id & 1 != 0
                {
                    group.state = State::Ready;
                    group.at += 1;
                }
            }
            if warp.groups.len() > 1 {
                merge(&mut warp.groups);
            }
        }
    }
}

/// Groups that stand at the same instruction become one.
fn merge(groups: &mut Vec<Group>) {
    let waits = |group: &Group| matches!(group.state, State::Wait(_));
    let mut x = 0;
    while x < groups.len() {
        let mut y = x + 1;
        while y < groups.len() {
            if groups[x].at == groups[y].at && !waits(&groups[x]) && !waits(&groups[y]) {
                let other = groups.swap_remove(y);
                groups[x].mask |= other.mask;
                groups[x].state = State::Ready;
            } else {
                y += 1;
            }
        }
        x += 1;
    }
}

/// One instruction of a group.
fn step(function: &Function, warp: &mut Warp, block: &mut Block, group: Group) -> Result<Then, Error> {
    let instruction = &function.code[group.at];
    let mask = match instruction.guard {
        None => group.mask,
        Some((p, negated)) => group.mask & warp.registers.holds(p, negated),
    };
    let place = |warp: &Warp| warp.groups.iter().position(|other| other.mask == group.mask).expect("the group stands");
    let mut then = Then::Next;
    let mut next = group.at + 1;
    if mask != 0 {
        match &instruction.step {
            Step::Compute(f) => f(&mut warp.registers, mask),
            Step::Act(f) => then = f(warp, block, mask)?,
            Step::Together(members, f) => {
                let named = members.map_or(u32::MAX, |slot| warp.registers.get(slot)[mask.trailing_zeros() as usize]);
                // Lanes that a guard excludes take no part.
                let excluded = group.mask & !mask;
                if named & warp.live() & !mask & !excluded != 0 {
                    let x = place(warp);
                    warp.groups[x].state = State::Together;
                    return Ok(Then::Next);
                }
                then = f(warp, block, mask)?;
            }
            Step::Branch(target) if mask == group.mask => next = *target,
            Step::Branch(target) => {
                let x = place(warp);
                warp.groups[x] = Group { at: next, mask: group.mask & !mask, state: State::Ready };
                warp.groups.push(Group { at: *target, mask, state: State::Ready });
                merge(&mut warp.groups);
                return Ok(Then::Next);
            }
            Step::Exit => {
                let x = place(warp);
                super::copies::finish(warp, block, mask)?;
                warp.groups[x].mask &= !mask;
                warp.groups[x].at = next;
                if warp.groups[x].mask == 0 {
                    warp.groups.swap_remove(x);
                }
                // Those that waited for the lanes look again.
                for group in &mut warp.groups {
                    if group.state == State::Together {
                        group.state = State::Ready;
                    }
                }
                block.end(mask.count_ones());
                return Ok(Then::Next);
            }
        }
    }
    let x = if warp.groups.len() == 1 { 0 } else { place(warp) };
    match then {
        Then::Again => {}
        Then::Wait(id) => warp.groups[x].state = State::Wait(id),
        Then::Next | Then::Yield => {
            warp.groups[x].at = next;
            if warp.groups.len() > 1 {
                merge(&mut warp.groups);
            }
        }
    }
    Ok(then)
}
