//! Patterns from the words of a command line.

use std::str::FromStr;

use thiserror::Error;

use super::{
    BlockPlan, Blockwise, Fixed, Global, Pattern, PatternError, RandomBlocks, Strided, Window,
};

/// Words that are no pattern.
///
/// ```
/// use emberlm_core::Pattern;
///
/// let error = "causal & windwo:256".parse::<Pattern>().unwrap_err();
/// assert!(error.to_string().starts_with("\"windwo:256\" is no pattern"));
/// let error = "window:many".parse::<Pattern>().unwrap_err();
/// assert_eq!(error.to_string(), "\"many\" in \"window:many\" is no number that fits 64 bits");
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ParsePatternError {
    /// A word that names no pattern.
    #[error(
        "\"{word}\" is no pattern: known are full, causal, window, dilated, strided, strided-local, strided-column, fixed, fixed-local, fixed-summary, blockwise, global, global-queries, global-keys, random, random-past, blocks, bigbird, bigbird-causal, prefix, sinks, documents and heads(..)"
    )]
    Unknown {
        /// The word.
        word: String,
    },
    /// A pattern with too few or too many numbers.
    #[error("\"{word}\" must have the form {form}")]
    Form {
        /// The word.
        word: String,
        /// How the word is written.
        form: &'static str,
    },
    /// An argument that is no number.
    #[error("\"{argument}\" in \"{word}\" is no number that fits 64 bits")]
    Number {
        /// The word.
        word: String,
        /// The argument.
        argument: String,
    },
    /// A number that the pattern cannot have.
    #[error("\"{word}\": {source}")]
    Invalid {
        /// The word.
        word: String,
        /// What is wrong.
        source: PatternError,
    },
    /// A sign or a word where none can be.
    #[error("\"{found}\" at character {offset} does not belong there: expected {expected}")]
    Unexpected {
        /// The rest of the text, up to a few characters.
        found: String,
        /// Where it begins, in bytes.
        offset: usize,
        /// What could be there.
        expected: &'static str,
    },
    /// The text ends too early.
    #[error("the pattern ends too early: expected {expected}")]
    End {
        /// What could be there.
        expected: &'static str,
    },
    /// More parentheses, `!` and `heads` inside each other than a pattern can have.
    #[error("the pattern nests deeper than {limit} levels")]
    TooDeep {
        /// The deepest nesting.
        limit: usize,
    },
}

/// Reads the words of a command line, which are those that `Display` writes.
///
/// | word | pattern |
/// |---|---|
/// | `full`, `causal`, `documents` | these |
/// | `window:256` | `abs(i - j) <= 256`: [`Window::one_sided`] |
/// | `window:256:0` | 256 keys before, none after |
/// | `dilated:256:2` | 256 keys to each side, every second |
/// | `dilated:256:0:2` | 256 keys before, none after, every second |
/// | `strided:64`, `strided-local:64`, `strided-column:64` | [`Strided`]: merged, or one of its heads |
/// | `fixed:64:8`, `fixed-local:64`, `fixed-summary:64:8` | [`Fixed`]: stride and summary columns; `:1` at the end chooses another sub-index |
/// | `blockwise:64`, `blockwise:64:1`, `blockwise:64:1:1` | [`Blockwise`]: block, look back, look ahead |
/// | `global:0,5`, `global:none`, `global:..64`, `global:-64`, `global:batch` | [`Global`]: positions, none, the first 64, the last 64, those of the batch data |
/// | `global-queries:0,5`, `global-keys:0,5` | these see all, or are seen by all; else as `global` |
/// | `blocks:64:0,2/1` | [`BlockPlan`]: block, then the key blocks of each query block |
/// | `random:64:3`, `random-past:64:3` | [`RandomBlocks`]: block, number of blocks; `:7` at the end chooses another seed |
/// | `bigbird:64:3` | [`Pattern::bigbird`]: block, random blocks; `:7` at the end chooses another seed |
/// | `bigbird-causal:64:3` | the same within `causal`, its random blocks drawn from the past |
/// | `prefix:128`, `sinks:4` | the first keys |
/// | `heads(causal, window:8)` | one pattern for each head |
///
/// They are joined by `&`, `|`, `!` and parentheses; `!` binds closest, then `&`.
impl FromStr for Pattern {
    type Err = ParsePatternError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut parser = Parser { text, offset: 0 };
        let pattern = parser.any_of(Pattern::MAX_DEPTH)?;
        if !parser.rest().is_empty() {
            return Err(parser.unexpected("&, | or the end"));
        }
        // Every word was checked, but one pair of parentheses may hold two levels of combinators.
        match pattern.validate() {
            Err(PatternError::TooDeep { limit }) => Err(ParsePatternError::TooDeep { limit }),
            _ => Ok(pattern),
        }
    }
}

