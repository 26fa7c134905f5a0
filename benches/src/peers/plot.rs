//! TFLOP/s against length: a row of panels a pass and element type, a panel a head dimension and mask, a line a contestant.
//! And time against density: a panel a pass, a fitted line a contestant.

use std::path::Path;

use plotters::coord::Shift;
use plotters::coord::ranged1d::{Ranged, ValueFormatter};
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::register_font;

use super::contestant::Pass;
use super::figures::Figure;
use super::sparse;

const FONT: &str = "sans-serif";
/// Of one panel.
const SIZE: (u32, u32) = (520, 400);
const COLORS: [(&str, RGBColor); 8] = [
    ("hopper", RGBColor(0x1f, 0x5f, 0xb4)),
    ("hopper_unordered", RGBColor(0x6b, 0xae, 0xd6)),
    ("mma", RGBColor(0x1b, 0x9e, 0x77)),
    ("flashover", RGBColor(0x75, 0x70, 0xb3)),
    ("cudnn", RGBColor(0xd9, 0x5f, 0x02)),
    ("fa2", RGBColor(0xe7, 0x29, 0x8a)),
    ("flex_attention", RGBColor(0xa6, 0x76, 0x1d)),
    ("burn", RGBColor(0x66, 0x66, 0x66)),
];

type Drawn = Result<(), Box<dyn std::error::Error>>;

/// What is drawn together.
#[derive(Debug, Clone, PartialEq)]
struct Panel {
    title: String,
    lines: Vec<Line>,
    axes: Axes,
}

/// A contestant's points, and what they are joined by: each other, or a line of its own.
#[derive(Debug, Clone, PartialEq)]
struct Line {
    name: &'static str,
    label: String,
    points: Vec<(f64, f64)>,
    path: Vec<(f64, f64)>,
}

/// What is drawn against what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Axes {
    RateOfLength,
    TimeOfDensity,
}

/// TFLOP/s against length, into a PNG or SVG file by its extension. Nothing is drawn of no figures.
pub fn of_lengths(path: &Path, title: &str, figures: &[Figure]) -> Result<(), String> {
    let mut rows: Vec<Vec<Panel>> = Vec::new();
    for pass in [Pass::Forward, Pass::Backward] {
        let (bf16, f16) = panels(pass, figures).into_iter().partition(|panel| panel.title.ends_with("bf16"));
        rows.extend([bf16, f16].into_iter().filter(|row: &Vec<Panel>| !row.is_empty()));
    }
    draw(path, title, &rows)
}

/// Milliseconds against the density of random blocks, likewise, with the line of least squares of each contestant.
pub fn of_densities(path: &Path, title: &str, figures: &[Figure]) -> Result<(), String> {
    let panels = [Pass::Forward, Pass::Backward].map(|pass| density_panel(pass, figures));
    let row: Vec<Panel> = panels.into_iter().flatten().collect();
    let rows = if row.is_empty() { Vec::new() } else { vec![row] };
    draw(path, title, &rows)
}

fn draw(path: &Path, title: &str, rows: &[Vec<Panel>]) -> Result<(), String> {
    let failed = |error: Box<dyn std::error::Error>| format!("plot: {}: {error}", path.display());
    // Plotters without system fonts knows none: the font comes with the program.
    register_font(FONT, FontStyle::Normal, epaint_default_fonts::UBUNTU_LIGHT)
        .map_err(|_| "plot: the font that comes with this program does not parse")?;
    let Some(columns) = rows.iter().map(Vec::len).max() else { return Ok(()) };
    let size = (SIZE.0 * columns as u32, SIZE.1 * rows.len() as u32 + 40);
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("png") => picture(BitMapBackend::new(path, size).into_drawing_area(), title, rows, columns),
        Some("svg") => picture(SVGBackend::new(path, size).into_drawing_area(), title, rows, columns),
        _ => Err("expected a name that ends in .png or .svg".into()),
    }
    .map_err(failed)
}

