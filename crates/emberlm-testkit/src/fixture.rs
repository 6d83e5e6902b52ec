//! Reference tensors in safetensors files.

use std::{fs, path::Path};

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use safetensors::{Dtype, SafeTensors};

/// A file of reference tensors.
pub struct Fixture {
    bytes: Vec<u8>,
}

impl Fixture {
    /// Reads a file.
    ///
    /// # Panics
    ///
    /// If it cannot be read.
    pub fn load(path: impl AsRef<Path>) -> Self {
        let path = path.as_ref();
        let bytes = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Self { bytes }
    }

    /// A tensor's content as it stands in the file: f64 or i64.
    ///
    /// # Panics
    ///
    /// If there is no such tensor, or it has another type.
    pub fn data(&self, name: &str) -> TensorData {
        let file = self.file();
        let view = file
            .tensor(name)
            .unwrap_or_else(|error| panic!("tensor {name}: {error}"));
        let words = view.data().chunks_exact(8).map(|word| {
            let word: [u8; 8] = word.try_into().expect("chunks of eight bytes");
            word
        });
        match view.dtype() {
            Dtype::F64 => TensorData::new(
                words.map(f64::from_le_bytes).collect::<Vec<_>>(),
                view.shape().to_vec(),
            ),
            Dtype::I64 => TensorData::new(
                words.map(i64::from_le_bytes).collect::<Vec<_>>(),
                view.shape().to_vec(),
            ),
            other => panic!("tensor {name}: expected f64 or i64, the file has {other:?}"),
        }
    }

    /// A float tensor in the given precision.
    ///
    /// # Panics
    ///
    /// As [`data`](Self::data).
    pub fn tensor<const D: usize>(&self, name: &str, dtype: DType, device: &Device) -> Tensor<D> {
        Tensor::from_data(self.data(name), (device, dtype))
    }

    /// An integer tensor.
    ///
    /// # Panics
    ///
    /// As [`data`](Self::data).
    pub fn ints<const D: usize>(&self, name: &str, device: &Device) -> Tensor<D, Int> {
        Tensor::from_data(self.data(name), device)
    }

    /// The names that begin with a prefix, without it, sorted.
    pub fn names(&self, prefix: &str) -> Vec<String> {
        let file = self.file();
        let mut names: Vec<String> = file
            .names()
            .into_iter()
            .filter_map(|name| name.strip_prefix(prefix).map(str::to_owned))
            .collect();
        names.sort();
        names
    }

    fn file(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.bytes).expect("a fixture is a safetensors file")
    }
}
