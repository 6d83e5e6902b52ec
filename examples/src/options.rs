//! Options that several programs have: where a run goes, and how it is shown.

use std::path::{Path, PathBuf};

use clap::Args;

use crate::Place;

/// Where a program computes, and how it shows that.
#[derive(Args, Debug, Clone)]
pub struct ShowOptions {
    /// Device, such as flex, ndarray, vulkan:0 [default: the GPU that is compiled in, else ndarray, else flex]
    #[arg(long)]
    pub device: Option<String>,
    /// Print lines even if the terminal could show the dashboard
    #[arg(long)]
    pub no_tui: bool,
}

/// Where a run goes that begins.
#[derive(Args, Debug, Clone)]
pub struct NewRunOptions {
    /// The run's folder, new or empty [default: the next number under runs/]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Where the final figures go too, besides the run's folder
    #[arg(long, value_name = "FILE.json")]
    pub report: Option<PathBuf>,
    /// How it is shown.
    #[command(flatten)]
    pub show: ShowOptions,
}

/// Where a run goes that begins or is continued.
#[derive(Args, Debug, Clone)]
pub struct RunOptions {
    /// Continue the run in this folder from its last checkpoint, exactly
    #[arg(long, value_name = "DIR", conflicts_with = "out")]
    pub resume: Option<PathBuf>,
    /// That of a new one.
    #[command(flatten)]
    pub new: NewRunOptions,
}

impl NewRunOptions {
    /// Where a run lives; `resume` for one that is continued.
    pub fn place<'a>(&'a self, resume: Option<&'a Path>) -> Place<'a> {
        Place {
            resume,
            out: self.out.as_deref(),
            report: self.report.as_deref(),
            no_tui: self.show.no_tui,
        }
    }
}
