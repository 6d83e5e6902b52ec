//! One part of a corpus as one run of tokens.

use std::ops::Range;
use std::sync::Arc;

use crate::token_file::TokenFile;
use crate::{TextPart, TextStream, TokenUnit};

/// The tokens of one part of all documents, one after the other without a separator.
///
/// It is made of a [`TextStream`], whose tokens are its bytes, or comes from a [`TokenFile`]. Both share the memory of
/// what they are made of, and so does a clone.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let folder = tempfile::tempdir()?;
/// # let folder = folder.path();
/// use emberlm_text::{Corpus, TokenStream};
///
/// std::fs::write(folder.join("a.txt"), "coal")?;
/// std::fs::write(folder.join("b.txt"), "fire")?;
/// let stream = TokenStream::from(Corpus::open(&[folder.to_owned()])?.training());
/// assert_eq!(stream.tokens(2..6), b"alfi".map(u32::from));
/// assert_eq!(stream.documents(2..6), [0, 0, 1, 1]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct TokenStream {
    source: Source,
}

#[derive(Clone, Debug)]
enum Source {
    Text(TextStream),
    File(Arc<TokenFile>, TextPart),
}

impl From<TextStream> for TokenStream {
    fn from(text: TextStream) -> Self {
        Self {
            source: Source::Text(text),
        }
    }
}

impl TokenStream {
    pub(crate) fn of_file(file: Arc<TokenFile>, part: TextPart) -> Self {
        Self {
            source: Source::File(file, part),
        }
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        match &self.source {
            Source::Text(text) => text.len(),
            Source::File(file, part) => file.n_tokens(*part),
        }
    }

    /// Whether there are no tokens.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Which part of the documents this is.
    pub fn part(&self) -> TextPart {
        match &self.source {
            Source::Text(text) => text.part(),
            Source::File(_, part) => *part,
        }
    }

    /// One more than the largest token there can be.
    pub fn vocab_size(&self) -> usize {
        match &self.source {
            Source::Text(_) => 256,
            Source::File(file, _) => file.vocab_size(),
        }
    }

    /// What the tokens are called.
    pub fn unit(&self) -> TokenUnit {
        match &self.source {
            Source::Text(_) => TokenUnit::Byte,
            Source::File(..) => TokenUnit::Token,
        }
    }

    /// Size of the text that the tokens are of, in bytes.
    pub fn text_bytes(&self) -> u64 {
        match &self.source {
            Source::Text(text) => text.len() as u64,
            Source::File(file, part) => file.text_bytes(*part),
        }
    }

    /// Mean length of a token in bytes of text: 1 where a token is a byte, and where there are none.
    pub fn bytes_per_token(&self) -> f64 {
        match self.len() {
            0 => 1.0,
            n_tokens => self.text_bytes() as f64 / n_tokens as f64,
        }
    }

    /// Fills `buffer` with the tokens from `start` on, across the borders of documents.
    ///
    /// # Panics
    /// If the stream ends before the buffer is full.
    pub fn copy(&self, start: usize, buffer: &mut [u32]) {
        match &self.source {
            Source::Text(text) => {
                let mut bytes = vec![0; buffer.len()];
                text.copy(start, &mut bytes);
                buffer
                    .iter_mut()
                    .zip(bytes)
                    .for_each(|(token, byte)| *token = byte.into());
            }
            Source::File(file, part) => file.copy(*part, start, buffer),
        }
    }

    /// The tokens of a range: [`copy`](Self::copy) into a new buffer.
    ///
    /// # Panics
    /// If the stream ends before the range does, or the range before it starts.
    pub fn tokens(&self, range: Range<usize>) -> Vec<u32> {
        let mut tokens = vec![0; range.end - range.start];
        self.copy(range.start, &mut tokens);
        tokens
    }

    /// For each token of a range, the document it is of: its index in [`Corpus::documents`](crate::Corpus::documents).
    ///
    /// # Panics
    /// If the stream ends before the range does, or the range before it starts.
    pub fn documents(&self, range: Range<usize>) -> Vec<u32> {
        let ends = match &self.source {
            Source::Text(text) => text.ends(),
            Source::File(file, part) => file.ends(*part),
        };
        let length = self.len();
        assert!(
            range.start <= range.end && range.end <= length,
            "the range {range:?} is not in a stream of {length}"
        );
        let mut documents = Vec::with_capacity(range.len());
        let mut document = ends.partition_point(|&end| end <= range.start);
        for at in range {
            // Several, where documents have nothing in this part.
            while ends[document] <= at {
                document += 1;
            }
            documents.push(document as u32);
        }
        documents
    }
}
