//! The forward pass: online softmax over the key blocks of each query block.
//!
//! Milakov and Gimelshein 2018, <https://arxiv.org/abs/1805.02867>, as arranged by Dao et al. 2022,
//! <https://arxiv.org/abs/2205.14135>: of each query the largest score `m`, the total `l = sum e^(s - m)` and the sum
//! `o = sum e^(s - m) v` so far are kept; a larger `m` multiplies both by `e^(m_old - m_new)`. At the end the output is
//! `o / l` and the log-sum-exp `m + ln l`. All scores of a pair of blocks live in private memory and are gone afterwards.

use emberlm_core::{Layout, Part};
use emberlm_kernels::{
    Buffer, Real, Stored,
    tile::{self, Left, Rows},
};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::{
    BLOCK,
    blocks::{Block, blocks},
    few,
    problem::{Problem, Sizes, pack_columns, pack_rows, padded, positions},
    scores::{Head, Row},
    sums::{Results, SharedSums, Sums},
};

/// Key blocks whose scores are held at once: enough to spread the work a row of scores costs besides its elements.
const CHUNK: usize = 4;

/// The result of the forward pass.
pub(super) struct Forward<E: Stored> {
    /// `[batch_size, query_length, n_heads, d_value]`; one column more, the log-sum-exp, if the problem asks for it.
    pub(super) output: Vec<E>,
    /// `[batch_size, n_heads, query_length]`; negative infinity for a query that sees no key.
    pub(super) log_sum_exp: Vec<E::Real>,
}

/// Runs the forward pass. Every query block is one task, so the result does not depend on the number of threads.
pub(super) fn forward<E: Stored>(problem: &Problem<'_, E>) -> Forward<E> {
    let sizes = problem.sizes();
    let n_rows = sizes.batch_size * sizes.n_heads * sizes.query_length;
    let mut output = Buffer::new(n_rows * problem.d_output());
    let mut log_sum_exp = Buffer::new(n_rows);
    let results = Results {
        d_output: problem.d_output(),
        output: output.shared(),
        log_sum_exp: log_sum_exp.shared(),
    };
    let parts = problem.schedule.parts();
    if few::takes(problem) {
        few::run(problem, &results);
    } else if let [part] = parts
        && part.query_order().is_none()
    {
        // The usual case: what a tile holds goes straight to the output.
        run_part(problem, part, None, |tile, task| {
            for i in 0..task.rows.len() {
                results.finish(&sizes, task.head_row(&sizes, i), tile.row(i));
            }
        });
    } else {
        // What is known of each query goes from part to part; each query stands in one tile of a part at most.
        let width = padded(sizes.d_value);
        let mut state = Sums::new(n_rows, width);
        for row in 0..n_rows {
            let head = row / sizes.query_length % sizes.n_heads;
            state.row_mut(row).begin(problem.sink(head));
        }
        for part in parts {
            let shared = state.share();
            run_part(problem, part, Some(&shared), |tile, task| {
                for i in 0..task.rows.len() {
                    let row = task.head_row(&sizes, i);
                    // Safety: the row is in this task alone.
                    unsafe { shared.row(row) }.copy_from(tile.row(i));
                }
            });
        }
        (0..n_rows).for_each(|row| results.finish(&sizes, row, state.row(row)));
    }
    // Safety: every query is in one tile of the one part, or finished after the last part.
    unsafe {
        Forward {
            output: output.finish(),
            log_sum_exp: log_sum_exp.finish(),
        }
    }
}

/// One query block of one head.
struct Task<'a> {
    batch: usize,
    head: usize,
    query_block: usize,
    /// The rows of the part in this block, and which queries they are.
    rows: std::ops::Range<usize>,
    query_order: Option<&'a [u32]>,
}

impl Task<'_> {
    fn query(&self, i: usize) -> usize {
        let row = self.rows.start + i;
        self.query_order.map_or(row, |order| order[row] as usize)
    }

    /// The row of `[batch_size, n_heads, query_length]`.
    fn head_row(&self, sizes: &Sizes, i: usize) -> usize {
        (self.batch * sizes.n_heads + self.head) * sizes.query_length + self.query(i)
    }
}

