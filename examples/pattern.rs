//! Shows an attention pattern: which keys each query sees, and what its schedule costs.
//!
//! cargo run --release --example pattern -- "causal & (window:4 | sinks:1)" --seq 24

use std::{
    io,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::Parser;
use emberlm::core::{BatchData, BlockSizes, Lengths, Pattern, Picture, Schedule};
use emberlm_examples::{exit_with, say};
use plotters::prelude::{BitMapBackend, IntoDrawingArea, RGBColor};
use thiserror::Error;

/// Show which keys each query sees
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Such as causal, window:256, dilated:8:2, strided:16, fixed:16:2, bigbird:64:3, "causal & (window:8 | sinks:2)"
    pattern: String,
    /// Queries and keys
    #[arg(long, default_value_t = 32)]
    seq: usize,
    /// Heads, for patterns that differ by head
    #[arg(long, default_value_t = 1)]
    heads: usize,
    /// Which head to draw
    #[arg(long, default_value_t = 0)]
    head: usize,
    /// Documents of this length, for patterns that ask for documents
    #[arg(long)]
    documents: Option<usize>,
    /// Queries, and keys, of a block of the schedule
    #[arg(long, default_value_t = 64)]
    block: usize,
    /// Draw it into this file instead of the terminal
    #[arg(long, value_name = "FILE.svg")]
    svg: Option<PathBuf>,
    /// Draw it into this file instead of the terminal
    #[arg(long, value_name = "FILE.png")]
    png: Option<PathBuf>,
}

#[derive(Debug, Error)]
enum PatternProgramError {
    #[error("--seq {got}: a picture has 1 to {MAX_LENGTH} queries")]
    Length { got: usize },
    #[error("--head {head}: there are {heads} heads, counted from 0")]
    Head { head: usize, heads: usize },
    #[error("--documents: a document has at least one token")]
    Documents,
    #[error("{path}: {source}")]
    Write { path: PathBuf, source: io::Error },
    #[error("{path}: the picture cannot be drawn: {reason}")]
    Draw { path: PathBuf, reason: String },
}

const MAX_LENGTH: usize = 4096;
// Wide enough for a terminal; larger patterns go into files.
const MAX_TEXT_LENGTH: usize = 160;

fn main() -> ExitCode {
    exit_with(show(&Args::parse()))
}

fn show(args: &Args) -> Result<(), Box<dyn std::error::Error>> {
    if args.seq == 0 || args.seq > MAX_LENGTH {
        return Err(PatternProgramError::Length { got: args.seq }.into());
    }
    if args.head >= args.heads {
        let (head, heads) = (args.head, args.heads);
        return Err(PatternProgramError::Head { head, heads }.into());
    }
    let pattern: Pattern = args.pattern.parse()?;
    let lengths = Lengths::square(args.seq).with_n_heads(args.heads);
    let data = match args.documents {
        None => BatchData::new(),
        Some(0) => return Err(PatternProgramError::Documents.into()),
        Some(length) => {
            let documents = (0..args.seq).map(|i| (i / length) as u32).collect();
            BatchData::new().with_documents(vec![documents])
        }
    };
    let blocks = BlockSizes {
        query: args.block,
        key: args.block,
    };
    let schedule = Schedule::compile(&pattern, &lengths, &blocks, &data)?;
    let picture = Picture::draw(&pattern, &lengths, &data, 0, args.head)?;
    let cell = (1024 / args.seq).clamp(1, 16);
    if let Some(path) = &args.svg {
        std::fs::write(path, picture.to_svg(cell)).map_err(|source| {
            PatternProgramError::Write {
                path: path.clone(),
                source,
            }
        })?;
        say(format_args!("drawn: {}", path.display()));
    }
    if let Some(path) = &args.png {
        draw(&picture, cell, path).map_err(|reason| PatternProgramError::Draw {
            path: path.clone(),
            reason,
        })?;
        say(format_args!("drawn: {}", path.display()));
    }
    if args.svg.is_none() && args.png.is_none() {
        if args.seq <= MAX_TEXT_LENGTH {
            say(picture.to_text().trim_end());
        } else {
            say(format_args!(
                "more than {MAX_TEXT_LENGTH} keys do not fit a line: draw it with --svg or --png"
            ));
        }
    }
    let statistics = schedule.statistics();
    say(format_args!(
        "{pattern}: {} visible pairs, {:.1} % of all; blocks of {} visit {} pairs in {} part{}",
        statistics.n_visible,
        statistics.density * 100.0,
        args.block,
        statistics.n_visited,
        schedule.parts().len(),
        if schedule.parts().len() == 1 { "" } else { "s" },
    ));
    Ok(())
}

/// Visible pairs are dark.
fn draw(picture: &Picture, cell: usize, path: &Path) -> Result<(), String> {
    let [height, width] = picture.size();
    let size = ((width * cell) as u32, (height * cell) as u32);
    let area = BitMapBackend::new(path, size).into_drawing_area();
    let (light, dark) = (RGBColor(242, 239, 232), RGBColor(31, 58, 95));
    area.fill(&light).map_err(|error| error.to_string())?;
    for row in 0..height * cell {
        for column in 0..width * cell {
            if picture.is_visible(row / cell, column / cell) {
                area.draw_pixel((column as i32, row as i32), &dark)
                    .map_err(|error| error.to_string())?;
            }
        }
    }
    area.present().map_err(|error| error.to_string())
}
