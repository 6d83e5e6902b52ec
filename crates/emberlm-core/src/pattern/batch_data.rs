//! What a pattern has to know of the batch.

use super::{Lengths, PatternError};

/// Facts about a batch that a pattern needs but that are no part of it: they change with every batch.
///
/// Each holds one row for each batch row. A pattern ignores what it does not ask for, but for hidden keys, which no
/// pattern shows.
///
/// ```
/// use emberlm_core::{At, BatchData, Pattern};
///
/// // Two documents packed into one sequence, whose last key is padding.
/// let data = BatchData::new()
///     .with_documents(vec![vec![0, 0, 1, 1]])
///     .with_hidden_keys(vec![vec![false, false, false, true]]);
/// let visible = |query, key| {
///     let at = At { batch: 0, head: 0, query, key, key_length: 4 };
///     Pattern::documents().allows(&at, &data)
/// };
/// assert!(visible(0, 1) && visible(3, 2));
/// assert!(!visible(2, 1) && !visible(2, 3));
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BatchData {
    key_documents: Option<Vec<Vec<u32>>>,
    query_documents: Option<Vec<Vec<u32>>>,
    globals: Option<Vec<Vec<usize>>>,
    hidden_keys: Option<Vec<Vec<bool>>>,
}

impl BatchData {
    /// Nothing is known of the batch, and no key is hidden.
    pub fn new() -> Self {
        Self::default()
    }

    /// The document of each position. Shape: `[batch_size, key_length]`.
    ///
    /// Queries stand among the keys and have the documents of their positions, unless
    /// [`with_query_documents`](Self::with_query_documents) gives them others.
    pub fn with_documents(mut self, documents: Vec<Vec<u32>>) -> Self {
        self.key_documents = Some(documents);
        self
    }

    /// The document of each query by absolute position, where it is not that of the key there (cross-attention).
    /// Shape: `[batch_size, first_position + query_length]`; what is before the first query is not read.
    pub fn with_query_documents(mut self, documents: Vec<Vec<u32>>) -> Self {
        self.query_documents = Some(documents);
        self
    }

    /// The absolute positions of each batch row's global tokens, rising. Shape: `[batch_size, any]`.
    pub fn with_globals(mut self, positions: Vec<Vec<usize>>) -> Self {
        self.globals = Some(positions);
        self
    }

    /// `true` hides a key from all queries, such as padding. Shape: `[batch_size, key_length]`.
    pub fn with_hidden_keys(mut self, hidden: Vec<Vec<bool>>) -> Self {
        self.hidden_keys = Some(hidden);
        self
    }

    /// The rows of a batch: row `i` becomes what row `rows[i]` is.
    ///
    /// # Panics
    ///
    /// If there is no such row.
    pub fn select(&self, rows: &[usize]) -> Self {
        fn of<T: Clone>(all: &Option<Vec<Vec<T>>>, rows: &[usize]) -> Option<Vec<Vec<T>>> {
            let all = all.as_ref()?;
            Some(rows.iter().map(|row| all[*row].clone()).collect())
        }
        Self {
            key_documents: of(&self.key_documents, rows),
            query_documents: of(&self.query_documents, rows),
            globals: of(&self.globals, rows),
            hidden_keys: of(&self.hidden_keys, rows),
        }
    }

    /// What is known of the queries at some positions, which then stand one after another from position zero on.
    pub(crate) fn of_queries(&self, positions: &[usize]) -> Self {
        let documents = self
            .query_documents
            .as_ref()
            .or(self.key_documents.as_ref());
        let pick = |all: &Vec<u32>| positions.iter().map(|position| all[*position]).collect();
        Self {
            query_documents: documents.map(|rows| rows.iter().map(pick).collect()),
            globals: None,
            ..self.clone()
        }
    }

    /// Whether positions have documents.
    pub(crate) fn has_documents(&self) -> bool {
        self.key_documents.is_some()
    }

