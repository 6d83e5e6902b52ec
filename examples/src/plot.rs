//! Draws the loss curves of runs, once as an SVG and once as a PNG.

use std::{
    collections::HashMap,
    error::Error,
    fs::{self, File},
    io,
    ops::Range,
    path::{Path, PathBuf},
};

use emberlm::training::{RunHistory, StepRecord};
use plotters::{
    coord::{
        Shift,
        ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter},
        types::RangedCoordf64,
    },
    prelude::*,
    style::{
        FontError, register_font,
        text_anchor::{HPos, Pos, VPos},
    },
};
use thiserror::Error;

/// Why the curves could not be drawn.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PlotError {
    /// There is no run, or none has a loss.
    #[error("no run has a loss to draw: give a run that has trained for a step or more")]
    NothingToDraw,
    /// The operating system refused to write a file.
    #[error("cannot write {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The bundled font does not fit the drawing library.
    #[error("cannot use the bundled font: {reason:?}")]
    Font {
        /// The library's reason, where it gives one.
        reason: Option<FontError>,
    },
    /// The drawing library failed.
    #[error("cannot draw {}: {source}", path.display())]
    Drawing {
        /// The file.
        path: PathBuf,
        /// The library's reason.
        source: Box<dyn Error + Send + Sync>,
    },
}

/// Draws the training and the validation losses of `runs` against the steps, one colour a run, with the
/// learning rate (of one run) or the speed (of several) below, into the files `svg` and `png`.
///
/// The training loss is smoothed where a run has many steps. The loss axis leaves out the fall of the
/// first steps and single spikes: the curves leave the picture there. `png` must end in `.png`.
///
/// # Errors
///
/// [`PlotError::NothingToDraw`] before anything is written; otherwise whatever stops the drawing.
pub fn draw_curves(runs: &[RunHistory], svg: &Path, png: &Path) -> Result<(), PlotError> {
    draw(runs, Against::Steps, svg, png)
}

/// As [`draw_curves`], against the seconds of training instead of the steps: for runs whose steps do not take equally
/// long.
///
/// # Errors
///
/// As [`draw_curves`].
pub fn draw_curves_by_time(runs: &[RunHistory], svg: &Path, png: &Path) -> Result<(), PlotError> {
    draw(runs, Against::Time, svg, png)
}

fn draw(runs: &[RunHistory], against: Against, svg: &Path, png: &Path) -> Result<(), PlotError> {
    register_bundled_font()?;
    let figure = Figure::new(runs, against)?;

    let mut text = String::new();
    let picture = SVGBackend::with_string(&mut text, figure.size()).into_drawing_area();
    figure.draw(&picture).map_err(drawing(svg))?;
    drop(picture);
    fs::write(svg, text).map_err(writing(svg))?;

    // The library would report a file that cannot be made in a form that is no message.
    File::create(png).map_err(writing(png))?;
    let picture = BitMapBackend::new(png, figure.size()).into_drawing_area();
    figure.draw(&picture).map_err(drawing(png))
}

pub(crate) fn register_bundled_font() -> Result<(), PlotError> {
    register_font(FONT, FontStyle::Normal, FONT_FILE).map_err(|_| PlotError::Font { reason: None })
}

/// The family that the text asks for: in the PNG it is the bundled font, in the SVG what the viewer has.
pub(crate) const FONT: &str = "sans-serif";
static FONT_FILE: &[u8] = include_bytes!("../assets/DejaVuSans-subset.ttf");

// Okabe and Ito's colours, which colour-blind readers can tell apart, without the yellow that is too
// light for lines. Colours and marker shapes repeat with different periods: 21 runs look different.
const COLORS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 0, 0),
];
const MARKERS: [Marker; 3] = [Marker::Circle, Marker::Triangle, Marker::Square];
pub(crate) const INK: RGBColor = RGBColor(60, 60, 60);
const GRID: RGBColor = RGBColor(225, 225, 225);

// All sizes in pixels.
const WIDTH: u32 = 1920;
const LOSS_HEIGHT: u32 = 820;
const LOWER_HEIGHT: u32 = 380;
pub(crate) const MARGIN: i32 = 24;
/// Half of the widest label of a step stands right of the axes.
const RIGHT_MARGIN: i32 = 60;
const Y_LABELS: i32 = 150;
const X_LABELS: i32 = 88;
const TEXT: i32 = 28;
const LEGEND_ROW: i32 = 44;
const LEGEND_SAMPLE: i32 = 66;
const LEGEND_GAP: i32 = 44;

/// A run with more steps has its training loss smoothed.
const MANY_STEPS: usize = 300;
/// More points of a line than this cannot be told apart in the picture.
const MOST_POINTS: usize = 1200;
/// More markers of a run than this would run into each other.
const MOST_MARKERS: usize = 40;
/// The part of a run, from its beginning, that does not count for the range of the losses.
const WARM_UP: f64 = 0.1;
/// A run with fewer points is shown whole.
const FEW_POINTS: usize = 20;
/// The part of the points that a picture must show; the rest may be spikes.
const SHOWN: f64 = 0.98;
/// A loss of more than so many times the largest first loss says only that its run diverged.
const DIVERGED: f64 = 2.0;