struct Parser<'a> {
    text: &'a str,
    offset: usize,
}

impl<'a> Parser<'a> {
    /// `all_of ("|" all_of)*`
    fn any_of(&mut self, depth: usize) -> Result<Pattern, ParsePatternError> {
        let mut pattern = self.all_of(depth)?;
        while self.take("|") {
            pattern = pattern | self.all_of(depth)?;
        }
        Ok(pattern)
    }

    /// `single ("&" single)*`
    fn all_of(&mut self, depth: usize) -> Result<Pattern, ParsePatternError> {
        let mut pattern = self.single(depth)?;
        while self.take("&") {
            pattern = pattern & self.single(depth)?;
        }
        Ok(pattern)
    }

    /// `"!" single | "(" any_of ")" | "heads(" any_of ("," any_of)* ")" | word`
    fn single(&mut self, depth: usize) -> Result<Pattern, ParsePatternError> {
        let limit = Pattern::MAX_DEPTH;
        let below = depth
            .checked_sub(1)
            .ok_or(ParsePatternError::TooDeep { limit })?;
        if self.take("!") {
            return Ok(!self.single(below)?);
        }
        if self.take("(") {
            let pattern = self.any_of(below)?;
            return self.close().map(|()| pattern);
        }
        let word = self.word()?;
        if word == "heads" && self.take("(") {
            let mut patterns = vec![self.any_of(below)?];
            while self.take(",") {
                patterns.push(self.any_of(below)?);
            }
            return self.close().map(|()| Pattern::PerHead(patterns));
        }
        let pattern = simple(word)?;
        match pattern.validate() {
            Ok(()) => Ok(pattern),
            Err(source) => Err(ParsePatternError::Invalid {
                word: word.to_string(),
                source,
            }),
        }
    }

    fn close(&mut self) -> Result<(), ParsePatternError> {
        if self.take(")") {
            return Ok(());
        }
        Err(self.unexpected("&, |, a comma in heads(..), or )"))
    }

    /// A name with its arguments. A comma belongs to it if a digit follows: `global:0,5` in `heads(global:0,5, causal)`.
    fn word(&mut self) -> Result<&'a str, ParsePatternError> {
        let rest = self.rest();
        let bytes = rest.as_bytes();
        let belongs = |at: usize| match bytes[at] {
            b',' => at > 0 && bytes.get(at + 1).is_some_and(u8::is_ascii_digit),
            byte => !byte.is_ascii_whitespace() && !b"&|!()".contains(&byte),
        };
        let length = (0..bytes.len())
            .find(|&at| !belongs(at))
            .unwrap_or(bytes.len());
        if length == 0 {
            return Err(self.unexpected("a pattern"));
        }
        self.offset += length;
        Ok(&rest[..length])
    }

    fn take(&mut self, sign: &str) -> bool {
        let found = self.rest().starts_with(sign);
        if found {
            self.offset += sign.len();
        }
        found
    }

    /// What is left, without leading blanks.
    fn rest(&mut self) -> &'a str {
        let rest = self.text[self.offset..].trim_start();
        self.offset = self.text.len() - rest.len();
        rest
    }

    fn unexpected(&mut self, expected: &'static str) -> ParsePatternError {
        let found: String = self.rest().chars().take(20).collect();
        if found.is_empty() {
            return ParsePatternError::End { expected };
        }
        ParsePatternError::Unexpected {
            found,
            offset: self.offset,
            expected,
        }
    }
}

