//! The sparse modules: their index sets against the papers', the laws they keep, and caches of bounded memory.

use burn::{
    module::Module,
    tensor::{DType, Tensor, s},
};
use emberlm_attention::{
    BigBirdAttentionConfig, BigBirdGlobals, BlockwiseAttentionConfig, BlockwiseKind,
    GroupedQueryAttention, GroupedQueryAttentionConfig, LongformerAttention,
    LongformerAttentionConfig, RandomPlan, RepeatedBlocks, SlidingWindowAttentionConfig,
    SparseHeads, SparseKind, SparseTransformerAttentionConfig,
};
use emberlm_core::{
    At, BatchData, CachePositions, Context, Global, InvalidConfig, KvCache, Lengths, Pattern,
    RingError, RotaryConfig, RotaryLayout, SequenceMixer, Window, alibi_slopes,
};
use emberlm_testkit::{assert_close, device, laws, random, to_f64};

const D_MODEL: usize = 12;
const N_HEADS: usize = 3;

fn sees(pattern: &Pattern, head: usize, query: usize, key: usize, key_length: usize) -> bool {
    let at = At {
        batch: 0,
        head,
        query,
        key,
        key_length,
    };
    pattern.allows(&at, &BatchData::new())
}

/// `A^(1)` and `A^(2)` of section 4.3, written as the paper has them.
fn of_paper(kind: SparseKind, set: usize, l: usize, sub_index: usize, i: usize, j: usize) -> bool {
    j <= i
        && match (kind, set) {
            (SparseKind::Strided, 1) => j >= i.saturating_sub(l),
            (SparseKind::Strided, _) => (i - j).is_multiple_of(l),
            (SparseKind::Fixed { .. }, 1) => j / l == i / l,
            (SparseKind::Fixed { n_summary: c }, _) => {
                let t = l - (sub_index + 1) * c;
                (t..t + c).contains(&(j % l))
            }
        }
}

/// Whether a head's query sees a key.
type Sees<'a> = &'a dyn Fn(usize, usize, usize) -> bool;

#[test]
fn the_sparse_transformer_sees_what_the_paper_says() {
    let (l, n, n_heads) = (6, 40, 4);
    for kind in [SparseKind::Strided, SparseKind::Fixed { n_summary: 2 }] {
        let pattern = |heads| {
            let config = SparseTransformerAttentionConfig::new(8, n_heads, l);
            let config = config.with_kind(kind).with_heads(heads);
            config.validate().unwrap();
            config.pattern()
        };
        let expected: [(SparseHeads, Sees); 5] = [
            (SparseHeads::Merged, &|h, i, j| {
                of_paper(kind, 1, l, 0, i, j) || of_paper(kind, 2, l, h % 3, i, j)
            }),
            (SparseHeads::Separate, &|h, i, j| match h {
                0 | 1 => of_paper(kind, 1, l, 0, i, j),
                _ => of_paper(kind, 2, l, h - 2, i, j),
            }),
            (SparseHeads::Local, &|_, i, j| of_paper(kind, 1, l, 0, i, j)),
            (SparseHeads::Alternating { layer: 0 }, &|_, i, j| {
                of_paper(kind, 1, l, 0, i, j)
            }),
            (SparseHeads::Alternating { layer: 3 }, &|h, i, j| {
                of_paper(kind, 2, l, h % 3, i, j)
            }),
        ];
        for (heads, expected) in expected {
            let pattern = pattern(heads);
            for (head, i) in (0..n_heads).flat_map(|h| (0..n).map(move |i| (h, i))) {
                for j in 0..n {
                    assert_eq!(
                        sees(&pattern, head, i, j, n),
                        expected(head, i, j),
                        "{kind:?}, {heads:?}: head {head}, query {i}, key {j}"
                    );
                }
            }
        }
    }
}

