//! Where a text may be cut so that its parts, tokenised one by one, have the tokens of the whole.
//!
//! A byte-level BPE first splits a text into words by a regular expression, from left to right, and then makes tokens
//! within each word. So a text may be cut between two words if neither side can see over the cut. The expression of
//! GPT-2 is
//!
//! ```text
//! 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
//! ```
//!
//! None of its matches has white space after anything else. So there is always an end of a word before white space that
//! follows something else; nothing in the expression looks back, and what looks ahead, `\s+(?!\S)`, only does so at the
//! end of white space. The expressions of tiktoken (Llama 3, Qwen, GPT-4) let line ends follow punctuation: for them
//! the white space must be a space.

use serde_json::Value;

/// Where a text may be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cuts {
    /// Before white space of one byte that follows something else.
    BetweenWords,
    /// Before a space that follows something else.
    BeforeSpaces,
    /// Nowhere: the tokenizer is one of which it is not known.
    Never,
}

/// The expressions for which [`Cuts::BeforeSpaces`] holds: no match has a space after anything else.
const TIKTOKEN: [&str; 4] = [
    // cl100k_base, as Llama 3 writes it.
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    // Qwen 2.
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    // cl100k_base, as tiktoken writes it.
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    // o200k_base.
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
];

impl Cuts {
    /// Those of a tokenizer, from its file.
    pub(super) fn of(tokenizer: &Value) -> Self {
        let normalizer = &tokenizer["normalizer"];
        // No canonical composition has a space or a line end in it.
        let neutral = normalizer.is_null() || normalizer["type"] == "NFC";
        if !neutral || !added_tokens_are_compact(&tokenizer["added_tokens"]) {
            return Self::Never;
        }
        let pre_tokenizer = &tokenizer["pre_tokenizer"];
        let byte_level = |part: &Value, use_regex| {
            part["type"] == "ByteLevel"
                && part["add_prefix_space"] == false
                // Files from before this field have none and mean `true`.
                && part["use_regex"].as_bool().unwrap_or(true) == use_regex
        };
        if byte_level(pre_tokenizer, true) {
            return Self::BetweenWords;
        }
        match pre_tokenizer["pretokenizers"].as_array().map(Vec::as_slice) {
            Some([split, rest]) if is_tiktoken(split) && byte_level(rest, false) => {
                Self::BeforeSpaces
            }
            _ => Self::Never,
        }
    }

    /// The parts of a text, in order: each is at least `least` bytes, but for the last one, and ends at the first cut
    /// after that. So a part is longer only where there is no cut for long.
    pub(crate) fn parts(self, text: &[u8], least: usize) -> impl Iterator<Item = &[u8]> {
        let mut rest = text;
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            let end = (least.max(1)..rest.len()).find(|&at| self.at(rest, at));
            let part;
            (part, rest) = rest.split_at(end.unwrap_or(rest.len()));
            Some(part)
        })
    }

    /// Whether a text may be cut before the byte `at`, which is not the first.
    fn at(self, text: &[u8], at: usize) -> bool {
        let kind = match self {
            Self::BetweenWords => text[at].is_ascii() && char::from(text[at]).is_whitespace(),
            Self::BeforeSpaces => text[at] == b' ',
            Self::Never => false,
        };
        kind && !ends_in_whitespace(&text[..at])
    }
}

/// Whether the last character of UTF-8 text is white space.
fn ends_in_whitespace(text: &[u8]) -> bool {
    let last = text.len().saturating_sub(4);
    let start = (last..text.len()).rev().find(|&at| text[at] & 0xC0 != 0x80);
    let character = start.and_then(|start| std::str::from_utf8(&text[start..]).ok());
    character.is_some_and(|character| character.ends_with(char::is_whitespace))
}

/// Whether no added token reaches over white space to its right: by its name, by swallowing it, or by looking at it.
fn added_tokens_are_compact(tokens: &Value) -> bool {
    let tokens = tokens.as_array().map_or(&[][..], Vec::as_slice);
    tokens.iter().all(|token| {
        let name = token["content"].as_str().unwrap_or_default();
        !name.contains(char::is_whitespace)
            && token["rstrip"] != true
            && token["single_word"] != true
    })
}

