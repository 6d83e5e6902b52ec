//! Bad input ends with exit code 2 and one line that names cause and fix; nothing is created or changed.

mod common;

use std::fs;

use common::{CONFIG, Place, TEXT};
use emberlm::training::RunFolder;

/// Arguments of a training in the new folder `run`, which must not appear.
fn refuses_to_train(place: &Place, args: &[&str], mentions: &[&str]) {
    place.refuses("pretrain", &[&["--out", "run"], args].concat(), mentions);
}

#[test]
fn text_that_cannot_be_used() {
    let place = Place::new();
    place.write("empty.txt", "");
    place.write("latin1.txt", b"It is a caf\xe9 in Bath");
    place.write("pictures/a.png", [0x89]);
    place.write("mixed/good.txt", "It is a truth");
    place.write("mixed/bad.md", b"# \xff");
    // Its last tenth has four bytes.
    place.write("short.txt", "It is a truth universally acknowledged...");
    for (text, mentions) in [
        (
            "missing.txt",
            ["missing.txt does not exist", "check the path"],
        ),
        ("empty.txt", ["empty.txt is empty", "name a file with text"]),
        (
            "latin1.txt",
            ["latin1.txt is not UTF-8 at byte 11", "convert it"],
        ),
        (
            "pictures",
            ["pictures has no .txt or .md file", "name another folder"],
        ),
        ("mixed", ["bad.md is not UTF-8 at byte 2", "convert it"]),
        (
            "short.txt",
            ["the held-out text has 4 bytes", "shorter --seq-length"],
        ),
        #[cfg(unix)]
        (
            "/dev/null",
            ["/dev/null is neither a file nor a folder", "save the text"],
        ),
    ] {
        refuses_to_train(&place, &["--config", CONFIG, "--text", text], &mentions);
    }
    // A good one does not make up for a bad one.
    let args = ["--config", CONFIG, "--text", TEXT, "--text", "missing.txt"];
    refuses_to_train(&place, &args, &["missing.txt"]);
}

#[test]
fn options_that_are_impossible() {
    let place = Place::new();
    for (args, mentions) in [
        (
            ["--seq-length", "100000000"],
            ["a sequence of 100000000", "--seq-length"],
        ),
        (["--seq-length", "0"], ["seq_length", "at least 1"]),
        (["--steps", "0"], ["training.steps", "at least 1"]),
        (["--batch-size", "0"], ["training.batch_size", "at least 1"]),
        (
            ["--checkpoint-every", "0"],
            ["training.checkpoint_every", "at least 1"],
        ),
        (
            ["--batch-size", "3"],
            ["training.accumulation", "divisor of batch_size"],
        ),
        (
            ["--report", "missing/report.json"],
            ["missing/report.json", "a folder that exists"],
        ),
        (["--report", "."], ["--report .", "give a file"]),
    ] {
        let always = ["--config", CONFIG, "--text", TEXT];
        refuses_to_train(&place, &[&always[..], &args].concat(), &mentions);
    }
}

#[test]
fn options_that_the_parser_refuses() {
    let place = Place::new();
    place.pretrain("done", &[]);
    let before = place.files();
    for (args, mention) in [
        (&["--out", "run", "--nonsense"][..], "--nonsense"),
        (&["--out", "run", "--resume", "done"], "--resume"),
        (&["--out", "run", "--preset", "huge"], "huge"),
        (&["--out", "run", "--steps", "many"], "many"),
        (&["--out", "run", "--seed", "-1"], "-1"),
    ] {
        let ended = place.run("pretrain", args);
        assert_eq!(ended.code(), Some(2), "{ended:?}");
        assert!(ended.stderr.starts_with("error: "), "{ended:?}");
        assert!(ended.stderr.contains(mention), "{ended:?}");
        assert!(!ended.stderr.contains("panicked"), "{ended:?}");
        assert!(
            place.files() == before,
            "{args:?} created or changed something"
        );
    }
}