#[test]
fn chunked_attention_is_dense_attention() {
    let device = device();
    let kind = BlockwiseKind::Chunked;
    let chunked = BlockwiseAttentionConfig::new(D_MODEL, N_HEADS, kind).init(&device);
    let x = random([2, 150, D_MODEL], 1, DType::F64, &device);
    let chunked = to_f64(chunked);
    let y = chunked.forward(x.clone(), &Context::new(Lengths::square(150)));
    // softmax(q k^T / sqrt(d)) v, all scores at once.
    let heads = |x: Tensor<3>| x.reshape([2, 150, N_HEADS, 4]).swap_dims(1, 2);
    let [query, key, value] = [&chunked.query, &chunked.key, &chunked.value]
        .map(|linear| heads(linear.forward(x.clone())));
    let weights = burn::tensor::activation::softmax(query.matmul(key.transpose()) / 2.0, 3);
    let joined = weights
        .matmul(value)
        .swap_dims(1, 2)
        .reshape([2, 150, D_MODEL]);
    assert_close(y, chunked.output.forward(joined), 1e-12);
}

fn rotary() -> RotaryConfig {
    RotaryConfig::new(D_MODEL / N_HEADS)
        .with_theta(100.0)
        .with_layout(RotaryLayout::HalfSplit)
}

/// Causal modules of every kind, with weights that make distant keys matter.
fn grouped() -> Vec<GroupedQueryAttentionConfig> {
    let sparse = |kind, heads| {
        let config = SparseTransformerAttentionConfig::new(D_MODEL, N_HEADS, 5);
        config.with_kind(kind).with_heads(heads).attention()
    };
    let big_bird = |globals| {
        let random = RandomPlan::Drawn {
            n_blocks: 1,
            seed: 3,
        };
        BigBirdAttentionConfig::new(D_MODEL, N_HEADS, 4, random)
            .with_globals(globals)
            .with_causal(true)
            .attention()
    };
    let given = RandomPlan::Given {
        rows: vec![vec![vec![0], vec![0, 1], vec![0, 0]]; N_HEADS],
        repeats: RepeatedBlocks::EachTime,
    };
    let mut all = bounded();
    all.extend([
        sparse(SparseKind::Strided, SparseHeads::Separate),
        sparse(SparseKind::Fixed { n_summary: 2 }, SparseHeads::Merged),
        big_bird(BigBirdGlobals::Internal).with_rotary(Some(rotary())),
        big_bird(BigBirdGlobals::Extended { n_blocks: 2 }),
        BigBirdAttentionConfig::new(D_MODEL, N_HEADS, 4, given)
            .with_causal(true)
            .attention(),
    ]);
    all
}

/// Those whose past is bounded.
fn bounded() -> Vec<GroupedQueryAttentionConfig> {
    let sliding = |n_sinks| {
        SlidingWindowAttentionConfig::new(D_MODEL, N_HEADS, 6)
            .with_n_sinks(n_sinks)
            .attention()
    };
    let blockwise = BlockwiseKind::Local {
        block: 5,
        look_back: 1,
    };
    let words = |pattern: &str| {
        GroupedQueryAttentionConfig::new(D_MODEL, N_HEADS).with_pattern(pattern.parse().unwrap())
    };
    let slopes = || Some(alibi_slopes(N_HEADS));
    vec![
        sliding(0).with_rotary(Some(rotary())),
        sliding(3).with_rotary(Some(rotary())),
        sliding(3).with_alibi(slopes()),
        sliding(2),
        BlockwiseAttentionConfig::new(D_MODEL, N_HEADS, blockwise)
            .with_causal(true)
            .attention()
            .with_alibi(slopes()),
        words("causal & (window:4:0 | global:1,9,17)").with_alibi(slopes()),
        words("causal & heads(window:3:0, dilated:3:0:4 | sinks:2, fixed-local:7)"),
        words("causal & heads(strided-local:6, window:2 | global:..3, global-keys:5 | window:1)")
            .with_rotary(Some(rotary())),
    ]
}

#[test]
fn causal_modules_are_causal_and_can_be_decoded() {
    let device = device();
    for config in grouped() {
        let attention = config.init(&device);
        let name = config.pattern.to_string();
        let context = |length| Context::new(Lengths::square(length));
        laws::causal([2, 23, D_MODEL], &device, |x| {
            attention.forward(x.clone(), &context(x.dims()[1]))
        });
        let x = random([2, 23, D_MODEL], 1, DType::F32, &device);
        check_decoding(&attention, x, || attention.new_cache(23), &name);
    }
}

