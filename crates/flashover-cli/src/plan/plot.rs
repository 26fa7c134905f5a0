//! A plan as a picture: the frontier with what the paper measured beside it, the communication volume of each weight layout
//! (the paper's Figure 3, for this model), and what a chip's memory holds.

mod curves;

use std::path::Path;

use flashover_shard::planner::{Query, Sweep};
use plotters::coord::Shift;
use plotters::prelude::*;

use super::PlanError;
use crate::font::{self, NAME as FONT};
use curves::{Bars, Curve, Panel};

const SIZE: (u32, u32) = (1800, 640);
const COLORS: [RGBColor; 6] = [
    RGBColor(0x1f, 0x5f, 0xb4),
    RGBColor(0xd9, 0x5f, 0x02),
    RGBColor(0x1b, 0x9e, 0x77),
    RGBColor(0x75, 0x70, 0xb3),
    RGBColor(0xe7, 0x29, 0x8a),
    RGBColor(0x66, 0x66, 0x66),
];

type Drawn = Result<(), Box<dyn std::error::Error>>;

/// Draws into a PNG or SVG file, by its extension.
///
/// # Errors
///
/// If the extension is another one or the file cannot be written.
pub fn draw(path: &Path, query: &Query, sweep: &Sweep) -> Result<(), PlanError> {
    let failed = |error: Box<dyn std::error::Error>| PlanError::Plot(format!("{}: {error}", path.display()));
    font::register().map_err(|error| PlanError::Plot(error.to_owned()))?;
    let panels = [curves::frontier(query, sweep), curves::volumes(query, sweep)?];
    let bars = curves::memory(query, sweep);
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("png") => picture(BitMapBackend::new(path, SIZE).into_drawing_area(), query, &panels, &bars),
        Some("svg") => picture(SVGBackend::new(path, SIZE).into_drawing_area(), query, &panels, &bars),
        _ => Err("expected a name that ends in .png or .svg".into()),
    }
    .map_err(failed)
}

fn picture<DB>(root: DrawingArea<DB, Shift>, query: &Query, panels: &[Panel; 2], bars: &Bars) -> Drawn
where
    DB: DrawingBackend,
    DB::ErrorType: 'static,
{
    root.fill(&WHITE)?;
    let title = format!("{} on {}", query.model.name, query.hardware.name);
    let body = root.margin(12, 0, 0, 0).titled(&title, (FONT, 26))?;
    let areas = body.split_evenly((1, 3));
    for (area, panel) in areas.iter().zip(panels) {
        lines(area, panel)?;
    }
    stacked(&areas[2], bars)?;
    root.present()?;
    Ok(())
}

/// Curves over two logarithmic axes.
fn lines<DB>(area: &DrawingArea<DB, Shift>, panel: &Panel) -> Drawn
where
    DB: DrawingBackend,
    DB::ErrorType: 'static,
{
    let points = || panel.curves.iter().flat_map(|curve| &curve.points);
    let Some((xs, ys)) = range(points().map(|p| p.0), 1.2).zip(range(points().map(|p| p.1), 1.6)) else {
        area.draw(&Text::new(format!("{}: nothing to draw", panel.title), (80, 280), (FONT, 20)))?;
        return Ok(());
    };
    let mut chart = ChartBuilder::on(area)
        .caption(panel.title, (FONT, 20))
        .margin(16)
        .x_label_area_size(48)
        .y_label_area_size(76)
        .build_cartesian_2d(xs.log_scale(), ys.log_scale())?;
    chart
        .configure_mesh()
        .x_desc(panel.x)
        .y_desc(panel.y)
        .x_label_formatter(&|x| short(*x))
        .y_label_formatter(&|y| short(*y))
        .label_style((FONT, 16))
        .axis_desc_style((FONT, 18))
        .light_line_style(RGBColor(0xf0, 0xf0, 0xf0))
        .draw()?;
    for (i, Curve { label, points, line }) in panel.curves.iter().enumerate() {
        let color = COLORS[i % COLORS.len()];
        if *line {
            chart.draw_series(LineSeries::new(points.iter().copied(), color.stroke_width(2)))?;
        }
        let marks = points.iter().map(|&point| Circle::new(point, if *line { 3 } else { 5 }, color.filled()));
        chart
            .draw_series(marks)?
            .label(label)
            .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 22, y)], color.stroke_width(3)));
    }
    let corner = if panel.room_on_the_right { SeriesLabelPosition::UpperRight } else { SeriesLabelPosition::UpperLeft };
    chart
        .configure_series_labels()
        .position(corner)
        .background_style(WHITE.mix(0.85))
        .border_style(RGBColor(0xc0, 0xc0, 0xc0))
        .label_font((FONT, 15))
        .draw()?;
    Ok(())
}

