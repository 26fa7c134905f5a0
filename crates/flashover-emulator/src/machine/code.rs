//! A kernel ready to run: one closure an instruction.

use std::collections::HashMap;

use super::block::Block;
use super::registers::Registers;
use super::warp::Warp;
use crate::ptx::{Arg, DYNAMIC, Entry, Error, Slot, Space, Statement};

/// Works on registers alone.
pub(crate) type Compute = Box<dyn Fn(&mut Registers, u32) + Send + Sync>;
/// Touches memory or what a block shares.
pub(crate) type Act = Box<dyn Fn(&mut Warp, &mut Block, u32) -> Result<Then, Error> + Send + Sync>;

/// What comes after an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Then {
    Next,
    /// Others come first: this one waits for them, by reading again and again.
    Yield,
    /// Not done yet: once more when others have moved on.
    Again,
    /// The lanes stand at a barrier of the block, by its number.
    Wait(usize),
}

/// What an instruction does.
pub(crate) enum Step {
    Compute(Compute),
    Act(Act),
    /// All lanes named must be here: those of the register, or all that live.
    Together(Option<Slot>, Act),
    Branch(usize),
    Exit,
}

/// An instruction.
pub(crate) struct Instruction {
    pub guard: Option<(u32, bool)>,
    pub step: Step,
    pub line: u32,
}

/// What the machine writes into registers before a warp starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Given {
    Bits32(u32),
    Bits64(u64),
    /// `%tid`, `%ntid`, `%ctaid`, `%nctaid` in a dimension.
    Thread(usize),
    Threads(usize),
    Block(usize),
    Blocks(usize),
    Lane,
    Warp,
    LanesBelow,
    SharedSize,
}

/// A kernel.
pub struct Function {
    /// Its name.
    pub name: String,
    /// Its parameters.
    pub params: Vec<crate::ptx::Param>,
    /// Bytes of shared memory that it declares.
    pub static_shared: usize,
    pub(crate) code: Vec<Instruction>,
    pub(crate) given: Vec<(Given, Slot)>,
    pub(crate) registers: u32,
    pub(crate) predicates: u32,
    pub(crate) local: usize,
}

/// Where shared memory starts in its window; a GPU keeps what lies before for itself.
pub(crate) const SHARED_START: u64 = 1024;
/// Generic addresses of shared memory, of local memory and of parameters start here, far from any of the host.
pub(crate) const SHARED_WINDOW: u64 = 1 << 56;
pub(crate) const LOCAL_WINDOW: u64 = 1 << 57;
pub(crate) const PARAM_WINDOW: u64 = 1 << 58;

/// Makes instructions of statements and keeps count of the registers that hold constants.
pub(crate) struct Builder {
    given: HashMap<Given, Slot>,
    registers: u32,
    predicates: u32,
    dynamic: u64,
}

impl Builder {
    /// A kernel of what is written.
    pub(crate) fn function(entry: Entry) -> Result<Function, Error> {
        let mut builder = Builder {
            given: HashMap::new(),
            registers: entry.registers,
            predicates: entry.predicates,
            dynamic: entry.shared as u64,
        };
        let mut code = Vec::with_capacity(entry.body.len());
        for statement in &entry.body {
            let step = builder.step(statement).map_err(|e| {
                format!("line {}: {} {:?}: {e}", statement.line, statement.code.join("."), statement.args)
            })?;
            code.push(Instruction { guard: statement.guard, step, line: statement.line });
        }
        code.push(Instruction { guard: None, step: Step::Exit, line: 0 });
        Ok(Function {
            name: entry.name,
            params: entry.params,
            static_shared: entry.shared,
            code,
            given: builder.given.into_iter().collect(),
            registers: builder.registers,
            predicates: builder.predicates,
            local: entry.local.next_multiple_of(16),
        })
    }

    fn step(&mut self, statement: &Statement) -> Result<Step, Error> {
        let code: Vec<&str> = statement.code.iter().map(String::as_str).collect();
        let (code, args) = (&code[..], &statement.args[..]);
        match code[0] {
            "bra" => Ok(Step::Branch(statement.target)),
            "ret" | "exit" => Ok(Step::Exit),
            "ld" | "st" | "ldu" | "atom" | "red" | "cvta" | "prefetch" | "isspacep" => {
                super::memory::step(self, code, args)
            }
            "bar" | "barrier" | "shfl" | "vote" | "activemask" | "elect" | "mbarrier" | "nanosleep" | "fence"
            | "membar" | "setmaxnreg" | "trap" | "griddepcontrol" | "redux" => {
                super::synchronize::step(self, code, args)
            }
            "cp" => super::copies::step(self, code, args),
            "ldmatrix" | "stmatrix" | "mma" | "wmma" | "wgmma" => super::matrices::step(self, code, args),
            _ => super::arithmetic::step(self, code, args),
        }
    }