/// The pattern of one word.
fn simple(word: &str) -> Result<Pattern, ParsePatternError> {
    let (name, arguments) = match word.split_once(':') {
        Some((name, arguments)) => (name, Some(arguments)),
        None => (word, None),
    };
    let of_global = match name {
        "global" => Some(Pattern::Global as fn(Global) -> Pattern),
        "global-queries" => Some(Pattern::GlobalQueries as _),
        "global-keys" => Some(Pattern::GlobalKeys as _),
        _ => None,
    };
    if let Some(of_global) = of_global {
        return global(word, arguments.unwrap_or_default()).map(of_global);
    }
    if name == "blocks" {
        return block_plan(word, arguments.unwrap_or_default()).map(Pattern::Blocks);
    }
    let form = |form| {
        Err(ParsePatternError::Form {
            word: word.to_string(),
            form,
        })
    };
    let known = [
        ("full", "full"),
        ("causal", "causal"),
        ("documents", "documents"),
        ("window", "window:SIDE or window:BACK:AHEAD"),
        (
            "dilated",
            "dilated:SIDE:DILATION or dilated:BACK:AHEAD:DILATION",
        ),
        ("strided", "strided:STRIDE"),
        ("strided-local", "strided-local:STRIDE"),
        ("strided-column", "strided-column:STRIDE"),
        ("fixed", "fixed:STRIDE:COLUMNS[:SUB_INDEX]"),
        ("fixed-local", "fixed-local:STRIDE"),
        ("fixed-summary", "fixed-summary:STRIDE:COLUMNS[:SUB_INDEX]"),
        ("blockwise", "blockwise:BLOCK[:BACK[:AHEAD]]"),
        ("random", "random:BLOCK:BLOCKS[:SEED]"),
        ("random-past", "random-past:BLOCK:BLOCKS[:SEED]"),
        ("bigbird", "bigbird:BLOCK:BLOCKS[:SEED]"),
        ("bigbird-causal", "bigbird-causal:BLOCK:BLOCKS[:SEED]"),
        ("prefix", "prefix:LENGTH"),
        ("sinks", "sinks:KEYS"),
    ];
    let Some((_, expected)) = known.into_iter().find(|(known, _)| *known == name) else {
        return Err(ParsePatternError::Unknown {
            word: word.to_string(),
        });
    };
    let numbers = match arguments {
        Some(arguments) => arguments
            .split(':')
            .map(|argument| number(word, argument))
            .collect::<Result<Vec<_>, _>>()?,
        None => Vec::new(),
    };
    // A seed takes all 64 bits; everything else counts positions. On a machine of 32 bits a larger count is as good as
    // the largest.
    let seed = numbers.get(2).copied().unwrap_or(0);
    let counts: Vec<usize> = numbers
        .iter()
        .map(|&n| usize::try_from(n).unwrap_or(usize::MAX))
        .collect();
    Ok(match (name, &counts[..]) {
        ("full", []) => Pattern::Full,
        ("causal", []) => Pattern::Causal,
        ("documents", []) => Pattern::Documents,
        ("window", &[side]) => Pattern::Window(Window::one_sided(side)),
        ("window", &[back, ahead]) => Pattern::Window(Window { back, ahead }),
        ("dilated", &[side, dilation]) => Pattern::dilated(Window::one_sided(side), dilation),
        ("dilated", &[back, ahead, dilation]) => Pattern::dilated(Window { back, ahead }, dilation),
        ("strided", &[stride]) => Pattern::Strided(Strided::merged(stride)),
        ("strided-local", &[stride]) => Pattern::Strided(Strided::local(stride)),
        ("strided-column", &[stride]) => Pattern::Strided(Strided::column(stride)),
        ("fixed-local", &[stride]) => Pattern::Fixed(Fixed::local(stride)),
        ("fixed", &[stride, columns]) => Pattern::Fixed(Fixed::merged(stride, columns)),
        ("fixed", &[stride, columns, index]) => {
            Pattern::Fixed(Fixed::merged(stride, columns).with_sub_index(index))
        }
        ("fixed-summary", &[stride, columns]) => Pattern::Fixed(Fixed::summary(stride, columns)),
        ("fixed-summary", &[stride, columns, index]) => {
            Pattern::Fixed(Fixed::summary(stride, columns).with_sub_index(index))
        }
        ("blockwise", &[block]) => Pattern::Blockwise(Blockwise::new(block)),
        ("blockwise", &[block, back]) => {
            Pattern::Blockwise(Blockwise::new(block).with_look_back(back))
        }
        ("blockwise", &[block, back, ahead]) => Pattern::Blockwise(
            Blockwise::new(block)
                .with_look_back(back)
                .with_look_ahead(ahead),
        ),
        ("random", &[block, blocks] | &[block, blocks, _]) => {
            Pattern::Random(RandomBlocks::everywhere(block, blocks).with_seed(seed))
        }
        ("random-past", &[block, blocks] | &[block, blocks, _]) => {
            Pattern::Random(RandomBlocks::past(block, blocks).with_seed(seed))
        }
        ("bigbird", &[block, blocks] | &[block, blocks, _]) => {
            Pattern::bigbird(RandomBlocks::everywhere(block, blocks).with_seed(seed))
        }
        ("bigbird-causal", &[block, blocks] | &[block, blocks, _]) => {
            Pattern::causal() & Pattern::bigbird(RandomBlocks::past(block, blocks).with_seed(seed))
        }
        ("prefix", &[length]) => Pattern::Prefix(length),
        ("sinks", &[n]) => Pattern::Sinks(n),
        _ => return form(expected),
    })
}

