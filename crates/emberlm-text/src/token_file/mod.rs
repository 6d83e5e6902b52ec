//! A corpus as tokens on disk: tokenised once, then mapped into memory.
//!
//! The file is a header of 80 bytes, the tokens of the training part and of the held-out part (2 bytes each if the
//! vocabulary fits, else 4), and for both parts the ends of all documents, counted in tokens of the part (8 bytes
//! each). All numbers are little-endian. The header has the checksums of everything.

mod build;
mod header;

use std::fmt;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::mapped::MappedBytes;
use crate::{Corpus, Progress, TextError, TextPart, TokenStream, Tokenizer};
use build::build;
use header::Header;

/// The parts of a corpus, in the order of the file.
const PARTS: [TextPart; 2] = [TextPart::Training, TextPart::HeldOut];

/// The tokens of a corpus, mapped into memory.
///
/// The training and the held-out part of each document are tokenised by themselves, so both are the same text as that
/// of [`Corpus::training`] and [`Corpus::held_out`]. Within a part nothing is cut: the tokens are those of
/// [`Tokenizer::encode`] of each document's part as a whole. Where the tokenizer's words are known to end, a document
/// is read in small parts, in parallel, so text and tokens may be larger than memory. That is so for tokenizers of
/// [`BpeTraining`](crate::BpeTraining), of GPT-2, Llama 3, Qwen and alike; of others each document's part is read as
/// one. A word, and what has no white space in it, is always read as one.
///
/// The file must not change while this value lives: see [`MappedText`](crate::MappedText).
pub struct TokenFile {
    path: PathBuf,
    content: MappedBytes,
    header: Header,
    /// For both parts, where each document ends in it, in tokens.
    ends: [Vec<usize>; 2],
}

/// What was found where a corpus should be as tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheState {
    /// The tokens, intact.
    Found,
    /// Nothing: it was tokenised.
    Built,
    /// A file that could not be used: it was tokenised again.
    Rebuilt(Damage),
}

/// What is wrong with a token file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Damage {
    /// It is shorter or longer than it says.
    Truncated,
    /// It is something else, or of another version.
    Foreign,
    /// A checksum is another.
    Checksum,
    /// It is of another text or tokenizer.
    Other,
    /// The system cannot read it.
    Unreadable,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Truncated => "it is not as long as it says",
            Self::Foreign => "it is no token file of this version",
            Self::Checksum => "its checksum is wrong",
            Self::Other => "it is of another text or tokenizer",
            Self::Unreadable => "it cannot be read",
        })
    }
}

impl TokenFile {
    /// The tokens of a corpus from the folder `cache`, tokenised now if they are not there or damaged.
    ///
    /// The file's name is made of the checksums of text and tokenizer, so one folder serves many of both, and is
    /// emptied by deleting what is in it. While one process tokenises into a folder, others wait. `progress` is told of
    /// text that is tokenised.
    ///
    /// # Errors
    /// [`TextError::Unwritable`], and [`TextError::Changed`] if a file of the corpus was changed meanwhile.
    pub fn cached(
        corpus: &Corpus,
        tokenizer: &Tokenizer,
        cache: &Path,
        progress: impl FnMut(Progress),
    ) -> Result<(Arc<Self>, CacheState), TextError> {
        let path = cache.join(format!(
            "{:08x}-{:08x}.tokens",
            corpus.crc32(),
            tokenizer.crc32()
        ));
        if let Ok(file) = Self::open_as(&path, corpus, tokenizer) {
            return Ok((file, CacheState::Found));
        }
        fs::create_dir_all(cache).map_err(TextError::unwritable(cache))?;
        let _lock = lock(cache)?;
        // Again: another process may have been at it.
        let state = match Self::open_as(&path, corpus, tokenizer) {
            Ok(file) => return Ok((file, CacheState::Found)),
            Err(None) => CacheState::Built,
            Err(Some(damage)) => CacheState::Rebuilt(damage),
        };
        build(corpus, tokenizer, &path, progress)?;
        match Self::open_as(&path, corpus, tokenizer) {
            Ok(file) => Ok((file, state)),
            Err(damage) => {
                let damage = damage.map_or("it is gone again".to_owned(), |d| d.to_string());
                Err(TextError::unwritable(&path)(io::Error::other(damage)))
            }
        }
    }