    fn given(&mut self, what: Given) -> Slot {
        if let Some(&slot) = self.given.get(&what) {
            return slot;
        }
        let wide = matches!(what, Given::Bits64(_));
        if wide {
            self.registers = self.registers.next_multiple_of(2);
        }
        let slot = self.registers;
        self.registers += if wide { 2 } else { 1 };
        self.given.insert(what, slot);
        slot
    }

    fn special(&mut self, name: &str) -> Result<Slot, Error> {
        let dimension = |name: &str| match name.rsplit('.').next() {
            Some("x") => Ok(0),
            Some("y") => Ok(1),
            Some("z") => Ok(2),
            _ => Err(format!("{name} has no such dimension")),
        };
        let what = match name.split('.').next().unwrap_or(name) {
            "%tid" => Given::Thread(dimension(name)?),
            "%ntid" => Given::Threads(dimension(name)?),
            "%ctaid" => Given::Block(dimension(name)?),
            "%nctaid" => Given::Blocks(dimension(name)?),
            "%laneid" => Given::Lane,
            "%warpid" => Given::Warp,
            "%lanemask_lt" => Given::LanesBelow,
            "%dynamic_smem_size" | "%total_smem_size" => Given::SharedSize,
            "%cluster_ctarank" | "%cluster_ctaid" | "%clusterid" | "%smid" => Given::Bits32(0),
            _ => return Err(format!("the register {name} is not known")),
        };
        Ok(self.given(what))
    }

    /// A source of 32 bits or less. Floats that are written down as such keep their bits.
    pub(crate) fn source(&mut self, arg: &Arg) -> Result<Slot, Error> {
        match arg {
            Arg::Reg32(slot) => Ok(*slot),
            Arg::Int(x) => Ok(self.given(Given::Bits32(*x as u32))),
            Arg::F32(x) => Ok(self.given(Given::Bits32(*x))),
            Arg::Special(name) => self.special(name),
            Arg::Variable(..) => {
                let address = self.address_of(arg)?;
                Ok(self.given(Given::Bits32(address as u32)))
            }
            other => Err(format!("expected 32 bits, got {other:?}")),
        }
    }

    /// A source of 64 bits.
    pub(crate) fn source64(&mut self, arg: &Arg) -> Result<Slot, Error> {
        match arg {
            Arg::Reg64(slot) => Ok(*slot),
            Arg::Int(x) => Ok(self.given(Given::Bits64(*x as u64))),
            Arg::F64(x) => Ok(self.given(Given::Bits64(*x))),
            Arg::Variable(..) => {
                let address = self.address_of(arg)?;
                Ok(self.given(Given::Bits64(address)))
            }
            other => Err(format!("expected 64 bits, got {other:?}")),
        }
    }

    /// The address of a variable within its space.
    pub(crate) fn address_of(&self, arg: &Arg) -> Result<u64, Error> {
        match arg {
            Arg::Variable(Space::Shared, at) if *at >= DYNAMIC => Ok(SHARED_START + self.dynamic + (at - DYNAMIC)),
            Arg::Variable(Space::Shared, at) => Ok(SHARED_START + at),
            Arg::Variable(_, at) => Ok(*at),
            other => Err(format!("expected a variable, got {other:?}")),
        }
    }
}

/// Registers that are written, of 32 bits or less.
pub(crate) fn target(arg: &Arg) -> Result<Slot, Error> {
    match arg {
        Arg::Reg32(slot) => Ok(*slot),
        other => Err(format!("expected a register of 32 bits, got {other:?}")),
    }
}

/// A register that is written, of 64 bits.
pub(crate) fn target64(arg: &Arg) -> Result<Slot, Error> {
    match arg {
        Arg::Reg64(slot) => Ok(*slot),
        other => Err(format!("expected a register of 64 bits, got {other:?}")),
    }
}

/// A predicate that is written.
pub(crate) fn target_predicate(arg: &Arg) -> Result<u32, Error> {
    match arg {
        Arg::Pred(at, false) => Ok(*at),
        other => Err(format!("expected a predicate, got {other:?}")),
    }
}

/// The elements of a list, or the one operand.
pub(crate) fn list(arg: &Arg) -> &[Arg] {
    match arg {
        Arg::List(all) => all,
        one => std::slice::from_ref(one),
    }
}
