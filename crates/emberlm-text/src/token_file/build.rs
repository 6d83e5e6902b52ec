//! Writing a token file: the text in parts, tokenised in parallel, written in order.

use std::fs::File;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::Path;

use rayon::prelude::*;

use super::{Header, PARTS, width};
use crate::atomic::write_whole;
use crate::{Corpus, Document, Progress, TextError, Tokenizer};

/// Bytes of text that are tokenised at once, at least: with what the tokenizer needs besides, some MiB.
const PART: usize = 64 * 1024;
/// Parts of the text that a thread gets before their tokens are written.
const PARTS_PER_THREAD: usize = 8;

/// Tokenises a corpus into a new file at `path`, which is there whole or not at all.
pub(super) fn build(
    corpus: &Corpus,
    tokenizer: &Tokenizer,
    path: &Path,
    progress: impl FnMut(Progress),
) -> Result<(), TextError> {
    // What is wrong with the text does not fit an error of writing, so it is carried past it.
    let mut changed = None;
    let written = write_whole(path, |file| {
        let mut writer = Writer::new(file, corpus, tokenizer, progress)?;
        for (part, text_part) in PARTS.into_iter().enumerate() {
            for document in corpus.documents() {
                if let Err(error) = writer.write(part, document, document.part(text_part))? {
                    changed = Some(error);
                    return Err(io::ErrorKind::InvalidData.into());
                }
            }
        }
        writer.finish()
    });
    match (written, changed) {
        (_, Some(changed)) => Err(changed),
        (written, None) => written.map_err(TextError::unwritable(path)),
    }
}

struct Writer<'a, P> {
    file: BufWriter<&'a mut File>,
    tokenizer: &'a Tokenizer,
    header: Header,
    hasher: crc32fast::Hasher,
    /// Where each document ends, in tokens of its part.
    ends: [Vec<u64>; 2],
    done: u64,
    total: u64,
    progress: P,
}

impl<'a, P: FnMut(Progress)> Writer<'a, P> {
    fn new(
        file: &'a mut File,
        corpus: &Corpus,
        tokenizer: &'a Tokenizer,
        progress: P,
    ) -> io::Result<Self> {
        // The place of the header, which is known in the end.
        file.write_all(&[0; Header::BYTES])?;
        Ok(Self {
            file: BufWriter::with_capacity(1 << 20, file),
            tokenizer,
            header: Header {
                width: width(tokenizer.vocab_size()),
                vocab_size: tokenizer.vocab_size() as u32,
                tokenizer: tokenizer.crc32(),
                text: corpus.crc32(),
                content: 0,
                n_documents: corpus.documents().len() as u64,
                n_tokens: [0; 2],
                text_bytes: [0; 2],
            },
            hasher: crc32fast::Hasher::new(),
            ends: [Vec::new(), Vec::new()],
            done: 0,
            total: (corpus.training().len() + corpus.held_out().len()) as u64,
            progress,
        })
    }

    /// Tokenises one part of a document. The inner error is one of the text.
    fn write(
        &mut self,
        part: usize,
        document: &Document,
        text: &[u8],
    ) -> io::Result<Result<(), TextError>> {
        let mut parts = self.tokenizer.cuts().parts(text, PART);
        let at_once = PARTS_PER_THREAD * rayon::current_num_threads();
        loop {
            let batch: Vec<&[u8]> = parts.by_ref().take(at_once).collect();
            if batch.is_empty() {
                break;
            }
            let tokenizer = self.tokenizer;
            let width = self.header.width;
            // Copied: a mapped file that someone changes is UTF-8 no longer.
            let encoded: Result<Vec<Vec<u8>>, _> = batch
                .par_iter()
                .map(|text| {
                    let text = String::from_utf8(text.to_vec())?;
                    Ok(to_bytes(&tokenizer.encode(&text), width))
                })
                .collect();
            let Ok::<_, std::string::FromUtf8Error>(encoded) = encoded else {
                let path = document.path().to_owned();
                return Ok(Err(TextError::Changed { path }));
            };
            for (tokens, text) in encoded.iter().zip(batch) {
                self.append(tokens)?;
                self.header.n_tokens[part] += tokens.len() as u64 / u64::from(width);
                self.done += text.len() as u64;
                (self.progress)(Progress {
                    done: self.done,
                    total: self.total,
                });
            }
        }
        self.header.text_bytes[part] += text.len() as u64;
        self.ends[part].push(self.header.n_tokens[part]);
        Ok(Ok(()))
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hasher.update(bytes);
        self.file.write_all(bytes)
    }

    fn finish(mut self) -> io::Result<()> {
        for end in std::mem::take(&mut self.ends).concat() {
            self.append(&end.to_le_bytes())?;
        }
        self.header.content = self.hasher.finalize();
        self.file.seek(SeekFrom::Start(0))?;
        self.file.write_all(&self.header.to_bytes())?;
        self.file.flush()
    }
}

fn to_bytes(tokens: &[u32], width: u32) -> Vec<u8> {
    match width {
        2 => tokens
            .iter()
            .flat_map(|&token| (token as u16).to_le_bytes())
            .collect(),
        _ => tokens
            .iter()
            .flat_map(|token| token.to_le_bytes())
            .collect(),
    }
}
