//! The manifest of a checkpoint: what its files must be, and the check that they are.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{Checkpoint, Damage};

/// The manifest's own file name.
pub(super) const MANIFEST: &str = "manifest.json";

/// Raised when an older program could no longer read what this one writes.
const FORMAT: u32 = 1;

/// What `manifest.json` says.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Manifest {
    format: u32,
    step: u64,
    /// Finite, or none.
    pub(super) score: Option<f64>,
    files: BTreeMap<String, Entry>,
}

/// What one file must be.
#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    length: u64,
    crc32: u32,
}

/// The one field that every format has, read first.
#[derive(Deserialize)]
struct Format {
    format: u32,
}

impl Manifest {
    /// The manifest of a checkpoint about to be written. A score that is not finite counts as none.
    ///
    /// # Panics
    /// On a file name that is empty, used twice, `manifest.json`, begins with a dot or has
    /// characters other than ASCII letters, digits, `.`, `_` and `-`.
    pub(super) fn new(step: u64, files: &[(&str, &[u8])], score: Option<f64>) -> Self {
        let mut entries = BTreeMap::new();
        for &(name, bytes) in files {
            assert!(
                is_file_name(name),
                "{name:?} cannot be the name of a file in a checkpoint"
            );
            let entry = Entry {
                length: bytes.len() as u64,
                crc32: crc32fast::hash(bytes),
            };
            let twice = entries.insert(name.to_owned(), entry).is_some();
            assert!(!twice, "a checkpoint cannot hold two files named {name:?}");
        }
        Self {
            format: FORMAT,
            step,
            score: score.filter(|score| score.is_finite()),
            files: entries,
        }
    }

    /// The text of `manifest.json`.
    pub(super) fn encode(&self) -> String {
        let mut text =
            serde_json::to_string_pretty(self).expect("a manifest has only plain fields");
        text.truncate(text.len() - "\n}".len());
        let seal = seal(&text);
        text + &seal
    }

    /// Reads the manifest in `folder`, and checks that it is one of `step` and its own seal.
    pub(super) fn read(folder: &Path, step: u64) -> Result<Self, Damage> {
        let bytes =
            fs::read(folder.join(MANIFEST)).map_err(|reason| unreadable(MANIFEST, reason))?;
        let text = sealed(&bytes).ok_or_else(|| Damage::Checksum {
            file: MANIFEST.to_owned(),
        })?;
        let malformed = |reason| Damage::Manifest { reason };
        let Format { format } = serde_json::from_str(text).map_err(malformed)?;
        if format != FORMAT {
            return Err(Damage::Format {
                found: format,
                supported: FORMAT,
            });
        }
        let manifest: Self = serde_json::from_str(text).map_err(malformed)?;
        if manifest.step != step {
            return Err(Damage::Step {
                expected: step,
                found: manifest.step,
            });
        }
        // A name with `..` in it would read a file of somebody else.
        if let Some(name) = manifest.files.keys().find(|name| !is_file_name(name)) {
            return Err(Damage::FileName { name: name.clone() });
        }
        Ok(manifest)
    }

    /// Checks that the files are there with their lengths, without reading them.
    pub(super) fn check_lengths(&self, folder: &Path) -> Result<(), Damage> {
        for (name, entry) in &self.files {
            let found = fs::metadata(folder.join(name))
                .map_err(|reason| unreadable(name, reason))?
                .len();
            entry.check_length(name, found)?;
        }
        Ok(())
    }

    /// Reads all files and checks every byte.
    pub(super) fn load(self, folder: &Path) -> Result<Checkpoint, Damage> {
        let mut files = BTreeMap::new();
        for (name, entry) in self.files {
            let bytes = fs::read(folder.join(&name)).map_err(|reason| unreadable(&name, reason))?;
            entry.check_length(&name, bytes.len() as u64)?;
            if crc32fast::hash(&bytes) != entry.crc32 {
                return Err(Damage::Checksum { file: name });
            }
            files.insert(name, bytes);
        }
        Ok(Checkpoint {
            step: self.step,
            score: self.score,
            files,
        })
    }
}

impl Entry {
    fn check_length(&self, name: &str, found: u64) -> Result<(), Damage> {
        if found != self.length {
            return Err(Damage::Length {
                file: name.to_owned(),
                expected: self.length,
                found,
            });
        }
        Ok(())
    }
}

/// The end of a manifest whose text so far is `head`. It covers the text and not the values, so that
/// checking it needs no parser; with it the whole is still JSON.
fn seal(head: &str) -> String {
    format!(
        ",\n  \"crc32\": \"{:08x}\"\n}}\n",
        crc32fast::hash(head.as_bytes())
    )
}

/// The text of a manifest whose seal is unbroken.
fn sealed(bytes: &[u8]) -> Option<&str> {
    let text = std::str::from_utf8(bytes).ok()?;
    let (head, tail) = text.split_at_checked(text.len().checked_sub(seal("").len())?)?;
    (tail == seal(head)).then_some(text)
}