/// Stacked bars of weights and cache, with the chip's memory as a line.
fn stacked<DB>(area: &DrawingArea<DB, Shift>, bars: &Bars) -> Drawn
where
    DB: DrawingBackend,
    DB::ErrorType: 'static,
{
    let count = bars.bars.len();
    if count == 0 {
        area.draw(&Text::new("memory: nothing to draw", (80, 280), (FONT, 20)))?;
        return Ok(());
    }
    let tallest = bars.bars.iter().map(|bar| bar.weights + bar.cache).fold(bars.limit, f64::max);
    let mut chart = ChartBuilder::on(area)
        .caption("memory of a chip, fastest plans", (FONT, 20))
        .margin(16)
        .x_label_area_size(48)
        .y_label_area_size(76)
        .build_cartesian_2d(0.0..count as f64, 0.0..tallest * 1.25)?;
    let name =
        |x: &f64| bars.bars.get(*x as usize).filter(|_| x.fract() == 0.5).map_or(String::new(), |b| b.label.clone());
    chart
        .configure_mesh()
        .disable_x_mesh()
        .x_labels(2 * count + 1)
        .x_label_formatter(&name)
        .x_desc(&bars.axis)
        .y_desc("GiB")
        .label_style((FONT, 16))
        .axis_desc_style((FONT, 18))
        .light_line_style(RGBColor(0xf0, 0xf0, 0xf0))
        .draw()?;
    for (label, color, part) in [("weights", COLORS[0], 0), ("cache", COLORS[1], 1)] {
        let boxes = bars.bars.iter().enumerate().map(|(i, bar)| {
            let (from, to) = [(0.0, bar.weights), (bar.weights, bar.weights + bar.cache)][part];
            Rectangle::new([(i as f64 + 0.15, from), (i as f64 + 0.85, to)], color.filled())
        });
        chart
            .draw_series(boxes)?
            .label(label)
            .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 16, y + 5)], color.filled()));
    }
    let limit = [(0.0, bars.limit), (count as f64, bars.limit)];
    chart
        .draw_series(LineSeries::new(limit, COLORS[5].stroke_width(2)))?
        .label("memory of the chip")
        .legend(|(x, y)| PathElement::new(vec![(x, y), (x + 16, y)], COLORS[5].stroke_width(2)));
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.85))
        .label_font((FONT, 15))
        .draw()?;
    Ok(())
}

/// A number in few characters.
fn short(value: f64) -> String {
    match value.abs() {
        v if v >= 1e6 => format!("{}M", (value / 1e5).round() / 10.0),
        v if v >= 1e3 => format!("{}k", (value / 1e2).round() / 10.0),
        _ => format!("{value}"),
    }
}

/// From the least to the largest value, with room by `factor` on both sides; `None` without positive values.
fn range(values: impl Iterator<Item = f64>, factor: f64) -> Option<std::ops::Range<f64>> {
    let (low, high) =
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)));
    (low.is_finite() && high.is_finite() && low > 0.0).then(|| low / factor..high * factor)
}
