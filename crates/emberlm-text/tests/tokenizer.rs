//! Tokenizers against Hugging Face's, round trips, training, files.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use emberlm_text::{BpeTraining, Corpus, TextError, TextStream, Tokenizer};
use proptest::prelude::*;
use serde_json::Value;
use tempfile::TempDir;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/byte_level")
        .join(name)
}

fn fixture_json(name: &str) -> Value {
    serde_json::from_slice(&fs::read(fixture(name)).unwrap()).unwrap()
}

fn load(name: &str) -> Tokenizer {
    Tokenizer::load(fixture(name)).unwrap()
}

/// What `load` says of a changed `gpt2.json`.
fn load_changed(change: impl FnOnce(&mut Value)) -> Result<Tokenizer, TextError> {
    let mut json = fixture_json("gpt2.json");
    change(&mut json);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("changed.json");
    fs::write(&path, json.to_string()).unwrap();
    Tokenizer::load(path)
}

/// The training part of a text: all but the last tenth.
fn stream(text: &str) -> (TempDir, TextStream) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("text.txt");
    fs::write(&path, text).unwrap();
    let stream = Corpus::open(&[path]).unwrap().training();
    (folder, stream)
}

/// The first bytes of the repository's own text.
fn austen(bytes: usize) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../data/austen.txt");
    let text = fs::read_to_string(path).unwrap();
    text[..text.floor_char_boundary(bytes)].to_owned()
}

#[test]
fn tokens_are_those_of_hugging_face() {
    let expected = fixture_json("encodings.json");
    let strings = expected["strings"].as_array().unwrap();
    for (name, tokens) in expected["tokens"].as_object().unwrap() {
        let tokenizer = load(&format!("{name}.json"));
        assert_eq!(tokenizer.vocab_size(), 400);
        for (text, tokens) in strings.iter().zip(tokens.as_array().unwrap()) {
            let text = text.as_str().unwrap();
            let tokens: Vec<u32> = serde_json::from_value(tokens.clone()).unwrap();
            assert_eq!(tokenizer.encode(text), tokens, "{name}: {text:?}");
            assert_eq!(tokenizer.decode(&tokens), text, "{name}");
        }
    }
}

#[test]
fn special_tokens_have_names_and_numbers() {
    let tokenizer = load("gpt2.json");
    for (number, name) in ["<pad>", "<s>", "</s>", "<mask>", "<extra_id_0>"]
        .iter()
        .enumerate()
    {
        assert_eq!(tokenizer.token_id(name), Some(number as u32));
        assert_eq!(tokenizer.decode(&[number as u32]), *name);
        assert!(tokenizer.starts_word(number as u32));
    }
    assert_eq!(tokenizer.token_id("<extra_id_1>"), None);
    assert_eq!(Tokenizer::bytes().token_id("<pad>"), None);
}

#[test]
fn words_start_with_white_space() {
    for tokenizer in [Tokenizer::bytes(), load("gpt2.json"), load("llama3.json")] {
        let text = " an\nember, aglow\u{3000}é";
        let mut words: Vec<Vec<u32>> = Vec::new();
        for token in tokenizer.encode(text) {
            if tokenizer.starts_word(token) || words.is_empty() {
                words.push(Vec::new());
            }
            words.last_mut().unwrap().push(token);
        }
        let words: Vec<String> = words.iter().map(|word| tokenizer.decode(word)).collect();
        assert_eq!(words, [" an", "\nember,", " aglow\u{3000}é"]);
        assert!(!tokenizer.starts_word(1_000_000));
    }
}

#[test]
fn characters_may_be_cut_and_unknown_tokens_decoded() {
    let tokenizer = load("gpt2.json");
    let flame = tokenizer.encode("日");
    assert!(flame.len() > 1);
    assert_eq!(tokenizer.decode(&flame[..1]), "\u{FFFD}");
    let pieces: Vec<u8> = flame
        .iter()
        .flat_map(|&token| tokenizer.decode_bytes(&[token]))
        .collect();
    assert_eq!(pieces, "日".as_bytes());
    assert_eq!(tokenizer.decode(&[400, 1 << 31]), "\u{FFFD}\u{FFFD}");
    assert_eq!(Tokenizer::bytes().decode(&[97, 256, 98]), "a\u{FFFD}b");
}

