//! What a pattern shows of the past, and caches that keep no more.

use burn::tensor::{DType, s};
use emberlm_core::{At, BatchData, CachePositions, CacheSlots, Horizon, KvCache, Pattern};
use emberlm_testkit::{device, random};
use proptest::prelude::*;

fn parse(words: &str) -> Pattern {
    words.parse().unwrap_or_else(|e| panic!("{words}: {e}"))
}

const HEADS: usize = 2;

fn allows(pattern: &Pattern, head: usize, query: usize, key: usize) -> bool {
    let at = At {
        batch: 0,
        head,
        query,
        key,
        key_length: usize::MAX,
    };
    pattern.allows(&at, &BatchData::new())
}

/// Patterns with a bound, of every kind that has one.
const BOUNDED: &str = "window:3
    causal & window:7:2
    dilated:3:0:5
    strided-local:9
    fixed-local:7
    blockwise:6
    causal & blockwise:4:2
    sinks:5
    prefix:0
    causal & (window:4:0 | sinks:3)
    window:2 | global:0,3,40
    global-keys:..4 | window:1
    global-queries:2,30 | window:3
    global-queries:..9 | fixed-local:5
    blocks:4:0,1/1/0,2 | window:2
    heads(window:3, blockwise:5)
    heads(window:2 | sinks:2, fixed-local:4)
    heads(blockwise:4, blockwise:6)
    window:8 & !window:2
    window:9 & !strided-column:3
    strided-column:4 & window:30:0
    fixed-summary:5:2 & window:21
    causal & (window:3 | (causal & global:7,9))";

fn bounded() -> impl Iterator<Item = Pattern> {
    BOUNDED.lines().map(|line| parse(line.trim()))
}

#[test]
fn later_queries_see_no_more_than_the_horizon_says() {
    let n = 120;
    for pattern in bounded() {
        let horizon = pattern.horizon().unwrap_or_else(|| panic!("{pattern}"));
        let Horizon {
            back,
            first,
            positions,
            from,
            ..
        } = &horizon;
        let kept = |key: usize| key < *first || positions.contains(&key);
        for query in *from..n {
            for key in (0..query).filter(|key| query - key > *back && !kept(*key)) {
                let visible = (0..HEADS).any(|head| allows(&pattern, head, query, key));
                assert!(!visible, "{pattern}: query {query} sees key {key}");
            }
        }
    }
}

#[test]
fn others_have_none() {
    for words in [
        "full",
        "causal",
        "strided:3",
        "strided-column:3",
        "fixed:4:1",
        "fixed-summary:4:1",
        "random:4:1",
        "random-past:4:1",
        "documents",
        "!window:3",
        "window:3 | global:batch",
        "window:3 | global:-2",
        "heads(window:3, causal)",
        // Named positions under a condition.
        "window:3 & sinks:9",
        "blockwise:4 & (window:3 | sinks:9)",
        "!sinks:2 & window:3",
    ] {
        assert_eq!(parse(words).horizon(), None, "{words}");
    }
}

/// The slots of a ring after parts of these lengths.
fn slots_after(pattern: &Pattern, parts: &[usize], mut check: impl FnMut(&CacheSlots, usize)) {
    let mut ring = KvCache::ring(pattern, CachePositions::Absolute).expect("a bound");
    for n in parts {
        let first = ring.len();
        let x = random([1, 1, *n, 1], 1, DType::F32, &device());
        ring.append(x.clone(), x);
        check(ring.slots(), first);
    }
}

/// Each query of a part sees, in slots, exactly the positions that it sees in the whole.
fn assert_slots_are_the_pattern(pattern: &Pattern, parts: &[usize]) -> usize {
    let mut gone = 0;
    slots_after(pattern, parts, |slots, first| {
        gone = slots.gap();
        let moved = pattern.in_slots(slots);
        for (head, query) in (0..HEADS).flat_map(|h| (first..slots.len()).map(move |q| (h, q))) {
            for key in 0..=query {
                let visible = allows(pattern, head, query, key);
                match slots.of(key) {
                    None => assert!(!visible, "{pattern}: query {query} misses key {key}"),
                    Some(slot) => assert_eq!(
                        allows(&moved, head, query - slots.gap(), slot),
                        visible,
                        "{pattern} as {moved}: head {head}, query {query}, key {key}, {slots:?}"
                    ),
                }
            }
        }
    });
    gone
}

#[test]
fn slots_show_what_positions_show() {
    for pattern in bounded() {
        for parts in [vec![1; 260], vec![150, 1, 1, 100, 3], [40, 1, 7].repeat(6)] {
            let gone = assert_slots_are_the_pattern(&pattern, &parts);
            assert!(gone > 40, "{pattern}: only {gone} positions are gone");
        }
    }
}

fn any_bounded() -> impl Strategy<Value = Pattern> {
    let n = || 0_usize..12;
    let size = || 1_usize..9;
    let simple = prop_oneof![
        (n(), 0_usize..2).prop_map(|(back, ahead)| parse(&format!("window:{back}:{ahead}"))),
        (n(), size()).prop_map(|(back, by)| parse(&format!("dilated:{back}:0:{by}"))),
        size().prop_map(|size| parse(&format!("fixed-local:{size}"))),
        (size(), 0_usize..3).prop_map(|(size, back)| parse(&format!("blockwise:{size}:{back}"))),
        n().prop_map(Pattern::sinks),
        n().prop_map(Pattern::global_first),
        prop::collection::btree_set(0_usize..60, 1..5)
            .prop_map(|set| Pattern::global(set.into_iter().collect::<Vec<_>>())),
        Just(Pattern::causal()),
        size().prop_map(|size| parse(&format!("strided-column:{size}"))),
    ];
    simple.prop_recursive(2, 8, 3, |inner| {
        prop_oneof![
            (inner.clone(), inner.clone()).prop_map(|(a, b)| a & b),
            (inner.clone(), inner.clone()).prop_map(|(a, b)| a | b),
            inner.clone().prop_map(|a| !a),
            prop::collection::vec(inner, HEADS).prop_map(Pattern::per_head),
        ]
    })
}

proptest! {
    #![proptest_config(emberlm_testkit::same_cases(1))]

    #[test]
    fn any_pattern_with_a_horizon_can_be_kept(
        pattern in any_bounded(),
        parts in prop::collection::vec(1_usize..50, 3..9),
    ) {
        if pattern.horizon().is_some() {
            assert_slots_are_the_pattern(&pattern, &parts);
        }
    }
}

#[test]
fn what_is_held_is_what_was_written() {
    let mut ring =
        KvCache::ring(&parse("window:10 | sinks:3"), CachePositions::Absolute).expect("a bound");
    let x = random([2, 3, 400, 4], 1, DType::F32, &device());
    for first in (0..400).step_by(8) {
        let part = x.clone().slice(s![.., .., first..first + 8, ..]);
        let (keys, values) = ring.append(part.clone(), part * 2.0);
        let slots = ring.slots();
        for position in 0..slots.len() {
            let Some(slot) = slots.of(position) else {
                continue;
            };
            let expected = x.clone().slice(s![.., .., position..=position, ..]);
            let key = keys.clone().slice(s![.., .., slot..=slot, ..]);
            emberlm_testkit::assert_close(key, expected.clone(), 0.0);
            let value = values.clone().slice(s![.., .., slot..=slot, ..]);
            emberlm_testkit::assert_close(value, expected * 2.0, 0.0);
        }
    }
    assert!(ring.slots().gap() > 300);
}