#[test]
fn devices_that_are_not_there() {
    let place = Place::new();
    place.pretrain("done", &[]);
    let not_compiled_in = if cfg!(feature = "cuda") {
        "rocm"
    } else {
        "cuda"
    };
    let backend = if cfg!(feature = "flex") {
        "flex"
    } else {
        "ndarray"
    };
    let [ninth, no_number] = ["9", "x"].map(|number| format!("{backend}:{number}"));
    for (device, mentions) in [
        (&*ninth, [&*ninth, "does not exist"]),
        (&no_number, [&no_number, "NAME:NUMBER"]),
        (not_compiled_in, [not_compiled_in, "not compiled in"]),
        ("tpu", ["tpu", "not compiled in"]),
    ] {
        refuses_to_train(&place, &["--device", device, "--text", TEXT], &mentions);
        place.refuses(
            "pretrain",
            &["--resume", "done", "--device", device],
            &mentions,
        );
        let args = ["--run", "done", "--prompt", "a", "--device", device];
        place.refuses("generate", &args, &mentions);
    }
}

#[test]
fn configurations_that_are_none() {
    let place = Place::new();
    for (content, mentions) in [
        ("", ["bad.json is empty", "JSON object"]),
        (" \n", ["bad.json is empty", "JSON object"]),
        ("{", ["bad.json", "not JSON"]),
        ("[]", ["bad.json", "expected an object"]),
        ("{\"model\": 3}", ["model", "expected an object"]),
        ("{\"modell\": {}}", ["no field modell", "model, training"]),
        (
            "{\"model\": {\"n_layer\": 3}}",
            ["no field model.n_layer", "n_layers"],
        ),
        (
            "{\"training\": {\"lr\": 3}}",
            ["no field training.lr", "learning_rate"],
        ),
        (
            "{\"training\": {\"steps\": \"many\"}}",
            ["training.steps", "many"],
        ),
        ("{\"training\": {\"steps\": -1}}", ["training.steps", "-1"]),
        (
            "{\"model\": {\"d_model\": 12.5}}",
            ["model.d_model", "12.5"],
        ),
        (
            "{\"model\": {\"activation\": \"Swoosh\"}}",
            ["model.activation", "Swoosh"],
        ),
        (
            "{\"model\": {\"positions\": {\"Learned\": {}}}}",
            ["model.positions", "max_seq_length"],
        ),
    ] {
        place.write("bad.json", content);
        refuses_to_train(&place, &["--config", "bad.json", "--text", TEXT], &mentions);
    }
    let args = ["--config", "missing.json", "--text", TEXT];
    refuses_to_train(&place, &args, &["missing.json"]);
    refuses_to_train(&place, &["--config", ".", "--text", TEXT], &[".: "]);
}