#[test]
fn files_are_loaded_as_they_were_saved() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(Tokenizer::FILE_NAME);
    let (_text, text) = stream(&austen(50_000));
    let trained = BpeTraining::new(500)
        .with_special_tokens(&["<pad>"])
        .train(&text, |_| ())
        .unwrap();
    let tokenizers = [
        Tokenizer::bytes(),
        load("gpt2.json"),
        load("llama3.json"),
        trained,
    ];
    let mut checksums = HashSet::new();
    for tokenizer in tokenizers {
        tokenizer.save(&path).unwrap();
        let loaded = Tokenizer::load(&path).unwrap();
        assert_eq!(loaded.is_bytes(), tokenizer.is_bytes());
        assert_eq!(loaded.vocab_size(), tokenizer.vocab_size());
        assert_eq!(loaded.crc32(), tokenizer.crc32());
        assert!(checksums.insert(loaded.crc32()));
        let text = "It isn't\n\n  <s> 日本 <pad>";
        assert_eq!(loaded.encode(text), tokenizer.encode(text));
        let saved = fs::read(&path).unwrap();
        loaded.save(&path).unwrap();
        assert_eq!(fs::read(&path).unwrap(), saved);
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    match Tokenizer::bytes().save(folder.path().join("missing/tokenizer.json")) {
        Err(TextError::Unwritable { path, .. }) => assert!(path.ends_with("tokenizer.json")),
        other => panic!("{other:?}"),
    }
}

/// The library that trains keeps its words in an order that is another in every process, so a test in one process
/// compares what several orders make.
#[test]
fn the_same_text_trains_the_same_tokenizer() {
    let (_folder, text) = stream(&austen(400_000));
    let folder = tempfile::tempdir().unwrap();
    let mut files = HashSet::new();
    for n_threads in [1, 2, 3, 4] {
        let threads = rayon::ThreadPoolBuilder::new()
            .num_threads(n_threads)
            .build()
            .unwrap();
        let training = BpeTraining::new(2000).with_special_tokens(&["<pad>", "<s>"]);
        let tokenizer = threads.install(|| training.train(&text, |_| ()).unwrap());
        assert_eq!(tokenizer.vocab_size(), 2000);
        let path = folder.path().join("tokenizer.json");
        tokenizer.save(&path).unwrap();
        files.insert(fs::read(path).unwrap());
    }
    assert_eq!(files.len(), 1);
}

#[test]
fn training_tells_its_progress_and_stops_when_there_is_nothing_to_learn() {
    let (_folder, text) = stream(&"an ember ".repeat(100_000));
    let mut told = Vec::new();
    let tokenizer = BpeTraining::new(1000)
        .train(&text, |progress| told.push((progress.done, progress.total)))
        .unwrap();
    assert!(told.is_sorted() && told.len() > 5);
    assert_eq!(told.last(), Some(&(900_000 - 90_000, 900_000 - 90_000)));
    // The bytes, the parts of " ember" that were merged on the way, and of " an" and "an".
    assert!(tokenizer.vocab_size() < 270, "{tokenizer:?}");
    assert_eq!(tokenizer.encode(" ember an").len(), 2);
}