    /// The documents of the keys of a batch row.
    ///
    /// # Panics
    ///
    /// If the pattern was not checked against these data: there are none.
    pub(crate) fn key_documents(&self, batch: usize) -> &[u32] {
        match &self.key_documents {
            Some(documents) => &documents[batch],
            None => panic!("the pattern documents needs document ids, which the batch data lack"),
        }
    }

    /// The documents of the queries of a batch row, by absolute position.
    ///
    /// # Panics
    ///
    /// As [`key_documents`](Self::key_documents).
    pub(crate) fn query_documents(&self, batch: usize) -> &[u32] {
        match &self.query_documents {
            Some(documents) => &documents[batch],
            None => self.key_documents(batch),
        }
    }

    /// The global positions of a batch row.
    ///
    /// # Panics
    ///
    /// As [`key_documents`](Self::key_documents).
    pub(crate) fn globals(&self, batch: usize) -> &[usize] {
        match &self.globals {
            Some(positions) => &positions[batch],
            None => panic!("the pattern global needs positions, which the batch data lack"),
        }
    }

    /// Which keys of a batch row are hidden, if any are of any row: `[key_length]`.
    ///
    /// # Panics
    ///
    /// If there is no such row.
    pub fn hidden_keys(&self, batch: usize) -> Option<&[bool]> {
        self.hidden_keys.as_ref().map(|hidden| &hidden[batch][..])
    }

    /// Checks the shapes of all that is given.
    pub(crate) fn check(&self, lengths: &Lengths) -> Result<(), PatternError> {
        let key_length = lengths.key_length;
        rows("document ids", &self.key_documents, lengths, key_length)?;
        rows(
            "query document ids",
            &self.query_documents,
            lengths,
            lengths.query_end(),
        )?;
        rows("hidden keys", &self.hidden_keys, lengths, key_length)?;
        let Some(globals) = &self.globals else {
            return Ok(());
        };
        batch_rows("global positions", globals, lengths)?;
        globals
            .iter()
            .try_for_each(|row| check_positions("global positions", row, lengths))
    }

    /// Checks that there are document ids for all queries and keys.
    pub(super) fn require_documents(&self, lengths: &Lengths) -> Result<(), PatternError> {
        let missing = |data| {
            Err(PatternError::MissingData {
                pattern: "documents",
                data,
            })
        };
        if self.key_documents.is_none() {
            return missing("document ids");
        }
        if self.query_documents.is_none() && lengths.query_end() > lengths.key_length {
            return missing("query document ids for queries beyond the keys");
        }
        Ok(())
    }

    /// Checks that there are global positions.
    pub(crate) fn require_globals(&self) -> Result<(), PatternError> {
        match self.globals {
            Some(_) => Ok(()),
            None => Err(PatternError::MissingData {
                pattern: "global:batch",
                data: "global positions",
            }),
        }
    }
}

/// Checks that global positions rise and stand within the sequence.
pub(super) fn check_positions(
    field: &'static str,
    positions: &[usize],
    lengths: &Lengths,
) -> Result<(), PatternError> {
    PatternError::require_rising(field, positions)?;
    let length = lengths.key_length.max(lengths.query_end());
    match positions.last() {
        Some(&position) if position >= length => Err(PatternError::GlobalBeyond {
            field,
            position,
            length,
        }),
        _ => Ok(()),
    }
}

fn batch_rows<T>(data: &'static str, rows: &[T], lengths: &Lengths) -> Result<(), PatternError> {
    if rows.len() == lengths.batch_size {
        return Ok(());
    }
    Err(PatternError::BatchRows {
        data,
        got: rows.len(),
        expected: lengths.batch_size,
    })
}

fn rows<T>(
    data: &'static str,
    rows: &Option<Vec<Vec<T>>>,
    lengths: &Lengths,
    expected: usize,
) -> Result<(), PatternError> {
    let Some(rows) = rows else {
        return Ok(());
    };
    batch_rows(data, rows, lengths)?;
    match rows.iter().position(|row| row.len() != expected) {
        Some(batch) => Err(PatternError::RowLength {
            data,
            batch,
            got: rows[batch].len(),
            expected,
        }),
        None => Ok(()),
    }
}
