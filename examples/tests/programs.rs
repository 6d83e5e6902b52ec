//! What the programs print and write when all goes well.

mod common;

use std::{collections::BTreeSet, fs, path::Path};

use burn::tensor::{Int, Tensor, TensorData, activation::log_softmax};
use common::{CONFIG, Ended, Place, SMALL, TEXT, assert_same, checkpoints, n_logged, new_run};
use emberlm::{core::CausalModel, models::load_decoder, training::RunFolder};
use emberlm_examples::choose_device;
use serde_json::{Map, Value, json};

#[test]
fn the_first_line_names_the_device() {
    let place = Place::new();
    let first = |args: &[&str]| {
        let ended = place.succeeds("pretrain", &[&["--steps", "1"], args].concat());
        ended.stdout.lines().next().map(str::to_owned)
    };
    let gpu = cfg!(any(
        feature = "cuda",
        feature = "rocm",
        feature = "metal",
        feature = "vulkan",
        feature = "webgpu",
        feature = "wgpu"
    ));
    let cpu = if cfg!(feature = "ndarray") {
        "ndarray"
    } else {
        "flex"
    };
    let default = first(&new_run("default", &[])).expect("a line");
    if gpu {
        assert!(
            default.starts_with("device: ") && !default.contains(cpu),
            "{default}"
        );
    } else {
        assert_eq!(default, format!("device: {cpu}"));
    }
    for name in [cpu.to_owned(), format!("{cpu}:0")] {
        let run = format!("on-{}", name.replace(':', "-"));
        let line = first(&new_run(&run, &["--device", &name]));
        assert_eq!(line, Some(format!("device: {name}")));
    }
}

#[test]
fn a_run_leaves_its_files() {
    let place = Place::new();
    let ended = place.pretrain("run", &["--report", "report.json"]);
    let run = place.path("run");
    let lines: Vec<&str> = ended.stdout.lines().collect();
    for beginning in [
        "step     40/40  loss ",
        "step     40/40  validation: loss ",
        "trained 40 steps in ",
    ] {
        let found = lines
            .iter()
            .filter(|line| line.starts_with(beginning))
            .count();
        assert_eq!(found, 1, "{beginning:?} in {ended:?}");
    }
    assert_eq!(lines.last(), Some(&"run: run"));
    assert_eq!(ended.stderr, "");
    // The last three, of which the last is the best by validation too.
    assert_eq!(checkpoints(&run), [30, 35, 40]);
    let png = fs::read(run.join("curves.png")).expect("it was drawn");
    assert!(png.starts_with(b"\x89PNG"));
    let svg = fs::read_to_string(run.join("curves.svg")).expect("it was drawn");
    assert!(svg.starts_with("<svg") && svg.contains("validation"));
    let config = json(&run.join(RunFolder::CONFIG));
    // As given, resolved from the preset, and where the text was.
    assert_eq!(config["model"]["d_model"], 16);
    assert_eq!(config["model"]["vocab_size"], 256);
    assert_eq!(config["training"]["steps"], 40);
    assert_eq!(config["documents"][0]["bytes"], common::words(2000).len());

    let report = json(&place.path("report.json"));
    assert_eq!(report, json(&run.join("report.json")));
    let mut keys: Vec<&str> = report.keys().map(String::as_str).collect();
    keys.sort_unstable();
    let expected = [
        "bits_per_byte",
        "parameters",
        "peak_memory_bytes",
        "seconds",
        "steps",
        "tokens_per_second",
        "train_loss",
        "valid_loss",
    ];
    assert_eq!(keys, expected);
    assert_eq!(report["steps"], 40);
    // Embedding, positions, four square and two wide matrices, three norms.
    assert_eq!(
        report["parameters"],
        256 * 16 + 256 * 16 + 4 * 16 * 16 + 2 * 16 * 64 + 3 * 16
    );
    let number = |key: &str| report[key].as_f64().expect("a number");
    assert!((number("bits_per_byte") * 2f64.ln() - number("valid_loss")).abs() < 1e-12);
    for key in ["seconds", "tokens_per_second", "train_loss"] {
        assert!(number(key) > 0.0, "{key}");
    }
    if cfg!(target_os = "linux") {
        assert!(number("peak_memory_bytes") > 1e6);
    }
    let loss = loss_of_held_out_text(&run, common::words(2000).as_bytes());
    let difference = (number("valid_loss") - loss).abs();
    assert!(difference < 1e-5, "{loss} is {difference} away");
}