fn is_tiktoken(part: &Value) -> bool {
    part["type"] == "Split"
        && part["behavior"] == "Isolated"
        && part["invert"] == false
        && TIKTOKEN
            .iter()
            .any(|known| part["pattern"]["Regex"] == *known)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn parts(cuts: Cuts, text: &str, least: usize) -> Vec<&str> {
        let parts = cuts.parts(text.as_bytes(), least);
        parts
            .map(|part| std::str::from_utf8(part).unwrap())
            .collect()
    }

    #[test]
    fn texts_are_cut_before_white_space_that_follows_something_else() {
        let text = "ab  cd\n\nef é\u{3000} g.\nh";
        assert_eq!(
            parts(Cuts::BetweenWords, text, 1),
            ["ab", "  cd", "\n\nef", " é\u{3000} g.", "\nh"]
        );
        assert_eq!(
            parts(Cuts::BeforeSpaces, text, 1),
            ["ab", "  cd\n\nef", " é\u{3000} g.\nh"]
        );
        assert_eq!(parts(Cuts::Never, text, 1), [text]);
        assert_eq!(
            parts(Cuts::BetweenWords, text, 3),
            ["ab  cd", "\n\nef", " é\u{3000} g.", "\nh"]
        );
        assert_eq!(parts(Cuts::BetweenWords, "   ", 1), ["   "]);
        assert_eq!(parts(Cuts::BetweenWords, "", 1), [""; 0]);
    }

    #[test]
    fn tokenizers_that_are_not_known_are_not_cut() {
        let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": true});
        let known = json!({"normalizer": null, "added_tokens": [], "pre_tokenizer": byte_level});
        assert_eq!(Cuts::of(&known), Cuts::BetweenWords);
        let with = |field: &str, value: Value| {
            let mut tokenizer = known.clone();
            tokenizer[field] = value;
            Cuts::of(&tokenizer)
        };
        assert_eq!(
            with("normalizer", json!({"type": "NFC"})),
            Cuts::BetweenWords
        );
        assert_eq!(with("normalizer", json!({"type": "NFKC"})), Cuts::Never);
        let token =
            |name, rstrip| json!([{"content": name, "rstrip": rstrip, "single_word": false}]);
        assert_eq!(
            with("added_tokens", token("<s>", false)),
            Cuts::BetweenWords
        );
        assert_eq!(with("added_tokens", token("<s>", true)), Cuts::Never);
        assert_eq!(with("added_tokens", token("a b", false)), Cuts::Never);
        let prefixed = json!({"type": "ByteLevel", "add_prefix_space": true, "use_regex": true});
        assert_eq!(with("pre_tokenizer", prefixed), Cuts::Never);
        let sequence = |regex: &str| {
            let split = json!({"type": "Split", "behavior": "Isolated", "invert": false, "pattern": {"Regex": regex}});
            let rest = json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": false});
            json!({"type": "Sequence", "pretokenizers": [split, rest]})
        };
        for known in TIKTOKEN {
            assert_eq!(with("pre_tokenizer", sequence(known)), Cuts::BeforeSpaces);
        }
        assert_eq!(with("pre_tokenizer", sequence(r"\S+ \S+")), Cuts::Never);
    }

    proptest! {
        #[test]
        fn the_parts_are_the_text(text in "[a \\n.é\u{3000}\u{85}]{0,40}", least in 0_usize..9) {
            for cuts in [Cuts::BetweenWords, Cuts::BeforeSpaces, Cuts::Never] {
                let parts = parts(cuts, &text, least);
                prop_assert_eq!(parts.concat(), text.clone());
                let (_, whole) = parts.split_last().unwrap_or((&"", &[]));
                prop_assert!(whole.iter().all(|part| part.len() >= least.max(1)));
            }
        }
    }
}
