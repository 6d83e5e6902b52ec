//! Products with the rows of an expert, each on the thread that asks for it.

use emberlm_kernels::{
    Buffer, Real,
    matrix::{
        Matrix, Store, Target, Threads, few_rows_product, product_on, transpose, transpose_gathered,
    },
};

/// Up to so many rows products wait for the weights, from an inner width of `WAITING_INNER` on, and up to fewer whatever
/// the width.
const WAITING_ROWS: usize = 84;
const WAITING_INNER: usize = 512;
const FEW_ROWS: usize = 48;
/// With at most so many rows a product with a transposed weight is faster where the elements of a column lie together: it
/// reads the weight once, as it lies, and would else copy it in another order first.
const FEW_ROWS_BACK: usize = 128;

/// Whether products of some rows are left to the kernel that asks for the weights ahead: those of many experts come from
/// memory even where each is small.
fn wait(n_rows: usize, n_inner: usize) -> bool {
    (2..=FEW_ROWS).contains(&n_rows) || (n_rows <= WAITING_ROWS && n_inner >= WAITING_INNER)
}

/// The rows of some tokens, as products into the inner width take them.
pub(super) struct Rows<'a, R> {
    /// `[n_rows, d_model]`, or those of all tokens.
    x: Matrix<'a, R>,
    /// Where the rows are among those of all tokens, if they were not gathered.
    places: Option<&'a [usize]>,
}

impl<'a, R: Real> Rows<'a, R> {
    /// As products into an inner width of `n_inner` are fastest.
    ///
    /// # Shapes
    ///
    /// - `x`: `[n_tokens, d_model]`
    pub(super) fn new(
        x: &'a [R],
        [n_tokens, d_model]: [usize; 2],
        tokens: &'a [usize],
        n_inner: usize,
        scratch: &'a mut Buffer<R>,
    ) -> Self {
        let n = tokens.len();
        match wait(n, n_inner) {
            true => Self {
                x: Matrix::new(x, [n_tokens, d_model]),
                places: Some(tokens),
            },
            false => Self {
                x: Matrix::new(gather(tokens, x, d_model, scratch), [n, d_model]),
                places: None,
            },
        }
    }

    /// `x w`, in rows.
    pub(super) fn multiply(&self, w: &Matrix<'_, R>, to: &mut [R]) {
        let ([n, _], [_, d_output]) = (self.x.dims(), w.dims());
        let to = Target::new(to, [self.places.map_or(n, <[usize]>::len), d_output]);
        match self.places {
            Some(_) => few_rows_product(&self.x, self.places, w, to, Store::Replace),
            None => product_on(Threads::One, &self.x, w, to, Store::Replace),
        }
    }
}

/// `x w` of inner elements, in rows.
pub(super) fn multiply_inner<R: Real>(
    n: usize,
    x: &[R],
    w: &Matrix<'_, R>,
    to: &mut [R],
    store: Store,
) {
    let [n_inner, d_output] = w.dims();
    let (x, to) = (Matrix::new(x, [n, n_inner]), Target::new(to, [n, d_output]));
    // The product of one row is as fast as its weights come, in either way, and has less to prepare in the crate `gemm`.
    match n > 1 && wait(n, n_inner) {
        true => few_rows_product(&x, None, w, to, store),
        false => product_on(Threads::One, &x, w, to, store),
    }
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
            None => {
                let x = Matrix::new(x, [n, d_input]);
                let to = Target::new(self.to, [n, d_output]);
                product_on(Threads::One, &x, &w.transposed(), to, self.store);
            }
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

/// The transpose of the rows of some tokens: `[width, n_rows]`.
pub(super) fn gather_turned<'a, R: Real>(
    tokens: &[usize],
    x: &[R],
    width: usize,
    scratch: &'a mut Buffer<R>,
) -> Matrix<'a, R> {
    let to = room(scratch, tokens.len() * width);
    transpose_gathered(x, tokens, width, to);
    Matrix::new(to, [width, tokens.len()])
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