/// Keys and values of one head, packed for a part.
struct Packed<R> {
    keys: Vec<R>,
    values: Vec<R>,
}

/// Private memory of a job.
struct Scratch<R> {
    query: Vec<R>,
    scores: Vec<R>,
    sums: Sums<R>,
}

/// Runs all tiles of a part, from the sums so far (`state`, else from the sinks), and hands each to `done`.
fn run_part<E: Stored>(
    problem: &Problem<'_, E>,
    part: &Part,
    state: Option<&SharedSums<'_, E::Real>>,
    done: impl Fn(&Sums<E::Real>, &Task<'_>) + Sync,
) {
    let sizes = problem.sizes();
    let (n_queries, n_keys) = (part.query_length(), part.key_length());
    let packed: Vec<Packed<E::Real>> = (0..sizes.batch_size * sizes.n_kv_heads)
        .into_par_iter()
        .map(|i| {
            let at = [i / sizes.n_kv_heads, i % sizes.n_kv_heads];
            let one = E::Real::from_f64(1.0);
            Packed {
                keys: pack_columns(problem.key, at, part.key_order()),
                values: pack_rows(problem.value, at, part.key_order(), one),
            }
        })
        .collect();
    let key_positions = positions(n_keys, part.key_order());
    let arch = Arch::new();
    let n_blocks = n_queries.div_ceil(BLOCK);
    let n_tiles = sizes.batch_size * sizes.n_heads * n_blocks;
    // The tiles of a causal pattern differ in length: small jobs even that out. Each job makes its memory, so where
    // there are many tiles a job has a few.
    let tiles_of_a_job = (n_tiles / (32 * rayon::current_num_threads())).clamp(1, 4);
    (0..n_tiles)
        .into_par_iter()
        .with_max_len(tiles_of_a_job)
        .for_each_init(
            || Scratch {
                query: vec![E::Real::default(); BLOCK * padded(sizes.d_head)],
                scores: vec![E::Real::default(); BLOCK * CHUNK * BLOCK],
                sums: Sums::new(BLOCK, padded(sizes.d_value)),
            },
            |scratch, i| {
                let (head_row, query_block) = (i / n_blocks, n_blocks - 1 - i % n_blocks);
                let (batch, head) = (head_row / sizes.n_heads, head_row % sizes.n_heads);
                let first = query_block * BLOCK;
                let task = Task {
                    batch,
                    head,
                    query_block,
                    rows: first..n_queries.min(first + BLOCK),
                    query_order: part.query_order(),
                };
                begin(problem, &task, state, scratch);
                arch.dispatch(Tile {
                    problem,
                    layout: part.layout(batch, head),
                    part,
                    key_positions: &key_positions,
                    packed: &packed[batch * sizes.n_kv_heads + sizes.kv_head(head)],
                    task: &task,
                    scratch,
                });
                done(&scratch.sums, &task);
            },
        );
}

/// Fetches the queries of a tile, and what is known of them.
fn begin<E: Stored>(
    problem: &Problem<'_, E>,
    task: &Task<'_>,
    state: Option<&SharedSums<'_, E::Real>>,
    scratch: &mut Scratch<E::Real>,
) {
    let sizes = problem.sizes();
    let width = padded(sizes.d_head);
    for i in 0..task.rows.len() {
        let at = [task.batch, task.head, task.query(i)];
        let row = &mut scratch.query[i * width..(i + 1) * width];
        problem.query.copy_row(at, problem.scores.scale, row);
        let sums = scratch.sums.row_mut(i);
        match state {
            // Safety: the row is in this task alone.
            Some(state) => sums.copy_from(unsafe { state.row(task.head_row(&sizes, i)) }.as_ref()),
            None => sums.begin(problem.sink(task.head)),
        }
    }
}

/// One tile: everything that its queries see in one part.
struct Tile<'a, 'b, E: Stored> {
    problem: &'a Problem<'b, E>,
    layout: &'a Layout,
    part: &'a Part,
    key_positions: &'a [E::Real],
    packed: &'a Packed<E::Real>,
    task: &'a Task<'a>,
    scratch: &'a mut Scratch<E::Real>,
}

impl<E: Stored> WithSimd for Tile<'_, '_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let spans = self.layout.rows().spans(self.task.query_block);
        let head = Head::new(self.problem, self.task.batch, self.task.head);
        let mut chunk = [Block {
            index: 0,
            mask: None,
        }; CHUNK];
        let mut n = 0;
        for block in blocks(self.problem.schedule.masks(), spans) {
            chunk[n] = block;
            n += 1;
            if n == CHUNK {
                self.chunk(simd, &head, &chunk);
                n = 0;
            }
        }
        if n > 0 {
            self.chunk(simd, &head, &chunk[..n]);
        }
    }
}

