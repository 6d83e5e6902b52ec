//! Patterns drawn, so that a person can see them.

use std::fmt::Write;

use super::{At, BatchData, Lengths, Pattern, PatternError};

/// The pairs that a pattern allows in one head and one batch row: a row for each query, a column for each key.
///
/// Every pair is asked for, so this is for lengths that fit a page.
///
/// ```
/// use emberlm_core::{BatchData, Lengths, Pattern, Picture};
///
/// let data = BatchData::new().with_documents(vec![vec![0, 0, 1]]);
/// let pattern = Pattern::causal() & Pattern::documents();
/// let picture = Picture::draw(&pattern, &Lengths::square(3), &data, 0, 0).unwrap();
/// assert_eq!(picture.to_text(), "#..\n##.\n..#\n");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    n_rows: usize,
    n_columns: usize,
    visible: Vec<bool>,
}

impl Picture {
    /// Draws a pattern for a head and a batch row.
    ///
    /// # Errors
    ///
    /// What [`Pattern::check`] finds.
    ///
    /// # Panics
    ///
    /// If there is no such batch row or head.
    pub fn draw(
        pattern: &Pattern,
        lengths: &Lengths,
        data: &BatchData,
        batch: usize,
        head: usize,
    ) -> Result<Self, PatternError> {
        pattern.check(lengths, data)?;
        let Lengths {
            key_length,
            n_heads,
            batch_size,
            ..
        } = *lengths;
        assert!(
            batch < batch_size && head < n_heads,
            "batch row {batch} and head {head} must be below batch_size {batch_size} and n_heads {n_heads}"
        );
        let queries = lengths.first_position..lengths.query_end();
        let pairs = queries.flat_map(|query| (0..key_length).map(move |key| (query, key)));
        let visible = pairs.map(|(query, key)| {
            let at = At {
                batch,
                head,
                query,
                key,
                key_length,
            };
            pattern.allows(&at, data)
        });
        Ok(Self {
            n_rows: lengths.query_length,
            n_columns: key_length,
            visible: visible.collect(),
        })
    }

    /// Number of queries and number of keys.
    pub fn size(&self) -> [usize; 2] {
        [self.n_rows, self.n_columns]
    }

    /// Whether the query of a row sees the key of a column.
    ///
    /// # Panics
    ///
    /// If there is no such row or column.
    pub fn is_visible(&self, row: usize, column: usize) -> bool {
        self.row(row)[column]
    }

    /// A line for each query: `#` is visible, `.` is not.
    pub fn to_text(&self) -> String {
        let mut text = String::with_capacity(self.visible.len() + self.n_rows);
        for row in 0..self.n_rows {
            let signs = self.row(row).iter();
            text.extend(signs.map(|&visible| if visible { '#' } else { '.' }));
            text.push('\n');
        }
        text
    }

    /// A picture in SVG with `cell` pixels for each pair: visible pairs are dark.
    pub fn to_svg(&self, cell: usize) -> String {
        let [height, width] = [self.n_rows, self.n_columns];
        let mut svg = format!(
            concat!(
                "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{}\" viewBox=\"0 0 {} {}\" ",
                "shape-rendering=\"crispEdges\">\n",
                "<rect width=\"100%\" height=\"100%\" fill=\"#f2efe8\"/>\n<path fill=\"#1f3a5f\" d=\""
            ),
            width * cell,
            height * cell,
            width,
            height,
        );
        for row in 0..self.n_rows {
            // Neighbours of one row are one rectangle, which keeps the file small.
            let mut column = 0;
            for run in self.row(row).chunk_by(|a, b| a == b) {
                if run[0] {
                    let length = run.len();
                    write!(svg, "M{column} {row}h{length}v1h-{length}z")
                        .expect("writing into a string cannot fail");
                }
                column += run.len();
            }
        }
        svg.push_str("\"/>\n</svg>\n");
        svg
    }

    fn row(&self, row: usize) -> &[bool] {
        &self.visible[row * self.n_columns..][..self.n_columns]
    }
}

impl Pattern {
    /// The pattern as text, for queries from position 0: a line for each query, `#` where a key is visible.
    ///
    /// Draws the first head. [`Picture`] draws the others, and patterns that need batch data.
    ///
    /// # Errors
    ///
    /// What [`check`](Self::check) finds.
    pub fn to_text(&self, query_length: usize, key_length: usize) -> Result<String, PatternError> {
        self.picture(query_length, key_length)
            .map(|picture| picture.to_text())
    }

    /// The pattern as an SVG picture of 8 pixels a pair, for queries from position 0.
    ///
    /// Draws the first head. [`Picture`] draws the others, and patterns that need batch data.
    ///
    /// # Errors
    ///
    /// What [`check`](Self::check) finds.
    pub fn to_svg(&self, query_length: usize, key_length: usize) -> Result<String, PatternError> {
        self.picture(query_length, key_length)
            .map(|picture| picture.to_svg(8))
    }

    fn picture(&self, query_length: usize, key_length: usize) -> Result<Picture, PatternError> {
        let lengths = Lengths::new(query_length, key_length).with_n_heads(self.n_heads());
        Picture::draw(self, &lengths, &BatchData::new(), 0, 0)
    }

    /// The number of heads that the pattern names, or one.
    fn n_heads(&self) -> usize {
        match self {
            Self::PerHead(patterns) => patterns.len(),
            Self::And(patterns) | Self::Or(patterns) => {
                patterns.iter().map(Self::n_heads).max().unwrap_or(1)
            }
            Self::Not(pattern) => pattern.n_heads(),
            _ => 1,
        }
    }
}
