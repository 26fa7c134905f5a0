//! PTX text to kernels. Registers get places as they are declared, blocks have names of their own, branches are resolved.

use std::collections::HashMap;

use super::lexer::{At, Token, tokens};
use super::{Arg, DYNAMIC, Entry, Error, Param, Slot, Space, Statement};

#[derive(Clone, Copy)]
enum Class {
    Pred,
    Bits32,
    Bits64,
}

#[derive(Clone, Copy)]
enum Name {
    /// Registers `prefix0`, `prefix1`, …
    Range(Class, u32, u32),
    One(Class, u32),
    Variable(Space, u64),
}

struct Parser<'a> {
    tokens: Vec<At<'a>>,
    at: usize,
    /// Names of the open blocks, the module's first, and numbers of the blocks.
    scopes: Vec<(usize, HashMap<&'a str, Name>)>,
    blocks: usize,
    labels: HashMap<(usize, &'a str), usize>,
    /// Branches: which statement, from within which blocks, to where.
    branches: Vec<(usize, Vec<usize>, &'a str)>,
    registers: u32,
    predicates: u32,
    shared: usize,
    dynamic_align: usize,
    local: usize,
}

/// All kernels of a module.
pub(crate) fn parse(source: &str) -> Result<Vec<Entry>, Error> {
    let mut parser = Parser {
        tokens: tokens(source)?,
        at: 0,
        scopes: vec![(0, HashMap::new())],
        blocks: 1,
        labels: HashMap::new(),
        branches: Vec::new(),
        registers: 0,
        predicates: 0,
        shared: 0,
        dynamic_align: 1,
        local: 0,
    };
    parser.module().map_err(|error| {
        let line = parser.tokens.get(parser.at.saturating_sub(1)).map_or(0, |(_, line)| *line);
        format!("line {line}: {error}")
    })
}

fn bytes_of(ty: &str) -> Result<usize, Error> {
    Ok(match ty {
        ".b8" | ".u8" | ".s8" => 1,
        ".b16" | ".u16" | ".s16" | ".f16" | ".bf16" => 2,
        ".b32" | ".u32" | ".s32" | ".f32" | ".f16x2" | ".bf16x2" => 4,
        ".b64" | ".u64" | ".s64" | ".f64" => 8,
        other => return Err(format!("expected a type, got {other}")),
    })
}

fn number(text: &str) -> Result<Arg, Error> {
    let bad = |_| format!("{text} is no number");
    let (head, tail) = text.split_at(text.len().min(2));
    Ok(match head {
        "0f" | "0F" => Arg::F32(u32::from_str_radix(tail, 16).map_err(bad)?),
        "0d" | "0D" => Arg::F64(u64::from_str_radix(tail, 16).map_err(bad)?),
        "0x" | "0X" => Arg::Int(u64::from_str_radix(tail.trim_end_matches('U'), 16).map_err(bad)? as i64),
        _ => Arg::Int(text.trim_end_matches('U').parse::<i128>().map_err(bad)? as i64),
    })
}

impl<'a> Parser<'a> {
    fn peek(&self) -> Option<Token<'a>> {
        self.tokens.get(self.at).map(|(token, _)| *token)
    }

    fn next(&mut self) -> Result<Token<'a>, Error> {
        let token = self.peek().ok_or("the text ends within a statement")?;
        self.at += 1;
        Ok(token)
    }

    fn word(&mut self) -> Result<&'a str, Error> {
        match self.next()? {
            Token::Word(word) => Ok(word),
            other => Err(format!("expected a name, got {other:?}")),
        }
    }

    fn count(&mut self) -> Result<usize, Error> {
        match self.next()? {
            Token::Number(text) => match number(text)? {
                Arg::Int(count) => Ok(count as usize),
                other => Err(format!("expected a count, got {other:?}")),
            },
            other => Err(format!("expected a count, got {other:?}")),
        }
    }

    fn take(&mut self, mark: char) -> bool {
        let found = self.peek() == Some(Token::Mark(mark));
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, mark: char) -> Result<(), Error> {
        if self.take(mark) { Ok(()) } else { Err(format!("expected {mark}, got {:?}", self.peek())) }
    }

    fn skip_past(&mut self, mark: char) -> Result<(), Error> {
        while self.next()? != Token::Mark(mark) {}
        Ok(())
    }

    fn module(&mut self) -> Result<Vec<Entry>, Error> {
        let mut entries = Vec::new();
        while let Some(token) = self.peek() {
            match token {
                Token::Word(".version" | ".target" | ".address_size") => {
                    let line = self.tokens[self.at].1;
                    while self.tokens.get(self.at).is_some_and(|(_, here)| *here == line) {
                        self.at += 1;
                    }
                }
                Token::Word(".visible" | ".extern" | ".weak") => self.at += 1,
                Token::Word(".entry") => {
                    self.at += 1;
                    entries.push(self.entry()?);
                }
                Token::Word(".shared") => self.variable()?,
                // Constants of the library's templates. A kernel that reads one names what is not known.
                Token::Word(".global" | ".const") => self.skip_past(';')?,
                // What debuggers read.
                Token::Word(".section") => self.skip_past('}')?,
                other => return Err(format!("expected a kernel, got {other:?}")),
            }
        }
        Ok(entries)
    }

    /// `.shared .align 16 .b8 name[64];`, of a module or a kernel.
    fn variable(&mut self) -> Result<(), Error> {
        let space = self.word()?;
        let (mut align, mut size) = (1, 0);
        let name = loop {
            match self.next()? {
                Token::Word(".align") => align = self.count()?,
                Token::Word(ty) if ty.starts_with('.') => size = bytes_of(ty)?,
                Token::Word(name) => break name,
                other => return Err(format!("expected a variable, got {other:?}")),
            }
        };
        if self.take('[') {
            // Without a length it is what a launch adds, behind all others.
            if self.take(']') {
                self.expect(';')?;
                self.dynamic_align = self.dynamic_align.max(align);
                self.name(name, Name::Variable(Space::Shared, DYNAMIC));
                return Ok(());
            }
            size *= self.count()?;
            self.expect(']')?;
        }
        self.expect(';')?;
        let (used, space) = match space {
            ".shared" => (&mut self.shared, Space::Shared),
            ".local" => (&mut self.local, Space::Local),
            other => return Err(format!("variables in {other} are not known")),
        };
        let start = used.next_multiple_of(align.max(size.min(8)).max(1));
        *used = start + size;
        self.name(name, Name::Variable(space, start as u64));
        Ok(())
    }

    fn name(&mut self, name: &'a str, what: Name) {
        self.scopes.last_mut().expect("a module").1.insert(name, what);
    }

    fn entry(&mut self) -> Result<Entry, Error> {
        let name = self.word()?.to_string();
        (self.registers, self.predicates, self.local) = (0, 0, 0);
        self.open();
        let mut params = Vec::new();
        let mut end = 0usize;
        if self.take('(') {
            while !self.take(')') {
                let (mut align, mut size) = (1, 0);
                let name = loop {
                    match self.next()? {
                        Token::Word(".param" | ".ptr" | ".const" | ".global") => {}
                        Token::Word(".align") => align = self.count()?,
                        Token::Word(ty) if ty.starts_with('.') => size = bytes_of(ty)?,
                        Token::Word(name) => break name,
                        other => return Err(format!("expected a parameter, got {other:?}")),
                    }
                };
                align = align.max(size);
                if self.take('[') {
                    size *= self.count()?;
                    self.expect(']')?;
                }
                self.take(',');
                let offset = end.next_multiple_of(align);
                end = offset + size;
                params.push(Param { offset, size });
                self.name(name, Name::Variable(Space::Param, offset as u64));
            }
        }
        // `.maxntid` and its like: limits that a launch keeps.
        while self.peek() != Some(Token::Mark('{')) {
            self.next()?;
        }
        self.at += 1;
        self.open();
        let mut body = Vec::new();
        let floor = self.scopes.len();
        while self.scopes.len() >= floor {
            self.statement(&mut body)?;
        }
        self.scopes.pop();
        for (at, scopes, label) in std::mem::take(&mut self.branches) {
            let target = scopes.iter().rev().find_map(|&scope| self.labels.get(&(scope, label)));
            body[at].target = *target.ok_or_else(|| format!("label {label} stands nowhere"))?;
        }
        let (shared, local) = (self.shared.next_multiple_of(self.dynamic_align), self.local);
        Ok(Entry { name, params, body, shared, local, registers: self.registers, predicates: self.predicates })
    }

    fn open(&mut self) {
        self.scopes.push((self.blocks, HashMap::new()));
        self.blocks += 1;
    }

    fn statement(&mut self, body: &mut Vec<Statement>) -> Result<(), Error> {
        let line = self.tokens.get(self.at).map_or(0, |(_, line)| *line);
        match self.next()? {
            Token::Mark('{') => self.open(),
            Token::Mark('}') => {
                self.scopes.pop();
            }
            Token::Mark(';') => {}
            Token::Mark('@') => {
                let negated = self.take('!');
                let Arg::Pred(guard, _) = self.argument()? else { return Err("a guard is a predicate".into()) };
                let code = self.word()?;
                self.instruction(code, Some((guard, negated)), line, body)?;
            }
            Token::Word(".reg") => self.registers_of_block()?,
            Token::Word(".shared" | ".local") => {
                self.at -= 1;
                self.variable()?;
            }
            Token::Word(".pragma") => self.skip_past(';')?,
            Token::Word(word) if self.peek() == Some(Token::Mark(':')) => {
                self.at += 1;
                let scope = self.scopes.last().expect("a block").0;
                self.labels.insert((scope, word), body.len());
            }
            Token::Word(code) if !code.starts_with('.') => self.instruction(code, None, line, body)?,
            other => return Err(format!("expected a statement, got {other:?}")),
        }
        Ok(())
    }

    fn registers_of_block(&mut self) -> Result<(), Error> {
        let ty = self.word()?;
        let class = match ty {
            ".pred" => Class::Pred,
            ty if bytes_of(ty)? == 8 => Class::Bits64,
            _ => Class::Bits32,
        };
        loop {
            let name = self.word()?;
            let count = if self.take('<') {
                let count = self.count()? as u32;
                self.expect('>')?;
                Some(count)
            } else {
                None
            };
            let of = count.unwrap_or(1);
            let first = match class {
                Class::Pred => {
                    self.predicates += of;
                    self.predicates - of
                }
                Class::Bits32 => self.places(of),
                Class::Bits64 => {
                    self.registers = self.registers.next_multiple_of(2);
                    self.places(2 * of)
                }
            };
            self.name(name, count.map_or(Name::One(class, first), |count| Name::Range(class, first, count)));
            if !self.take(',') {
                break;
            }
        }
        self.expect(';')
    }

    fn places(&mut self, count: u32) -> Slot {
        self.registers += count;
        self.registers - count
    }

    fn instruction(
        &mut self,
        code: &'a str,
        guard: Option<(u32, bool)>,
        line: u32,
        body: &mut Vec<Statement>,
    ) -> Result<(), Error> {
        let mut args = Vec::new();
        while !self.take(';') {
            let mut arg = self.argument()?;
            if self.take('|') {
                arg = Arg::Both(Box::new(arg), Box::new(self.argument()?));
            }
            args.push(arg);
            if !self.take(',') {
                self.expect(';')?;
                break;
            }
        }
        let code: Vec<String> = code.split('.').map(String::from).collect();
        if code[0] == "bra" {
            let Some(Arg::Label(_)) = args.first() else { return Err(format!("a branch to {args:?}")) };
            // The token before the semicolon.
            let Token::Word(label) = self.tokens[self.at - 2].0 else { return Err("a branch has no label".into()) };
            let scopes = self.scopes.iter().map(|(number, _)| *number).collect();
            self.branches.push((body.len(), scopes, label));
        }
        body.push(Statement { guard, code, args, target: 0, line });
        Ok(())
    }

    fn argument(&mut self) -> Result<Arg, Error> {
        match self.next()? {
            Token::Number(text) => number(text),
            Token::Mark('-') => match self.argument()? {
                Arg::Int(x) => Ok(Arg::Int(x.wrapping_neg())),
                other => Err(format!("a minus before {other:?}")),
            },
            Token::Mark('!') => match self.argument()? {
                Arg::Pred(p, negated) => Ok(Arg::Pred(p, !negated)),
                other => Err(format!("a ! before {other:?}")),
            },
            Token::Mark('{') => {
                let mut all = Vec::new();
                while !self.take('}') {
                    all.push(self.argument()?);
                    self.take(',');
                }
                Ok(Arg::List(all))
            }
            Token::Mark('[') => {
                let base = self.argument()?;
                let mut offset = 0;
                while self.take('+') {
                    match self.argument()? {
                        Arg::Int(x) => offset += x,
                        other => return Err(format!("an offset of {other:?}")),
                    }
                }
                if self.take(',') {
                    let Arg::List(coordinates) = self.argument()? else { return Err("a box has coordinates".into()) };
                    self.expect(']')?;
                    return Ok(Arg::Box(Box::new(base), coordinates));
                }
                self.expect(']')?;
                Ok(Arg::Address(Box::new(base), offset))
            }
            Token::Word("_") => Ok(Arg::Nothing),
            Token::Word(word) => Ok(self.resolve(word)),
            other => Err(format!("expected an operand, got {other:?}")),
        }
    }

    fn resolve(&self, word: &str) -> Arg {
        let reg = |class, at: u32| match class {
            Class::Pred => Arg::Pred(at, false),
            Class::Bits32 => Arg::Reg32(at),
            Class::Bits64 => Arg::Reg64(at),
        };
        let prefix = word.trim_end_matches(|c: char| c.is_ascii_digit());
        let digits = word[prefix.len()..].parse::<u32>();
        for (_, names) in self.scopes.iter().rev() {
            match names.get(word) {
                Some(Name::One(class, at)) => return reg(*class, *at),
                Some(Name::Variable(space, at)) => return Arg::Variable(*space, *at),
                _ => {}
            }
            if let (Some(Name::Range(class, first, count)), Ok(x)) = (names.get(prefix), &digits)
                && x < count
            {
                return reg(*class, first + if matches!(class, Class::Bits64) { 2 * x } else { *x });
            }
        }
        if word.starts_with('%') { Arg::Special(word.into()) } else { Arg::Label(word.into()) }
    }
}
