//! Masks and plans as pictures: the points that are visible, and the tiles by kind.

use std::fmt::Write;
use std::ops::Range;

use super::{BlockPlan, TileSize};
use crate::mask::{BoundMask, Extent, Mask, MaskError, TileKind};

/// Most cells on a side of a drawn grid.
const CELLS: u32 = 256;
/// Side of a grid in pixels.
const SIDE: f64 = 512.0;
const MARGIN: f64 = 16.0;
/// Partial tiles.
const ORANGE: [u8; 3] = [0xf0, 0xa8, 0x30];

/// Visible points as a fraction of all, for each cell of a grid of `rows × columns` that covers a head's points, in
/// row-major order. Tiles that are Empty or Full as a whole are not visited.
///
/// # Panics
/// May panic if `b` or `h` is out of the mask's extent.
pub fn shares(mask: &BoundMask, b: u32, h: u32, rows: u32, columns: u32) -> Vec<f32> {
    let Extent { seq_q, seq_kv, .. } = mask.extent();
    let cells = (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column)));
    cells
        .map(|(row, column)| {
            let (queries, keys) = (cell(row, rows, seq_q), cell(column, columns, seq_kv));
            match mask.classify(b, h, queries.clone(), keys.clone()) {
                TileKind::Empty => 0.0,
                TileKind::Full => 1.0,
                TileKind::Partial => {
                    let all = queries.len() * keys.len();
                    let seen: u32 = mask.bits(b, h, queries, keys).iter().map(|word| word.count_ones()).sum();
                    seen as f32 / all as f32
                }
            }
        })
        .collect()
}

/// The part of `0 .. length` in cell `n` of `cells`.
fn cell(n: u32, cells: u32, length: u32) -> Range<u32> {
    let bound = |n: u32| (n as u64 * length as u64 / cells as u64) as u32;
    bound(n)..bound(n + 1)
}

/// A head's mask and its plan, drawn: points on the left, tiles on the right (Full dark, Partial orange), the plan's
/// own description below. Above 256 tiles on a side the drawn tiles are larger than the plan's, by a power of two.
#[derive(Debug, Clone, PartialEq)]
pub struct Picture {
    /// Width and height in pixels; the background is white.
    pub size: [f64; 2],
    /// What is filled.
    pub rectangles: Vec<Rectangle>,
    /// What is framed in black: the two grids.
    pub frames: Vec<[f64; 4]>,
    /// Left end of the caption's baseline.
    pub caption_at: [f64; 2],
    /// The plan's description.
    pub caption: String,
}

/// A filled rectangle.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rectangle {
    /// Left, top, width and height in pixels.
    pub place: [f64; 4],
    /// Red, green and blue.
    pub color: [u8; 3],
}

impl Picture {
    /// Draws head `h` of batch element `b`.
    ///
    /// # Errors
    /// Those of [`BlockPlan::new`].
    ///
    /// # Panics
    /// May panic if `b` or `h` is out of the extent.
    pub fn new(mask: &Mask, extent: Extent, tile: TileSize, b: u32, h: u32) -> Result<Self, MaskError> {
        let bound = mask.bind(extent)?;
        let plan = BlockPlan::new(mask, extent, tile)?.refine();
        let (rows, columns) = (extent.seq_q.min(CELLS), extent.seq_kv.min(CELLS));
        let points = shares(&bound, b, h, rows, columns);
        let mut picture = Picture {
            size: [2.0 * SIDE + 3.0 * MARGIN, SIDE + 3.0 * MARGIN],
            rectangles: Vec::new(),
            frames: Vec::new(),
            caption_at: [MARGIN, SIDE + 2.3 * MARGIN],
            caption: plan.to_string(),
        };
        picture.grid(MARGIN, rows, columns, |row, column| {
            let share = points[(row * columns + column) as usize];
            // From white to dark blue; a cell with anything visible is never white.
            (share > 0.0).then(|| color(0.15 + 0.85 * share))
        });
        let (kinds, rows, columns) = drawn_tiles(&plan, b, h);
        picture.grid(2.0 * MARGIN + SIDE, rows, columns, |row, column| {
            match kinds[(row * columns + column) as usize] {
                TileKind::Empty => None,
                TileKind::Full => Some(color(1.0)),
                TileKind::Partial => Some(ORANGE),
            }
        });
        Ok(picture)
    }

    /// Draws a grid of cells, neighbours of one colour in a row as one rectangle, and a frame.
    fn grid(&mut self, left: f64, rows: u32, columns: u32, color: impl Fn(u32, u32) -> Option<[u8; 3]>) {
        let (width, height) = (SIDE / f64::from(columns.max(1)), SIDE / f64::from(rows.max(1)));
        for row in 0..rows {
            let mut start = 0;
            while start < columns {
                let fill = color(row, start);
                let end = (start..columns).find(|&column| color(row, column) != fill).unwrap_or(columns);
                if let Some(color) = fill {
                    let (x, y) = (left + f64::from(start) * width, MARGIN + f64::from(row) * height);
                    self.rectangles.push(Rectangle { place: [x, y, f64::from(end - start) * width, height], color });
                }
                start = end;
            }
        }
        self.frames.push([left, MARGIN, SIDE, SIDE]);
    }