#[test]
fn sizes_and_names_that_are_impossible() {
    let (_folder, text) = stream("an ember");
    let train = |size, names: &[&str]| {
        let training = BpeTraining::new(size).with_special_tokens(names);
        training.train(&text, |_| ()).unwrap_err()
    };
    for (size, names, fix) in [
        (255, &[][..], "choose 256 to 1000000"),
        (257, &["<s>", "</s>"], "choose 258 to 1000000"),
        (usize::MAX, &[], "choose 256 to 1000000"),
    ] {
        let error = train(size, names).to_string();
        assert!(
            error.contains(&size.to_string()) && error.ends_with(fix),
            "{error}"
        );
    }
    // Empty, twice, a byte, and how " a" is written in a file.
    for (names, bad) in [
        (&[""][..], ""),
        (&["<s>", "<s>"], "<s>"),
        (&["a"], "a"),
        (&["Ġa"], "Ġa"),
    ] {
        match train(300, names) {
            TextError::SpecialToken { name } => assert_eq!(name, bad),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn files_that_hold_something_else() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("no.json");
    for (content, mentions) in [
        ("", ["no.json is no tokenizer.json", "EOF"]),
        ("{", ["no.json is no tokenizer.json", "EOF"]),
        ("[]", ["no.json is not a byte-level BPE", "it has no model"]),
        (
            r#"{"model": {"type": "WordPiece"}}"#,
            ["its model is WordPiece", "bpe:N"],
        ),
        (
            r#"{"model": {"type": "BPE"}, "pre_tokenizer": {"type": "ByteLevel"}}"#,
            ["no.json is no tokenizer.json", ""],
        ),
    ] {
        fs::write(&path, content).unwrap();
        let error = Tokenizer::load(&path).unwrap_err().to_string();
        assert!(mentions.iter().all(|part| error.contains(part)), "{error}");
        assert!(!error.contains('\n'), "{error}");
    }
    match Tokenizer::load(folder.path().join("missing.json")) {
        Err(TextError::Missing { path }) => assert!(path.ends_with("missing.json")),
        other => panic!("{other:?}"),
    }
}

#[test]
fn tokenizers_of_other_kinds() {
    let refused = |change: &dyn Fn(&mut Value)| load_changed(change).unwrap_err().to_string();
    for (error, reason) in [
        (
            refused(&|json| json["model"]["dropout"] = 0.1.into()),
            "its dropout makes the tokens random",
        ),
        (
            refused(&|json| json["model"]["end_of_word_suffix"] = "</w>".into()),
            "it has a end_of_word_suffix",
        ),
        (
            refused(&|json| json["pre_tokenizer"] = Value::Null),
            "it has no pre-tokenizer",
        ),
        (
            refused(&|json| json["pre_tokenizer"] = serde_json::json!({"type": "Whitespace"})),
            "its pre-tokenizer ends in Whitespace",
        ),
        (
            refused(&|json| {
                let vocabulary = json["model"]["vocab"].as_object_mut().unwrap();
                let number = vocabulary.remove("ÿ").unwrap();
                vocabulary.insert("elsewhere".to_owned(), number);
            }),
            "it has no token for the byte 255",
        ),
    ] {
        assert!(error.contains(reason), "{error}");
    }
    // Padding, truncation and templates are not applied.
    let changed = load_changed(|json| {
        json["truncation"] = serde_json::json!({
            "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0
        });
        json["padding"] = serde_json::json!({
            "strategy": {"Fixed": 20}, "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"
        });
    });
    let text = "It is a truth universally acknowledged";
    assert_eq!(
        changed.unwrap().encode(text),
        load("gpt2.json").encode(text)
    );
}

static ALL: LazyLock<[Tokenizer; 3]> =
    LazyLock::new(|| [Tokenizer::bytes(), load("gpt2.json"), load("llama3.json")]);

proptest! {
    #[test]
    fn every_text_comes_back(text in any::<String>(), spaced in "[a-z \\n\\t.,'0-9é日\u{85}]{0,60}") {
        for tokenizer in &*ALL {
            for text in [&text, &spaced] {
                let tokens = tokenizer.encode(text);
                prop_assert!(tokens.iter().all(|&token| (token as usize) < tokenizer.vocab_size()));
                prop_assert_eq!(&tokenizer.decode(&tokens), text);
                prop_assert_eq!(tokenizer.decode_bytes(&tokens), text.as_bytes());
            }
        }
    }
}

/// The library's expression engine gives up after a number of steps back.
#[test]
fn long_runs_of_one_kind_come_back() {
    let tokenizer = load("gpt2.json");
    for unit in [" ", "a", "\n", "é", "!", "7"] {
        for end in ["", "x"] {
            let text = unit.repeat(300_000) + end;
            assert_eq!(tokenizer.decode(&tokenizer.encode(&text)), text);
        }
    }
}