#[test]
fn sizes_and_numbers_that_are_impossible() {
    let place = Place::new();
    for (fields, mention) in [
        (r#""n_heads": 3"#, "model.n_heads must divide d_model"),
        (r#""n_heads": 0"#, "model.n_heads must be at least 1"),
        (r#""n_kv_heads": 3"#, "model.n_kv_heads must divide n_heads"),
        (r#""n_layers": 0"#, "model.n_layers must be at least 1"),
        (r#""d_model": 0"#, "model.d_model must be at least 1"),
        (r#""d_ff": 0"#, "model.d_ff must be at least 1"),
        (r#""pattern": "documents""#, "model.pattern: "),
        (
            r#""pattern": {"strided": {"merged": {"stride": 0}}}"#,
            "model.pattern: ",
        ),
        (
            r#""pattern": {"global": {"positions": [100000]}}"#,
            "model.pattern: ",
        ),
        (r#""d_model": 4000000000"#, "model.d_model is too large"),
        (
            r#""dropout": 1.0"#,
            "model.dropout must be at least 0 and below 1",
        ),
        (
            r#""vocab_size": 100"#,
            "model.vocab_size is 100, but the tokenizer has 256 tokens",
        ),
        (
            r#""positions": {"Learned": {"max_seq_length": 8}}"#,
            "raise max_seq_length",
        ),
    ] {
        place.write("bad.json", format!(r#"{{"model": {{{fields}}}}}"#));
        refuses_to_train(
            &place,
            &["--config", "bad.json", "--text", TEXT],
            &[mention],
        );
    }
    for (fields, mention) in [
        (
            r#""accumulation": 0"#,
            "training.accumulation must be at least 1",
        ),
        (
            r#""learning_rate": 0"#,
            "training.learning_rate must be a number above 0",
        ),
        (
            r#""weight_decay": -0.1"#,
            "training.weight_decay must be a number of at least 0",
        ),
        (
            r#""beta_2": 1.0"#,
            "training.beta_2 must be at least 0 and below 1",
        ),
        (
            r#""validate_every": 0"#,
            "training.validate_every must be at least 1",
        ),
        (
            r#""validation_windows": 0"#,
            "training.validation_windows must be at least 1",
        ),
    ] {
        place.write("bad.json", format!(r#"{{"training": {{{fields}}}}}"#));
        refuses_to_train(
            &place,
            &["--config", "bad.json", "--text", TEXT],
            &[mention],
        );
    }
}

#[test]
fn folders_that_hold_something_else() {
    let place = Place::new();
    place.write("full/thesis.txt", "years of work");
    place.write("none/notes.txt", "no run");
    let train = |out| ["--config", CONFIG, "--text", TEXT, "--out", out];
    place.refuses(
        "pretrain",
        &train("full"),
        &["full is not empty", "--resume"],
    );
    place.refuses("pretrain", &train(TEXT), &["text.txt is not a folder"]);
    place.refuses(
        "pretrain",
        &train("text.txt/run"),
        &["text.txt/run is not a folder"],
    );
    for (run, mention) in [
        (TEXT, "text.txt is not a folder"),
        ("missing", "missing is not a folder"),
        ("none", "none holds no run"),
    ] {
        let fix = "give the folder that";
        place.refuses("pretrain", &["--resume", run], &[mention, fix]);
        place.refuses("compare", &[run], &[mention, fix]);
        place.refuses(
            "generate",
            &["--run", run, "--prompt", "a"],
            &[run, "holds no run", fix],
        );
    }
}

#[test]
fn options_that_contradict_the_run() {
    let place = Place::new();
    place.pretrain("run", &[]);
    place.write("other.txt", common::words(500));
    place.write(
        "wide.json",
        common::SMALL.replace(r#""d_model": 16"#, r#""d_model": 32"#),
    );
    place.write("empty.json", "");
    for (args, mentions) in [
        (["--seed", "7"], ["seed is 0 in the run", "7 was asked for"]),
        (
            ["--batch-size", "8"],
            ["training.batch_size is 4", "8 was asked for"],
        ),
        (
            ["--seq-length", "8"],
            ["training.seq_length is 16", "8 was asked for"],
        ),
        (
            ["--preset", "small"],
            ["model.d_model is 16", "384 was asked for"],
        ),
        (
            ["--config", "wide.json"],
            ["model.d_model is 16", "32 was asked for"],
        ),
        (
            ["--config", "empty.json"],
            ["empty.json is empty", "JSON object"],
        ),
        (
            ["--text", "other.txt"],
            ["other.txt is not the text the run began with", "same text"],
        ),
        (
            ["--steps", "39"],
            ["has done 40 steps already", "--steps 39"],
        ),
    ] {
        place.refuses(
            "pretrain",
            &[&["--resume", "run"], &args[..]].concat(),
            &mentions,
        );
    }
    // What agrees with the run may be said again.
    let same = [
        "--config",
        CONFIG,
        "--text",
        TEXT,
        "--batch-size",
        "4",
        "--seed",
        "0",
    ];
    place.succeeds("pretrain", &[&["--resume", "run"], &same[..]].concat());
}

#[test]
fn text_that_changed_since() {
    let place = Place::new();
    place.pretrain("run", &[]);
    let text = common::words(2000);
    for changed in [text.replacen('a', "o", 1), text.clone() + "The end.\n"] {
        assert_ne!(changed, text);
        place.write(TEXT, changed);
        let mentions = ["text.txt is not the text the run began with"];
        place.refuses("pretrain", &["--resume", "run"], &mentions);
    }
    fs::remove_file(place.path(TEXT)).expect("it is there");
    place.refuses(
        "pretrain",
        &["--resume", "run"],
        &["text.txt does not exist"],
    );
    place.write(TEXT, text);
    place.succeeds("pretrain", &["--resume", "run"]);
}

#[test]
fn a_run_with_a_damaged_configuration() {
    let place = Place::new();
    place.pretrain("run", &[]);
    let path = place.path("run").join(RunFolder::CONFIG);
    let three_heads = fs::read_to_string(&path).expect("it has a configuration");
    let three_heads = three_heads.replace(r#""n_heads": 2"#, r#""n_heads": 3"#);
    let generate = ["--run", "run", "--prompt", "a"];
    for (content, mention) in [
        ("", "is empty"),
        ("{}", "missing field"),
        ("{", "not JSON"),
        (&three_heads, "n_heads must divide d_model"),
    ] {
        fs::write(&path, content).expect("writable");
        place.refuses("pretrain", &["--resume", "run"], &[mention]);
        place.refuses("generate", &generate, &[]);
    }
    // Without weights the model comes from a checkpoint.
    fs::remove_file(place.path("run").join(RunFolder::WEIGHTS)).expect("it has weights");
    place.refuses("generate", &generate, &["n_heads must divide d_model"]);
}

#[test]
fn a_run_with_damaged_weights_or_figures() {
    let place = Place::new();
    place.pretrain("run", &[]);
    let weights = place.path("run").join(RunFolder::WEIGHTS);
    let half = fs::read(&weights).expect("it has weights");
    fs::write(&weights, &half[..half.len() / 2]).expect("writable");
    place.refuses(
        "generate",
        &["--run", "run", "--prompt", "a"],
        &["model.safetensors"],
    );

    let log = place.path("run").join("metrics.jsonl");
    let lines = fs::read_to_string(&log).expect("it has figures");
    fs::write(&log, lines.replacen("\"step\":3", "\"step\":x", 1)).expect("writable");
    let mentions = ["metrics.jsonl is damaged in line 3", "remove that line"];
    place.refuses("compare", &["run"], &mentions);
    place.refuses("pretrain", &["--resume", "run"], &mentions);
}

#[test]
fn sampling_that_is_impossible() {
    let place = Place::new();
    place.pretrain("run", &[]);
    for (args, mention) in [
        (["--prompt", ""], "the prompt is empty"),
        (["--temperature=-1", "--prompt=a"], "temperature is -1"),
        (["--temperature=nan", "--prompt=a"], "temperature is NaN"),
        (["--top-k=0", "--prompt=a"], "top_k is 0"),
        (["--top-p=1.5", "--prompt=a"], "top_p is 1.5"),
        (["--min-p=2", "--prompt=a"], "min_p is 2"),
        (
            ["--repetition-penalty=0", "--prompt=a"],
            "repetition_penalty is 0",
        ),
        (["--stop=", "--prompt=a"], "stop string 0 is empty"),
    ] {
        place.refuses(
            "generate",
            &[&["--run", "run"], &args[..]].concat(),
            &[mention],
        );
    }
}

#[test]
fn a_plot_that_cannot_be_drawn() {
    let place = Place::new();
    place.pretrain("run", &[]);
    place.refuses(
        "compare",
        &["run", "--out", "missing/plot"],
        &["missing", "make that folder"],
    );
    place.refuses("compare", &["run", "missing"], &["missing is not a folder"]);
}

#[test]
fn no_steps() {
    Place::new().refuses("burn_nn", &["--steps", "0"], &["--steps"]);
}

#[test]
fn patterns_that_are_none() {
    let place = Place::new();
    for (args, mentions) in [
        (["windwo:4", "--seq", "8"], ["\"windwo:4\" is no pattern"]),
        (["strided:0", "--seq", "8"], ["strided:0"]),
        (["global:9", "--seq", "8"], ["global"]),
        (["documents", "--seq", "8"], ["documents"]),
        (["causal", "--seq", "0"], ["--seq 0"]),
        (["causal", "--head", "1"], ["--head 1"]),
    ] {
        place.refuses("pattern", &args, &mentions);
    }
}