/// The densities of the shape that has most of them; `None` if there are no two.
fn density_panel(pass: Pass, figures: &[Figure]) -> Option<Panel> {
    let listed = || figures.iter().filter(|figure| figure.pass == pass && sparse::listed(figure));
    let shape = |figure: &Figure| (figure.spec.heads, figure.spec.seq, figure.spec.dim);
    let of_shape = |first: &&Figure| listed().filter(|other| shape(other) == shape(first)).count();
    let first = listed().max_by_key(of_shape)?;
    let mut lines: Vec<Line> = Vec::new();
    for figure in listed().filter(|figure| shape(figure) == shape(first)) {
        let point = (figure.spec.pattern.visible(figure.spec.seq), figure.ms);
        match lines.iter_mut().find(|line| line.name == figure.name) {
            Some(line) => line.points.push(point),
            None => lines.push(Line { name: figure.name, label: String::new(), points: vec![point], path: Vec::new() }),
        }
    }
    lines.retain(|line| line.points.len() > 1);
    for line in &mut lines {
        let (once, slope) = sparse::fitted(&line.points);
        let densest = line.points.iter().map(|p| p.0).fold(0.0, f64::max);
        line.path = vec![(0.0, once), (densest, once + slope * densest)];
        line.label = format!("{}: {once:.3} + {slope:.2} · density", line.name);
    }
    let (heads, seq, dim) = shape(first);
    let title = format!("{}, H {heads}, S {seq}, D {dim}", pass.name());
    (!lines.is_empty()).then_some(Panel { title, lines, axes: Axes::TimeOfDensity })
}

/// The panels of a pass, in the order of the figures.
fn panels(pass: Pass, figures: &[Figure]) -> Vec<Panel> {
    let mut panels: Vec<Panel> = Vec::new();
    for figure in figures.iter().filter(|figure| figure.pass == pass) {
        let spec = &figure.spec;
        let title = format!("{}, D {}, {}, {}", pass.name(), spec.dim, spec.pattern.name(spec.seq), spec.element);
        let at = panels.iter().position(|panel| panel.title == title).unwrap_or_else(|| {
            panels.push(Panel { title, lines: Vec::new(), axes: Axes::RateOfLength });
            panels.len() - 1
        });
        let lines = &mut panels[at].lines;
        let line = lines.iter().position(|line| line.name == figure.name).unwrap_or_else(|| {
            let label = figure.name.to_string();
            lines.push(Line { name: figure.name, label, points: Vec::new(), path: Vec::new() });
            lines.len() - 1
        });
        lines[line].points.push((spec.seq as f64, figure.tflops()));
    }
    for line in panels.iter_mut().flat_map(|panel| &mut panel.lines) {
        line.points.sort_by(|x, y| x.0.total_cmp(&y.0));
        line.path = line.points.clone();
    }
    panels
}

fn picture<DB>(root: DrawingArea<DB, Shift>, title: &str, rows: &[Vec<Panel>], columns: usize) -> Drawn
where
    DB: DrawingBackend,
    DB::ErrorType: 'static,
{
    root.fill(&WHITE)?;
    let body = root.titled(title, (FONT, 24))?;
    let areas = body.split_evenly((rows.len(), columns));
    for (n, row) in rows.iter().enumerate() {
        for (panel, area) in row.iter().zip(&areas[n * columns..]) {
            chart(area, panel)?;
        }
    }
    root.present()?;
    Ok(())
}

fn chart<DB>(area: &DrawingArea<DB, Shift>, panel: &Panel) -> Drawn
where
    DB: DrawingBackend,
    DB::ErrorType: 'static,
{
    let points = || panel.lines.iter().flat_map(|line| &line.points);
    let shortest = points().map(|p| p.0).fold(f64::INFINITY, f64::min);
    let longest = points().map(|p| p.0).fold(0.0, f64::max);
    let highest = points().map(|p| p.1).fold(0.0, f64::max) * 1.7;
    let mut chart = ChartBuilder::on(area);
    chart.caption(&panel.title, (FONT, 19)).margin(12).x_label_area_size(44).y_label_area_size(56);
    match panel.axes {
        Axes::RateOfLength => {
            let lengths = (shortest / 1.15..longest * 1.15).log_scale().base(2.0);
            let names = ["length S (B · S = 16384)", "TFLOP/s"];
            lines(chart.build_cartesian_2d(lengths, 0.0..highest)?, panel, names, &|x| format!("{x:.0}"))
        }
        Axes::TimeOfDensity => {
            let names = ["density: blocks seen of all", "ms"];
            lines(chart.build_cartesian_2d(0.0..longest * 1.05, 0.0..highest)?, panel, names, &|x| format!("{x:.2}"))
        }
    }
}