impl<E: Stored> Tile<'_, '_, E> {
    /// Takes some key blocks into the sums.
    #[inline(always)]
    fn chunk<S: Simd>(&mut self, simd: S, head: &Head<'_, E>, chunk: &[Block<'_>]) {
        let sizes = self.problem.sizes();
        let n_rows = self.task.rows.len();
        let scores = self.scratch.scores.as_mut_ptr();
        let score_stride = CHUNK * BLOCK;
        // Safety: the offsets are those of rows and blocks inside the buffers, which are made for them.
        unsafe {
            let query = Left::new(self.scratch.query.as_ptr(), padded(sizes.d_head), 1);
            for (b, block) in chunk.iter().enumerate() {
                let panel = sizes.d_head * BLOCK;
                let keys = Rows::new(
                    self.packed.keys[block.index * panel..][..panel].as_ptr(),
                    BLOCK,
                );
                let to = Rows::new(scores.add(b * BLOCK), score_stride);
                let shape = [n_rows, BLOCK, sizes.d_head];
                tile::product::<_, S, false>(simd, shape, query, keys, to);
            }
            let plain = head.is_plain();
            for i in 0..n_rows {
                let row = scores.add(i * score_stride);
                for (b, block) in chunk.iter().enumerate() {
                    let visible = block.mask.map(|mask| mask[i]);
                    if plain && visible.is_none() {
                        continue;
                    }
                    let place = self.place(i, block, visible);
                    head.apply(simd, &place, row.add(b * BLOCK), None);
                }
                let sums = self.scratch.sums.row_mut(i);
                sums.take(simd, row, chunk.len() * BLOCK);
                if head.dropout.is_some() {
                    for (b, block) in chunk.iter().enumerate() {
                        let place = self.place(i, block, None);
                        for (j, kept) in head.kept(&place).into_iter().flatten().enumerate() {
                            let weight = row.add(b * BLOCK + j);
                            *weight = *weight * kept;
                        }
                    }
                }
            }
            self.add_values(simd, chunk);
        }
    }

    #[inline(always)]
    fn place(&self, i: usize, block: &Block<'_>, visible: Option<u64>) -> Row<'_, E> {
        let row = self.task.rows.start + i;
        Row::new(
            self.problem,
            self.part,
            self.key_positions,
            row,
            block.index,
            visible,
        )
    }

    /// Adds the weighted values of some key blocks; blocks that follow each other are one product.
    #[inline(always)]
    unsafe fn add_values<S: Simd>(&mut self, simd: S, chunk: &[Block<'_>]) {
        let width = padded(self.problem.sizes().d_value);
        let mut b = 0;
        while b < chunk.len() {
            let mut n = 1;
            while b + n < chunk.len() && chunk[b + n].index == chunk[b].index + n {
                n += 1;
            }
            // Safety: as in `chunk`.
            unsafe {
                let weights = Left::new(
                    self.scratch.scores.as_ptr().add(b * BLOCK),
                    CHUNK * BLOCK,
                    1,
                );
                let first = chunk[b].index * BLOCK * width;
                let values = Rows::new(
                    self.packed.values[first..][..n * BLOCK * width].as_ptr(),
                    width,
                );
                let to = Rows::new(self.scratch.sums.values.as_mut_ptr(), width);
                let shape = [self.task.rows.len(), width, n * BLOCK];
                tile::product::<_, S, true>(simd, shape, weights, values, to);
            }
            b += n;
        }
    }
}
