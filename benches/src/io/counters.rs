//! Bytes between the chip and its memory, by the hardware's own counters, through NVIDIA's `ncu`.

use std::ffi::OsString;
use std::path::Path;
use std::process::Command;

/// What `ncu` is asked for: bytes read from and written to device memory.
const METRICS: [&str; 2] = ["dram__bytes_read.sum", "dram__bytes_write.sum"];

/// Bytes of one launch.
#[derive(Debug, Clone, PartialEq)]
pub struct Launch {
    /// The kernel's name, as the driver knows it.
    pub kernel: String,
    /// Read from memory.
    pub read: f64,
    /// Written to memory.
    pub written: f64,
}

impl Launch {
    /// Both.
    pub fn bytes(&self) -> f64 {
        self.read + self.written
    }
}

/// Runs a program under the profiler and returns its launches in order; only those between cudaProfilerStart and Stop if
/// `marked`. Clocks and caches are left as they are, so that a launch finds in the cache what the one before it left there, as
/// it would without a profiler. `Err` says why there are no counters.
pub fn measure(command: &[OsString], marked: bool, log: &Path) -> Result<Vec<Launch>, String> {
    let output = Command::new("ncu")
        .args(["--csv", "--print-units", "base", "--clock-control", "none", "--cache-control", "none"])
        .args(["--profile-from-start", if marked { "off" } else { "on" }])
        .args(["--metrics", &METRICS.join(","), "--log-file"])
        .arg(log)
        .args(command)
        .output()
        .map_err(|error| format!("ncu: {error}"))?;
    let text = std::fs::read_to_string(log).unwrap_or_default();
    if !output.status.success() {
        let said = [text, String::from_utf8_lossy(&output.stderr).into_owned()].concat();
        let reason = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it said nothing");
        return Err(format!("ncu ended with {}: {reason}", output.status));
    }
    parse(&text)
}

/// The launches of the profiler's CSV: a line a launch and metric.
fn parse(text: &str) -> Result<Vec<Launch>, String> {
    let mut lines = text.lines().filter(|line| line.starts_with('"')).map(fields);
    let header = lines.next().ok_or("ncu: expected lines of CSV, found none: no kernel was profiled")?;
    let column = |name: &str| {
        header.iter().position(|field| field == name).ok_or_else(|| format!("ncu: expected a column {name:?}"))
    };
    let [id, kernel, metric, unit, value] = [
        column("ID")?,
        column("Kernel Name")?,
        column("Metric Name")?,
        column("Metric Unit")?,
        column("Metric Value")?,
    ];
    let mut launches: Vec<(String, Launch)> = Vec::new();
    for line in lines {
        let field = |at: usize| line.get(at).map(String::as_str).unwrap_or_default();
        let bytes: f64 = field(value).replace(',', "").parse().map_err(|_| {
            format!("ncu: expected {} of {} in bytes, got {:?}", field(metric), field(kernel), field(value))
        })?;
        if field(unit) != "byte" {
            return Err(format!("ncu: expected {} in byte, got {:?}", field(metric), field(unit)));
        }
        if launches.last().is_none_or(|(last, _)| last != field(id)) {
            let launch = Launch { kernel: field(kernel).into(), read: f64::NAN, written: f64::NAN };
            launches.push((field(id).into(), launch));
        }
        let (_, launch) = launches.last_mut().expect("just pushed");
        match field(metric) {
            name if name == METRICS[0] => launch.read = bytes,
            name if name == METRICS[1] => launch.written = bytes,
            _ => (),
        }
    }
    let launches: Vec<Launch> = launches.into_iter().map(|(_, launch)| launch).collect();
    match launches.iter().find(|launch| launch.bytes().is_nan()) {
        Some(launch) => Err(format!("ncu: expected {} of {}, found one of them", METRICS.join(" and "), launch.kernel)),
        None => Ok(launches),
    }
}

/// Fields of a line, each in quotes; a quote within is doubled.
fn fields(line: &str) -> Vec<String> {
    let mut fields = vec![String::new()];
    let (mut quoted, mut characters) = (false, line.chars().peekable());
    while let Some(character) = characters.next() {
        let field = fields.last_mut().expect("never empty");
        match character {
            '"' if quoted && characters.peek() == Some(&'"') => {
                characters.next();
                field.push('"');
            }
            '"' => quoted = !quoted,
            ',' if !quoted => fields.push(String::new()),
            other => field.push(other),
        }
    }
    fields
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: &str = r#""ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value""#;

    fn csv(lines: &[&str]) -> String {
        [&["==PROF== Connected to process 7", HEADER], lines].concat().join("\n")
    }

    #[test]
    fn launches_come_in_order_with_both_counters() {
        let text = csv(&[
            r#""0","7","void f<a, b>(int)","Command line profiler metrics","dram__bytes_read.sum","byte","1,234,560""#,
            r#""0","7","void f<a, b>(int)","Command line profiler metrics","dram__bytes_write.sum","byte","440""#,
            r#""1","7","g ""x""","","dram__bytes_read.sum","byte","0""#,
            r#""1","7","g ""x""","","dram__bytes_write.sum","byte","8""#,
        ]);
        let launches = parse(&text).expect("sound");
        assert_eq!(launches[0], Launch { kernel: "void f<a, b>(int)".into(), read: 1_234_560.0, written: 440.0 });
        assert_eq!((launches[1].kernel.as_str(), launches[1].bytes(), launches.len()), ("g \"x\"", 8.0, 2));
    }

    #[test]
    fn what_is_missing_is_said() {
        let message = |text: &str| parse(text).expect_err("not sound");
        assert!(message("==ERROR== no permission").contains("no kernel was profiled"));
        let one = csv(&[r#""0","7","f","","dram__bytes_read.sum","byte","1""#]);
        assert!(message(&one).contains("of f, found one of them"), "{}", message(&one));
        let other = csv(&[r#""0","7","f","","dram__bytes_read.sum","Kbyte","1""#]);
        assert_eq!(message(&other), "ncu: expected dram__bytes_read.sum in byte, got \"Kbyte\"");
        let none = csv(&[r#""0","7","f","","dram__bytes_read.sum","byte","n/a""#]);
        assert_eq!(message(&none), "ncu: expected dram__bytes_read.sum of f in bytes, got \"n/a\"");
        assert_eq!(message("\"ID\",\"x\""), "ncu: expected a column \"Kernel Name\"");
    }

    #[test]
    fn without_the_profiler_there_are_no_counters() {
        let log = std::env::temp_dir().join(format!("flashover-ncu-{}", std::process::id()));
        // Where there is a profiler, there is no such program.
        let message = measure(&["/no/such/program".into()], false, &log).expect_err("nothing to profile");
        assert!(message.starts_with("ncu"), "{message}");
    }
}
