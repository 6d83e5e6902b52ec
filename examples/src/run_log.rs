//! What the libraries tell through the crate `log` while a run trains.

use std::{
    fs::OpenOptions,
    io::{self, Write},
    path::{Path, PathBuf},
};

use env_logger::{Builder, Target};
use log::LevelFilter;

use crate::complain;

/// The file in a run's folder.
pub(crate) const LOG_FILE: &str = "log.txt";

/// From now on warnings and errors go to the end of a file, and to standard error if `on_screen`. The variable `RUST_LOG`
/// chooses other levels. The first call in a process counts.
pub(crate) fn log_to(path: &Path, on_screen: bool) {
    let lines = Lines {
        path: path.to_owned(),
        on_screen,
    };
    let mut builder = Builder::new();
    builder
        .filter_level(LevelFilter::Warn)
        .parse_default_env()
        .format(|to, record| {
            let level = match record.level() {
                log::Level::Warn => "warning".to_owned(),
                level => level.as_str().to_lowercase(),
            };
            writeln!(to, "{level}: {}", record.args())
        })
        .target(Target::Pipe(Box::new(lines)));
    // If there is a logger already, it stays.
    let _ = builder.try_init();
}

/// Lines that go to a file, which is there from the first one on.
struct Lines {
    path: PathBuf,
    on_screen: bool,
}

impl Write for Lines {
    fn write(&mut self, lines: &[u8]) -> io::Result<usize> {
        if self.on_screen {
            complain(String::from_utf8_lossy(lines).trim_end());
        }
        let mut file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.path)?;
        file.write_all(lines)?;
        Ok(lines.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
