//! Schedules against the definition of their patterns: every pair once, by rows and by columns.

use emberlm_core::{
    At, BatchData, BlockPlan, BlockRows, BlockSizes, Blockwise, Fixed, Global, Layout, Lengths,
    Pattern, RandomBlocks, Reach, Schedule, Span, Strided, Window,
};
use proptest::prelude::*;

/// Every pair of every batch row and head, in this order, by asking the pattern.
fn by_definition(pattern: &Pattern, lengths: &Lengths, data: &BatchData) -> Vec<u8> {
    let Lengths {
        key_length,
        n_heads,
        batch_size,
        ..
    } = *lengths;
    let mut pairs = Vec::new();
    for batch in 0..batch_size {
        for head in 0..n_heads {
            for query in lengths.first_position..lengths.query_end() {
                for key in 0..key_length {
                    let at = At {
                        batch,
                        head,
                        query,
                        key,
                        key_length,
                    };
                    pairs.push(u8::from(pattern.allows(&at, data)));
                }
            }
        }
    }
    pairs
}

/// How often a schedule visits each pair, from the rows or the columns of its layouts.
fn expanded(schedule: &Schedule, by_columns: bool) -> Vec<u8> {
    let Lengths {
        query_length,
        key_length,
        n_heads,
        batch_size,
        ..
    } = *schedule.lengths();
    let mut pairs = vec![0; batch_size * n_heads * query_length * key_length];
    for batch in 0..batch_size {
        for head in 0..n_heads {
            let plane = &mut pairs[(batch * n_heads + head) * query_length * key_length..];
            for part in schedule.parts() {
                let query_of = |row: usize| part.query_order().map_or(row, |o| o[row] as usize);
                let key_of =
                    |column: usize| part.key_order().map_or(column, |o| o[column] as usize);
                visit(
                    schedule,
                    part.layout(batch, head),
                    by_columns,
                    |row, column| {
                        // A bit beyond the order would panic here.
                        assert!(row < part.query_length() && column < part.key_length());
                        plane[query_of(row) * key_length + key_of(column)] += 1;
                    },
                );
            }
        }
    }
    pairs
}

fn visit(
    schedule: &Schedule,
    layout: &Layout,
    by_columns: bool,
    mut visible: impl FnMut(usize, usize),
) {
    let BlockSizes { query, key } = *schedule.block_sizes();
    let rows: &BlockRows = if by_columns {
        layout.columns()
    } else {
        layout.rows()
    };
    for row in 0..rows.len() {
        let mut end = 0;
        for span in rows.spans(row) {
            let blocks = span.blocks();
            assert!(end <= blocks.start && !blocks.is_empty(), "spans must rise");
            end = blocks.end;
            for block in blocks {
                let [query_block, key_block] = if by_columns {
                    [block, row]
                } else {
                    [row, block]
                };
                for i in 0..query {
                    for j in 0..key {
                        let is_visible = match *span {
                            Span::Full { .. } => true,
                            Span::Partial { mask, .. } => {
                                schedule.masks().row(mask, i)[j / 64] >> (j % 64) & 1 == 1
                            }
                        };
                        if is_visible {
                            visible(query_block * query + i, key_block * key + j);
                        }
                    }
                }
            }
        }
    }
}

/// Pairs of visited blocks that are there, counted one by one.
fn count_visited(schedule: &Schedule) -> u64 {
    let BlockSizes { query, key } = *schedule.block_sizes();
    let Lengths {
        n_heads,
        batch_size,
        ..
    } = *schedule.lengths();
    let mut n = 0;
    for part in schedule.parts() {
        for (batch, head) in (0..batch_size).flat_map(|b| (0..n_heads).map(move |h| (b, h))) {
            let rows = part.layout(batch, head).rows();
            for row in 0..rows.len() {
                let n_queries = query.min(part.query_length() - row * query);
                for block in rows.spans(row).iter().flat_map(Span::blocks) {
                    n += n_queries * key.min(part.key_length() - block * key);
                }
            }
        }
    }
    n as u64
}

