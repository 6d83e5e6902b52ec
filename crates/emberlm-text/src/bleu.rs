//! BLEU of translations, with the numbers of sacreBLEU.

use crate::ngrams::{Overlap, is_space, segments, words};

/// The longest n-grams that count.
const MAX_ORDER: usize = 4;

/// A BLEU score and what it is made of.
///
/// Papineni et al. 2002, <https://aclanthology.org/P02-1040>: with `m_n` of the hypotheses' `t_n` n-grams in the
/// references, each at most as often as its reference has it, `c` and `r` the numbers of tokens of all hypotheses and
/// all references,
///
/// `BLEU = min(1, exp(1 - r / c)) (p_1 p_2 p_3 p_4)^(1/4)`, `p_n = 100 m_n / t_n`.
///
/// As in sacreBLEU's default (Post 2018, <https://arxiv.org/abs/1804.08771>; signature
/// `nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp`), case counts, tokens are those of [`tokenize_13a`], and where
/// `m_n` is 0, the `k`-th such `p_n` is `100 / (2^k t_n)`. Without any match at all the score is 0.
#[derive(Debug, Clone, PartialEq)]
pub struct Bleu {
    /// The score, from 0 to 100.
    pub score: f64,
    /// `p_1` to `p_4`, after smoothing; 0 where there are no n-grams of that length.
    pub precisions: [f64; MAX_ORDER],
    /// `m_1` to `m_4`.
    pub matches: [u64; MAX_ORDER],
    /// `t_1` to `t_4`.
    pub totals: [u64; MAX_ORDER],
    /// The factor for hypotheses that are too short: at most 1, 0 where they are all empty.
    pub brevity_penalty: f64,
    /// Tokens of the hypotheses.
    pub hypothesis_length: u64,
    /// Tokens of the references.
    pub reference_length: u64,
}

/// BLEU of a corpus, one reference a hypothesis: the counts of all segments are added before anything is divided.
///
/// Equals sacreBLEU's `corpus_bleu(hypotheses, [references])`. No hypotheses at all score 0.
///
/// ```
/// use emberlm_text::corpus_bleu;
///
/// let bleu = corpus_bleu(&["the cat sat on the mat"], &["the cat sat on a mat"]);
/// assert_eq!(bleu.matches, [5, 3, 2, 1]);
/// assert!((bleu.score - 53.7284965911771).abs() < 1e-9);
/// ```
///
/// # Panics
///
/// If there are more or fewer references than hypotheses.
pub fn corpus_bleu<H: AsRef<str>, R: AsRef<str>>(hypotheses: &[H], references: &[R]) -> Bleu {
    let mut counts = Counts::default();
    for (hypothesis, reference) in segments(hypotheses, references) {
        counts.add(hypothesis, reference);
    }
    counts.score(Orders::All)
}

/// BLEU of one segment, over the n-grams that it is long enough for: a hypothesis of two tokens is judged by `p_1` and
/// `p_2` alone ("effective order").
///
/// Equals sacreBLEU's `sentence_bleu(hypothesis, [reference])`. Without effective order, as sacreBLEU's
/// `BLEU().sentence_score` counts, a hypothesis of under four tokens scores 0: that is [`corpus_bleu`] of one segment.
pub fn sentence_bleu(hypothesis: &str, reference: &str) -> Bleu {
    let mut counts = Counts::default();
    counts.add(hypothesis, reference);
    counts.score(Orders::Effective)
}

/// Over which lengths of n-grams the mean goes.
#[derive(Clone, Copy, PartialEq)]
enum Orders {
    /// All four: one without n-grams makes the score 0.
    All,
    /// Up to the longest of which the hypotheses have any.
    Effective,
}

#[derive(Default)]
struct Counts {
    overlaps: [Overlap; MAX_ORDER],
    hypothesis_length: u64,
    reference_length: u64,
}

impl Counts {
    fn add(&mut self, hypothesis: &str, reference: &str) {
        // sacreBLEU cuts white space at the end first, so that a dash before a line break at the end stays.
        let [hypothesis, reference] =
            [hypothesis, reference].map(|text| tokenize_13a(text.trim_end_matches(is_space)));
        for (order, overlap) in (1..).zip(&mut self.overlaps) {
            overlap.add(Overlap::of(&hypothesis, &reference, order));
        }
        self.hypothesis_length += hypothesis.len() as u64;
        self.reference_length += reference.len() as u64;
    }

