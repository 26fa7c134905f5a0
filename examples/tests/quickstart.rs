//! Runs the program as a user would: `--smoke`, and what it says to bad input.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};

use examples::reference::{Reference, max_error};

/// A folder of this test alone, empty.
fn folder(name: &str) -> PathBuf {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    if path.exists() {
        fs::remove_dir_all(&path).expect("a folder that can be removed");
    }
    fs::create_dir_all(&path).expect("a folder that can be made");
    path
}

fn quickstart(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quickstart"));
    command.env("BURN_DEVICE", "flex").args(arguments).output().expect("a program that starts")
}

/// Runs it and expects an error that holds `expected`.
fn refuses(arguments: &[&str], expected: &str) {
    let output = quickstart(arguments);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{arguments:?}: expected a failure");
    assert!(error.contains(expected), "{arguments:?}: expected \"{expected}\" in: {error}");
    assert!(!error.contains("panicked"), "{arguments:?}: {error}");
}

#[test]
fn smoke() {
    let out = folder("smoke");
    let out_argument = out.to_str().expect("a path in UTF-8");
    let output = quickstart(&["--smoke", "--out", out_argument]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("Device: Flex"), "{text}");
    assert!(text.contains("Resuming from epoch 2"), "{text}");
    assert!(text.contains("epoch 4/4: "), "{text}");
    learned(&text);
    compared(&text);
    let out = out.join("smoke");
    let picture = fs::read(out.join("attention.png")).expect("a picture");
    assert!(picture.starts_with(b"\x89PNG\r\n\x1a\n") && picture.len() > 10_000, "{} bytes", picture.len());

    // Its checkpoints are of the small model: the default one must not be mixed with them.
    refuses(&["--out", out.to_str().expect("a path in UTF-8")], "of another configuration");
}

/// The held-out bits per byte of the last epoch are below those of the first.
fn learned(text: &str) {
    let held_out: Vec<f64> = text
        .lines()
        .filter_map(|line| line.strip_prefix("epoch ")?.split_once("held out ")?.1.split_once(',')?.0.parse().ok())
        .collect();
    assert_eq!(held_out.len(), 4, "{text}");
    assert!(held_out[3] < held_out[0] - 0.5, "{held_out:?}");
}

/// The table has both passes at three lengths, times and memory of both sides, and small errors.
fn compared(text: &str) {
    let rows: Vec<Vec<&str>> = text
        .lines()
        .filter(|line| line.contains(" forward"))
        .map(|line| line.split_whitespace().collect())
        .filter(|cells: &Vec<&str>| cells.len() == 10)
        .collect();
    assert_eq!(rows.len(), 6, "{text}");
    for row in rows {
        let figures: Vec<f64> = row[2..].iter().map(|cell| cell.parse().expect("a figure")).collect();
        assert!(figures.iter().all(|figure| *figure > 0.0), "{row:?}");
        assert!(figures[6] < 1e-4 && figures[7] < 1e-4, "{row:?}");
    }
}

#[test]
fn bad_folders() {
    refuses(&["--text", "/no/such/folder"], "expected a folder at /no/such/folder, found nothing");
    let out = folder("bad_folders");
    let file = out.join("file.txt");
    fs::write(&file, "text").expect("a file");
    refuses(&["--text", file.to_str().expect("a path in UTF-8")], "found a file");
    fs::write(out.join("binary"), [0xff; 100_000]).expect("a file");
    let text = out.to_str().expect("a path in UTF-8");
    refuses(&["--text", text], "found 4 in 1 files (1 files are not UTF-8 text)");
}

#[test]
fn bad_arguments() {
    refuses(&["--width", "130"], "expected a multiple of 4, got 130");
    refuses(&["--temperature", "0"], "--temperature: expected a number above 0, got 0");
    refuses(&["--lengths", "512,256"], "--lengths: expected growing numbers above 0");
    refuses(&["--device", "abacus"], "expected one of those that this program was built with");
}

/// The f64 reference of the comparison against central differences of its own output.
#[test]
fn reference_gradients() {
    let (s, d, heads) = (5, 3, 2);
    let value = |seed: usize, at: usize| ((at * 37 + seed * 101) % 97) as f32 / 48.0 - 1.0;
    let operand = |seed| (0..heads * s * d).map(|at| value(seed, at)).collect::<Vec<f32>>();
    let operands = [operand(1), operand(2), operand(3)];
    let do_ = operand(4);
    let result = |x: &[Vec<f32>; 3]| Reference::new(&x[0], &x[1], &x[2], &do_, s, d);
    let loss = |x: &[Vec<f32>; 3]| -> f64 { result(x).o.iter().zip(&do_).map(|(o, do_)| o * f64::from(*do_)).sum() };
    let expected = result(&operands);
    for (which, expected) in [expected.dq, expected.dk, expected.dv].iter().enumerate() {
        let step = 1.0 / 256.0;
        let differences: Vec<f32> = (0..heads * s * d)
            .map(|at| {
                let moved = |by: f32| {
                    let mut x = operands.clone();
                    x[which][at] += by;
                    loss(&x)
                };
                ((moved(step) - moved(-step)) / f64::from(2.0 * step)) as f32
            })
            .collect();
        let error = max_error(&differences, expected);
        assert!(error < 1e-4, "operand {which}: {error:e}");
    }
}