    /// As an SVG document.
    pub fn svg(&self) -> String {
        let mut out = String::new();
        let [width, height] = self.size;
        let _ = writeln!(
            out,
            r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" shape-rendering="crispEdges">"#
        );
        let _ = writeln!(out, r#"<rect width="{width}" height="{height}" fill="white"/>"#);
        for Rectangle { place: [x, y, width, height], color: [red, green, blue] } in &self.rectangles {
            let _ = writeln!(
                out,
                r##"<rect x="{x:.2}" y="{y:.2}" width="{width:.2}" height="{height:.2}" fill="#{red:02x}{green:02x}{blue:02x}"/>"##
            );
        }
        for [x, y, width, height] in &self.frames {
            let _ = writeln!(
                out,
                r#"<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="none" stroke="black"/>"#
            );
        }
        let ([x, y], caption) = (self.caption_at, &self.caption);
        let _ = writeln!(out, r#"<text x="{x}" y="{y}" font-family="sans-serif" font-size="13">{caption}</text>"#);
        out.push_str("</svg>\n");
        out
    }
}

/// Kinds of the tiles to draw in row-major order, with their rows and columns: several tiles in one where there are many.
fn drawn_tiles(plan: &BlockPlan, b: u32, h: u32) -> (Vec<TileKind>, u32, u32) {
    let (tiles_q, tiles_k) = (plan.query_tiles(), plan.key_tiles());
    let together = tiles_q.max(tiles_k).div_ceil(CELLS).next_power_of_two();
    let (rows, columns) = (tiles_q.div_ceil(together), tiles_k.div_ceil(together));
    let mut full = vec![0u32; (rows * columns) as usize];
    let mut partial = vec![false; full.len()];
    for i in 0..tiles_q {
        let blocks = plan.row(b, h, i);
        let at = |j: u32| (i / together * columns + j / together) as usize;
        blocks.full.iter().for_each(|&j| full[at(j)] += 1);
        blocks.partial.iter().for_each(|&j| partial[at(j)] = true);
    }
    let size = |n: u32, tiles: u32| together.min(tiles - n * together);
    let kinds = (0..rows * columns).map(|n| {
        let all = size(n / columns, tiles_q) * size(n % columns, tiles_k);
        match (full[n as usize], partial[n as usize]) {
            (0, false) => TileKind::Empty,
            (seen, false) if seen == all => TileKind::Full,
            _ => TileKind::Partial,
        }
    });
    (kinds.collect(), rows, columns)
}

/// Between white (0) and dark blue (1).
fn color(share: f32) -> [u8; 3] {
    [24.0, 62.0, 120.0].map(|dark| (255.0 + (dark - 255.0) * share).round() as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(text: &str, what: &str) -> usize {
        text.matches(what).count()
    }

    #[test]
    fn shares_are_those_of_the_points() {
        let extent = Extent { batch: 1, heads: 2, seq_q: 20, seq_kv: 33 };
        let mask = Mask::per_head(vec![Mask::causal(), Mask::window(4, 1) | Mask::sinks(5)]);
        let bound = mask.bind(extent).unwrap();
        let found = shares(&bound, 0, 1, 6, 7);
        assert_eq!(found.len(), 42);
        for (n, &share) in (0..).zip(&found) {
            let (queries, keys) = (cell(n / 7, 6, 20), cell(n % 7, 7, 33));
            let points: Vec<bool> = queries
                .flat_map(|i| keys.clone().map(move |j| (i, j)))
                .map(|(i, j)| bound.allows(0, 1, i, j))
                .collect();
            let seen = points.iter().filter(|&&seen| seen).count();
            assert_eq!(share, seen as f32 / points.len() as f32);
        }
        assert!(found.contains(&0.0) && found.contains(&1.0) && found.iter().any(|&s| s > 0.0 && s < 1.0));
    }

    #[test]
    fn a_picture_shows_points_and_tiles() {
        let extent = Extent { batch: 1, heads: 1, seq_q: 4, seq_kv: 4 };
        let drawn = Picture::new(&Mask::causal(), extent, TileSize { bq: 2, bk: 2 }, 0, 0).unwrap().svg();
        // Points: a run in each of four rows. Tiles: a Partial one, and in the second row a Full and a Partial one.
        assert_eq!(count(&drawn, r##"fill="#183e78""##), 4 + 1);
        assert_eq!(count(&drawn, r##"fill="#f0a830""##), 2);
        assert!(drawn.contains("1 full and 2 partial blocks") && drawn.ends_with("</svg>\n"));
        let empty = Extent { seq_q: 0, ..extent };
        let empty = Picture::new(&Mask::Nothing, empty, TileSize { bq: 2, bk: 2 }, 0, 0).unwrap().svg();
        assert_eq!(count(&empty, "<rect"), 3);
    }

    #[test]
    fn many_tiles_are_drawn_together() {
        let extent = Extent { batch: 1, heads: 1, seq_q: 600, seq_kv: 600 };
        let plan = BlockPlan::new(&Mask::causal(), extent, TileSize { bq: 1, bk: 1 }).unwrap();
        let (kinds, rows, columns) = drawn_tiles(&plan, 0, 0);
        assert_eq!((rows, columns), (150, 150));
        for (n, &kind) in (0..).zip(&kinds) {
            let expected = match (n / columns).cmp(&(n % columns)) {
                std::cmp::Ordering::Less => TileKind::Empty,
                std::cmp::Ordering::Equal => TileKind::Partial,
                std::cmp::Ordering::Greater => TileKind::Full,
            };
            assert_eq!(kind, expected);
        }
    }
}
