//! Comparing a model with a fixture of a reference implementation: its parameters, outputs and gradients.

use burn::{
    module::Module,
    tensor::{DType, Gradients, TensorData},
};
use emberlm_core::BatchData;
use emberlm_testkit::{
    Fixture, gradients_by_name, largest_difference, load_parameters, parameters_by_name,
};

pub(crate) fn load(path: &str) -> Fixture {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");
    Fixture::load(format!("{root}/{path}"))
}

/// The parameters of a fixture, in `dtype`; they are those that the model has.
pub(crate) fn with_parameters<M: Module>(model: M, fixture: &Fixture, dtype: DType) -> M {
    let model = load_parameters(model, |name| {
        fixture.data(&format!("param.{name}")).convert_dtype(dtype)
    });
    let ours: Vec<String> = parameters_by_name(&model).into_keys().collect();
    assert_eq!(ours, fixture.names("param."));
    model
}

/// Which positions hold padding, from `[batch_size, length]` zeros and ones.
pub(crate) fn padding(fixture: &Fixture, name: &str) -> Vec<Vec<bool>> {
    let data = fixture.data(name);
    let length = data.shape()[1];
    let hidden: Vec<bool> = data.iter::<i64>().map(|value| value == 1).collect();
    hidden.chunks(length).map(<[bool]>::to_vec).collect()
}

pub(crate) fn hidden_keys(fixture: &Fixture, name: &str) -> BatchData {
    BatchData::new().with_hidden_keys(padding(fixture, name))
}

pub(crate) fn check(fixture: &Fixture, name: &str, actual: &TensorData, tolerance: f64) {
    let difference = largest_difference(actual, &fixture.data(name));
    assert!(
        difference <= tolerance,
        "{name}: largest difference {difference:e}"
    );
}

fn largest_magnitude(data: &TensorData) -> f64 {
    data.iter::<f64>()
        .fold(0.0, |largest, x| largest.max(x.abs()))
}

/// Every gradient; a parameter that took no part has none, and a zero in the fixture. Those of the keys' biases are zero
/// but for rounding on both sides, small beside those of the queries' biases: a shift of all keys changes no softmax.
pub(crate) fn check_gradients<M: Module>(
    model: &M,
    gradients: &Gradients,
    fixture: &Fixture,
    tolerance: f64,
) {
    let gradients = gradients_by_name(model, gradients);
    for name in fixture.names("param.") {
        let expected = format!("grad.{name}");
        let Some(gradient) = gradients.get(&name) else {
            let there = largest_magnitude(&fixture.data(&expected));
            assert!(there == 0.0, "{expected} is {there:e}, ours is not there");
            continue;
        };
        match name.strip_suffix("key.bias") {
            Some(layer) => {
                let query = fixture.data(&format!("grad.{layer}query.bias"));
                let rounding = largest_magnitude(gradient);
                assert!(
                    rounding <= tolerance * largest_magnitude(&query),
                    "{expected} is {rounding:e}, not zero"
                );
            }
            None => check(fixture, &expected, gradient, tolerance),
        }
    }
}
