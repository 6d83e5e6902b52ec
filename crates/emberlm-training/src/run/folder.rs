//! The folder of a run, which one process at a time may train in.

use std::{
    fs::{self, File, TryLockError},
    io,
    path::{Path, PathBuf},
};

use super::RunError;

/// A run's folder, locked for this process until it is dropped.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    // Holds the lock.
    _lock: File,
}

impl RunFolder {
    /// The name of the configuration in a run's folder.
    pub const CONFIG: &str = "config.json";
    /// The name of the folder of checkpoints.
    pub const CHECKPOINTS: &str = "checkpoints";
    /// The name of the weights of a run that ended or was stopped.
    pub const WEIGHTS: &str = "model.safetensors";
    const LOCK: &str = "lock";

    /// Makes the next free numbered folder under `parent`: `0001`, `0002`, and so on.
    ///
    /// # Errors
    ///
    /// If it cannot be made.
    pub fn create_numbered(parent: &Path) -> Result<Self, RunError> {
        fs::create_dir_all(parent).map_err(RunError::io(parent))?;
        let numbers = fs::read_dir(parent)
            .map_err(RunError::io(parent))?
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u64>().ok());
        let mut number = numbers.max().unwrap_or(0) + 1;
        loop {
            let path = parent.join(format!("{number:04}"));
            match fs::create_dir(&path) {
                Ok(()) => return Self::lock(path),
                // Another run took the number in between.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => number += 1,
                Err(error) => return Err(RunError::io(&path)(error)),
            }
        }
    }

    /// Makes the given folder, which may exist if it is empty (a lock that a killed run left does not count).
    ///
    /// # Errors
    ///
    /// [`RunError::NotEmpty`], [`RunError::NotAFolder`], or if it cannot be made.
    pub fn create(path: &Path) -> Result<Self, RunError> {
        Self::check_free(path)?;
        fs::create_dir_all(path).map_err(RunError::io(path))?;
        Self::lock(path.to_owned())
    }

    /// Checks whether [`create`](Self::create) would accept the folder, without making it.
    ///
    /// # Errors
    ///
    /// [`RunError::NotEmpty`] or [`RunError::NotAFolder`].
    pub fn check_free(path: &Path) -> Result<(), RunError> {
        match fs::read_dir(path) {
            // A run that was killed before it wrote anything leaves its lock.
            Ok(mut entries) => {
                match entries.all(|entry| entry.is_ok_and(|entry| entry.file_name() == Self::LOCK))
                {
                    true => Ok(()),
                    false => Err(RunError::NotEmpty {
                        path: path.to_owned(),
                    }),
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
                Err(RunError::NotAFolder {
                    path: path.to_owned(),
                })
            }
            Err(error) => Err(RunError::io(path)(error)),
        }
    }

    /// Opens the folder of an earlier run, to continue it.
    ///
    /// # Errors
    ///
    /// [`RunError::NotAFolder`], [`RunError::NoRun`], or [`RunError::Locked`] if another process trains in it.
    pub fn open(path: &Path) -> Result<Self, RunError> {
        if !path.is_dir() {
            return Err(RunError::NotAFolder {
                path: path.to_owned(),
            });
        }
        if !path.join(Self::CONFIG).is_file() {
            return Err(RunError::NoRun {
                path: path.to_owned(),
                missing: Self::CONFIG,
            });
        }
        Self::lock(path.to_owned())
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A file in the folder.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    fn lock(path: PathBuf) -> Result<Self, RunError> {
        let file = path.join(Self::LOCK);
        let lock = File::create(&file).map_err(RunError::io(&file))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { path, _lock: lock }),
            Err(TryLockError::WouldBlock) => Err(RunError::Locked { path }),
            Err(TryLockError::Error(error)) => Err(RunError::io(&file)(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_go_on_after_the_largest() {
        let parent = tempfile::tempdir().expect("a temporary folder");
        let name = |folder: &RunFolder| folder.path().file_name().map(|name| name.to_owned());
        let first = RunFolder::create_numbered(parent.path()).expect("free");
        assert_eq!(name(&first), Some("0001".into()));
        fs::create_dir(parent.path().join("0007")).expect("free");
        fs::create_dir(parent.path().join("notes")).expect("free");
        let next = RunFolder::create_numbered(parent.path()).expect("free");
        assert_eq!(name(&next), Some("0008".into()));
    }

    #[test]
    fn one_process_at_a_time() {
        let parent = tempfile::tempdir().expect("a temporary folder");
        let path = parent.path().join("run");
        let folder = RunFolder::create(&path).expect("free");
        fs::write(folder.file(RunFolder::CONFIG), "{}").expect("writable");
        assert!(matches!(
            RunFolder::open(&path),
            Err(RunError::Locked { .. })
        ));
        drop(folder);
        RunFolder::open(&path).expect("the lock is gone");
    }

    #[test]
    fn what_is_there_is_never_overwritten() {
        let parent = tempfile::tempdir().expect("a temporary folder");
        fs::write(parent.path().join("thesis.txt"), "years of work").expect("writable");
        assert!(matches!(
            RunFolder::create(parent.path()),
            Err(RunError::NotEmpty { .. })
        ));
        let file = parent.path().join("thesis.txt");
        assert!(matches!(
            RunFolder::create(&file),
            Err(RunError::NotAFolder { .. })
        ));
        assert!(matches!(
            RunFolder::open(&file),
            Err(RunError::NotAFolder { .. })
        ));
        assert!(matches!(
            RunFolder::open(parent.path()),
            Err(RunError::NoRun { .. })
        ));
    }
}
