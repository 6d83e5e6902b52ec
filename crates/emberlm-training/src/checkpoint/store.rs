//! Writing checkpoints so that a crash at any moment leaves the previous or the new one, complete.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::Path;
use std::sync::Arc;

use super::faults::{Disk, Operation, Storage};
use super::manifest::{MANIFEST, Manifest};
use super::reader::{STEP, exists};
use super::{CheckpointError, CheckpointReader, Damage};

/// Being written; worthless until it is renamed.
const STAGING: &str = ".staging-";
/// Replaced by a new checkpoint of the same step; the only one of that step until the new one is there.
const OLD: &str = ".old-";
/// Being deleted; never to be seen again.
const PRUNED: &str = ".pruned-";

/// Writes the checkpoints of one run, keeping the newest three and the best.
///
/// ```
/// use emberlm_training::CheckpointStore;
///
/// let run = tempfile::tempdir()?;
/// let mut store = CheckpointStore::open(&run.path().join("checkpoints"))?;
/// store.publish(100, &[("model", b"weights"), ("data", b"position")], Some(3.25))?;
///
/// let newest = store.reader().load_newest()?.expect("one was published");
/// assert!(newest.damaged.is_empty());
/// assert_eq!(newest.checkpoint.step, 100);
/// assert_eq!(newest.checkpoint.files["model"], b"weights");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct CheckpointStore {
    reader: CheckpointReader,
    storage: Arc<dyn Storage>,
    keep_last: usize,
    /// Held, not used: the system lets go of it even when the process is killed. `None` on a file
    /// system without locks.
    _lock: Option<File>,
}