    /// Opens a token file and checks all of it.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn open(path: &Path) -> Result<Arc<Self>, Damage> {
        Self::open_any(path).map_err(|damage| damage.unwrap_or(Damage::Unreadable))
    }

    /// The error is `None` if there is no file.
    fn open_any(path: &Path) -> Result<Arc<Self>, Option<Damage>> {
        let content = MappedBytes::open(path).map_err(|cause| match cause.kind() {
            ErrorKind::NotFound => None,
            _ => Some(Damage::Unreadable),
        })?;
        let (header, ends) = check(content.as_slice())?;
        Ok(Arc::new(Self {
            path: path.to_owned(),
            content,
            header,
            ends,
        }))
    }

    /// As [`open_any`](Self::open_any), and checks whether it is that of this corpus and tokenizer.
    fn open_as(
        path: &Path,
        corpus: &Corpus,
        tokenizer: &Tokenizer,
    ) -> Result<Arc<Self>, Option<Damage>> {
        let file = Self::open_any(path)?;
        let expected = Header {
            width: width(tokenizer.vocab_size()),
            vocab_size: tokenizer.vocab_size() as u32,
            tokenizer: tokenizer.crc32(),
            text: corpus.crc32(),
            n_documents: corpus.documents().len() as u64,
            text_bytes: [corpus.training(), corpus.held_out()].map(|text| text.len() as u64),
            ..file.header.clone()
        };
        if file.header == expected {
            Ok(file)
        } else {
            Err(Some(Damage::Other))
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// One more than the largest token there can be.
    pub fn vocab_size(&self) -> usize {
        self.header.vocab_size as usize
    }

    /// The training parts of all documents.
    pub fn training(self: &Arc<Self>) -> TokenStream {
        TokenStream::of_file(self.clone(), TextPart::Training)
    }

    /// The held-out parts of all documents.
    pub fn held_out(self: &Arc<Self>) -> TokenStream {
        TokenStream::of_file(self.clone(), TextPart::HeldOut)
    }

    pub(crate) fn n_tokens(&self, part: TextPart) -> usize {
        self.header.n_tokens[index(part)] as usize
    }

    pub(crate) fn text_bytes(&self, part: TextPart) -> u64 {
        self.header.text_bytes[index(part)]
    }

    pub(crate) fn ends(&self, part: TextPart) -> &[usize] {
        &self.ends[index(part)]
    }

    /// Fills `buffer` with the tokens of a part from `start` on.
    ///
    /// # Panics
    /// If the part ends before the buffer is full.
    pub(crate) fn copy(&self, part: TextPart, start: usize, buffer: &mut [u32]) {
        let length = self.n_tokens(part);
        assert!(
            start <= length && buffer.len() <= length - start,
            "{} tokens from {start} on are not in a stream of {length}",
            buffer.len()
        );
        let before = match part {
            TextPart::Training => 0,
            TextPart::HeldOut => self.n_tokens(TextPart::Training),
        };
        let width = self.header.width as usize;
        let from = Header::BYTES + (before + start) * width;
        let bytes = &self.content.as_slice()[from..from + buffer.len() * width];
        let tokens = buffer.iter_mut();
        if width == 2 {
            let (stored, _) = bytes.as_chunks::<2>();
            tokens
                .zip(stored)
                .for_each(|(token, &bytes)| *token = u16::from_le_bytes(bytes).into());
        } else {
            let (stored, _) = bytes.as_chunks::<4>();
            tokens
                .zip(stored)
                .for_each(|(token, &bytes)| *token = u32::from_le_bytes(bytes));
        }
    }
}

impl fmt::Debug for TokenFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenFile")
            .field("path", &self.path)
            .field("header", &self.header)
            .finish_non_exhaustive()
    }
}

/// Bytes a token, the fewest that hold it.
fn width(vocab_size: usize) -> u32 {
    if vocab_size <= 1 << 16 { 2 } else { 4 }
}

fn index(part: TextPart) -> usize {
    match part {
        TextPart::Training => 0,
        TextPart::HeldOut => 1,
    }
}

/// Keeps other processes from tokenising into a folder until it is dropped.
fn lock(cache: &Path) -> Result<File, TextError> {
    let path = cache.join("lock");
    let locked = File::create(&path).and_then(|file| file.lock().map(|()| file));
    locked.map_err(TextError::unwritable(&path))
}

/// Checks a file from its first byte to its last and gives its header and where the documents end.
fn check(file: &[u8]) -> Result<(Header, [Vec<usize>; 2]), Damage> {
    let header = Header::from_bytes(file)?;
    let [training, held_out] = header.n_tokens.map(u128::from);
    let tokens = (training + held_out) * u128::from(header.width);
    let ends = 16 * u128::from(header.n_documents);
    if file.len() as u128 != Header::BYTES as u128 + tokens + ends {
        return Err(Damage::Truncated);
    }
    let content = &file[Header::BYTES..];
    if crc32fast::hash(content) != header.content {
        return Err(Damage::Checksum);
    }
    let (ends, _) = content[tokens as usize..].as_chunks::<8>();
    let ends: Vec<usize> = ends
        .iter()
        .map(|&end| u64::from_le_bytes(end) as usize)
        .collect();
    let (training, held_out) = ends.split_at(header.n_documents as usize);
    Ok((header, [training.to_vec(), held_out.to_vec()]))
}
