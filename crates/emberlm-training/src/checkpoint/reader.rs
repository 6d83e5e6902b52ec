//! Reading checkpoints: the newest, the best or a given one, going around damaged ones.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::manifest::Manifest;
use super::{Checkpoint, CheckpointError, Damage, Damaged, Loaded};

/// Reads the checkpoints of a run. It changes nothing and needs no lock, so that a run can be sampled
/// or evaluated while it trains. What the training replaces in that moment may count as damaged.
///
/// ```
/// use emberlm_training::{CheckpointReader, CheckpointStore};
///
/// let run = tempfile::tempdir()?;
/// let mut store = CheckpointStore::open(run.path())?;
/// store.publish(100, &[("model", b"good")], Some(1.25))?;
/// store.publish(200, &[("model", b"overfit")], Some(1.75))?;
///
/// let reader = CheckpointReader::open(run.path())?;
/// assert_eq!(reader.load_newest()?.unwrap().checkpoint.step, 200);
/// assert_eq!(reader.load_best()?.unwrap().checkpoint.files["model"], b"good");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct CheckpointReader {
    dir: PathBuf,
}

impl CheckpointReader {
    /// Opens the folder that a [`CheckpointStore`](super::CheckpointStore) writes.
    ///
    /// # Errors
    /// [`NotAFolder`](CheckpointError::NotAFolder), or [`Io`](CheckpointError::Io) when it is missing.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        let metadata =
            fs::metadata(dir).map_err(|reason| CheckpointError::io("open", dir, reason))?;
        if !metadata.is_dir() {
            return Err(CheckpointError::NotAFolder {
                path: dir.to_path_buf(),
            });
        }
        Ok(Self {
            dir: dir.to_path_buf(),
        })
    }

    /// The folder that holds the checkpoints.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The steps that have a checkpoint, intact or not, in ascending order.
    ///
    /// # Errors
    /// [`Io`](CheckpointError::Io) when the folder cannot be listed.
    pub fn steps(&self) -> Result<Vec<u64>, CheckpointError> {
        self.numbered(STEP)
    }

    /// Loads the checkpoint of `step`.
    ///
    /// # Errors
    /// [`NoSuchStep`](CheckpointError::NoSuchStep) or [`Damaged`](CheckpointError::Damaged).
    pub fn load(&self, step: u64) -> Result<Checkpoint, CheckpointError> {
        let path = self.folder(STEP, step);
        let checkpoint = Manifest::read(&path, step).and_then(|manifest| manifest.load(&path));
        checkpoint.map_err(|reason| {
            // Asked afterwards, because the training may prune it while it is read.
            if exists(&path) {
                CheckpointError::Damaged(Damaged { path, reason })
            } else {
                CheckpointError::NoSuchStep {
                    dir: self.dir.clone(),
                    step,
                }
            }
        })
    }

    /// Loads the newest intact checkpoint, naming the damaged newer ones; `None` when there are none
    /// at all.
    ///
    /// # Errors
    /// [`NoneIntact`](CheckpointError::NoneIntact) when each one is damaged, and
    /// [`Damaged`](CheckpointError::Damaged) on one of another [format](Damage::Format): going around
    /// a good one would lose its steps.
    pub fn load_newest(&self) -> Result<Option<Loaded>, CheckpointError> {
        self.first_intact(|| Ok((self.steps()?.into_iter().rev().collect(), Vec::new())))
    }

    /// Loads the intact checkpoint with the lowest score, of equal ones the newest; `None` when none
    /// has a score. Named are the damaged ones that have a lower score or whose score is unknown.
    ///
    /// # Errors
    /// As [`load_newest`](Self::load_newest).
    pub fn load_best(&self) -> Result<Option<Loaded>, CheckpointError> {
        self.first_intact(|| {
            let mut scored = Vec::new();
            let mut damaged = Vec::new();
            for (step, state) in self.survey()? {
                match state {
                    Ok(score) => scored.extend(score.map(|score| (step, score))),
                    Err(reason) => {
                        let path = self.folder(STEP, step);
                        damaged.push(passed_over(Damaged { path, reason })?);
                    }
                }
            }
            damaged.reverse();
            scored.reverse();
            // A stable sort: of equal scores the newest stays first.
            scored.sort_by(|(_, score), (_, other)| score.total_cmp(other));
            Ok((scored.into_iter().map(|(step, _)| step).collect(), damaged))
        })
    }

    /// Each step, ascending, with its score, or what is wrong with it as far as manifest and file
    /// lengths tell: cheap enough to do after each checkpoint.
    pub(super) fn survey(&self) -> Result<Survey, CheckpointError> {
        let state = |step| {
            let folder = self.folder(STEP, step);
            let manifest = Manifest::read(&folder, step)?;
            manifest.check_lengths(&folder)?;
            Ok(manifest.score)
        };
        loop {
            let survey: Survey = self
                .steps()?
                .into_iter()
                .map(|step| (step, state(step)))
                .collect();
            // Else the training pruned one since it was listed, so that there is a newer one.
            let is_there = |step| exists(&self.folder(STEP, step));
            if survey
                .iter()
                .all(|(step, state)| state.is_ok() || is_there(*step))
            {
                return Ok(survey);
            }
        }
    }

    /// The folder of `step` among those that begin with `prefix`.
    pub(super) fn folder(&self, prefix: &str, step: u64) -> PathBuf {
        self.dir.join(format!("{prefix}{step:08}"))
    }

    /// The steps, ascending, of the folders that begin with `prefix`. What a user put there is left out.
    pub(super) fn numbered(&self, prefix: &str) -> Result<Vec<u64>, CheckpointError> {
        let list = || -> io::Result<Vec<u64>> {
            let mut steps = Vec::new();
            for entry in fs::read_dir(&self.dir)? {
                let name = entry?.file_name();
                let digits = name.to_str().and_then(|name| name.strip_prefix(prefix));
                let step = digits.and_then(|digits| digits.parse().ok());
                steps.extend(
                    step.filter(|step: &u64| Some(format!("{step:08}").as_str()) == digits),
                );
            }
            steps.sort_unstable();
            Ok(steps)
        };
        list().map_err(|reason| CheckpointError::io("list", &self.dir, reason))
    }

    /// Loads the first intact checkpoint of those that `list` gives, adding the ones before it to the
    /// damaged ones that it gives too.
    fn first_intact(
        &self,
        list: impl Fn() -> Result<(Vec<u64>, Vec<Damaged>), CheckpointError>,
    ) -> Result<Option<Loaded>, CheckpointError> {
        'list: loop {
            let (steps, mut damaged) = list()?;
            for step in steps {
                match self.load(step) {
                    Ok(checkpoint) => {
                        return Ok(Some(Loaded {
                            checkpoint,
                            damaged,
                        }));
                    }
                    Err(CheckpointError::Damaged(found)) => damaged.push(passed_over(found)?),
                    // The training pruned it since, so that there are newer ones.
                    Err(CheckpointError::NoSuchStep { .. }) => continue 'list,
                    Err(error) => return Err(error),
                }
            }
            return match damaged.into_iter().next() {
                Some(Damaged { reason, .. }) => Err(CheckpointError::NoneIntact {
                    dir: self.dir.clone(),
                    newest: reason,
                }),
                None => Ok(None),
            };
        }
    }
}

/// Steps with their score or damage.
type Survey = Vec<(u64, Result<Option<f64>, Damage>)>;

/// Begins the name of a checkpoint's folder.
pub(super) const STEP: &str = "step-";

/// Whether anything is at `path`, a dangling link included.
pub(super) fn exists(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

/// The checkpoint to go around, unless it must not be gone around.
fn passed_over(damaged: Damaged) -> Result<Damaged, CheckpointError> {
    match damaged.reason {
        Damage::Format { .. } => Err(CheckpointError::Damaged(damaged)),
        _ => Ok(damaged),
    }
}