type Point = (f64, f64);
type Line = Vec<Point>;
/// The part of the picture between two axes.
type Plane<DB> = DrawingArea<DB, Cartesian2d<Scale, Scale>>;
pub(crate) type Drawn<DB, T = ()> =
    Result<T, DrawingAreaErrorKind<<DB as DrawingBackend>::ErrorType>>;

#[derive(Clone, Copy)]
enum Marker {
    Circle,
    Triangle,
    Square,
}

/// What runs along.
#[derive(Clone, Copy, PartialEq)]
enum Against {
    Steps,
    Time,
}

/// One run, ready to be drawn.
struct Curve {
    color: RGBColor,
    marker: Marker,
    train: Vec<Line>,
    valid: Line,
    /// What the lower panel shows.
    lower: Vec<Line>,
}

/// One entry of the legend, and its place in the picture.
struct Entry {
    text: String,
    color: RGBColor,
    /// None stands for a line without markers, as the training loss is drawn.
    marker: Option<Marker>,
    place: (i32, i32),
}

/// An axis: its range, and ticks at round numbers.
#[derive(Clone)]
struct Scale {
    title: &'static str,
    range: Range<f64>,
    ticks: Vec<f64>,
    /// The distance of the ticks.
    step: f64,
}

/// The whole picture: the legend, the losses and the lower panel, from top to bottom.
struct Figure {
    curves: Vec<Curve>,
    legend: Vec<Entry>,
    along: Scale,
    losses: Scale,
    lower: Scale,
}

impl Figure {
    fn new(runs: &[RunHistory], against: Against) -> Result<Self, PlotError> {
        let last_step = runs.iter().filter_map(|run| Some(run.last()?.step)).max();
        let last_step = last_step.unwrap_or(0);
        let many = runs.iter().any(|run| run.steps.len() > MANY_STEPS);
        // A hundredth of the picture's width, the same for all runs: what is left of the noise is comparable.
        let window = if many { last_step / 100 } else { 0 };

        let one_run = runs.len() == 1;
        let curve = |(index, run): (usize, &RunHistory)| {
            let gap = visible_gap(run, last_step);
            let lower = match one_run {
                true => values(run, |record| Some(record.learning_rate)),
                false => {
                    RunHistory::smoothed(&values(run, |record| record.tokens_per_second), window)
                }
            };
            Curve {
                color: COLORS[index % COLORS.len()],
                marker: MARKERS[index % MARKERS.len()],
                train: lines(&RunHistory::smoothed(&run.train_losses(), window), gap),
                valid: lines(&run.valid_losses(), u64::MAX).concat(),
                lower: lines(&lower, gap),
            }
        };
        let mut curves: Vec<_> = runs.iter().enumerate().map(curve).collect();
        if against == Against::Time {
            for (curve, run) in curves.iter_mut().zip(runs) {
                curve.against_time(run);
            }
        }
        let losses = loss_range(&curves).ok_or(PlotError::NothingToDraw)?;
        let lower = curves.iter().flat_map(|curve| curve.lower.concat());
        let lower: Vec<_> = lower.map(|(_, value)| value).collect();
        let lower_top = match one_run {
            true => lower.into_iter().reduce(f64::max),
            false => most_of(lower),
        };
        let lower_top = lower_top
            .filter(|&top| top > 0.0)
            .map_or(1.0, |top| 1.15 * top);

        let lower_title = match one_run {
            true => "learning rate",
            false => "tokens per second",
        };
        let (title, end, least_step) = match against {
            Against::Steps => ("step", last_step.max(1) as f64, 1.0),
            Against::Time => {
                let last = runs.iter().filter_map(|run| Some(run.last()?.seconds));
                ("seconds of training", last.fold(1e-3, f64::max), 0.0)
            }
        };
        Ok(Self {
            legend: legend(runs, &curves, window)?,
            curves,
            along: Scale::new(title, 0.0..end, 11, least_step),
            losses: Scale::new("loss (nats per token)", losses, 9, 0.0),
            lower: Scale::new(lower_title, 0.0..lower_top, 6, 0.0),
        })
    }

    fn legend_height(&self) -> u32 {
        let last = self.legend.last().map_or(0, |entry| entry.place.1);
        (last + LEGEND_ROW) as u32
    }

    fn size(&self) -> (u32, u32) {
        (WIDTH, self.legend_height() + LOSS_HEIGHT + LOWER_HEIGHT)
    }

