//! What schedules cost: parts, orders, visited pairs, memory and the time to compile.

use emberlm_core::{BatchData, BlockSizes, Lengths, Pattern, PatternError, Schedule, Strided};

fn compile(words: &str, length: usize) -> Schedule {
    let pattern: Pattern = words.parse().unwrap();
    let lengths = Lengths::square(length);
    Schedule::compile(
        &pattern,
        &lengths,
        &BlockSizes::default(),
        &BatchData::new(),
    )
    .unwrap()
}

#[test]
fn plain_patterns_are_one_part_in_natural_order() {
    let documents: Vec<u32> = (0..1000).map(|i| i / 170).collect();
    let data = BatchData::new().with_documents(vec![documents]);
    for words in [
        "full",
        "causal",
        "window:100",
        "causal & window:100",
        "blockwise:64:1",
        "documents",
        "causal & documents",
        "causal | prefix:200",
        "causal & (window:100 | sinks:4)",
        "window:100 | global:0,1,2",
        "random:64:3",
        "bigbird:64:3",
        "strided-local:30",
        "fixed-local:30",
    ] {
        let pattern: Pattern = words.parse().unwrap();
        let lengths = Lengths::square(1000);
        let blocks = BlockSizes::default();
        let schedule = Schedule::compile(&pattern, &lengths, &blocks, &data).unwrap();
        let [part] = schedule.parts() else {
            panic!("{words}: {} parts", schedule.parts().len())
        };
        assert!(
            part.query_order().is_none() && part.key_order().is_none(),
            "{words}"
        );
        assert_eq!((part.query_length(), part.key_length()), (1000, 1000));
    }
}

#[test]
fn scattered_keys_are_packed_into_blocks() {
    // Sorted by residue: positions 0, 7, 14, ..., then 1, 8, ...
    let schedule = compile("strided-column:7", 100);
    let order = schedule.parts()[0].key_order().unwrap();
    assert_eq!(order[..3], [0, 7, 14]);
    assert_eq!(order[order.len() - 2..], [90, 97]);
    // Scattered globals: the window, the columns, the rows.
    let schedule = compile("window:10 | global:0,300,600,900", 1000);
    let orders: Vec<[Option<&[u32]>; 2]> = schedule
        .parts()
        .iter()
        .map(|part| [part.query_order(), part.key_order()])
        .collect();
    let globals = &[0, 300, 600, 900][..];
    let expected = [[None, None], [Some(globals), None], [None, Some(globals)]];
    assert!(
        expected.iter().all(|part| orders.contains(part)),
        "{orders:?}"
    );
    // A decode step gathers only the keys of its own residue.
    let lengths = Lengths::decode(100);
    let blocks = BlockSizes { query: 1, key: 64 };
    let pattern = Pattern::strided(Strided::column(7));
    let schedule = Schedule::compile(&pattern, &lengths, &blocks, &BatchData::new()).unwrap();
    let expected: Vec<u32> = (0..100).filter(|key| key % 7 == 99 % 7).collect();
    assert_eq!(schedule.parts()[0].key_order().unwrap()[..], expected);
    assert_eq!(schedule.statistics().n_visited, expected.len() as u64);
}

#[test]
fn disjoint_sets_of_several_heads_share_a_part() {
    let lengths = Lengths::square(2048).with_n_heads(3);
    let blocks = BlockSizes::default();
    let compile = |words: &str| {
        let pattern: Pattern = words.parse().unwrap();
        Schedule::compile(&pattern, &lengths, &blocks, &BatchData::new()).unwrap()
    };
    let schedule = compile("heads(fixed:64:8, fixed:64:8:1, fixed:64:8:2)");
    let [local, summary] = schedule.parts() else {
        panic!("{} parts", schedule.parts().len())
    };
    assert!(local.key_order().is_none());
    // The summary columns of all heads, of which each visits its own.
    assert_eq!((summary.key_length(), summary.n_layouts()), (3 * 256, 3));
    let statistics = schedule.statistics();
    assert!(statistics.n_visited < 3 * statistics.n_visible / 2);
    // The summary columns of the second head are not those of the first: they share some.
    let schedule = compile("heads(fixed-summary:64:8, fixed-summary:64:9, full)");
    assert_eq!(schedule.parts().len(), 3);
}

