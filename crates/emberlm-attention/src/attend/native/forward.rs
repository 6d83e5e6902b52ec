//! The forward pass: online softmax over the key blocks of each query block.
//!
//! Milakov and Gimelshein 2018, <https://arxiv.org/abs/1805.02867>, as arranged by Dao et al. 2022,
//! <https://arxiv.org/abs/2205.14135>: of each query the largest score `m`, the total `l = sum e^(s - m)` and the sum
//! `o = sum e^(s - m) v` so far are kept; a larger `m` multiplies both by `e^(m_old - m_new)`. At the end the output is
//! `o / l` and the log-sum-exp `m + ln l`. All scores of a pair of blocks live in private memory and are gone afterwards.

use emberlm_core::{Layout, Part};
use emberlm_kernels::{
    Buffer, Real, Scratch, Stored,
    tile::{self, Left, Rows},
};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::{
    BLOCK,
    blocks::{Block, Strip, Strips, blocks},
    few,
    problem::{
        Problem, Sizes, pack_columns, pack_rows, packed_columns, packed_rows, padded, positions,
    },
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
    if few::takes(problem) {
        few::run(problem, &results);
    } else {
        run_parts(problem, &results);
    }
    // Safety: every query is finished.
    unsafe {
        Forward {
            output: output.finish(),
            log_sum_exp: log_sum_exp.finish(),
        }
    }
}

/// The first and the last part that a query stands in.
#[derive(Debug, Clone, Copy)]
struct Visits {
    first: usize,
    last: usize,
}

/// Of each query of the sequence; nothing of one that stands in no part.
fn visits(parts: &[Part], query_length: usize) -> Vec<Option<Visits>> {
    let mut visits: Vec<Option<Visits>> = vec![None; query_length];
    for (i, part) in parts.iter().enumerate() {
        let mut visit = |query: usize| {
            visits[query]
                .get_or_insert(Visits { first: i, last: i })
                .last = i;
        };
        match part.query_order() {
            None => (0..query_length).for_each(visit),
            Some(order) => order.iter().for_each(|query| visit(*query as usize)),
        }
    }
    visits
}

/// Runs all parts. What is known of a query that stands in several goes from one to the next; each query stands in one
/// tile of a part at most.
fn run_parts<E: Stored>(problem: &Problem<'_, E>, results: &Results<'_, E>) {
    let sizes = problem.sizes();
    let parts = problem.schedule.parts();
    let visits = visits(parts, sizes.query_length);
    let goes_on = |visits: &Option<Visits>| visits.is_some_and(|v| v.first < v.last);
    let n_heads = sizes.batch_size * sizes.n_heads;
    let n_rows = match visits.iter().any(goes_on) {
        true => n_heads * sizes.query_length,
        false => 0,
    };
    let width = padded(sizes.d_value);
    let [mut maxima, mut totals] = [(); 2].map(|()| Buffer::new(n_rows));
    let mut values = Buffer::new(n_rows * width);
    let between = SharedSums {
        width,
        maxima: maxima.shared(),
        totals: totals.shared(),
        values: values.shared(),
    };
    for (i, part) in parts.iter().enumerate() {
        let course = Course {
            part: i,
            visits: &visits,
            between: &between,
        };
        run_part(problem, part, &course, results);
    }
    let without: Vec<usize> = (0..sizes.query_length)
        .filter(|query| visits[*query].is_none())
        .collect();
    let mut sums = Sums::new(1, width);
    for head_row in 0..n_heads {
        for query in &without {
            sums.row_mut(0)
                .begin(problem.sink(head_row % sizes.n_heads));
            results.finish(&sizes, head_row * sizes.query_length + query, sums.row(0));
        }
    }
}

/// Where one part stands among all.
struct Course<'a, R> {
    part: usize,
    /// Of each query.
    visits: &'a [Option<Visits>],
    /// What is known of queries that stand in several parts.
    between: &'a SharedSums<'a, R>,
}

