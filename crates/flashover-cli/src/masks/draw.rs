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
    paint(BitMapBackend::new(path, pixels(picture)), picture)
}

/// Width and height.
fn pixels(picture: &Picture) -> (u32, u32) {
    let [width, height] = picture.size.map(|x| x as u32);
    (width, height)
}

fn paint(bitmap: BitMapBackend, picture: &Picture) -> Result<(), Box<dyn std::error::Error>> {
    font::register()?;
    let area = bitmap.into_drawing_area();
    area.fill(&WHITE)?;
    // Neighbours share an edge: both round it to the same pixel.
    let corners = |[x, y, width, height]: [f64; 4]| {
        let pixel = |x: f64, y: f64| (x.round() as i32, y.round() as i32);
        [pixel(x, y), pixel(x + width, y + height)]
    };
    for &Rectangle { place, color: [red, green, blue] } in &picture.rectangles {
        let [from, (right, bottom)] = corners(place);
        // plotters leaves out the last pixel; a cell of less than a pixel is drawn all the same.
        let to = (right.max(from.0 + 1), bottom.max(from.1 + 1));
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

#[cfg(test)]
mod tests {
    use flashover::kernels::block_plan::TileSize;
    use flashover::kernels::mask::{Extent, Mask};

    use super::*;

    #[test]
    fn every_pixel_of_a_visible_cell_is_painted() {
        let extent = Extent { batch: 1, heads: 1, seq_q: 512, seq_kv: 512 };
        let picture = Picture::new(&Mask::causal(), extent, TileSize { bq: 128, bk: 128 }, 0, 0).unwrap();
        let (width, height) = pixels(&picture);
        let mut buffer = vec![0; (3 * width * height) as usize];
        paint(BitMapBackend::with_buffer(&mut buffer, (width, height)), &picture).unwrap();
        // Grids of 512 pixels from (16, 16) and (544, 16) on; the frames take their edges.
        let white = |x: i32, y: i32| {
            let at = 3 * (y as u32 * width + x as u32) as usize;
            buffer[at..at + 3] == [255; 3]
        };
        for y in 1..511 {
            for x in 1..511 {
                // A point's cell has 2 pixels, a tile's 128.
                assert_eq!(white(16 + x, 16 + y), x / 2 > y / 2, "point at {x}, {y}");
                assert_eq!(white(544 + x, 16 + y), x / 128 > y / 128, "tile at {x}, {y}");
            }
        }
    }
}