/// Visited pairs over visible ones, and the exponent with which the visited ones grow with the length.
#[test]
fn sparse_patterns_visit_little_more_than_they_show() {
    let ratio = |words: &str, n| {
        let schedule = compile(words, n);
        let statistics = schedule.statistics();
        statistics.n_visited as f64 / statistics.n_visible as f64
    };
    for (words, limit) in [
        ("strided:256", 1.5),
        ("strided-column:256", 1.5),
        ("fixed:256:8", 1.5),
        ("dilated:256:2", 1.5),
        ("window:256", 1.5),
        ("causal & window:256", 1.5),
        ("bigbird:64:3", 1.01),
        ("window:256 | global:0,5000,10000,20000,30000,40000", 1.5),
    ] {
        let ratio = ratio(words, 65_536);
        assert!(ratio < limit, "{words}: {ratio}");
    }
    for words in ["strided", "fixed"] {
        let visited = |n: usize| {
            let stride = n.isqrt();
            let c = if words == "fixed" { ":1" } else { "" };
            compile(&format!("{words}:{stride}{c}"), n)
                .statistics()
                .n_visited as f64
        };
        let exponent = (visited(1 << 16) / visited(1 << 12)).log2() / 4.0;
        assert!((1.3..1.6).contains(&exponent), "{words}: {exponent}");
    }
}

#[test]
fn memory_is_linear_in_the_length() {
    for words in ["causal", "window:512", "dilated:256:4", "bigbird:64:3"] {
        let per_token = |n: usize| compile(words, n).statistics().bytes as f64 / n as f64;
        // A runaway would be eight times as much.
        let (short, long) = (per_token(4096), per_token(32_768));
        assert!(
            long < 1.5 * short + 1.0,
            "{words}: {short} and {long} bytes a token"
        );
    }
}

/// The limits leave a slow, busy machine ten times what a free core takes.
#[test]
fn compiling_is_quick() {
    if cfg!(debug_assertions) {
        return;
    }
    let best_of_three = |words: &str, n: usize| {
        let once = |_| {
            let start = std::time::Instant::now();
            compile(words, n);
            start.elapsed()
        };
        (0..3).map(once).min().unwrap().as_secs_f64()
    };
    for (words, n, limit) in [
        ("window:512", 65_536, 0.05),
        ("causal & window:512", 65_536, 0.05),
        ("window:512", 1_048_576, 1.0),
        ("causal", 1_048_576, 1.0),
        ("strided:256", 65_536, 0.2),
        ("bigbird:64:3", 65_536, 0.2),
    ] {
        let seconds = best_of_three(words, n);
        assert!(seconds < limit, "{words} at {n}: {seconds} s");
    }
}

#[test]
fn statistics_count_all_heads_and_batch_rows() {
    let lengths = Lengths::square(100).with_n_heads(4).with_batch_size(3);
    let pattern: Pattern = "heads(causal, full, causal, !full)".parse().unwrap();
    let blocks = BlockSizes::default();
    let schedule = Schedule::compile(&pattern, &lengths, &blocks, &BatchData::new()).unwrap();
    let n_visible = 3 * (2 * 100 * 101 / 2 + 100 * 100);
    let statistics = schedule.statistics();
    assert_eq!(statistics.n_visible, n_visible);
    assert_eq!(statistics.forward_flops(32), 4 * 32 * n_visible);
    assert_eq!(statistics.backward_flops(32), 10 * 32 * n_visible);
}

#[test]
fn block_sizes_out_of_range_are_errors() {
    let compile = |query, key| {
        let lengths = Lengths::square(10);
        let blocks = BlockSizes { query, key };
        Schedule::compile(&Pattern::full(), &lengths, &blocks, &BatchData::new()).unwrap_err()
    };
    assert_eq!(
        compile(0, 64),
        PatternError::Zero {
            field: "block_sizes.query"
        }
    );
    let too_large = PatternError::TooLarge {
        field: "block_sizes.key",
        got: 5000,
        limit: 4096,
    };
    assert_eq!(compile(64, 5000), too_large);
}
