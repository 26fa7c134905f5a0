//! TFLOP/s against length: a row of panels a pass and element type, a panel a head dimension and mask, a line a contestant.

use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::register_font;

use super::contestant::Pass;
use super::figures::Figure;

const FONT: &str = "sans-serif";
/// Of one panel.
const SIZE: (u32, u32) = (520, 400);
const COLORS: [(&str, RGBColor); 7] = [
    ("hopper", RGBColor(0x1f, 0x5f, 0xb4)),
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
    lines: Vec<(&'static str, Vec<(f64, f64)>)>,
}

/// Draws into a PNG or SVG file, by its extension. Nothing is drawn of no figures.
pub fn draw(path: &Path, title: &str, figures: &[Figure]) -> Result<(), String> {
    let failed = |error: Box<dyn std::error::Error>| format!("plot: {}: {error}", path.display());
    // Plotters without system fonts knows none: the font comes with the program.
    register_font(FONT, FontStyle::Normal, epaint_default_fonts::UBUNTU_LIGHT)
        .map_err(|_| "plot: the font that comes with this program does not parse")?;
    let mut rows: Vec<Vec<Panel>> = Vec::new();
    for pass in [Pass::Forward, Pass::Backward] {
        let (bf16, f16) = panels(pass, figures).into_iter().partition(|panel| panel.title.ends_with("bf16"));
        rows.extend([bf16, f16].into_iter().filter(|row: &Vec<Panel>| !row.is_empty()));
    }
    let Some(columns) = rows.iter().map(Vec::len).max() else { return Ok(()) };
    let size = (SIZE.0 * columns as u32, SIZE.1 * rows.len() as u32 + 40);
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("png") => picture(BitMapBackend::new(path, size).into_drawing_area(), title, &rows, columns),
        Some("svg") => picture(SVGBackend::new(path, size).into_drawing_area(), title, &rows, columns),
        _ => Err("expected a name that ends in .png or .svg".into()),
    }
    .map_err(failed)
}

/// The panels of a pass, in the order of the figures.
fn panels(pass: Pass, figures: &[Figure]) -> Vec<Panel> {
    let mut panels: Vec<Panel> = Vec::new();
    for figure in figures.iter().filter(|figure| figure.pass == pass) {
        let spec = &figure.spec;
        let mask = if spec.causal { "causal" } else { "full" };
        let title = format!("{}, D {}, {mask}, {}", pass.name(), spec.dim, spec.element);
        let at = panels.iter().position(|panel| panel.title == title).unwrap_or_else(|| {
            panels.push(Panel { title, lines: Vec::new() });
            panels.len() - 1
        });
        let lines = &mut panels[at].lines;
        let line = lines.iter().position(|(name, _)| *name == figure.name).unwrap_or_else(|| {
            lines.push((figure.name, Vec::new()));
            lines.len() - 1
        });
        lines[line].1.push((spec.seq as f64, figure.tflops()));
    }
    for (_, points) in panels.iter_mut().flat_map(|panel| &mut panel.lines) {
        points.sort_by(|x, y| x.0.total_cmp(&y.0));
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
    let points = || panel.lines.iter().flat_map(|(_, points)| points);
    let shortest = points().map(|p| p.0).fold(f64::INFINITY, f64::min);
    let longest = points().map(|p| p.0).fold(1.0, f64::max);
    let fastest = points().map(|p| p.1).fold(1.0, f64::max);
    let mut chart = ChartBuilder::on(area)
        .caption(&panel.title, (FONT, 19))
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(56)
        .build_cartesian_2d((shortest / 1.15..longest * 1.15).log_scale().base(2.0), 0.0..fastest * 1.7)?;
    chart
        .configure_mesh()
        .x_desc("length S (B · S = 16384)")
        .y_desc("TFLOP/s")
        .x_label_formatter(&|x| format!("{x:.0}"))
        .label_style((FONT, 15))
        .axis_desc_style((FONT, 16))
        .light_line_style(RGBColor(0xf4, 0xf4, 0xf4))
        .draw()?;
    for (name, points) in &panel.lines {
        let color = COLORS.iter().find(|(known, _)| known == name).map_or(BLACK, |(_, color)| *color);
        chart
            .draw_series(LineSeries::new(points.iter().copied(), color.stroke_width(2)))?
            .label(*name)
            .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 20, y)], color.stroke_width(3)));
        chart.draw_series(points.iter().map(|&point| Circle::new(point, 3, color.filled())))?;
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
    use super::super::contestant::Spec;
    use super::*;

    fn figure(name: &'static str, pass: Pass, seq: usize, dim: usize) -> Figure {
        let spec = Spec { batch: 16384 / seq, heads: 2048 / dim, seq, dim, causal: false, element: "bf16".into() };
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
        let (name, points) = &panels[0].lines[0];
        let lengths: Vec<f64> = points.iter().map(|p| p.0).collect();
        assert_eq!((*name, lengths), ("mma", vec![1024.0, 4096.0]));
        assert_eq!(panels[0].lines[1].0, "fa2");
    }

    #[test]
    fn a_picture_is_written() {
        let figures = [figure("mma", Pass::Forward, 1024, 64), figure("mma", Pass::Backward, 1024, 64)];
        let path = std::env::temp_dir().join(format!("flashover-plot-{}.svg", std::process::id()));
        draw(&path, "on a test", &figures).expect("drawn");
        let text = std::fs::read_to_string(&path).expect("there");
        std::fs::remove_file(&path).expect("there");
        assert!(text.contains("forward, D 64, full, bf16") && text.contains("on a test"));
        let message = draw(Path::new("x.gif"), "", &figures).expect_err("no such picture");
        assert!(message.contains(".png or .svg"), "{message}");
    }
}
