//! Products of matrices: by the `gemm` crate, or by `rows_product` where the left matrix has few rows or its rows stand
//! anywhere.

use std::{marker::PhantomData, ops::Range};

use rayon::prelude::*;

use crate::{
    Real, Shared, Stored, View,
    rows_product::{Places, RowsProduct},
    tile::Rows,
};

/// A matrix anywhere in memory: element `(i, j)` is at `i row_stride + j column_stride` from the first.
#[derive(Debug)]
pub struct Matrix<'a, R> {
    first: *const R,
    n_rows: usize,
    n_columns: usize,
    row_stride: isize,
    column_stride: isize,
    /// The elements, where they are a copy.
    _copy: Option<Vec<R>>,
    memory: PhantomData<&'a [R]>,
}

// Safety: a matrix only reads, as a shared slice does.
unsafe impl<R: Sync> Send for Matrix<'_, R> {}
// Safety: as above.
unsafe impl<R: Sync> Sync for Matrix<'_, R> {}

impl<'a, R: Real> Matrix<'a, R> {
    /// A matrix of elements in order.
    ///
    /// # Panics
    ///
    /// If the numbers of elements differ.
    pub fn new(elements: &'a [R], [n_rows, n_columns]: [usize; 2]) -> Self {
        assert_eq!(elements.len(), n_rows * n_columns, "{n_rows} x {n_columns}");
        Self::in_order(elements.as_ptr(), [n_rows, n_columns], None)
    }

    fn in_order(first: *const R, [n_rows, n_columns]: [usize; 2], copy: Option<Vec<R>>) -> Self {
        Self {
            first,
            n_rows,
            n_columns,
            row_stride: n_columns as isize,
            column_stride: 1,
            _copy: copy,
            memory: PhantomData,
        }
    }

    fn copied(elements: Vec<R>, dims: [usize; 2]) -> Self {
        Self::in_order(elements.as_ptr(), dims, Some(elements))
    }

    /// The rows of a tensor along its last axis, in place where that is possible.
    pub fn of_view<E: Stored<Real = R>>(view: &View<'a, E>) -> Self {
        let [n_rows, n_columns] = [view.n_rows(), view.width()];
        // What is computed as it is stored needs no copy, whatever its strides.
        if let (Some(_), Some([row_stride, column_stride])) =
            (E::as_reals(&[]), view.matrix_strides())
        {
            return Self {
                first: view.first().cast(),
                n_rows,
                n_columns,
                row_stride,
                column_stride,
                _copy: None,
                memory: PhantomData,
            };
        }
        Self::copied(view.reals().into_owned(), [n_rows, n_columns])
    }

    /// Rows and columns exchanged, without a copy.
    pub fn transposed(&self) -> Matrix<'_, R> {
        Matrix {
            first: self.first,
            n_rows: self.n_columns,
            n_columns: self.n_rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            _copy: None,
            memory: PhantomData,
        }
    }

    /// Rows `first ..`, `n` of them.
    ///
    /// # Panics
    ///
    /// If there are fewer.
    pub fn rows(&self, first: usize, n: usize) -> Matrix<'_, R> {
        self.block(first..first + n, 0..self.n_columns)
    }

    /// Columns `first ..`, `n` of them.
    ///
    /// # Panics
    ///
    /// If there are fewer.
    pub fn columns(&self, first: usize, n: usize) -> Matrix<'_, R> {
        self.block(0..self.n_rows, first..first + n)
    }

    /// Some rows of some columns.
    ///
    /// # Panics
    ///
    /// If there are fewer.
    pub fn block(&self, rows: Range<usize>, columns: Range<usize>) -> Matrix<'_, R> {
        assert!(
            rows.start + rows.len() <= self.n_rows,
            "rows {} + {} of {}",
            rows.start,
            rows.len(),
            self.n_rows
        );
        assert!(
            columns.start + columns.len() <= self.n_columns,
            "columns {} + {} of {}",
            columns.start,
            columns.len(),
            self.n_columns
        );
        let offset =
            rows.start as isize * self.row_stride + columns.start as isize * self.column_stride;
        Matrix {
            first: self.first.wrapping_offset(offset),
            n_rows: rows.len(),
            n_columns: columns.len(),
            row_stride: self.row_stride,
            column_stride: self.column_stride,
            _copy: None,
            memory: PhantomData,
        }
    }

    /// Whether the elements of each row are side by side.
    fn has_rows_in_order(&self) -> bool {
        self.column_stride == 1 && self.row_stride >= 0
    }

    /// The same matrix with the elements of each row side by side: itself, if they are, else a copy.
    fn in_rows(&self) -> Matrix<'_, R> {
        if self.has_rows_in_order() {
            return self.rows(0, self.n_rows);
        }
        let mut elements = Vec::with_capacity(self.n_rows * self.n_columns);
        for i in 0..self.n_rows as isize {
            for j in 0..self.n_columns as isize {
                let at = i * self.row_stride + j * self.column_stride;
                // Safety: the element is inside, as the constructor made sure.
                elements.push(unsafe { *self.first.wrapping_offset(at) });
            }
        }
        Self::copied(elements, self.dims())
    }

    /// Number of rows and of columns.
    pub fn dims(&self) -> [usize; 2] {
        [self.n_rows, self.n_columns]
    }
}

