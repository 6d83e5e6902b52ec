//! Which keys each query may see.

use burn::tensor::{Bool, Device, Int, Tensor};

/// Keys that nobody may see, such as padding. Burn's own masks say `true = hidden`; so does this.
#[derive(Clone, Debug)]
pub struct KeyPadding {
    hidden: Tensor<2, Bool>,
}

impl KeyPadding {
    /// `true` hides a key. Shape: `[batch_size, key_length]`.
    pub fn hidden(hidden: Tensor<2, Bool>) -> Self {
        Self { hidden }
    }
}

/// Which keys each query may see: built once per forward pass by the stack and handed to all layers.
///
/// ```
/// use burn::tensor::Device;
/// use emberlm_core::Visibility;
///
/// let device = Device::flex();
/// let causal = Visibility::causal(3, 0, &device);
/// let hidden = causal.hidden().expect("a causal mask hides the future");
/// let rows: Vec<bool> = hidden.to_data().iter::<bool>().collect();
/// assert_eq!(rows, [false, true, true, false, false, true, false, false, false]);
/// ```
#[derive(Clone, Debug, Default)]
pub struct Visibility {
    hidden: Option<Tensor<4, Bool>>,
    may_hide_whole_rows: bool,
}

impl Visibility {
    /// Every query sees every key.
    pub fn full() -> Self {
        Self::default()
    }

    /// A query sees its own position and those before it.
    ///
    /// The queries stand at `first_position .. first_position + query_length`, the keys at
    /// `0 .. first_position + query_length`.
    pub fn causal(query_length: usize, first_position: usize, device: &Device) -> Self {
        if query_length == 1 {
            // The last position sees everything: a decode step needs no mask.
            return Self::full();
        }
        let key_length = first_position + query_length;
        let hidden =
            Tensor::<2, Bool>::tril_mask([query_length, key_length], first_position as i64, device);
        Self {
            hidden: Some(hidden.unsqueeze::<4>()),
            may_hide_whole_rows: false,
        }
    }

    /// Hides padded keys as well.
    pub fn and_padding(self, padding: &KeyPadding) -> Self {
        let [batch_size, key_length] = padding.hidden.dims();
        self.and_hidden(
            padding
                .hidden
                .clone()
                .reshape([batch_size, 1, 1, key_length]),
        )
    }

    /// Hides the keys of other documents, where several are packed into one sequence.
    ///
    /// `queries: [batch_size, query_length]` and `keys: [batch_size, key_length]` hold document numbers.
    pub fn and_documents(self, queries: Tensor<2, Int>, keys: Tensor<2, Int>) -> Self {
        let [batch_size, query_length] = queries.dims();
        let [_, key_length] = keys.dims();
        let queries = queries.reshape([batch_size, 1, query_length, 1]).expand([
            batch_size,
            1,
            query_length,
            key_length,
        ]);
        let keys = keys.reshape([batch_size, 1, 1, key_length]).expand([
            batch_size,
            1,
            query_length,
            key_length,
        ]);
        self.and_hidden(queries.not_equal(keys))
    }

    /// `true` hides. Shape: `[batch_size or 1, 1, query_length or 1, key_length]`; nothing where all is visible.
    pub fn hidden(&self) -> Option<&Tensor<4, Bool>> {
        self.hidden.as_ref()
    }

    /// Whether a query may be left without any key. Attention gives such a query zeros.
    pub fn may_hide_whole_rows(&self) -> bool {
        self.may_hide_whole_rows
    }

    fn and_hidden(self, other: Tensor<4, Bool>) -> Self {
        let hidden = match self.hidden {
            None => other,
            Some(hidden) => {
                let [b1, _, q1, k1] = hidden.dims();
                let [b2, _, q2, k2] = other.dims();
                assert_eq!(
                    k1, k2,
                    "key length: the masks to combine cover {k1} and {k2} keys"
                );
                let shape = [b1.max(b2), 1, q1.max(q2), k1];
                hidden.expand(shape).bool_or(other.expand(shape))
            }
        };
        Self {
            hidden: Some(hidden),
            may_hide_whole_rows: true,
        }
    }
}
