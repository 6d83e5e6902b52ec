//! BLEU and chrF are sacreBLEU's numbers, on the strings of `fixtures/translation_metrics`.

use emberlm_text::{
    Bleu, ChrfOptions, corpus_bleu, corpus_chrf, sentence_bleu, sentence_chrf, tokenize_13a,
};
use serde::Deserialize;

#[derive(Deserialize)]
struct Cases {
    corpora: Vec<Corpus>,
    tokens: Vec<(String, Vec<String>)>,
}

#[derive(Deserialize)]
struct Corpus {
    name: String,
    hypotheses: Vec<String>,
    references: Vec<String>,
    corpus: Scores,
    sentences: Vec<Scores>,
}

#[derive(Deserialize)]
struct Scores {
    bleu: BleuScore,
    chrf: f64,
    chrf_plus_plus: f64,
}

#[derive(Deserialize)]
struct BleuScore {
    score: f64,
    precisions: [f64; 4],
    matches: [u64; 4],
    totals: [u64; 4],
    brevity_penalty: f64,
    hypothesis_length: u64,
    reference_length: u64,
}

fn cases() -> Cases {
    serde_json::from_str(include_str!("fixtures/translation_metrics/cases.json"))
        .expect("the fixture is of this shape")
}

fn assert_equal(name: &str, what: &str, ours: f64, expected: f64) {
    let difference = (ours - expected).abs();
    assert!(
        difference <= 1e-9,
        "{name}: {what} is {ours}, expected {expected}"
    );
}

fn assert_bleu(name: &str, ours: &Bleu, expected: &BleuScore) {
    assert_eq!(ours.matches, expected.matches, "{name}: matches");
    assert_eq!(ours.totals, expected.totals, "{name}: totals");
    assert_eq!(
        (ours.hypothesis_length, ours.reference_length),
        (expected.hypothesis_length, expected.reference_length),
        "{name}: lengths"
    );
    for (order, (ours, expected)) in (1..).zip(ours.precisions.iter().zip(expected.precisions)) {
        assert_equal(name, &format!("precision {order}"), *ours, expected);
    }
    let [penalty, score] = ["brevity penalty", "BLEU"];
    assert_equal(
        name,
        penalty,
        ours.brevity_penalty,
        expected.brevity_penalty,
    );
    assert_equal(name, score, ours.score, expected.score);
}

#[test]
fn corpora_score_as_in_sacrebleu() {
    for case in cases().corpora {
        let Corpus {
            name,
            hypotheses,
            references,
            corpus,
            ..
        } = &case;
        assert_bleu(name, &corpus_bleu(hypotheses, references), &corpus.bleu);
        let chrf = |options: ChrfOptions| corpus_chrf(hypotheses, references, &options);
        assert_equal(name, "chrF2", chrf(ChrfOptions::default()), corpus.chrf);
        let ours = chrf(ChrfOptions::plus_plus());
        assert_equal(name, "chrF2++", ours, corpus.chrf_plus_plus);
    }
}

#[test]
fn sentences_score_as_in_sacrebleu() {
    for case in cases().corpora {
        let pairs = case.hypotheses.iter().zip(&case.references);
        for ((hypothesis, reference), expected) in pairs.zip(&case.sentences) {
            let name = format!("{}: {hypothesis:?}", case.name);
            assert_bleu(&name, &sentence_bleu(hypothesis, reference), &expected.bleu);
            let chrf = |options: ChrfOptions| sentence_chrf(hypothesis, reference, &options);
            assert_equal(&name, "chrF2", chrf(ChrfOptions::default()), expected.chrf);
            let ours = chrf(ChrfOptions::plus_plus());
            assert_equal(&name, "chrF2++", ours, expected.chrf_plus_plus);
        }
    }
}

#[test]
fn tokens_are_those_of_mteval_v13a() {
    for (line, expected) in cases().tokens {
        assert_eq!(tokenize_13a(&line), expected, "{line:?}");
    }
}

#[test]
fn effective_order_is_of_sentences_alone() {
    let short = "Good day";
    assert_equal(short, "sentence", sentence_bleu(short, short).score, 100.0);
    assert_equal(short, "corpus", corpus_bleu(&[short], &[short]).score, 0.0);
}

#[test]
fn no_hypotheses_score_0() {
    let none: [&str; 0] = [];
    assert_eq!(corpus_bleu(&none, &none).score, 0.0);
    assert_eq!(corpus_chrf(&none, &none, &ChrfOptions::default()), 0.0);
}

#[test]
#[should_panic(expected = "each hypothesis needs one reference")]
fn bleu_needs_one_reference_each() {
    corpus_bleu(&["a", "b"], &["a"]);
}

#[test]
#[should_panic(expected = "each hypothesis needs one reference")]
fn chrf_needs_one_reference_each() {
    corpus_chrf(&["a"], &["a", "b"], &ChrfOptions::default());
}
