//! The program that learns to translate: its runs, their exact continuation, its translations, and bad input.

mod common;

use std::fs;

use common::{Ended, Place, assert_same, metrics};
use serde_json::Value;

/// A model and a plan whose steps take milliseconds.
const TINY: &str = r#"{
    "model": {"d_model": 16, "n_heads": 2, "n_encoder_layers": 1, "n_decoder_layers": 2,
              "positions": {"Learned": {"max_seq_length": 60}}},
    "training": {"batch_size": 4, "seq_length": 30, "warmup_steps": 4, "accumulation": 2, "validate_every": 5,
                 "validation_windows": 6, "checkpoint_every": 4}
}"#;

/// A place with pairs of two books: sums in figures and in words.
fn place() -> Place {
    let place = Place::new();
    place.write("tiny.json", TINY);
    let words = [
        "zero", "uno", "dos", "tres", "cuatro", "cinco", "seis", "siete",
    ];
    let line = |i: usize| {
        let (a, b) = (i / 8 % 8, i % 8);
        let book = if i < 40 { "Evens" } else { "Odds" };
        format!("{a} and {b}\t{} y {}\t{book} 1:{i}\n", words[a], words[b])
    };
    place.write("pairs.tsv", (0..64).map(line).collect::<String>());
    place
}

const NEW: [&str; 9] = [
    "--pairs",
    "pairs.tsv",
    "--config",
    "tiny.json",
    "--tokenizer",
    "bpe:270",
    "--held-out",
    "8",
    "--no-tui",
];

fn new_run<'a>(run: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&NEW[..], &["--out", run], more].concat()
}

fn trained(place: &Place, run: &str, steps: &str) -> Ended {
    place.succeeds("translate", &new_run(run, &["--steps", steps]))
}

fn json(place: &Place, path: &str) -> Value {
    serde_json::from_slice(&fs::read(place.path(path)).expect("it was written")).expect("JSON")
}

#[test]
fn a_run_learns_is_scored_and_translates() {
    let place = place();
    let ended = trained(&place, "run", "12");
    let line = "pairs: 56 training and 8 held-out, of 270 tokens in the vocabulary";
    assert!(ended.stdout.contains(line), "{ended:?}");
    let steps = metrics(&place.path("run"));
    assert_eq!(steps.len(), 12);
    // Vaswani's schedule: up to step 4, then down.
    for (step, rate) in [(2, 0.5e-3), (4, 1e-3), (9, 1e-3 * (4f64 / 9.0).sqrt())] {
        assert!(
            (steps[step - 1].learning_rate - rate).abs() < 1e-12,
            "step {step}"
        );
    }
    let report = json(&place, "run/report.json");
    let names: Vec<&str> = (report["systems"].as_array().expect("a list").iter())
        .map(|system| system["system"].as_str().expect("a name"))
        .collect();
    assert_eq!(
        names,
        [
            "copy of the source",
            "nearest training pair",
            "greedy",
            "beam 4"
        ]
    );
    assert_eq!(report["steps"], 12);
    assert!(report["shuffled_sources_loss"].as_f64() > Some(0.0));

    let greedy = place.succeeds("translate", &["--run", "run", "3 and 5"]);
    let one_beam = place.succeeds("translate", &["--run", "run", "3 and 5", "--beam", "1"]);
    assert_eq!(greedy.stdout, one_beam.stdout);
    assert_eq!(greedy.stdout.lines().count(), 1, "{greedy:?}");
    let beams = [
        "--run",
        "run",
        "3 and 5",
        "--beam",
        "3",
        "--length-penalty",
        "0.6",
    ];
    assert_eq!(
        place.succeeds("translate", &beams).stdout.lines().count(),
        1
    );

    let stream = place.run_with_input("translate", &["--run", "run"], "3 and 5\n\n3 and 5\n");
    assert_eq!(
        stream.stdout,
        format!("{0}\n{0}", greedy.stdout),
        "{stream:?}"
    );

    let draws = [
        "--run",
        "run",
        "3 and 5",
        "--target",
        "tres y cinco",
        "--attention",
        "map.png",
    ];
    place.succeeds("translate", &draws);
    let png = fs::read(place.path("map.png")).expect("it was drawn");
    assert!(png.starts_with(b"\x89PNG"));
}

#[test]
fn a_run_goes_on_exactly() {
    let place = place();
    trained(&place, "whole", "16");
    place.copy("whole", "cut");
    for entry in fs::read_dir(place.path("cut/checkpoints")).expect("a folder") {
        let path = entry.expect("readable").path();
        if path.ends_with("step-00000016") || path.ends_with("step-00000015") {
            fs::remove_dir_all(path).expect("a checkpoint");
        }
    }
    let ended = place.succeeds("translate", &["--resume", "cut", "--no-tui"]);
    assert!(ended.stdout.contains("\nresuming after step "), "{ended:?}");
    assert!(
        !ended.stdout.contains("resuming after step 16"),
        "{ended:?}"
    );
    assert_same(&place.path("cut"), &place.path("whole"));
    // The schedule knows no last step: a shorter run that is extended is the same.
    trained(&place, "short", "7");
    place.succeeds(
        "translate",
        &["--resume", "short", "--steps", "16", "--no-tui"],
    );
    let losses = |run| {
        metrics(&place.path(run))
            .into_iter()
            .map(|step| step.train_loss)
    };
    assert!(losses("short").eq(losses("whole")));
}

