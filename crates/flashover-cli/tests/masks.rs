//! `flashover masks` as a user runs it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn masks(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_flashover")).arg("masks").args(arguments).output().unwrap()
}

fn text(arguments: &[&str]) -> String {
    let output = masks(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn refused(arguments: &[&str]) -> String {
    let output = masks(arguments);
    assert!(!output.status.success() && output.stdout.is_empty(), "{arguments:?} is accepted");
    String::from_utf8(output.stderr).unwrap()
}

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(name)
}

#[test]
fn without_a_mask_the_patterns_are_listed() {
    let out = text(&[]);
    for pattern in ["sliding_window:KEYS", "butterfly:BLOCK", "bigbird:BLOCK,GLOBAL,WINDOW,RANDOM[,SEED]", "causal "] {
        assert!(out.contains(pattern), "{pattern} is not in {out}");
    }
}

#[test]
fn a_plan_is_described() {
    let out = text(&["causal", "--length", "512"]);
    assert!(out.starts_with("512 queries, 512 keys: 1×1 planes of 4×4 tiles (128×128): 6 full and 4 partial"), "{out}");
    let out = text(&["causal", "--length", "512", "--queries", "128", "--tile", "64x128"]);
    assert!(out.contains("2×4 tiles (64×128): 6 full and 2 partial"), "{out}");
}

#[test]
fn json_can_be_read_back() {
    let json = text(&["causal & (sliding_window:300 | sinks:5)", "--length", "1000", "--json"]);
    let path = file("mask.json");
    std::fs::write(&path, &json).unwrap();
    let again = text(&["--file", path.to_str().unwrap(), "--length", "1000", "--json"]);
    let parse = |text: &str| -> serde_json::Value { serde_json::from_str(text).unwrap() };
    let (first, again) = (parse(&json), parse(&again));
    for key in ["mask", "fingerprint", "full", "partial", "point_density", "bytes"] {
        assert!(!first[key].is_null() && first[key] == again[key], "{key}: {first} {again}");
    }
}

#[test]
fn pictures_are_drawn_as_png_and_svg() {
    for name in ["mask.svg", "mask.png"] {
        let path = file(name);
        let _ = std::fs::remove_file(&path);
        let out = text(&["causal", "--length", "512", "--plot", path.to_str().unwrap()]);
        assert!(out.contains(&format!("picture: {}", path.display())), "{out}");
        let bytes = std::fs::read(&path).unwrap();
        if name.ends_with("svg") {
            let svg = String::from_utf8(bytes).unwrap();
            assert!(svg.starts_with("<svg") && svg.matches("#f0a830").count() == 4, "{svg}");
        } else {
            assert!(bytes.starts_with(b"\x89PNG\r\n") && bytes.len() > 1000, "{} bytes", bytes.len());
        }
    }
}

#[test]
fn bad_input_is_refused() {
    for (arguments, message) in [
        (&["causel"][..], "no pattern `causel`, did you mean `causal`"),
        (&["sliding_window:0"][..], "sliding_window: expected at least 1 key"),
        (&["causal", "--tile", "128"][..], "expected queries x keys"),
        (&["causal", "--tile", "0x128"][..], "queries of a tile"),
        (&["causal", "--head", "3"][..], "--head: expected less than 1, got 3"),
        (&["causal", "--plot", "mask.gif"][..], "expected a name that ends in .png or .svg"),
        (&["--file", "does-not-exist.json"][..], "does-not-exist.json"),
    ] {
        let error = refused(arguments);
        assert!(error.contains(message), "{arguments:?}: {error}");
    }
    let path = file("no-mask.json");
    std::fs::write(&path, "{\"mask\": 3}").unwrap();
    assert!(refused(&["--file", path.to_str().unwrap()]).contains("expected a mask as JSON"));
}
