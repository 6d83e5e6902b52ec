//! Moving tokens to experts and back.

use burn::tensor::{Device, Int, Tensor, TensorData};
use emberlm_core::operators::{ExpertRows, combine, embed};

use crate::Choices;

/// Which token stands in which row of the experts' input: the rows of an expert lie together, in the order of the tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dispatch {
    n_tokens: usize,
    /// Of each row, the token.
    tokens: Vec<usize>,
    /// Of each row, the place of its weight among `[n_tokens, n_experts]`; nothing for a row that fills up.
    places: Vec<Option<usize>>,
    group_sizes: Vec<usize>,
}

impl Dispatch {
    /// A row for each choice: none is lost or doubled. With `rows_per_expert` each expert has that many rows, of which those
    /// without a choice count for nothing.
    ///
    /// # Panics
    ///
    /// If an expert has more choices than rows.
    pub fn new(choices: &Choices, rows_per_expert: Option<usize>) -> Self {
        let n_experts = choices.n_experts();
        let mut of_experts = vec![Vec::new(); n_experts];
        for choice in choices.all() {
            of_experts[choice.expert as usize].push(choice.token as usize);
        }
        // What fills up is a token that is routed: padding may hold what is no number.
        let filler = choices
            .all()
            .first()
            .map_or(0, |choice| choice.token as usize);
        let (mut tokens, mut places, mut group_sizes) = (Vec::new(), Vec::new(), Vec::new());
        for (expert, of_expert) in of_experts.iter_mut().enumerate() {
            of_expert.sort_unstable();
            let n = of_expert.len();
            tokens.extend_from_slice(of_expert);
            places.extend(
                of_expert
                    .iter()
                    .map(|token| Some(token * n_experts + expert)),
            );
            let rows = rows_per_expert.unwrap_or(n);
            assert!(
                n <= rows,
                "rows_per_expert: expert {expert} has {n} choices, and {rows} rows"
            );
            tokens.extend(std::iter::repeat_n(filler, rows - n));
            places.extend(std::iter::repeat_n(None, rows - n));
            group_sizes.push(rows);
        }
        Self {
            n_tokens: choices.n_tokens(),
            tokens,
            places,
            group_sizes,
        }
    }

    /// Number of rows of each expert.
    pub fn group_sizes(&self) -> &[usize] {
        &self.group_sizes
    }

    /// Of each row, the token that stands there.
    pub fn tokens(&self) -> &[usize] {
        &self.tokens
    }

    /// The rows of the experts.
    ///
    /// # Shapes
    ///
    /// - `x`: `[n_tokens, d_model]`
    /// - output: `[n_rows, d_model]`
    pub fn gather(&self, x: Tensor<2>) -> Tensor<2> {
        let [_, width] = x.dims();
        let n_rows = self.tokens.len();
        let tokens = ints(self.tokens.iter().copied(), n_rows, &x.device());
        embed(x, tokens.unsqueeze_dim(0), None).reshape([n_rows, width])
    }

    /// The outputs of the experts, weighted and added up by token; zero for a token without any.
    ///
    /// # Shapes
    ///
    /// - `rows`: `[n_rows, d_model]`
    /// - `gates`: `[n_tokens, n_experts]`
    /// - output: `[n_tokens, d_model]`
    pub fn combine(&self, rows: Tensor<2>, gates: Tensor<2>) -> Tensor<2> {
        let weights = self.weights(gates).cast(rows.dtype());
        combine(rows, weights, &self.tokens, self.n_tokens)
    }

    /// Of each row, the token, and how many rows each expert has.
    pub fn rows(&self) -> ExpertRows<'_> {
        ExpertRows {
            tokens: &self.tokens,
            group_sizes: &self.group_sizes,
        }
    }

    /// The weight of each row; zero of one that fills up.
    ///
    /// # Shapes
    ///
    /// - `gates`: `[n_tokens, n_experts]`
    /// - output: `[n_rows]`
    pub fn weights(&self, gates: Tensor<2>) -> Tensor<1> {
        let [n_tokens, n_experts] = gates.dims();
        let n_rows = self.tokens.len();
        let places = self.places.iter().map(|place| place.unwrap_or(0));
        let places = ints(places, n_rows, &gates.device());
        let weights = gates.reshape([n_tokens * n_experts]).select(0, places);
        if self.places.iter().all(Option::is_some) {
            return weights;
        }
        let there = self.places.iter().map(|place| f32::from(place.is_some()));
        let there = TensorData::new(there.collect::<Vec<_>>(), [n_rows]);
        weights.clone() * Tensor::from_data(there, (&weights.device(), weights.dtype()))
    }
}

fn ints(values: impl Iterator<Item = usize>, n: usize, device: &Device) -> Tensor<1, Int> {
    let values: Vec<i64> = values.map(|value| value as i64).collect();
    Tensor::from_data(TensorData::new(values, [n]), device)
}