/// The loss of a run's model on the last tenth of a text, one window of 16 bytes after the other.
fn loss_of_held_out_text(run: &Path, text: &[u8]) -> f64 {
    let (_, device) = choose_device(None).expect("a device");
    let (_, model) = load_decoder(run, &device).expect("the run has a model");
    let held_out = &text[text.len() - text.len() / 10..];
    let (mut sum, mut n_targets) = (0.0, 0);
    for start in (0..held_out.len() - 1).step_by(16) {
        let end = (start + 16).min(held_out.len() - 1);
        let inputs: Vec<i32> = held_out[start..end]
            .iter()
            .map(|byte| i32::from(*byte))
            .collect();
        let shape = [1, inputs.len()];
        let inputs = Tensor::<2, Int>::from_data(TensorData::new(inputs, shape), &device);
        let scores = log_softmax(model.forward(inputs, None), 2).into_data();
        let scores: Vec<f64> = scores.iter::<f64>().collect();
        for (i, target) in held_out[start + 1..=end].iter().enumerate() {
            sum -= scores[i * 256 + usize::from(*target)];
            n_targets += 1;
        }
    }
    sum / f64::from(n_targets)
}

fn json(path: &Path) -> Map<String, Value> {
    let text = fs::read_to_string(path).expect("it was written");
    serde_json::from_str(&text).expect("a JSON object")
}

#[test]
fn texts_are_files_and_folders() {
    let place = Place::new();
    place.write("folder/b.txt", common::words(500));
    place.write("folder/deeper/a.md", common::words(300));
    place.write("folder/picture.png", [0xff]);
    place.write("folder/empty.txt", "");
    let args = [
        "--config", CONFIG, "--out", "run", "--text", TEXT, "--text", "folder",
    ];
    let ended = place.succeeds("pretrain", &args);
    let lengths = [2000, 500, 300].map(|n| common::words(n).len());
    let held_out: usize = lengths.iter().map(|length| length / 10).sum();
    let training = lengths.iter().sum::<usize>() - held_out;
    let line = format!(
        "text: 3 documents, {training} training and {held_out} held-out bytes, 2 other files skipped"
    );
    assert!(
        ended.stdout.lines().any(|l| l == line),
        "no {line:?} in {ended:?}"
    );
}

#[test]
fn runs_are_numbered_and_repeatable() {
    let place = Place::new();
    let args = ["--config", CONFIG, "--text", TEXT, "--seed", "3"];
    for run in ["runs/0001", "runs/0002"] {
        let ended = place.succeeds("pretrain", &args);
        assert!(
            ended.stdout.ends_with(&format!("\nrun: {run}\n")),
            "{ended:?}"
        );
    }
    let [first, second] = ["runs/0001", "runs/0002"].map(|run| place.path(run));
    assert_same(&second, &first);
    // Another seed is another run.
    place.pretrain("other", &["--seed", "4"]);
    let weights = |run: &Path| fs::read(run.join(RunFolder::WEIGHTS)).expect("weights");
    assert!(weights(&place.path("other")) != weights(&first));
}

