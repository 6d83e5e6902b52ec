//! Bytes as n-grams: what a classifier of long texts reads at each byte.

/// Bytes of an n-gram.
const LENGTH: usize = 4;

/// Bits of its hash: the rows of its table.
const BITS: u32 = 14;

/// Stands at the first position, whose state is read.
const CLASS: i64 = 1 << BITS;

/// Number of tokens: the hashes, and the one at the first position.
pub const N_NGRAMS: usize = CLASS as usize + 1;

/// The tokens of a text, one a byte: at the first byte a token that all texts share, at each other one the hash of the four
/// bytes that end there, or of as many as there are.
///
/// A table of hashed n-grams beside that of bytes is what Pagnoni et al. 2024 read bytes with
/// (<https://arxiv.org/abs/2412.09871>, section 3.2.1). Here it is alone.
pub fn ngrams(text: &[u8]) -> impl Iterator<Item = i64> {
    let of_end = |end: usize| {
        let bytes = &text[(end + 1).saturating_sub(LENGTH)..=end];
        let number = bytes
            .iter()
            .fold(0, |number: u64, byte| number * 257 + u64::from(*byte) + 1);
        // Fibonacci hashing: the higher bits of a product with 2^64 / golden ratio.
        (number.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> (64 - BITS)) as i64
    };
    (0..text.len()).map(move |end| if end == 0 { CLASS } else { of_end(end) })
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn all(text: &str) -> Vec<i64> {
        ngrams(text.as_bytes()).collect()
    }

    #[test]
    fn a_token_tells_of_four_bytes() {
        let (long, short) = (all("....abcd"), all("..bcd.abcd"));
        assert_eq!(long[7], short[9]);
        assert_ne!(long[7], all("....bbcd")[7]);
        assert_ne!(long[7], all("....abdc")[7]);
        // Where there are fewer, of those.
        assert_ne!(all("ab")[1], all(".ab")[2]);
        assert!(all("").is_empty());
    }

    #[test]
    fn the_first_token_is_always_the_same() {
        assert_eq!(all("abc")[0], all("xyz")[0]);
        assert_eq!(all("abc")[0] as usize, N_NGRAMS - 1);
    }

    #[test]
    fn hashes_fill_their_table() {
        let text: String = (0..20_000_u32)
            .map(|i| char::from(b'a' + (i.wrapping_mul(2_654_435_761) >> 24) as u8 % 26))
            .collect();
        let tokens = all(&text);
        assert!(tokens[1..].iter().all(|token| (0..CLASS).contains(token)));
        let n_grams: HashSet<&[u8]> = text.as_bytes().windows(LENGTH).collect();
        let found: HashSet<i64> = tokens.into_iter().collect();
        // So many balls leave so many boxes empty.
        let empty = (-(n_grams.len() as f64) / CLASS as f64).exp();
        let expected = CLASS as f64 * (1.0 - empty);
        assert!((found.len() as f64 - expected).abs() < 0.05 * expected);
    }
}