fn global(word: &str, argument: &str) -> Result<Global, ParsePatternError> {
    match argument {
        "batch" => return Ok(Global::Batch),
        "none" => return Ok(Global::Positions(Vec::new())),
        _ => {}
    }
    if let Some(n) = argument.strip_prefix("..") {
        return count(word, n).map(Global::First);
    }
    if let Some(n) = argument.strip_prefix('-') {
        return count(word, n).map(Global::Last);
    }
    if argument.is_empty() {
        return Err(ParsePatternError::Form {
            word: word.to_string(),
            form: "global:POSITION,POSITION,.. or global:..COUNT, global:-COUNT, global:batch or global:none",
        });
    }
    counts(word, argument).map(Global::Positions)
}

fn block_plan(word: &str, arguments: &str) -> Result<BlockPlan, ParsePatternError> {
    let Some((block, rows)) = arguments.split_once(':') else {
        return Err(ParsePatternError::Form {
            word: word.to_string(),
            form: "blocks:BLOCK:KEY_BLOCK,KEY_BLOCK,../KEY_BLOCK,../..",
        });
    };
    let row = |row: &str| match row {
        "" => Ok(Vec::new()),
        row => counts(word, row),
    };
    let rows = rows.split('/').map(row).collect::<Result<_, _>>()?;
    Ok(BlockPlan::new(count(word, block)?, rows))
}

/// Numbers with commas between them.
fn counts(word: &str, argument: &str) -> Result<Vec<usize>, ParsePatternError> {
    let numbers = argument.split(',');
    numbers.map(|number| count(word, number)).collect()
}

/// On a machine of 32 bits a larger count is as good as the largest.
fn count(word: &str, argument: &str) -> Result<usize, ParsePatternError> {
    number(word, argument).map(|n| usize::try_from(n).unwrap_or(usize::MAX))
}

fn number(word: &str, argument: &str) -> Result<u64, ParsePatternError> {
    argument.parse().map_err(|_| ParsePatternError::Number {
        word: word.to_string(),
        argument: argument.to_string(),
    })
}
