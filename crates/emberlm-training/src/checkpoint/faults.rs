//! The one seam through which a checkpoint store changes the disk, and disks that fail on purpose.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// One change to the disk, or one wait until earlier changes are on it for good.
#[derive(Debug, Clone, Copy)]
pub enum Operation<'a> {
    /// Creates a folder in an existing one.
    CreateDir(&'a Path),
    /// Writes a whole file, creating it or replacing its content.
    Write(&'a Path, &'a [u8]),
    /// Waits until the content of a file is on the disk.
    SyncFile(&'a Path),
    /// Waits until the entries of a folder (names, not contents) are on the disk.
    SyncDir(&'a Path),
    /// Renames a file or folder; nothing is at the new path.
    Rename(&'a Path, &'a Path),
    /// Removes a file.
    RemoveFile(&'a Path),
    /// Removes an empty folder.
    RemoveDir(&'a Path),
}

/// Where a checkpoint store makes its changes.
pub trait Storage: fmt::Debug + Send + Sync {
    /// Performs one operation.
    ///
    /// # Errors
    /// The system's; the operation may then be done in part.
    fn apply(&self, operation: Operation<'_>) -> io::Result<()>;
}

/// The real disk.
#[derive(Debug, Clone, Copy, Default)]
pub struct Disk;

impl Storage for Disk {
    fn apply(&self, operation: Operation<'_>) -> io::Result<()> {
        match operation {
            Operation::CreateDir(path) => fs::create_dir(path),
            Operation::Write(path, bytes) => fs::write(path, bytes),
            // Windows syncs only what is open for writing.
            Operation::SyncFile(path) => File::options().write(true).open(path)?.sync_all(),
            Operation::SyncDir(path) => sync_dir(path),
            Operation::Rename(from, to) => fs::rename(from, to),
            Operation::RemoveFile(path) => fs::remove_file(path),
            Operation::RemoveDir(path) => fs::remove_dir(path),
        }
    }
}

#[cfg(unix)]
fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Elsewhere a folder cannot be synced; its entries follow the file system's own journal.
#[cfg(not(unix))]
fn sync_dir(_path: &Path) -> io::Result<()> {
    Ok(())
}

/// What befalls a [`FaultyDisk`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The process is killed: neither this operation is done nor any later one.
    Killed,
    /// The process is killed in the middle of a write: half of the bytes are there. Any other
    /// operation is not done.
    TornWrite,
    /// The power fails: of each file that was not synced, half of the bytes are there.
    LostContents,
    /// The power fails: what was created or renamed in a folder that was not synced since is undone.
    /// What was removed stays removed, the worse of the two possibilities.
    LostEntries,
    /// The disk is full: this operation fails (of a write, half of the bytes are there), and from now
    /// on all that need space. The process lives; removing, renaming and syncing work.
    DiskFull,
}

/// A disk with a fault at a chosen operation, for crash tests. But for the fault it is the real disk;
/// only its syncs do nothing except that a later power failure spares what was synced.
///
/// ```
/// use emberlm_training::{CheckpointStore, Fault, FaultyDisk};
/// use std::sync::Arc;
///
/// let run = tempfile::tempdir()?;
/// CheckpointStore::open(run.path())?.publish(1, &[("model", b"first")], None)?;
/// for at in 0.. {
///     let disk = Arc::new(FaultyDisk::new(Fault::TornWrite, at));
///     let mut store = CheckpointStore::open_on(run.path(), disk.clone())?;
///     let outcome = store.publish(2, &[("model", b"second")], None);
///     drop(store); // the process is gone, and its lock with it
///     if !disk.struck() {
///         outcome?;
///         break; // the fault lies behind the last operation: all were tried
///     }
///     let step = CheckpointStore::open(run.path())?.reader().load_newest()?.unwrap().checkpoint.step;
///     assert!(step == 1 || step == 2);
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct FaultyDisk {
    fault: Fault,
    at: usize,
    state: Mutex<State>,
}

impl FaultyDisk {
    /// A disk on which `fault` happens at operation `at`, counted from 0.
    pub fn new(fault: Fault, at: usize) -> Self {
        Self {
            fault,
            at,
            state: Mutex::default(),
        }
    }

    /// Whether the fault has happened.
    pub fn struck(&self) -> bool {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.n_operations > self.at
    }

    fn crash(&self, state: &State, operation: Operation<'_>) -> io::Result<()> {
        match self.fault {
            Fault::TornWrite => write_half(operation)?,
            Fault::LostContents => state.lose_contents()?,
            Fault::LostEntries => state.lose_entries()?,
            Fault::Killed | Fault::DiskFull => {}
        }
        Ok(())
    }
}

impl Storage for FaultyDisk {
    fn apply(&self, operation: Operation<'_>) -> io::Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let index = state.n_operations;
        state.n_operations += 1;
        if index < self.at {
            state.apply(operation)
        } else if self.fault == Fault::DiskFull {
            if index > self.at
                && !matches!(operation, Operation::CreateDir(_) | Operation::Write(..))
            {
                return state.apply(operation);
            }
            write_half(operation)?;
            Err(io::ErrorKind::StorageFull.into())
        } else {
            if index == self.at {
                self.crash(&state, operation)?;
            }
            Err(io::Error::other("the process was killed by a crash test"))
        }
    }
}

/// What a power failure needs to know.
#[derive(Debug, Default)]
struct State {
    n_operations: usize,
    changes: Vec<Change>,
}

#[derive(Debug)]
struct Change {
    kind: Kind,
    /// The path right after the change; later renames may have moved it.
    path: PathBuf,
    synced: bool,
}

#[derive(Debug, PartialEq)]
enum Kind {
    Created,
    Written,
    RenamedFrom(PathBuf),
}

impl State {
    /// Does the operation, except for real syncing, and remembers what a power failure would take.
    fn apply(&mut self, operation: Operation<'_>) -> io::Result<()> {
        let mut remember = |kind, path: &Path| {
            self.changes.push(Change {
                kind,
                path: path.to_path_buf(),
                synced: false,
            });
        };
        match operation {
            Operation::CreateDir(path) => {
                Disk.apply(operation)?;
                remember(Kind::Created, path);
            }
            Operation::Write(path, _) => {
                let created = !path.exists();
                Disk.apply(operation)?;
                if created {
                    remember(Kind::Created, path);
                }
                remember(Kind::Written, path);
            }
            Operation::Rename(from, to) => {
                Disk.apply(operation)?;
                remember(Kind::RenamedFrom(from.to_path_buf()), to);
            }
            Operation::SyncFile(file) => {
                self.sync(|kind, path| *kind == Kind::Written && path == file);
            }
            Operation::SyncDir(dir) => {
                self.sync(|kind, path| *kind != Kind::Written && path.parent() == Some(dir));
            }
            Operation::RemoveFile(path) | Operation::RemoveDir(path) => {
                Disk.apply(operation)?;
                let gone: Vec<bool> = (0..self.changes.len())
                    .map(|index| self.path_now(index, |_| true).starts_with(path))
                    .collect();
                let mut gone = gone.into_iter();
                self.changes
                    .retain(|_| !gone.next().expect("one for each change"));
            }
        }
        Ok(())
    }

    fn sync(&mut self, applies: impl Fn(&Kind, &Path) -> bool) {
        for index in 0..self.changes.len() {
            if applies(&self.changes[index].kind, &self.path_now(index, |_| true)) {
                self.changes[index].synced = true;
            }
        }
    }

    /// Where the subject of a change is after those of the later renames that are `in_effect`.
    fn path_now(&self, index: usize, in_effect: impl Fn(&Change) -> bool) -> PathBuf {
        let mut path = self.changes[index].path.clone();
        for later in self.changes[index + 1..]
            .iter()
            .filter(|later| in_effect(later))
        {
            if let Kind::RenamedFrom(from) = &later.kind
                && let Ok(rest) = path.strip_prefix(from)
            {
                // Joining an empty rest would append a separator.
                path = if rest.as_os_str().is_empty() {
                    later.path.clone()
                } else {
                    later.path.join(rest)
                };
            }
        }
        path
    }

    fn lose_contents(&self) -> io::Result<()> {
        for (index, change) in self.changes.iter().enumerate() {
            if change.kind == Kind::Written && !change.synced {
                let path = self.path_now(index, |_| true);
                let bytes = fs::read(&path)?;
                fs::write(&path, &bytes[..bytes.len() / 2])?;
            }
        }
        Ok(())
    }

    fn lose_entries(&self) -> io::Result<()> {
        for (index, change) in self
            .changes
            .iter()
            .enumerate()
            .rev()
            .filter(|(_, change)| !change.synced)
        {
            // The later renames that were not synced are undone already.
            let path = self.path_now(index, |later| later.synced);
            match &change.kind {
                Kind::Written => {}
                Kind::Created if path.is_dir() => fs::remove_dir_all(&path)?,
                Kind::Created => fs::remove_file(&path)?,
                Kind::RenamedFrom(from) => fs::rename(&path, from)?,
            }
        }
        Ok(())
    }
}

fn write_half(operation: Operation<'_>) -> io::Result<()> {
    match operation {
        Operation::Write(path, bytes) => fs::write(path, &bytes[..bytes.len() / 2]),
        _ => Ok(()),
    }
}
