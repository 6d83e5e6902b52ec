//! The product of two small matrices.

use pulp::Simd;

use crate::{Real, lanes};

/// The left matrix of a product: element `(i, p)` is at `pointer + i row_stride + p column_stride`, so that a
/// transposed matrix is only another pair of strides.
#[derive(Debug, Clone, Copy)]
pub struct Left<T> {
    /// The first element.
    pub pointer: *const T,
    /// From one row to the next, in elements.
    pub row_stride: usize,
    /// From one column to the next, in elements.
    pub column_stride: usize,
}

impl<T> Left<T> {
    /// The matrix at `pointer` with these strides.
    pub fn new(pointer: *const T, row_stride: usize, column_stride: usize) -> Self {
        Self {
            pointer,
            row_stride,
            column_stride,
        }
    }
}

/// The right matrix of a product, or the result: rows of adjacent elements.
#[derive(Debug, Clone, Copy)]
pub struct Rows<P> {
    /// The first element.
    pub pointer: P,
    /// From one row to the next, in elements.
    pub row_stride: usize,
}

impl<P> Rows<P> {
    /// The matrix at `pointer` with this stride.
    pub fn new(pointer: P, row_stride: usize) -> Self {
        Self {
            pointer,
            row_stride,
        }
    }
}

/// `c = a b`, or `c += a b` if `ADD`; `a` is `m x k`, `b` is `k x n`, `c` is `m x n`.
///
/// Six rows by two vectors of `c`, by four with AVX-512, stay in registers while `k` runs.
///
/// # Safety
///
/// The matrices can be read, and `c` written, at all their elements; `c` overlaps neither `a` nor `b`; `n` is a
/// multiple of [`lanes`].
#[inline(always)]
pub unsafe fn product<T: Real, S: Simd, const ADD: bool>(
    simd: S,
    [m, n, k]: [usize; 3],
    a: Left<T>,
    b: Rows<*const T>,
    c: Rows<*mut T>,
) {
    let lanes = lanes::<T, S>();
    debug_assert!(n.is_multiple_of(lanes));
    let mut j = 0;
    // Safety: every block lies inside the matrices, whose bounds the caller vouches for.
    unsafe {
        // Vectors of 64 bytes are those of AVX-512.
        while size_of::<T>() * lanes == 64 && j + 4 * lanes <= n {
            column::<T, S, 4, ADD>(simd, m, k, a, b.column(j), c.column_mut(j));
            j += 4 * lanes;
        }
        while j + 2 * lanes <= n {
            column::<T, S, 2, ADD>(simd, m, k, a, b.column(j), c.column_mut(j));
            j += 2 * lanes;
        }
        if j < n {
            column::<T, S, 1, ADD>(simd, m, k, a, b.column(j), c.column_mut(j));
        }
    }
}

impl<T> Rows<*const T> {
    #[inline(always)]
    unsafe fn column(self, j: usize) -> Self {
        Self {
            // Safety: the caller's.
            pointer: unsafe { self.pointer.add(j) },
            ..self
        }
    }
}

impl<T> Rows<*mut T> {
    #[inline(always)]
    unsafe fn column_mut(self, j: usize) -> Self {
        Self {
            // Safety: the caller's.
            pointer: unsafe { self.pointer.add(j) },
            ..self
        }
    }
}

/// `N` vectors of columns, all rows.
#[inline(always)]
unsafe fn column<T: Real, S: Simd, const N: usize, const ADD: bool>(
    simd: S,
    m: usize,
    k: usize,
    a: Left<T>,
    b: Rows<*const T>,
    c: Rows<*mut T>,
) {
    let mut i = 0;
    // Safety: as for `product`.
    unsafe {
        while i + 6 <= m {
            block::<T, S, 6, N, ADD>(simd, k, a, b, c, i);
            i += 6;
        }
        if i + 4 <= m {
            block::<T, S, 4, N, ADD>(simd, k, a, b, c, i);
            i += 4;
        }
        while i < m {
            block::<T, S, 1, N, ADD>(simd, k, a, b, c, i);
            i += 1;
        }
    }
}

