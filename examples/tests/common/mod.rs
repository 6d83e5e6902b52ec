//! What the tests of the programs share: a folder to run them in, a small model and text, and what a run leaves.

#![allow(
    dead_code,
    reason = "each test program is compiled with this file and uses its own part of it"
)]

use std::{
    collections::BTreeMap,
    env, fs,
    io::{Read, Write},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use emberlm::{
    core::RandomKey,
    training::{CheckpointReader, MetricsLog, RunFolder, StepRecord},
};
use serde_json::{Map, Value};
use tempfile::TempDir;

/// A model and a plan whose steps take about a millisecond, with all that an exact resume must get right: dropout,
/// several micro-batches a step, warm-up, and validations between the checkpoints.
pub(crate) const SMALL: &str = r#"{
    "model": {"n_layers": 1, "d_model": 16, "n_heads": 2, "dropout": 0.1},
    "training": {"steps": 40, "batch_size": 4, "accumulation": 2, "seq_length": 16,
                 "validate_every": 20, "validation_windows": 4, "checkpoint_every": 5}
}"#;

/// Where a folder has the configuration and the text.
pub(crate) const CONFIG: &str = "small.json";
pub(crate) const TEXT: &str = "text.txt";

/// How long a program may take for what a test waits for: long, since it may share the machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// A temporary folder with [`CONFIG`] and [`TEXT`], in which programs run.
pub(crate) struct Place(TempDir);

impl Place {
    pub(crate) fn new() -> Self {
        let place = Self(tempfile::tempdir().expect("a temporary folder"));
        place.write(CONFIG, SMALL);
        place.write(TEXT, words(2000));
        place
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().expect("it is in the folder")).expect("writable");
        fs::write(path, content).expect("writable");
    }

    /// Starts a program in the folder.
    pub(crate) fn start(&self, program: &str, args: &[&str]) -> Running {
        Running::new(self.spawn(program, args))
    }

    /// Starts a program whose output nobody reads, as after a terminal is closed.
    pub(crate) fn start_unheard(&self, program: &str, args: &[&str]) -> Running {
        let mut child = self.spawn(program, args);
        (child.stdout, child.stderr) = (None, None);
        Running::new(child)
    }

    /// Runs a program to its end with `input` on its standard input, which must be less than a pipe holds.
    pub(crate) fn run_with_input(&self, program: &str, args: &[&str], input: &str) -> Ended {
        let mut child = self.spawn_with(program, args, Stdio::piped());
        let mut stdin = child.stdin.take().expect("it is piped");
        stdin
            .write_all(input.as_bytes())
            .expect("the pipe holds it");
        drop(stdin);
        Running::new(child).wait()
    }

    fn spawn(&self, program: &str, args: &[&str]) -> Child {
        self.spawn_with(program, args, Stdio::null())
    }

    fn spawn_with(&self, program: &str, args: &[&str], stdin: Stdio) -> Child {
        let child = Command::new(binary(program))
            .args(args)
            .current_dir(&self.0)
            // A backtrace would be more than the one line that an error may have.
            .env("RUST_BACKTRACE", "1")
            .stdin(stdin)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        child.expect("the program starts")
    }

    /// Runs a program to its end.
    pub(crate) fn run(&self, program: &str, args: &[&str]) -> Ended {
        self.start(program, args).wait()
    }

    /// Runs a program that must succeed.
    pub(crate) fn succeeds(&self, program: &str, args: &[&str]) -> Ended {
        let ended = self.run(program, args);
        assert_eq!(ended.code(), Some(0), "{program} {args:?}: {ended:?}");
        ended
    }

    /// Trains the small model in the new folder `run`.
    pub(crate) fn pretrain(&self, run: &str, more: &[&str]) -> Ended {
        self.succeeds("pretrain", &new_run(run, more))
    }

    /// Runs a program that must refuse its input: exit code 2, one line of error that mentions all of `mentions`,
    /// and nothing in the folder created or changed.
    pub(crate) fn refuses(&self, program: &str, args: &[&str], mentions: &[&str]) {
        let before = self.files();
        let ended = self.run(program, args);
        ended.assert_refused(mentions);
        assert!(
            self.files() == before,
            "{program} {args:?} created or changed something: {:?}",
            self.files().keys()
        );
    }

    /// The content of every file and `None` for every folder in the place, by path.
    pub(crate) fn files(&self) -> BTreeMap<PathBuf, Option<Vec<u8>>> {
        let mut files = BTreeMap::new();
        list(self.0.path(), &mut files);
        files
    }

    /// Copies a folder.
    pub(crate) fn copy(&self, from: &str, to: &str) {
        let mut files = BTreeMap::new();
        list(&self.path(from), &mut files);
        fs::create_dir(self.path(to)).expect("free");
        // In the order of the paths a folder comes before what is in it.
        for (path, content) in files {
            let name = path.strip_prefix(self.path(from)).expect("it is in there");
            let copy = self.path(to).join(name);
            match content {
                None => fs::create_dir(copy).expect("writable"),
                Some(content) => fs::write(copy, content).expect("writable"),
            }
        }
    }
}

