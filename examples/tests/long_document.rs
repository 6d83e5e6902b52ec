//! The program that compares attention patterns: its rows and tables, their exact continuation, and bad input.

mod common;

use std::fs;

use common::{Ended, Place, assert_same, checkpoints, metrics};
use serde_json::Value;

const PATTERNS: [&str; 5] = ["full", "window", "longformer", "bigbird", "strided"];

/// Sizes whose steps take milliseconds; blocks and windows of the patterns are longer than the sequences.
const TINY: [&str; 13] = [
    "--seq-length",
    "40",
    "--batch-size",
    "2",
    "--layers",
    "1",
    "--width",
    "16",
    "--heads",
    "2",
    "--checkpoint-every",
    "2",
    "--no-tui",
];

const NOVELS: [&str; 8] = [
    "--task", "novel", "--text", "novels", "--tail", "8", "--cases", "12",
];
const MODEL: [&str; 4] = ["--task", "language-model", "--text", "novels"];

/// A place with three novels, each of an alphabet of its own.
fn place() -> Place {
    let place = Place::new();
    for (name, letters) in [("a", "abcd "), ("b", "fghi "), ("c", "klmn ")] {
        let letters = letters.as_bytes();
        let letter = |i: usize| char::from(letters[(i * i / 7 + i) % letters.len()]);
        let text: String = (0..600).map(letter).collect();
        place.write(&format!("novels/{name}.txt"), text);
    }
    place
}

fn new_table<'a>(task: &[&'a str], table: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [task, &TINY, &["--out", table], more].concat()
}

fn run(place: &Place, task: &[&str], table: &str, more: &[&str]) -> Ended {
    place.succeeds("long_document", &new_table(task, table, more))
}

fn json(place: &Place, path: &str) -> Value {
    serde_json::from_slice(&fs::read(place.path(path)).expect("it was written")).expect("JSON")
}

fn first_words(text: &str) -> Vec<&str> {
    text.lines()
        .filter_map(|line| line.split_whitespace().next())
        .collect()
}

#[test]
fn a_table_has_a_row_for_each_pattern() {
    let place = place();
    for (task, title) in [(&NOVELS[..], "accuracy"), (&MODEL, "bits/byte")] {
        let table = task[1];
        let more = ["--steps", "4", "--report", "report.json"];
        let ended = run(&place, task, table, &more);
        assert_eq!(ended.stderr, "");
        let lines: Vec<&str> = ended.stdout.lines().collect();
        let mut titles = (0..lines.len()).filter(|line| lines[*line].starts_with("pattern "));
        let begin = titles.next().expect("the titles");
        assert_eq!(titles.next(), None, "one table: {ended:?}");
        assert!(lines[begin].contains(title), "{ended:?}");
        let rows = lines[begin + 1..begin + 6].join("\n");
        assert_eq!(first_words(&rows), PATTERNS);
        let report = json(&place, "report.json");
        assert_eq!(report, json(&place, &format!("{table}/report.json")));
        assert_eq!(report["task"], table);
        let rows = report["rows"].as_array().expect("a list");
        for (row, pattern) in rows.iter().zip(PATTERNS) {
            assert_eq!(row["pattern"], pattern);
            assert_eq!(row["steps"], 4);
            for figure in ["valid_loss", "seconds", "seconds_per_step"] {
                assert!(row[figure].as_f64() > Some(0.0), "{figure}: {row}");
            }
            let run = place.path(&format!("{table}/{pattern}"));
            assert_eq!(metrics(&run).len(), 4);
            assert!(run.join("model.safetensors").is_file());
        }
        let svg = place.path(&format!("{table}/curves.svg"));
        let svg = fs::read_to_string(svg).expect("it was drawn");
        assert!(svg.contains("seconds of training") && svg.contains("bigbird"));
        // The projections of the global tokens are parameters that no other row has.
        let parameters = |i: usize| rows[i]["parameters"].as_u64().expect("a count");
        assert!(parameters(2) > parameters(0) && parameters(0) == parameters(3));
    }
    let report = json(&place, "novel/report.json");
    assert_eq!(report["chance"]["blind"], 1.0 / 3.0);
    assert_eq!(report["chance"]["knowing_the_rest"], 0.5);
    for row in report["rows"].as_array().expect("a list") {
        let found = row["accuracy"].as_f64().expect("a share") * 12.0;
        assert!((0.0..=12.0).contains(&found) && (found - found.round()).abs() < 1e-9);
    }
}

#[test]
fn a_row_learns_what_its_model_can_see() {
    let place = place();
    let more = [
        "--steps",
        "120",
        "--pattern",
        "full",
        "--batch-size",
        "8",
        "--learning-rate",
        "0.01",
        "--cases",
        "100",
    ];
    let novels = [
        &NOVELS[..6],
        &TINY[..2],
        &TINY[4..],
        &["--out", "table"],
        &more,
    ]
    .concat();
    let ended = place.succeeds("long_document", &novels);
    let report = json(&place, "table/full/report.json");
    assert!(report["accuracy"].as_f64() > Some(0.9), "{report}");
    assert!(
        ended
            .stdout
            .contains("100 held-out cases; by chance 33.3 %"),
        "{ended:?}"
    );
}