    fn draw<DB: DrawingBackend>(&self, picture: &DrawingArea<DB, Shift>) -> Drawn<DB> {
        picture.fill(&WHITE)?;
        for entry in &self.legend {
            entry.draw(picture)?;
        }
        let (_, panels) = picture.split_vertically(self.legend_height());
        let (losses, lower) = panels.split_vertically(LOSS_HEIGHT);

        let plane = axes(&losses, &self.along, &self.losses, 0)?;
        let top = self.losses.range.end;
        for curve in &self.curves {
            for line in curve.train.iter().flat_map(|line| up_to(top, line)) {
                draw_line(picture, pixels(&plane, &line), light(curve.color))?;
            }
        }
        for curve in &self.curves {
            for line in up_to(top, &curve.valid) {
                draw_line(picture, pixels(&plane, &line), curve.color.stroke_width(3))?;
            }
            let shown = curve.valid.iter().rev(); // From the end: the last one always has its marker.
            for point in shown.step_by(curve.valid.len().div_ceil(MOST_MARKERS).max(1)) {
                if point.1 <= top {
                    draw_marker(
                        picture,
                        curve.marker,
                        plane.map_coordinate(point),
                        curve.color,
                    )?;
                }
            }
        }

        let plane = axes(&lower, &self.along, &self.lower, X_LABELS)?;
        for curve in &self.curves {
            let top = self.lower.range.end;
            for line in curve.lower.iter().flat_map(|line| up_to(top, line)) {
                draw_line(picture, pixels(&plane, &line), curve.color.stroke_width(3))?;
            }
        }
        picture.present()
    }
}

impl Curve {
    /// Moves each point from its step to the time of that.
    fn against_time(&mut self, run: &RunHistory) {
        let seconds: HashMap<u64, f64> = (run.steps.iter())
            .map(|record| (record.step, record.seconds))
            .collect();
        let lines = self.train.iter_mut().chain(&mut self.lower);
        for (along, _) in lines.flatten().chain(&mut self.valid) {
            *along = seconds[&(*along as u64)];
        }
    }
}

impl Entry {
    fn draw<DB: DrawingBackend>(&self, picture: &DrawingArea<DB, Shift>) -> Drawn<DB> {
        let (x, y) = self.place;
        let middle = y + LEGEND_ROW / 2;
        let sample = vec![(x, middle), (x + LEGEND_SAMPLE, middle)];
        match self.marker {
            None => draw_line(picture, sample, light(self.color))?,
            Some(marker) => {
                draw_line(picture, sample, self.color.stroke_width(3))?;
                draw_marker(picture, marker, (x + LEGEND_SAMPLE / 2, middle), self.color)?;
            }
        }
        let style = text_style().pos(Pos::new(HPos::Left, VPos::Center));
        let place = (x + LEGEND_SAMPLE + 12, middle);
        picture.draw(&Text::new(self.text.as_str(), place, style))
    }

    /// The width in the picture, with the gap to the next entry.
    fn width(&self) -> Result<i32, PlotError> {
        Ok(LEGEND_SAMPLE + 12 + text_width(&self.text)? + LEGEND_GAP)
    }
}

impl Scale {
    /// The scale with at most about `most` ticks at round numbers, at least `least_step` apart.
    fn new(title: &'static str, range: Range<f64>, most: usize, least_step: f64) -> Self {
        let rough = ((range.end - range.start) / most as f64).max(least_step);
        let power = 10f64.powf(rough.log10().floor());
        let round = [1.0, 2.0, 5.0].map(|digit| digit * power);
        // The tolerance: a rough step of 0.2 may have come out as 0.2000...01.
        let step = round.into_iter().find(|&step| step >= 0.999 * rough);
        let step = step.unwrap_or(10.0 * power);
        // The same tolerance for ticks at the ends of the range.
        let first = (range.start / step - 1e-3).ceil();
        let last = (range.end / step + 1e-3).floor();
        Self {
            title,
            range,
            ticks: (first as i64..=last as i64)
                .map(|tick| tick as f64 * step)
                .collect(),
            step,
        }
    }
}

impl Ranged for Scale {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        RangedCoordf64::from(self.range()).map(value, limit)
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        match hint.weight().allow_light_points() {
            true => Vec::new(), // There are no smaller ticks between the ticks.
            false => self.ticks.clone(),
        }
    }

    fn range(&self) -> Range<f64> {
        self.range.clone()
    }
}

impl ValueFormatter<f64> for Scale {
    /// The text of the tick at `value`: `12,000`, `3.25`, `1.5e-4`.
    fn format_ext(&self, &value: &f64) -> String {
        if value == 0.0 {
            "0".into()
        } else if self.step < 0.999e-3 || value.abs() >= 1e9 {
            format!("{value:.1e}").replace(".0e", "e")
        } else if self.step < 0.999 {
            let decimals = (-self.step.log10() - 1e-3).ceil() as usize;
            format!("{value:.decimals$}")
        } else {
            let digits = format!("{:.0}", value.abs());
            let groups: Vec<_> = digits.as_bytes().rchunks(3).rev().collect();
            let sign = if value < 0.0 { "-" } else { "" };
            format!("{sign}{}", String::from_utf8_lossy(&groups.join(&b',')))
        }
    }
}

