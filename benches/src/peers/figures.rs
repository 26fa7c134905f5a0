//! What was measured: figures of each contestant, the rows that compare ours with each peer's, and a table.

use super::contestant::{Pass, Spec};
use crate::report::{Row, Run};

/// A contestant's median time of a pass.
#[derive(Debug, Clone, PartialEq)]
pub struct Figure {
    pub case: String,
    pub spec: Spec,
    /// The contestant.
    pub name: &'static str,
    /// Whether it is one of ours.
    pub ours: bool,
    pub pass: Pass,
    /// Of a call.
    pub ms: f64,
}

impl Figure {
    /// As the field counts: `4·B·H·D` a visible score in a forward, half of S² being visible if causal; 2.5 times that in a
    /// backward.
    pub fn tflops(&self) -> f64 {
        let Spec { batch, heads, seq, dim, pattern, .. } = self.spec;
        let full = 4.0 * (batch * heads * dim) as f64 * (seq as f64).powi(2);
        self.pass.flops() * full * pattern.visible(seq) / self.ms / 1e9
    }
}

/// Rows of one case and pass: each of ours against each peer, or alone if there is none.
pub fn rows(run: &Run, figures: &[Figure]) -> Vec<Row> {
    let mut rows = Vec::new();
    for ours in figures.iter().filter(|figure| figure.ours) {
        let peers: Vec<&Figure> = figures.iter().filter(|figure| !figure.ours).collect();
        let peers: Vec<Option<&Figure>> =
            if peers.is_empty() { vec![None] } else { peers.into_iter().map(Some).collect() };
        let [ms, tflops] = ours.pass.metrics();
        for peer in peers {
            let of = |value: fn(&Figure) -> f64| peer.map(|peer| (peer.name, value(peer)));
            rows.push(run.less(&ours.case, ms, ours.ms, of(|figure| figure.ms)).of(ours.name));
            rows.push(run.more(&ours.case, tflops, ours.tflops(), of(Figure::tflops)).of(ours.name));
        }
    }
    rows
}

/// Of what a table shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    Tflops,
    Milliseconds,
}

/// A line a case and pass, a column a contestant.
pub fn table(figures: &[Figure], unit: Unit) -> String {
    let mut names: Vec<&str> = Vec::new();
    let mut lines: Vec<(&str, Pass)> = Vec::new();
    for figure in figures {
        if !names.contains(&figure.name) {
            names.push(figure.name);
        }
        if !lines.contains(&(figure.case.as_str(), figure.pass)) {
            lines.push((&figure.case, figure.pass));
        }
    }
    let title = if unit == Unit::Tflops { "case, in TFLOP/s" } else { "case, in ms" };
    let mut text = format!("{title:<50} {:<18}", "pass");
    names.iter().for_each(|name| text += &format!(" {name:>14}"));
    for (case, pass) in lines {
        text += &format!("\n{case:<50} {:<18}", pass.name());
        for name in &names {
            let found = figures.iter().find(|f| f.case == case && f.pass == pass && f.name == *name);
            text += &match (found, unit) {
                (None, _) => format!(" {:>14}", "-"),
                (Some(figure), Unit::Tflops) => format!(" {:>14.1}", figure.tflops()),
                (Some(figure), Unit::Milliseconds) => format!(" {:>14.3}", figure.ms),
            };
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::pattern::Pattern;
    use super::*;

    fn figure(name: &'static str, ours: bool, pass: Pass, ms: f64) -> Figure {
        let spec = Spec { batch: 4, heads: 16, seq: 4096, dim: 128, pattern: Pattern::Causal, element: "bf16".into() };
        Figure { case: "causal_b4".into(), spec, name, ours, pass, ms }
    }

    #[test]
    fn operations_are_counted_as_the_field_counts() {
        let forward = figure("mma", true, Pass::Forward, 1.0);
        assert!((forward.tflops() - 274.878).abs() < 1e-3, "{}", forward.tflops());
        let backward = figure("mma", true, Pass::Backward, 2.5);
        assert!((backward.tflops() - forward.tflops()).abs() < 1e-9);
    }

    #[test]
    fn each_of_ours_meets_each_peer() {
        let run = Run::new("peers", "a GPU".into(), Some("1.2".into()));
        let figures = [
            figure("hopper", true, Pass::Forward, 1.0),
            figure("mma", true, Pass::Forward, 2.0),
            figure("cudnn", false, Pass::Forward, 1.5),
        ];
        let rows = rows(&run, &figures);
        let seen: Vec<_> =
            rows.iter().map(|r| (r.kernel, r.metric, r.peer_name, r.ratio.map(|x| (x * 100.0).round()))).collect();
        assert_eq!(
            seen,
            [
                (Some("hopper"), "forward_ms", Some("cudnn"), Some(150.0)),
                (Some("hopper"), "forward_tflops", Some("cudnn"), Some(150.0)),
                (Some("mma"), "forward_ms", Some("cudnn"), Some(75.0)),
                (Some("mma"), "forward_tflops", Some("cudnn"), Some(75.0)),
            ]
        );
        assert_eq!(rows[0].driver.as_deref(), Some("1.2"));
        let alone = super::rows(&run, &figures[..1]);
        assert_eq!((alone.len(), alone[0].peer), (2, None));
    }

    #[test]
    fn what_was_not_measured_is_a_dash() {
        let figures = [figure("mma", true, Pass::Forward, 1.0), figure("fa2", false, Pass::Backward, 1.0)];
        let text = table(&figures, Unit::Tflops);
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[1], ["causal_b4", "forward", "274.9", "-"]);
        assert_eq!(lines[2], ["causal_b4", "backward", "-", "687.2"]);
        let text = table(&figures, Unit::Milliseconds);
        assert!(text.lines().nth(1).is_some_and(|line| line.ends_with("1.000              -")), "{text}");
    }
}
