//! Classes of tokens: kinds of characters, or parts of speech.

use std::{fs, io, path::Path};

use thiserror::Error;

/// A text, and the class of every byte of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClassifiedText {
    /// The text.
    pub text: String,
    /// Of each byte of the text, the number of its class.
    pub classes: Vec<u32>,
    /// The names of the classes.
    pub names: Vec<String>,
}

/// A text that has no classes.
#[derive(Debug, Error)]
pub enum ClassError {
    /// It cannot be read.
    #[error("{path}: {source}")]
    Io {
        /// Which file.
        path: String,
        /// What the system says.
        source: io::Error,
    },
    /// A word without a tag.
    #[error("{path}: \"{word}\" has no tag: words look like word/tag")]
    Untagged {
        /// Which file.
        path: String,
        /// Which word.
        word: String,
    },
    /// There is nothing in it.
    #[error("{path} has no words")]
    Empty {
        /// Which file or folder.
        path: String,
    },
}

const CHARACTERS: [&str; 8] = [
    "vowel",
    "consonant",
    "capital",
    "digit",
    "space",
    "line end",
    "quote",
    "punctuation",
];

/// The kinds of characters, byte by byte; a byte of a longer character is of the last kind.
pub fn by_character(text: String) -> ClassifiedText {
    let class = |byte: u8| match byte {
        b'a' | b'e' | b'i' | b'o' | b'u' => 0,
        b'a'..=b'z' => 1,
        b'A'..=b'Z' => 2,
        b'0'..=b'9' => 3,
        b' ' | b'\t' => 4,
        b'\n' | b'\r' => 5,
        b'"' | b'\'' | b'`' => 6,
        _ => 7,
    };
    ClassifiedText {
        classes: text.bytes().map(class).collect(),
        names: CHARACTERS.map(str::to_owned).to_vec(),
        text,
    }
}

const PARTS: [(&str, &[&str]); 11] = [
    ("noun", &["nn", "nr"]),
    ("name", &["np"]),
    ("pronoun", &["pn", "pp", "wp"]),
    ("verb", &["vb", "be", "do", "hv", "md"]),
    ("adjective", &["jj"]),
    ("adverb", &["rb", "rn", "rp", "wr", "ql"]),
    ("determiner", &["at", "dt", "ab", "ap", "wd"]),
    ("preposition", &["in", "to"]),
    ("conjunction", &["cc", "cs"]),
    ("number", &["cd", "od"]),
    (
        "punctuation",
        &[".", ",", ":", "(", ")", "'", "`", "-", "*"],
    ),
];

/// Parts of speech of a text in the form of the tagged Brown corpus, `word/tag`, or of all files of a folder of such; a
/// byte between words has the part of the word before.
///
/// # Errors
///
/// Files that cannot be read or are not of this form.
pub fn by_part_of_speech(path: &Path) -> Result<ClassifiedText, ClassError> {
    let name = |path: &Path| path.display().to_string();
    let io = |path: &Path| {
        let path = name(path);
        move |source| ClassError::Io { path, source }
    };
    let mut files = vec![path.to_owned()];
    if path.is_dir() {
        let entries = fs::read_dir(path).map_err(io(path))?;
        let entries = entries.collect::<Result<Vec<_>, _>>().map_err(io(path))?;
        files = entries
            .iter()
            .map(fs::DirEntry::path)
            .filter(|path| path.is_file())
            .collect();
        files.sort();
    }
    let mut names: Vec<String> = PARTS.iter().map(|(name, _)| (*name).to_owned()).collect();
    names.push("other".to_owned());
    let (mut text, mut classes) = (String::new(), Vec::new());
    for file in &files {
        let tagged = fs::read_to_string(file).map_err(io(file))?;
        for word in tagged.split_whitespace() {
            let Some((word, tag)) = word.rsplit_once('/') else {
                return Err(ClassError::Untagged {
                    path: name(file),
                    word: word.to_owned(),
                });
            };
            let class = part_of(tag);
            if !text.is_empty() {
                text.push(' ');
                classes.push(*classes.last().expect("a word came before"));
            }
            text.push_str(word);
            classes.resize(text.len(), class);
        }
    }
    match text.is_empty() {
        true => Err(ClassError::Empty { path: name(path) }),
        false => Ok(ClassifiedText {
            text,
            classes,
            names,
        }),
    }
}

/// The class of a tag of the Brown corpus, by what it begins with.
fn part_of(tag: &str) -> u32 {
    // A foreign word has its part behind the prefix.
    let tag = tag.strip_prefix("fw-").unwrap_or(tag);
    let begins = |beginnings: &[&str]| {
        beginnings
            .iter()
            .any(|beginning| tag.starts_with(beginning))
    };
    let found = PARTS.iter().position(|(_, beginnings)| begins(beginnings));
    found.unwrap_or(PARTS.len()) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_have_kinds() {
        let text = by_character("Ab1 e\n\".é".to_owned());
        assert_eq!(text.classes, [2, 1, 3, 4, 0, 5, 6, 7, 7, 7]);
        assert_eq!(text.names.len(), 8);
    }

    #[test]
    fn words_have_the_part_of_their_tag() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("a"), "\n\tThe/at jury/nn said/vbd ./.\n").unwrap();
        fs::write(folder.path().join("b"), "and/or/cc").unwrap();
        let text = by_part_of_speech(folder.path()).unwrap();
        assert_eq!(text.text, "The jury said . and/or");
        assert_eq!(text.classes.len(), text.text.len());
        let class = |byte: usize| &text.names[text.classes[byte] as usize][..];
        assert_eq!(
            [0, 4, 8, 9, 14, 16].map(class),
            [
                "determiner",
                "noun",
                "noun",
                "verb",
                "punctuation",
                "conjunction"
            ]
        );
    }

    #[test]
    fn what_is_not_tagged_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        fs::write(&path, "The/at jury").unwrap();
        let error = by_part_of_speech(&path).unwrap_err().to_string();
        assert!(
            error.ends_with("\"jury\" has no tag: words look like word/tag"),
            "{error}"
        );
        fs::write(&path, "").unwrap();
        by_part_of_speech(&path).unwrap_err();
    }
}
