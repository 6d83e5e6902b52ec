//! Runs on tokens of more than a byte.

mod common;

use std::{fs, path::PathBuf};

use common::{CONFIG, Place, SMALL, TEXT, assert_same, new_run};
use emberlm::{
    text::{TokenFile, Tokenizer},
    training::RunFolder,
};
use serde_json::Value;

const BPE: [&str; 4] = ["--tokenizer", "bpe:300", "--cache", "cache"];

fn json(path: PathBuf) -> Value {
    serde_json::from_slice(&fs::read(path).expect("it was written")).expect("JSON")
}

/// The token file in the cache, which holds one, and the lock.
fn token_file(place: &Place) -> PathBuf {
    let entries = fs::read_dir(place.path("cache")).expect("the cache");
    let files = entries.map(|entry| entry.expect("readable").path());
    let mut files = files.filter(|path| path.extension().is_some());
    let file = files.next().expect("a token file");
    assert_eq!(files.next(), None);
    file
}

#[test]
fn a_run_keeps_its_tokenizer_and_generates_with_it() {
    let place = Place::new();
    let ended = place.pretrain("run", &BPE);
    assert_eq!(ended.stderr, "");
    let run = place.path("run");
    let tokenizer = Tokenizer::load(run.join(Tokenizer::FILE_NAME)).expect("the run's");
    assert_eq!(tokenizer.vocab_size(), 300);
    let config = json(run.join(RunFolder::CONFIG));
    assert_eq!(config["model"]["vocab_size"], 300);
    assert_eq!(config["tokenizer"]["choice"], "bpe:300");
    assert_eq!(config["tokenizer"]["crc32"], tokenizer.crc32());

    let file = TokenFile::open(&token_file(&place)).expect("intact");
    let held_out = file.held_out();
    let bytes_per_token = held_out.bytes_per_token();
    assert!(bytes_per_token > 1.2, "{bytes_per_token}");
    let line = format!(
        "tokens: {} training and {} held-out, {bytes_per_token:.3} bytes each, of 300 in the vocabulary; written to {}",
        file.training().len(),
        held_out.len(),
        "cache/"
    );
    assert!(ended.stdout.contains(&line), "no {line:?} in {ended:?}");
    let report = json(run.join("report.json"));
    let number = |key: &str| report[key].as_f64().expect("a number");
    let bits = number("valid_loss") / 2f64.ln() / bytes_per_token;
    assert!((number("bits_per_byte") - bits).abs() < 1e-12);

    let args = ["--run", "run", "--prompt", "tea é", "--max-tokens", "20"];
    let ended = place.succeeds("generate", &args);
    assert!(ended.stdout.starts_with("tea é"), "{ended:?}");
    assert!(ended.stderr.contains("\n20 tokens in "), "{ended:?}");

    // Another run on the same text finds the tokens, and is the same run.
    let ended = place.pretrain("again", &BPE);
    assert!(ended.stdout.contains("; found in cache"), "{ended:?}");
    assert_same(&place.path("again"), &run);
    // And so is one with the tokenizer as a file.
    let file = ["--tokenizer", "run/tokenizer.json", "--cache", "cache"];
    assert!(
        place
            .pretrain("file", &file)
            .stdout
            .contains("; found in cache")
    );
    assert_same(&place.path("file"), &run);
}

#[test]
fn a_run_on_tokens_goes_on_exactly() {
    let place = Place::new();
    place.pretrain("whole", &BPE);
    place.copy("whole", "cut");
    for step in [35, 40] {
        let checkpoint = format!("cut/{}/step-{step:08}", RunFolder::CHECKPOINTS);
        fs::remove_dir_all(place.path(&checkpoint)).expect("a checkpoint");
    }
    // The cache is one that may be emptied.
    fs::remove_dir_all(place.path("cache")).expect("the cache");
    let ended = place.succeeds("pretrain", &["--resume", "cut", "--cache", "cache"]);
    assert!(
        ended.stdout.contains("\nresuming after step 30\n"),
        "{ended:?}"
    );
    assert_same(&place.path("cut"), &place.path("whole"));
    // The choice may be said again.
    place.succeeds("pretrain", &[&["--resume", "cut"], &BPE[..]].concat());
}

