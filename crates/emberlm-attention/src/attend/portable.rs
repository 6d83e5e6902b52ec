//! Attention on the blocks of a schedule as tensor operations, for any backend and differentiable by construction.
//!
//! The query blocks of a part are sorted into classes by how many key blocks they visit, rounded up to a power of two.
//! Of a class, queries and keys are gathered into `[.., n query blocks, keys or queries, d]`, and one batched product
//! and softmax serve all of its blocks.

use burn::tensor::{Bool, DType, Device, Int, Tensor, TensorData};
use emberlm_core::{BlockSizes, Part, Schedule, Span};

use super::{
    AttendOptions,
    reference::{cap, penalty},
    sums::{Sums, shift},
};

/// The output and the log-sum-exp `[batch_size, n_heads, query_length, 1]`.
pub(super) fn attend(
    inputs: [Tensor<4>; 3],
    schedule: &Schedule,
    options: &AttendOptions,
) -> (Tensor<4>, Tensor<4>) {
    let pieces = schedule
        .parts()
        .iter()
        .map(|part| attend_part(&inputs, schedule, part, options))
        .collect();
    Sums::merge(pieces, options.sinks.clone()).finish()
}

/// The query blocks of one class.
struct Class {
    /// Key blocks of each query block; beyond those it visits, any block, hidden.
    n_key_blocks: usize,
    query_blocks: Vec<usize>,
}

fn classes(part: &Part) -> Vec<Class> {
    let layouts: Vec<_> = part.layouts().collect();
    let n_query_blocks = layouts[0].rows().len();
    let mut classes: Vec<Class> = Vec::new();
    for query_block in 0..n_query_blocks {
        let n_visited = visited(part, query_block).len();
        if n_visited == 0 {
            continue;
        }
        let n_key_blocks = n_visited.next_power_of_two();
        match classes
            .iter_mut()
            .find(|class| class.n_key_blocks == n_key_blocks)
        {
            Some(class) => class.query_blocks.push(query_block),
            None => classes.push(Class {
                n_key_blocks,
                query_blocks: vec![query_block],
            }),
        }
    }
    classes
}

/// The key blocks that any head of any batch row visits from a query block, in order.
fn visited(part: &Part, query_block: usize) -> Vec<usize> {
    let mut blocks: Vec<usize> = part
        .layouts()
        .flat_map(|layout| layout.rows().spans(query_block))
        .flat_map(Span::blocks)
        .collect();
    blocks.sort_unstable();
    blocks.dedup();
    blocks
}

fn attend_part(
    [query, key, value]: &[Tensor<4>; 3],
    schedule: &Schedule,
    part: &Part,
    options: &AttendOptions,
) -> Sums {
    let [batch_size, n_heads, query_length, _] = query.dims();
    let [.., d_value] = value.dims();
    let device = query.device();
    // Where each query's row is among the rows of all classes; the one after the last stands for no row.
    let mut rows_of = vec![usize::MAX; query_length];
    let mut n_rows = 0;
    let mut pieces: Vec<Sums> = Vec::new();
    for class in classes(part) {
        let gathered = Gathered::new(schedule, part, &class);
        for (row, query) in gathered.queries.iter().enumerate() {
            if let Some(query) = query {
                rows_of[*query] = n_rows + row;
            }
        }
        n_rows += gathered.queries.len();
        pieces.push(attend_class(
            [query, key, value],
            schedule,
            &gathered,
            options,
        ));
    }
    // Even if nobody sees anything, the result depends on the inputs as far as autodiff is concerned.
    let zero = pieces.is_empty().then(|| {
        let zeros = [query, key, value].map(|input| {
            let all = Tensor::<4, Bool>::full(input.shape(), true, &device);
            input.clone().mask_fill(all, 0.0).sum()
        });
        zeros
            .into_iter()
            .reduce(|a, b| a + b)
            .expect("three inputs")
    });
    let options = (&device, query.dtype());
    let like =
        |width: usize, fill: f64| Tensor::<4>::full([batch_size, n_heads, 1, width], fill, options);
    let no_row = Sums {
        maximum: like(1, f64::NEG_INFINITY),
        total: like(1, 0.0),
        values: match zero {
            Some(zero) => like(d_value, 0.0) + zero.reshape([1, 1, 1, 1]),
            None => like(d_value, 0.0),
        },
    };
    let index: Vec<i64> = rows_of
        .into_iter()
        .map(|row| row.min(n_rows) as i64)
        .collect();
    let index = Tensor::<1, Int>::from_data(index.as_slice(), &device);
    pieces.push(no_row);
    let in_order = |tensor: fn(&Sums) -> &Tensor<4>| {
        let pieces = pieces.iter().map(|piece| tensor(piece).clone()).collect();
        Tensor::cat(pieces, 2).select(2, index.clone())
    };
    Sums {
        maximum: in_order(|sums| &sums.maximum),
        total: in_order(|sums| &sums.total),
        values: in_order(|sums| &sums.values),
    }
}

