//! PTX text as tokens. PTX ISA 9.0, "Syntax".

use super::Error;

/// One token; text is borrowed from the source.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Token<'a> {
    /// A name, a directive (`.reg`) or an opcode with its suffixes (`ld.shared::cta.u32`).
    Word(&'a str),
    /// A literal as it is written.
    Number(&'a str),
    /// What stands between quotes.
    Text(&'a str),
    /// Any other character.
    Mark(char),
}

/// A token and the line that it stands in.
pub(crate) type At<'a> = (Token<'a>, u32);

fn in_word(c: u8) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, b'_' | b'$' | b'%' | b'.')
}

/// All tokens of `source`, without comments and without `.loc` and `.file`, the only statements that end with their line.
pub(crate) fn tokens(source: &str) -> Result<Vec<At<'_>>, Error> {
    let bytes = source.as_bytes();
    let (mut at, mut line) = (0, 1);
    let mut all = Vec::new();
    while at < bytes.len() {
        let c = bytes[at];
        let rest = &source[at..];
        if c == b'\n' {
            line += 1;
            at += 1;
        } else if c.is_ascii_whitespace() {
            at += 1;
        } else if rest.starts_with("//") || is_line(rest) {
            at += rest.find('\n').unwrap_or(rest.len());
        } else if rest.starts_with("/*") {
            let end = rest.find("*/").ok_or_else(|| format!("line {line}: a comment has no end"))?;
            line += rest[..end].matches('\n').count() as u32;
            at += end + 2;
        } else if c == b'"' {
            let end = rest[1..].find('"').ok_or_else(|| format!("line {line}: a text has no end"))?;
            all.push((Token::Text(&rest[1..=end]), line));
            at += end + 2;
        } else if in_word(c) {
            let end = word_end(rest.as_bytes());
            let word = &rest[..end];
            all.push((if c.is_ascii_digit() { Token::Number(word) } else { Token::Word(word) }, line));
            at += end;
        } else {
            all.push((Token::Mark(c as char), line));
            at += 1;
        }
    }
    Ok(all)
}

/// Whether a statement about source lines begins.
fn is_line(rest: &str) -> bool {
    [".loc", ".file"].iter().any(|name| rest.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '\t'])))
}

/// Two colons belong to a word (`shared::cta`), one ends a label.
fn word_end(bytes: &[u8]) -> usize {
    let mut end = 0;
    while end < bytes.len() {
        if in_word(bytes[end]) {
            end += 1;
        } else if bytes[end..].starts_with(b"::") && bytes.get(end + 2).copied().is_some_and(in_word) {
            end += 2;
        } else {
            break;
        }
    }
    end
}