fn assert_scheduled(pattern: &Pattern, lengths: &Lengths, blocks: &BlockSizes, data: &BatchData) {
    let schedule = Schedule::compile(pattern, lengths, blocks, data)
        .unwrap_or_else(|error| panic!("{pattern}, {lengths:?}: {error}"));
    assert_is(&schedule, pattern, data);
}

fn assert_is(schedule: &Schedule, pattern: &Pattern, data: &BatchData) {
    let lengths = schedule.lengths();
    let context = format!("{pattern}, {lengths:?}, {:?}", schedule.block_sizes());
    let expected = by_definition(pattern, lengths, data);
    for by_columns in [false, true] {
        let got = expanded(schedule, by_columns);
        let wrong = got
            .iter()
            .zip(&expected)
            .position(|(got, expected)| got != expected);
        if let Some(wrong) = wrong {
            let key = wrong % lengths.key_length;
            let query = wrong / lengths.key_length % lengths.query_length;
            panic!(
                "{context}, by columns {by_columns}: pair ({query}, {key}) is visited {} times, expected {}",
                got[wrong], expected[wrong]
            );
        }
    }
    for part in schedule.parts() {
        // An order names each query and key once at most.
        for (order, length) in [
            (part.query_order(), part.query_length()),
            (part.key_order(), part.key_length()),
        ] {
            let Some(order) = order else { continue };
            let mut sorted = order.to_vec();
            sorted.sort_unstable();
            assert!(sorted.windows(2).all(|pair| pair[0] < pair[1]), "{context}");
            assert_eq!(order.len(), length, "{context}");
        }
    }
    let statistics = schedule.statistics();
    let n_visible: u64 = expected.iter().map(|&visible| u64::from(visible)).sum();
    assert_eq!(statistics.n_visible, n_visible, "{context}");
    assert_eq!(statistics.n_visited, count_visited(schedule), "{context}");
    assert!(statistics.n_visited >= n_visible);
    let density = n_visible as f64 / expected.len().max(1) as f64;
    assert!((statistics.density - density).abs() < 1e-12);
}

/// Every constructor, alone and in the combinations that the published models use.
fn patterns() -> Vec<Pattern> {
    let words = "full
        causal
        !causal
        !full
        window:0
        window:3
        causal & window:40:5
        window:5:100
        dilated:5:1
        dilated:7:3
        dilated:100:2
        dilated:9:0:7
        strided:1
        strided:8
        strided:31
        strided:64
        strided-local:12
        strided-column:12
        strided-column:1000000
        fixed:8:2
        fixed:16:3:2
        fixed:64:8
        fixed-local:10
        fixed-summary:33:1
        fixed-summary:7:7
        blockwise:1
        blockwise:64
        blockwise:10:2
        causal & blockwise:100:1
        blockwise:7:1:1
        random:16:2
        random:1:3:5
        random:200:1
        random-past:8:3
        causal & random-past:8:3
        bigbird:16:2
        bigbird:64:3
        bigbird:8:0
        bigbird-causal:16:2:9
        prefix:0
        prefix:50
        causal | prefix:70
        sinks:4
        causal & (window:30 | sinks:4)
        global:0
        global:..5
        window:4 | global:..3
        global-queries:..9
        global-queries:-70
        window:2 | global:-3
        window:3 | global-keys:..9
        causal & (window:3 | global-keys:..1 | global-queries:..1)
        blocks:16:1,2//0/0,1,2,3
        window:2 | blocks:1:3/2/1
        blocks:100:0,1
        !blocks:7:0/1/2
        causal & !strided-column:5
        !(strided:6 | window:9)
        !dilated:3:2 & blockwise:40
        strided:8 & fixed:8:2
        strided-column:4 & strided-column:6
        (strided-column:4 | fixed-summary:9:2) & (window:20 | !dilated:50:3)
        dilated:1000:1000000
        window:18446744073709551615
        !blockwise:18446744073709551615
        blockwise:3:18446744073709551615:18446744073709551615
        dilated:18446744073709551615:2";
    words
        .lines()
        .map(|word| {
            word.trim()
                .parse()
                .unwrap_or_else(|e| panic!("{word}: {e}"))
        })
        .collect()
}