/// Decoding equals one pass, at every split.
fn check_decoding<M: SequenceMixer>(
    attention: &M,
    x: Tensor<3>,
    new_cache: impl Fn() -> M::Cache,
    name: &str,
) {
    println!("{name}");
    let length = x.dims()[1];
    let mut cache = new_cache();
    laws::cached_equals_full(
        x,
        |x| attention.forward(x, &Context::new(Lengths::square(length))),
        |part, position| {
            if position == 0 {
                cache = new_cache();
            }
            let n = part.dims()[1];
            let lengths = Lengths::new(n, position + n).with_first_position(position);
            attention.forward_cached(part, &Context::new(lengths), &mut cache)
        },
    );
}

/// Feeds a long sequence in parts, and compares each with one pass over the whole.
fn check_ring<M: SequenceMixer<Cache = KvCache>>(
    attention: &M,
    mut cache: KvCache,
    parts: &[usize],
    name: &str,
) -> KvCache {
    let device = device();
    let length = parts.iter().sum();
    let x = random([2, length, D_MODEL], 1, DType::F64, &device) * 2.0;
    let whole = attention.forward(x.clone(), &Context::new(Lengths::square(length)));
    let mut first = 0;
    for n in parts {
        let part = x.clone().slice(s![.., first..first + n, ..]);
        let lengths = Lengths::new(*n, first + n).with_first_position(first);
        let y = attention.forward_cached(part, &Context::new(lengths), &mut cache);
        let expected = whole.clone().slice(s![.., first..first + n, ..]);
        let difference = emberlm_testkit::largest_difference(&y.into_data(), &expected.into_data());
        assert!(
            difference <= 1e-12,
            "{name}: {difference:e} at positions {first}..{}",
            first + n
        );
        first += n;
    }
    cache
}

fn parts() -> Vec<Vec<usize>> {
    let mixed = [5, 1, 1, 30, 2, 1, 1, 1, 70, 3, 90];
    vec![vec![1; 300], mixed.repeat(2), vec![250, 1, 1, 120, 1]]
}

#[test]
fn a_ring_forgets_only_what_nobody_sees() {
    let device = device();
    for config in bounded() {
        let attention: GroupedQueryAttention = to_f64(config.init(&device));
        let name = config.pattern.to_string();
        for parts in parts() {
            let ring = attention.new_ring_cache(CachePositions::Absolute).unwrap();
            let cache = check_ring(&attention, ring, &parts, &name);
            assert_eq!(cache.len(), parts.iter().sum::<usize>());
            let gap = cache.slots().gap();
            assert!(gap > 100, "{name}: only {gap} positions are gone");
        }
    }
}

#[test]
fn a_ring_of_one_token_steps_stays_small() {
    let device = device();
    let config = SlidingWindowAttentionConfig::new(D_MODEL, N_HEADS, 100).with_n_sinks(4);
    let attention = config.init(&device);
    let mut cache = attention.new_ring_cache(CachePositions::Absolute).unwrap();
    let mut largest = 0;
    for position in 0..1000 {
        let lengths = Lengths::decode(position + 1);
        let x = random([1, 1, D_MODEL], position as u64, DType::F32, &device);
        attention.forward_cached(x, &Context::new(lengths), &mut cache);
        largest = largest.max(cache.capacity());
    }
    assert!(largest <= 2 * (100 + 4) + 2, "{largest} slots");
}

/// With positions that count in the cache, what stands at one place of a long text stands at the same place of a text
/// that never was longer than sinks and window.
#[test]
fn positions_in_the_cache_are_those_of_a_short_text() {
    let device = device();
    let sliding = SlidingWindowAttentionConfig::new(D_MODEL, N_HEADS, 6).with_n_sinks(2);
    for config in [
        sliding.attention().with_rotary(Some(rotary())),
        sliding.attention().with_alibi(Some(alibi_slopes(N_HEADS))),
    ] {
        let attention: GroupedQueryAttention = to_f64(config.init(&device));
        let x = random([1, 40, D_MODEL], 1, DType::F64, &device);
        let mut cache = attention.new_ring_cache(CachePositions::InCache).unwrap();
        let mut last = None;
        for position in 0..40 {
            let part = x.clone().slice(s![.., position..=position, ..]);
            let context = Context::new(Lengths::decode(position + 1));
            last = Some(attention.forward_cached(part, &context, &mut cache));
        }
        // The sinks and the window, as if there had been nothing between.
        let short = Tensor::cat(
            vec![
                x.clone().slice(s![.., 0..2, ..]),
                x.slice(s![.., 34..40, ..]),
            ],
            1,
        );
        let expected = attention.forward(short, &Context::new(Lengths::square(8)));
        assert_close(last.unwrap(), expected.slice(s![.., 7..8, ..]), 1e-12);
    }
}