/// The arguments that train the small model in the new folder `run`.
pub(crate) fn new_run<'a>(run: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let always = ["--config", CONFIG, "--text", TEXT, "--out", run];
    [&always, more].concat()
}

fn list(folder: &Path, files: &mut BTreeMap<PathBuf, Option<Vec<u8>>>) {
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("readable").path();
        if path.is_dir() {
            list(&path, files);
            files.insert(path, None);
        } else {
            let content = fs::read(&path).expect("readable");
            files.insert(path, Some(content));
        }
    }
}

/// A text of pseudo-random words, always the same.
pub(crate) fn words(n: u64) -> String {
    let key = RandomKey::new(1);
    let below = |bound: usize, draw: u64| (key.uniform(draw) * bound as f64) as usize;
    let word = |n: u64| -> String {
        let length = 1 + below(7, 10 * n) as u64;
        let letter = |i| char::from(b"etaoinshrdlu"[below(12, 10 * n + 1 + i)]);
        (0..length).map(letter).collect()
    };
    let words: Vec<String> = (0..n).map(word).collect();
    words.join(" ") + ".\n"
}

/// An example's program: cargo puts it beside the folder of the tests' own programs.
fn binary(name: &str) -> PathBuf {
    let test = env::current_exe().expect("the test's own path");
    let profile = test.ancestors().nth(2).expect("PROFILE/deps/TEST");
    let path = profile.join("examples").join(name);
    let path = path.with_extension(env::consts::EXE_EXTENSION);
    assert!(
        path.is_file(),
        "{} is missing: cargo test builds it, but with --test NAME it does not: run cargo build --examples first",
        path.display()
    );
    path
}

/// A program at work; killed if the test ends before it.
pub(crate) struct Running {
    child: Child,
    // Read at the side: a program must not wait for a full pipe.
    stdout: Option<thread::JoinHandle<Vec<u8>>>,
    stderr: Option<thread::JoinHandle<Vec<u8>>>,
}

