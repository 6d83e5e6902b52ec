//! Which passes are timed.

use burn::tensor::Tensor;

/// Forward alone, or forward and backward.
#[derive(Clone, Copy, Debug)]
pub struct Pass {
    /// Whether the backward pass follows.
    pub backward: bool,
}

impl Pass {
    /// An input that gets a gradient if there is a backward pass.
    pub fn leaf<const D: usize>(self, x: &Tensor<D>) -> Tensor<D> {
        match self.backward {
            true => x.clone().require_grad(),
            false => x.clone(),
        }
    }

    /// What follows the forward pass; the gradient that comes in is ones.
    pub fn end<const D: usize>(self, y: Tensor<D>) {
        if self.backward {
            y.backward();
        }
    }

    /// What follows the forward pass; the gradient that comes in is `d_y`.
    pub fn end_with<const D: usize>(self, y: Tensor<D>, d_y: &Tensor<D>) {
        if self.backward {
            (y * d_y.clone()).sum().backward();
        }
    }
}
