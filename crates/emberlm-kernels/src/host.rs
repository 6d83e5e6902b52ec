#![cfg_attr(
    feature = "ndarray",
    allow(deprecated, reason = "ndarray is served as long as Burn has it")
)]

use std::marker::PhantomData;

use burn::{
    backend::{Backend, tensor::FloatTensor},
    tensor::TensorData,
};

use crate::Stored;

/// The elements of a tensor with four axes, where they lie: element `(i, j, k, l)` is at
/// `i strides[0] + j strides[1] + k strides[2] + l strides[3]` from the first.
#[derive(Debug, Clone, Copy)]
pub struct View<'a, E> {
    first: *const E,
    dims: [usize; 4],
    strides: [isize; 4],
    tensor: PhantomData<&'a [E]>,
}

// Safety: a view only reads, as a shared slice does.
unsafe impl<E: Sync> Send for View<'_, E> {}
// Safety: as above.
unsafe impl<E: Sync> Sync for View<'_, E> {}

impl<'a, E: Stored> View<'a, E> {
    /// The view of elements at strides from the `first` one on.
    ///
    /// # Panics
    ///
    /// If an element of the view lies outside `elements`.
    pub fn strided(elements: &'a [E], first: usize, dims: [usize; 4], strides: [isize; 4]) -> Self {
        if dims.iter().all(|dim| *dim > 0) {
            let reach = |sign: isize| -> isize {
                dims.iter()
                    .zip(strides)
                    .map(|(dim, stride)| (*dim as isize - 1) * (stride * sign).max(0) * sign)
                    .sum()
            };
            let (lowest, highest) = (first as isize + reach(-1), first as isize + reach(1));
            assert!(
                lowest >= 0 && highest < elements.len() as isize,
                "the view reaches from {lowest} to {highest} of {} elements",
                elements.len()
            );
        }
        // Safety: as asserted. `wrapping_add`: a view of no elements may begin beyond them.
        unsafe { Self::from_raw(elements.as_ptr().wrapping_add(first), dims, strides) }
    }

    /// # Safety
    ///
    /// All elements of the view can be read while `'a` lasts.
    unsafe fn from_raw(first: *const E, dims: [usize; 4], strides: [isize; 4]) -> Self {
        Self {
            first,
            dims,
            strides,
            tensor: PhantomData,
        }
    }

    /// Sizes of the four axes.
    pub fn dims(&self) -> [usize; 4] {
        self.dims
    }

    /// The first `n` of the last axis.
    ///
    /// # Panics
    ///
    /// If it is shorter.
    pub fn first_columns(mut self, n: usize) -> Self {
        assert!(n <= self.dims[3], "{n} columns of {}", self.dims[3]);
        self.dims[3] = n;
        self
    }

    /// Writes the elements `(i, j, k, ..)`, each times `scale`, to the begin of `to`.
    ///
    /// # Panics
    ///
    /// If there is no such row, or `to` is shorter.
    #[inline]
    pub fn copy_row(&self, row: [usize; 3], scale: E::Real, to: &mut [E::Real]) {
        let to = &mut to[..self.dims[3]];
        if self.strides[3] == 1 {
            // Safety: `strided` made sure that all elements of the four axes lie inside.
            let elements = unsafe { std::slice::from_raw_parts(self.row_start(row), to.len()) };
            for (to, element) in to.iter_mut().zip(elements) {
                *to = element.to_real() * scale;
            }
        } else {
            for (to, element) in to.iter_mut().zip(self.row(row)) {
                *to = element.to_real() * scale;
            }
        }
    }

    /// The elements `(i, j, k, ..)` in order.
    ///
    /// # Panics
    ///
    /// If there is no such row.
    #[inline]
    pub fn row(&self, row: [usize; 3]) -> impl ExactSizeIterator<Item = E> + use<'a, E> {
        let first = self.row_start(row);
        let stride = self.strides[3];
        (0..self.dims[3]).map(move |l| {
            // Safety: `strided` made sure that all elements of the four axes lie inside.
            unsafe { *first.offset(l as isize * stride) }
        })
    }

    /// The element `(i, j, k, l)`.
    ///
    /// # Panics
    ///
    /// If there is no such element.
    #[inline]
    pub fn at(&self, [i, j, k, l]: [usize; 4]) -> E {
        assert!(l < self.dims[3], "element {l} of {}", self.dims[3]);
        let row = self.row_start([i, j, k]);
        // Safety: inside the four axes, all of which `strided` made sure can be read.
        unsafe { *row.offset(l as isize * self.strides[3]) }
    }

    #[inline]
    fn row_start(&self, [i, j, k]: [usize; 3]) -> *const E {
        let [n_i, n_j, n_k, _] = self.dims;
        assert!(i < n_i && j < n_j && k < n_k, "row {i}, {j}, {k}");
        let offset = i as isize * self.strides[0]
            + j as isize * self.strides[1]
            + k as isize * self.strides[2];
        self.first.wrapping_offset(offset)
    }
}