impl CheckpointStore {
    /// Opens `dir`, creating it when it is missing, and clears away what a killed process left there.
    /// Until the store is dropped no other one can be opened on `dir`, as far as the file system
    /// knows locks; readers can.
    ///
    /// # Errors
    /// [`NotAFolder`](CheckpointError::NotAFolder), [`InUse`](CheckpointError::InUse),
    /// [`DiskFull`](CheckpointError::DiskFull) or [`Io`](CheckpointError::Io).
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        Self::open_on(dir, Arc::new(Disk))
    }

    /// As [`open`](Self::open), with every change going to `storage`: for crash tests.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_on(dir: &Path, storage: Arc<dyn Storage>) -> Result<Self, CheckpointError> {
        create_dir(storage.as_ref(), dir)?;
        let reader = CheckpointReader::open(dir)?;
        let lock = lock(dir)?;
        let store = Self {
            reader,
            storage,
            keep_last: 3,
            _lock: lock,
        };
        store.restore_old()?;
        store.clean_up()?;
        Ok(store)
    }

    /// How many of the newest checkpoints are kept, besides the best one: 3 unless told otherwise.
    ///
    /// # Panics
    /// On 0.
    pub fn with_keep_last(mut self, keep_last: usize) -> Self {
        assert!(keep_last > 0, "at least one checkpoint must be kept");
        self.keep_last = keep_last;
        self
    }

    /// Reads what is in the store.
    pub fn reader(&self) -> &CheckpointReader {
        &self.reader
    }

    /// Writes a checkpoint, replacing one of the same step, and deletes those that need not be kept.
    /// `score` is the validation loss at this very step, lower is better; one that is not finite
    /// counts as none. When it returns, the checkpoint is on the disk for good.
    ///
    /// Only older checkpoints are deleted, damaged ones among them; newer ones, which a resume went
    /// around, stay until the training reaches their step. One that the system does not let be read,
    /// or of another format, is left alone. Since deleting comes last, the disk needs space for one
    /// checkpoint more than is kept.
    ///
    /// # Errors
    /// After [`Cleanup`](CheckpointError::Cleanup) the new checkpoint is there. After
    /// [`DiskFull`](CheckpointError::DiskFull) or [`Io`](CheckpointError::Io) the previous ones are,
    /// and the space that was used is freed if the system lets it be.
    ///
    /// # Panics
    /// On a file name that is empty, used twice, `manifest.json`, begins with a dot or has
    /// characters other than ASCII letters, digits, `.`, `_` and `-`.
    pub fn publish(
        &mut self,
        step: u64,
        files: &[(&str, &[u8])],
        score: Option<f64>,
    ) -> Result<(), CheckpointError> {
        let manifest = Manifest::new(step, files, score);
        if let Err(error) = self
            .stage(&manifest, step, files)
            .and_then(|()| self.swap_in(step))
        {
            // The error that matters is the first one; the next publish or open tries again.
            let _ = self.remove(&self.reader.folder(STAGING, step));
            return Err(error);
        }
        self.prune(step).map_err(|reason| CheckpointError::Cleanup {
            step,
            reason: Box::new(reason),
        })
    }

    /// Writes everything to the staging folder and waits until it is on the disk.
    fn stage(
        &self,
        manifest: &Manifest,
        step: u64,
        files: &[(&str, &[u8])],
    ) -> Result<(), CheckpointError> {
        let staging = self.reader.folder(STAGING, step);
        self.remove(&staging)?;
        self.apply(Operation::CreateDir(&staging))?;
        let manifest = manifest.encode();
        for (name, bytes) in files
            .iter()
            .copied()
            .chain([(MANIFEST, manifest.as_bytes())])
        {
            let path = staging.join(name);
            self.apply(Operation::Write(&path, bytes))?;
            self.apply(Operation::SyncFile(&path))?;
        }
        self.apply(Operation::SyncDir(&staging))
    }

    /// Gives the staged checkpoint its name.
    fn swap_in(&self, step: u64) -> Result<(), CheckpointError> {
        let [staging, target, old] =
            [STAGING, STEP, OLD].map(|prefix| self.reader.folder(prefix, step));
        self.restore_old()?;
        if exists(&old) {
            self.discard(OLD, step)?;
        }
        let replaces = exists(&target);
        if replaces {
            self.apply(Operation::Rename(&target, &old))?;
        }
        if let Err(error) = self.apply(Operation::Rename(&staging, &target)) {
            if replaces {
                // If this fails too, the next publish or open puts it back.
                let _ = self.apply(Operation::Rename(&old, &target));
            }
            return Err(error);
        }
        self.apply(Operation::SyncDir(self.reader.dir()))
    }

    /// Deletes what need not be kept now that `newest` is there.
    fn prune(&self, newest: u64) -> Result<(), CheckpointError> {
        let survey = self.reader.survey()?;
        let intact = || {
            survey
                .iter()
                .rev()
                .filter_map(|(step, state)| Some((*step, *state.as_ref().ok()?)))
        };
        let mut kept: Vec<u64> = intact()
            .map(|(step, _)| step)
            .filter(|step| *step <= newest)
            .take(self.keep_last)
            .collect();
        let scored = intact().filter_map(|(step, score)| Some((step, score?)));
        kept.extend(
            scored
                .min_by(|(_, score), (_, other)| score.total_cmp(other))
                .map(|(step, _)| step),
        );
        for (step, state) in &survey {
            let unknown = matches!(
                state,
                Err(Damage::Unreadable { .. } | Damage::Format { .. })
            );
            if *step < newest && !unknown && !kept.contains(step) {
                self.discard(STEP, *step)?;
            }
        }
        self.clean_up()
    }

    /// Puts back what was moved aside for a checkpoint that then did not come.
    fn restore_old(&self) -> Result<(), CheckpointError> {
        for step in self.reader.numbered(OLD)? {
            let target = self.reader.folder(STEP, step);
            if !exists(&target) {
                self.apply(Operation::Rename(&self.reader.folder(OLD, step), &target))?;
            }
        }
        Ok(())
    }

    /// Removes every hidden folder. Those moved aside must have been restored where they are needed.
    fn clean_up(&self) -> Result<(), CheckpointError> {
        // Half removed, one must not be taken for one to restore.
        for step in self.reader.numbered(OLD)? {
            self.discard(OLD, step)?;
        }
        let pruned = self.reader.numbered(PRUNED)?;
        if !pruned.is_empty() {
            // Else a power failure could undo the rename, but not what is removed inside.
            self.apply(Operation::SyncDir(self.reader.dir()))?;
        }
        for step in pruned {
            self.remove(&self.reader.folder(PRUNED, step))?;
        }
        for step in self.reader.numbered(STAGING)? {
            self.remove(&self.reader.folder(STAGING, step))?;
        }
        Ok(())
    }

    /// Takes a folder's name, so that `clean_up` can remove it and no one takes it for whole meanwhile.
    fn discard(&self, prefix: &str, step: u64) -> Result<(), CheckpointError> {
        let pruned = self.reader.folder(PRUNED, step);
        if exists(&pruned) {
            self.apply(Operation::SyncDir(self.reader.dir()))?;
            self.remove(&pruned)?;
        }
        self.apply(Operation::Rename(
            &self.reader.folder(prefix, step),
            &pruned,
        ))
    }

    /// Removes a file, or a folder with all that is in it; nothing there is fine.
    fn remove(&self, path: &Path) -> Result<(), CheckpointError> {
        let failed = |reason| CheckpointError::io("remove", path, reason);
        let metadata = match fs::symlink_metadata(path) {
            Err(reason) if reason.kind() == io::ErrorKind::NotFound => return Ok(()),
            metadata => metadata.map_err(failed)?,
        };
        if !metadata.is_dir() {
            return self.apply(Operation::RemoveFile(path));
        }
        for entry in fs::read_dir(path).map_err(failed)? {
            self.remove(&entry.map_err(failed)?.path())?;
        }
        self.apply(Operation::RemoveDir(path))
    }

    fn apply(&self, operation: Operation<'_>) -> Result<(), CheckpointError> {
        apply(self.storage.as_ref(), operation)
    }
}

