//! A run that is killed, stopped or damaged goes on exactly: to the figures and weights of one that never was.
#![cfg(unix)]

mod common;

use std::{fs, path::Path, thread, time::Duration};

use common::{
    Ended, Place, Running, assert_same, assert_same_weights, checkpoints, metrics, n_logged,
    new_run,
};
use emberlm::{
    core::RandomKey,
    training::{MetricsLog, Report, RunFolder},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// For runs, or their ends, where it does not matter how often they save.
const RARE: [&str; 2] = ["--checkpoint-every", "100"];

#[test]
fn twenty_kills_leave_no_trace() {
    const N_KILLS: u64 = 20;
    // More steps than the kills below let happen, on the fastest machine.
    const STEPS: [&str; 2] = ["--steps", "1000"];
    let place = Place::new();
    let run = place.path("killed");
    let random = RandomKey::new(20);
    let below = |bound: f64, draw: u64| (random.uniform(draw) * bound) as u64;

    let (mut n_after_a_checkpoint, mut n_within_a_checkpoint) = (0, 0);
    for i in 0..N_KILLS {
        let every = (1 + i % 5).to_string();
        let every = ["--checkpoint-every", &every];
        let first = new_run("killed", &[STEPS, every].concat());
        let again = [&["--resume", "killed"][..], &every].concat();
        let mut running = place.start("pretrain", if i == 0 { &first } else { &again });
        if i == 0 {
            running.wait_until("it begins", || run.join(RunFolder::CONFIG).is_file());
        } else if i == 4 {
            running.wait_until("a checkpoint is there", || !checkpoints(&run).is_empty());
        } else if i % 3 == 0 {
            running.wait_until("a checkpoint is written", || is_staging(&run));
        } else if i % 3 == 1 {
            let before = checkpoints(&run).last().copied().unwrap_or(0);
            let steps = before as usize + 1 + below(8.0, 2 * i) as usize;
            running.wait_until("some steps are done", || n_logged(&run) >= steps);
        } else {
            // Also before the first step.
            thread::sleep(Duration::from_millis(below(40.0, 2 * i)));
        }
        thread::sleep(Duration::from_micros(below(2000.0, 2 * i + 1)));
        running.kill();
        n_after_a_checkpoint += u64::from(!checkpoints(&run).is_empty());
        n_within_a_checkpoint += u64::from(is_staging(&run));
    }
    println!(
        "{n_after_a_checkpoint} kills after the first checkpoint, {n_within_a_checkpoint} within the writing of one"
    );
    assert!(n_after_a_checkpoint >= 15 && n_within_a_checkpoint >= 1);

    let ended = place.succeeds("pretrain", &[&["--resume", "killed"], &RARE[..]].concat());
    assert!(ended.stdout.contains("\nresuming after step "), "{ended:?}");
    assert_eq!(ended.stderr, "", "a kill damages nothing");
    place.pretrain("never-killed", &[STEPS, RARE].concat());
    assert_same(&run, &place.path("never-killed"));
}

/// Whether a checkpoint is being written, or was when the process was killed.
fn is_staging(run: &Path) -> bool {
    let entries = fs::read_dir(run.join(RunFolder::CHECKPOINTS));
    let mut names = entries
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name());
    names.any(|name| name.to_string_lossy().starts_with(".staging-"))
}