/// Where a product goes: rows of elements in order, each at a distance from the one before.
#[derive(Debug)]
pub struct Target<'a, R> {
    first: *mut R,
    n_rows: usize,
    n_columns: usize,
    row_stride: usize,
    memory: PhantomData<&'a mut [R]>,
}

impl<'a, R: Real> Target<'a, R> {
    /// Elements in order.
    ///
    /// # Panics
    ///
    /// If the numbers of elements differ.
    pub fn new(elements: &'a mut [R], [n_rows, n_columns]: [usize; 2]) -> Self {
        assert_eq!(elements.len(), n_rows * n_columns, "{n_rows} x {n_columns}");
        Self {
            first: elements.as_mut_ptr(),
            n_rows,
            n_columns,
            row_stride: n_columns,
            memory: PhantomData,
        }
    }

    /// Some columns of a matrix of `width` columns, whose first one is element `start` of `elements`.
    ///
    /// # Safety
    ///
    /// Nobody else has these columns of these rows at the same time.
    ///
    /// # Panics
    ///
    /// If `elements` ends before.
    pub unsafe fn columns(
        elements: &Shared<'a, R>,
        start: usize,
        [n_rows, n_columns]: [usize; 2],
        width: usize,
    ) -> Self {
        let last = match n_rows {
            0 => 0,
            n => (n - 1) * width + n_columns,
        };
        Self {
            first: elements.at(start, last),
            n_rows,
            n_columns,
            row_stride: width,
            memory: PhantomData,
        }
    }
}

/// What a product does with what is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Store {
    /// `c = a b`; `c` need not hold anything.
    Replace,
    /// `c = c + a b`
    Add,
}

/// Which threads compute a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Threads {
    /// All of the pool, where the product is large enough.
    Pool,
    /// The caller's: others have products of their own.
    One,
}

/// `c = a b`, or with it added, on all threads of the pool. The elements of `c` are in order.
///
/// The result does not depend on the number of threads.
///
/// # Panics
///
/// If the inner sizes differ, or the number of elements of `c` is not that of the product.
pub fn product<R: Real>(a: &Matrix<'_, R>, b: &Matrix<'_, R>, c: &mut [R], store: Store) {
    let c = Target::new(c, [a.n_rows, b.n_columns]);
    product_on(Threads::Pool, a, b, c, store);
}

