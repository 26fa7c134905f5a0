//! A mask's picture as a PNG or SVG file.

use std::path::Path;

use flashover::kernels::block_plan::picture::{Picture, Rectangle};
use plotters::prelude::{BLACK, BitMapBackend, Color, IntoDrawingArea, IntoFont, RGBColor, Text, WHITE};

use super::MasksError;
use crate::font;

/// Draws into a file, by its extension.
pub fn draw(path: &Path, picture: &Picture) -> Result<(), MasksError> {
    let failed = |error: &dyn std::fmt::Display| MasksError::Plot(format!("{}: {error}", path.display()));
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("svg") => std::fs::write(path, picture.svg()).map_err(|error| failed(&error)),
        Some("png") => png(path, picture).map_err(|error| failed(&error)),
        _ => Err(failed(&"expected a name that ends in .png or .svg")),
    }
}

fn png(path: &Path, picture: &Picture) -> Result<(), Box<dyn std::error::Error>> {
    font::register()?;
    let [width, height] = picture.size;
    let area = BitMapBackend::new(path, (width as u32, height as u32)).into_drawing_area();
    area.fill(&WHITE)?;
    // Neighbours share an edge: both round it to the same pixel.
    let corners = |[x, y, width, height]: [f64; 4]| {
        let pixel = |x: f64, y: f64| (x.round() as i32, y.round() as i32);
        [pixel(x, y), pixel(x + width, y + height)]
    };
    for &Rectangle { place, color: [red, green, blue] } in &picture.rectangles {
        let [from, (right, bottom)] = corners(place);
        // plotters fills up to and with the last pixel; a cell of less than a pixel is drawn all the same.
        let to = ((right - 1).max(from.0), (bottom - 1).max(from.1));
        area.draw(&plotters::prelude::Rectangle::new([from, to], RGBColor(red, green, blue).filled()))?;
    }
    for &frame in &picture.frames {
        area.draw(&plotters::prelude::Rectangle::new(corners(frame), BLACK))?;
    }
    let [x, y] = picture.caption_at.map(|x| x as i32);
    // plotters anchors a text at its top.
    area.draw(&Text::new(picture.caption.as_str(), (x, y - 13), (font::NAME, 15).into_font()))?;
    area.present()?;
    Ok(())
}
