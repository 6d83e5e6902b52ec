//! A corpus of sentence pairs from a file of tab-separated lines, and its split into training and held-out pairs.

use std::{
    collections::{BTreeMap, HashSet},
    fmt, fs, io,
    path::{Path, PathBuf},
};

use thiserror::Error;

/// A sentence and its translation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    /// In the language to translate from.
    pub source: String,
    /// In the language to translate to.
    pub target: String,
    /// Where in a work the pair stands, such as `1 John 3:16`, if the file says so.
    pub reference: Option<String>,
}

impl Pair {
    /// The book of the reference: what stands before its last space, or all of it.
    pub fn book(&self) -> Option<&str> {
        let reference = self.reference.as_deref()?;
        Some(
            reference
                .rsplit_once(' ')
                .map_or(reference, |(book, _)| book),
        )
    }
}

/// Sentence pairs in the order of their file.
///
/// Each line of the file is a pair: `source TAB target`, or `source TAB target TAB reference`, in UTF-8, the same
/// number of columns in all lines. A line ends with `\n` or `\r\n`; the last may lack it. Text is taken as it stands,
/// spaces included: there is no quoting and no escape, so that a tab cannot be part of a sentence.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("verses.tsv");
/// use emberlm_text::PairCorpus;
///
/// std::fs::write(&path, "Jesus wept.\tLloró Jesús.\tJohn 11:35\nRejoice evermore.\tEstad siempre gozosos.\t1 Thessalonians 5:16\n")?;
///
/// let corpus = PairCorpus::open(&path)?;
/// assert_eq!(corpus.pairs()[0].target, "Lloró Jesús.");
/// assert_eq!(corpus.books(), ["John", "1 Thessalonians"]);
/// let split = corpus.split_books(&["John"])?;
/// assert_eq!(split.training[0].source, "Rejoice evermore.");
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct PairCorpus {
    path: PathBuf,
    pairs: Vec<Pair>,
}

/// Pairs to train on and pairs to evaluate with, each in the order of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PairSplit<'a> {
    /// To train on.
    pub training: Vec<&'a Pair>,
    /// To evaluate with.
    pub held_out: Vec<&'a Pair>,
}

impl PairCorpus {
    /// Reads a file.
    ///
    /// # Errors
    ///
    /// A file that cannot be read, is not UTF-8 or has no lines; and, with its number, the first line without a tab,
    /// with more than two, with a column that is empty or blank, or with another number of columns than the first line.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, PairError> {
        let path = path.as_ref().to_owned();
        let bytes = fs::read(&path).map_err(|cause| PairError::Unreadable {
            path: path.clone(),
            cause,
        })?;
        let text = String::from_utf8(bytes).map_err(|error| PairError::InvalidUtf8 {
            path: path.clone(),
            line: 1 + line_breaks(error.as_bytes(), error.utf8_error().valid_up_to()),
        })?;
        let pairs = (1..)
            .zip(text.lines())
            .map(|(line, content)| read_pair(&path, line, content))
            .collect::<Result<Vec<_>, _>>()?;
        let Some(first) = pairs.first() else {
            return Err(PairError::Empty { path });
        };
        let has_reference = first.reference.is_some();
        if let Some(index) = pairs
            .iter()
            .position(|pair| pair.reference.is_some() != has_reference)
        {
            return Err(PairError::MixedColumns {
                path,
                line: index + 1,
                first_has: if has_reference { 3 } else { 2 },
            });
        }
        Ok(Self { path, pairs })
    }

    /// All pairs; there is at least one.
    pub fn pairs(&self) -> &[Pair] {
        &self.pairs
    }

    /// The books that the references name, in the order in which they first appear; none without references.
    pub fn books(&self) -> Vec<&str> {
        let mut seen = HashSet::new();
        self.pairs
            .iter()
            .filter_map(Pair::book)
            .filter(|&book| seen.insert(book))
            .collect()
    }

    /// Holds out `n_held_out` pairs at random. The same file and seed give the same pairs on every machine.
    ///
    /// Pairs with the same source stay together, so that no held-out sentence is one that was trained on. Which are held
    /// out depends on the sources alone: each source has the number `mix(fnv(source) ^ mix(seed))`, with the 64-bit
    /// FNV-1a hash of its bytes and splitmix64's `mix(z)` of `z + 0x9e3779b97f4a7c15`, and the sources with the smallest
    /// numbers are held out, one that would be too many being passed over.
    ///
    /// # Errors
    ///
    /// [`PairError::HeldOut`] unless `n_held_out` is at least 1 and leaves a pair to train on, or if pairs that share
    /// their source cannot make that number.
    pub fn split_random(&self, n_held_out: usize, seed: u64) -> Result<PairSplit<'_>, PairError> {
        let mut by_number: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
        for (index, pair) in self.pairs.iter().enumerate() {
            let number = mix(fnv(pair.source.as_bytes()) ^ mix(seed));
            by_number.entry(number).or_default().push(index);
        }
        let mut held_out = HashSet::new();
        for same_source in by_number.into_values() {
            if held_out.len() + same_source.len() <= n_held_out {
                held_out.extend(same_source);
            }
        }
        if n_held_out == 0 || n_held_out >= self.pairs.len() || held_out.len() != n_held_out {
            return Err(PairError::HeldOut {
                path: self.path.clone(),
                held_out: n_held_out,
                pairs: self.pairs.len(),
            });
        }
        Ok(self.split(|index, _| held_out.contains(&index)))
    }

    /// Holds out all pairs of the given books, so that nothing of them is seen in training.
    ///
    /// # Errors
    ///
    /// A file without references, a book that it does not have, no books at all, or no pairs left to train on.
    pub fn split_books(&self, held_out: &[&str]) -> Result<PairSplit<'_>, PairError> {
        let books = self.books();
        if books.is_empty() {
            return Err(PairError::NoReferences {
                path: self.path.clone(),
            });
        }
        if let Some(unknown) = held_out.iter().find(|book| !books.contains(book)) {
            return Err(PairError::UnknownBook {
                path: self.path.clone(),
                book: (*unknown).to_owned(),
            });
        }
        let split = self.split(|_, pair| pair.book().is_some_and(|book| held_out.contains(&book)));
        if split.held_out.is_empty() || split.training.is_empty() {
            return Err(PairError::HeldOut {
                path: self.path.clone(),
                held_out: split.held_out.len(),
                pairs: self.pairs.len(),
            });
        }
        Ok(split)
    }

    fn split(&self, is_held_out: impl Fn(usize, &Pair) -> bool) -> PairSplit<'_> {
        let mut split = PairSplit {
            training: Vec::new(),
            held_out: Vec::new(),
        };
        for (index, pair) in self.pairs.iter().enumerate() {
            let part = match is_held_out(index, pair) {
                true => &mut split.held_out,
                false => &mut split.training,
            };
            part.push(pair);
        }
        split
    }
}