/// Which queries and keys stand in the blocks of a class, and which pairs are hidden.
struct Gathered {
    n_blocks: usize,
    /// Queries of a block and keys of a block's row.
    size: [usize; 2],
    /// `[n_blocks * size[0]]`; nothing beyond the end of the sequence.
    queries: Vec<Option<usize>>,
    /// `[n_blocks * size[1]]`
    keys: Vec<Option<usize>>,
    /// `[n_batch, n_heads, n_blocks, size[0], size[1]]` for as many batch rows and heads as differ.
    hidden: TensorData,
}

impl Gathered {
    fn new(schedule: &Schedule, part: &Part, class: &Class) -> Self {
        let BlockSizes {
            query: n_queries,
            key: n_keys,
        } = *schedule.block_sizes();
        let size = [n_queries, class.n_key_blocks * n_keys];
        let n_blocks = class.query_blocks.len();
        let place = |order: Option<&[u32]>, length: usize, i: usize| {
            (i < length).then(|| order.map_or(i, |order| order[i] as usize))
        };
        let mut queries = Vec::with_capacity(n_blocks * size[0]);
        let mut keys = Vec::with_capacity(n_blocks * size[1]);
        let key_blocks: Vec<Vec<usize>> = class
            .query_blocks
            .iter()
            .map(|query_block| visited(part, *query_block))
            .collect();
        for (query_block, visited) in class.query_blocks.iter().zip(&key_blocks) {
            for i in query_block * n_queries..(query_block + 1) * n_queries {
                queries.push(place(part.query_order(), part.query_length(), i));
            }
            for key_block in visited {
                for j in key_block * n_keys..(key_block + 1) * n_keys {
                    keys.push(place(part.key_order(), part.key_length(), j));
                }
            }
            keys.resize(
                keys.len() + (class.n_key_blocks - visited.len()) * n_keys,
                None,
            );
        }

        let lengths = schedule.lengths();
        let [n_batch, n_heads] = match part.n_layouts() {
            1 => [1, 1],
            _ => [lengths.batch_size, lengths.n_heads],
        };
        let mut hidden = vec![true; n_batch * n_heads * n_blocks * size[0] * size[1]];
        let of_head = n_blocks * size[0] * size[1];
        for (head_row, hidden) in hidden.chunks_exact_mut(of_head).enumerate() {
            let rows = part.layout(head_row / n_heads, head_row % n_heads).rows();
            let blocks = hidden.chunks_exact_mut(size[0] * size[1]);
            for ((hidden, query_block), visited) in blocks.zip(&class.query_blocks).zip(&key_blocks)
            {
                for span in rows.spans(*query_block) {
                    for key_block in span.blocks() {
                        let column = visited.binary_search(&key_block).expect("it is visited");
                        for row in 0..size[0] {
                            let first = row * size[1] + column * n_keys;
                            let hidden = &mut hidden[first..first + n_keys];
                            match *span {
                                Span::Full { .. } => hidden.fill(false),
                                Span::Partial { mask, .. } => {
                                    for (j, hidden) in hidden.iter_mut().enumerate() {
                                        *hidden = !schedule.masks().is_visible(mask, row, j);
                                    }
                                }
                            }
                        }
                    }
                }
            }
        }
        Self {
            n_blocks,
            size,
            queries,
            keys,
            hidden: TensorData::new(hidden, [n_batch, n_heads, n_blocks, size[0], size[1]]),
        }
    }
}

/// What gathers the rows of an axis: beyond the end of the sequence row 0, which is hidden there.
fn index(rows: &[Option<usize>], device: &Device) -> Tensor<1, Int> {
    let rows: Vec<i64> = rows.iter().map(|row| row.unwrap_or(0) as i64).collect();
    Tensor::from_data(rows.as_slice(), device)
}

