//! Parameters and gradients of a module by name. Names of enum variants are left out, as in checkpoints.

use std::collections::BTreeMap;

use burn::{
    module::{Module, ModuleMapper, ModuleVisitor, Param},
    optim::GradientsParams,
    tensor::{DType, Gradients, Tensor, TensorData},
};

/// The path of the parameter that is being visited.
#[derive(Default)]
struct Path(Vec<Option<String>>);

impl Path {
    fn enter(&mut self, name: &str, container_type: &str) {
        let is_variant = container_type.starts_with("Enum:");
        self.0.push((!is_variant).then(|| name.to_owned()));
    }

    fn exit(&mut self) {
        self.0.pop();
    }

    fn name(&self) -> String {
        let names: Vec<&str> = self.0.iter().flatten().map(String::as_str).collect();
        names.join(".")
    }
}

struct Replace<F> {
    path: Path,
    value: F,
}

impl<F: FnMut(&str, TensorData) -> TensorData> ModuleMapper for Replace<F> {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.path.enter(name, container_type);
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let old = param.val().into_data();
        let shape = old.shape().clone();
        let new = (self.value)(&self.path.name(), old);
        assert_eq!(&shape, new.shape(), "shape of {}", self.path.name());
        let (dtype, id, device) = (new.dtype(), param.id, param.lazy_device());
        param.transform_for_load(Tensor::from_data(new, (&device, dtype)), id)
    }
}

/// The module in double precision.
pub fn to_f64<M: Module>(module: M) -> M {
    module.map(&mut Replace {
        path: Path::default(),
        value: |_: &str, data: TensorData| data.convert_dtype(DType::F64),
    })
}

/// The module with every parameter replaced by `value(name)`.
///
/// # Panics
///
/// If a shape differs.
pub fn load_parameters<M: Module>(module: M, mut value: impl FnMut(&str) -> TensorData) -> M {
    module.map(&mut Replace {
        path: Path::default(),
        value: |name: &str, _| value(name),
    })
}

struct Collect<F> {
    path: Path,
    found: BTreeMap<String, TensorData>,
    read: F,
}

/// What to read of a parameter, whatever its rank.
trait Read {
    fn read<const D: usize>(&self, param: &Param<Tensor<D>>) -> Option<TensorData>;
}

struct Value;

impl Read for Value {
    fn read<const D: usize>(&self, param: &Param<Tensor<D>>) -> Option<TensorData> {
        Some(param.val().into_data())
    }
}

impl Read for &Gradients {
    fn read<const D: usize>(&self, param: &Param<Tensor<D>>) -> Option<TensorData> {
        param.val().grad(self).map(Tensor::into_data)
    }
}

impl Read for &GradientsParams {
    fn read<const D: usize>(&self, param: &Param<Tensor<D>>) -> Option<TensorData> {
        self.get::<D>(param.id).map(Tensor::into_data)
    }
}

impl<F: Read> ModuleVisitor for Collect<F> {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.path.enter(name, container_type);
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(data) = self.read.read(param) {
            self.found.insert(self.path.name(), data);
        }
    }
}

fn collect<M: Module>(module: &M, read: impl Read) -> BTreeMap<String, TensorData> {
    let mut collect = Collect {
        path: Path::default(),
        found: BTreeMap::new(),
        read,
    };
    module.visit(&mut collect);
    collect.found
}

/// The values of all parameters.
pub fn parameters_by_name<M: Module>(module: &M) -> BTreeMap<String, TensorData> {
    collect(module, Value)
}

/// The gradients of all parameters that have one.
pub fn gradients_by_name<M: Module>(
    module: &M,
    gradients: &Gradients,
) -> BTreeMap<String, TensorData> {
    collect(module, gradients)
}

/// The gradients of all parameters that have one, as an optimizer takes them.
pub fn optimizer_gradients_by_name<M: Module>(
    module: &M,
    gradients: &GradientsParams,
) -> BTreeMap<String, TensorData> {
    collect(module, gradients)
}