    fn score(&self, orders: Orders) -> Bleu {
        let matches = self.overlaps.map(|overlap| overlap.matches);
        let totals = self.overlaps.map(|overlap| overlap.hypothesis);
        let brevity_penalty = self.brevity_penalty();
        let precisions = precisions(matches, totals);
        let n_orders = match orders {
            Orders::All => MAX_ORDER,
            Orders::Effective => totals.iter().take_while(|&&total| total > 0).count(),
        };
        Bleu {
            score: brevity_penalty * geometric_mean(&precisions[..n_orders]),
            precisions,
            matches,
            totals,
            brevity_penalty,
            hypothesis_length: self.hypothesis_length,
            reference_length: self.reference_length,
        }
    }

    fn brevity_penalty(&self) -> f64 {
        match (self.hypothesis_length, self.reference_length) {
            (hypothesis, reference) if hypothesis >= reference => 1.0,
            (0, _) => 0.0,
            (hypothesis, reference) => (1.0 - reference as f64 / hypothesis as f64).exp(),
        }
    }
}

/// In percent, smoothed; all 0 if nothing matches.
fn precisions(matches: [u64; MAX_ORDER], totals: [u64; MAX_ORDER]) -> [f64; MAX_ORDER] {
    let mut precisions = [0.0; MAX_ORDER];
    if matches == [0; MAX_ORDER] {
        return precisions;
    }
    let mut smoothing = 1.0;
    for (precision, (matches, total)) in precisions.iter_mut().zip(matches.into_iter().zip(totals))
    {
        if total == 0 {
            break;
        }
        *precision = if matches == 0 {
            smoothing *= 2.0;
            100.0 / (smoothing * total as f64)
        } else {
            100.0 * matches as f64 / total as f64
        };
    }
    precisions
}

/// 0 if one of the values is, or if there are none.
fn geometric_mean(values: &[f64]) -> f64 {
    if values.is_empty() || values.contains(&0.0) {
        return 0.0;
    }
    let sum: f64 = values.iter().map(|value| value.ln()).sum();
    (sum / values.len() as f64).exp()
}

/// The tokens of a line by the rules of NIST's `mteval-v13a.pl`, which BLEU is reported with.
///
/// Without `<skipped>`; a dash before a line break joins the lines; `&quot;`, `&amp;`, `&lt;` and `&gt;` become
/// characters. Of ASCII's punctuation each character is a token, except the apostrophe, which stays in its word, period
/// and comma, which are tokens unless they stand between digits, and the dash, which is one after a digit. All other
/// characters, punctuation included, stay where they are. The rules for period and comma take two characters at a time,
/// so that some in a row stay together, as in the original.
///
/// ```
/// use emberlm_text::tokenize_13a;
///
/// let tokens = tokenize_13a("\"It's 1,000.5 km,\" he said - 20-fold…");
/// let expected = ["\"", "It's", "1,000.5", "km", ",", "\"", "he", "said", "-", "20", "-", "fold…"];
/// assert_eq!(tokens, expected);
/// ```
pub fn tokenize_13a(line: &str) -> Vec<String> {
    let line = line
        .replace("<skipped>", "")
        .replace("-\n", "")
        .replace('\n', " ")
        .replace("&quot;", "\"")
        .replace("&amp;", "&")
        .replace("&lt;", "<")
        .replace("&gt;", ">");
    let line = separate_punctuation(&format!(" {line} "));
    let line = separate(
        &line,
        |a, b| !a.is_ascii_digit() && is_point(b),
        ["", " ", " "],
    );
    let line = separate(
        &line,
        |a, b| is_point(a) && !b.is_ascii_digit(),
        [" ", " ", ""],
    );
    let line = separate(&line, |a, b| a.is_ascii_digit() && b == '-', ["", " ", " "]);
    words(&line).map(str::to_owned).collect()
}

/// Spaces around ASCII's punctuation but `'`, `,`, `-` and `.`.
fn separate_punctuation(line: &str) -> String {
    let mut separated = String::with_capacity(2 * line.len());
    for c in line.chars() {
        if c.is_ascii_punctuation() && !matches!(c, '\'' | ',' | '-' | '.') {
            separated.extend([' ', c, ' ']);
        } else {
            separated.push(c);
        }
    }
    separated
}

fn is_point(c: char) -> bool {
    matches!(c, '.' | ',')
}

/// Puts `spaces` before, between and after two neighbours of which `matches` holds. From left to right; a character
/// belongs to one pair at most.
fn separate(line: &str, matches: impl Fn(char, char) -> bool, spaces: [&str; 3]) -> String {
    let mut separated = String::with_capacity(line.len() + line.len() / 4);
    let mut rest = line.chars();
    while let Some(a) = rest.next() {
        match rest.clone().next() {
            Some(b) if matches(a, b) => {
                rest.next();
                let [before, between, after] = spaces;
                separated.push_str(before);
                separated.push(a);
                separated.push_str(between);
                separated.push(b);
                separated.push_str(after);
            }
            _ => separated.push(a),
        }
    }
    separated
}
