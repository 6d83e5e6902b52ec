//! Draws what a decoder looks at while it writes, as a PNG.

use std::{fs::File, path::Path};

use plotters::{
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};

use crate::{
    load_map::shade,
    plot::{
        Drawn, FONT, INK, MARGIN, PlotError, drawing, register_bundled_font, shortened, text_width,
        writing,
    },
};

const CELL: i32 = 36;
const LABEL: i32 = 20;
// No label takes more room.
const LONGEST_LABEL: i32 = 220;
const GAP: i32 = 8;

/// Draws attention weights: a column for each token that is read, a row for each that is written, darker for more.
///
/// # Errors
///
/// A file that cannot be written.
///
/// # Panics
///
/// If there is not one row for each written token, or not one weight for each read one.
pub fn draw_attention(
    weights: &[Vec<f32>],
    read: &[String],
    written: &[String],
    png: &Path,
) -> Result<(), PlotError> {
    assert_eq!(
        weights.len(),
        written.len(),
        "rows: one for each written token"
    );
    for row in weights {
        assert_eq!(row.len(), read.len(), "columns: one for each read token");
    }
    register_bundled_font()?;
    let label = |label: &String| shortened(label, LONGEST_LABEL);
    let read = read.iter().map(label).collect::<Result<Vec<_>, _>>()?;
    let written = written.iter().map(label).collect::<Result<Vec<_>, _>>()?;
    let room = |labels: &[String]| -> Result<i32, PlotError> {
        let widths = labels.iter().map(|label| text_width(label));
        Ok(widths
            .collect::<Result<Vec<_>, _>>()?
            .into_iter()
            .max()
            .unwrap_or(0))
    };
    let (left, top) = (MARGIN + room(&written)? + GAP, MARGIN + room(&read)? + GAP);
    let size = |before: i32, n: usize| (before + CELL * n as i32 + MARGIN) as u32;
    // The library would report a file that cannot be made in a form that is no message.
    File::create(png).map_err(writing(png))?;
    let size = (size(left, read.len()), size(top, written.len()));
    let picture = BitMapBackend::new(png, size).into_drawing_area();
    let draw = || -> Drawn<BitMapBackend> {
        picture.fill(&WHITE)?;
        let middle = |before: i32, i: usize| before + CELL * i as i32 + CELL / 2;
        let font = (FONT, LABEL).into_font().color(&INK);
        let upwards = font.transform(FontTransform::Rotate270);
        for (i, label) in read.iter().enumerate() {
            let style = upwards.pos(Pos::new(HPos::Left, VPos::Center));
            picture.draw_text(label, &style, (middle(left, i), top - GAP))?;
        }
        for (i, label) in written.iter().enumerate() {
            let style = font.pos(Pos::new(HPos::Right, VPos::Center));
            picture.draw_text(label, &style, (left - GAP, middle(top, i)))?;
        }
        for (row, y) in weights.iter().zip((top..).step_by(CELL as usize)) {
            for (weight, x) in row.iter().zip((left..).step_by(CELL as usize)) {
                let cell = [(x, y), (x + CELL - 1, y + CELL - 1)];
                picture.draw(&Rectangle::new(cell, shade(f64::from(*weight)).filled()))?;
            }
        }
        picture.present()
    };
    draw().map_err(drawing(png))
}
