//! What moved, step by step, and beside it what the program's specs say must move.

use core::fmt;
use std::collections::BTreeMap;

use serde::Serialize;

use super::Traffic;
use crate::count::Counter;
use crate::error::ShardError;
use crate::mesh::{Axis, Mesh};
use crate::precision::Precision;
use crate::program::{Op, Part, Program, Step};
use crate::spec::Sizes;

/// A section of a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Section {
    /// Before the blocks.
    Embed,
    /// A block.
    Layer,
    /// After the blocks.
    Head,
}

impl Section {
    /// All of them, in the order in which they run.
    pub const ALL: [Section; 3] = [Section::Embed, Section::Layer, Section::Head];

    /// Its steps.
    pub fn steps(self, program: &Program) -> &[Step] {
        match self {
            Section::Embed => &program.embed,
            Section::Layer => &program.layer,
            Section::Head => &program.head,
        }
    }
}

impl fmt::Display for Section {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Section::Embed => "embed",
            Section::Layer => "layer",
            Section::Head => "head",
        })
    }
}

/// A collective step of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Key {
    /// Its section.
    pub section: Section,
    /// Which block; 0 outside of the blocks.
    pub layer: usize,
    /// Its number within the section, from 0, as [`Program::flat`] counts: the steps of a repeat once, whatever the
    /// number of rounds.
    pub step: usize,
}

/// The bytes that one rank moved in a run, by step. The axes of a step are the program's.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Ledger {
    entries: BTreeMap<Key, Traffic>,
}

impl Ledger {
    /// Adds what an execution of a step moved.
    pub fn add(&mut self, key: Key, traffic: Traffic) {
        *self.entries.entry(key).or_default() += traffic;
    }

    /// What a step moved, all its rounds together.
    pub fn of(&self, key: Key) -> Traffic {
        self.entries.get(&key).copied().unwrap_or_default()
    }

    /// Every step that was run, with what it moved.
    pub fn entries(&self) -> impl Iterator<Item = (Key, Traffic)> {
        self.entries.iter().map(|(&key, &traffic)| (key, traffic))
    }

    /// Everything that moved.
    pub fn total(&self) -> Traffic {
        let mut total = Traffic::default();
        self.entries.values().for_each(|&traffic| total += traffic);
        total
    }
}

/// A collective step: bytes a chip as derived from the specs, and as counted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Row {
    /// Its section; a row of [`Section::Layer`] is of one block.
    pub section: Section,
    /// Its number within the section.
    pub step: usize,
    /// The part of the model.
    pub part: Part,
    /// The collective.
    pub collective: &'static str,
    /// Axes of its groups.
    pub axes: Vec<Axis>,
    /// Names of the tensors that it writes.
    pub tensors: Vec<&'static str>,
    /// Payload by the specs, all rounds.
    pub predicted_payload: u64,
    /// Sent bytes by the specs.
    pub predicted_sent: u64,
    /// The least that a rank counted in a block.
    pub least: Traffic,
    /// The most that a rank counted in a block.
    pub most: Traffic,
}

impl Row {
    /// Whether every rank counted in every block exactly what the specs say.
    pub fn agrees(&self) -> bool {
        let (payload, sent) = (self.predicted_payload, self.predicted_sent);
        self.least == self.most && self.least == Traffic { payload, sent, received: sent }
    }
}

/// Every collective step of a program that ran in f32 on a model of `layers` blocks, with the ledgers of all ranks.
///
/// # Errors
///
/// If the sizes do not fit the mesh, or a ledger has an entry that is no collective step of the program.
pub fn rows(
    program: &Program,
    mesh: &Mesh,
    sizes: &Sizes,
    layers: usize,
    ledgers: &[Ledger],
) -> Result<Vec<Row>, ShardError> {
    let mut derived: Vec<(*const Op, u64, u64)> = Vec::new();
    Counter::new(program, mesh, 1).steps(sizes, &Precision::f32(), |count| {
        if let Some(moved) = count.moved {
            derived.push((count.op, count.times * moved.payload, count.times * moved.sent));
        }
    })?;
    let mut rows = Vec::new();
    for section in Section::ALL {
        let times = if section == Section::Layer { layers } else { 1 };
        for (step, Step { part, op }) in Program::flat(section.steps(program)).into_iter().enumerate() {
            let Op::Collective { kind, axes, moves } = op else { continue };
            let found = derived.iter().find(|(of, ..)| core::ptr::eq(*of, op));
            // A ring of one rank has no rounds.
            let (predicted_payload, predicted_sent) = found.map_or((0, 0), |&(_, payload, sent)| (payload, sent));
            let counted = || {
                let keys = (0..times).map(|layer| Key { section, layer, step });
                keys.flat_map(|key| ledgers.iter().map(move |ledger| ledger.of(key)))
            };
            let pick = |of: fn(u64, u64) -> u64| {
                let each = |a: Traffic, b: Traffic| Traffic {
                    payload: of(a.payload, b.payload),
                    sent: of(a.sent, b.sent),
                    received: of(a.received, b.received),
                };
                counted().reduce(each).unwrap_or_default()
            };
            rows.push(Row {
                section,
                step,
                part: *part,
                collective: kind.name(),
                axes: axes.clone(),
                tensors: moves.iter().map(|one| program.tensor(one.output).name).collect(),
                predicted_payload,
                predicted_sent,
                least: pick(u64::min),
                most: pick(u64::max),
            });
        }
    }
    let known = |key: Key| {
        let times = if key.section == Section::Layer { layers } else { 1 };
        key.layer < times && rows.iter().any(|row| (row.section, row.step) == (key.section, key.step))
    };
    match ledgers.iter().flat_map(Ledger::entries).find(|&(key, _)| !known(key)) {
        Some((key, _)) => Err(ShardError::field("ledger", "collective steps of the program", format!("{key:?}"))),
        None => Ok(rows),
    }
}