/// A CPU backend whose tensors can be read where they lie and made of elements.
pub trait HostBackend: Backend {
    /// Calls `read` with the elements of a tensor of four axes.
    ///
    /// # Panics
    ///
    /// If the tensor's element type is not `E`, or it has not four axes.
    fn with_view<E: Stored, R>(
        tensor: &FloatTensor<Self>,
        read: impl FnOnce(View<'_, E>) -> R,
    ) -> R;

    /// Makes a tensor `[a, c, b, d]` of elements that lie in the order `[a, b, c, d]`, without a copy: what was
    /// computed row by row becomes heads by rows.
    fn from_swapped<E: Stored>(elements: Vec<E>, dims: [usize; 4]) -> FloatTensor<Self> {
        let tensor = Self::float_from_data(TensorData::new(elements, dims), &Default::default());
        Self::float_swap_dims(tensor, 1, 2)
    }
}

#[cfg(feature = "flex")]
impl HostBackend for burn::backend::Flex {
    fn with_view<E: Stored, R>(
        tensor: &FloatTensor<Self>,
        read: impl FnOnce(View<'_, E>) -> R,
    ) -> R {
        assert_eq!(tensor.dtype(), E::dtype(), "element type");
        let layout = tensor.layout();
        // Safety: of all elements of the type that the tensor says it holds, any bits are valid.
        let (before, elements, _) = unsafe { tensor.bytes().align_to::<E>() };
        assert!(before.is_empty(), "the tensor's memory is not aligned");
        read(View::strided(
            elements,
            layout.start_offset(),
            layout.shape().dims(),
            layout.strides().try_into().expect("four axes"),
        ))
    }
}

#[cfg(feature = "ndarray")]
impl HostBackend for burn::backend::NdArray {
    fn with_view<E: Stored, R>(
        tensor: &FloatTensor<Self>,
        read: impl FnOnce(View<'_, E>) -> R,
    ) -> R {
        use burn::backend::{TensorMetadata, ndarray::NdArrayTensor};

        macro_rules! view {
            ($storage:ident) => {{
                let view = $storage.view();
                let dims = view.shape().try_into().expect("four axes");
                let strides = view.strides().try_into().expect("four axes");
                // Safety: the pointer, sizes and strides are those of an array, which lives as long as `tensor`.
                read(unsafe { View::from_raw(view.as_ptr().cast::<E>(), dims, strides) })
            }};
        }
        assert_eq!(tensor.dtype(), E::dtype(), "element type");
        match tensor {
            NdArrayTensor::F32(storage) => view!(storage),
            NdArrayTensor::F64(storage) => view!(storage),
            other => unreachable!("{:?} is no type of floats of this backend", other.dtype()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_follow_strides() {
        let elements: Vec<f32> = (0..24).map(|i| i as f32).collect();
        let view = View::strided(&elements, 0, [1, 2, 3, 4], [24, 12, 4, 1]);
        assert!(view.row([0, 1, 2]).eq([20.0, 21.0, 22.0, 23.0]));
        // The last axis backwards, the two before it swapped.
        let view = View::strided(&elements, 3, [1, 3, 2, 4], [24, 4, 12, -1]);
        assert!(view.row([0, 2, 1]).eq([23.0, 22.0, 21.0, 20.0]));
    }

    #[test]
    #[should_panic(expected = "the view reaches from 1 to 24 of 24 elements")]
    fn views_stay_inside() {
        View::strided(&[0.0_f32; 24], 1, [1, 2, 3, 4], [24, 12, 4, 1]);
    }

    #[cfg(feature = "flex")]
    #[test]
    fn swapped_elements_come_back() {
        use burn::backend::Flex;

        let elements: Vec<f32> = (0..24).map(|i| i as f32).collect();
        let tensor = Flex::from_swapped(elements, [1, 2, 3, 4]);
        Flex::with_view::<f32, _>(&tensor, |view| {
            assert_eq!(view.dims(), [1, 3, 2, 4]);
            assert!(view.row([0, 2, 1]).eq([20.0, 21.0, 22.0, 23.0]));
        });
    }
}