#[test]
fn a_ring_needs_a_bound() {
    let device = device();
    let refused = |words: &str| {
        let config = GroupedQueryAttentionConfig::new(D_MODEL, N_HEADS)
            .with_pattern(words.parse().unwrap())
            .init(&device);
        config.new_ring_cache(CachePositions::Absolute).unwrap_err()
    };
    for words in [
        "causal",
        "causal & strided:4",
        "window:3 | random-past:4:1",
        "heads(window:3, causal, window:3)",
        "window:3 | global:batch",
        "window:3 & sinks:4",
        "!window:3",
        "documents & window:5",
    ] {
        let error = refused(words);
        assert!(matches!(error, RingError::Unbounded { .. }), "{words}");
        assert!(error.to_string().contains(words), "{error}");
    }
}

#[test]
#[should_panic(expected = "cannot be gone back to")]
fn what_is_forgotten_cannot_be_gone_back_to() {
    let mut cache = KvCache::ring(&"window:3".parse().unwrap(), CachePositions::Absolute).unwrap();
    let x = random([1, 1, 80, 2], 1, DType::F32, &device());
    cache.append(x.clone(), x.clone());
    cache.append(x.clone(), x);
    cache.truncate(150);
    assert_eq!(cache.len(), 150);
    cache.truncate(20);
}

fn longformers() -> Vec<LongformerAttentionConfig> {
    let base = LongformerAttentionConfig::new(D_MODEL, N_HEADS, Window::one_sided(4));
    vec![
        base.clone(),
        base.clone().with_global(Global::First(2)),
        base.clone()
            .with_global(Global::Positions(vec![1, 9, 11]))
            .with_dilations(Some(vec![1, 2, 3])),
        base.clone()
            .with_global(Global::Positions(vec![0, 9]))
            .with_rotary(Some(rotary())),
        base.with_global(Global::Positions(vec![3]))
            .with_alibi(Some(alibi_slopes(N_HEADS))),
    ]
}

#[test]
fn an_autoregressive_longformer_is_causal_and_can_be_decoded() {
    let device = device();
    for config in longformers() {
        let attention = config.with_causal(true).init(&device);
        laws::causal([2, 23, D_MODEL], &device, |x| {
            let context = Context::new(Lengths::square(x.dims()[1]));
            attention.forward(x, &context)
        });
        let x = random([2, 23, D_MODEL], 1, DType::F32, &device);
        check_decoding(&attention, x, || attention.new_cache(23), "longformer");
        let attention: LongformerAttention = to_f64(attention);
        for parts in parts() {
            let ring = attention.new_ring_cache(CachePositions::Absolute).unwrap();
            let cache = check_ring(&attention, ring, &parts, "longformer");
            assert!(cache.slots().gap() > 100);
        }
    }
}

