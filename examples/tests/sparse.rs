//! Sparse attention in the programs: trained, made of a short model, written with in bounded memory.

mod common;

use std::fs;

use common::{Place, new_run};
use serde_json::Value;

fn json(place: &Place, file: &str) -> Value {
    let text = fs::read_to_string(place.path(file)).expect("it was written");
    serde_json::from_str(&text).expect("JSON")
}

/// A place with a config of rotary positions, which have no end.
fn place() -> Place {
    let place = Place::new();
    let rotary =
        r#""n_layers": 1, "positions": {"Rotary": {"theta": 100.0, "layout": "HalfSplit"}}"#;
    place.write(
        "rotary.json",
        common::SMALL.replace(r#""n_layers": 1"#, rotary),
    );
    place
}

fn rotary<'a>(run: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let always = [
        "--config",
        "rotary.json",
        "--text",
        common::TEXT,
        "--out",
        run,
    ];
    [&always, more].concat()
}

/// The parser of the command line says how to get help too.
fn parser_refuses(place: &Place, program: &str, args: &[&str], mention: &str) {
    let before = place.files();
    let ended = place.run(program, args);
    assert_eq!(ended.code(), Some(2), "{ended:?}");
    assert!(ended.stderr.starts_with("error: "), "{ended:?}");
    assert!(ended.stderr.contains(mention), "{ended:?}");
    assert!(
        place.files() == before,
        "{args:?} created or changed something"
    );
}

#[test]
fn any_attention_can_be_trained_and_is_kept() {
    let place = place();
    for (run, pattern) in [
        ("window", "window:3:0 | sinks:1"),
        ("bigbird", "bigbird-causal:4:1"),
        ("longformer", "longformer:3:1"),
    ] {
        place.succeeds("pretrain", &new_run(run, &["--pattern", pattern]));
        // The same is asked for, and then another one.
        place.succeeds("pretrain", &["--resume", run, "--pattern", pattern]);
        let ended = place.run("pretrain", &["--resume", run, "--pattern", "window:2"]);
        ended.assert_refused(&["in the run to be resumed"]);
    }
    let model = &json(&place, "window/config.json")["model"];
    assert_eq!(model["pattern"]["or"][1]["sinks"], 1);
    let layer = &json(&place, "longformer/config.json")["model"]["layers"][0];
    assert_eq!(layer["Longformer"]["window"]["back"], 3);
}

#[test]
fn a_text_without_end_in_bounded_memory() {
    let place = place();
    let pattern = ["--pattern", "window:5:0 | sinks:1"];
    place.succeeds("pretrain", &rotary("run", &pattern));
    let generate = |more: &[&str]| {
        let always = [
            "--run",
            "run",
            "--prompt",
            "the",
            "--greedy",
            "--max-tokens",
            "300",
        ];
        place.succeeds("generate", &[&always, more].concat()).stdout
    };
    let dense = generate(&[]);
    assert_eq!(generate(&["--cache", "ring"]), dense);
    assert!(generate(&["--cache", "in-cache"]).starts_with("the"));

    let evaluate = |more: &[&str]| -> Value {
        let always = ["--run", "run", "--text", common::TEXT, "--json"];
        let ended = place.succeeds("evaluate", &[&always, more].concat());
        serde_json::from_str(&ended.stdout).expect("JSON")
    };
    let ring = evaluate(&["--cache", "ring", "--spans", "2000"]);
    let spans = ring["spans"].as_array().expect("spans");
    let sum: f64 = spans
        .iter()
        .map(|span| span["loss"].as_f64().unwrap() * span["tokens"].as_f64().unwrap())
        .sum();
    let mean = sum / ring["tokens"].as_f64().expect("a number");
    assert!((mean - ring["loss"].as_f64().unwrap()).abs() < 1e-6);
    assert!(spans.len() > 3);
    // One block sees no farther than its window, which a sliding window of this stride always holds.
    let windows = evaluate(&["--window", "16", "--stride", "8", "--pattern", "window:5:0"]);
    let ring = evaluate(&["--cache", "ring", "--pattern", "window:5:0"]);
    let [a, b] = [&windows, &ring].map(|figures| figures["loss"].as_f64().unwrap());
    assert!((a - b).abs() < 1e-4, "{a} and {b}");
}