impl<R> Course<'_, R> {
    fn begins(&self, query: usize) -> bool {
        self.visits[query].is_some_and(|visits| visits.first == self.part)
    }

    fn ends(&self, query: usize) -> bool {
        self.visits[query].is_some_and(|visits| visits.last == self.part)
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

impl<R: Real> Packed<R> {
    /// Memory, of the calling thread, for `n_keys` keys.
    fn with_room(sizes: &Sizes, n_keys: usize) -> Self {
        Self {
            keys: Vec::with_capacity(packed_columns(n_keys, sizes.d_head)),
            values: Vec::with_capacity(packed_rows(n_keys, sizes.d_value)),
        }
    }
}

/// Private memory of a tile.
struct TileMemory<R> {
    query: Vec<R>,
    scores: Vec<R>,
    sums: Sums<R>,
}

/// Runs all tiles of a part.
fn run_part<E: Stored>(
    problem: &Problem<'_, E>,
    part: &Part,
    course: &Course<'_, E::Real>,
    results: &Results<'_, E>,
) {
    let sizes = problem.sizes();
    let (n_queries, n_keys) = (part.query_length(), part.key_length());
    let n_kv_heads = sizes.batch_size * sizes.n_kv_heads;
    let mut packed: Vec<Packed<E::Real>> = (0..n_kv_heads)
        .map(|_| Packed::with_room(&sizes, n_keys))
        .collect();
    packed.par_iter_mut().enumerate().for_each(|(i, packed)| {
        let (at, order) = (
            [i / sizes.n_kv_heads, i % sizes.n_kv_heads],
            part.key_order(),
        );
        let one = E::Real::from_f64(1.0);
        pack_columns(problem.key, at, order, &mut packed.keys);
        pack_rows(problem.value, at, order, one, &mut packed.values);
    });
    let key_positions = positions(n_keys, part.key_order());
    let arch = Arch::new();
    let n_blocks = n_queries.div_ceil(BLOCK);
    let n_tiles = sizes.batch_size * sizes.n_heads * n_blocks;
    let scratch = Scratch::new(n_tiles, || TileMemory {
        query: vec![E::Real::default(); BLOCK * padded(sizes.d_head)],
        scores: vec![E::Real::default(); BLOCK * CHUNK * BLOCK],
        sums: Sums::new(BLOCK, padded(sizes.d_value)),
    });
    // The tiles of a causal pattern differ in length: small jobs even that out.
    let tiles = (0..n_tiles).into_par_iter().with_max_len(1);
    tiles.for_each(|i| {
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
        scratch.lend(|memory| {
            begin(problem, &task, course, memory);
            arch.dispatch(Tile {
                problem,
                layout: part.layout(batch, head),
                part,
                key_positions: &key_positions,
                packed: &packed[batch * sizes.n_kv_heads + sizes.kv_head(head)],
                task: &task,
                memory,
            });
            for i in 0..task.rows.len() {
                let (row, sums) = (task.head_row(&sizes, i), memory.sums.row(i));
                match course.ends(task.query(i)) {
                    true => results.finish(&sizes, row, sums),
                    // Safety: the row is in this task alone.
                    false => unsafe { course.between.row(row) }.copy_from(sums),
                }
            }
        });
    });
}

/// Fetches the queries of a tile, and what is known of them.
fn begin<E: Stored>(
    problem: &Problem<'_, E>,
    task: &Task<'_>,
    course: &Course<'_, E::Real>,
    memory: &mut TileMemory<E::Real>,
) {
    let sizes = problem.sizes();
    let width = padded(sizes.d_head);
    for i in 0..task.rows.len() {
        let query = task.query(i);
        let row = &mut memory.query[i * width..(i + 1) * width];
        (problem.query).copy_row([task.batch, task.head, query], problem.scores.scale, row);
        let sums = memory.sums.row_mut(i);
        match course.begins(query) {
            true => sums.begin(problem.sink(task.head)),
            // Safety: the row is in this task alone, and an earlier part wrote it.
            false => {
                sums.copy_from(unsafe { course.between.row(task.head_row(&sizes, i)) }.as_ref());
            }
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
    memory: &'a mut TileMemory<E::Real>,
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
        let scores = self.memory.scores.as_mut_ptr();
        let score_stride = CHUNK * BLOCK;
        let mut strips = [Strips::default(); CHUNK];
        for (strips, block) in strips.iter_mut().zip(chunk) {
            *strips = block.strips(n_rows);
        }
        // Safety: the offsets are those of rows and blocks inside the buffers, which are made for them.
        unsafe {
            let width = padded(sizes.d_head);
            let query = self.memory.query.as_ptr();
            let panel = sizes.d_head * BLOCK;
            for (b, block) in chunk.iter().enumerate() {
                let keys = self.packed.keys[block.index * panel..][..panel].as_ptr();
                for strip in strips[b].iter() {
                    let to = scores.add(strip.first_row * score_stride + b * BLOCK);
                    tile::product::<_, S, false>(
                        simd,
                        [strip.n_rows, strip.n_keys, sizes.d_head],
                        Left::new(query.add(strip.first_row * width), width, 1),
                        Rows::new(keys.add(strip.first_key), BLOCK),
                        Rows::new(to.add(strip.first_key), score_stride),
                    );
                }
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
                let sums = self.memory.sums.row_mut(i);
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
            self.add_values(simd, chunk, &strips);
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

    /// Adds the weighted values of some key blocks; whole blocks that follow each other are one product.
    #[inline(always)]
    unsafe fn add_values<S: Simd>(
        &mut self,
        simd: S,
        chunk: &[Block<'_>],
        strips: &[Strips; CHUNK],
    ) {
        let n_rows = self.task.rows.len();
        let mut b = 0;
        while b < chunk.len() {
            let mut n = 1;
            let mut whole = strips[b].are_whole(n_rows);
            while whole && b + n < chunk.len() && chunk[b + n].index == chunk[b].index + n {
                whole = strips[b + n].are_whole(n_rows);
                n += usize::from(whole);
            }
            for strip in strips[b].iter() {
                // Of several blocks, which are whole, the strip is of all rows.
                let n_keys = strip.n_keys + (n - 1) * BLOCK;
                // Safety: as in `chunk`.
                unsafe { self.add_strip(simd, b, chunk[b].index, Strip { n_keys, ..*strip }) };
            }
            b += n;
        }
    }

    /// Adds the weighted values of the keys of one strip, which may reach into the blocks that follow.
    #[inline(always)]
    unsafe fn add_strip<S: Simd>(&mut self, simd: S, b: usize, block: usize, strip: Strip) {
        let width = padded(self.problem.sizes().d_value);
        let first = (block * BLOCK + strip.first_key) * width;
        let values = self.packed.values[first..][..strip.n_keys * width].as_ptr();
        let stride = CHUNK * BLOCK;
        // Safety: as in `chunk`.
        unsafe {
            let weights = self.memory.scores.as_ptr();
            let weights = weights.add(strip.first_row * stride + b * BLOCK + strip.first_key);
            let to = self.memory.sums.values.as_mut_ptr();
            tile::product::<_, S, true>(
                simd,
                [strip.n_rows, width, strip.n_keys],
                Left::new(weights, stride, 1),
                Rows::new(values, width),
                Rows::new(to.add(strip.first_row * width), width),
            );
        }
    }
}