/// The formula of the module's documentation, one query at a time.
#[test]
fn longformer_is_its_formula() {
    let device = device();
    let n = 14;
    for config in longformers().into_iter().take(3) {
        for causal in [false, true] {
            let config = config.clone().with_causal(causal);
            let attention: LongformerAttention = to_f64(config.init(&device));
            let x = random([1, n, D_MODEL], 1, DType::F64, &device);
            let y = attention.forward(x.clone(), &Context::new(Lengths::square(n)));
            let globals = match &config.global {
                Global::Positions(positions) => positions.clone(),
                Global::First(n) => (0..*n).collect(),
                _ => unreachable!("the cases above"),
            };
            let numbers = |linear: &burn::nn::Linear| -> Vec<f64> {
                linear.forward(x.clone()).into_data().iter().collect()
            };
            let local = [&attention.query, &attention.key, &attention.value].map(numbers);
            let global = [
                &attention.global_query,
                &attention.global_key,
                &attention.global_value,
            ]
            .map(numbers);
            let width = D_MODEL / N_HEADS;
            let mut joined = Vec::new();
            for i in 0..n {
                for head in 0..N_HEADS {
                    let is_global = globals.contains(&i);
                    let [query, key, value] = if is_global { &global } else { &local };
                    let dilation = config.dilations.as_ref().map_or(1, |all| all[head]);
                    let visible = |j: usize| {
                        let distance = i.abs_diff(j);
                        let window = distance % dilation == 0 && distance / dilation <= 4;
                        (is_global || globals.contains(&j) || window) && (!causal || j <= i)
                    };
                    let at = |x: &[f64], i: usize, c: usize| x[i * D_MODEL + head * width + c];
                    let weight = |j: usize| {
                        let score: f64 = (0..width).map(|c| at(query, i, c) * at(key, j, c)).sum();
                        if visible(j) { (score / 2.0).exp() } else { 0.0 }
                    };
                    let total: f64 = (0..n).map(weight).sum();
                    for c in 0..width {
                        let sum: f64 = (0..n).map(|j| weight(j) * at(value, j, c)).sum();
                        joined.push(sum / total);
                    }
                }
            }
            let joined = burn::tensor::TensorData::new(joined, [1, n, D_MODEL]);
            let joined = Tensor::<3>::from_data(joined, (&device, DType::F64));
            assert_close(y, attention.output.forward(joined), 1e-12);
        }
    }
}

#[test]
fn longformer_attends_with_heads_that_are_given() {
    let device = device();
    let n = 14;
    for config in longformers() {
        let attention = config.init(&device);
        let x = random([2, n, D_MODEL], 1, DType::F32, &device);
        let context = Context::new(Lengths::square(n).with_batch_size(2));
        let heads = |linear: &burn::nn::Linear| {
            let heads = linear.forward(x.clone());
            heads
                .reshape([2, n, N_HEADS, D_MODEL / N_HEADS])
                .swap_dims(1, 2)
        };
        let local = [&attention.query, &attention.key, &attention.value].map(heads);
        let rows = context.global_queries(&config.global).unwrap().concat();
        let global = (!rows.is_empty()).then(|| {
            let query = heads(&attention.global_query);
            let queries = rows.iter().map(|row| query.clone().narrow(2, *row, 1));
            let [key, value] = [&attention.global_key, &attention.global_value].map(heads);
            [Tensor::cat(queries.collect(), 2), key, value]
        });
        let joined = attention.attend_heads(local, global, &context);
        let joined = joined.swap_dims(1, 2).reshape([2, n, D_MODEL]);
        let y = attention.forward(x.clone(), &context);
        assert_close(y, attention.output.forward(joined), 1e-6);
    }
}

#[test]
#[should_panic(expected = "global: tokens are global, but no heads are given")]
fn longformer_asks_for_the_heads_of_global_tokens() {
    let config = longformers().swap_remove(0);
    let attention = config.with_global(Global::First(2)).init(&device());
    let heads = [1, 2, 3].map(|seed| random([1, N_HEADS, 9, 4], seed, DType::F32, &device()));
    attention.attend_heads(heads, None, &Context::new(Lengths::square(9)));
}