/// The legend, set in rows: what the two kinds of lines mean, then the runs.
fn legend(runs: &[RunHistory], curves: &[Curve], window: u64) -> Result<Vec<Entry>, PlotError> {
    let entry = |text: String, color, marker| Entry {
        text,
        color,
        marker,
        place: (0, 0),
    };
    let mut entries = Vec::new();
    if curves.iter().any(|curve| !curve.train.is_empty()) {
        let text = match window {
            0 | 1 => "training".into(),
            _ => format!("training, mean of {} steps", window / 2 * 2 + 1),
        };
        entries.push(entry(text, INK, None));
    }
    if curves.iter().any(|curve| !curve.valid.is_empty()) {
        entries.push(entry("validation".into(), INK, Some(MARKERS[0])));
    }
    let room = WIDTH as i32 - Y_LABELS - MARGIN - RIGHT_MARGIN;
    for (run, curve) in runs.iter().zip(curves) {
        let text = shortened(&run.name, room / 2)?;
        let marker = (!curve.valid.is_empty()).then_some(curve.marker);
        entries.push(entry(text, curve.color, marker));
    }

    let (mut x, mut y) = (0, MARGIN / 2);
    for entry in &mut entries {
        let width = entry.width()?;
        if x > 0 && x + width > room {
            (x, y) = (0, y + LEGEND_ROW);
        }
        entry.place = (MARGIN + Y_LABELS + x, y);
        x += width;
    }
    Ok(entries)
}

/// The name, without its middle where it is wider than `room`: names of runs differ at both ends.
pub(crate) fn shortened(name: &str, room: i32) -> Result<String, PlotError> {
    let visible = |c: char| if c.is_control() { '?' } else { c };
    let mut text: String = name.chars().map(visible).collect();
    let letters: Vec<char> = text.chars().collect();
    let mut kept = letters.len();
    while kept > 1 && text_width(&text)? > room {
        kept -= 1;
        let (head, tail) = (kept.div_ceil(2), letters.len() - kept / 2);
        text = letters[..head]
            .iter()
            .chain(&['…'])
            .chain(&letters[tail..])
            .collect();
    }
    Ok(text)
}

fn text_style() -> TextStyle<'static> {
    (FONT, TEXT).into_font().color(&INK)
}

pub(crate) fn text_width(text: &str) -> Result<i32, PlotError> {
    match text_style().font.box_size(text) {
        Ok((width, _)) => Ok(width as i32),
        Err(reason) => Err(PlotError::Font {
            reason: Some(reason),
        }),
    }
}

/// The finite values of a run's steps.
fn values(run: &RunHistory, value: impl Fn(&StepRecord) -> Option<f64>) -> Vec<(u64, f64)> {
    let points = run
        .steps
        .iter()
        .filter_map(|record| Some((record.step, value(record)?)));
    points.filter(|(_, value)| value.is_finite()).collect()
}

/// The distance of two points of a run, in steps, from which on the line between them is left out: a
/// hundredth of the picture's width, or the distance at which the run was logged.
fn visible_gap(run: &RunHistory, last_step: u64) -> u64 {
    let pairs = run.steps.windows(2);
    let mut distances: Vec<_> = pairs
        .map(|pair| pair[1].step.saturating_sub(pair[0].step))
        .collect();
    distances.sort_unstable();
    let usual = distances.get(distances.len() / 2).copied().unwrap_or(1);
    usual.max(last_step / 100)
}

/// The points as lines that end where the next point is more than `gap` steps away.
fn lines(points: &[(u64, f64)], gap: u64) -> Vec<Line> {
    let stride = points.len().div_ceil(MOST_POINTS).max(1);
    points
        .chunk_by(|(step, _), (next, _)| next.saturating_sub(*step) <= gap)
        .map(|line| {
            let last = line.len() - 1;
            let kept = line.iter().enumerate();
            kept.filter(|(index, _)| index % stride == 0 || *index == last)
                .map(|(_, &(step, value))| (step as f64, value))
                .collect()
        })
        .collect()
}

/// The range of losses that is worth showing; `None` without a loss.
fn loss_range(curves: &[Curve]) -> Option<Range<f64>> {
    let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
    let mut first: f64 = 0.0;
    for curve in curves {
        let train = curve.train.concat();
        let all = || train.iter().chain(&curve.valid);
        low = all().map(|&(_, loss)| loss).fold(low, f64::min);
        let last = all().map(|&(step, _)| step).fold(0.0, f64::max);
        let settled = match train.len().max(curve.valid.len()) < FEW_POINTS {
            true => 0.0,
            false => WARM_UP * last,
        };
        for line in [&train, &curve.valid] {
            if let Some(&(_, loss)) = line.first() {
                first = first.max(loss.abs());
            }
            let counted = line.iter().filter(|(step, _)| *step >= settled);
            if let Some(loss) = most_of(counted.map(|&(_, loss)| loss).collect()) {
                high = high.max(loss);
            }
        }
    }
    if low > high {
        return None;
    }
    high = high.min(DIVERGED * first);
    // Losses that are all the same still need a picture with a height.
    let size = low.abs().max(high.abs()).max(1.0);
    let margin = match high - low > 1e-6 * size {
        true => 0.04 * (high - low),
        false => 0.1 * size,
    };
    Some(low - margin..high + margin)
}