#[test]
fn before_the_first_checkpoint_a_run_starts_again() {
    let place = Place::new();
    // A new best validation loss would be saved too.
    let config = common::SMALL.replace(r#""validate_every": 20"#, r#""validate_every": 400"#);
    assert_ne!(config, common::SMALL);
    place.write(common::CONFIG, config);
    let rare = ["--steps", "400", "--checkpoint-every", "400"];
    place.pretrain("never-killed", &rare);

    let run = place.path("killed");
    let mut running = place.start("pretrain", &new_run("killed", &rare));
    running.wait_until("some steps are done", || n_logged(&run) >= 3);
    running.kill();
    assert_eq!(checkpoints(&run), [0; 0]);
    let ended = place.succeeds("pretrain", &["--resume", "killed"]);
    assert!(!ended.stdout.contains("resuming after"), "{ended:?}");
    assert_same(&run, &place.path("never-killed"));
}

/// The bias of the routers is no parameter that the optimizer knows.
#[test]
fn a_run_with_experts_goes_on_with_their_bias() {
    let place = Place::new();
    let plan = r#"{"training": {"batch_size": 4, "seq_length": 16, "accumulation": 2, "validation_windows": 2}}"#;
    place.write(common::CONFIG, plan);
    let experts = ["--preset", "moe-tiny", "--balance", "bias", "--steps", "30"];
    let every = ["--checkpoint-every", "1"];
    place.pretrain("never-killed", &[&experts[..], &RARE].concat());

    let run = place.path("killed");
    let mut running = place.start(
        "pretrain",
        &new_run("killed", &[&experts[..], &every].concat()),
    );
    running.wait_until("some steps are done", || {
        checkpoints(&run).last() >= Some(&5)
    });
    running.kill();
    place.succeeds("pretrain", &["--resume", "killed"]);
    assert_same(&run, &place.path("never-killed"));
    let report = Report::read(run.join(Report::FILE_NAME)).expect("a report");
    let routing = report.routing.expect("of a model with experts");
    assert_eq!(routing.layers, [1, 2, 3]);
    assert!(run.join("experts.png").is_file());
}

#[test]
fn a_run_can_be_resumed_before_its_model_is_made() {
    let place = Place::new();
    // The initialisation takes a while.
    let config = r#"{"model": {"n_layers": 4, "d_model": 1024}, "training": {"batch_size": 1}}"#;
    place.write(common::CONFIG, config);
    let run = place.path("run");
    let mut running = place.start("pretrain", &new_run("run", &[]));
    running.wait_until("it is planned", || run.join(RunFolder::CONFIG).is_file());
    assert!(
        !run.join(RunFolder::CHECKPOINTS).exists(),
        "the plan comes before the model"
    );
    running.kill();
    let mut running = place.start("pretrain", &["--resume", "run"]);
    running.wait_until("it begins", || run.join(MetricsLog::FILE_NAME).is_file());
}

#[test]
fn a_finished_run_is_extended_and_the_new_end_is_kept() {
    let place = Place::new();
    place.pretrain("run", &["--steps", "20"]);
    place.copy("run", "killed");
    let changed = "the learning-rate schedule changed: it now ends at step 300 instead of 20\n";
    let more = |run| ["--resume", run, "--steps", "300", RARE[0], RARE[1]];
    let ended = place.succeeds("pretrain", &more("run"));
    assert!(ended.stdout.contains(changed), "{ended:?}");
    let run = place.path("run");
    let report = Report::read(run.join(Report::FILE_NAME)).expect("a report");
    assert_eq!(report.steps, Some(300));
    // The last step of a schedule has a tenth of the highest rate: step 20 of the old one, step 300 of the new.
    let rates: Vec<f64> = metrics(&run)
        .iter()
        .map(|record| record.learning_rate)
        .collect();
    let is_last = |step: usize| (rates[step - 1] / 2e-4 - 1.0).abs() < 1e-9;
    assert_eq!([20, 21, 300].map(is_last), [true, false, true], "{rates:?}");

    // Killed and resumed without saying it again, it still ends at the new step.
    let killed = place.path("killed");
    let mut running = place.start("pretrain", &more("killed"));
    running.wait_until("some steps are done", || n_logged(&killed) >= 33);
    running.kill();
    let ended = place.succeeds("pretrain", &["--resume", "killed"]);
    assert!(!ended.stdout.contains("schedule changed"), "{ended:?}");
    assert_same(&killed, &run);
}

#[test]
fn resuming_a_finished_run_changes_nothing() {
    let place = Place::new();
    place.pretrain("run", &[]);
    place.copy("run", "before");
    let ended = place.succeeds("pretrain", &["--resume", "run"]);
    assert!(!ended.stdout.contains("schedule changed"), "{ended:?}");
    let (run, before) = (place.path("run"), place.path("before"));
    for name in [
        MetricsLog::FILE_NAME,
        RunFolder::CONFIG,
        "curves.svg",
        "curves.png",
    ] {
        let read = |run: &Path| fs::read(run.join(name)).expect("it was written");
        assert!(read(&run) == read(&before), "{name} differs");
    }
    assert_same_weights(&run, &before);
    let report = |run: &Path| Report::read(run.join(Report::FILE_NAME)).expect("a report");
    // The memory is that of another process.
    let without_memory = |report| Report {
        peak_memory_bytes: None,
        ..report
    };
    assert_eq!(
        without_memory(report(&run)),
        without_memory(report(&before))
    );
}

#[test]
fn two_processes_cannot_train_in_one_folder() {
    let place = Place::new();
    let run = place.path("run");
    let mut running = place.start("pretrain", &new_run("run", &["--steps", "1000000"]));
    running.wait_until("it trains", || n_logged(&run) >= 2);
    let ended = place.run("pretrain", &["--resume", "run"]);
    ended.assert_refused(&["run", "in use", "another process"]);
    let ended = place.run("pretrain", &new_run("run", &[]));
    ended.assert_refused(&["run", "not empty", "--resume"]);
    // The one that was first is not disturbed, and leaves no lock behind.
    let n = n_logged(&run);
    running.wait_until("it trains on", || n_logged(&run) > n + 10);
    running.kill();
    let mut running = place.start("pretrain", &["--resume", "run"]);
    let n = n_logged(&run);
    running.wait_until("it trains again", || n_logged(&run) > n + 10);
}

#[test]
fn signals_finish_the_step_save_and_say_how_to_go_on() {
    let place = Place::new();
    let steps = ["--steps", "600", RARE[0], RARE[1]];
    place.pretrain("never-stopped", &steps);
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        let name = signal.as_str();
        let run = place.path(name);
        let mut running = place.start("pretrain", &new_run(name, &steps));
        running.wait_until("some steps are done", || n_logged(&run) >= 5);
        send(&running, signal);
        let ended = running.wait();
        assert_eq!(ended.code(), Some(0), "{ended:?}");
        let last = metrics(&run).last().expect("some steps").step;
        assert!(last < 600, "{name} came too late");
        let said = format!("stopped after step {last} and saved: continue with --resume {name}\n");
        assert!(ended.stdout.ends_with(&said), "{ended:?}");
        assert_eq!(checkpoints(&run).last(), Some(&last));
        assert!(run.join(RunFolder::WEIGHTS).is_file());

        let ended = place.succeeds("pretrain", &["--resume", name]);
        assert!(
            ended
                .stdout
                .contains(&format!("resuming after step {last}\n")),
            "{ended:?}"
        );
        assert_same(&run, &place.path("never-stopped"));
    }
}

