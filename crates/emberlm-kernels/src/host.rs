#![cfg_attr(
    feature = "ndarray",
    allow(deprecated, reason = "ndarray is served as long as Burn has it")
)]

use std::{borrow::Cow, marker::PhantomData};

use burn::{
    backend::{Backend, DispatchDevice, tensor::FloatTensor},
    tensor::{Device, TensorData},
};

use crate::{Real, Stored};

/// The elements of a tensor, where they lie: element `(i, j, k, l)` is at
/// `i strides[0] + j strides[1] + k strides[2] + l strides[3]` from the first. A tensor of fewer axes has axes of size
/// one before them.
#[derive(Debug, Clone, Copy)]
pub struct View<'a, E> {
    first: *const E,
    rank: usize,
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
        // Safety: asserted below. `wrapping_add`: a view of no elements may begin beyond them.
        let view = unsafe { Self::from_raw(elements.as_ptr().wrapping_add(first), dims, strides) };
        view.assert_inside(elements, first);
        view
    }

    fn assert_inside(&self, elements: &[E], first: usize) {
        if self.dims.contains(&0) {
            return;
        }
        // Wider than any product of a size and a stride.
        let reach = |sign: i128| -> i128 {
            let ends = self.dims.iter().zip(self.strides);
            ends.map(|(dim, stride)| (*dim as i128 - 1) * (stride as i128 * sign).max(0) * sign)
                .sum()
        };
        let (lowest, highest) = (first as i128 + reach(-1), first as i128 + reach(1));
        assert!(
            lowest >= 0 && highest < elements.len() as i128,
            "the view reaches from {lowest} to {highest} of {} elements",
            elements.len()
        );
    }

    /// # Safety
    ///
    /// All elements of the view can be read while `'a` lasts.
    unsafe fn from_raw(first: *const E, dims: [usize; 4], strides: [isize; 4]) -> Self {
        Self {
            first,
            rank: 4,
            dims,
            strides,
            tensor: PhantomData,
        }
    }

    /// # Safety
    ///
    /// As [`from_raw`](Self::from_raw).
    ///
    /// # Panics
    ///
    /// If there are more than four axes.
    unsafe fn of_tensor(first: *const E, dims: &[usize], strides: &[isize]) -> Self {
        let rank = dims.len();
        assert!(rank <= 4, "axes: an operator takes up to 4, got {rank}");
        let mut four = ([1; 4], [0; 4]);
        four.0[4 - rank..].copy_from_slice(dims);
        four.1[4 - rank..].copy_from_slice(strides);
        Self {
            rank,
            // Safety: the caller's; axes of size one add no element.
            ..unsafe { Self::from_raw(first, four.0, four.1) }
        }
    }

    /// Sizes of the four axes.
    pub fn dims(&self) -> [usize; 4] {
        self.dims
    }

    /// Sizes of the tensor's own axes.
    pub fn shape(&self) -> &[usize] {
        &self.dims[4 - self.rank..]
    }

    /// Size of the last axis.
    pub fn width(&self) -> usize {
        self.dims[3]
    }

    /// Number of rows along the last axis.
    pub fn n_rows(&self) -> usize {
        self.dims[..3].iter().product()
    }

    /// All elements in order, as what they are computed in: in place where they lie in order and are computed as they
    /// are stored, else a copy.
    pub fn reals(&self) -> Cow<'a, [E::Real]> {
        let n_elements = self.n_rows() * self.width();
        if self.is_contiguous() {
            // Safety: all elements of the four axes can be read, and these are they.
            let elements: &'a [E] = match n_elements {
                0 => &[],
                _ => unsafe { std::slice::from_raw_parts(self.first, n_elements) },
            };
            return match E::as_reals(elements) {
                Some(reals) => Cow::Borrowed(reals),
                None => elements.iter().map(|x| x.to_real()).collect(),
            };
        }
        let [n_i, n_j, n_k, width] = self.dims;
        let mut reals = vec![E::Real::default(); n_elements];
        if width > 0 {
            let mut rows = reals.chunks_exact_mut(width);
            for i in 0..n_i {
                for j in 0..n_j {
                    for (k, row) in (0..n_k).zip(&mut rows) {
                        self.copy_row([i, j, k], E::Real::from_f64(1.0), row);
                    }
                }
            }
        }
        Cow::Owned(reals)
    }

    fn is_contiguous(&self) -> bool {
        let mut expected = 1;
        self.dims
            .iter()
            .zip(self.strides)
            .rev()
            .all(|(dim, stride)| {
                let fits = *dim <= 1 || stride == expected;
                expected *= *dim as isize;
                fits
            })
    }

    /// The stride of rows and of columns, if all rows along the last axis are equally far apart.
    pub(crate) fn matrix_strides(&self) -> Option<[isize; 2]> {
        let mut row_stride = None;
        // How many rows the axes behind this one have.
        let mut n_inner = 1;
        for (dim, stride) in self.dims[..3].iter().zip(&self.strides[..3]).rev() {
            if *dim > 1 {
                let inner = *row_stride.get_or_insert(*stride);
                if *stride != inner * n_inner {
                    return None;
                }
            }
            n_inner *= *dim as isize;
        }
        Some([row_stride.unwrap_or(0), self.strides[3]])
    }

    pub(crate) fn first(&self) -> *const E {
        self.first
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

    /// The same elements with two axes exchanged, of the four.
    pub fn swapped(mut self, a: usize, b: usize) -> Self {
        self.rank = 4;
        self.dims.swap(a, b);
        self.strides.swap(a, b);
        self
    }

    /// Writes the elements `(i, j, k, ..)`, each times `scale`, to the begin of `to`.
    ///
    /// # Panics
    ///
    /// If there is no such row, or `to` is shorter.
    #[inline(always)]
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
    #[inline(always)]
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

    #[inline(always)]
    fn row_start(&self, [i, j, k]: [usize; 3]) -> *const E {
        let [n_i, n_j, n_k, _] = self.dims;
        assert!(i < n_i && j < n_j && k < n_k, "row {i}, {j}, {k}");
        let offset = i as isize * self.strides[0]
            + j as isize * self.strides[1]
            + k as isize * self.strides[2];
        self.first.wrapping_offset(offset)
    }
}