/// The smallest number that no more than a few of the values exceed; `None` without a value.
fn most_of(mut values: Vec<f64>) -> Option<f64> {
    values.sort_unstable_by(f64::total_cmp);
    let count = (SHOWN * values.len() as f64).ceil() as usize;
    values.get(count.checked_sub(1)?).copied()
}

/// The parts of the line that are not above `top`, cut where the line crosses it.
fn up_to(top: f64, line: &[Point]) -> Vec<Line> {
    let mut parts = vec![Line::new()];
    let mut before: Option<Point> = None;
    for &(x, y) in line {
        let inside = y <= top;
        if let Some((x0, y0)) = before.filter(|&(_, y0)| (y0 <= top) != inside) {
            let crossing = (x0 + (x - x0) * (top - y0) / (y - y0), top);
            parts.last_mut().expect("one from the start").push(crossing);
            if !inside {
                parts.push(Line::new());
            }
        }
        if inside {
            parts.last_mut().expect("one from the start").push((x, y));
        }
        before = Some((x, y));
    }
    parts.retain(|part| !part.is_empty());
    parts
}

/// Draws a panel's grid and its labels and returns the plane of its data.
fn axes<DB: DrawingBackend>(
    panel: &DrawingArea<DB, Shift>,
    x: &Scale,
    y: &Scale,
    x_labels: i32,
) -> Drawn<DB, Plane<DB>> {
    let mut chart = ChartBuilder::on(panel)
        .margin_top(MARGIN)
        .margin_left(MARGIN)
        .margin_bottom(x_labels / 8)
        .margin_right(RIGHT_MARGIN)
        .y_label_area_size(Y_LABELS)
        .x_label_area_size(x_labels)
        .build_cartesian_2d(x.clone(), y.clone())?;
    let mut mesh = chart.configure_mesh();
    mesh.x_desc(x.title)
        .y_desc(y.title)
        .label_style(text_style())
        .axis_desc_style(text_style())
        .bold_line_style(GRID)
        .axis_style(INK);
    mesh.draw()?;
    Ok(chart.plotting_area().clone())
}

fn pixels<DB: DrawingBackend>(plane: &Plane<DB>, line: &[Point]) -> Vec<(i32, i32)> {
    let pixels = line.iter().map(|point| plane.map_coordinate(point));
    pixels.collect()
}

/// How the training loss is drawn: thin and light, so that the validation loss stands out.
fn light(color: RGBColor) -> ShapeStyle {
    color.mix(0.5).stroke_width(2)
}

fn draw_line<DB: DrawingBackend>(
    picture: &DrawingArea<DB, Shift>,
    pixels: Vec<(i32, i32)>,
    style: ShapeStyle,
) -> Drawn<DB> {
    // A line of one point would be invisible.
    if let [point] = pixels[..] {
        return picture.draw(&Circle::new(point, 4, style.filled()));
    }
    for part in without_sharp_turns(&pixels) {
        picture.draw(&PathElement::new(part.to_vec(), style))?;
    }
    Ok(())
}

/// The parts of a line between turns of more than a right angle, where the library would draw a spike: it lengthens the
/// edges of a thick line until they meet.
fn without_sharp_turns(pixels: &[(i32, i32)]) -> Vec<&[(i32, i32)]> {
    let (mut parts, mut first) = (Vec::new(), 0);
    for (i, turn) in pixels.windows(3).enumerate() {
        let [a, b, c] = [turn[0], turn[1], turn[2]];
        let way = |(x, y): (i32, i32), (to_x, to_y)| [i64::from(to_x - x), i64::from(to_y - y)];
        let ([x, y], [next_x, next_y]) = (way(a, b), way(b, c));
        if x * next_x + y * next_y < 0 {
            parts.push(&pixels[first..i + 2]);
            first = i + 1;
        }
    }
    parts.push(&pixels[first..]);
    parts
}

fn draw_marker<DB: DrawingBackend>(
    picture: &DrawingArea<DB, Shift>,
    marker: Marker,
    (x, y): (i32, i32),
    color: RGBColor,
) -> Drawn<DB> {
    let style = color.filled();
    match marker {
        Marker::Circle => picture.draw(&Circle::new((x, y), 7, style)),
        Marker::Triangle => picture.draw(&TriangleMarker::new((x, y), 10, style)),
        Marker::Square => picture.draw(&Rectangle::new([(x - 6, y - 6), (x + 6, y + 6)], style)),
    }
}

/// Turns the system's error about `path` into this module's, for `map_err`.
pub(crate) fn writing(path: &Path) -> impl FnOnce(io::Error) -> PlotError {
    let path = path.to_owned();
    |source| PlotError::Io { path, source }
}

