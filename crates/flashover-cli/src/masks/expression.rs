//! Masks as text: `causal & (sliding_window:512 | sinks:64)`.
//!
//! ```text
//! either  = both { "|" both }
//! both    = one { "&" one }
//! one     = "!" one | "(" either ")" | name [ ":" number { "," number } ]
//! ```

use flashover::kernels::mask::{Extent, Mask};

use super::patterns::{PATTERNS, Pattern};

/// Most `!` and `(` inside one another.
const DEPTH: usize = 64;

/// Why a text is no mask. Columns count characters from 1.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ExpressionError {
    /// Something else stands there.
    #[error("column {column}: expected {expected}, got {found}")]
    Expected {
        /// Where.
        column: usize,
        /// What would do.
        expected: String,
        /// What is there.
        found: String,
    },
    /// No pattern has that name.
    #[error("column {column}: no pattern `{name}`{hint}; expected one of {known}")]
    Unknown {
        /// Where.
        column: usize,
        /// What came.
        name: String,
        /// A near name.
        hint: String,
        /// All names.
        known: String,
    },
    /// Too many levels of `!` and parentheses.
    #[error("expected at most {DEPTH} levels of `!` and parentheses")]
    TooDeep,
}

/// Reads a mask. `extent` is what patterns of documents are made for.
pub fn parse(text: &str, extent: Extent) -> Result<Mask, ExpressionError> {
    let mut parser = Parser { text: text.chars().collect(), at: 0, extent };
    let mask = parser.either(0)?;
    match parser.peek() {
        None => Ok(mask),
        Some(_) => Err(parser.expected("`&`, `|` or the end")),
    }
}

struct Parser {
    text: Vec<char>,
    at: usize,
    extent: Extent,
}

impl Parser {
    /// The next character that is no space.
    fn peek(&mut self) -> Option<char> {
        while self.text.get(self.at).is_some_and(|c| c.is_whitespace()) {
            self.at += 1;
        }
        self.text.get(self.at).copied()
    }

    fn take(&mut self, c: char) -> bool {
        let there = self.peek() == Some(c);
        self.at += usize::from(there);
        there
    }

    fn word(&mut self, belongs: impl Fn(char) -> bool) -> String {
        self.peek();
        let word: String = self.text[self.at..].iter().copied().take_while(|&c| belongs(c)).collect();
        self.at += word.chars().count();
        word
    }

    fn expected(&mut self, expected: impl Into<String>) -> ExpressionError {
        let found = self.peek().map_or("the end".into(), |c| format!("`{c}`"));
        ExpressionError::Expected { column: self.at + 1, expected: expected.into(), found }
    }

    fn either(&mut self, depth: usize) -> Result<Mask, ExpressionError> {
        let mut mask = self.both(depth)?;
        while self.take('|') {
            mask = mask | self.both(depth)?;
        }
        Ok(mask)
    }

    fn both(&mut self, depth: usize) -> Result<Mask, ExpressionError> {
        let mut mask = self.one(depth)?;
        while self.take('&') {
            mask = mask & self.one(depth)?;
        }
        Ok(mask)
    }

    fn one(&mut self, depth: usize) -> Result<Mask, ExpressionError> {
        if depth > DEPTH {
            return Err(ExpressionError::TooDeep);
        }
        if self.take('!') {
            return Ok(!self.one(depth + 1)?);
        }
        if self.take('(') {
            let mask = self.either(depth + 1)?;
            return if self.take(')') { Ok(mask) } else { Err(self.expected("`)`")) };
        }
        self.peek();
        let column = self.at + 1;
        let name = self.word(|c| c.is_alphanumeric() || c == '_');
        if name.is_empty() {
            return Err(self.expected("a pattern, `!` or `(`"));
        }
        let pattern = PATTERNS.iter().find(|pattern| pattern.name == name);
        let pattern = pattern.ok_or_else(|| unknown(column, name))?;
        let numbers = self.numbers()?;
        if let Some(mask) = (pattern.make)(&numbers, self.extent) {
            return Ok(mask);
        }
        let numbers: Vec<String> = numbers.iter().map(u32::to_string).collect();
        let found = if numbers.is_empty() { "no number".into() } else { format!("`{}`", numbers.join(",")) };
        Err(ExpressionError::Expected { column, expected: written(pattern), found })
    }

