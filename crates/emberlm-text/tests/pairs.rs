//! Files of sentence pairs: what is read, what is refused and with which words, and how they are split.

use std::{collections::HashSet, fs, path::Path};

use emberlm_text::{Pair, PairCorpus, PairError};
use tempfile::TempDir;

fn open(content: impl AsRef<[u8]>) -> Result<PairCorpus, PairError> {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("pairs.tsv");
    fs::write(&path, content).unwrap();
    PairCorpus::open(path)
}

/// The message without the folder.
fn refusal(content: impl AsRef<[u8]>) -> String {
    let message = open(content).expect_err("must be refused").to_string();
    let (_, message) = message.rsplit_once("pairs.tsv").unwrap();
    message.to_owned()
}

fn pair(source: &str, target: &str, reference: Option<&str>) -> Pair {
    Pair {
        source: source.to_owned(),
        target: target.to_owned(),
        reference: reference.map(str::to_owned),
    }
}

fn sources<'a>(pairs: &[&'a Pair]) -> Vec<&'a str> {
    pairs.iter().map(|pair| pair.source.as_str()).collect()
}

const GOSPELS: &str =
    "a\tA\tMark 1:1\nb\tB\tMark 1:2\nc\tC\t1 John 1:1\nd\tD\tMark 2:1\ne\tE\tLuke\n";

#[test]
fn text_is_taken_as_it_stands() {
    let corpus = open("¶ one \" two\t  uno «dos» \r\nthree\ttres").unwrap();
    let expected = [
        pair("¶ one \" two", "  uno «dos» ", None),
        pair("three", "tres", None),
    ];
    assert_eq!(corpus.pairs(), expected);
    assert!(corpus.books().is_empty());
}

#[test]
fn references_name_books() {
    let corpus = open(GOSPELS).unwrap();
    assert_eq!(corpus.pairs()[2], pair("c", "C", Some("1 John 1:1")));
    assert_eq!(corpus.books(), ["Mark", "1 John", "Luke"]);
}

#[test]
fn bad_lines_are_named() {
    let cases: [(&[u8], &str); 9] = [
        (b"", ": no pairs; write one a line, source TAB target"),
        (
            b"a\tA\nb B\nc",
            ", line 2: no tab; a line is source TAB target",
        ),
        (
            b"a\tA\n\nb\tB\n",
            ", line 2: no tab; a line is source TAB target",
        ),
        (b"a\tA\n\tB\n", ", line 2: the source is empty"),
        (b"a\tA\nb\t \xc2\xa0\n", ", line 2: the target is empty"),
        (
            b"a\tA\tMark 1:1\nb\tB\t\n",
            ", line 2: the reference is empty",
        ),
        (
            b"a\tA\tMark 1:1\nb\tB\n",
            ", line 2: another number of columns than the 3 of line 1",
        ),
        (
            b"a\tA\nb\tB\tMark 1:1\td\n",
            ", line 2: 4 columns; a line is source TAB target, or these TAB reference",
        ),
        (
            b"a\tA\nb\tB\nc\t\xff\nd",
            ", line 3: not UTF-8; convert the file first",
        ),
    ];
    for (content, expected) in cases {
        assert_eq!(refusal(content), expected);
    }
}

#[test]
fn a_missing_file_is_named() {
    let error = PairCorpus::open("no/such/file.tsv").unwrap_err();
    assert!(error.to_string().starts_with("no/such/file.tsv: "));
}

#[test]
fn books_are_held_out_whole() {
    let corpus = open(GOSPELS).unwrap();
    let split = corpus.split_books(&["Mark", "Luke"]).unwrap();
    assert_eq!(sources(&split.held_out), ["a", "b", "d", "e"]);
    assert_eq!(sources(&split.training), ["c"]);
}

#[test]
fn books_that_cannot_be_held_out() {
    let corpus = open(GOSPELS).unwrap();
    let refused = |books: &[&str]| corpus.split_books(books).unwrap_err();
    assert!(
        matches!(refused(&["Mark", "Acts"]), PairError::UnknownBook { book, .. } if book == "Acts")
    );
    assert!(matches!(
        refused(&[]),
        PairError::HeldOut { held_out: 0, .. }
    ));
    let all = ["Mark", "Luke", "1 John"];
    assert!(matches!(
        refused(&all),
        PairError::HeldOut {
            held_out: 5,
            pairs: 5,
            ..
        }
    ));
    let without = open("a\tA\nb\tB\n").unwrap();
    let refused = without.split_books(&["Mark"]).unwrap_err();
    assert!(matches!(refused, PairError::NoReferences { .. }));
}

/// 100 pairs, of which every tenth has the same source.
fn hundred() -> PairCorpus {
    let line = |i: usize| match i % 10 {
        0 => format!("again\tT{i}\n"),
        _ => format!("s{i}\tT{i}\n"),
    };
    open((0..100).map(line).collect::<String>()).unwrap()
}

#[test]
fn random_splits_are_of_the_seed() {
    let corpus = hundred();
    let split = corpus.split_random(20, 1).unwrap();
    assert_eq!(split.held_out.len(), 20);
    assert_eq!(split.training.len(), 80);
    assert_eq!(split, corpus.split_random(20, 1).unwrap());
    assert_ne!(split, corpus.split_random(20, 2).unwrap());
    let all: HashSet<&str> = corpus
        .pairs()
        .iter()
        .map(|pair| pair.target.as_str())
        .collect();
    let both = split.training.iter().chain(&split.held_out);
    assert_eq!(
        both.map(|pair| pair.target.as_str())
            .collect::<HashSet<_>>(),
        all
    );
}

#[test]
fn a_source_is_on_one_side_alone() {
    let corpus = hundred();
    let mut held_out_together = 0;
    for seed in 0..40 {
        let split = corpus.split_random(20, seed).unwrap();
        let trained: HashSet<&str> = sources(&split.training).into_iter().collect();
        let held_out = sources(&split.held_out);
        assert!(held_out.iter().all(|source| !trained.contains(source)));
        held_out_together += usize::from(held_out.contains(&"again"));
    }
    assert!((1..40).contains(&held_out_together), "{held_out_together}");
}

#[test]
fn numbers_that_cannot_be_held_out() {
    let corpus = hundred();
    for n in [0, 100, 1000] {
        let refused = corpus.split_random(n, 1).unwrap_err();
        assert!(
            matches!(refused, PairError::HeldOut { held_out, pairs: 100, .. } if held_out == n)
        );
    }
    let twice = open("a\tA\na\tB\nb\tC\nb\tD\n").unwrap();
    assert!(matches!(
        twice.split_random(1, 1),
        Err(PairError::HeldOut { .. })
    ));
    assert_eq!(twice.split_random(2, 1).unwrap().held_out.len(), 2);
}

/// The sequence is a promise: `benches/peers/translate.py` holds out the same pairs.
#[test]
fn the_verses_and_their_split() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../data/verses-en-es.tsv");
    let corpus = PairCorpus::open(path).unwrap();
    assert_eq!(corpus.pairs().len(), 30680);
    assert_eq!(corpus.books().len(), 65);
    let last = corpus.pairs()[30679].reference.as_deref();
    assert_eq!(last, Some("Jude 1:25"));
    let split = corpus.split_random(500, 0).unwrap();
    assert_eq!(split.held_out.len(), 500);
    let ends = [&split.held_out[0], &split.held_out[499]].map(|pair| &pair.source[..20]);
    assert_eq!(ends, ["And a river went out", "And Enoch also, the "]);
}