/// Turns the library's error about `path` into this module's, for `map_err`.
pub(crate) fn drawing<E: Error + Send + Sync + 'static>(
    path: &Path,
) -> impl FnOnce(DrawingAreaErrorKind<E>) -> PlotError {
    let path = path.to_owned();
    |error| PlotError::Drawing {
        path,
        source: Box::new(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A thick line that turns back draws nothing beyond its ends.
    #[test]
    fn spikes_end_where_the_line_turns() {
        let path = tempfile::tempdir().unwrap();
        let path = path.path().join("a.png");
        {
            let picture = BitMapBackend::new(&path, (60, 200)).into_drawing_area();
            picture.fill(&WHITE).unwrap();
            let zigzag = [(10, 100), (11, 60), (12, 100), (13, 60), (50, 60)];
            draw_line(&picture, zigzag.to_vec(), BLACK.stroke_width(3)).unwrap();
            picture.present().unwrap();
        }
        let image = image::open(&path).unwrap().to_luma8();
        let dark = image
            .enumerate_pixels()
            .filter(|(.., pixel)| pixel.0[0] < 128);
        let rows: Vec<u32> = dark.map(|(_, y, _)| y).collect();
        assert!(rows.iter().all(|y| (57..=103).contains(y)), "{rows:?}");
        assert!(rows.contains(&80));
    }

    fn run(name: &str, steps: Vec<StepRecord>) -> RunHistory {
        RunHistory {
            name: name.into(),
            steps,
            report: None,
        }
    }

    fn record(step: u64, train_loss: Option<f64>, valid_loss: Option<f64>) -> StepRecord {
        StepRecord {
            step,
            train_loss,
            learning_rate: 1e-3,
            gradient_norm: None,
            tokens_per_second: Some(100.0),
            peak_memory_bytes: Some(1),
            seconds: 1.0,
            skipped: false,
            valid_loss,
            routing: None,
        }
    }

    /// A loss that falls from 11 to 3 over `steps` steps, validated every tenth.
    fn falling(name: &str, steps: u64) -> RunHistory {
        let loss = |step| 3.0 + 8.0 * (-30.0 * step as f64 / steps as f64).exp();
        let record = |step| {
            let valid = (step % 10 == 0).then(|| loss(step) + 0.1);
            record(step, Some(loss(step)), valid)
        };
        run(name, (1..=steps).map(record).collect())
    }

    fn drawn(runs: &[RunHistory]) -> String {
        let dir = tempfile::tempdir().unwrap();
        let [svg, png] = ["a.svg", "a.png"].map(|name| dir.path().join(name));
        draw_curves(runs, &svg, &png).unwrap();
        let image = fs::read(png).unwrap();
        assert_eq!(&image[1..4], b"PNG");
        let width = u32::from_be_bytes(image[16..20].try_into().unwrap());
        assert_eq!(width, WIDTH);
        let text = fs::read_to_string(svg).unwrap();
        assert!(text.ends_with("</svg>\n"), "{text}");
        text
    }

    /// How many filled shapes of the colour the picture holds: markers, also those of the legend.
    fn markers(text: &str, color: RGBColor) -> usize {
        let fill = format!("fill=\"#{:02X}{:02X}{:02X}\"", color.0, color.1, color.2);
        text.matches(&fill).count()
    }

    fn range(runs: &[RunHistory]) -> Range<f64> {
        Figure::new(runs, Against::Steps).unwrap().losses.range
    }

    #[test]
    fn one_run_is_drawn_with_its_learning_rate() {
        let text = drawn(&[falling("plain", 50)]);
        for label in ["plain", "training", "validation", "step", "learning rate"] {
            assert!(text.contains(&format!("\n{label}\n")), "{label}: {text}");
        }
        assert!(text.contains("loss (nats per token)"));
        assert!(text.contains("font-family=\"sans-serif\""));
        assert_eq!(markers(&text, COLORS[0]), 5 + 1);
    }

    #[test]
    fn several_runs_are_drawn_with_their_speeds() {
        let text = drawn(&[falling("a", 50), falling("b & c", 400), falling("d", 3)]);
        for label in [
            "a",
            "b &amp; c",
            "d",
            "tokens per second",
            "training, mean of 5 steps",
        ] {
            assert!(text.contains(&format!("\n{label}\n")), "{label}: {text}");
        }
        assert!(!text.contains("learning rate"));
        assert_eq!(markers(&text, COLORS[0]), 5 + 1);
        assert_eq!(markers(&text, COLORS[1]), 37 + 1); // Those of the first steps are above the picture.
        assert_eq!(markers(&text, COLORS[2]), 0); // Never validated.
    }

    #[test]
    fn runs_are_drawn_against_time() {
        let slow = |name, seconds: f64| {
            let mut run = falling(name, 50);
            for record in &mut run.steps {
                record.seconds = seconds * record.step as f64;
            }
            run
        };
        let runs = [slow("slow", 3.0), slow("fast", 0.5)];
        let figure = Figure::new(&runs, Against::Time).unwrap();
        assert_eq!(figure.along.title, "seconds of training");
        assert_eq!(figure.along.range, 0.0..150.0);
        let along = |line: &Line| line.iter().map(|(x, _)| *x).collect::<Vec<_>>();
        let validated = [10.0, 20.0, 30.0, 40.0, 50.0];
        for (curve, seconds) in figure.curves.iter().zip([3.0, 0.5]) {
            assert_eq!(along(&curve.valid), validated.map(|step| step * seconds));
            assert_eq!(along(&curve.train[0])[..2], [seconds, 2.0 * seconds]);
        }
    }

    #[test]
    fn sparse_runs_are_drawn() {
        let lonely = run("a", vec![record(1, Some(3.0), Some(3.5))]);
        // A marker in the legend, one on the validation loss, and three lines that are dots.
        assert_eq!(markers(&drawn(&[lonely]), COLORS[0]), 1 + 1 + 3);
        let gap = run(
            "a",
            vec![
                record(1, Some(3.0), None),
                record(2, None, None),
                record(3, Some(2.0), None),
            ],
        );
        assert_eq!(markers(&drawn(&[gap]), COLORS[0]), 2);
        let only_valid = run(
            "a",
            vec![record(1, None, Some(3.0)), record(2, None, Some(2.0))],
        );
        assert!(!drawn(&[only_valid]).contains("\ntraining\n"));
        drawn(&[falling("a", 50), run("has not begun", vec![])]);
        drawn(&vec![falling("many", 20); 30]);
    }

    #[test]
    fn without_a_loss_nothing_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let [svg, png] = ["a.svg", "a.png"].map(|name| dir.path().join(name));
        let overflowed = record(1, None, Some(f64::NAN));
        for runs in [
            vec![],
            vec![run("a", vec![])],
            vec![run("a", vec![overflowed])],
        ] {
            let error = draw_curves(&runs, &svg, &png).unwrap_err();
            assert!(matches!(error, PlotError::NothingToDraw), "{error}");
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_file_that_cannot_be_written_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let [good, bad] = ["a.svg", "missing/a.png"].map(|name| dir.path().join(name));
        for (svg, png) in [(&good, &bad), (&bad, &good)] {
            match draw_curves(&[falling("a", 5)], svg, png).unwrap_err() {
                PlotError::Io { path, .. } => assert_eq!(path, bad),
                other => panic!("{other}"),
            }
        }
    }

    #[test]
    fn the_range_leaves_out_the_first_fall_and_single_spikes() {
        let plain = falling("a", 200);
        let shown = range(std::slice::from_ref(&plain));
        assert!(shown.start < 3.0 && shown.start > 2.9, "{shown:?}");
        assert!(shown.end < 3.8 && shown.end > 3.4, "{shown:?}"); // 3.4: the validation loss at step 20.

        let mut spiked = plain.clone();
        spiked.steps[150].train_loss = Some(1e9);
        assert_eq!(range(&[spiked]), shown);
        // A rise that stays is shown.
        let mut risen = plain.clone();
        risen.steps[150..]
            .iter_mut()
            .for_each(|record| record.train_loss = Some(7.0));
        assert!(range(&[risen]).end > 7.0);
        // A run that diverged does not press the others into a line.
        let mut diverged = plain.clone();
        diverged.steps[50..]
            .iter_mut()
            .for_each(|record| record.train_loss = Some(1e9));
        assert!(range(&[plain, diverged]).end < 25.0);
    }

    #[test]
    fn the_range_of_a_short_run_is_that_of_all_its_losses() {
        let shown = range(&[falling("a", 3)]);
        assert!(shown.start < 3.0 && shown.end > 3.0, "{shown:?}");
        let steps = vec![
            record(1, Some(11.0), Some(11.5)),
            record(2, Some(3.0), None),
        ];
        let shown = range(&[run("a", steps)]);
        assert!(shown.start < 3.0 && shown.end > 11.5, "{shown:?}");
        let flat = range(&[run(
            "a",
            vec![record(1, Some(2.0), None), record(2, Some(2.0), None)],
        )]);
        assert!(flat.start < 1.9 && flat.end > 2.1, "{flat:?}");
    }

    #[test]
    fn most_of_leaves_out_a_few() {
        assert_eq!(most_of(vec![]), None);
        assert_eq!(most_of(vec![4.0]), Some(4.0));
        assert_eq!(most_of(vec![9.0, 1.0, 5.0]), Some(9.0));
        assert_eq!(most_of((1..=100).map(f64::from).collect()), Some(98.0));
    }

    #[test]
    fn lines_end_at_gaps() {
        let points = [(1, 5.0), (2, 4.0), (5, 3.0), (9, 2.0)];
        let expected = [
            vec![(1.0, 5.0), (2.0, 4.0)],
            vec![(5.0, 3.0)],
            vec![(9.0, 2.0)],
        ];
        assert_eq!(lines(&points, 1), expected);
        assert_eq!(lines(&points, 3).len(), 2);
        assert_eq!(lines(&points, 4).len(), 1);
        assert!(lines(&[], 1).is_empty());
        let many: Vec<_> = (0..10_000).map(|step| (step, 0.5)).collect();
        let thin = lines(&many, 1).concat();
        assert!(thin.len() <= MOST_POINTS + 1, "{}", thin.len());
        assert_eq!((thin[0].0, thin[thin.len() - 1].0), (0.0, 9999.0));
    }

    #[test]
    fn a_gap_is_more_than_the_distance_of_the_log() {
        let every = |stride: u64, steps: u64| {
            let steps = (1..=steps).map(|step| record(step * stride, None, None));
            run("a", steps.collect())
        };
        assert_eq!(visible_gap(&every(1, 50), 50), 1);
        assert_eq!(visible_gap(&every(1, 1000), 1000), 10);
        assert_eq!(visible_gap(&every(50, 20), 1000), 50);
        assert_eq!(visible_gap(&every(1, 1), 1), 1);
    }

    #[test]
    fn lines_are_cut_where_they_cross_the_top() {
        let line = [
            (0.0, 8.0),
            (1.0, 4.0),
            (2.0, 2.0),
            (3.0, 10.0),
            (4.0, 6.0),
            (5.0, 2.0),
        ];
        let expected = [
            vec![(0.75, 5.0), (1.0, 4.0), (2.0, 2.0), (2.375, 5.0)],
            vec![(4.25, 5.0), (5.0, 2.0)],
        ];
        assert_eq!(up_to(5.0, &line), expected);
        assert_eq!(up_to(20.0, &line), [line.to_vec()]);
        assert!(up_to(1.0, &line).is_empty());
        assert!(up_to(1.0, &[]).is_empty());
    }

    #[test]
    fn ticks_are_round_and_their_labels_short() {
        let labels = |range, most, least_step| {
            let scale = Scale::new("", range, most, least_step);
            let ticks: Vec<_> = scale
                .ticks
                .iter()
                .map(|tick| scale.format_ext(tick))
                .collect();
            ticks.join(" ")
        };
        assert_eq!(labels(0.0..3.0, 11, 1.0), "0 1 2 3");
        assert_eq!(labels(0.0..1.0, 11, 1.0), "0 1");
        assert_eq!(
            labels(0.0..12_000.0, 6, 1.0),
            "0 2,000 4,000 6,000 8,000 10,000 12,000"
        );
        assert_eq!(labels(3.12..4.41, 9, 0.0), "3.2 3.4 3.6 3.8 4.0 4.2 4.4");
        assert_eq!(
            labels(9.99..10.04, 5, 0.0),
            "9.99 10.00 10.01 10.02 10.03 10.04"
        );
        assert_eq!(labels(-1500.0..1500.0, 3, 0.0), "-1,000 0 1,000");
        assert_eq!(labels(0.0..3.1e-4, 4, 0.0), "0 1e-4 2e-4 3e-4");
        assert_eq!(labels(0.0..2.1e-5, 4, 0.0), "0 1e-5 2e-5");
        assert_eq!(labels(0.0..1.6e-3, 4, 0.0), "0 5e-4 1e-3 1.5e-3");
        assert_eq!(labels(0.0..2e12, 4, 0.0), "0 5e11 1e12 1.5e12 2e12");
    }

    #[test]
    fn long_names_lose_their_middle() {
        register_font(FONT, FontStyle::Normal, FONT_FILE)
            .ok()
            .unwrap();
        let name = format!("begin-{}-end", "x".repeat(300));
        let short = shortened(&name, 400).unwrap();
        assert!(
            short.starts_with("begin-") && short.ends_with("-end"),
            "{short}"
        );
        assert!(
            short.contains('…') && text_width(&short).unwrap() <= 400,
            "{short}"
        );
        assert_eq!(shortened("short", 400).unwrap(), "short");
        assert_eq!(shortened("two\nlines", 400).unwrap(), "two?lines");
    }

    #[test]
    fn the_legend_fits_and_nothing_in_it_overlaps() {
        register_font(FONT, FontStyle::Normal, FONT_FILE)
            .ok()
            .unwrap();
        let names = (0..20).map(|index| falling(&"run".repeat(index), 10));
        let figure = Figure::new(&names.collect::<Vec<_>>(), Against::Steps).unwrap();
        assert_eq!(figure.legend.len(), 2 + 20);
        for (index, entry) in figure.legend.iter().enumerate() {
            let (x, y) = entry.place;
            assert!(x + entry.width().unwrap() <= WIDTH as i32);
            assert!(y + LEGEND_ROW <= figure.legend_height() as i32);
            for other in &figure.legend[..index] {
                let right = other.place.0 + other.width().unwrap();
                assert!(other.place.1 < y || right <= x);
            }
        }
    }
}
