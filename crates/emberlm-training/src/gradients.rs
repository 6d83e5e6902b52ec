//! Gradients of a whole module: their global norm, and scaling them.

use burn::{
    module::{Module, ModuleVisitor, Param},
    optim::GradientsParams,
    tensor::{DType, Tensor},
};
use emberlm_core::operators::sum_of_squares;

/// Euclidean norm of all gradients taken together, as if they were one vector.
///
/// Pascanu et al. 2013, <https://arxiv.org/abs/1211.5063>. Not finite if any gradient is not.
pub fn global_norm<M: Module>(module: &M, gradients: &GradientsParams) -> f64 {
    struct Squares<'a> {
        gradients: &'a GradientsParams,
        sums: Vec<Tensor<1>>,
    }
    impl ModuleVisitor for Squares<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if let Some(gradient) = self.gradients.get::<D>(param.id) {
                self.sums.push(sum_of_squares(gradient));
            }
        }
    }
    let mut squares = Squares {
        gradients,
        sums: Vec::new(),
    };
    module.visit(&mut squares);
    if squares.sums.is_empty() {
        return 0.0;
    }
    // One read from the device for all parameters; added up in f64 in the module's order.
    let sums = Tensor::cat(squares.sums, 0)
        .into_data()
        .convert_dtype(DType::F64);
    sums.iter::<f64>().sum::<f64>().sqrt()
}

/// Multiplies every gradient by a factor.
pub fn scale_gradients<M: Module>(
    module: &M,
    mut gradients: GradientsParams,
    factor: f64,
) -> GradientsParams {
    struct Scale<'a> {
        gradients: &'a mut GradientsParams,
        factor: f64,
    }
    impl ModuleVisitor for Scale<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if let Some(gradient) = self.gradients.remove::<D>(param.id) {
                self.gradients.register(param.id, gradient * self.factor);
            }
        }
    }
    module.visit(&mut Scale {
        gradients: &mut gradients,
        factor,
    });
    gradients
}
