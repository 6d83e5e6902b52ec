//! Draws how the tokens of a run spread over its experts, as a PNG.

use std::{fs::File, path::Path};

use emberlm::training::StepRecord;
use plotters::{
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};

use crate::plot::{
    Drawn, FONT, INK, MARGIN, PlotError, drawing, register_bundled_font, text_width, writing,
};

const COLUMN: i32 = 4;
const MOST_COLUMNS: usize = 240;
const ROW: i32 = 14;
const LABEL: i32 = 16;
const GAP: i32 = 12;
/// Twice the fair share or more.
const DARKEST: RGBColor = RGBColor(0, 68, 136);

/// A step, and how often each expert of each layer was chosen in it.
type Loads<'a> = (u64, &'a Vec<Vec<u64>>);

/// Draws the load of each expert over the steps: a band for each layer, a row for each expert, a column for a step or for
/// several. White is no token, the darkest twice the fair share or more. Draws nothing, and gives `false`, for a run
/// without experts.
///
/// # Errors
///
/// A file that cannot be written.
pub fn draw_load(records: &[StepRecord], png: &Path) -> Result<bool, PlotError> {
    let loads: Vec<Loads<'_>> = records
        .iter()
        .filter_map(|record| Some((record.step, &record.routing.as_ref()?.load)))
        .collect();
    let Some((_, first)) = loads.first() else {
        return Ok(false);
    };
    let layers = (records.iter()).find_map(|record| Some(&record.routing.as_ref()?.layers));
    let layers = layers.expect("a record with a load has its layers");
    register_bundled_font()?;
    let labels: Vec<String> = layers
        .iter()
        .map(|layer| format!("layer {layer}"))
        .collect();
    let steps = format!("steps {} to {}", loads[0].0, loads[loads.len() - 1].0);
    let columns: Vec<&[Loads<'_>]> = loads.chunks(loads.len().div_ceil(MOST_COLUMNS)).collect();
    let room = labels.iter().map(|label| text_width(label));
    let room = room.collect::<Result<Vec<_>, _>>()?.into_iter().max();
    let left = MARGIN + room.unwrap_or(0) + GAP;
    let n_rows: usize = first.iter().map(Vec::len).sum();
    let width =
        (left + COLUMN * columns.len() as i32 + MARGIN).max(left + text_width(&steps)? + MARGIN);
    let height = 2 * MARGIN + ROW * n_rows as i32 + GAP * first.len() as i32 + LABEL;
    // The library would report a file that cannot be made in a form that is no message.
    File::create(png).map_err(writing(png))?;
    let picture = BitMapBackend::new(png, (width as u32, height as u32)).into_drawing_area();
    let draw = || -> Drawn<BitMapBackend> {
        picture.fill(&WHITE)?;
        let font = (FONT, LABEL).into_font().color(&INK);
        let mut top = MARGIN;
        for (layer, label) in labels.iter().enumerate() {
            let n_experts = first[layer].len();
            let middle = top + ROW * n_experts as i32 / 2;
            let style = font.pos(Pos::new(HPos::Right, VPos::Center));
            picture.draw_text(label, &style, (left - GAP, middle))?;
            for (column, x) in columns.iter().zip((left..).step_by(COLUMN as usize)) {
                let of = |expert: usize| -> u64 {
                    column.iter().map(|(_, load)| load[layer][expert]).sum()
                };
                let total: u64 = (0..n_experts).map(of).sum();
                for expert in 0..n_experts {
                    let y = top + ROW * expert as i32;
                    let share = of(expert) as f64 * n_experts as f64 / total.max(1) as f64;
                    let cell = [(x, y), (x + COLUMN - 1, y + ROW - 2)];
                    picture.draw(&Rectangle::new(cell, shade(share / 2.0).filled()))?;
                }
            }
            top += ROW * n_experts as i32 + GAP;
        }
        let style = font.pos(Pos::new(HPos::Left, VPos::Top));
        picture.draw_text(&steps, &style, (left, top))?;
        picture.present()
    };
    draw().map_err(drawing(png))?;
    Ok(true)
}

/// From white at 0 to the darkest at 1.
pub(crate) fn shade(weight: f64) -> RGBColor {
    let mixed = |dark: u8| (255.0 - (255.0 - f64::from(dark)) * weight.clamp(0.0, 1.0)) as u8;
    RGBColor(mixed(DARKEST.0), mixed(DARKEST.1), mixed(DARKEST.2))
}