    /// The numbers behind a colon; none without it.
    fn numbers(&mut self) -> Result<Vec<u32>, ExpressionError> {
        let mut numbers = Vec::new();
        let mut more = self.take(':');
        while more {
            self.peek();
            let start = self.at;
            let digits = self.word(|c| c.is_ascii_digit());
            match digits.parse() {
                Ok(number) => numbers.push(number),
                Err(_) if digits.is_empty() => return Err(self.expected("a number")),
                Err(_) => {
                    let expected = format!("a number up to {}", u32::MAX);
                    return Err(ExpressionError::Expected { column: start + 1, expected, found: digits });
                }
            }
            more = self.take(',');
        }
        Ok(numbers)
    }
}

/// How a pattern is written.
fn written(Pattern { name, numbers, .. }: &Pattern) -> String {
    match *name {
        "documents" => "`documents:LENGTH` with a LENGTH above 0".into(),
        _ if numbers.is_empty() => format!("`{name}` without numbers"),
        _ => format!("`{name}:{numbers}`"),
    }
}

fn unknown(column: usize, name: String) -> ExpressionError {
    let similarity = |known: &str| strsim::jaro_winkler(&name, known);
    let nearest = PATTERNS.iter().max_by(|a, b| similarity(a.name).total_cmp(&similarity(b.name)));
    let near = nearest.filter(|pattern| similarity(pattern.name) > 0.7);
    let hint = near.map(|pattern| format!(", did you mean `{}`", pattern.name)).unwrap_or_default();
    let known: Vec<&str> = PATTERNS.iter().map(|pattern| pattern.name).collect();
    ExpressionError::Unknown { column, name, hint, known: known.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXTENT: Extent = Extent { batch: 1, heads: 1, seq_q: 6, seq_kv: 8 };

    fn refused(text: &str) -> String {
        parse(text, EXTENT).unwrap_err().to_string()
    }

    #[test]
    fn and_binds_closer_than_or_and_not_closer_than_both() {
        let (causal, window, sinks) = (Mask::causal, || Mask::sliding_window(3), || Mask::sinks(1));
        for (text, mask) in [
            ("causal", causal()),
            ("causal & sliding_window:3 | sinks:1", (causal() & window()) | sinks()),
            ("causal&(sliding_window:3|sinks:1)", causal() & (window() | sinks())),
            ("sinks:1 | causal & sliding_window: 3", sinks() | (causal() & window())),
            ("!causal & sinks:1", !causal() & sinks()),
            ("!(causal & !sinks:1)", !(causal() & !sinks())),
            ("window:2,1", Mask::window(2, 1)),
            ("longformer:2,0,5", Mask::longformer(2, vec![0, 5])),
            ("documents:3", Mask::documents(vec![0, 1, 1, 1, 2, 2], vec![0, 0, 0, 1, 1, 1, 2, 2])),
        ] {
            assert_eq!(parse(text, EXTENT), Ok(mask), "{text}");
        }
    }

    #[test]
    fn every_pattern_can_be_written_and_bound() {
        for pattern in &PATTERNS {
            // A 2 for each number that is not optional.
            let needed = pattern.numbers.split('[').next().unwrap_or_default();
            let numbers: Vec<&str> = needed.split(',').filter(|number| !number.is_empty()).map(|_| "2").collect();
            let colon = if numbers.is_empty() { "" } else { ":" };
            let text = format!("{}{colon}{}", pattern.name, numbers.join(","));
            parse(&text, EXTENT).unwrap().bind(EXTENT).unwrap_or_else(|error| panic!("{text}: {error}"));
        }
    }

    #[test]
    fn what_is_no_mask_is_refused_with_its_place() {
        for (text, message) in [
            ("", "column 1: expected a pattern, `!` or `(`, got the end"),
            ("causal &", "column 9: expected a pattern, `!` or `(`, got the end"),
            ("(causal", "column 8: expected `)`, got the end"),
            ("causal sinks:1", "column 8: expected `&`, `|` or the end, got `s`"),
            ("sinks", "column 1: expected `sinks:KEYS`, got no number"),
            ("sinks:1,2", "column 1: expected `sinks:KEYS`, got `1,2`"),
            ("sinks:x", "column 7: expected a number, got `x`"),
            ("sinks:4294967296", "column 7: expected a number up to 4294967295, got 4294967296"),
            ("causal:1", "column 1: expected `causal` without numbers, got `1`"),
            ("documents:0", "column 1: expected `documents:LENGTH` with a LENGTH above 0, got `0`"),
        ] {
            assert_eq!(refused(text), message, "{text}");
        }
        assert!(
            refused("causal & butterfli:4").starts_with("column 10: no pattern `butterfli`, did you mean `butterfly`")
        );
        assert_eq!(refused(&"!".repeat(1000)), "expected at most 64 levels of `!` and parentheses");
        assert_eq!(refused(&"(".repeat(1000)), "expected at most 64 levels of `!` and parentheses");
    }
}