#[test]
fn every_pattern_at_every_length() {
    for length in [1, 2, 63, 64, 65, 130] {
        for pattern in patterns() {
            let lengths = Lengths::square(length);
            assert_scheduled(
                &pattern,
                &lengths,
                &BlockSizes::default(),
                &BatchData::new(),
            );
        }
    }
}

#[test]
fn every_pattern_at_a_thousand() {
    for pattern in patterns() {
        let lengths = Lengths::square(1000);
        assert_scheduled(
            &pattern,
            &lengths,
            &BlockSizes::default(),
            &BatchData::new(),
        );
    }
}

#[test]
fn other_blocks_and_unequal_lengths() {
    let sizes = [(1, 64), (16, 8), (7, 13), (64, 128), (32, 100)];
    let lengths = [
        Lengths::new(5, 130),
        Lengths::new(130, 5),
        Lengths::new(40, 150).with_first_position(110),
        Lengths::new(33, 70).with_first_position(29),
        // Queries beyond all keys.
        Lengths::new(20, 30).with_first_position(100),
    ];
    for (query, key) in sizes {
        for lengths in &lengths {
            for pattern in patterns() {
                let blocks = BlockSizes { query, key };
                assert_scheduled(&pattern, lengths, &blocks, &BatchData::new());
            }
        }
    }
}

#[test]
fn decode_steps_are_the_last_rows() {
    for key_length in [1, 2, 64, 100, 257] {
        for pattern in patterns() {
            for query in [1, 64] {
                let blocks = BlockSizes { query, key: 64 };
                let lengths = Lengths::decode(key_length);
                assert_scheduled(&pattern, &lengths, &blocks, &BatchData::new());
            }
        }
    }
}

#[test]
fn nothing_to_see_and_nobody_to_see_it() {
    for lengths in [Lengths::new(0, 10), Lengths::new(10, 0), Lengths::square(0)] {
        for pattern in patterns() {
            // A global position must be in the sequence.
            if lengths.key_length > 0 || !pattern.to_string().contains("global:0") {
                assert_scheduled(
                    &pattern,
                    &lengths,
                    &BlockSizes::default(),
                    &BatchData::new(),
                );
            }
        }
    }
    let lengths = Lengths::square(100);
    let nothing = !Pattern::full();
    let schedule = Schedule::compile(
        &nothing,
        &lengths,
        &BlockSizes::default(),
        &BatchData::new(),
    )
    .unwrap();
    let [part] = schedule.parts() else {
        panic!("nothing is one part")
    };
    assert!(part.layout(0, 0).is_empty());
    assert_eq!(part.layout(0, 0).rows().len(), 2);
}

/// Two batch rows of packed documents, with padding and globals of their own.
fn batch_data(lengths: &Lengths) -> BatchData {
    let n = lengths.key_length.max(lengths.query_end());
    let row = |document: &dyn Fn(usize) -> u32, length: usize| (0..length).map(document).collect();
    let packed = |position: usize| 7 - (position / 30).min(7) as u32;
    // Ids that come back later.
    let mixed = |position: usize| (position / 5 % 3) as u32;
    let documents = |length| vec![row(&packed, length), row(&mixed, length)];
    let hidden = |batch: usize, key: usize| key + 9 * batch > lengths.key_length || key % 50 == 13;
    let hidden = |batch| {
        (0..lengths.key_length)
            .map(|key| hidden(batch, key))
            .collect()
    };
    BatchData::new()
        .with_documents(documents(lengths.key_length))
        .with_query_documents(documents(lengths.query_end()))
        .with_globals(vec![
            [0, 20, 41, 60].into_iter().filter(|&p| p < n).collect(),
            (0..n).step_by(37).collect(),
        ])
        .with_hidden_keys(vec![hidden(0), hidden(1)])
}