#[test]
fn whole_books_are_held_out() {
    let place = place();
    let books = ["--hold-out", "books", "--steps", "2"];
    let ended = place.succeeds("translate", &new_run("run", &books));
    let either = ["24 training and 40 held-out", "40 training and 24 held-out"];
    assert!(
        either.iter().any(|line| ended.stdout.contains(line)),
        "{ended:?}"
    );
    let other = ["--resume", "run", "--hold-out", "random"];
    place.refuses("translate", &other, &["holds out other pairs"]);
}

#[test]
fn the_twin_gets_what_it_needs() {
    let place = place();
    let no_accumulation = TINY.replace(r#""accumulation": 2, "#, "");
    place.write("tiny.json", no_accumulation);
    let always = [&NEW[..], &["--dropout", "0"]].concat();
    let export = [&always[..], &["--export", "twin", "--steps", "5"]].concat();
    place.succeeds("translate", &export);
    let batches = fs::read_to_string(place.path("twin/batches.jsonl")).expect("it was written");
    let n_targets = |line: &str| -> usize {
        let batch: Value = serde_json::from_str(line).expect("JSON");
        let rows = batch["target"].as_array().expect("rows").iter();
        rows.map(|row| row.as_array().expect("tokens").len() - 1)
            .sum()
    };
    let n_targets: Vec<usize> = batches.lines().map(n_targets).collect();
    assert_eq!(n_targets.len(), 5);
    let serve = [&always[..], &["--serve"]].concat();
    let served = place.run_with_input("translate", &serve, "steps 2\nsteps 3\n");
    let answers: Vec<Value> = (served.stdout.lines())
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    assert_eq!(answers[0]["contender"], "emberlm");
    let served: Vec<usize> = answers[1..]
        .iter()
        .flat_map(|answer| answer["target_tokens"].as_array().expect("a list"))
        .map(|n| n.as_u64().expect("a count") as usize)
        .collect();
    assert_eq!(served, n_targets);
    place
        .run_with_input("translate", &serve, "steps many\n")
        .assert_refused(&["not a command: steps many"]);
}

#[test]
fn bad_input_is_one_line() {
    let place = place();
    place.write("no-tab.tsv", "a\tb\nc\n");
    place.write("empty-side.tsv", "a\tb\n\tc\n");
    place.write(
        "large.json",
        TINY.replace(r#""d_model": 16"#, r#""d_model": 16, "vocab_size": 100"#),
    );
    place.write("positions.json", TINY.replace("60", "4"));
    for (args, mention) in [
        (&["--pairs", "no-tab.tsv"][..], "no-tab.tsv, line 2: no tab"),
        (
            &["--pairs", "empty-side.tsv"],
            "empty-side.tsv, line 2: the source is empty",
        ),
        (&["--pairs", "missing.tsv"], "missing.tsv"),
        (&["--tokenizer", "bytes"], "<begin>"),
        (
            &[
                "--config",
                "large.json",
                "--tokenizer",
                "bpe:270",
                "--held-out",
                "8",
                "--pairs",
                "pairs.tsv",
            ],
            "model.vocab_size is 100",
        ),
        (
            &[
                "--config",
                "positions.json",
                "--tokenizer",
                "bpe:270",
                "--held-out",
                "8",
                "--pairs",
                "pairs.tsv",
            ],
            "raise max_seq_length",
        ),
        (
            &["--pairs", "pairs.tsv", "--held-out", "64"],
            "64 of 64 pairs cannot be held out",
        ),
        (&["--beam", "0"], "n_beams must be at least 1"),
    ] {
        place.refuses("translate", &[args, &["--out", "run"]].concat(), &[mention]);
    }
    place.refuses(
        "translate",
        &["--run", "missing", "text"],
        &["missing holds no run"],
    );

    trained(&place, "run", "2");
    place.refuses(
        "translate",
        &["--run", "run", "a", "--beam", "0"],
        &["n_beams"],
    );
    let long = "word ".repeat(60);
    place.refuses(
        "translate",
        &["--run", "run", &long],
        &["positions for 60", "shorter"],
    );
    place
        .run_with_input("translate", &["--run", "run"], &format!("a\n{long}\n"))
        .assert_refused(&["line 2: the text has"]);
    let tokenizer = place.path("run/tokenizer.json");
    let other = place.succeeds(
        "translate",
        &new_run("other", &["--steps", "1", "--hold-out", "books"]),
    );
    assert!(other.stdout.contains("run: other"));
    fs::copy(place.path("other/tokenizer.json"), tokenizer).expect("writable");
    place.refuses(
        "translate",
        &["--run", "run", "a"],
        &["not the tokenizer that the run began with"],
    );
}
