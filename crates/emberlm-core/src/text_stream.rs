//! Text as it is generated: whole characters out of token bytes, and an end at stop strings.

use std::str;

/// Turns bytes that arrive in pieces into whole characters.
///
/// A token of a byte-level tokenizer may end inside a character. The bytes of an unfinished one
/// are held back until it is complete. Bytes that are not UTF-8 become U+FFFD as in
/// [`String::from_utf8_lossy`]: however the bytes are split, all output together is what that
/// function makes of all bytes together.
///
/// ```
/// use emberlm_core::Utf8Stream;
///
/// let mut stream = Utf8Stream::new();
/// assert_eq!(stream.push(b"caf\xc3"), "caf");
/// assert_eq!(stream.push(b"\xa9 \xe2\x82"), "é ");
/// assert_eq!(stream.finish(), "\u{fffd}");
/// ```
#[derive(Debug, Clone, Default)]
pub struct Utf8Stream {
    /// The beginning of a character: at most three bytes.
    held: Vec<u8>,
}

impl Utf8Stream {
    /// A stream that has seen no bytes.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next bytes and returns the characters they complete, perhaps none.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.held.extend_from_slice(bytes);
        let n_unfinished = match self.held.utf8_chunks().last() {
            Some(chunk) if is_unfinished(chunk.invalid()) => chunk.invalid().len(),
            _ => 0,
        };
        let n_decided = self.held.len() - n_unfinished;
        let text = String::from_utf8_lossy(&self.held[..n_decided]).into_owned();
        self.held.drain(..n_decided);
        text
    }

    /// Ends the text: returns U+FFFD if it stops inside a character, else nothing.
    ///
    /// The stream is then as new.
    pub fn finish(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.held).into_owned();
        self.held.clear();
        text
    }
}

/// Whether more bytes could make a character of these, which are not one yet.
fn is_unfinished(bytes: &[u8]) -> bool {
    str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}

/// Ends a text, which arrives in pieces, before the first stop string in it.
///
/// Text passes through, except for an end that could be the beginning of a stop string: that is
/// held back until it is decided. However the text is split, all output together is the whole text
/// cut at the smallest position where a stop string begins.
///
/// A complete stop string is therefore not reported while a longer one that begins before it may
/// still follow; [`finish`](Self::finish) decides in the end. One value serves one text; clone it
/// before the first push to use the same stop strings again.
///
/// ```
/// use emberlm_core::StopStrings;
///
/// let mut stops = StopStrings::new(["\nUser:", "</s>"])?;
/// assert_eq!(stops.push("Hello.\nUs"), "Hello.");
/// assert_eq!(stops.push("e it.\nUser"), "\nUse it.");
/// assert_eq!(stops.push(": thanks"), "");
/// assert_eq!(stops.stopped_by(), Some("\nUser:"));
/// # Ok::<(), emberlm_core::InvalidStopStrings>(())
/// ```
#[derive(Debug, Clone)]
pub struct StopStrings {
    /// Shorter ones first.
    stops: Vec<String>,
    /// Begins with a stop string, whole or in part, or is empty.
    held: String,
    /// The index in `stops` of the one that ended the text.
    stopped_by: Option<usize>,
}

/// Stop strings that cannot be used.
///
/// ```
/// use emberlm_core::{InvalidStopStrings, StopStrings};
///
/// let error = StopStrings::new(["END", ""]).unwrap_err();
/// assert_eq!(error, InvalidStopStrings::Empty { index: 1 });
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidStopStrings {
    /// An empty string, which every text begins with.
    #[error("stop string {index} is empty and would end every text at once: leave it out")]
    Empty {
        /// The index among the strings given.
        index: usize,
    },
}

impl StopStrings {
    /// Stops at any of the given strings; with none, all text passes.
    ///
    /// # Errors
    ///
    /// If one of them is empty.
    pub fn new<S: Into<String>>(
        stops: impl IntoIterator<Item = S>,
    ) -> Result<Self, InvalidStopStrings> {
        let mut stops: Vec<String> = stops.into_iter().map(Into::into).collect();
        if let Some(index) = stops.iter().position(String::is_empty) {
            return Err(InvalidStopStrings::Empty { index });
        }
        // Of two stop strings at one position the shorter is complete first. Finding it first even
        // where both are complete makes `stopped_by` independent of the pieces.
        stops.sort_by_key(String::len);
        Ok(Self {
            stops,
            held: String::new(),
            stopped_by: None,
        })
    }