/// Names that mean the same on every file system and stay inside the folder.
fn is_file_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    !name.is_empty() && !name.starts_with('.') && name != MANIFEST && name.bytes().all(plain)
}

fn unreadable(name: &str, reason: io::Error) -> Damage {
    let file = name.to_owned();
    match reason.kind() {
        io::ErrorKind::NotFound => Damage::Missing { file },
        _ => Damage::Unreadable { file, reason },
    }
}

#[cfg(test)]
impl Manifest {
    /// As another version of the program would write it.
    pub(super) fn of_another_format(mut self) -> Self {
        self.format += 1;
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILES: &[(&str, &[u8])] = &[("model", b"weights"), ("optimizer.bin", b"")];

    fn written(text: &[u8]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(MANIFEST), text).unwrap();
        for (name, bytes) in FILES {
            fs::write(folder.path().join(name), bytes).unwrap();
        }
        folder
    }

    fn resealed(from: &str, to: &str) -> tempfile::TempDir {
        let text = Manifest::new(7, FILES, None).encode();
        let head = &text[..text.len() - seal("").len()];
        assert!(head.contains(from));
        let head = head.replace(from, to);
        written(format!("{head}{}", seal(&head)).as_bytes())
    }

    #[test]
    fn reads_back_what_was_written() {
        // The last needs a parser that rounds correctly: serde_json's `float_roundtrip`.
        for score in [
            None,
            Some(-0.0),
            Some(f64::MIN_POSITIVE),
            Some(0.1 + 0.2),
            Some(1.8138734630502207),
        ] {
            let folder = written(Manifest::new(u64::MAX, FILES, score).encode().as_bytes());
            let manifest = Manifest::read(folder.path(), u64::MAX).unwrap();
            manifest.check_lengths(folder.path()).unwrap();
            let checkpoint = manifest.load(folder.path()).unwrap();
            assert_eq!(checkpoint.score.map(f64::to_bits), score.map(f64::to_bits));
            let files = FILES
                .iter()
                .map(|(name, bytes)| (name.to_string(), bytes.to_vec()));
            assert_eq!(checkpoint.files, files.collect());
        }
    }

    #[test]
    fn a_score_that_is_not_finite_is_none() {
        for score in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            assert_eq!(Manifest::new(7, FILES, Some(score)).score, None);
        }
    }

    #[test]
    fn any_changed_or_missing_byte_of_the_manifest_is_seen() {
        let text = Manifest::new(7, FILES, Some(1.5)).encode();
        assert_eq!(sealed(text.as_bytes()), Some(text.as_str()));
        for index in 0..text.len() {
            for bit in 0..8 {
                let mut flipped = text.clone().into_bytes();
                flipped[index] ^= 1 << bit;
                assert_eq!(sealed(&flipped), None, "bit {bit} of byte {index}");
            }
            assert_eq!(sealed(&text.as_bytes()[..index]), None, "{index} bytes");
        }
    }

    #[test]
    fn a_sealed_manifest_must_still_make_sense() {
        let read = |folder: tempfile::TempDir| Manifest::read(folder.path(), 7).unwrap_err();
        let damage = read(resealed("\"format\": 1", "\"format\": 2"));
        assert!(
            matches!(
                damage,
                Damage::Format {
                    found: 2,
                    supported: 1
                }
            ),
            "{damage}"
        );
        let damage = read(resealed("\"step\": 7", "\"step\": 8"));
        assert!(
            matches!(
                damage,
                Damage::Step {
                    expected: 7,
                    found: 8
                }
            ),
            "{damage}"
        );
        let damage = read(resealed("\"step\": 7", "\"step\": -7"));
        assert!(matches!(damage, Damage::Manifest { .. }), "{damage}");
        let damage = read(resealed("\"model\"", "\"../model\""));
        assert!(matches!(damage, Damage::FileName { .. }), "{damage}");
    }

    #[test]
    fn file_names_stay_in_the_folder() {
        for name in [
            "", ".", "..", ".hidden", "a/b", "a\\b", "a:b", "ä", "a b", MANIFEST,
        ] {
            assert!(!is_file_name(name), "{name:?}");
        }
        for name in ["model", "optimizer.bin", "rng_state-0"] {
            assert!(is_file_name(name), "{name:?}");
        }
    }

    #[test]
    #[should_panic(expected = "two files named \"model\"")]
    fn a_name_used_twice_panics() {
        Manifest::new(7, &[("model", b"a"), ("model", b"b")], None);
    }

    #[test]
    #[should_panic(expected = "cannot be the name")]
    fn a_name_outside_the_folder_panics() {
        Manifest::new(7, &[("../model", b"a")], None);
    }
}
