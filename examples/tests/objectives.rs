//! Runs on hidden tokens and on spans: trained, continued, used, and refused where they are none.

mod common;

use std::fs;

use common::{CONFIG, Place, SMALL, TEXT, assert_same, words};
use emberlm::{core::RandomKey, training::RunFolder};
use serde_json::Value;

const MASKED: [&str; 2] = ["--objective", "masked"];
const SPANS: [&str; 4] = ["--objective", "spans", "--config", "spans.json"];

/// A place where the config for spans is too.
fn place() -> Place {
    let place = Place::new();
    let layers = r#""n_encoder_layers": 1, "n_decoder_layers": 1"#;
    place.write("spans.json", SMALL.replace(r#""n_layers": 1"#, layers));
    place
}

fn arguments<'a>(run: &'a str, objective: &[&'a str]) -> Vec<&'a str> {
    let config: &[&str] = match objective.contains(&"--config") {
        true => &[],
        false => &["--config", CONFIG],
    };
    [&["--out", run, "--text", TEXT], config, objective].concat()
}

fn json(place: &Place, file: &str) -> Value {
    let text = fs::read_to_string(place.path(file)).expect("it was written");
    serde_json::from_str(&text).expect("JSON")
}

#[test]
fn runs_of_every_objective_go_on_exactly() {
    let place = place();
    place.write("more.txt", words(300));
    let bpe = ["--tokenizer", "bpe:400", "--cache", "cache"];
    let documents = ["--documents", "--text", "more.txt"];
    let cases = [
        ("masked", MASKED.to_vec()),
        ("spans", SPANS.to_vec()),
        ("masked-bpe", [&MASKED[..], &bpe, &documents].concat()),
        ("spans-bpe", [&SPANS[..], &bpe].concat()),
        ("packed", documents.to_vec()),
    ];
    for (run, objective) in cases {
        let ended = place.succeeds("pretrain", &arguments(run, &objective));
        assert_eq!(ended.stderr, "");
        let cut = format!("{run}-cut");
        place.copy(run, &cut);
        for step in [35, 40] {
            let checkpoint = format!("{cut}/{}/step-{step:08}", RunFolder::CHECKPOINTS);
            // The best by validation may be one of them.
            fs::remove_dir_all(place.path(&checkpoint)).expect("a checkpoint");
        }
        let resume = ["--resume", &cut, "--cache", "cache"];
        let ended = place.succeeds("pretrain", &resume);
        assert!(
            ended.stdout.contains("\nresuming after step 30\n"),
            "{ended:?}"
        );
        assert_same(&place.path(&cut), &place.path(run));
    }
}

#[test]
fn a_run_says_what_it_is() {
    let place = place();
    place.succeeds("pretrain", &arguments("causal", &[]));
    let masked = place.succeeds("pretrain", &arguments("masked", &MASKED));
    let spans = place.succeeds("pretrain", &arguments("spans", &SPANS));
    assert!(
        masked
            .stdout
            .contains(" parameters, objective masked; 40 steps"),
        "{masked:?}"
    );
    for (run, architecture, vocab_size) in [
        ("causal", "Decoder", 256),
        ("masked", "Encoder", 258),
        ("spans", "EncoderDecoder", 358),
    ] {
        let config = json(&place, &format!("{run}/config.json"));
        assert_eq!(config["model"]["architecture"], architecture);
        assert_eq!(config["model"]["vocab_size"], vocab_size);
    }
    let config = json(&place, "masked/config.json");
    assert_eq!(config["objective"]["Masked"]["mask_token"], 257);

    let report = json(&place, "masked/report.json");
    let accuracy = |key: &str| report[key].as_f64().expect("a share");
    let line = format!(
        "masked accuracy: {:.1} % of ",
        100.0 * accuracy("masked_accuracy")
    );
    assert!(masked.stdout.contains(&line), "no {line:?} in {masked:?}");
    let line = format!(
        "a table of counts by neighbours finds {:.1} %\n",
        100.0 * accuracy("neighbour_accuracy")
    );
    assert!(masked.stdout.contains(&line), "no {line:?} in {masked:?}");
    assert!(accuracy("neighbour_accuracy") > 0.05);
    assert_eq!(report["bits_per_byte"], Value::Null);
    let report = json(&place, "spans/report.json");
    assert_eq!(report.get("masked_accuracy"), None);
    for ended in [&masked, &spans] {
        let shown = ended.stdout.split("--- the model ").collect::<Vec<_>>();
        assert_eq!(shown.len(), 3, "{ended:?}");
        assert!(shown[1].starts_with("reads ---\n") && shown[2].starts_with("says ---\n"));
    }
    assert!(masked.stdout.contains("<mask>"));
    assert!(spans.stdout.contains("<extra_id_0>"));
}

#[test]
fn a_masked_model_learns_more_than_the_table() {
    let place = place();
    // Two letters on each side of a hidden one tell more than one does.
    let vocabulary = [
        "candle", "cradle", "handle", "middle", "saddle", "ladle", "bundle", "needle", "paddle",
        "riddle", "meddle", "puddle",
    ];
    let key = RandomKey::new(3);
    let text: Vec<&str> = (0..4000)
        .map(|i| vocabulary[key.below(i, 12) as usize])
        .collect();
    place.write("few.txt", text.join(" "));
    let config = r#"{
        "model": {"n_layers": 2, "d_model": 32, "n_heads": 4},
        "objective": {"rate": 0.2},
        "training": {"steps": 500, "batch_size": 16, "seq_length": 32, "learning_rate": 3e-3,
                     "validate_every": 500, "validation_windows": 4}
    }"#;
    place.write("wider.json", config);
    let args = [
        "--config",
        "wider.json",
        "--text",
        "few.txt",
        "--out",
        "run",
    ];
    place.succeeds("pretrain", &[&args, &MASKED[..]].concat());
    let report = json(&place, "run/report.json");
    let accuracy = |key: &str| report[key].as_f64().expect("a share");
    let [model, table] = ["masked_accuracy", "neighbour_accuracy"].map(accuracy);
    assert!(model > table + 0.05, "{model} and {table}");
    assert_eq!(
        json(&place, "run/config.json")["objective"]["Masked"]["rate"],
        0.2
    );
}

#[test]
fn runs_from_before_there_were_objectives_are_read() {
    let place = place();
    place.pretrain("run", &[]);
    let path = place.path("run").join(RunFolder::CONFIG);
    let mut config = json(&place, "run/config.json");
    let fields = config.as_object_mut().expect("an object");
    fields.remove("objective").expect("it was there");
    fields.remove("within_documents").expect("it was there");
    let model = fields["model"].as_object_mut().expect("an object");
    model.remove("architecture").expect("it was there");
    fs::write(&path, config.to_string()).expect("writable");
    place.succeeds("generate", &["--run", "run", "--prompt", "tea"]);
    place.succeeds("pretrain", &["--resume", "run", "--steps", "45"]);
    assert_eq!(json(&place, "run/config.json")["objective"], "Causal");
}

/// The completions that `fill` prints: their probabilities in percent, and their texts.
fn fill(place: &Place, run: &str, args: &[&str]) -> Vec<(f64, String)> {
    let ended = place.succeeds("fill", &[&["--run", run], args].concat());
    let lines = ended.stdout.split_inclusive(" %  ").count();
    assert!(lines > 1, "{ended:?}");
    let mut completions = Vec::new();
    for line in ended.stdout.lines() {
        let Some((percent, text)) = line.split_once(" %  ") else {
            // A completion of bytes may hold a line end.
            continue;
        };
        completions.push((percent.trim().parse().expect("a number"), text.to_owned()));
    }
    completions
}

#[test]
fn sentences_are_completed() {
    let place = place();
    let bpe = ["--tokenizer", "bpe:400", "--cache", "cache"];
    place.succeeds("pretrain", &arguments("masked", &MASKED));
    place.succeeds(
        "pretrain",
        &arguments("masked-bpe", &[&MASKED[..], &bpe].concat()),
    );
    place.succeeds("pretrain", &arguments("spans", &SPANS));
    for run in ["masked", "masked-bpe", "spans"] {
        for sentence in ["tea ____ note", "tea <mask> note"] {
            let args = [sentence, "--tokens", "2", "--best", "3"];
            let found = fill(&place, run, &args);
            assert_eq!(found.len(), 3, "{run}: {found:?}");
            assert!(found.is_sorted_by(|a, b| a.0 >= b.0), "{run}: {found:?}");
            for (percent, text) in &found {
                assert!((0.0..=100.0).contains(percent), "{run}: {found:?}");
                assert!(text.starts_with("tea"), "{run}: {found:?}");
            }
        }
        // Twice the same.
        let args = ["____ or ____", "--tokens", "1"];
        assert_eq!(fill(&place, run, &args), fill(&place, run, &args));
    }
    // A byte each, and nothing else.
    for (_, text) in fill(&place, "masked", &["tea____note", "--tokens", "3"]) {
        assert!(
            text.starts_with("tea") && text.ends_with("note"),
            "{text:?}"
        );
    }
}

#[test]
fn a_text_is_evaluated_in_windows() {
    let place = place();
    place.pretrain("run", &[]);
    let text = words(2000);
    let held_out = &text[text.len() - text.len() / 10..];
    place.write("held-out.txt", held_out);
    let evaluate = |args: &[&str]| {
        let always = ["--run", "run", "--text", "held-out.txt", "--json"];
        let ended = place.succeeds("evaluate", &[&always[..], args].concat());
        let figures: Value = serde_json::from_str(&ended.stdout).expect("JSON");
        figures
    };
    // Windows side by side are those of the report.
    let report = json(&place, "run/report.json");
    let figures = evaluate(&["--stride", "16", "--batch-size", "4"]);
    assert_eq!(figures["window"], 16);
    assert_eq!(figures["tokens"], held_out.len() - 1);
    assert_eq!(figures["bytes"], held_out.len() - 1);
    for (ours, theirs) in [("loss", "valid_loss"), ("bits_per_byte", "bits_per_byte")] {
        let [ours, theirs] =
            [&figures[ours], &report[theirs]].map(|x| x.as_f64().expect("a number"));
        assert!((ours - theirs).abs() < 1e-6, "{ours} and {theirs}");
    }
    let half = evaluate(&[]);
    assert_eq!(half["stride"], 8);
    assert_eq!(half["tokens"], figures["tokens"]);
    let number = |figures: &Value, key: &str| figures[key].as_f64().expect("a number");
    assert!(number(&half, "loss") != number(&figures, "loss"));
    let perplexity = number(&half, "loss").exp();
    assert!((number(&half, "perplexity") - perplexity).abs() < 1e-9);
    let ended = place.succeeds("evaluate", &["--run", "run", "--text", "held-out.txt"]);
    let line = format!(
        "loss {:.4} nats per token, perplexity ",
        number(&half, "loss")
    );
    assert!(ended.stdout.contains(&line), "no {line:?} in {ended:?}");
}

#[test]
fn a_text_is_evaluated_in_the_tokens_of_the_run() {
    let place = place();
    place.pretrain("run", &["--tokenizer", "bpe:300", "--cache", "cache"]);
    // Larger than what is tokenised at once.
    place.write("long.txt", words(20_000));
    let args = [
        "--run", "run", "--text", "long.txt", "--stride", "16", "--json",
    ];
    let ended = place.succeeds("evaluate", &args);
    let figures: Value = serde_json::from_str(&ended.stdout).expect("JSON");
    let tokenizer = emberlm::text::Tokenizer::load(place.path("run/tokenizer.json"));
    let tokens = tokenizer.expect("the run's").encode(&words(20_000));
    assert_eq!(figures["tokens"], tokens.len() - 1);
    let number = |key: &str| figures[key].as_f64().expect("a number");
    let bits = number("loss") * number("tokens") / 2f64.ln() / number("bytes");
    assert!((number("bits_per_byte") - bits).abs() < 1e-9);
    assert!(number("bytes") < words(20_000).len() as f64);
}

#[test]
fn objectives_that_are_none_for_the_model() {
    let place = place();
    let plain = emberlm::text::BpeTraining::new(300);
    let corpus = emberlm::text::Corpus::open(&[place.path(TEXT)]).expect("a text");
    let plain = plain
        .train(&corpus.training(), |_| ())
        .expect("long enough");
    plain.save(place.path("plain.json")).expect("writable");
    for (args, mentions) in [
        (
            &["--preset", "tiny", "--objective", "masked"][..],
            [
                "objective masked is none for the model Decoder",
                "--preset bert-tiny",
            ],
        ),
        (
            &["--preset", "bert-tiny", "--objective", "causal"],
            [
                "objective causal is none for the model Encoder",
                "--preset tiny",
            ],
        ),
        (
            &["--objective", "spans", "--documents"],
            ["--documents", "spans cannot"],
        ),
        (
            &["--objective", "masked", "--tokenizer", "plain.json"],
            ["no <mask>", "objective masked needs"],
        ),
        (
            &[
                "--objective",
                "spans",
                "--tokenizer",
                "bpe:300",
                "--cache",
                "cache",
            ],
            ["a vocabulary of 300", "choose 358 to"],
        ),
    ] {
        let always = ["--text", TEXT, "--out", "run"];
        place.refuses("pretrain", &[&always, args].concat(), &mentions);
    }
    for (fields, mention) in [
        (r#""rate": 0"#, "objective.rate must be above 0"),
        (r#""rate": "half""#, "objective.rate"),
        (
            r#""mask_token": 300"#,
            "objective.mask_token is 300, but the model has 258",
        ),
        (r#""mask": 300"#, "no field objective.mask"),
    ] {
        place.write("bad.json", format!(r#"{{"objective": {{{fields}}}}}"#));
        let args = ["--config", "bad.json", "--text", TEXT, "--out", "run"];
        place.refuses("pretrain", &[&args, &MASKED[..]].concat(), &[mention]);
    }
}

#[test]
fn runs_that_cannot_do_what_is_asked() {
    let place = place();
    place.pretrain("causal", &[]);
    place.succeeds("pretrain", &arguments("masked", &MASKED));
    place.succeeds("pretrain", &arguments("spans", &SPANS));
    place.write("short.txt", "a");
    place.write("empty.txt", "");
    place.write("latin1.txt", b"caf\xe9");
    for run in ["masked", "spans"] {
        let mentions = [run, "was trained with objective", "use fill"];
        place.refuses("generate", &["--run", run, "--prompt", "a"], &mentions);
        place.refuses("evaluate", &["--run", run, "--text", TEXT], &mentions);
        let args = ["--run", run, "no hole"];
        place.refuses("fill", &args, &["no hole", "write ____"]);
    }
    let mentions = ["causal was trained with objective causal", "use generate"];
    place.refuses("fill", &["--run", "causal", "a ____"], &mentions);
    for run in ["missing", TEXT] {
        let mentions = ["holds no run", "give the folder that"];
        place.refuses("fill", &["--run", run, "a ____"], &mentions);
        place.refuses("evaluate", &["--run", run, "--text", TEXT], &mentions);
    }
    place.write(
        "learned.json",
        SMALL.replace(
            r#""n_layers": 1"#,
            r#""n_layers": 1, "positions": {"Learned": {"max_seq_length": 16}}"#,
        ),
    );
    let args = [&MASKED[..], &["--config", "learned.json"]].concat();
    place.succeeds("pretrain", &arguments("learned", &args));
    let args = ["--run", "learned", "a sentence that is long ____"];
    place.refuses("fill", &args, &["16 positions", "shorten it"]);
    for (args, mentions) in [
        (
            &["--text", TEXT, "--stride", "0"][..],
            ["--stride 0", "choose 1 to 16"],
        ),
        (
            &["--text", TEXT, "--stride", "17"],
            ["--stride 17", "choose 1 to 16"],
        ),
        (
            &["--text", TEXT, "--window", "0"],
            ["--window 0", "choose 1 to 256"],
        ),
        (
            &["--text", TEXT, "--window", "257"],
            ["--window 257", "choose 1 to 256"],
        ),
        (
            &["--text", "short.txt"],
            ["the text has 1 tokens", "at least 2"],
        ),
        (
            &["--text", "empty.txt"],
            ["the text has 0 tokens", "at least 2"],
        ),
        (
            &["--text", "missing.txt"],
            ["missing.txt does not exist", "check the path"],
        ),
        (
            &["--text", "latin1.txt"],
            ["latin1.txt is not UTF-8", "convert it"],
        ),
    ] {
        let args = [&["--run", "causal"], args].concat();
        place.refuses("evaluate", &args, &mentions);
    }
    for (args, mention) in [
        (["--objective", "causal"], "objective is masked in the run"),
        (
            ["--preset", "tiny"],
            "model.architecture is Encoder in the run",
        ),
    ] {
        place.refuses(
            "pretrain",
            &[&["--resume", "masked"], &args[..]].concat(),
            &[mention],
        );
    }
    let args = ["--resume", "causal", "--documents"];
    place.refuses(
        "pretrain",
        &args,
        &["documents is false in the run", "true was asked for"],
    );
}
