//! Runs the program as a user would, on little.

use std::path::PathBuf;
use std::process::Command;

fn top_k(arguments: &[&str]) -> (bool, String) {
    let out = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("top_k");
    let mut command = Command::new(env!("CARGO_BIN_EXE_top_k"));
    command.env("BURN_DEVICE", "flex").arg("--out").arg(out).args(arguments);
    let output = command.output().expect("a program that starts");
    let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    (output.status.success(), text.concat())
}

#[test]
fn a_table_of_what_is_lost() {
    let small =
        ["--epochs", "1", "--context", "32", "--length", "200", "--windows", "2", "--tile", "32", "--blocks", "1,7"];
    let (success, text) = top_k(&small);
    assert!(success, "{text}");
    let row = |choice: &str| -> Vec<f64> {
        let line = text.lines().find(|line| line.starts_with(&format!("| {choice} |")));
        let line = line.unwrap_or_else(|| panic!("no row of {choice} in {text}"));
        line.split('|').skip(2).filter_map(|cell| cell.trim().parse().ok()).collect()
    };
    // Density, mass, that of the worst head, error, bits.
    let all = row("all");
    assert_eq!(all[..4], [1.0, 1.0, 1.0, 0.0], "{text}");
    for choice in ["best", "last"] {
        let (few, every) = (row(&format!("{choice} 1")), row(&format!("{choice} 7")));
        assert!(few[0] < 0.7 && few[1] < 1.0 && few[2] <= few[1] && few[3] > 0.0, "{text}");
        assert_eq!(every, all, "seven tiles a side: {text}");
    }
}

#[test]
fn bad_input_is_refused() {
    for (arguments, expected) in [
        (["--windows", "0"], "expected a --context of at least 2"),
        (["--device", "abacus"], "device: expected one of those"),
        (["--text", "/nowhere"], "text: expected a folder at /nowhere"),
    ] {
        let (success, text) = top_k(&arguments);
        assert!(!success && text.contains(expected) && !text.contains("panicked"), "{text}");
    }
}
