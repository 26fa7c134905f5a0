//! `bench sparse`: windows, documents and random blocks beside dense attention of the same operands.

use flashover::kernels::problem::Element;

use super::contestant::Spec;
use super::figures::Figure;
use super::pattern::Pattern;
use crate::report::{Row, Run};

/// Fractions of blocks that are seen.
const DENSITIES: [f64; 4] = [0.5, 0.25, 0.1, 0.05];

/// What a plan may cost beyond its share of the dense time: a factor, and milliseconds.
const BOUND: (f64, f64) = (1.15, 0.03);

/// B1 H16 S16384 D128 and, as many positions times heads, S 65,536; dense attention first.
pub fn cases() -> Vec<Spec> {
    let of = |pattern, heads, seq| Spec::new(pattern, 1, heads, seq, 128, Element::BF16);
    let blocks = |density, seq| Pattern::RandomBlocks { listed: Pattern::listed(seq, density) };
    let (heads, seq) = (16, 16_384);
    let mut cases = vec![of(Pattern::Full, heads, seq)];
    cases.extend(DENSITIES.map(|density| of(blocks(density, seq), heads, seq)));
    cases.extend([1024, 4096].map(|keys| of(Pattern::Window { keys }, heads, seq)));
    cases.extend([false, true].map(|causal| of(Pattern::Documents { length: 2048, causal }, heads, seq)));
    let (heads, seq) = (4, 65_536);
    cases.extend([Pattern::Full, blocks(0.05, seq)].map(|pattern| of(pattern, heads, seq)));
    cases
}

/// Every kernel under random blocks against density × the time of our fastest kernel on the same operands without a plan.
pub fn rows(run: &Run, figures: &[Figure]) -> Vec<Row> {
    let mut rows = Vec::new();
    for figure in figures.iter().filter(|figure| figure.ours && listed(figure)) {
        let dense = Spec { pattern: Pattern::Full, ..figure.spec.clone() };
        let dense = figures.iter().filter(|other| other.ours && other.spec == dense && other.pass == figure.pass);
        let Some(dense) = dense.map(|other| other.ms).min_by(f64::total_cmp) else { continue };
        let share = figure.spec.pattern.visible(figure.spec.seq) * dense;
        let row = run.less(&figure.case, figure.pass.metrics()[0], figure.ms, Some(("density_x_dense", share)));
        rows.push(row.of(figure.name));
    }
    rows
}

/// Whether a figure is of random blocks.
pub fn listed(figure: &Figure) -> bool {
    matches!(figure.spec.pattern, Pattern::RandomBlocks { .. })
}

/// The rows beside the bound that is wanted of them.
pub fn table(rows: &[Row]) -> String {
    let mut text = format!(
        "{:<44} {:<8} {:<20} {:>8} {:>10} {:>8} {:>8}",
        "case", "kernel", "figure", "ours", "its share", "ratio", "bound"
    );
    for row in rows {
        let share = row.peer.unwrap_or(f64::NAN);
        let within = if row.ours <= bound(share) { "kept" } else { "over" };
        text += &format!(
            "\n{:<44} {:<8} {:<20} {:>8.3} {share:>10.3} {:>8.2} {within:>8}",
            row.case,
            row.kernel.unwrap_or_default(),
            row.metric,
            row.ours,
            row.ours / share
        );
    }
    text
}

/// The most that a plan should take, in milliseconds.
fn bound(share: f64) -> f64 {
    BOUND.0 * share + BOUND.1
}

/// The line through `(density, milliseconds)` of least squares: what is paid once, and at density 1 beyond it.
pub fn fitted(points: &[(f64, f64)]) -> (f64, f64) {
    let n = points.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / n;
    let (x, y) = (mean(|p| p.0), mean(|p| p.1));
    let square: f64 = points.iter().map(|p| (p.0 - x).powi(2)).sum();
    let slope = points.iter().map(|p| (p.0 - x) * (p.1 - y)).sum::<f64>() / square;
    (y - slope * x, slope)
}

#[cfg(test)]
mod tests {
    use super::super::contestant::Pass;
    use super::*;

    fn figure(name: &'static str, pattern: Pattern, ms: f64) -> Figure {
        let spec = Spec::new(pattern, 1, 16, 16_384, 128, Element::BF16);
        Figure { case: spec.name(), spec, name, ours: name != "flex_attention", pass: Pass::Forward, ms }
    }

    #[test]
    fn a_share_is_of_the_fastest_dense_kernel_of_ours() {
        let quarter = Pattern::RandomBlocks { listed: 32 };
        let figures = [
            figure("mma", Pattern::Full, 7.0),
            figure("hopper", Pattern::Full, 4.0),
            figure("flex_attention", Pattern::Full, 1.0),
            figure("hopper", quarter, 1.18),
            figure("mma", quarter, 1.19),
            figure("flex_attention", quarter, 3.0),
        ];
        let rows = rows(&Run::new("sparse", "a GPU".into(), None), &figures);
        let seen: Vec<_> = rows.iter().map(|row| (row.kernel, row.ours, row.peer)).collect();
        assert_eq!(seen, [(Some("hopper"), 1.18, Some(1.0)), (Some("mma"), 1.19, Some(1.0))]);
        let table = table(&rows);
        let lines: Vec<&str> = table.lines().collect();
        assert!(lines[1].ends_with("1.18     kept") && lines[2].ends_with("1.19     over"), "{table}");
    }

    #[test]
    fn a_line_is_fitted() {
        let line = fitted(&[(0.0, 1.0), (0.5, 2.0), (1.0, 3.0)]);
        assert!((line.0 - 1.0).abs() < 1e-12 && (line.1 - 2.0).abs() < 1e-12, "{line:?}");
    }

    #[test]
    fn the_cases_are_those_of_the_issue() {
        let names: Vec<String> = cases().iter().map(Spec::name).collect();
        assert_eq!(names.len(), 11);
        assert_eq!(names[0], "full_b1_hq16_hkv16_s16384_d128_bf16");
        assert_eq!(names[4], "density0.047_b1_hq16_hkv16_s16384_d128_bf16");
        assert_eq!(names[10], "density0.051_b1_hq4_hkv4_s65536_d128_bf16");
    }
}
