//! The comparison as a table.

use crate::compare::{Figures, HEAD_DIM, HEADS, Pass, Row, checked_heads};
use crate::memory::Counted;

/// What stands above the rows.
pub fn header(device: &str, counted: Counted, lengths: &[usize]) -> String {
    let checked: Vec<String> = lengths.iter().map(|&length| format!("{} at {length}", checked_heads(length))).collect();
    format!(
        "Burn's own attention and flashover's: causal, f32, B 1, H {HEADS}, D {HEAD_DIM}, on {device}\n\
         time: median; memory: peak beyond the operands, results included ({counted})\n\
         error: largest |difference| of o, or of dq, dk and dv, from an f64 reference (heads of {HEADS} checked: {});\n\
         ratio: burn / flashover, above 1 where flashover is better\n\
         \n\
         {:24} {:^32}   {:^32}   {:^18}\n\
         {:>7} {:16} {:>11} {:>11} {:>8}   {:>11} {:>11} {:>8}   {:>8} {:>9}",
        checked.join(", "),
        "",
        "time (ms)",
        "memory (MiB)",
        "error",
        "S",
        "pass",
        "burn",
        "flashover",
        "ratio",
        "burn",
        "flashover",
        "ratio",
        "burn",
        "flashover",
    )
}

/// A row of the table.
pub fn row(row: &Row) -> String {
    let pass = match row.pass {
        Pass::Forward => "forward",
        Pass::ForwardBackward => "forward+backward",
    };
    let ours = Cells::of(&row.flashover);
    let (burn, time_ratio, memory_ratio) = match &row.burn {
        Ok(burn) => {
            let time = ratio(Some(burn.seconds), Some(row.flashover.seconds));
            let bytes = |figures: &Figures| figures.peak_bytes.map(|bytes| bytes as f64);
            (Cells::of(burn), time, ratio(bytes(burn), bytes(&row.flashover)))
        }
        Err(_) => (Cells::dashes(), "—".into(), "—".into()),
    };
    let mut line = format!(
        "{:>7} {pass:16} {:>11} {:>11} {time_ratio:>8}   {:>11} {:>11} {memory_ratio:>8}   {:>8} {:>9}",
        row.length, burn.time, ours.time, burn.memory, ours.memory, burn.error, ours.error
    );
    if let Err(reason) = &row.burn {
        line += &format!("\n{:24} burn {reason}", "");
    }
    line
}

struct Cells {
    time: String,
    memory: String,
    error: String,
}

impl Cells {
    fn of(figures: &Figures) -> Self {
        Cells {
            time: digits(figures.seconds * 1e3),
            memory: figures.peak_bytes.map_or("—".into(), |bytes| digits(bytes as f64 / f64::from(1 << 20))),
            error: format!("{:.1e}", figures.error),
        }
    }

    fn dashes() -> Self {
        Cells { time: "—".into(), memory: "—".into(), error: "—".into() }
    }
}

fn ratio(burn: Option<f64>, flashover: Option<f64>) -> String {
    match burn.zip(flashover) {
        Some((burn, flashover)) if flashover > 0.0 => format!("{:.2}", burn / flashover),
        _ => "—".into(),
    }
}

/// Three digits or more.
fn digits(value: f64) -> String {
    let decimals = if value < 10.0 { 2 } else { usize::from(value < 100.0) };
    format!("{value:.decimals$}")
}
