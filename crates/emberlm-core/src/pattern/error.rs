//! What can be wrong with a pattern, or with a pattern and the batch that it is used on.

use thiserror::Error;

/// A pattern that has no meaning, or that does not fit the lengths and the batch data.
///
/// ```
/// use emberlm_core::{Pattern, PatternError, Strided};
///
/// let error = Pattern::strided(Strided::merged(0)).validate();
/// assert_eq!(error, Err(PatternError::Zero { field: "strided.stride" }));
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum PatternError {
    /// A count or a size that must not be zero.
    #[error("{field} must be at least 1, got 0")]
    Zero {
        /// The field's name.
        field: &'static str,
    },
    /// Random blocks that are drawn anew when the sequence grows, in a model that decodes.
    #[error(
        "random blocks of the whole sequence change as it grows: a model that decodes needs blocks of the past (random-past, bigbird-causal)"
    )]
    ChangesWithLength,
    /// Rows that begin at different positions, and a pattern that is another one there.
    #[error(
        "{pattern} depends on absolute positions, which padding on the left moves: decode texts of different lengths one by one"
    )]
    LeftPadding {
        /// The pattern.
        pattern: String,
    },
    /// A combination of no patterns.
    #[error("{field} must combine at least one pattern, got none")]
    Empty {
        /// The combinator: `and`, `or` or `per_head`.
        field: &'static str,
    },
    /// More patterns inside each other than the compiler of schedules follows.
    #[error("the pattern nests more than {limit} combinators inside each other")]
    TooDeep {
        /// The deepest nesting.
        limit: usize,
    },
    /// More summary columns than columns.
    #[error("fixed.n_summary must be at most the stride: got {n_summary} for stride {stride}")]
    SummaryColumns {
        /// Summary columns of each stride block.
        n_summary: usize,
        /// Columns of a stride block.
        stride: usize,
    },
    /// Summary columns that would begin before their stride block.
    #[error(
        "fixed.sub_index must leave room in the stride: {n_summary} columns with sub-index {sub_index} do not fit stride {stride}"
    )]
    SubIndex {
        /// Which group of columns, counted from the end of the stride block.
        sub_index: usize,
        /// Summary columns of a group.
        n_summary: usize,
        /// Columns of a stride block.
        stride: usize,
    },
    /// Global positions that do not rise.
    #[error("{field} must rise: {position} follows {previous}")]
    Unsorted {
        /// The field's name.
        field: &'static str,
        /// The position that is not above the one before it.
        position: usize,
        /// The one before it.
        previous: usize,
    },
    /// A global position at which stand neither a query nor a key.
    #[error("{field} holds position {position}, but the sequence has {length} positions")]
    GlobalBeyond {
        /// The field's name.
        field: &'static str,
        /// The position.
        position: usize,
        /// Positions that the queries and keys reach.
        length: usize,
    },
    /// A dilation as long as the sequence.
    #[error(
        "{field} {dilation} leaves a query no key but its own: the sequence has {length} positions"
    )]
    DilationBeyond {
        /// The field's name.
        field: &'static str,
        /// Distance of neighbouring keys.
        dilation: usize,
        /// Positions of the sequence.
        length: usize,
    },
    /// The pattern needs batch data that was not given.
    #[error("the pattern {pattern} needs {data}, which the batch data lack")]
    MissingData {
        /// The pattern's name.
        pattern: &'static str,
        /// What is missing.
        data: &'static str,
    },
    /// Batch data for another number of batch rows.
    #[error("{data} hold {got} batch rows, expected batch_size {expected}")]
    BatchRows {
        /// Which data.
        data: &'static str,
        /// Rows found.
        got: usize,
        /// Rows needed.
        expected: usize,
    },
    /// Batch data for another number of positions.
    #[error("{data} of batch row {batch} hold {got} positions, expected {expected}")]
    RowLength {
        /// Which data.
        data: &'static str,
        /// The batch row.
        batch: usize,
        /// Positions found.
        got: usize,
        /// Positions needed.
        expected: usize,
    },
    /// One pattern a head, but another number of heads.
    #[error("per_head holds {got} patterns, expected n_heads {expected}")]
    Heads {
        /// Patterns found.
        got: usize,
        /// Heads of the attention.
        expected: usize,
    },
    /// A length or a block size beyond the largest position that a schedule can name.
    #[error("{field} must be at most {limit}, got {got}")]
    TooLarge {
        /// The field's name.
        field: &'static str,
        /// What was given.
        got: usize,
        /// The largest allowed.
        limit: usize,
    },
    /// Sizes whose product does not fit 64 bits.
    #[error("the product of {factors} overflows 64 bits")]
    Overflow {
        /// The factors' names.
        factors: &'static str,
    },
}

impl PatternError {
    /// Checks that a count is not zero.
    pub(super) fn require_positive(field: &'static str, value: usize) -> Result<(), Self> {
        if value == 0 {
            return Err(Self::Zero { field });
        }
        Ok(())
    }

    /// Checks that positions rise, so that none is there twice.
    pub(super) fn require_rising(field: &'static str, positions: &[usize]) -> Result<(), Self> {
        match positions.windows(2).find(|pair| pair[1] <= pair[0]) {
            Some(pair) => Err(Self::Unsorted {
                field,
                position: pair[1],
                previous: pair[0],
            }),
            None => Ok(()),
        }
    }
}
