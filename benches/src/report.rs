//! Rows of figures, as a table for people and as JSON for the record.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

use serde::Serialize;

/// One figure.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// Suite that took it.
    pub suite: &'static str,
    /// Case name, which spells the problem.
    pub case: String,
    /// `forward_ms`, `backward_ms`, `forward_backward_ms`, `peak_extra_bytes`, `tflops` or `tbps`; in the suites `peers` and
    /// `io` also `…_tflops` of a pass, `gflop`, `hbm_bytes` and `hbm_bytes_predicted`.
    pub metric: &'static str,
    /// Our kernel family, where one was asked for by name.
    pub kernel: Option<&'static str>,
    /// Our figure.
    pub ours: f64,
    /// The peer's, if there is one.
    pub peer: Option<f64>,
    /// `burn`, `fa2`, `cudnn`, `flex_attention`, `standard`, `torch_cpu`, `gemm`, `density_x_dense`, or `counters`: what was measured beside what
    /// was predicted.
    pub peer_name: Option<&'static str>,
    /// Above 1 where we are better.
    pub ratio: Option<f64>,
    /// Unit of `ours` and `peer`.
    pub unit: &'static str,
    /// Device, with what matters of it.
    pub device: String,
    /// Version of the device's driver, where it is known.
    pub driver: Option<String>,
    /// Git revision of the tree, with `+` when it was changed.
    pub revision: String,
}

impl Row {
    /// The same of a kernel family.
    pub fn of(self, kernel: &'static str) -> Self {
        Row { kernel: Some(kernel), ..self }
    }
}

/// A figure that there is none of, and why. It stands among the rows, so that a record says what it lacks.
#[derive(Debug, Clone, Serialize)]
pub struct Absent {
    /// Suite that tried.
    pub suite: &'static str,
    /// Case name, or the whole suite's.
    pub case: String,
    /// Whose figure.
    pub of: String,
    /// Which: a pass or a metric.
    pub what: String,
    /// Why there is none.
    pub not_measured: String,
}

/// What all rows of a run share.
#[derive(Debug, Clone)]
pub struct Run {
    /// Suite.
    pub suite: &'static str,
    /// Device.
    pub device: String,
    /// Its driver.
    pub driver: Option<String>,
    /// Revision.
    pub revision: String,
}

impl Run {
    /// A run of `suite` on `device` with `driver` at the tree's revision.
    pub fn new(suite: &'static str, device: String, driver: Option<String>) -> Self {
        Run { suite, device, driver, revision: revision() }
    }

    /// A figure of which less is better.
    pub fn less(&self, case: &str, metric: &'static str, ours: f64, peer: Option<(&'static str, f64)>) -> Row {
        self.row(case, metric, ours, peer, |ours, peer| peer / ours)
    }

    /// A figure of which more is better.
    pub fn more(&self, case: &str, metric: &'static str, ours: f64, peer: Option<(&'static str, f64)>) -> Row {
        self.row(case, metric, ours, peer, |ours, peer| ours / peer)
    }

    fn row(
        &self,
        case: &str,
        metric: &'static str,
        ours: f64,
        peer: Option<(&'static str, f64)>,
        ratio: fn(f64, f64) -> f64,
    ) -> Row {
        let unit = match metric {
            "peak_extra_bytes" | "hbm_bytes" | "hbm_bytes_predicted" => "bytes",
            "tbps" => "TB/s",
            "gflop" => "GFLOP",
            rate if rate.ends_with("tflops") => "TFLOP/s",
            _ => "ms",
        };
        Row {
            suite: self.suite,
            case: case.into(),
            metric,
            kernel: None,
            ours,
            peer: peer.map(|(_, peer)| peer),
            peer_name: peer.map(|(name, _)| name),
            ratio: peer.map(|(_, peer)| ratio(ours, peer)),
            unit,
            device: self.device.clone(),
            driver: self.driver.clone(),
            revision: self.revision.clone(),
        }
    }
}

/// Prints the rows.
pub fn table(rows: &[Row]) {
    if let Some(first) = rows.first() {
        println!("\nsuite {} on {}, revision {}", first.suite, first.device, first.revision);
    }
    println!(
        "{:<44} {:<20} {:<10} {:>14} {:>14} {:<15} {:>7}",
        "case", "metric", "kernel", "ours", "peer", "peer name", "ratio"
    );
    for row in rows {
        let peer = row.peer.map_or("-".into(), |peer| number(peer, row.unit));
        let ratio = row.ratio.map_or("-".into(), |ratio| format!("{ratio:.2}x"));
        let ours = number(row.ours, row.unit);
        println!(
            "{:<44} {:<20} {:<10} {ours:>14} {peer:>14} {:<15} {ratio:>7}",
            row.case,
            row.metric,
            row.kernel.unwrap_or("-"),
            row.peer_name.unwrap_or("-")
        );
    }
}

/// The rows of a run as they come. Each is written at once: a run that is cut off leaves what it has measured.
pub struct Report {
    rows: Vec<Row>,
    /// Where a JSON object a line goes, and its name.
    json: Option<(File, PathBuf)>,
}

impl Report {
    /// An empty report; `json` is created or emptied.
    pub fn new(json: Option<PathBuf>) -> Result<Self, String> {
        let open = |path: PathBuf| match File::create(&path) {
            Ok(file) => Ok((file, path)),
            Err(error) => Err(format!("creating {}: {error}", path.display())),
        };
        Ok(Report { rows: Vec::new(), json: json.map(open).transpose()? })
    }

    /// Adds a row.
    pub fn push(&mut self, row: Row) -> Result<(), String> {
        self.write(&row)?;
        self.rows.push(row);
        Ok(())
    }

    /// Notes, and says, that there is no figure.
    pub fn absent(&mut self, absent: &Absent) -> Result<(), String> {
        println!("{}: {} of {} not measured: {}", absent.case, absent.what, absent.of, absent.not_measured);
        self.write(absent)
    }

    fn write(&mut self, line: &impl Serialize) -> Result<(), String> {
        if let Some((file, path)) = &mut self.json {
            let line = serde_json::to_string(line).map_err(|error| error.to_string())?;
            writeln!(file, "{line}").map_err(|error| format!("writing {}: {error}", path.display()))?;
        }
        Ok(())
    }

    /// All rows so far.
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }
}

fn number(value: f64, unit: &str) -> String {
    match unit {
        "bytes" => format!("{:.2} MiB", value / (1 << 20) as f64),
        unit => format!("{value:.3} {unit}"),
    }
}

fn revision() -> String {
    let git = |arguments: &[&str]| {
        let output = std::process::Command::new("git").args(arguments).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_string())
    };
    let given = std::env::var("FLASHOVER_REVISION").ok();
    given
        .or_else(|| {
            let head = git(&["rev-parse", "--short", "HEAD"])?;
            let clean = git(&["status", "--porcelain"])?.is_empty();
            Some(if clean { head } else { head + "+" })
        })
        .unwrap_or_else(|| "unknown".into())
}
