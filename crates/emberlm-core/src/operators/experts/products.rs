//! Products with the rows of an expert, each on the thread that asks for it.

use emberlm_kernels::{
    Buffer, Real,
    matrix::{Matrix, Store, Target, Threads, gathered_product, product_on, transpose},
};

/// Up to so many rows, products with a large weight, of an inner width from `WAITING_INNER` on, wait for it, and up to
/// fewer those with any.
const WAITING_ROWS: usize = 84;
const WAITING_INNER: usize = 512;
const FEW_ROWS: usize = 48;
/// With at most so many rows a product with a transposed weight is faster where the elements of a column lie together: it
/// reads the weight once, as it lies, and would else copy it in another order first.
const FEW_ROWS_BACK: usize = 128;

/// The rows of some tokens, `[n_rows, d_model]`.
pub(super) enum Rows<'a, R> {
    /// One after the other.
    Gathered(Matrix<'a, R>),
    /// Where they are among those of all tokens.
    Of(&'a Matrix<'a, R>, &'a [usize]),
}

impl<'a, R: Real> Rows<'a, R> {
    /// As products into an inner width of `n_inner` are fastest.
    pub(super) fn new(
        x: &'a Matrix<'a, R>,
        elements: &[R],
        tokens: &'a [usize],
        n_inner: usize,
        scratch: &'a mut Buffer<R>,
    ) -> Self {
        let n = tokens.len();
        // What waits for its weights is left to the kernel that asks for them ahead. One row's wait for them anyway.
        let waits = (2..=FEW_ROWS).contains(&n) || (n <= WAITING_ROWS && n_inner >= WAITING_INNER);
        if waits {
            return Self::Of(x, tokens);
        }
        let [_, d_model] = x.dims();
        let rows = gather(tokens, elements, d_model, scratch);
        Self::Gathered(Matrix::new(rows, [n, d_model]))
    }

    /// `x w`, in rows.
    pub(super) fn multiply(&self, w: &Matrix<'_, R>, to: &mut [R]) {
        let [_, d_output] = w.dims();
        match self {
            Self::Gathered(x) => {
                let [n, _] = x.dims();
                product_on(
                    Threads::One,
                    x,
                    w,
                    Target::new(to, [n, d_output]),
                    Store::Replace,
                );
            }
            Self::Of(x, tokens) => {
                gathered_product(x, tokens, w, Target::new(to, [tokens.len(), d_output]));
            }
        }
    }
}

/// `x w`, in rows.
pub(super) fn multiply<R: Real>(n: usize, x: &[R], w: &Matrix<'_, R>, to: &mut [R], store: Store) {
    let [d_input, d_output] = w.dims();
    let (x, to) = (Matrix::new(x, [n, d_input]), Target::new(to, [n, d_output]));
    product_on(Threads::One, &x, w, to, store);
}

/// The sum of `x w^T` over pairs `x, w`, in rows; at least one row, and one pair.
pub(super) struct SumBack<'a, R> {
    n_rows: usize,
    to: &'a mut [R],
    store: Store,
    /// Few rows: the sum as columns, and memory for rows as columns.
    columns: Option<[&'a mut Buffer<R>; 2]>,
}

impl<'a, R: Real> SumBack<'a, R> {
    pub(super) fn new(n_rows: usize, to: &'a mut [R], scratch: [&'a mut Buffer<R>; 2]) -> Self {
        Self {
            n_rows,
            to,
            store: Store::Replace,
            columns: (n_rows <= FEW_ROWS_BACK).then_some(scratch),
        }
    }

    pub(super) fn add(&mut self, x: &[R], w: &Matrix<'_, R>) {
        let (n, [d_output, d_input]) = (self.n_rows, w.dims());
        match &mut self.columns {
            None => multiply(n, x, &w.transposed(), self.to, self.store),
            Some([sum, columns]) => {
                let x = Matrix::new(turned(x, [n, d_input], columns), [d_input, n]);
                let sum = Target::new(room(sum, self.to.len()), [d_output, n]);
                product_on(Threads::One, w, &x, sum, self.store);
            }
        }
        self.store = Store::Add;
    }

    pub(super) fn finish(self) {
        if let Some([sum, _]) = self.columns {
            let n_elements = self.to.len();
            let dims = [n_elements / self.n_rows, self.n_rows];
            transpose(room(sum, n_elements), dims, self.to);
        }
    }
}

/// The rows of some tokens, one after the other.
pub(super) fn gather<'a, R: Real>(
    tokens: &[usize],
    x: &[R],
    width: usize,
    to: &'a mut Buffer<R>,
) -> &'a [R] {
    let to = room(to, tokens.len() * width);
    for (to, token) in to.chunks_exact_mut(width.max(1)).zip(tokens) {
        to.copy_from_slice(&x[token * width..][..width]);
    }
    to
}

/// The transpose of `[n_rows, n_columns]` elements.
pub(super) fn turned<'a, R: Real>(
    from: &[R],
    dims: [usize; 2],
    scratch: &'a mut Buffer<R>,
) -> &'a [R] {
    let to = room(scratch, from.len());
    transpose(from, dims, to);
    to
}

/// The first `n` elements, to be written.
pub(super) fn room<R: Real>(scratch: &mut Buffer<R>, n: usize) -> &mut [R] {
    // Safety: it is borrowed by this result alone.
    unsafe { scratch.shared().part(0, n) }
}