/// A place with a finished run whose model has 32 positions.
fn place_with_run() -> Place {
    let place = Place::new();
    let positions = r#""d_model": 16, "positions": {"Learned": {"max_seq_length": 32}}"#;
    place.write(CONFIG, SMALL.replace(r#""d_model": 16"#, positions));
    place.pretrain("run", &[]);
    place
}

fn generate(place: &Place, args: &[&str]) -> Ended {
    continue_text(place, "tea ", args)
}

fn continue_text(place: &Place, prompt: &str, args: &[&str]) -> Ended {
    place.succeeds(
        "generate",
        &[&["--run", "run", "--prompt", prompt], args].concat(),
    )
}

#[test]
fn text_is_generated_as_asked() {
    let place = place_with_run();
    let text = |args: &[&str]| generate(&place, args).stdout;
    let greedy = text(&["--greedy", "--seed", "1"]);
    assert!(
        greedy.starts_with("tea ") && greedy.ends_with('\n'),
        "{greedy:?}"
    );
    assert!(greedy.len() > 400, "{greedy:?}");
    assert_eq!(text(&["--greedy", "--seed", "2"]), greedy);
    assert_eq!(text(&["--temperature", "0"]), greedy);
    assert_eq!(text(&["--top-k", "1"]), greedy);

    let drawn = text(&["--seed", "5", "--temperature", "1.5"]);
    assert_eq!(text(&["--seed", "5", "--temperature", "1.5"]), drawn);
    assert_ne!(text(&["--seed", "6", "--temperature", "1.5"]), drawn);
    // The model draws bytes that are no characters; what is written is characters.
    let wild = text(&["--temperature", "50"]);
    assert!(wild.contains(char::REPLACEMENT_CHARACTER), "{wild:?}");
    assert_eq!(text(&["--max-tokens", "0"]), "tea \n");

    // What is there already is made less likely.
    let n_letters = |text: String| text.chars().collect::<BTreeSet<char>>().len();
    let short = ["--greedy", "--max-tokens", "20"];
    let penalty = ["--repetition-penalty", "1e9"];
    assert!(n_letters(text(&[&short[..], &penalty].concat())) > n_letters(text(&short)));
}

#[test]
fn text_ends_before_a_stop_string() {
    let place = place_with_run();
    let sampled = ["--temperature", "1.5", "--seed", "3", "--top-p", "0.9"];
    let whole = generate(&place, &sampled).stdout;
    let written: Vec<char> = whole
        .strip_prefix("tea ")
        .expect("the prompt")
        .chars()
        .collect();
    let stop: String = written[20..23].iter().collect();
    let never = "this is not in it";
    let args = [&sampled[..], &["--stop", never, "--stop", &stop]].concat();
    let ended = generate(&place, &args);
    let written: String = written.iter().collect();
    let expected = &written[..written.find(&stop).expect("it was taken from there")];
    assert_eq!(ended.stdout, format!("tea {expected}\n"));
    assert_eq!(
        generate(&place, &[&sampled[..], &["--stop", never]].concat()).stdout,
        whole
    );
}

#[test]
fn text_longer_than_the_positions_is_told_once() {
    let place = place_with_run();
    let told = |prompt: &str, max_tokens| {
        let ended = continue_text(&place, prompt, &["--max-tokens", max_tokens]);
        let rate = ended.stderr.lines().last().expect("the speed");
        assert!(rate.ends_with(" tokens/s"), "{ended:?}");
        ended.stderr.matches("longer than the 32 positions").count()
    };
    // The token that is drawn last needs no position.
    assert_eq!(told("tea ", "29"), 0);
    assert_eq!(told("tea ", "30"), 1);
    assert_eq!(told("tea ", "300"), 1);
    assert_eq!(told(&"tea ".repeat(20), "1"), 1);
}

#[test]
fn a_run_that_was_killed_can_write() {
    let place = Place::new();
    let never = SMALL.replace(r#""validate_every": 20"#, r#""validate_every": 1000000"#);
    assert_ne!(never, SMALL);
    place.write(CONFIG, never);
    let run = place.path("run");
    let endless = ["--steps", "1000000", "--checkpoint-every", "1000000"];
    let mut running = place.start("pretrain", &new_run("run", &endless));
    running.wait_until("it trains", || n_logged(&run) >= 2);
    running.kill();
    let args = ["--run", "run", "--prompt", "a"];
    place.refuses("generate", &args, &["run has no weights yet"]);

    let args = ["--resume", "run", "--checkpoint-every", "3"];
    let mut running = place.start("pretrain", &args);
    running.wait_until("it saves", || !checkpoints(&run).is_empty());
    running.kill();
    let step = *checkpoints(&run).last().expect("it has saved");
    let ended = generate(&place, &["--greedy", "--max-tokens", "20"]);
    assert!(
        ended
            .stderr
            .contains(&format!("checkpoint of step {step}\n")),
        "{ended:?}"
    );
    let from_checkpoint = ended.stdout;

    // The same model from its weights: the run is asked to stop where it is.
    let last = step.to_string();
    place.succeeds("pretrain", &["--resume", "run", "--steps", &last]);
    let ended = generate(&place, &["--greedy", "--max-tokens", "20"]);
    assert!(!ended.stderr.contains("checkpoint"), "{ended:?}");
    assert_eq!(ended.stdout, from_checkpoint);
}

#[test]
fn runs_are_compared() {
    let place = Place::new();
    place.pretrain("plain", &[]);
    place.pretrain("longer", &["--steps", "49"]);
    let ended = place.succeeds("compare", &["plain", "longer"]);
    let rows: Vec<Vec<&str>> = ended
        .stdout
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    let beginnings: Vec<_> = rows[..3].iter().map(|row| row[..3].to_vec()).collect();
    let expected = [
        ["run", "parameters", "steps"],
        ["plain", "11,312", "40"],
        ["longer", "11,312", "49"],
    ];
    assert_eq!(beginnings, expected);
    assert!(
        ended
            .stdout
            .ends_with("\ncurves: compare.svg, compare.png\n"),
        "{ended:?}"
    );
    let svg = fs::read_to_string(place.path("compare.svg")).expect("it was drawn");
    assert!(svg.contains("plain") && svg.contains("longer"));
    let png = fs::read(place.path("compare.png")).expect("it was drawn");
    assert!(png.starts_with(b"\x89PNG"));
}

#[test]
fn a_foreign_model_runs_on_the_operators() {
    let ended = Place::new().succeeds("burn_nn", &["--steps", "3"]);
    let lines: Vec<&str> = ended.stdout.lines().collect();
    for what in ["scores", "gradients"] {
        let beginning = format!("largest difference of the {what}: ");
        let found = lines.iter().find_map(|line| line.strip_prefix(&beginning));
        let difference: f64 = found.expect("a line").parse().expect("a number");
        assert!(difference < 1e-5, "{what}: {ended:?}");
    }
    let after = |line: &str, words: &str| -> f64 {
        let rest = line.split_once(words).expect("they are there").1;
        let number = rest.split([',', ' ']).next().expect("a number");
        number.parse().expect("a number")
    };
    let last = lines.iter().find(|line| line.starts_with("step   3  loss"));
    let last = last.expect("a line");
    let [theirs, ours] = ["burn-nn ", "operators "].map(|words| after(last, words));
    assert!((theirs - ours).abs() < 1e-3, "{ended:?}");
    let end = lines.last().expect("a line");
    assert!(end.starts_with("a training step: burn-nn "), "{ended:?}");
}

#[test]
fn a_pattern_is_shown() {
    let place = Place::new();
    let shown = place.succeeds("pattern", &["causal & (window:1 | sinks:1)", "--seq", "4"]);
    assert_eq!(
        shown.stdout,
        "#...\n##..\n###.\n#.##\ncausal & (window:1 | sinks:1): 9 visible pairs, 56.2 % of all; blocks of 64 visit 16 pairs in 1 part\n"
    );
    let files = [
        "bigbird:8:1",
        "--seq",
        "64",
        "--svg",
        "p.svg",
        "--png",
        "p.png",
    ];
    place.succeeds("pattern", &files);
    let svg = fs::read_to_string(place.path("p.svg")).expect("the drawing");
    assert!(svg.starts_with("<svg") && svg.contains("<path"));
    // A picture has a dark square a visible pair; of long sequences it is a single pixel.
    for (seq, pixels_a_pair) in [("64", 16 * 16), ("1100", 1)] {
        place.succeeds("pattern", &["causal", "--seq", seq, "--png", "p.png"]);
        let picture = image::open(place.path("p.png")).expect("a PNG").to_rgb8();
        let dark = picture
            .pixels()
            .filter(|pixel| pixel.0 == [31, 58, 95])
            .count();
        let n: usize = seq.parse().expect("a number");
        assert_eq!(dark, n * (n + 1) / 2 * pixels_a_pair, "{seq}");
    }
}

#[test]
fn experts_are_shown() {
    let place = Place::new();
    place.write(
        common::CONFIG,
        r#"{"training": {"batch_size": 4, "seq_length": 16, "validation_windows": 2}}"#,
    );
    place.pretrain("run", &["--preset", "moe-tiny", "--steps", "3"]);
    let run = ["--run", "run"];
    let ended = place.succeeds(
        "experts",
        &[
            &run[..],
            &["--text", TEXT, "--tokens", "400", "--report", "r.json"],
        ]
        .concat(),
    );
    for layer in 1..4 {
        let line = format!("\nlayer {layer}: the expert tells ");
        assert!(ended.stdout.contains(&line), "{ended:?}");
    }
    assert_eq!(ended.stdout.matches("\n  expert ").count(), 3 * 8);
    assert!(place.path("run/specialisation.png").is_file());
    let report: Value = serde_json::from_slice(&fs::read(place.path("r.json")).unwrap()).unwrap();
    let counts: u64 = report[0]["counts"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|of| of.as_array().unwrap())
        .map(|count| count.as_u64().unwrap())
        .sum();
    assert_eq!(counts, 400 * 2, "two choices a token");

    place.write("tagged.txt", "The/at jury/nn said/vbd ./. ".repeat(20));
    let ended = place.succeeds(
        "experts",
        &[&run[..], &["--tagged", "tagged.txt", "--png", "map.png"]].concat(),
    );
    assert!(
        ended.stdout.contains("determiner") || ended.stdout.contains("noun"),
        "{ended:?}"
    );
    assert!(place.path("map.png").is_file());

    place.refuses(
        "experts",
        &[&run[..], &["--tagged", TEXT]].concat(),
        &["has no tag"],
    );
    place.refuses(
        "experts",
        &[&run[..], &["--text", TEXT, "--tokens", "8"]].concat(),
        &["has 8 tokens"],
    );
    place.write(common::CONFIG, common::SMALL);
    place.pretrain("dense", &["--steps", "1"]);
    place.refuses(
        "experts",
        &["--run", "dense", "--text", TEXT],
        &["has no experts"],
    );
}

/// Of 512 experts a step of 4 tokens leaves nearly all without one.
#[test]
fn experts_without_tokens_are_told() {
    let place = Place::new();
    let preset = ["--preset", "moe-tiny", "--balance", "none"];
    let plan = json!({"batch_size": 1, "seq_length": 4, "validation_windows": 1});
    place.write(CONFIG, json!({"training": plan}).to_string());
    place.pretrain("eight", &[&preset[..], &["--steps", "1"]].concat());
    let config = fs::read(place.path("eight").join(RunFolder::CONFIG)).expect("a run's");
    let mut config: Value = serde_json::from_slice(&config).expect("JSON");
    let mut experts = config["model"]["experts"].take();
    experts["first"] = json!(0);
    experts["mixture"]["d_ff"] = json!(4);
    experts["mixture"]["router"]["n_experts"] = json!(512);
    let model = json!({"n_layers": 1, "experts": experts});
    place.write(
        CONFIG,
        json!({"model": model, "training": plan}).to_string(),
    );
    let ended = place.pretrain("run", &[&preset[..], &["--steps", "100"]].concat());
    let told = "warning: layer 0: expert ";
    assert!(ended.stderr.contains(told), "{ended:?}");
    let log = fs::read_to_string(place.path("run").join("log.txt")).expect("a log");
    assert!(log.lines().all(|line| line.starts_with(told)), "{log}");
    assert_eq!(log.lines().count(), ended.stderr.matches(told).count());
}
