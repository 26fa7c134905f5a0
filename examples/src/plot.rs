//! The comparison as a picture: time and memory against length, both axes logarithmic.

use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::register_font;

use crate::Result;
use crate::compare::{Figures, Pass, Row};

const FONT: &str = "sans-serif";
const BURN: RGBColor = RGBColor(0xd9, 0x5f, 0x02);
const FLASHOVER: RGBColor = RGBColor(0x1f, 0x5f, 0xb4);
const SIZE: (u32, u32) = (1400, 640);

type Area<'a> = DrawingArea<BitMapBackend<'a>, Shift>;

/// Draws the rows into a PNG at `path`.
///
/// # Errors
///
/// If the file cannot be written.
pub fn draw(rows: &[Row], device: &str, path: &Path) -> Result<()> {
    // Plotters without system fonts knows none: the font comes with the program.
    register_font(FONT, FontStyle::Normal, epaint_default_fonts::UBUNTU_LIGHT)
        .map_err(|_| "plot: the font that comes with this program does not parse")?;
    let failed = |error: Box<dyn std::error::Error + Send + Sync>| format!("plot: {}: {error}", path.display());
    let root = BitMapBackend::new(path, SIZE).into_drawing_area();
    picture(rows, device, &root).map_err(failed)?;
    root.present().map_err(|error| failed(error.into()))?;
    Ok(())
}

fn picture(rows: &[Row], device: &str, root: &Area) -> Result<()> {
    root.fill(&WHITE)?;
    let title = format!("Causal attention, f32, B 1, H 8, D 64, on {device}");
    let root = root.margin(14, 0, 0, 0).titled(&title, (FONT, 26))?;
    let (left, right) = root.split_horizontally(SIZE.0 / 2);
    panel(&left, rows, "time (ms)", |figures| Some(figures.seconds * 1e3))?;
    panel(&right, rows, "peak extra memory (MiB)", |figures| {
        figures.peak_bytes.map(|bytes| bytes as f64 / f64::from(1 << 20))
    })
}

/// A line of the panel: a side and a pass.
struct Line {
    label: &'static str,
    color: RGBColor,
    dashed: bool,
    points: Vec<(f64, f64)>,
}

fn lines(rows: &[Row], value: impl Fn(&Figures) -> Option<f64>) -> Vec<Line> {
    let points = |pass: Pass, side: fn(&Row) -> Option<&Figures>| {
        let of_pass = rows.iter().filter(|row| row.pass == pass);
        of_pass.filter_map(|row| Some((row.length as f64, side(row).and_then(&value)?))).collect::<Vec<_>>()
    };
    let burn: fn(&Row) -> Option<&Figures> = |row| row.burn.as_ref().ok();
    let ours: fn(&Row) -> Option<&Figures> = |row| Some(&row.flashover);
    let line = |label, color, dashed, points| Line { label, color, dashed, points };
    vec![
        line("Burn, forward + backward", BURN, false, points(Pass::ForwardBackward, burn)),
        line("Burn, forward", BURN, true, points(Pass::Forward, burn)),
        line("flashover, forward + backward", FLASHOVER, false, points(Pass::ForwardBackward, ours)),
        line("flashover, forward", FLASHOVER, true, points(Pass::Forward, ours)),
    ]
}

fn panel(area: &Area, rows: &[Row], label: &str, value: impl Fn(&Figures) -> Option<f64>) -> Result<()> {
    let lines = lines(rows, value);
    let all = || lines.iter().flat_map(|line| &line.points);
    let Some((x_range, y_range)) = range(all().map(|p| p.0), 1.15).zip(range(all().map(|p| p.1), 1.6)) else {
        area.draw(&Text::new(format!("{label}: not counted on this device"), (80, 280), (FONT, 22)))?;
        return Ok(());
    };
    let mut chart = ChartBuilder::on(area)
        .margin(18)
        .x_label_area_size(52)
        .y_label_area_size(84)
        .build_cartesian_2d(x_range.log_scale().base(2.0), y_range.log_scale())?;
    chart
        .configure_mesh()
        .x_desc("length S (queries and keys)")
        .y_desc(label)
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| format!("{y}"))
        .label_style((FONT, 18))
        .axis_desc_style((FONT, 20))
        .light_line_style(RGBColor(0xf0, 0xf0, 0xf0))
        .draw()?;
    for Line { label, color, dashed, points } in lines {
        let style = color.stroke_width(3);
        let drawn = if dashed {
            chart.draw_series(DashedLineSeries::new(points.clone(), 9, 6, style))?
        } else {
            chart.draw_series(LineSeries::new(points.clone(), style))?
        };
        drawn.label(label).legend(move |(x, y)| {
            let end = if dashed { x + 12 } else { x + 28 };
            PathElement::new(vec![(x, y), (end, y)], style)
        });
        chart.draw_series(points.into_iter().map(|point| Circle::new(point, 5, color.filled())))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.85))
        .border_style(RGBColor(0xc0, 0xc0, 0xc0))
        .legend_area_size(36)
        .label_font((FONT, 18))
        .draw()?;
    Ok(())
}

/// From the least to the largest value, with room by `factor` on both sides; `None` without values.
fn range(values: impl Iterator<Item = f64>, factor: f64) -> Option<std::ops::Range<f64>> {
    let (low, high) =
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)));
    (low.is_finite() && high.is_finite() && low > 0.0).then(|| low / factor..high * factor)
}