#[test]
fn patterns_that_no_sequence_fits_are_refused() {
    let place = place();
    for (objective, pattern, mention) in [
        (
            "masked",
            "window:3 | global:batch",
            "global:batch needs global positions",
        ),
        (
            "masked",
            "window:3 | global:0,5000",
            "holds position 5000, but the sequence has",
        ),
        ("masked", "dilated:2:5000", "dilated.dilation 5000 leaves"),
        ("spans", "global:5000", "encoder_layers: global.positions"),
        ("causal", "dilated:2:5000", "dilated.dilation 5000 leaves"),
        ("causal", "window:3:0 | global:batch", "global:batch needs"),
    ] {
        let args = ["--objective", objective, "--pattern", pattern];
        let args = [&["--text", common::TEXT, "--out", "run"], &args[..]].concat();
        place.refuses("pretrain", &args, &["model", mention]);
    }
}

#[test]
fn what_has_no_bound_is_refused() {
    let place = place();
    place.succeeds("pretrain", &rotary("run", &[]));
    place.pretrain("learned", &["--pattern", "window:5:0"]);
    let prompt = ["--prompt", "the", "--cache", "ring"];
    let run = |run, more: &[&'static str]| [&["--run", run][..], &prompt, more].concat();
    place.refuses(
        "generate",
        &run("run", &[]),
        &["causal", "a ring cache needs a window"],
    );
    let bad = run("run", &["--pattern", "windwo:3"]);
    parser_refuses(&place, "generate", &bad, "windwo:3");
    let bad = run("run", &["--pattern", "random:4:1"]);
    place.refuses("generate", &bad, &["--pattern random:4:1"]);
    let bad = run("learned", &[]);
    place.refuses(
        "generate",
        &bad,
        &["learned positions", "rotary positions or ALiBi are needed"],
    );
    let evaluate = ["--run", "run", "--text", common::TEXT, "--cache"];
    let dense = [&evaluate[..], &["dense"]].concat();
    place.refuses("evaluate", &dense, &["--cache dense"]);
}

#[test]
fn a_short_encoder_becomes_a_long_one() {
    let place = Place::new();
    place.pretrain("short", &["--objective", "masked"]);
    for (run, pattern) in [("longformer", "longformer:4:1"), ("bigbird", "bigbird:4:1")] {
        let ended = place.succeeds(
            "lengthen",
            &[
                "--run",
                "short",
                "--pattern",
                pattern,
                "--steps",
                "10",
                "--out",
                run,
            ],
        );
        assert_eq!(ended.stderr, "");
        let before = " of the short model at length 16, ";
        assert!(ended.stdout.contains(before), "{ended:?}");
        assert!(ended.stdout.contains(" at length 64\n"), "{ended:?}");
        assert!(ended.stdout.contains("trained 10 steps in "), "{ended:?}");
        let config = json(&place, &format!("{run}/config.json"));
        assert_eq!(config["training"]["seq_length"], 64);
        assert_eq!(config["training"]["batch_size"], 1);
        // It goes on as any run does.
        place.succeeds("pretrain", &["--resume", run, "--steps", "12"]);
    }
}

/// A run that is killed before its first checkpoint of its own goes on from the weights that it was made of.
#[test]
fn a_long_model_is_saved_before_it_is_trained() {
    let place = Place::new();
    place.pretrain("short", &["--objective", "masked"]);
    let lengthen = [
        "--run",
        "short",
        "--pattern",
        "longformer:4:1",
        "--steps",
        "3",
    ];
    place.succeeds("lengthen", &[&lengthen[..], &["--out", "long"]].concat());
    assert!(common::checkpoints(&place.path("long")).contains(&0));
}

#[test]
fn lengthening_what_cannot_be() {
    let place = Place::new();
    place.pretrain("causal", &[]);
    place.pretrain("short", &["--objective", "masked"]);
    let refuses = |args: &[&str], mentions: &[&str]| place.refuses("lengthen", args, mentions);
    refuses(&["--run", "causal"], &["objective causal"]);
    refuses(&["--run", "nothing"], &["nothing holds no run"]);
    let bad = ["--run", "short", "--pattern", "longformer:x"];
    parser_refuses(&place, "lengthen", &bad, "longformer:x");
    let bad = ["--run", "short", "--times", "0"];
    parser_refuses(&place, "lengthen", &bad, "--times");
    refuses(
        &["--run", "short", "--times", "3000"],
        &["the training text has"],
    );
    place.write(common::TEXT, common::words(1999));
    refuses(
        &["--run", "short"],
        &["text.txt is not the text the run was trained on"],
    );
}