/// Whether the operators take tensors of this device.
pub fn is_host(device: &Device) -> bool {
    let mut device = device.as_dispatch().clone();
    if let DispatchDevice::Autodiff(autodiff) = device {
        device = autodiff.inner();
    }
    match device {
        #[cfg(feature = "flex")]
        DispatchDevice::Flex(_) => true,
        #[cfg(feature = "ndarray")]
        DispatchDevice::NdArray(_) => true,
        _ => false,
    }
}

/// A CPU backend whose tensors can be read where they lie and made of elements.
pub trait HostBackend: Backend {
    /// The elements of a tensor of up to four axes.
    ///
    /// # Panics
    ///
    /// If the tensor's element type is not `E`, or it has more axes.
    fn view<E: Stored>(tensor: &FloatTensor<Self>) -> View<'_, E>;

    /// Makes a tensor of elements in order, without a copy.
    fn from_elements<E: Stored>(elements: Vec<E>, shape: &[usize]) -> FloatTensor<Self> {
        Self::float_from_data(TensorData::new(elements, shape), &Default::default())
    }
}

#[cfg(feature = "flex")]
impl HostBackend for burn::backend::Flex {
    fn view<E: Stored>(tensor: &FloatTensor<Self>) -> View<'_, E> {
        assert_eq!(tensor.dtype(), E::dtype(), "element type");
        let layout = tensor.layout();
        // Safety: of all elements of the type that the tensor says it holds, any bits are valid.
        let (before, elements, _) = unsafe { tensor.bytes().align_to::<E>() };
        assert!(before.is_empty(), "the tensor's memory is not aligned");
        let (shape, strides) = (layout.shape().to_vec(), layout.strides());
        // Safety: asserted below.
        let view = unsafe {
            View::of_tensor(
                elements.as_ptr().wrapping_add(layout.start_offset()),
                &shape,
                strides,
            )
        };
        view.assert_inside(elements, layout.start_offset());
        view
    }
}

#[cfg(feature = "ndarray")]
impl HostBackend for burn::backend::NdArray {
    fn view<E: Stored>(tensor: &FloatTensor<Self>) -> View<'_, E> {
        use burn::backend::{TensorMetadata, ndarray::NdArrayTensor};

        macro_rules! view {
            ($storage:ident) => {{
                let view = $storage.view();
                // Safety: the pointer, sizes and strides are those of an array, which lives as long as `tensor`.
                unsafe { View::of_tensor(view.as_ptr().cast::<E>(), view.shape(), view.strides()) }
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

    #[test]
    #[should_panic(expected = "the view reaches from 0 to 18446744073709551614 of 24 elements")]
    fn views_that_reach_far_do_not_come_round() {
        View::strided(&[0.0_f32; 24], 0, [1, 1, 3, 1], [0, 0, isize::MAX, 1]);
    }

    #[test]
    fn reals_come_in_order_from_any_strides() {
        let elements: Vec<f32> = (0..24).map(|i| i as f32).collect();
        let view = View::strided(&elements, 0, [1, 2, 3, 4], [24, 12, 4, 1]);
        assert!(matches!(view.reals(), Cow::Borrowed(reals) if *reals == elements[..]));
        let view = View::strided(&elements, 0, [1, 1, 4, 3], [0, 0, 1, 4]);
        assert_eq!(view.reals()[..6], [0.0, 4.0, 8.0, 1.0, 5.0, 9.0]);
        let halves: Vec<half::f16> = elements.iter().map(|x| half::f16::from_f32(*x)).collect();
        let view = View::strided(&halves, 0, [1, 2, 3, 4], [24, 12, 4, 1]);
        assert_eq!(*view.reals(), elements[..]);
    }

    #[test]
    fn rows_that_are_equally_far_apart_make_a_matrix() {
        let elements = [0.0_f32; 48];
        let strides = |dims, strides| View::strided(&elements, 0, dims, strides).matrix_strides();
        assert_eq!(strides([2, 1, 3, 4], [12, 7, 4, 1]), Some([4, 1]));
        assert_eq!(strides([2, 1, 3, 4], [24, 7, 4, 1]), None);
        assert_eq!(strides([1, 1, 3, 4], [0, 0, 1, 3]), Some([1, 3]));
        assert_eq!(strides([4, 1, 1, 4], [8, 0, 0, 1]), Some([8, 1]));
    }

    #[cfg(feature = "flex")]
    #[test]
    fn elements_of_a_tensor_come_back() {
        use burn::backend::{Flex, ops::FloatTensorOps};

        let elements: Vec<f32> = (0..24).map(|i| i as f32).collect();
        let tensor = Flex::from_elements(elements, &[2, 3, 4]);
        let tensor = Flex::float_swap_dims(tensor, 0, 1);
        let view = Flex::view::<f32>(&tensor);
        assert_eq!((view.dims(), view.shape()), ([1, 3, 2, 4], &[3, 2, 4][..]));
        assert!(view.row([0, 2, 1]).eq([20.0, 21.0, 22.0, 23.0]));
    }
}
