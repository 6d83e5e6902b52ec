//! Stopping a run: signals outside the dashboard, and Ctrl-C inside it.

use std::{
    io::stdout,
    process,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use burn::train::Interrupter;
use crossterm::{
    cursor, event, execute,
    terminal::{self, LeaveAlternateScreen},
};

/// A request to stop, made by SIGINT, SIGTERM or SIGHUP. A second signal ends the process at once.
#[derive(Clone, Default)]
pub struct Stop {
    interrupter: Interrupter,
    requested: Arc<AtomicBool>,
}

impl Stop {
    /// Listens for signals from now on.
    ///
    /// # Errors
    ///
    /// If the system refuses a handler.
    pub fn on_signals() -> Result<Self, ctrlc::Error> {
        let stop = Self::default();
        let handler = stop.clone();
        ctrlc::set_handler(move || {
            if handler.requested.swap(true, Ordering::SeqCst) {
                restore_terminal();
                process::exit(130);
            }
            handler.interrupter.stop(Some("a signal"));
        })?;
        Ok(stop)
    }

    /// What burn-train looks at after every step.
    pub fn interrupter(&self) -> Interrupter {
        self.interrupter.clone()
    }

    /// Whether a signal has come.
    pub fn requested(&self) -> bool {
        self.requested.load(Ordering::SeqCst)
    }
}

/// Gives the terminal back as it was; does nothing outside the dashboard.
fn restore_terminal() {
    if terminal::is_raw_mode_enabled().unwrap_or(false) {
        let _ = terminal::disable_raw_mode();
        let _ = execute!(
            stdout(),
            event::DisableMouseCapture,
            LeaveAlternateScreen,
            cursor::Show
        );
    }
}

/// Lets Ctrl-C be a signal inside the dashboard too, until the guard is dropped.
///
/// The dashboard puts the terminal into raw mode, where Ctrl-C is a key, and burn-train ignores that key.
#[cfg(unix)]
pub fn keep_ctrl_c() -> impl Drop {
    use std::{thread, time::Duration};

    use nix::sys::termios::{LocalFlags, SetArg, tcgetattr, tcsetattr};

    struct Guard(Arc<AtomicBool>);

    impl Drop for Guard {
        fn drop(&mut self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }

    let done = Arc::new(AtomicBool::new(false));
    let guard = Guard(done.clone());
    thread::spawn(move || {
        while !done.load(Ordering::SeqCst) {
            if terminal::is_raw_mode_enabled().unwrap_or(false)
                && let Ok(mut settings) = tcgetattr(std::io::stdin())
                && !settings.local_flags.contains(LocalFlags::ISIG)
            {
                settings.local_flags.insert(LocalFlags::ISIG);
                let _ = tcsetattr(std::io::stdin(), SetArg::TCSANOW, &settings);
            }
            thread::sleep(Duration::from_millis(100));
        }
    });
    guard
}

/// Where there are no terminal settings to change, the dashboard's own keys are left.
#[cfg(not(unix))]
pub fn keep_ctrl_c() {}