#[test]
fn a_terminal_that_goes_away_stops_a_run_in_order() {
    let place = Place::new();
    let run = place.path("run");
    let mut running = place.start_unheard("pretrain", &new_run("run", &["--steps", "1000000"]));
    running.wait_until("some steps are done", || n_logged(&run) >= 5);
    send(&running, Signal::SIGHUP);
    assert_eq!(running.wait().code(), Some(0));
    let last = metrics(&run).last().expect("some steps").step;
    assert_eq!(checkpoints(&run).last(), Some(&last));

    let end = (last + 5).to_string();
    let running = place.start_unheard("pretrain", &["--resume", "run", "--steps", &end]);
    assert_eq!(
        running.wait().code(),
        Some(0),
        "without a reader it finishes too"
    );
    assert!(run.join(Report::FILE_NAME).is_file());
}

#[test]
fn a_second_signal_ends_at_once() {
    let place = Place::new();
    // A step of many micro-batches, so long that the signals come within it.
    let config = r#"{"model": {"n_layers": 2, "d_model": 128, "n_heads": 2},
        "training": {"batch_size": 100000, "accumulation": 100000, "seq_length": 256}}"#;
    place.write("slow.json", config);
    place.write("long.txt", common::words(20_000));
    let args = [
        "--config",
        "slow.json",
        "--text",
        "long.txt",
        "--out",
        "run",
    ];
    let mut running = place.start("pretrain", &args);
    let run = place.path("run");
    running.wait_until("it trains", || run.join(MetricsLog::FILE_NAME).is_file());
    send(&running, Signal::SIGINT);
    thread::sleep(Duration::from_millis(300));
    running.wait_until("it goes on", || true);
    send(&running, Signal::SIGINT);
    let ended = running.wait();
    assert_eq!(ended.code(), Some(130), "{ended:?}");
    assert_eq!(n_logged(&run), 0, "it did not wait for the step");
}

fn send(running: &Running, signal: Signal) {
    let id = i32::try_from(running.id()).expect("a process number");
    kill(Pid::from_raw(id), signal).expect("it is alive");
}

#[test]
fn a_damaged_checkpoint_is_named_and_gone_around() {
    let place = Place::new();
    let steps = ["--steps", "300"];
    place.pretrain("intact", &[steps, RARE].concat());
    let run = place.path("damaged");
    let mut running = place.start(
        "pretrain",
        &new_run("damaged", &[steps, ["--checkpoint-every", "1"]].concat()),
    );
    running.wait_until("there are checkpoints", || checkpoints(&run).len() >= 3);
    running.kill();

    let steps = checkpoints(&run);
    let (newest, before) = (steps[steps.len() - 1], steps[steps.len() - 2]);
    flip_a_byte(&run, newest);
    let is_warned = |ended: &Ended| {
        let folder = format!("step-{newest:08}");
        ended.stderr.starts_with("warning: ") && ended.stderr.contains(&folder)
    };
    let ended = place.succeeds("generate", &["--run", "damaged", "--prompt", "a"]);
    assert!(is_warned(&ended), "{ended:?}");
    let taken = format!("taking its checkpoint of step {before}\n");
    assert!(ended.stderr.contains(&taken), "{ended:?}");

    let ended = place.succeeds("pretrain", &[&["--resume", "damaged"], &RARE[..]].concat());
    assert!(is_warned(&ended), "{ended:?}");
    let goes_on = format!("going on from step {before}\n");
    assert!(ended.stderr.ends_with(&goes_on), "{ended:?}");
    assert_eq!(ended.stderr.lines().count(), 1, "{ended:?}");
    assert_same(&run, &place.path("intact"));
}

#[test]
fn without_an_intact_checkpoint_nothing_is_lost() {
    let place = Place::new();
    place.pretrain("run", &[]);
    let run = place.path("run");
    for step in checkpoints(&run) {
        flip_a_byte(&run, step);
    }
    place.refuses(
        "pretrain",
        &["--resume", "run"],
        &["checkpoints", "intact", "backup"],
    );
}

fn flip_a_byte(run: &Path, step: u64) {
    let folder = run
        .join(RunFolder::CHECKPOINTS)
        .join(format!("step-{step:08}"));
    let path = folder.join("model.bpk");
    let mut bytes = fs::read(&path).expect("a checkpoint has a model");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&path, bytes).expect("writable");
}