    /// Takes the next piece of text and returns what is certain to come before any stop string.
    ///
    /// Once stopped, it returns nothing more.
    pub fn push(&mut self, text: &str) -> String {
        if self.is_stopped() {
            return String::new();
        }
        self.held.push_str(text);
        for (position, _) in self.held.char_indices() {
            let rest = &self.held[position..];
            self.stopped_by = self.complete_at(rest);
            if self.is_stopped() || self.stops.iter().any(|stop| stop.starts_with(rest)) {
                return self.release(position);
            }
        }
        std::mem::take(&mut self.held)
    }

    /// Ends the text: returns what was held back, up to a stop string that is in it.
    pub fn finish(&mut self) -> String {
        for (position, _) in self.held.char_indices() {
            self.stopped_by = self.complete_at(&self.held[position..]);
            if self.is_stopped() {
                return self.release(position);
            }
        }
        std::mem::take(&mut self.held)
    }

    /// Whether a stop string has ended the text.
    pub fn is_stopped(&self) -> bool {
        self.stopped_by.is_some()
    }

    /// The stop string that has ended the text; the shortest of several at the same position.
    pub fn stopped_by(&self) -> Option<&str> {
        self.stopped_by.map(|index| self.stops[index].as_str())
    }

    /// The shortest stop string that `rest` begins with.
    fn complete_at(&self, rest: &str) -> Option<usize> {
        self.stops.iter().position(|stop| rest.starts_with(stop))
    }

    /// The held text before `position`; the rest stays.
    fn release(&mut self, position: usize) -> String {
        let rest = self.held.split_off(position);
        std::mem::replace(&mut self.held, rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// `whole` in pieces that end at the given places, wherever these fall.
    fn pieces<T>(whole: &[T], ends: &[prop::sample::Index]) -> Vec<Vec<T>>
    where
        T: Clone,
    {
        let mut ends: Vec<usize> = ends.iter().map(|end| end.index(whole.len() + 1)).collect();
        ends.extend([0, whole.len()]);
        ends.sort_unstable();
        ends.windows(2)
            .map(|pair| whole[pair[0]..pair[1]].to_vec())
            .collect()
    }

    fn any_ends() -> impl Strategy<Value = Vec<prop::sample::Index>> {
        prop::collection::vec(any::<prop::sample::Index>(), 0..8)
    }

    /// Bytes with many characters of all lengths, whole, cut short and broken.
    fn any_bytes() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop_oneof![
            any::<char>().prop_map(|c| c.to_string().into_bytes()),
            (any::<char>(), 0..4_usize).prop_map(|(c, n)| {
                let bytes = c.to_string().into_bytes();
                bytes[..n.min(bytes.len())].to_vec()
            }),
            prop::sample::select(vec![
                &b"\xed\xa0\x80"[..], // a surrogate
                b"\xf4\x90\x80\x80",  // beyond the last character
                b"\xc0\x80",          // overlong
                b"\xf0\x9f\x98",      // the beginning of an emoji
                b"\x80",
                b"\xff",
            ])
            .prop_map(<[u8]>::to_vec),
            prop::collection::vec(any::<u8>(), 0..4),
        ];
        prop::collection::vec(piece, 0..8).prop_map(|pieces| pieces.concat())
    }

    /// The whole text cut at the smallest position where a stop string begins, and the shortest
    /// stop string there.
    fn by_definition<'a>(text: &'a str, stops: &'a [String]) -> (&'a str, Option<&'a str>) {
        let first = stops
            .iter()
            .filter_map(|stop| Some((text.find(stop.as_str())?, stop.len(), stop.as_str())))
            .min();
        match first {
            Some((position, _, stop)) => (&text[..position], Some(stop)),
            None => (text, None),
        }
    }

    /// All output for the pieces, and what stopped it.
    fn stream(stops: &[String], pieces: &[String]) -> (String, Option<String>) {
        let mut stream = StopStrings::new(stops.to_vec()).unwrap();
        let mut output: String = pieces.iter().map(|piece| stream.push(piece)).collect();
        output += &stream.finish();
        (output, stream.stopped_by().map(str::to_owned))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]

        #[test]
        fn utf8_pieces_make_the_lossy_whole(bytes in any_bytes(), ends in any_ends()) {
            let mut stream = Utf8Stream::new();
            let mut output = String::new();
            for piece in pieces(&bytes, &ends) {
                output += &stream.push(&piece);
                prop_assert!(stream.held.len() <= 3);
            }
            output += &stream.finish();
            prop_assert_eq!(output, String::from_utf8_lossy(&bytes));
        }

