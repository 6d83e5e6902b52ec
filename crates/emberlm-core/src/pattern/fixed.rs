//! The fixed attention of the Sparse Transformer.

use serde::{Deserialize, Serialize};

use super::PatternError;

/// Fixed attention (Child et al. 2019, <https://arxiv.org/abs/1904.10509>, section 4.3) with stride `l` and `c`
/// summary columns.
///
/// Query `i` sees the keys of
///
/// - the local head: `A1_i = {j : floor(j / l) = floor(i / l)}`, its own stride block;
/// - the summary head: `A2_i = {j : j mod l in {t, t + 1, ..., l}}` with `t = l - c`: the last `c` positions of every
///   stride block (`j mod l` is never `l`, so these are `c` of them).
///
/// Both with `j <= i`: the paper's sets are autoregressive, and `& causal` changes nothing. A merged head sees the
/// union. The paper lets several heads use distinct groups of `c` columns; `sub_index` `s` chooses the columns
/// `l - (s + 1) c .. l - s c`, so that 0 is the formula above.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Fixed {
    /// One head sees the union of both sets.
    Merged {
        /// The stride `l`, at least 1.
        stride: usize,
        /// The number `c` of summary columns, from 1 to the stride.
        n_summary: usize,
        /// Which group of columns, counted from the end of the stride block.
        #[serde(default)]
        sub_index: usize,
    },
    /// The head of the query's own stride block.
    Local {
        /// The stride `l`, at least 1.
        stride: usize,
    },
    /// The head of the summary columns.
    Summary {
        /// The stride `l`, at least 1.
        stride: usize,
        /// The number `c` of summary columns, from 1 to the stride.
        n_summary: usize,
        /// Which group of columns, counted from the end of the stride block.
        #[serde(default)]
        sub_index: usize,
    },
}

impl Fixed {
    /// The union of both heads, with the last `n_summary` columns.
    pub fn merged(stride: usize, n_summary: usize) -> Self {
        Self::Merged {
            stride,
            n_summary,
            sub_index: 0,
        }
    }

    /// The local head.
    pub fn local(stride: usize) -> Self {
        Self::Local { stride }
    }

    /// The summary head, with the last `n_summary` columns.
    pub fn summary(stride: usize, n_summary: usize) -> Self {
        Self::Summary {
            stride,
            n_summary,
            sub_index: 0,
        }
    }

    /// The same with another group of summary columns. The local head has none and stays as it is.
    pub fn with_sub_index(mut self, index: usize) -> Self {
        match &mut self {
            Self::Merged { sub_index, .. } | Self::Summary { sub_index, .. } => *sub_index = index,
            Self::Local { .. } => {}
        }
        self
    }

    /// The stride `l`.
    pub fn stride(&self) -> usize {
        match *self {
            Self::Merged { stride, .. } | Self::Local { stride } | Self::Summary { stride, .. } => {
                stride
            }
        }
    }

    /// First and one past the last column of the summary within a stride block.
    pub(crate) fn columns(&self) -> Option<[usize; 2]> {
        let [n_summary, sub_index] = self.summary_columns()?;
        let end = self.stride() - sub_index * n_summary;
        Some([end - n_summary, end])
    }

    /// `n_summary` and `sub_index`, where there is a summary.
    fn summary_columns(&self) -> Option<[usize; 2]> {
        match *self {
            Self::Local { .. } => None,
            Self::Merged {
                n_summary,
                sub_index,
                ..
            }
            | Self::Summary {
                n_summary,
                sub_index,
                ..
            } => Some([n_summary, sub_index]),
        }
    }

    pub(super) fn allows(&self, query: usize, key: usize) -> bool {
        let stride = self.stride();
        let local = key / stride == query / stride;
        let summary = self
            .columns()
            .is_some_and(|[from, to]| (from..to).contains(&(key % stride)));
        key <= query
            && match self {
                Self::Merged { .. } => local || summary,
                Self::Local { .. } => local,
                Self::Summary { .. } => summary,
            }
    }

    pub(super) fn validate(&self) -> Result<(), PatternError> {
        PatternError::require_positive("fixed.stride", self.stride())?;
        let stride = self.stride();
        let Some([n_summary, sub_index]) = self.summary_columns() else {
            return Ok(());
        };
        PatternError::require_positive("fixed.n_summary", n_summary)?;
        if n_summary > stride {
            return Err(PatternError::SummaryColumns { n_summary, stride });
        }
        // The division avoids a product that could overflow.
        if sub_index >= stride / n_summary {
            return Err(PatternError::SubIndex {
                sub_index,
                n_summary,
                stride,
            });
        }
        Ok(())
    }
}