#[test]
fn batch_rows_and_heads_of_their_own() {
    let words = [
        "documents",
        "causal & documents",
        "!documents",
        "documents & strided:8",
        "global:batch",
        "window:5 | global:batch",
        "causal & (window:5 | global:batch)",
        "!global:batch & documents",
        "global-keys:batch | window:2",
        "causal & global-queries:batch",
        "heads(causal, strided-column:8, fixed:16:2)",
        "causal & heads(window:3, documents, window:3)",
        "heads(fixed-summary:16:2, fixed-summary:16:2:1, fixed-summary:16:2:2)",
        "!heads(full, causal, !full)",
        "heads(dilated:4:2, dilated:4:3, window:4) | global:1,22,43",
    ];
    let lengths = [
        Lengths::square(130),
        Lengths::new(70, 90),
        Lengths::new(30, 170).with_first_position(140),
    ];
    for lengths in lengths {
        let lengths = lengths.with_n_heads(3).with_batch_size(2);
        let data = batch_data(&lengths);
        for word in words {
            let pattern = word.parse().unwrap();
            for key in [16, 64] {
                let blocks = BlockSizes { query: 16, key };
                assert_scheduled(&pattern, &lengths, &blocks, &data);
            }
        }
    }
}

#[test]
fn rows_and_heads_that_see_the_same_share_a_layout() {
    let lengths = Lengths::square(256).with_n_heads(4).with_batch_size(3);
    let blocks = BlockSizes::default();
    let pattern: Pattern = "heads(causal, window:8, causal, window:8)".parse().unwrap();
    let schedule = Schedule::compile(&pattern, &lengths, &blocks, &BatchData::new()).unwrap();
    let part = &schedule.parts()[0];
    assert_eq!(part.n_layouts(), 2);
    assert_eq!(part.layout_number(0, 1), part.layout_number(2, 3));
    let row = |start: u32| (0..256).map(|i| i / 100 + start).collect::<Vec<u32>>();
    // The same documents by other ids.
    let data = BatchData::new().with_documents(vec![row(0), row(9), vec![0; 256]]);
    let documents = Pattern::documents();
    let schedule = Schedule::compile(&documents, &lengths, &blocks, &data).unwrap();
    let [part] = schedule.parts() else {
        panic!("documents are one part")
    };
    assert_eq!(part.n_layouts(), 2);
    assert_eq!(part.layout_number(0, 0), part.layout_number(1, 3));
}

fn any_simple() -> impl Strategy<Value = Pattern> {
    let n = 0_usize..40;
    let size = 1_usize..40;
    let window = (n.clone(), n.clone()).prop_map(|(back, ahead)| Window { back, ahead });
    let strided = (0..3, size.clone()).prop_map(|(head, stride)| match head {
        0 => Strided::merged(stride),
        1 => Strided::local(stride),
        _ => Strided::column(stride),
    });
    let fixed = (0..3, size.clone(), n.clone(), n.clone()).prop_map(|(head, stride, c, s)| {
        let c = c % stride + 1;
        let fixed = match head {
            0 => Fixed::merged(stride, c),
            1 => Fixed::local(stride),
            _ => Fixed::summary(stride, c),
        };
        fixed.with_sub_index(s % (stride / c))
    });
    let random = (size.clone(), 0_usize..4, any::<u64>(), any::<bool>()).prop_map(
        |(block, n_blocks, seed, past)| RandomBlocks {
            block,
            n_blocks,
            seed,
            reach: if past { Reach::Past } else { Reach::Everywhere },
        },
    );
    let globals = prop::collection::btree_set(0_usize..200, 0..8);
    let row = prop::collection::btree_set(0_usize..9, 0..4);
    let row = row.prop_map(|row| row.into_iter().collect());
    let plan = prop::collection::vec(row, 0..9);
    prop_oneof![
        Just(Pattern::full()),
        Just(Pattern::causal()),
        Just(Pattern::documents()),
        Just(Pattern::batch_global()),
        window.clone().prop_map(Pattern::window),
        (window, size.clone()).prop_map(|(window, d)| Pattern::dilated(window, d)),
        strided.prop_map(Pattern::strided),
        fixed.prop_map(Pattern::fixed),
        (size, 0_usize..3, 0_usize..3).prop_map(|(block, back, ahead)| {
            let blockwise = Blockwise::new(block).with_look_back(back);
            Pattern::blockwise(blockwise.with_look_ahead(ahead))
        }),
        globals
            .clone()
            .prop_map(|set| Pattern::global(set.into_iter().collect::<Vec<_>>())),
        globals.prop_map(|set| Pattern::GlobalKeys(Global::Positions(set.into_iter().collect()))),
        n.clone()
            .prop_map(|n| Pattern::GlobalQueries(Global::First(n))),
        Just(Pattern::GlobalKeys(Global::Batch)),
        (1_usize..40, plan).prop_map(|(block, rows)| Pattern::blocks(BlockPlan::new(block, rows))),
        n.clone().prop_map(Pattern::global_first),
        random.prop_map(Pattern::random),
        n.clone().prop_map(Pattern::prefix),
        n.prop_map(Pattern::sinks),
    ]
}