fn lines<'a, DB, X>(
    mut chart: ChartContext<'a, DB, Cartesian2d<X, RangedCoordf64>>,
    panel: &Panel,
    [x_name, y_name]: [&str; 2],
    x_label: &dyn Fn(&f64) -> String,
) -> Drawn
where
    DB: DrawingBackend + 'a,
    DB::ErrorType: 'static,
    X: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    chart
        .configure_mesh()
        .x_desc(x_name)
        .y_desc(y_name)
        .x_label_formatter(x_label)
        .label_style((FONT, 15))
        .axis_desc_style((FONT, 16))
        .light_line_style(RGBColor(0xf4, 0xf4, 0xf4))
        .draw()?;
    for line in &panel.lines {
        let color = COLORS.iter().find(|(known, _)| *known == line.name).map_or(BLACK, |(_, color)| *color);
        chart
            .draw_series(LineSeries::new(line.path.iter().copied(), color.stroke_width(2)))?
            .label(&line.label)
            .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 20, y)], color.stroke_width(3)));
        chart.draw_series(line.points.iter().map(|&point| Circle::new(point, 3, color.filled())))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.85))
        .border_style(RGBColor(0xc0, 0xc0, 0xc0))
        .label_font((FONT, 14))
        .draw()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use flashover::kernels::problem::Element;

    use super::super::contestant::Spec;
    use super::super::pattern::Pattern;
    use super::*;

    fn figure(name: &'static str, pass: Pass, seq: usize, dim: usize) -> Figure {
        let spec = Spec::new(Pattern::Full, 16384 / seq, 2048 / dim, seq, dim, Element::BF16);
        Figure { case: String::new(), spec, name, ours: true, pass, ms: 1.0 }
    }

    #[test]
    fn a_panel_a_pass_and_dimension_and_a_line_a_contestant() {
        let figures = [
            figure("mma", Pass::Forward, 4096, 64),
            figure("fa2", Pass::Forward, 4096, 64),
            figure("mma", Pass::Forward, 1024, 64),
            figure("mma", Pass::Forward, 1024, 128),
            figure("mma", Pass::Backward, 1024, 128),
        ];
        let panels = panels(Pass::Forward, &figures);
        let titles: Vec<_> = panels.iter().map(|panel| panel.title.as_str()).collect();
        assert_eq!(titles, ["forward, D 64, full, bf16", "forward, D 128, full, bf16"]);
        let line = &panels[0].lines[0];
        let lengths: Vec<f64> = line.points.iter().map(|p| p.0).collect();
        assert_eq!((line.name, lengths), ("mma", vec![1024.0, 4096.0]));
        assert_eq!(panels[0].lines[1].name, "fa2");
    }

    #[test]
    fn time_follows_density_in_one_shape() {
        let at = |seq, listed, ms| {
            let spec = Spec::new(Pattern::RandomBlocks { listed }, 1, 16, seq, 128, Element::BF16);
            Figure { spec, ms, ..figure("hopper", Pass::Forward, seq, 128) }
        };
        let figures = [at(1024, 4, 1.5), at(1024, 2, 1.0), at(2048, 4, 9.0)];
        let panel = density_panel(Pass::Forward, &figures).expect("two densities");
        assert_eq!(panel.title, "forward, H 16, S 1024, D 128");
        assert_eq!(panel.lines[0].label, "hopper: 0.500 + 2.00 · density");
        assert_eq!(panel.lines[0].points, [(0.5, 1.5), (0.25, 1.0)]);
        assert_eq!(density_panel(Pass::Backward, &figures), None);
        let path = std::env::temp_dir().join(format!("flashover-densities-{}.svg", std::process::id()));
        of_densities(&path, "on a test", &figures).expect("drawn");
        let text = std::fs::read_to_string(&path).expect("there");
        std::fs::remove_file(&path).expect("there");
        assert!(text.contains("density: blocks seen of all"), "{text}");
    }

    #[test]
    fn a_picture_is_written() {
        let figures = [figure("mma", Pass::Forward, 1024, 64), figure("mma", Pass::Backward, 1024, 64)];
        let path = std::env::temp_dir().join(format!("flashover-plot-{}.svg", std::process::id()));
        of_lengths(&path, "on a test", &figures).expect("drawn");
        let text = std::fs::read_to_string(&path).expect("there");
        std::fs::remove_file(&path).expect("there");
        assert!(text.contains("forward, D 64, full, bf16") && text.contains("on a test"));
        let message = of_lengths(Path::new("x.gif"), "", &figures).expect_err("no such picture");
        assert!(message.contains(".png or .svg"), "{message}");
    }
}
