//! PyTorch's `scaled_dot_product_attention` on the CPU, where PyTorch is at hand.

use std::process::Command;

use crate::case::Case;

/// Prints one median in milliseconds.
const SCRIPT: &str = "
import sys, time, torch
b, h, s, d, causal, repeats = (int(x) for x in sys.argv[1:7])
torch.manual_seed(0)
q, k, v = (torch.randn(b, h, s, d) for _ in range(3))
run = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=bool(causal))
with torch.no_grad():
    run()
    times = []
    for _ in range(repeats):
        t = time.perf_counter(); run(); times.append(time.perf_counter() - t)
print(sorted(times)[len(times) // 2] * 1e3, torch.__version__, torch.get_num_threads())
";

/// Median forward time of an f32 case in milliseconds; `Err` says why there is none. The interpreter is
/// `$FLASHOVER_PYTHON`, or `python3`.
pub fn forward_ms(case: &Case, repeats: usize) -> Result<f64, String> {
    let p = &case.problem;
    let python = std::env::var("FLASHOVER_PYTHON").unwrap_or_else(|_| "python3".into());
    let numbers = [p.batch, p.heads_q, p.seq_q, p.head_dim, usize::from(p.band.causal), repeats];
    let output = Command::new(&python)
        .args(["-c", SCRIPT])
        .args(numbers.map(|n| n.to_string()))
        .output()
        .map_err(|error| format!("{python}: {error}"))?;
    if !output.status.success() {
        let reason = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{python}: {}", reason.lines().last().unwrap_or("failed")));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let first = text.split_whitespace().next().unwrap_or_default();
    first.parse().map_err(|error| format!("{python}: expected milliseconds, got {text:?} ({error})"))
}