fn any_pattern() -> impl Strategy<Value = Pattern> {
    any_simple().prop_recursive(3, 12, 3, |inner| {
        prop_oneof![
            (inner.clone(), inner.clone()).prop_map(|(a, b)| a & b),
            (inner.clone(), inner.clone()).prop_map(|(a, b)| a | b),
            inner.clone().prop_map(|a| !a),
            (inner.clone(), inner).prop_map(|(a, b)| Pattern::per_head([a, b])),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn random_patterns(
        pattern in any_pattern(),
        query_length in 1_usize..80,
        key_length in 1_usize..140,
        first_position in 0_usize..100,
        query in prop_oneof![Just(1_usize), Just(16), Just(64), 1_usize..40],
        key in prop_oneof![Just(16_usize), Just(64), 1_usize..100],
    ) {
        // Some position must be there for every global one.
        let lengths = Lengths::new(query_length, key_length.max(100))
            .with_first_position(first_position.max(200 - query_length))
            .with_n_heads(2)
            .with_batch_size(2);
        let data = batch_data(&lengths);
        assert_scheduled(&pattern, &lengths, &BlockSizes { query, key }, &data);
        let lengths = Lengths::square(200).with_n_heads(2).with_batch_size(2);
        let data = batch_data(&lengths);
        assert_scheduled(&pattern, &lengths, &BlockSizes { query, key }, &data);
    }

    #[test]
    fn every_pattern_survives_json_and_words(pattern in any_pattern()) {
        let json = serde_json::to_string(&pattern).unwrap();
        prop_assert_eq!(&serde_json::from_str::<Pattern>(&json).unwrap(), &pattern);
        prop_assert_eq!(&pattern.to_string().parse::<Pattern>().unwrap(), &pattern);
    }
}

#[test]
fn the_comparison_does_catch_a_single_wrong_bit() {
    let causal: Pattern = "causal".parse().unwrap();
    // All but the pair (99, 0).
    let almost: Pattern = "causal & !(prefix:1 & !window:98)".parse().unwrap();
    let lengths = Lengths::square(100);
    let blocks = BlockSizes::default();
    let schedule = Schedule::compile(&almost, &lengths, &blocks, &BatchData::new()).unwrap();
    assert_eq!(schedule.statistics().n_visible, 100 * 101 / 2 - 1);
    let caught = std::panic::catch_unwind(|| assert_is(&schedule, &causal, &BatchData::new()));
    let message = *caught.unwrap_err().downcast::<String>().unwrap();
    assert!(
        message.contains("pair (99, 0) is visited 0 times, expected 1"),
        "{message}"
    );
}
