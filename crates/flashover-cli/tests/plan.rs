//! `flashover plan` as a user runs it: what it prints, draws and refuses.

use std::path::PathBuf;
use std::process::{Command, Output};

fn plan(arguments: &str) -> Output {
    let arguments = arguments.split_whitespace();
    Command::new(env!("CARGO_BIN_EXE_flashover")).arg("plan").args(arguments).output().unwrap()
}

fn text(arguments: &str) -> String {
    let output = plan(arguments);
    assert!(output.status.success(), "{arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn refused(arguments: &str) -> String {
    let output = plan(arguments);
    assert!(!output.status.success(), "{arguments} is accepted");
    assert!(output.stdout.is_empty(), "{arguments} prints a plan and fails");
    String::from_utf8(output.stderr).unwrap()
}

/// A file of its own for a test.
fn file(name: &str, content: &str) -> PathBuf {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::write(&path, content).unwrap();
    path
}

const PALM: &str = "--model palm-540b --hardware tpu-v4";

#[test]
fn the_table_names_the_layouts_of_the_paper() {
    let out = text(&format!("{PALM} --mesh 4x4x4 --weights bf16"));
    assert!(out.contains("palm-540b on 64 tpu-v4, 2048 input and 64 output tokens"), "{out}");
    assert!(out.contains("candidates costed in"), "{out}");
    let (prefill, decode) = out.split_once("\ndecode: ").unwrap();
    for short in ["WS 2D", "WG X ", "WG XY", "WG XYZ"] {
        assert!(prefill.contains(short), "{short} is not in {prefill}");
    }
    assert!(decode.contains("WS 2D") && decode.contains("batch"), "{decode}");
    assert!(decode.contains("2d-weight-stationary/batch"), "{decode}");
}

#[test]
fn json_and_csv_hold_the_same_plans() {
    let arguments = format!("{PALM} --mesh 4x4x4 --phase decode --batch 64,512 --weights int8");
    let json: serde_json::Value = serde_json::from_str(&text(&format!("{arguments} --json"))).unwrap();
    let csv = text(&format!("{arguments} --csv"));
    let plans = json["plans"].as_array().unwrap();
    let lines: Vec<Vec<&str>> = csv.lines().map(|line| line.split(',').collect()).collect();
    assert_eq!(lines.len(), plans.len() + 1);
    assert!(lines.iter().all(|line| line.len() == lines[0].len()));
    let column = lines[0].iter().position(|&name| name == "seconds").unwrap();
    for (plan, line) in plans.iter().zip(&lines[1..]) {
        // serde_json reads numbers to within the last digit, unless its feature for that is on.
        let (a, b) = (plan["cost"]["seconds"].as_f64().unwrap(), line[column].parse::<f64>().unwrap());
        assert!((a - b).abs() <= 2.0 * f64::EPSILON * b, "{a} {b}");
        assert_eq!(plan["weight_layout"], line[4]);
    }
    assert_eq!(json["costed"].as_u64().unwrap() as usize, plans.len());
}

/// The worked example of docs/partitioning.md.
#[test]
fn the_worked_example_is_right() {
    let csv = text(&format!(
        "{PALM} --mesh 4x4x4 --phase decode --batch 512 --weights bf16 --layout 2d-weight-stationary/batch --mode paper --csv"
    ));
    let lines: Vec<Vec<&str>> = csv.lines().map(|line| line.split(',').collect()).collect();
    let value = |name: &str| {
        let column = lines[0].iter().position(|&column| column == name).unwrap();
        lines[1][column].parse::<f64>().unwrap()
    };
    for (name, expected) in [
        ("compute_seconds", 31.8e-3),
        ("cache_seconds", 1.70e-3),
        ("communication_seconds", 8.25e-3),
        ("seconds", 40.0e-3),
        ("mfu", 0.785),
    ] {
        assert!((value(name) / expected - 1.0).abs() < 0.005, "{name}: {}, not {expected}", value(name));
    }
    let weights = value("memory_seconds") - value("cache_seconds");
    assert!((weights / 14.07e-3 - 1.0).abs() < 0.005, "{weights}");
}

#[test]
fn why_says_what_every_layout_would_have_cost() {
    let out = text(&format!("{PALM} --mesh 4x4x4 --phase decode --batch 16 --weights bf16 --why"));
    assert!(out.contains("best: "), "{out}");
    assert!(out.contains("refused batch: expected a multiple of 64, got 16"), "{out}");
    assert!(out.contains("xyz-weight-gathered/heads"), "{out}");
}

#[test]
fn pictures_are_drawn_as_png_and_svg() {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    for (name, start) in [("plan.png", &b"\x89PNG"[..]), ("plan.svg", b"<svg")] {
        let path = folder.join(name);
        text(&format!("{PALM} --mesh 4x4x4 --weights bf16 --plot {}", path.display()));
        let bytes = std::fs::read(&path).unwrap();
        assert!(bytes.starts_with(start) && bytes.len() > 10_000, "{name}: {} bytes", bytes.len());
    }
    let svg = std::fs::read_to_string(folder.join("plan.svg")).unwrap();
    for label in ["2d-weight-stationary", "measured (Figure 1)", "memory of the chip"] {
        assert!(svg.contains(label), "{label}");
    }
    let error = String::from_utf8(plan(&format!("{PALM} --mesh 4x4x4 --plot plan.gif")).stderr).unwrap();
    assert!(error.contains("expected a name that ends in .png or .svg"), "{error}");
}

#[test]
fn a_model_and_a_chip_come_from_files() {
    let config = file(
        "config.json",
        r#"{"model_type": "llama", "hidden_act": "silu", "hidden_size": 8192, "intermediate_size": 28672,
            "num_attention_heads": 64, "num_hidden_layers": 80, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
            "vocab_size": 128256}"#,
    );
    let chip = file(
        "chip.toml",
        "name = \"mine\"\npeak_flops = \"900 TFLOPS\"\nmemory = \"96 GiB\"\nmemory_bandwidth = \"4 TB/s\"\n\
         network = { kind = \"switch\", bandwidth = \"400 GB/s\", domain = 8 }\n",
    );
    let out = text(&format!("--model {} --hardware {} --chips 8 --batch 1..64", config.display(), chip.display()));
    assert!(out.contains(" on 8 mine"), "{out}");
    let built_in = text("--model llama-3-70b --hardware h100 --chips 8 --batch 8 --phase decode --csv");
    assert!(built_in.lines().count() > 2);
}