/// Why a file of pairs cannot be used. Lines count from 1.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PairError {
    /// The file cannot be read.
    #[error("{path}: {cause}")]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// What the system says.
        #[source]
        cause: io::Error,
    },
    /// The file is not UTF-8.
    #[error("{path}, line {line}: not UTF-8; convert the file first")]
    InvalidUtf8 {
        /// Which file.
        path: PathBuf,
        /// The first line with an invalid byte.
        line: usize,
    },
    /// The file has no lines.
    #[error("{path}: no pairs; write one a line, source TAB target")]
    Empty {
        /// Which file.
        path: PathBuf,
    },
    /// A line has no tab.
    #[error("{path}, line {line}: no tab; a line is source TAB target")]
    NoTab {
        /// Which file.
        path: PathBuf,
        /// Which line.
        line: usize,
    },
    /// A line has more columns than there can be.
    #[error(
        "{path}, line {line}: {found} columns; a line is source TAB target, or these TAB reference"
    )]
    TooManyColumns {
        /// Which file.
        path: PathBuf,
        /// Which line.
        line: usize,
        /// Its columns.
        found: usize,
    },
    /// A column is empty or blank.
    #[error("{path}, line {line}: the {side} is empty")]
    EmptySide {
        /// Which file.
        path: PathBuf,
        /// Which line.
        line: usize,
        /// Which column.
        side: PairSide,
    },
    /// Some lines have a reference and others have none.
    #[error("{path}, line {line}: another number of columns than the {first_has} of line 1")]
    MixedColumns {
        /// Which file.
        path: PathBuf,
        /// The first line that differs.
        line: usize,
        /// The columns of line 1.
        first_has: usize,
    },
    /// Whole books cannot be held out of a file that names none.
    #[error("{path}: no references, so no books; add a third column, or split at random")]
    NoReferences {
        /// Which file.
        path: PathBuf,
    },
    /// No reference names the book.
    #[error("{path}: no pair is of the book {book:?}")]
    UnknownBook {
        /// Which file.
        path: PathBuf,
        /// Which book.
        book: String,
    },
    /// The split leaves nothing to train on or to evaluate with.
    #[error(
        "{path}: {held_out} of {pairs} pairs cannot be held out; both parts need at least one pair, and pairs with the same source stay together"
    )]
    HeldOut {
        /// Which file.
        path: PathBuf,
        /// Pairs to hold out.
        held_out: usize,
        /// All pairs.
        pairs: usize,
    },
}

/// A column of a file of pairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PairSide {
    /// The first.
    Source,
    /// The second.
    Target,
    /// The third.
    Reference,
}

impl fmt::Display for PairSide {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Source => "source",
            Self::Target => "target",
            Self::Reference => "reference",
        })
    }
}

fn read_pair(path: &Path, line: usize, content: &str) -> Result<Pair, PairError> {
    let columns: Vec<&str> = content.split('\t').collect();
    let (source, target, reference) = match columns[..] {
        [_] => {
            let path = path.to_owned();
            return Err(PairError::NoTab { path, line });
        }
        [source, target] => (source, target, None),
        [source, target, reference] => (source, target, Some(reference)),
        _ => {
            return Err(PairError::TooManyColumns {
                path: path.to_owned(),
                line,
                found: columns.len(),
            });
        }
    };
    let text = |side, text: &str| match text.trim() {
        "" => Err(PairError::EmptySide {
            path: path.to_owned(),
            line,
            side,
        }),
        _ => Ok(text.to_owned()),
    };
    Ok(Pair {
        source: text(PairSide::Source, source)?,
        target: text(PairSide::Target, target)?,
        reference: reference
            .map(|reference| text(PairSide::Reference, reference))
            .transpose()?,
    })
}

fn line_breaks(bytes: &[u8], end: usize) -> usize {
    bytes[..end].iter().filter(|&&byte| byte == b'\n').count()
}

/// The 64-bit FNV-1a hash, <https://datatracker.ietf.org/doc/draft-eastlake-fnv>.
fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// A step of splitmix64: Steele, Lea and Flood 2014, <https://doi.org/10.1145/2660193.2660195>.
fn mix(z: u64) -> u64 {
    let z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