#[test]
fn a_damaged_cache_is_made_again_and_that_is_said() {
    let place = Place::new();
    place.pretrain("run", &BPE);
    let path = token_file(&place);
    let intact = fs::read(&path).expect("readable");
    let mut damaged = intact.clone();
    damaged[100] ^= 1;
    fs::write(&path, damaged).expect("writable");
    let ended = place.pretrain("again", &BPE);
    assert!(ended.stderr.starts_with("warning: cache/"), "{ended:?}");
    let told = "its checksum is wrong; the text was tokenised again\n";
    assert!(ended.stderr.ends_with(told), "{ended:?}");
    assert_same(&place.path("again"), &place.path("run"));
    assert!(fs::read(&path).expect("readable") == intact);
}

#[test]
fn a_model_may_know_more_tokens_but_not_fewer() {
    let place = Place::new();
    let with = |size: &str| {
        let sized = format!(r#""vocab_size": {size}, "d_model": 16"#);
        place.write(CONFIG, SMALL.replace(r#""d_model": 16"#, &sized));
    };
    with("320");
    place.pretrain("run", &BPE);
    place.pretrain("bytes", &[]);
    for run in ["run", "bytes"] {
        let config = json(place.path(run).join(RunFolder::CONFIG));
        assert_eq!(config["model"]["vocab_size"], 320);
    }
    with("299");
    let args = new_run("refused", &BPE);
    let mention = "model.vocab_size is 299, but the tokenizer has 300 tokens";
    place.refuses("pretrain", &args, &[mention, "or leave it out"]);
}

#[test]
fn text_that_is_too_short_is_counted_in_tokens() {
    let place = Place::new();
    place.write("short.txt", common::words(30));
    let args = ["--config", CONFIG, "--text", "short.txt", "--out", "run"];
    let ended = place.run("pretrain", &[&args, &BPE[..]].concat());
    ended.assert_refused(&[
        "the held-out text has ",
        " tokens, too few",
        "give more text",
    ]);
    assert!(!place.path("run").exists());
}

#[test]
fn tokenizers_that_cannot_be_used() {
    let place = Place::new();
    place.write("wrong.json", "{}");
    for (choice, mentions) in [
        ("bpe:many", ["bpe:many is neither bytes", "bpe:4096"]),
        (
            "missing.json",
            ["missing.json is neither bytes", "choose one"],
        ),
        ("bpe:100", ["a vocabulary of 100", "choose 256 to"]),
        (
            "wrong.json",
            ["wrong.json is not a byte-level BPE", "bpe:N"],
        ),
        (TEXT, ["text.txt is no tokenizer.json", ""]),
    ] {
        let args = new_run("run", &["--tokenizer", choice]);
        place.refuses("pretrain", &args, &mentions);
    }
    place.refuses(
        "pretrain",
        &new_run("run", &["--tokenizer", "bpe:300", "--cache", TEXT]),
        &["cannot write text.txt"],
    );
}

#[test]
fn tokenizers_that_are_not_the_run_s() {
    let place = Place::new();
    place.pretrain("run", &BPE);
    place.pretrain("bytes", &[]);
    Tokenizer::bytes()
        .save(place.path("bytes.json"))
        .expect("writable");
    place.succeeds(
        "pretrain",
        &["--resume", "bytes", "--tokenizer", "bytes.json"],
    );
    for (run, choice, mentions) in [
        (
            "run",
            "bytes",
            ["tokenizer is bpe:300", "bytes was asked for"],
        ),
        (
            "run",
            "bpe:400",
            ["tokenizer is bpe:300", "bpe:400 was asked for"],
        ),
        (
            "run",
            "bytes.json",
            ["tokenizer is bpe:300", "bytes.json was asked for"],
        ),
        (
            "bytes",
            "bpe:300",
            ["tokenizer is bytes", "bpe:300 was asked for"],
        ),
    ] {
        let args = ["--resume", run, "--tokenizer", choice, "--cache", "cache"];
        place.refuses("pretrain", &args, &mentions);
    }

    let path = place.path("run").join(Tokenizer::FILE_NAME);
    let refused = |mentions: &[&str]| {
        place.refuses(
            "pretrain",
            &["--resume", "run", "--cache", "cache"],
            mentions,
        );
        place.refuses("generate", &["--run", "run", "--prompt", "a"], mentions);
    };
    fs::copy(place.path("bytes.json"), &path).expect("writable");
    refused(&["run/tokenizer.json is not the tokenizer that the run began with"]);
    fs::write(&path, "{").expect("writable");
    refused(&["run/tokenizer.json is no tokenizer.json"]);
    fs::remove_file(&path).expect("it is there");
    refused(&["run/tokenizer.json does not exist"]);
}