/// Global queries are gathered where it does not matter where they stand. ALiBi with slopes of zero changes nothing, but
/// leaves them in their places.
#[test]
fn global_queries_attend_alone_as_in_their_places() {
    let device = device().autodiff();
    let n = 14;
    let base = LongformerAttentionConfig::new(D_MODEL, N_HEADS, Window::one_sided(2));
    let globals = vec![vec![0, 9], vec![2, 9]];
    let hidden = [13, 8].map(|end| (0..n).map(|key| key >= end).collect());
    let data = BatchData::new().with_hidden_keys(hidden.to_vec());
    let documents = vec![vec![0; n], [vec![0; 6], vec![1; 8]].concat()];
    let packed = (data.clone().with_documents(documents)).with_globals(globals);
    let bias = random([1, N_HEADS, n, n], 3, DType::F64, &device);
    let first = base.clone().with_global(Global::First(2));
    for (config, data, bias) in [
        (first.clone(), data.clone(), None),
        (first.clone(), data.clone(), Some(bias.clone())),
        (first.with_rotary(Some(rotary())), data, None),
        (base.with_global(Global::Batch), packed, Some(bias)),
    ] {
        let context = Context::new(Lengths::square(n)).with_data(2, data);
        let context = context.with_bias(bias);
        let alone: LongformerAttention = to_f64(config.init(&device));
        let in_place = config.with_alibi(Some(vec![0.0; N_HEADS]));
        let in_place = in_place.init(&device);
        let in_place: LongformerAttention = in_place.load_record(alone.clone().into_record());
        let results = [alone, in_place].map(|attention| {
            let x = random([2, n, D_MODEL], 1, DType::F64, &device).require_grad();
            let y = attention.forward(x.clone(), &context);
            let cotangent = random([2, n, D_MODEL], 2, DType::F64, &device);
            let gradients = (y.clone() * cotangent).sum().backward();
            let of = |linear: &burn::nn::Linear| linear.weight.val().grad(&gradients).unwrap();
            let of_weights = [
                of(&attention.query),
                of(&attention.global_query),
                of(&attention.global_key),
                of(&attention.global_value),
            ];
            (y.inner(), x.grad(&gradients).unwrap(), of_weights)
        });
        let [
            (y, d_x, d_weights),
            (expected, expected_d_x, expected_d_weights),
        ] = results;
        assert_close(y, expected, 1e-12);
        assert_close(d_x, expected_d_x, 1e-12);
        for (found, expected) in d_weights.into_iter().zip(expected_d_weights) {
            assert_close(found, expected, 1e-12);
        }
    }
}

#[test]
fn batch_rows_have_global_tokens_of_their_own() {
    let device = device();
    let config = LongformerAttentionConfig::new(D_MODEL, N_HEADS, Window::one_sided(2));
    let by_batch = config.clone().with_global(Global::Batch).init(&device);
    let by_batch: LongformerAttention = to_f64(by_batch);
    let x = random([3, 12, D_MODEL], 1, DType::F64, &device);
    let globals = [vec![0, 7], vec![], vec![7, 11]];
    let data = BatchData::new().with_globals(globals.to_vec());
    let context = Context::new(Lengths::square(12)).with_data(3, data);
    let all = by_batch.forward(x.clone(), &context);
    for (row, positions) in globals.into_iter().enumerate() {
        let alone = config.clone().with_global(Global::Positions(positions));
        let alone = alone
            .init(&device)
            .load_record(by_batch.clone().into_record());
        let x = x.clone().slice(s![row..=row, .., ..]);
        let alone = alone.forward(x, &Context::new(Lengths::square(12)));
        assert_close(all.clone().slice(s![row..=row, .., ..]), alone, 1e-12);
    }
}

#[test]
#[should_panic(expected = "the pattern global:batch needs global positions")]
fn a_batch_that_names_no_global_tokens_is_refused() {
    let config = LongformerAttentionConfig::new(D_MODEL, N_HEADS, Window::one_sided(2));
    let attention = config.with_global(Global::Batch).init(&device());
    let x = random([1, 12, D_MODEL], 1, DType::F32, &device());
    attention.forward(x, &Context::new(Lengths::square(12)));
}

fn by_batch(globals: Vec<Vec<usize>>) {
    let config = LongformerAttentionConfig::new(D_MODEL, N_HEADS, Window::one_sided(2));
    let attention = config.with_global(Global::Batch).init(&device());
    let x = random([2, 12, D_MODEL], 1, DType::F32, &device());
    let data = BatchData::new().with_globals(globals);
    attention.forward(x, &Context::new(Lengths::square(12)).with_data(2, data));
}

#[test]
#[should_panic(expected = "global: global positions hold 1 batch rows, expected batch_size 2")]
fn global_tokens_of_another_batch_are_refused() {
    by_batch(vec![vec![0]]);
}

#[test]
#[should_panic(
    expected = "global: global positions holds position 12, but the sequence has 12 positions"
)]
fn global_tokens_beyond_the_sequence_are_refused() {
    by_batch(vec![vec![0], vec![3, 12]]);
}