/// Performs an operation, naming it in the error.
fn apply(storage: &dyn Storage, operation: Operation<'_>) -> Result<(), CheckpointError> {
    let (action, path) = match operation {
        Operation::CreateDir(path) => ("create", path),
        Operation::Write(path, _) => ("write", path),
        Operation::SyncFile(path) | Operation::SyncDir(path) => ("sync", path),
        Operation::Rename(path, _) => ("rename", path),
        Operation::RemoveFile(path) | Operation::RemoveDir(path) => ("remove", path),
    };
    storage
        .apply(operation)
        .map_err(|reason| CheckpointError::io(action, path, reason))
}

/// Creates a folder with those above it.
fn create_dir(storage: &dyn Storage, dir: &Path) -> Result<(), CheckpointError> {
    match fs::metadata(dir) {
        Ok(metadata) if metadata.is_dir() => Ok(()),
        Ok(_) => Err(CheckpointError::NotAFolder {
            path: dir.to_path_buf(),
        }),
        Err(_) => {
            let parent = match dir.parent() {
                Some(parent) if parent != Path::new("") => {
                    create_dir(storage, parent)?;
                    parent
                }
                _ => Path::new("."),
            };
            apply(storage, Operation::CreateDir(dir))?;
            apply(storage, Operation::SyncDir(parent))
        }
    }
}