impl Running {
    fn new(mut child: Child) -> Self {
        Self {
            stdout: child.stdout.take().map(read_at_the_side),
            stderr: child.stderr.take().map(read_at_the_side),
            child,
        }
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until something holds while the program works on.
    pub(crate) fn wait_until(&mut self, what: &str, holds: impl Fn() -> bool) {
        let begin = Instant::now();
        while !holds() {
            let ended = self.child.try_wait().expect("a child of this process");
            assert!(ended.is_none(), "ended before {what}: {ended:?}");
            assert!(begin.elapsed() < PATIENCE, "waited in vain until {what}");
            // Short against a step of the small model.
            thread::sleep(Duration::from_micros(100));
        }
    }

    /// Ends the program as `kill -9` does. It must be at work until then.
    pub(crate) fn kill(mut self) -> Ended {
        let ended = self.child.try_wait().expect("a child of this process");
        assert!(ended.is_none(), "ended before it was killed: {ended:?}");
        self.child.kill().expect("it is alive");
        let ended = self.wait();
        assert_eq!(ended.code(), None, "ended before it was killed: {ended:?}");
        ended
    }

    /// Waits for the program's end.
    pub(crate) fn wait(mut self) -> Ended {
        let begin = Instant::now();
        let status = loop {
            match self.child.try_wait().expect("a child of this process") {
                Some(status) => break status,
                None => assert!(begin.elapsed() < PATIENCE, "the program does not end"),
            }
            thread::sleep(Duration::from_millis(1));
        };
        let text = |reader: &mut Option<thread::JoinHandle<Vec<u8>>>| {
            let bytes = reader.take().map(|reader| reader.join().expect("readable"));
            String::from_utf8(bytes.unwrap_or_default()).expect("programs write UTF-8")
        };
        Ended {
            status,
            stdout: text(&mut self.stdout),
            stderr: text(&mut self.stderr),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Fails where the program has ended, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read_at_the_side(mut pipe: impl Read + Send + 'static) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        pipe.read_to_end(&mut bytes).expect("readable");
        bytes
    })
}

/// A program's end and what it wrote.
#[derive(Debug)]
pub(crate) struct Ended {
    status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ended {
    /// The exit code; nothing where a signal ended the program.
    pub(crate) fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// Exit code 2 and a single line of error that mentions all of `mentions`.
    pub(crate) fn assert_refused(&self, mentions: &[&str]) {
        assert_eq!(self.code(), Some(2), "{self:?}");
        assert_eq!(self.stderr.lines().count(), 1, "{self:?}");
        assert!(self.stderr.starts_with("error: "), "{self:?}");
        for mention in mentions {
            assert!(self.stderr.contains(mention), "no {mention:?} in {self:?}");
        }
    }
}

/// The figures of every step in the log of a run.
pub(crate) fn metrics(run: &Path) -> Vec<StepRecord> {
    MetricsLog::read(run.join(MetricsLog::FILE_NAME)).expect("a log of steps")
}

/// How many whole lines the log of a run has; it may be written at the time.
pub(crate) fn n_logged(run: &Path) -> usize {
    let log = fs::read(run.join(MetricsLog::FILE_NAME)).unwrap_or_default();
    log.iter().filter(|byte| **byte == b'\n').count()
}

/// The steps of the checkpoints of a run.
pub(crate) fn checkpoints(run: &Path) -> Vec<u64> {
    match CheckpointReader::open(&run.join(RunFolder::CHECKPOINTS)) {
        Ok(reader) => reader.steps().expect("readable"),
        Err(_) => Vec::new(),
    }
}

/// Checks that two runs are the same, bit for bit: each step once, its figures, and the weights.
pub(crate) fn assert_same(run: &Path, expected: &Path) {
    let figures = |run| -> Vec<_> {
        let bits = |value: Option<f64>| value.map(f64::to_bits);
        let steps = metrics(run).into_iter();
        let figures = steps.map(|record| {
            (
                record.step,
                bits(record.train_loss),
                bits(record.valid_loss),
                bits(record.gradient_norm),
                record.learning_rate.to_bits(),
                record.skipped,
            )
        });
        figures.collect()
    };
    let (got, wanted) = (figures(run), figures(expected));
    let n_steps = wanted.len() as u64;
    assert!(n_steps > 0, "an empty log proves nothing");
    let each_once: Vec<u64> = (1..=n_steps).collect();
    let steps: Vec<u64> = got.iter().map(|figures| figures.0).collect();
    assert_eq!(steps, each_once, "each step must be logged once");
    assert_eq!(got, wanted, "the figures differ");
    assert_same_weights(run, expected);
}

/// Checks that two runs have the same weights, bit for bit.
pub(crate) fn assert_same_weights(run: &Path, expected: &Path) {
    let (got, wanted) = (weights(run), weights(expected));
    assert!(!wanted.is_empty(), "no tensors prove nothing");
    assert!(got.keys().eq(wanted.keys()), "the tensors differ in name");
    for (name, tensor) in &wanted {
        assert!(got[name] == *tensor, "{name} differs");
    }
}

/// What the header of a run's weights says about every tensor, and the tensor's bytes.
fn weights(run: &Path) -> BTreeMap<String, (String, Vec<u8>)> {
    let file = fs::read(run.join(RunFolder::WEIGHTS)).expect("the run has weights");
    // The length of the header, the header, and the tensors that it gives the places of.
    let (length, rest) = file.split_first_chunk().expect("a safetensors file");
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let header: Map<String, Value> = serde_json::from_slice(header).expect("a JSON header");
    let tensors = header
        .into_iter()
        .filter(|(name, _)| name != "__metadata__");
    let tensors = tensors.map(|(name, tensor)| {
        let place = |i: usize| tensor["data_offsets"][i].as_u64().expect("a place") as usize;
        let bytes = data[place(0)..place(1)].to_vec();
        let kind = format!("{} {}", tensor["dtype"], tensor["shape"]);
        (name, (kind, bytes))
    });
    tensors.collect()
}