#[test]
fn a_row_goes_on_exactly() {
    let place = place();
    for task in [&NOVELS[..], &MODEL] {
        let [whole, cut] = ["whole", "cut"].map(|name| format!("{}-{name}", task[1]));
        let row = ["--pattern", "longformer", "--steps", "8"];
        run(&place, task, &whole, &row);
        place.copy(&whole, &cut);
        let run = place.path(&format!("{cut}/longformer"));
        fs::remove_file(run.join("report.json")).expect("a report");
        for step in checkpoints(&run).into_iter().filter(|step| *step > 5) {
            let path = run.join(format!("checkpoints/step-{step:08}"));
            fs::remove_dir_all(path).expect("a checkpoint");
        }
        let resume = ["--resume", &cut, "--pattern", "longformer", "--no-tui"];
        let ended = place.succeeds("long_document", &resume);
        assert!(ended.stdout.contains("\nresuming after step "), "{ended:?}");
        assert!(!ended.stdout.contains("resuming after step 8"), "{ended:?}");
        assert_same(&run, &place.path(&format!("{whole}/longformer")));
    }
}

#[test]
fn a_table_goes_on_where_it_stopped() {
    let place = place();
    let row = ["--steps", "3", "--pattern", "window"];
    run(&place, &NOVELS, "table", &row);
    let done = fs::read(place.path("table/window/metrics.jsonl")).expect("a log");
    let ended = place.succeeds("long_document", &["--resume", "table", "--no-tui"]);
    assert!(!ended.stdout.contains("--- window ---"), "{ended:?}");
    let again = fs::read(place.path("table/window/metrics.jsonl")).expect("a log");
    assert!(done == again, "a row that was done was trained again");
    let report = json(&place, "table/report.json");
    assert_eq!(report["rows"].as_array().map(Vec::len), Some(5));

    // All rows go on to more steps.
    let more = ["--resume", "table", "--steps", "5", "--no-tui"];
    let ended = place.succeeds("long_document", &more);
    assert_eq!(ended.stdout.matches("resuming after step 3").count(), 5);
    for pattern in PATTERNS {
        assert_eq!(metrics(&place.path(&format!("table/{pattern}"))).len(), 5);
    }
}

#[cfg(unix)]
#[test]
fn a_signal_stops_the_row_and_the_table() {
    use nix::{
        sys::signal::{Signal, kill},
        unistd::Pid,
    };

    let place = place();
    let args = new_table(&NOVELS, "table", &["--steps", "1000000"]);
    let mut running = place.start("long_document", &args);
    let row = place.path("table/full");
    running.wait_until("it trains", || common::n_logged(&row) >= 3);
    kill(Pid::from_raw(running.id() as i32), Signal::SIGTERM).expect("it is alive");
    let ended = running.wait();
    assert_eq!(ended.code(), Some(0), "{ended:?}");
    let end = "the table goes on with --resume table\n";
    assert!(ended.stdout.ends_with(end), "{ended:?}");
    // The row has finished its step and saved, and no other has begun.
    let n_steps = metrics(&row).len() as u64;
    assert_eq!(checkpoints(&row).last(), Some(&n_steps));
    assert!(!place.path("table/window").exists());
}

#[test]
fn bad_input_is_one_line() {
    let place = place();
    place.write("single.txt", "EMMA\n".to_owned() + &"a b c ".repeat(100));
    for (task, args, mention) in [
        (
            &NOVELS[..],
            &["--seq-length", "8"][..],
            "--seq-length 8 leaves no room",
        ),
        (
            &NOVELS,
            &["--seq-length", "100"],
            "the held-out part of a has 60 bytes",
        ),
        (&NOVELS[..6], &["--cases", "0"], "--cases 0"),
        (&NOVELS[..4], &["--tail", "0"], "--tail 0"),
        (&NOVELS[..2], &["--text", "single.txt"], "a single novel"),
        (&NOVELS[..2], &["--text", "missing.txt"], "missing.txt"),
        (&NOVELS, &["--steps", "0"], "training.steps"),
        (&NOVELS, &["--layers", "0"], "model.n_layers"),
        (&NOVELS, &["--width", "10", "--heads", "3"], "model.n_heads"),
        (
            &NOVELS,
            &["--report", "missing/report.json"],
            "a folder that exists",
        ),
        (&MODEL, &["--tail", "8"], "--tail is for --task novel"),
        (&MODEL, &["--cases", "8"], "--cases is for --task novel"),
        (&MODEL, &["--seq-length", "1000"], "shorter --seq-length"),
        (&[], &["--text", "novels"], "--task"),
    ] {
        // An option that is given twice is refused by the parser, so the case's own come alone.
        let given = |option: &str| args.contains(&option);
        let tiny = TINY.chunks(2).filter(|pair| !given(pair[0])).flatten();
        let tiny: Vec<&str> = tiny.copied().collect();
        let args = [task, &tiny, &["--out", "table"], args].concat();
        place.refuses("long_document", &args, &[mention]);
    }
    let unknown = place.run("long_document", &["--pattern", "spiral"]);
    assert_eq!(unknown.code(), Some(2), "{unknown:?}");
    assert!(unknown.stderr.starts_with("error: "), "{unknown:?}");
    assert!(unknown.stderr.contains("spiral"), "{unknown:?}");

    run(
        &place,
        &NOVELS,
        "table",
        &["--steps", "1", "--pattern", "full"],
    );
    for (args, mention) in [
        (&["--width", "32"][..], "model.d_model is 16"),
        (&["--tail", "9"], "tail is 8"),
        (&["--cases", "13"], "cases is 12"),
        (&["--task", "language-model"], "task is novel"),
        (
            &["--text", "single.txt"],
            "not the text the table began with",
        ),
    ] {
        let args = [&["--resume", "table"], args].concat();
        place.refuses("long_document", &args, &[mention]);
    }
    place.refuses(
        "long_document",
        &["--resume", "novels"],
        &["novels holds no table"],
    );
}