/// [`product`] on given threads.
///
/// # Panics
///
/// As [`product`].
pub fn product_on<R: Real>(
    threads: Threads,
    a: &Matrix<'_, R>,
    b: &Matrix<'_, R>,
    c: Target<'_, R>,
    store: Store,
) {
    let ([m, k], [inner, n]) = (a.dims(), b.dims());
    assert_eq!(k, inner, "inner size of a product");
    assert_eq!([c.n_rows, c.n_columns], [m, n], "size of a product");
    if m == 0 || n == 0 {
        return;
    }
    let is_few = (ROWS_OF_ONE_THREAD + 1..=FEW_ROWS).contains(&m);
    let is_far = n * k * size_of::<R>() >= FAR && n >= MANY_COLUMNS && k <= LONGEST_SUM;
    if is_few && is_far && a.has_rows_in_order() && b.has_rows_in_order() {
        return rows_product(threads, [a, b], c, store, None);
    }
    let by_one = threads == Threads::One || m <= ROWS_OF_ONE_THREAD || m * n * k < SERIAL;
    let parallelism = match by_one {
        true => gemm::Parallelism::None,
        false => gemm::Parallelism::Rayon(0),
    };
    let one = R::from_f64(1.0);
    // Safety: `a` and `b` can be read at all their elements, and `c` written, as their constructors made sure. A `Real` is f32 or f64, which the crate takes.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.first,
            1,
            c.row_stride as isize,
            store == Store::Add,
            a.first,
            a.column_stride,
            a.row_stride,
            b.first,
            b.column_stride,
            b.row_stride,
            one,
            one,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// `c = a b` for few rows, or with it added, by the kernel that asks for `b` ahead, on the caller's thread: of the rows
/// `rows` of `a`, in any order and as often as they are named, or of all.
///
/// # Panics
///
/// If sizes differ or `a` has no such row.
pub fn few_rows_product<R: Real>(
    a: &Matrix<'_, R>,
    rows: Option<&[usize]>,
    b: &Matrix<'_, R>,
    c: Target<'_, R>,
    store: Store,
) {
    if let Some(row) = rows.and_then(|rows| rows.iter().find(|row| **row >= a.n_rows)) {
        panic!("row {row} of {}", a.n_rows);
    }
    let n_rows = rows.map_or(a.n_rows, <[usize]>::len);
    assert_eq!(c.n_rows, n_rows, "rows of a product");
    rows_product(Threads::One, [a, b], c, store, rows);
}

/// The rows of `a` are at the places `at`, if there are any.
fn rows_product<R: Real>(
    threads: Threads,
    [a, b]: [&Matrix<'_, R>; 2],
    c: Target<'_, R>,
    store: Store,
    at: Option<&[usize]>,
) {
    let [k, n] = b.dims();
    assert_eq!(a.n_columns, k, "inner size of a product");
    assert_eq!(c.n_columns, n, "columns of a product");
    let (a, b) = (a.in_rows(), b.in_rows());
    let product = RowsProduct {
        sizes: [c.n_rows, n, k],
        a: Places {
            pointer: a.first,
            row_stride: a.row_stride.unsigned_abs(),
            at,
        },
        b: Rows::new(b.first, b.row_stride.unsigned_abs()),
        c: Rows::new(c.first, c.row_stride),
        store,
    };
    // Safety: `a` and `b` can be read at all their elements, and `c` written by nobody else, as their constructors made
    // sure; there are all places.
    unsafe { product.compute(threads) };
}

/// Writes the transpose of a matrix of elements in order: `[n_rows, n_columns]` to `[n_columns, n_rows]`.
///
/// # Panics
///
/// If the numbers of elements differ.
pub fn transpose<R: Real>(from: &[R], [n_rows, n_columns]: [usize; 2], to: &mut [R]) {
    assert_eq!(from.len(), n_rows * n_columns, "{n_rows} x {n_columns}");
    transpose_rows(
        |i| &from[i * n_columns..][..n_columns],
        [n_rows, n_columns],
        to,
    );
}

/// Writes the transpose of some rows of `n_columns` elements, in any order and as often as they are named.
///
/// # Panics
///
/// If the numbers of elements differ, or there is no such row.
pub fn transpose_gathered<R: Real>(from: &[R], rows: &[usize], n_columns: usize, to: &mut [R]) {
    let row = |i: usize| &from[rows[i] * n_columns..][..n_columns];
    transpose_rows(row, [rows.len(), n_columns], to);
}

#[inline(always)]
fn transpose_rows<'a, R: Real>(
    row: impl Fn(usize) -> &'a [R],
    [n_rows, n_columns]: [usize; 2],
    to: &mut [R],
) {
    assert_eq!(to.len(), n_rows * n_columns, "{n_columns} x {n_rows}");
    for i in (0..n_rows).step_by(TILE) {
        for j in (0..n_columns).step_by(TILE) {
            if i + TILE <= n_rows && j + TILE <= n_columns {
                // Arrays of a known size, which the compiler keeps in registers.
                let mut tile = [[R::default(); TILE]; TILE];
                for (of_tile, i) in tile.iter_mut().zip(i..) {
                    of_tile.copy_from_slice(&row(i)[j..][..TILE]);
                }
                for column in 0..TILE {
                    let to = &mut to[(j + column) * n_rows + i..][..TILE];
                    (to.iter_mut().zip(&tile)).for_each(|(to, row)| *to = row[column]);
                }
                continue;
            }
            for i in i..n_rows.min(i + TILE) {
                for column in j..n_columns.min(j + TILE) {
                    to[column * n_rows + i] = row(i)[column];
                }
            }
        }
    }
}

/// Rows and columns of what is transposed at once.
const TILE: usize = 16;

/// Calls `work` for each of `n` products of similar size: many side by side, few one after the other, each on all threads.
pub fn for_each_product(n: usize, work: impl Fn(usize, Threads) + Sync) {
    match n < 4 * rayon::current_num_threads() {
        true => (0..n).for_each(|i| work(i, Threads::Pool)),
        false => (0..n)
            .into_par_iter()
            .with_max_len(1)
            .for_each(|i| work(i, Threads::One)),
    }
}

/// Rows up to which a product mostly waits for the right matrix, where that comes from memory: two groups of
/// `rows_product`.
const FEW_ROWS: usize = 168;
/// Bytes from which on a matrix is taken to come from memory: half of the second cache of many processors.
const FAR: usize = 1 << 20;
/// Columns from which on the vectors of `rows_product` are mostly full.
const MANY_COLUMNS: usize = 256;
/// Terms of a sum up to which `rows_product` rounds as little as the crate `gemm`, which adds up longer parts.
const LONGEST_SUM: usize = 1 << 15;
/// Rows up to which one thread reads the right matrix as fast as several.
const ROWS_OF_ONE_THREAD: usize = 4;
/// Multiplications below which one thread is faster.
const SERIAL: usize = 1 << 18;

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers<R: Real>(n: usize, seed: usize) -> Vec<R> {
        // Small integers: every sum is exact.
        (0..n)
            .map(|i| R::from_f64(((i * 7 + seed) % 11) as f64 - 5.0))
            .collect()
    }

    fn check<R: Real>([m, n, k]: [usize; 3], transposed: bool, store: Store) {
        let (a, b) = (numbers::<R>(m * k, 3), numbers::<R>(k * n, 5));
        let mut c = numbers::<R>(m * n, 9);
        let mut expected = c.clone();
        for i in 0..m {
            for j in 0..n {
                let mut sum = match store {
                    Store::Replace => R::default(),
                    Store::Add => c[i * n + j],
                };
                for p in 0..k {
                    let b = if transposed {
                        b[j * k + p]
                    } else {
                        b[p * n + j]
                    };
                    sum += a[i * k + p] * b;
                }
                expected[i * n + j] = sum;
            }
        }
        if store == Store::Replace {
            c.fill(R::from_f64(f64::NAN));
        }
        let a = Matrix::new(&a, [m, k]);
        if transposed {
            product(&a, &Matrix::new(&b, [n, k]).transposed(), &mut c, store);
        } else {
            product(&a, &Matrix::new(&b, [k, n]), &mut c, store);
        }
        assert!(c == expected, "{m} x {n} x {k}, {store:?}");
    }

    #[test]
    fn products_are_exact() {
        for sizes in [
            [1, 1, 1],
            [3, 17, 5],
            [70, 65, 130],
            [1, 300, 200],
            [4, 700, 201],
            [2, 3, 1030],
            [4, 3, 0],
            // Few rows, and a matrix that is far.
            [5, 700, 400],
            [48, 1100, 300],
            [168, 1100, 300],
        ] {
            for transposed in [false, true] {
                for store in [Store::Replace, Store::Add] {
                    check::<f32>(sizes, transposed, store);
                    check::<f64>(sizes, transposed, store);
                }
            }
        }
    }

    /// Rows in any order, of all numbers of rows and columns that are cut differently.
    fn check_places_of<R: Real>(m: usize, n: usize, k: usize, transposed: bool) {
        let n_rows = m / 2 + 3;
        let at: Vec<usize> = (0..m).map(|i| (i * 7 + 1) % n_rows).collect();
        let (a, b) = (numbers::<R>(n_rows * k, 3), numbers::<R>(k * n, 5));
        let b_at = |p: usize, j: usize| {
            if transposed {
                b[j * k + p]
            } else {
                b[p * n + j]
            }
        };
        let product = |i: usize, j: usize| {
            let terms = (0..k).map(|p| a[i * k + p] * b_at(p, j));
            terms.fold(R::default(), |sum, term| sum + term)
        };
        let dims = if transposed { [n, k] } else { [k, n] };
        let b = Matrix::new(&b, dims);
        let b = if transposed { &b.transposed() } else { &b };
        let rows = Matrix::new(&a, [n_rows, k]);
        let mut gathered = vec![R::from_f64(f64::NAN); m * n];
        let to = Target::new(&mut gathered, [m, n]);
        few_rows_product(&rows, Some(&at), b, to, Store::Replace);
        for (i, row) in at.iter().enumerate() {
            for j in 0..n {
                assert!(
                    gathered[i * n + j] == product(*row, j),
                    "gathered {m} x {n} x {k}"
                );
            }
        }
    }

    #[test]
    fn rows_anywhere_are_multiplied() {
        for m in (0..=16).chain([41, 64, 129, 260]) {
            for [n, k] in [[1, 3], [32, 64], [40, 65], [70, 300], [300, 130]] {
                check_places_of::<f32>(m, n, k, m == 5);
                check_places_of::<f64>(m, n, k, m == 6);
            }
        }
        check_places_of::<f32>(20, 1100, 70, false);
        check_places_of::<f64>(20, 1100, 70, false);
        check_places_of::<f32>(3, 4, 0, false);
        check_places_of::<f64>(3, 70, 0, false);
    }

    #[test]
    #[should_panic(expected = "row 3 of 3")]
    fn a_row_that_is_not_there_is_told() {
        let (a, b) = (numbers::<f32>(6, 1), numbers::<f32>(4, 2));
        let (a, b) = (Matrix::new(&a, [3, 2]), Matrix::new(&b, [2, 2]));
        let (mut c, at) = ([0.0; 2], Some(&[3][..]));
        few_rows_product(&a, at, &b, Target::new(&mut c, [1, 2]), Store::Replace);
    }

    #[test]
    fn transposing_exchanges_rows_and_columns() {
        for [n_rows, n_columns] in [[1, 1], [16, 16], [33, 50], [5, 40], [0, 3]] {
            let from = numbers::<f32>(n_rows * n_columns, 1);
            let mut to = vec![0.0; from.len()];
            transpose(&from, [n_rows, n_columns], &mut to);
            for i in 0..n_rows {
                for j in 0..n_columns {
                    assert_eq!(to[j * n_rows + i], from[i * n_columns + j]);
                }
            }
            let rows: Vec<usize> = (0..2 * n_rows).map(|i| i * 7 % n_rows).collect();
            let mut gathered = vec![0.0; 2 * to.len()];
            transpose_gathered(&from, &rows, n_columns, &mut gathered);
            for (i, row) in rows.iter().enumerate() {
                for j in 0..n_columns {
                    assert_eq!(gathered[j * rows.len() + i], from[row * n_columns + j]);
                }
            }
        }
    }

    #[test]
    fn a_part_of_the_columns_is_written_alone() {
        let (a, b) = (numbers::<f32>(6, 1), numbers::<f32>(12, 2));
        let mut c = vec![7.0; 15];
        let (a, b) = (Matrix::new(&a, [3, 2]), Matrix::new(&b, [2, 6]));
        // Columns 1 and 2 of five.
        let shared = Shared::new(&mut c);
        // Safety: nobody else has them.
        let target = unsafe { Target::columns(&shared, 1, [3, 2], 5) };
        product_on(Threads::One, &a, &b.columns(3, 2), target, Store::Replace);
        let mut whole = vec![0.0; 18];
        product(&a, &b, &mut whole, Store::Replace);
        for i in 0..3 {
            let expected = [7.0, whole[i * 6 + 3], whole[i * 6 + 4], 7.0, 7.0];
            assert_eq!(c[i * 5..][..5], expected);
        }
    }

    #[test]
    fn strided_rows_are_read_in_place() {
        let elements = numbers::<f32>(40, 1);
        // Columns 2 to 4 of every second row.
        let view = View::strided(&elements, 2, [1, 1, 4, 3], [0, 0, 10, 1]);
        let matrix = Matrix::of_view(&view);
        assert_eq!(matrix.first, elements[2..].as_ptr());
        let identity: Vec<f32> = (0..9).map(|i| f32::from(i % 4 == 0)).collect();
        let mut c = vec![0.0; 12];
        product(
            &matrix,
            &Matrix::new(&identity, [3, 3]),
            &mut c,
            Store::Replace,
        );
        assert_eq!(c, *view.reals());
    }

    #[test]
    fn the_number_of_threads_does_not_show() {
        check_threads([300, 200, 500], true);
        // Few rows, and a matrix that is far.
        check_threads([30, 1000, 500], false);
    }

    fn check_threads([m, n, k]: [usize; 3], transposed: bool) {
        let number = |i: usize| ((i as f32) * 0.37).sin();
        let a: Vec<f32> = (0..m * k).map(number).collect();
        let b: Vec<f32> = (0..k * n).map(number).collect();
        let on = |n_threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads);
            let mut c = vec![0.0; m * n];
            pool.build().unwrap().install(|| {
                let dims = if transposed { [n, k] } else { [k, n] };
                let b = Matrix::new(&b, dims);
                let b = if transposed { &b.transposed() } else { &b };
                product(&Matrix::new(&a, [m, k]), b, &mut c, Store::Replace);
            });
            c
        };
        let one = on(1);
        assert!([2, 3, 5].into_iter().all(|n_threads| on(n_threads) == one));
    }
}
