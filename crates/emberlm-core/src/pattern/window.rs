//! Sliding windows, plain and dilated.

use serde::{Deserialize, Serialize};

use super::PatternError;

/// How far a query sees to both sides: key `j` is visible to query `i` if `i - back <= j <= i + ahead`.
///
/// "A window of `w`" has several readings in the literature, so each has a constructor:
///
/// | constructor | visible keys | who says so |
/// |---|---|---|
/// | [`Window::one_sided`]`(w)` | `i - w ..= i + w` | Longformer, AllenAI's code: `w` to each side |
/// | [`Window::total`]`(w)` | `i - w / 2 ..= i + w / 2` | Longformer in Hugging Face: `w` in total |
/// | [`Window::causal`]`(w)` | `i - w + 1 ..= i` | Mistral: the last `w` keys, the query's own position among them |
///
/// The query's own position counts in none of Longformer's numbers: both windows hold one key more than the number of
/// neighbours they name. Longformer: <https://arxiv.org/abs/2004.05150>, Mistral: <https://arxiv.org/abs/2310.06825>.
///
/// ```
/// use emberlm_core::Window;
///
/// assert_eq!(Window::one_sided(128), Window { back: 128, ahead: 128 });
/// assert_eq!(Window::total(256), Window { back: 128, ahead: 128 });
/// assert_eq!(Window::causal(128), Window { back: 127, ahead: 0 });
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Window {
    /// Keys that are visible before the query's own position.
    pub back: usize,
    /// Keys that are visible after the query's own position.
    pub ahead: usize,
}

impl Window {
    /// `n` keys before and `n` keys after the query's own position: `2 n + 1` keys.
    pub fn one_sided(n: usize) -> Self {
        Self { back: n, ahead: n }
    }

    /// `n / 2` keys to each side of the query's own position: `n + 1` keys.
    ///
    /// # Panics
    ///
    /// If `n` is odd, as in Hugging Face: the window would have no middle.
    pub fn total(n: usize) -> Self {
        assert!(n.is_multiple_of(2), "a total window must be even, got {n}");
        Self::one_sided(n / 2)
    }

    /// The last `n` keys, the query's own position among them.
    ///
    /// # Panics
    ///
    /// If `n` is 0.
    pub fn causal(n: usize) -> Self {
        assert!(n > 0, "a causal window must hold at least 1 key, got 0");
        Self {
            back: n - 1,
            ahead: 0,
        }
    }

    pub(super) fn allows(&self, query: usize, key: usize) -> bool {
        if key <= query {
            query - key <= self.back
        } else {
            key - query <= self.ahead
        }
    }
}

/// A window with gaps: key `j` is visible to query `i` if `i - j` is a multiple of `dilation` and
/// `-ahead * dilation <= i - j <= back * dilation`.
///
/// From Longformer (<https://arxiv.org/abs/2004.05150>, section 3.1). The window counts visible keys, not the distance
/// that they span: dilation 1 is the plain window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dilated {
    /// Visible keys to each side.
    pub window: Window,
    /// Distance of neighbouring visible keys, at least 1.
    pub dilation: usize,
}

impl Dilated {
    pub(super) fn allows(&self, query: usize, key: usize) -> bool {
        let distance = query.abs_diff(key);
        let reach = if key <= query {
            self.window.back
        } else {
            self.window.ahead
        };
        distance.is_multiple_of(self.dilation) && distance / self.dilation <= reach
    }

    pub(super) fn validate(&self) -> Result<(), PatternError> {
        PatternError::require_positive("dilated.dilation", self.dilation)
    }
}
