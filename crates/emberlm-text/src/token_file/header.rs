//! The first bytes of a token file.

use super::Damage;

/// What stands before the tokens. All numbers are little-endian.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// Bytes a token: 2 or 4.
    pub(super) width: u32,
    pub(super) vocab_size: u32,
    /// CRC-32 of the tokenizer.
    pub(super) tokenizer: u32,
    /// CRC-32 of the corpus.
    pub(super) text: u32,
    /// CRC-32 of all that follows the header.
    pub(super) content: u32,
    pub(super) n_documents: u64,
    /// Of the training and the held-out part.
    pub(super) n_tokens: [u64; 2],
    pub(super) text_bytes: [u64; 2],
}

const MAGIC: [u8; 8] = *b"EMBERTOK";
const VERSION: u32 = 1;
/// Where its own CRC-32 stands.
const CRC_AT: usize = Header::BYTES - 4;

impl Header {
    /// Its length. The tokens follow at a multiple of their width.
    pub(super) const BYTES: usize = 80;

    pub(super) fn to_bytes(&self) -> [u8; Self::BYTES] {
        let mut bytes = Vec::with_capacity(Self::BYTES);
        bytes.extend_from_slice(&MAGIC);
        let words = [
            VERSION,
            self.width,
            self.vocab_size,
            self.tokenizer,
            self.text,
            self.content,
        ];
        words
            .iter()
            .for_each(|word| bytes.extend_from_slice(&word.to_le_bytes()));
        let [training, held_out] = self.n_tokens;
        let [training_bytes, held_out_bytes] = self.text_bytes;
        let counts = [
            self.n_documents,
            training,
            held_out,
            training_bytes,
            held_out_bytes,
        ];
        counts
            .iter()
            .for_each(|count| bytes.extend_from_slice(&count.to_le_bytes()));
        bytes.resize(CRC_AT, 0);
        bytes.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
        bytes.try_into().expect("its fields have this length")
    }

    pub(super) fn from_bytes(file: &[u8]) -> Result<Self, Damage> {
        let Some(bytes) = file.first_chunk::<{ Self::BYTES }>() else {
            return Err(Damage::Truncated);
        };
        if bytes[..8] != MAGIC {
            return Err(Damage::Foreign);
        }
        let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|byte| bytes[at + byte]));
        let count = |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| bytes[at + byte]));
        if word(CRC_AT) != crc32fast::hash(&bytes[..CRC_AT]) {
            return Err(Damage::Checksum);
        }
        if word(8) != VERSION {
            return Err(Damage::Foreign);
        }
        Ok(Self {
            width: word(12),
            vocab_size: word(16),
            tokenizer: word(20),
            text: word(24),
            content: word(28),
            n_documents: count(32),
            n_tokens: [count(40), count(48)],
            text_bytes: [count(56), count(64)],
        })
    }
}
