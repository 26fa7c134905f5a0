//! PTX as data: names resolved to places of the register file, one `Statement` an instruction.

mod lexer;
mod parser;

pub(crate) use parser::parse;

/// What went wrong, for a person.
pub(crate) type Error = String;

/// Place of a register, in units of a `u32` of each of 32 lanes.
pub(crate) type Slot = u32;

/// Offset of the shared memory that a launch adds, until it is known how much a kernel declares.
pub(crate) const DYNAMIC: u64 = 1 << 40;

/// Where a name of memory lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Space {
    Generic,
    Global,
    Shared,
    Local,
    Param,
}

/// An operand.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Arg {
    /// A register of 32 bits or less.
    Reg32(Slot),
    Reg64(Slot),
    /// A predicate, and whether it is negated.
    Pred(u32, bool),
    Int(i64),
    F32(u32),
    F64(u64),
    /// A register that the machine fills: `%tid.x`.
    Special(String),
    /// A variable: its space and its offset there.
    Variable(Space, u64),
    List(Vec<Arg>),
    /// `[base + offset]`
    Address(Box<Arg>, i64),
    /// `[map, {coordinates}]`
    Box(Box<Arg>, Vec<Arg>),
    /// `d|p`
    Both(Box<Arg>, Box<Arg>),
    /// `_`
    Nothing,
    /// A name that is no operand: the target of a branch.
    Label(String),
}

/// An instruction: `@guard opcode args;`
#[derive(Clone, Debug)]
pub(crate) struct Statement {
    /// The predicate that must hold, or must not.
    pub guard: Option<(u32, bool)>,
    /// The opcode, taken apart at its dots.
    pub code: Vec<String>,
    pub args: Vec<Arg>,
    /// Where a branch goes.
    pub target: usize,
    pub line: u32,
}

/// A parameter's place in the parameter space, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Param {
    /// Where it starts.
    pub offset: usize,
    /// How long it is.
    pub size: usize,
}

/// A kernel as it is written.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub name: String,
    pub params: Vec<Param>,
    pub body: Vec<Statement>,
    /// Bytes of shared memory that the kernel declares; dynamic ones follow.
    pub shared: usize,
    /// Bytes of local memory of a thread.
    pub local: usize,
    /// Units of 32 lanes of a `u32` that the registers take.
    pub registers: u32,
    pub predicates: u32,
}