        #[test]
        fn stop_pieces_make_the_cut_whole(
            // Two letters and a wide character: overlaps and false starts are frequent.
            text in "[abé]{0,16}",
            stops in prop::collection::vec("[abé]{1,6}", 0..4),
            ends in any_ends(),
        ) {
            let characters: Vec<char> = text.chars().collect();
            let pieces: Vec<String> = pieces(&characters, &ends)
                .into_iter()
                .map(String::from_iter)
                .collect();
            let (output, stopped_by) = stream(&stops, &pieces);
            prop_assert_eq!((&*output, stopped_by.as_deref()), by_definition(&text, &stops));
        }
    }

    #[test]
    fn every_character_is_returned_with_its_last_byte() {
        let text = "aé€😀";
        let mut stream = Utf8Stream::new();
        let output: Vec<String> = text.bytes().map(|byte| stream.push(&[byte])).collect();
        assert_eq!(output, ["a", "", "é", "", "", "€", "", "", "", "😀"]);
        assert_eq!(stream.finish(), "");
    }

    #[test]
    fn a_broken_character_is_replaced_as_soon_as_it_is_known() {
        let mut stream = Utf8Stream::new();
        assert_eq!(stream.push(b"\xf0\x9f"), "");
        assert_eq!(stream.push(b"a"), "\u{fffd}a");
        assert_eq!(stream.push(b"\xff"), "\u{fffd}");
        assert_eq!(stream.push(b"\xc3"), "");
        assert_eq!(stream.finish(), "\u{fffd}");
        assert_eq!(stream.finish(), "");
        assert_eq!(stream.push(b"\xa9b"), "\u{fffd}b");
    }

    #[test]
    fn every_two_way_split_of_a_text_stops_alike() {
        let stops = ["</s>", "\n\n"].map(str::to_owned);
        for text in [
            "a < b </s> c",
            "one\ntwo\n\nthree",
            "no stop <",
            "</s",
            "é</s>",
        ] {
            let expected = by_definition(text, &stops);
            for (end, _) in text.char_indices() {
                let (left, right) = text.split_at(end);
                let (output, stopped_by) = stream(&stops, &[left.into(), right.into()]);
                assert_eq!(
                    (&*output, stopped_by.as_deref()),
                    expected,
                    "{left:?}, {right:?}"
                );
            }
        }
    }

    #[test]
    fn holds_back_no_more_than_needed() {
        let mut stops = StopStrings::new(["abc"]).unwrap();
        assert_eq!(stops.push("xa"), "x");
        assert_eq!(stops.push("b"), "");
        assert_eq!(stops.push("ab"), "ab");
        assert_eq!(stops.push("x"), "abx");
        assert!(!stops.is_stopped());
    }

    #[test]
    fn a_complete_stop_waits_for_one_that_began_before_it() {
        let new = || StopStrings::new(["bc", "abcd"]).unwrap();
        let mut stops = new();
        assert_eq!(stops.push("xabc"), "x");
        assert!(!stops.is_stopped());
        assert_eq!(stops.push("d"), "");
        assert_eq!(stops.stopped_by(), Some("abcd"));

        let mut stops = new();
        assert_eq!(stops.push("xabc") + &stops.push("e"), "xa");
        assert_eq!(stops.stopped_by(), Some("bc"));

        let mut stops = new();
        assert_eq!(stops.push("xabc") + &stops.finish(), "xa");
        assert_eq!(stops.stopped_by(), Some("bc"));
    }

    #[test]
    fn nothing_follows_a_stop() {
        let mut stops = StopStrings::new(["."]).unwrap();
        assert_eq!(stops.push("One. Two"), "One");
        assert_eq!(stops.push(" Three"), "");
        assert_eq!(stops.finish(), "");
        assert_eq!(stops.stopped_by(), Some("."));
    }

    #[test]
    fn without_stop_strings_all_passes() {
        let mut stops = StopStrings::new(Vec::<String>::new()).unwrap();
        assert_eq!(stops.push("any text"), "any text");
        assert_eq!(stops.finish(), "");
        assert!(!stops.is_stopped());
    }

    #[test]
    fn empty_stop_strings_are_rejected() {
        let error = StopStrings::new(["a", "", "b"]).unwrap_err();
        assert_eq!(error, InvalidStopStrings::Empty { index: 1 });
        assert!(error.to_string().starts_with("stop string 1 is empty"));
    }
}