fn step<M: SequenceMixer<Cache = KvCache>>(mixer: &M, cache: &mut KvCache) {
    let x = random([1, 1, D_MODEL], 1, DType::F32, &device());
    let lengths = Lengths::new(1, cache.len() + 1).with_first_position(cache.len());
    mixer.forward_cached(x, &Context::new(lengths), cache);
}

fn with_pattern(words: &str) -> GroupedQueryAttention {
    let config = GroupedQueryAttentionConfig::new(D_MODEL, N_HEADS);
    config.with_pattern(words.parse().unwrap()).init(&device())
}

#[test]
#[should_panic(
    expected = "cache: it keeps what causal & window:3:0 sees, but the layer attends by causal & window:5:0"
)]
fn a_ring_of_another_pattern_is_refused() {
    let narrow = with_pattern("causal & window:3:0");
    let mut cache = narrow.new_ring_cache(CachePositions::Absolute).unwrap();
    step(&narrow, &mut cache);
    step(&with_pattern("causal & window:5:0"), &mut cache);
}

#[test]
#[should_panic(expected = "but the layer attends by (causal & (window:2 | global-keys:..1)) | ")]
fn a_ring_of_another_module_is_refused() {
    let longformer = LongformerAttentionConfig::new(D_MODEL, N_HEADS, Window::one_sided(2))
        .with_global(Global::First(1))
        .with_causal(true)
        .init(&device());
    let window = with_pattern("causal & window:2:0");
    let mut cache = window.new_ring_cache(CachePositions::Absolute).unwrap();
    step(&longformer, &mut cache);
}

#[test]
#[should_panic(expected = "cache: keys of n_kv_heads 6 are held, got 3: it was filled by another")]
fn a_dense_cache_of_another_module_is_refused() {
    let longformer = LongformerAttentionConfig::new(D_MODEL, N_HEADS, Window::one_sided(2))
        .with_global(Global::First(1))
        .with_causal(true)
        .init(&device());
    let mut cache = longformer.new_cache(4);
    step(&longformer, &mut cache);
    step(&with_pattern("causal"), &mut cache);
}

#[test]
fn bad_configs_name_the_field() {
    let longformer = LongformerAttentionConfig::new(D_MODEL, N_HEADS, Window::one_sided(2));
    let given = |n_heads| RandomPlan::Given {
        rows: vec![vec![vec![0]]; n_heads],
        repeats: RepeatedBlocks::Once,
    };
    let sparse = SparseTransformerAttentionConfig::new(D_MODEL, N_HEADS, 4);
    let cases: Vec<(Result<(), InvalidConfig>, &str)> = vec![
        (
            longformer
                .clone()
                .with_dilations(Some(vec![1, 2]))
                .validate(),
            "dilations",
        ),
        (
            longformer
                .clone()
                .with_dilations(Some(vec![1, 0, 2]))
                .validate(),
            "dilations must be at least 1",
        ),
        (
            LongformerAttentionConfig::new(D_MODEL, N_HEADS, Window::one_sided(0))
                .with_dilations(Some(vec![1, 2, 1]))
                .validate(),
            "dilations cannot be so: the window leaves a query no key but its own",
        ),
        (
            longformer
                .clone()
                .with_global(Global::Positions(vec![3, 3]))
                .validate(),
            "global.positions",
        ),
        (longformer.with_dropout(1.0).validate(), "dropout"),
        (
            BigBirdAttentionConfig::new(D_MODEL, N_HEADS, 4, given(2)).validate(),
            "n_heads",
        ),
        (
            BigBirdAttentionConfig::new(D_MODEL, N_HEADS, 0, given(3)).validate(),
            "block",
        ),
        (
            sparse
                .clone()
                .with_kind(SparseKind::Fixed { n_summary: 5 })
                .validate(),
            "fixed.n_summary",
        ),
        (
            sparse
                .with_kind(SparseKind::Fixed { n_summary: 0 })
                .validate(),
            "fixed.n_summary",
        ),
        (
            SlidingWindowAttentionConfig::new(D_MODEL, N_HEADS, 0).validate(),
            "window",
        ),
        (
            SlidingWindowAttentionConfig::new(D_MODEL, 5, 4).validate(),
            "n_heads",
        ),
    ];
    for (result, field) in cases {
        let error = result.expect_err(field);
        assert!(error.to_string().contains(field), "{error}");
    }
}