/// `M` rows from row `i` on, by `N` vectors of columns: the accumulators are registers.
#[inline(always)]
unsafe fn block<T: Real, S: Simd, const M: usize, const N: usize, const ADD: bool>(
    simd: S,
    k: usize,
    a: Left<T>,
    b: Rows<*const T>,
    c: Rows<*mut T>,
    i: usize,
) {
    let lanes = lanes::<T, S>();
    // Safety: as for `product`; rows `i .. i + M` and `N` vectors of columns are inside.
    unsafe {
        let a_rows = a.pointer.add(i * a.row_stride);
        let mut sums = [[T::splat(simd, T::default()); N]; M];
        for p in 0..k {
            let mut right = [T::splat(simd, T::default()); N];
            for (jj, right) in right.iter_mut().enumerate() {
                *right = T::load(simd, b.pointer.add(p * b.row_stride + jj * lanes));
            }
            for (ii, sums) in sums.iter_mut().enumerate() {
                let left = *a_rows.add(ii * a.row_stride + p * a.column_stride);
                let left = T::splat(simd, left);
                for (sum, right) in sums.iter_mut().zip(right) {
                    *sum = T::vmul_add(simd, left, right, *sum);
                }
            }
        }
        for (ii, sums) in sums.into_iter().enumerate() {
            for (jj, sum) in sums.into_iter().enumerate() {
                let to = c.pointer.add((i + ii) * c.row_stride + jj * lanes);
                let sum = if ADD {
                    T::vadd(simd, T::load(simd, to), sum)
                } else {
                    sum
                };
                T::store(simd, to, sum);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use pulp::{Arch, Scalar, WithSimd};

    use super::*;

    /// `c += a b` for `a` given by its strides.
    struct Product<'a, T> {
        sizes: [usize; 3],
        a: &'a [T],
        strides: [usize; 2],
        b: &'a [T],
        c: &'a mut [T],
        add: bool,
    }

    impl<T: Real> WithSimd for Product<'_, T> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let [_, n, _] = self.sizes;
            let a = Left {
                pointer: self.a.as_ptr(),
                row_stride: self.strides[0],
                column_stride: self.strides[1],
            };
            let b = Rows {
                pointer: self.b.as_ptr(),
                row_stride: n,
            };
            let c = Rows {
                pointer: self.c.as_mut_ptr(),
                row_stride: n,
            };
            // Safety: the test's matrices have these sizes.
            unsafe {
                if self.add {
                    product::<T, S, true>(simd, self.sizes, a, b, c);
                } else {
                    product::<T, S, false>(simd, self.sizes, a, b, c);
                }
            }
        }
    }

    fn check<T: Real>(m: usize, n: usize, k: usize, transposed: bool, add: bool, scalar: bool) {
        // Small integers: every sum is exact.
        let number = |i: usize| T::from_f64(((i * 7 + 3) % 11) as f64 - 5.0);
        let a: Vec<T> = (0..m * k).map(number).collect();
        let b: Vec<T> = (0..k * n).map(|i| number(i + 5)).collect();
        let mut c: Vec<T> = (0..m * n).map(|i| number(i + 9)).collect();
        let strides = if transposed { [1, m] } else { [k, 1] };
        let mut expected = c.clone();
        for i in 0..m {
            for j in 0..n {
                let mut sum = if add { c[i * n + j] } else { T::default() };
                for p in 0..k {
                    sum += a[i * strides[0] + p * strides[1]] * b[p * n + j];
                }
                expected[i * n + j] = sum;
            }
        }
        let work = Product {
            sizes: [m, n, k],
            a: &a,
            strides,
            b: &b,
            c: &mut c,
            add,
        };
        if scalar {
            work.with_simd(Scalar);
        } else {
            Arch::new().dispatch(work);
        }
        assert!(c == expected, "{m} x {n} x {k}");
    }

    #[test]
    fn products_of_all_heights_are_exact() {
        for m in 1..=14 {
            for n in [16, 32, 48, 64, 80, 96] {
                for k in [1, 7, 64] {
                    for flags in 0..8 {
                        let (transposed, add, scalar) =
                            (flags & 1 != 0, flags & 2 != 0, flags & 4 != 0);
                        check::<f32>(m, n, k, transposed, add, scalar);
                        check::<f64>(m, n, k, transposed, add, scalar);
                    }
                }
            }
        }
    }
}