/// All blocks of a class: `[batch_size, n_heads, n_blocks * queries of a block, ..]`.
fn attend_class(
    [query, key, value]: [&Tensor<4>; 3],
    schedule: &Schedule,
    gathered: &Gathered,
    options: &AttendOptions,
) -> Sums {
    let [batch_size, n_heads, _, d_head] = query.dims();
    let [_, n_kv_heads, _, d_value] = value.dims();
    let (device, dtype) = (query.device(), query.dtype());
    let Gathered {
        n_blocks,
        size: [n_queries, n_keys],
        ..
    } = *gathered;
    let group = n_heads / n_kv_heads;
    let (query_index, key_index) = (
        index(&gathered.queries, &device),
        index(&gathered.keys, &device),
    );
    let scale = options.scale.unwrap_or((d_head as f64).powf(-0.5));
    // The query heads of a group stand below each other as rows, so that keys and values are never repeated.
    let query = query
        .clone()
        .select(2, query_index.clone())
        .reshape([batch_size, n_kv_heads, group, n_blocks, n_queries * d_head])
        .swap_dims(2, 3)
        .reshape([batch_size, n_kv_heads, n_blocks, group * n_queries, d_head]);
    let keys_of = |tensor: &Tensor<4>, width| {
        tensor
            .clone()
            .select(2, key_index.clone())
            .reshape([batch_size, n_kv_heads, n_blocks, n_keys, width])
    };
    // `[.., n_kv_heads, n_blocks, group * rows, columns]` to `[.., n_heads, n_blocks, rows, columns]`
    let by_head = |tensor: Tensor<5>, columns: usize| {
        tensor
            .reshape([batch_size, n_kv_heads, n_blocks, group, n_queries * columns])
            .swap_dims(2, 3)
            .reshape([batch_size, n_heads, n_blocks, n_queries, columns])
    };
    let scores = (query * scale).matmul(keys_of(key, d_head).transpose());
    let mut scores = cap(by_head(scores, n_keys), options.cap);
    let block_rows = [1, 1, n_blocks, n_queries, 1];
    let block_columns = [1, 1, n_blocks, 1, n_keys];
    if let Some(slopes) = &options.alibi {
        let first = schedule.lengths().first_position as i64;
        let queries = (query_index.clone() + first).reshape(block_rows);
        let keys = key_index.clone().reshape(block_columns);
        let distance: Tensor<5, Int> = (queries - keys).abs();
        scores = scores - penalty(distance, slopes, dtype);
    }
    if let Some(bias) = &options.bias {
        let [bias_batch, bias_heads, _, n_all_keys] = bias.dims();
        let shape = [bias_batch, bias_heads, n_blocks, n_queries, n_keys];
        let columns = key_index
            .clone()
            .reshape(block_columns)
            .expand([bias_batch, bias_heads, n_blocks, n_queries, n_keys]);
        let bias = bias
            .clone()
            .select(2, query_index.clone())
            .reshape([bias_batch, bias_heads, n_blocks, n_queries, n_all_keys])
            .gather(4, columns)
            .reshape(shape);
        scores = scores + bias;
    }
    let hidden =
        Tensor::<5, Bool>::from_data(gathered.hidden.clone(), &device).expand(scores.shape());
    let scores = scores.mask_fill(hidden, f64::NEG_INFINITY);
    let maximum = scores.clone().detach().max_dim(4);
    let weights = (scores - shift(maximum.clone())).exp();
    let total = weights.clone().sum_dim(4);
    let weights = match kept(
        schedule,
        gathered,
        options,
        [batch_size, n_heads],
        &device,
        dtype,
    ) {
        Some(kept) => weights * kept,
        None => weights,
    };
    let weights = weights
        .reshape([batch_size, n_kv_heads, group, n_blocks, n_queries * n_keys])
        .swap_dims(2, 3)
        .reshape([batch_size, n_kv_heads, n_blocks, group * n_queries, n_keys]);
    let values = by_head(weights.matmul(keys_of(value, d_value)), d_value);
    let rows = n_blocks * n_queries;
    Sums {
        maximum: maximum.reshape([batch_size, n_heads, rows, 1]),
        total: total.reshape([batch_size, n_heads, rows, 1]),
        values: values.reshape([batch_size, n_heads, rows, d_value]),
    }
}

/// The factors of dropout for the weights of all blocks; nothing without dropout.
fn kept(
    schedule: &Schedule,
    gathered: &Gathered,
    options: &AttendOptions,
    [batch_size, n_heads]: [usize; 2],
    device: &Device,
    dtype: DType,
) -> Option<Tensor<5>> {
    let key = options.dropout_key.filter(|_| options.dropout > 0.0)?;
    let Gathered {
        n_blocks,
        size: [n_queries, n_keys],
        ..
    } = *gathered;
    let lengths = schedule.lengths();
    let factor = 1.0 / (1.0 - options.dropout);
    let mut factors = Vec::with_capacity(batch_size * n_heads * gathered.queries.len() * n_keys);
    for head_row in 0..batch_size * n_heads {
        for (row, query) in gathered.queries.iter().enumerate() {
            let block = row / n_queries;
            for key_row in &gathered.keys[block * n_keys..(block + 1) * n_keys] {
                factors.push(match (query, key_row) {
                    (Some(query), Some(key_row)) => {
                        let row = head_row * lengths.query_length + query;
                        let counter = row * lengths.key_length + key_row;
                        match key.uniform(counter as u64) < options.dropout {
                            true => 0.0,
                            false => factor,
                        }
                    }
                    _ => 0.0,
                });
            }
        }
    }
    let data = TensorData::new(factors, [batch_size, n_heads, n_blocks, n_queries, n_keys]);
    Some(Tensor::from_data(data, (device, dtype)))
}