/// Locks the folder for the one process that writes.
fn lock(dir: &Path) -> Result<Option<File>, CheckpointError> {
    let path = dir.join(".lock");
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path);
    let file = file.map_err(|reason| CheckpointError::io("open", &path, reason))?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Err(CheckpointError::InUse {
            dir: dir.to_path_buf(),
        }),
        // Some network file systems know no locks; that is no reason not to train there.
        Err(TryLockError::Error(_)) => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::ops::Range;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    use tempfile::TempDir;

    use super::super::{Checkpoint, Damaged, Fault, FaultyDisk, Loaded};
    use super::*;

    /// The files of a step; `take` tells apart two checkpoints of the same step.
    fn files(step: u64, take: u8) -> BTreeMap<String, Vec<u8>> {
        let fill = |length: u64| vec![step as u8 ^ (take << 7); length as usize];
        BTreeMap::from([
            ("model".into(), fill(100 + step)),
            ("rng.bin".into(), fill(11 + step)),
        ])
    }

    fn publish(
        store: &mut CheckpointStore,
        step: u64,
        take: u8,
        score: Option<f64>,
    ) -> Result<(), CheckpointError> {
        let files = files(step, take);
        let files: Vec<_> = files
            .iter()
            .map(|(name, bytes)| (name.as_str(), bytes.as_slice()))
            .collect();
        store.publish(step, &files, score)
    }

    /// A disk that never fails and never syncs, so that hundreds of crashes take seconds.
    fn unsynced() -> Arc<dyn Storage> {
        Arc::new(FaultyDisk::new(Fault::Killed, usize::MAX))
    }

    /// A store with a checkpoint for each step and score.
    fn store_of(checkpoints: &[(u64, Option<f64>)]) -> (TempDir, CheckpointStore) {
        let run = tempfile::tempdir().unwrap();
        let mut store = CheckpointStore::open_on(run.path(), unsynced()).unwrap();
        for &(step, score) in checkpoints {
            publish(&mut store, step, 0, score).unwrap();
        }
        (run, store)
    }

    fn hidden(dir: &Path) -> Vec<String> {
        let names = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names
            .filter(|name| name.starts_with('.') && name != ".lock")
            .collect()
    }

    fn steps(store: &CheckpointStore) -> Vec<u64> {
        store.reader().steps().unwrap()
    }

    fn newest(store: &CheckpointStore) -> (u64, Vec<Damaged>) {
        let loaded = store.reader().load_newest().unwrap().unwrap();
        assert_eq!(loaded.checkpoint.files, files(loaded.checkpoint.step, 0));
        (loaded.checkpoint.step, loaded.damaged)
    }

    fn best(store: &CheckpointStore) -> Option<u64> {
        store
            .reader()
            .load_best()
            .unwrap()
            .map(|loaded| loaded.checkpoint.step)
    }

    // --- disks ---

    /// Forgets some kinds of operation.
    #[derive(Debug)]
    struct Forgetful(Arc<FaultyDisk>, fn(Operation<'_>) -> bool);

    impl Storage for Forgetful {
        fn apply(&self, operation: Operation<'_>) -> io::Result<()> {
            if self.1(operation) {
                Ok(())
            } else {
                self.0.apply(operation)
            }
        }
    }

    /// Fails in a range of operations and then works again.
    #[derive(Debug)]
    struct Flaky {
        fails: Range<usize>,
        n_operations: AtomicUsize,
        disk: Arc<dyn Storage>,
    }

    impl Flaky {
        fn new(fails: Range<usize>, disk: Arc<dyn Storage>) -> Arc<Self> {
            Arc::new(Self {
                fails,
                n_operations: AtomicUsize::new(0),
                disk,
            })
        }
    }

    impl Storage for Flaky {
        fn apply(&self, operation: Operation<'_>) -> io::Result<()> {
            let index = self.n_operations.fetch_add(1, Ordering::Relaxed);
            if self.fails.contains(&index) {
                return Err(io::Error::other("a passing error"));
            }
            self.disk.apply(operation)
        }
    }

    // --- crashes ---

    /// What runs on the faulty disk, after checkpoints of steps 1 and 2 (takes 0, the first the best).
    struct Scenario {
        keep_last: usize,
        /// Steps and takes published.
        published: &'static [(u64, u8)],
        /// The checkpoints, step and take, that may be the newest after a crash.
        allowed: &'static [(u64, u8)],
    }

    const NEXT_STEPS: Scenario = Scenario {
        keep_last: 3,
        published: &[(3, 0), (4, 0)],
        allowed: &[(2, 0), (3, 0), (4, 0)],
    };
    const SAME_STEP: Scenario = Scenario {
        keep_last: 3,
        published: &[(2, 1)],
        allowed: &[(2, 0), (2, 1)],
    };
    const PRUNING: Scenario = Scenario {
        keep_last: 1,
        published: &[(3, 0), (4, 0), (4, 1)],
        allowed: &[(2, 0), (3, 0), (4, 0), (4, 1)],
    };
    const FAULTS: [Fault; 5] = [
        Fault::Killed,
        Fault::TornWrite,
        Fault::LostContents,
        Fault::LostEntries,
        Fault::DiskFull,
    ];

    /// Runs the scenario with the fault at each operation, from opening the store on; returns how many
    /// operations there are. Those that the store `forgets` do not reach the disk.
    fn crash_everywhere(
        scenario: &Scenario,
        fault: Fault,
        forgets: fn(Operation<'_>) -> bool,
    ) -> usize {
        for at in 0.. {
            let case = format!("{fault:?} at {at}");
            let (run, store) = store_of(&[(1, Some(0.5)), (2, Some(0.75))]);
            for prefix in [STAGING, PRUNED] {
                // Left by an earlier kill, so that clearing it away is interrupted as well.
                let left = store.reader().folder(prefix, 9);
                fs::create_dir(&left).unwrap();
                fs::write(left.join("model"), b"left").unwrap();
            }
            drop(store);

            let disk = Arc::new(FaultyDisk::new(fault, at));
            let storage = Arc::new(Forgetful(disk.clone(), forgets));
            let mut published = (2, 0);
            let outcome = CheckpointStore::open_on(run.path(), storage).and_then(|store| {
                let mut store = store.with_keep_last(scenario.keep_last);
                let outcome = scenario.published.iter().try_for_each(|&(step, take)| {
                    let outcome = publish(&mut store, step, take, Some(1.0));
                    if let Ok(()) | Err(CheckpointError::Cleanup { .. }) = outcome {
                        published = (step, take);
                    }
                    outcome
                });
                if fault == Fault::DiskFull {
                    // The process lives: all must be well without a new start.
                    check_newest(scenario, store.reader(), published, &case);
                    assert_eq!(store.reader().numbered(STAGING).unwrap().len(), 0, "{case}");
                }
                outcome
            });
            if !disk.struck() {
                outcome.unwrap();
                return at;
            }
            assert!(outcome.is_err(), "{case}: goes unnoticed");

            let store = CheckpointStore::open(run.path()).unwrap();
            assert_eq!(hidden(run.path()), [""; 0], "{case}");
            check_newest(scenario, store.reader(), published, &case);
            assert_eq!(best(&store), Some(1), "{case}: the best is lost");
            drop(store);
            let mut store = CheckpointStore::open_on(run.path(), unsynced()).unwrap();
            publish(&mut store, 5, 0, None).unwrap();
            assert_eq!(newest(&store).0, 5, "{case}");
        }
        unreachable!("some fault lies behind the last operation")
    }

    /// Checks that the newest checkpoint is an allowed one, not older than `published`, and that all
    /// are complete.
    fn check_newest(
        scenario: &Scenario,
        reader: &CheckpointReader,
        published: (u64, u8),
        case: &str,
    ) {
        let whole = |step| {
            let Checkpoint { files: found, .. } = reader
                .load(step)
                .unwrap_or_else(|error| panic!("{case}: {error}"));
            let take = (0..2).find(|&take| found == files(step, take));
            (
                step,
                take.unwrap_or_else(|| panic!("{case}: step {step} is mixed")),
            )
        };
        let all: Vec<_> = reader.steps().unwrap().into_iter().map(whole).collect();
        let newest = *all.last().expect("some checkpoint is left");
        let loaded = reader.load_newest().unwrap().unwrap().checkpoint.step;
        assert_eq!(newest.0, loaded, "{case}");
        let order = |checkpoint| {
            let position = scenario
                .allowed
                .iter()
                .position(|allowed| *allowed == checkpoint);
            position.unwrap_or_else(|| panic!("{case}: {checkpoint:?} is not to be there"))
        };
        let is_newer = order(newest) >= order(published);
        assert!(is_newer, "{case}: {published:?} was published and is lost");
    }

    #[test]
    fn a_crash_while_publishing_leaves_the_old_or_the_new_checkpoint() {
        for fault in FAULTS {
            // 5 to clear the leftovers; then twice 8 to write 3 files, 2 to rename the folder.
            assert_eq!(crash_everywhere(&NEXT_STEPS, fault, |_| false), 5 + 2 * 10);
        }
    }

    #[test]
    fn a_crash_while_replacing_a_checkpoint_leaves_the_old_or_the_new_one() {
        for fault in FAULTS {
            // More: 1 to move the old one aside, 2 to discard it, 4 to remove it.
            assert_eq!(crash_everywhere(&SAME_STEP, fault, |_| false), 5 + 10 + 7);
        }
    }

    #[test]
    fn a_crash_while_pruning_leaves_no_checkpoint_in_part() {
        for fault in FAULTS {
            // Steps 2 and 3 are pruned, then step 4 is replaced: 6, 6 and 7 more.
            assert_eq!(
                crash_everywhere(&PRUNING, fault, |_| false),
                5 + 3 * 10 + 6 + 6 + 7
            );
        }
    }

    #[test]
    fn a_crash_in_a_new_run_loses_nothing_that_was_published() {
        for fault in FAULTS {
            for at in 0.. {
                let run = tempfile::tempdir().unwrap();
                let dir = run.path().join("run/checkpoints");
                let disk = Arc::new(FaultyDisk::new(fault, at));
                let published =
                    CheckpointStore::open_on(&dir, disk.clone()).is_ok_and(|mut store| {
                        let published = publish(&mut store, 1, 0, None).is_ok();
                        let _ = publish(&mut store, 2, 0, None); // the crash may come here
                        published
                    });
                let store = CheckpointStore::open(&dir).unwrap();
                assert!(!published || newest(&store).0 >= 1, "{fault:?} at {at}");
                if !disk.struck() {
                    break;
                }
            }
        }
    }

    #[test]
    fn a_process_that_lives_through_errors_publishes_again() {
        for length in [1, 3] {
            for start in 0.. {
                let case = format!("{start}, {length}");
                let (run, store) = store_of(&[(1, Some(0.5)), (2, Some(0.75))]);
                drop(store);
                let disk = Flaky::new(start..start + length, unsynced());
                let store = CheckpointStore::open_on(run.path(), disk).unwrap();
                let mut store = store.with_keep_last(1);
                let mut n_failed = 0;
                for (step, take) in [(2, 1), (2, 0), (3, 0), (3, 1), (3, 0)] {
                    while let Err(error) = publish(&mut store, step, take, Some(1.0)) {
                        n_failed += 1;
                        assert!(n_failed <= length, "{case}: {error}");
                        assert!(
                            error.to_string().ends_with(": a passing error"),
                            "{case}: {error}"
                        );
                        let newest = store.reader().load_newest().unwrap().unwrap();
                        assert!(newest.damaged.is_empty(), "{case}: {:?}", newest.damaged);
                    }
                    let checkpoint = store.reader().load(step).unwrap();
                    assert_eq!(checkpoint.files, files(step, take), "{case}");
                }
                assert_eq!(steps(&store), [1, 3], "{case}");
                assert_eq!(hidden(run.path()), [""; 0], "{case}");
                if n_failed == 0 {
                    break;
                }
            }
        }
    }

    // The operations of a publish that replaces: 0 to 7 stage, 8 moves the old one aside, 9 renames
    // the new one, 10 syncs.

    #[test]
    fn what_could_not_be_put_back_at_once_is_put_back_by_the_next_publish() {
        let (run, store) = store_of(&[(1, None), (2, None)]);
        drop(store);
        let mut store =
            CheckpointStore::open_on(run.path(), Flaky::new(9..11, unsynced())).unwrap();
        publish(&mut store, 2, 1, None).unwrap_err();
        assert_eq!(steps(&store), [1]);
        publish(&mut store, 3, 0, None).unwrap();
        assert_eq!(steps(&store), [1, 2, 3]);
        assert_eq!(store.reader().load(2).unwrap().files, files(2, 0));
    }

    #[test]
    fn a_missing_sync_is_made_up_for_before_the_old_checkpoint_is_removed() {
        for at in 0.. {
            let (run, store) = store_of(&[(1, None), (2, None)]);
            drop(store);
            let disk = Arc::new(FaultyDisk::new(Fault::LostEntries, at));
            let storage = Flaky::new(10..11, disk.clone());
            let mut store = CheckpointStore::open_on(run.path(), storage).unwrap();
            publish(&mut store, 2, 1, None).unwrap_err();
            drop(store);
            // The power fails while the next process clears away the old checkpoint.
            let _ = CheckpointStore::open_on(run.path(), disk.clone());
            let store = CheckpointStore::open(run.path()).unwrap();
            let checkpoint = store
                .reader()
                .load(2)
                .unwrap_or_else(|error| panic!("{at}: {error}"));
            assert!(
                (0..2).any(|take| checkpoint.files == files(2, take)),
                "{at}"
            );
            if !disk.struck() {
                break;
            }
        }
    }

    #[test]
    #[should_panic(expected = "is damaged: ")]
    fn the_crash_tests_notice_files_that_are_not_synced() {
        let forgets: fn(Operation<'_>) -> bool =
            |operation| matches!(operation, Operation::SyncFile(_));
        crash_everywhere(&NEXT_STEPS, Fault::LostContents, forgets);
    }

    #[test]
    #[should_panic(expected = "was published and is lost")]
    fn the_crash_tests_notice_folders_that_are_not_synced() {
        let forgets: fn(Operation<'_>) -> bool =
            |operation| matches!(operation, Operation::SyncDir(_));
        crash_everywhere(&NEXT_STEPS, Fault::LostEntries, forgets);
    }

    #[test]
    fn a_full_disk_has_its_own_error_and_gets_its_space_back() {
        let (run, store) = store_of(&[(1, None)]);
        drop(store);
        // 0 creates the folder, 1 writes the first file.
        let disk = Arc::new(FaultyDisk::new(Fault::DiskFull, 1));
        let mut store = CheckpointStore::open_on(run.path(), disk).unwrap();
        let error = publish(&mut store, 2, 0, None).unwrap_err();
        let CheckpointError::DiskFull { path } = &error else {
            panic!("{error}")
        };
        assert_eq!(*path, run.path().join(".staging-00000002/model"));
        assert!(
            error
                .to_string()
                .contains("the previous checkpoint is intact"),
            "{error}"
        );
        assert_eq!(hidden(run.path()), [""; 0]);
        assert_eq!(newest(&store).0, 1);
    }

    #[test]
    fn an_error_names_the_path_and_the_cause() {
        let run = tempfile::tempdir().unwrap();
        let disk = Arc::new(FaultyDisk::new(Fault::Killed, 0));
        let mut store = CheckpointStore::open_on(run.path(), disk).unwrap();
        let message = publish(&mut store, 2, 0, None).unwrap_err().to_string();
        let path = run.path().join(".staging-00000002").display().to_string();
        assert_eq!(
            message,
            format!("cannot create {path}: the process was killed by a crash test")
        );
    }

    #[test]
    fn what_was_moved_aside_comes_back_unless_it_was_replaced() {
        let (run, store) = store_of(&[(1, None), (2, None)]);
        drop(store);
        fs::rename(
            run.path().join("step-00000002"),
            run.path().join(".old-00000002"),
        )
        .unwrap();
        fs::create_dir(run.path().join(".old-00000001")).unwrap();
        let store = CheckpointStore::open(run.path()).unwrap();
        assert_eq!(steps(&store), [1, 2]);
        assert_eq!(newest(&store).0, 2);
        assert_eq!(hidden(run.path()), [""; 0]);
    }

    // --- damage ---

    #[test]
    fn a_damaged_checkpoint_is_named_and_the_one_before_is_loaded() {
        type Spoil = fn(&Path);
        let spoils: [(Spoil, &str); 9] = [
            (
                |step| flip(&step.join("model"), 50),
                "model does not match its checksum",
            ),
            (
                |step| shorten(&step.join("model")),
                "model has 101 bytes instead of 102",
            ),
            (
                |step| fs::remove_file(step.join("rng.bin")).unwrap(),
                "rng.bin is missing",
            ),
            (
                |step| fs::remove_file(step.join(MANIFEST)).unwrap(),
                "manifest.json is missing",
            ),
            (
                |step| flip(&step.join(MANIFEST), 20),
                "manifest.json does not match its checksum",
            ),
            (
                |step| shorten(&step.join(MANIFEST)),
                "manifest.json does not match its checksum",
            ),
            (
                |step| fs::write(step.join(MANIFEST), b"\xff garbage").unwrap(),
                "manifest.json does not match",
            ),
            (
                |step| copy_manifest_of_step_1(step),
                "the folder is of step 2, its manifest of step 1",
            ),
            (
                |step| {
                    fs::remove_dir_all(step).unwrap();
                    fs::write(step, b"").unwrap();
                },
                "manifest.json cannot be read: ",
            ),
        ];
        for (spoil, expected) in spoils {
            let (run, mut store) = store_of(&[(1, Some(2.0)), (2, Some(1.0))]);
            let path = run.path().join("step-00000002");
            spoil(&path);
            let (step, damaged) = newest(&store);
            let [found] = &damaged[..] else {
                panic!("{expected}: {damaged:?}")
            };
            assert_eq!((step, &found.path), (1, &path), "{expected}");
            assert!(
                found.to_string().contains(expected),
                "{found} instead of {expected}"
            );
            assert_eq!(best(&store), Some(1), "{expected}");
            let error = store.reader().load(2).unwrap_err();
            assert!(
                matches!(&error, CheckpointError::Damaged(damaged) if damaged.path == path),
                "{error}"
            );

            publish(&mut store, 2, 0, None).unwrap(); // the resumed training gets there again
            let (step, damaged) = newest(&store);
            assert!(step == 2 && damaged.is_empty(), "{expected}: {damaged:?}");
        }
    }

    fn flip(path: &Path, index: usize) {
        let mut bytes = fs::read(path).unwrap();
        bytes[index] ^= 1;
        fs::write(path, bytes).unwrap();
    }

    fn shorten(path: &Path) {
        let bytes = fs::read(path).unwrap();
        fs::write(path, &bytes[..bytes.len() - 1]).unwrap();
    }

    fn copy_manifest_of_step_1(step: &Path) {
        fs::copy(
            step.with_file_name("step-00000001").join(MANIFEST),
            step.join(MANIFEST),
        )
        .unwrap();
    }

    #[test]
    fn when_all_are_damaged_it_is_an_error() {
        let (run, store) = store_of(&[(1, Some(0.5)), (2, None)]);
        flip(&run.path().join("step-00000001/model"), 0);
        fs::remove_file(run.path().join("step-00000002/model")).unwrap();
        let error = store.reader().load_newest().unwrap_err();
        let CheckpointError::NoneIntact { dir, newest } = &error else {
            panic!("{error}")
        };
        assert_eq!(dir, run.path());
        assert!(
            matches!(newest, Damage::Missing { file } if file == "model"),
            "{newest}"
        );
        assert!(
            error.to_string().contains("(the newest: model is missing)"),
            "{error}"
        );
        let error = store.reader().load_best().unwrap_err();
        assert!(
            matches!(error, CheckpointError::NoneIntact { .. }),
            "{error}"
        );
    }

    #[test]
    fn a_checkpoint_of_another_format_is_not_gone_around() {
        let (run, store) = store_of(&[(1, Some(1.0)), (2, Some(2.0))]);
        let manifest = run.path().join("step-00000002").join(MANIFEST);
        fs::write(
            &manifest,
            Manifest::new(2, &[], None).of_another_format().encode(),
        )
        .unwrap();
        for loaded in [store.reader().load_newest(), store.reader().load_best()] {
            let error = loaded.unwrap_err();
            assert!(
                matches!(
                    &error,
                    CheckpointError::Damaged(Damaged {
                        reason: Damage::Format { .. },
                        ..
                    })
                ),
                "{error}"
            );
        }
    }

    // --- what is kept ---

    #[test]
    fn a_checkpoint_of_another_format_is_not_pruned() {
        let (run, store) = store_of(&[(1, None)]);
        let manifest = run.path().join("step-00000001").join(MANIFEST);
        fs::write(
            &manifest,
            Manifest::new(1, &[], None).of_another_format().encode(),
        )
        .unwrap();
        let mut store = store.with_keep_last(1);
        for step in [2, 3] {
            publish(&mut store, step, 0, None).unwrap();
        }
        assert_eq!(steps(&store), [1, 3]);
    }

    #[test]
    fn the_newest_and_the_best_are_kept() {
        let scores = [5.0, 1.0, f64::NAN, 4.0, 3.0, 2.0, f64::NEG_INFINITY];
        let checkpoints: Vec<_> = (1..).zip(scores.map(Some)).collect();
        let (run, mut store) = store_of(&checkpoints);
        assert_eq!(steps(&store), [2, 5, 6, 7]);
        assert_eq!(best(&store), Some(2));
        assert_eq!(newest(&store).0, 7);
        publish(&mut store, 8, 0, Some(1.0)).unwrap(); // as good and newer: the old one can go
        assert_eq!(steps(&store), [6, 7, 8]);
        assert_eq!(best(&store), Some(8));
        assert_eq!(hidden(run.path()), [""; 0]);
    }

    #[test]
    fn without_scores_there_is_no_best() {
        let (_run, store) = store_of(&[
            (1, Some(f64::NAN)),
            (2, None),
            (3, Some(f64::INFINITY)),
            (4, None),
        ]);
        assert_eq!(steps(&store), [2, 3, 4]);
        assert_eq!(best(&store), None);
    }

    #[test]
    fn keep_last_is_counted() {
        let (_run, store) = store_of(&[(1, None), (2, None), (3, None)]);
        let mut store = store.with_keep_last(1);
        publish(&mut store, 4, 0, None).unwrap();
        assert_eq!(steps(&store), [4]);
    }

    #[test]
    fn of_equal_scores_the_newest_is_the_best() {
        let (_run, store) = store_of(&[(1, Some(1.0)), (2, Some(1.0)), (3, Some(1.5))]);
        assert_eq!(best(&store), Some(2));
    }

    #[test]
    fn a_resume_before_newer_checkpoints_keeps_what_it_writes() {
        let (_run, store) = store_of(&[(100, None), (200, None), (300, None)]);
        let mut store = store.with_keep_last(2);
        for step in [150, 160] {
            publish(&mut store, step, 0, None).unwrap();
        }
        assert_eq!(steps(&store), [150, 160, 200, 300]);
        publish(&mut store, 250, 0, None).unwrap();
        assert_eq!(steps(&store), [200, 250, 300]);
    }

    #[test]
    fn a_damaged_checkpoint_takes_no_place_of_an_intact_one() {
        let (run, store) = store_of(&[(100, None), (200, None), (300, None)]);
        let mut store = store.with_keep_last(2);
        for step in [200, 300] {
            fs::remove_file(run.path().join(format!("step-{step:08}/model"))).unwrap();
        }
        publish(&mut store, 250, 0, None).unwrap();
        assert_eq!(steps(&store), [100, 250, 300]);
        assert_eq!(newest(&store).0, 250);
    }

    // --- the folder ---

    #[test]
    fn an_empty_store_has_no_checkpoint() {
        let run = tempfile::tempdir().unwrap();
        let store = CheckpointStore::open(&run.path().join("run/checkpoints")).unwrap();
        assert!(store.reader().load_newest().unwrap().is_none());
        assert!(store.reader().load_best().unwrap().is_none());
        let error = store.reader().load(7).unwrap_err();
        assert!(
            matches!(error, CheckpointError::NoSuchStep { step: 7, .. }),
            "{error}"
        );
    }

    #[test]
    fn a_file_in_place_of_the_folder_is_named() {
        let run = tempfile::tempdir().unwrap();
        let file = run.path().join("checkpoints");
        fs::write(&file, b"").unwrap();
        for dir in [file.clone(), file.join("below")] {
            let error = CheckpointStore::open(&dir).unwrap_err();
            assert!(
                matches!(&error, CheckpointError::NotAFolder { path } if *path == file),
                "{error}"
            );
        }
        let error = CheckpointReader::open(&file).unwrap_err();
        assert!(
            matches!(error, CheckpointError::NotAFolder { .. }),
            "{error}"
        );
        let error = CheckpointReader::open(&run.path().join("typo")).unwrap_err();
        assert!(
            matches!(error, CheckpointError::Io { action: "open", .. }),
            "{error}"
        );
    }

    #[test]
    fn one_store_writes_while_readers_read() {
        let (run, mut store) = store_of(&[(1, None)]);
        let error = CheckpointStore::open(run.path()).unwrap_err();
        assert!(
            matches!(&error, CheckpointError::InUse { dir } if dir == run.path()),
            "{error}"
        );
        let reader = CheckpointReader::open(run.path()).unwrap();
        publish(&mut store, 2, 0, None).unwrap();
        assert_eq!(reader.load_newest().unwrap().unwrap().checkpoint.step, 2);
        drop(store);
        CheckpointStore::open(run.path()).unwrap();
    }

    #[test]
    fn a_reader_never_trips_over_pruning() {
        let (run, store) = store_of(&[(1, Some(1.0))]);
        let reader = CheckpointReader::open(run.path()).unwrap();
        let mut store = store.with_keep_last(1);
        let training = thread::spawn(move || {
            for step in 2..100 {
                publish(&mut store, step, 0, Some(1.0 / step as f64)).unwrap();
            }
        });
        while !training.is_finished() {
            for loaded in [reader.load_newest(), reader.load_best()] {
                let Loaded {
                    checkpoint,
                    damaged,
                } = loaded.unwrap().expect("one is always there");
                assert_eq!(checkpoint.files, files(checkpoint.step, 0));
                assert!(damaged.is_empty(), "{damaged:?}");
            }
        }
        training.join().unwrap();
    }

    #[test]
    fn what_others_put_there_is_left_alone() {
        let (run, store) = store_of(&[(1, None), (123_456_789, None)]);
        drop(store);
        let others = [
            "step-1",
            "step-final",
            ".staging-mine",
            "notes.txt",
            "step-00000002.bak",
        ];
        for name in others {
            fs::create_dir(run.path().join(name)).unwrap();
        }
        let store = CheckpointStore::open(run.path()).unwrap();
        assert_eq!(steps(&store), [1, 123_456_789]);
        assert!(others.iter().all(|name| run.path().join(name).exists()));
    }

    #[test]
    #[should_panic(expected = "at least one")]
    fn keeping_nothing_panics() {
        let (_run, store) = store_of(&[]);
        let _ = store.with_keep_last(0);
    }
}