#[test]
fn simulated_bytes_and_logits_are_those_of_the_plan() {
    let arguments = "--model palm-8b --hardware tpu-v4 --mesh 2x2x2 --batch 8,64 --weights int8 --simulate";
    let out = text(arguments);
    assert!(out.contains("simulated in f32 on x=2,y=2,z=2: small-palm-8b of 2 blocks"), "{out}");
    assert!(out.contains("largest logit difference from the unsharded model: "), "{out}");
    assert!(!out.contains("tokens differ"), "{out}");
    let json: serde_json::Value = serde_json::from_str(&text(&format!("{arguments} --json"))).unwrap();
    let phases: Vec<_> =
        json["simulations"].as_array().unwrap().iter().flat_map(|one| one["phases"].as_array().unwrap()).collect();
    assert!(phases.len() >= 2);
    for phase in phases {
        assert!(phase["difference"].as_f64().unwrap() <= 1e-5 && phase["same_tokens"] == true, "{phase}");
        let rows = phase["rows"].as_array().unwrap();
        assert!(rows.iter().any(|row| row["section"] == "layer" && row["predicted_payload"].as_u64() > Some(0)));
        for row in rows {
            let (payload, sent) = (&row["predicted_payload"], &row["predicted_sent"]);
            assert!([&row["least"], &row["most"]].iter().all(|of| of["payload"] == *payload && of["sent"] == *sent));
        }
    }
}

#[test]
fn what_is_wrong_is_named() {
    for (arguments, expected) in [
        ("--model palm-540 --hardware tpu-v4", "did you mean `palm-540b`?"),
        ("--model palm-540b --hardware tpu-v44", "did you mean `tpu-v4`?"),
        ("--model palm-540b --hardware tpu-v4 --layout 2d-weight-statoinary", "did you mean `2d-weight-stationary`?"),
        ("--model palm-540b --hardware tpu-v4 --batch 0", "batch: expected positive numbers"),
        ("--model palm-540b --hardware tpu-v4 --batch=-4", "batch: expected positive numbers"),
        ("--model palm-540b --hardware tpu-v4 --mesh 0x4x4", "mesh: expected axes of at least one chip"),
        ("--model palm-540b --hardware tpu-v4 --mesh 5x5x5 --batch 1", "no layout fits: "),
        (
            "--model palm-540b --hardware tpu-v4 --mesh 2x2x2 --weights bf16",
            "memory: expected at most 34359738368 bytes a chip",
        ),
        (
            "--model palm-540b --hardware tpu-v4 --weights fp8",
            "weight type: expected one of bf16, int8, int4, got `fp8`",
        ),
        ("--model palm-540b --hardware tpu-v4 --input 0", "tokens: expected 1 to"),
        ("--model ./none.json --hardware tpu-v4", "./none.json: "),
        (
            "--model palm-540b --hardware tpu-v4 --mesh 16x16x8 --batch 512 --simulate",
            "mesh: expected at most 1024 logical chips, got 2048",
        ),
        ("--model palm-540b --hardware tpu-v4 --mesh 4x4x4 --simulate --csv", "cannot be used with"),
        (
            "--model palm-540b --hardware tpu-v4 --mesh 4x4x4 --phase decode --batch 16 --layout 2d-weight-stationary/batch",
            "batch: expected a multiple of 64",
        ),
    ] {
        let error = refused(arguments);
        assert!(error.contains(expected), "{arguments}: {error}");
    }
    let config = file("incomplete.json", r#"{"model_type": "llama", "hidden_act": "silu", "num_attention_heads": 64}"#);
    let error = refused(&format!("--model {} --hardware tpu-v4", config.display()));
    assert!(error.contains("config.json: hidden_size: expected a field hidden_size or n_embd or d_model"), "{error}");
    let chip = file(
        "unit.toml",
        "name = \"mine\"\npeak_flops = \"900 TFLOPS\"\nmemory = \"96 Gb\"\nmemory_bandwidth = \"4 TB/s\"\n\
         network = { kind = \"switch\", bandwidth = \"400 GB/s\", domain = 8 }\n",
    );
    let error = refused(&format!("--model palm-540b --hardware {}", chip.display()));
    assert!(error.contains("hardware: memory: expected a positive number and one of MiB, GiB, MB, GB"), "{error}");
}
