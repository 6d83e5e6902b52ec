//! The characters that stand for bytes in a byte-level tokenizer's file.

use std::sync::LazyLock;

use serde_json::{Map, Value, json};

/// The character of each byte: itself where it is printable, else one from U+0100 on, in order. It is that of GPT-2.
static CHARACTERS: LazyLock<[char; 256]> = LazyLock::new(|| {
    let mut others = 0x100..;
    std::array::from_fn(|byte| match byte {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte as u8),
        _ => others
            .next()
            .and_then(char::from_u32)
            .expect("68 characters follow U+00FF"),
    })
});

/// The character that stands for a byte.
pub(super) fn character(byte: u8) -> char {
    CHARACTERS[usize::from(byte)]
}

/// The bytes that a token's characters stand for; `None` if one of them stands for none.
pub(super) fn bytes(token: &str) -> Option<Vec<u8>> {
    let byte = |c| (0..=u8::MAX).find(|&byte| character(byte) == c);
    token.chars().map(byte).collect()
}

/// The tokenizer of bytes as a BPE without merges, in which the number of each token is its byte.
pub(super) fn tokenizer_of_bytes() -> Value {
    let vocabulary = (0..=u8::MAX).map(|byte| (character(byte).to_string(), Value::from(byte)));
    let byte_level = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true
    });
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [],
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": null,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": false,
            "vocab": vocabulary.collect::<Map<_, _>>(),
            "merges": [],
        },
    })
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use tokenizers::pre_tokenizers::byte_level::ByteLevel;

    use super::*;

    #[test]
    fn the_characters_are_those_of_the_library() {
        let ours: HashSet<char> = (0..=u8::MAX).map(character).collect();
        assert_eq!(ours, ByteLevel::alphabet().into_iter().collect());
        // The beginnings and ends of the ranges, from GPT-2's encoder.py.
        let some = [
            0x00, 0x20, 0x21, 0x7E, 0x7F, 0xA0, 0xA1, 0xAC, 0xAD, 0xAE, 0xFF,
        ];
        assert_eq!(
            some.map(character),
            ['Ā', 'Ġ', '!', '~', 'ġ', 'ł', '¡', '¬', 'Ń', '®', 'ÿ']
        );
    }

    #[test]
    fn characters_give_their_bytes() {
        assert_eq!(bytes("Ġash"), Some(b" ash".to_vec()));
        assert_eq!(bytes("Ã©"), Some("é".as_bytes().to_vec()));
        assert_eq!(bytes("▁ash"), None);
    }
}
