//! What patterns mean, how they are written and drawn, and which of them are errors.

use std::collections::BTreeSet;

use emberlm_core::{
    At, BatchData, BlockPlan, Blockwise, Fixed, Global, Lengths, ParsePatternError, Pattern,
    PatternError, Picture, RandomBlocks, Strided, Window,
};

/// The keys that a query sees.
fn keys_of(pattern: &Pattern, query: usize, key_length: usize) -> BTreeSet<usize> {
    keys_with(pattern, query, key_length, &BatchData::new())
}

fn keys_with(
    pattern: &Pattern,
    query: usize,
    key_length: usize,
    data: &BatchData,
) -> BTreeSet<usize> {
    let at = |key| At {
        batch: 0,
        head: 0,
        query,
        key,
        key_length,
    };
    let visible = |key: &usize| pattern.allows(&at(*key), data);
    (0..key_length).filter(visible).collect()
}

fn parse(words: &str) -> Pattern {
    words.parse().unwrap_or_else(|e| panic!("{words}: {e}"))
}

#[test]
fn the_readings_of_a_window() {
    let of = |window| keys_of(&Pattern::window(window), 50, 100);
    assert_eq!(of(Window::one_sided(4)), (46..=54).collect());
    assert_eq!(of(Window::total(4)), (48..=52).collect());
    // Mistral: k > q - w.
    let mistral = (0..=50_i32).filter(|k| *k > 50 - 4).map(|k| k as usize);
    assert_eq!(of(Window::causal(4)), mistral.collect());
    assert_eq!(
        keys_of(&parse("window:256"), 300, 1000),
        (44..=556).collect()
    );
    assert_eq!(keys_of(&parse("window:2:0"), 1, 10), (0..=1).collect());
    assert_eq!(
        of(Window {
            back: 0,
            ahead: usize::MAX
        }),
        (50..100).collect()
    );
    let dilated = keys_of(&Pattern::dilated(Window::one_sided(2), 3), 50, 100);
    assert_eq!(dilated, BTreeSet::from([44, 47, 50, 53, 56]));
}

#[test]
#[should_panic(expected = "must be even, got 5")]
fn a_total_window_must_be_even() {
    Window::total(5);
}

#[test]
#[should_panic(expected = "at least 1 key")]
fn a_causal_window_holds_the_own_key() {
    Window::causal(0);
}

/// The sets `A1` and `A2` of Child et al. 2019, section 4.3, enumerated member by member as the paper writes them.
#[test]
fn strided_is_the_sets_of_the_paper() {
    for l in [1, 2, 3, 7, 16] {
        for i in 0_usize..60 {
            let t = i.saturating_sub(l);
            let mut a1 = BTreeSet::new();
            let mut j = t;
            while j <= i {
                a1.insert(j);
                j += 1;
            }
            let mut a2 = BTreeSet::new();
            let mut multiple = 0;
            while multiple <= i {
                a2.insert(i - multiple);
                multiple += l;
            }
            let of = |strided| keys_of(&Pattern::strided(strided), i, 60);
            assert_eq!(of(Strided::local(l)), a1);
            assert_eq!(of(Strided::column(l)), a2);
            assert_eq!(of(Strided::merged(l)), &a1 | &a2);
        }
    }
}

#[test]
fn fixed_is_the_sets_of_the_paper() {
    for (l, c) in [(1, 1), (4, 1), (5, 2), (8, 3), (8, 8)] {
        for i in 0..50 {
            let first_of_block = i - i % l;
            let a1: BTreeSet<usize> = (first_of_block..=i).collect();
            let t = l - c;
            let mut a2 = BTreeSet::new();
            for residue in t..=l {
                a2.extend((0..=i).filter(|j| j % l == residue));
            }
            let of = |fixed| keys_of(&Pattern::fixed(fixed), i, 50);
            assert_eq!(of(Fixed::local(l)), a1);
            assert_eq!(of(Fixed::summary(l, c)), a2);
            assert_eq!(of(Fixed::merged(l, c)), &a1 | &a2);
        }
    }
    // The groups of all sub-indices are disjoint and fill the stride block.
    let mut columns = Vec::new();
    for s in 0..4 {
        let summary = Fixed::summary(8, 2).with_sub_index(s);
        columns.extend(keys_of(&Pattern::fixed(summary), 7, 8));
    }
    assert_eq!(columns, [6, 7, 4, 5, 2, 3, 0, 1]);
}

#[test]
fn the_other_patterns() {
    let seen = |words, query| keys_of(&parse(words), query, 12);
    assert_eq!(seen("full", 3), (0..12).collect());
    assert_eq!(seen("causal", 3), (0..=3).collect());
    assert_eq!(seen("!causal", 3), (4..12).collect());
    assert_eq!(seen("blockwise:4", 6), (4..8).collect());
    assert_eq!(seen("blockwise:4:1", 6), (0..8).collect());
    assert_eq!(seen("blockwise:4:0:1", 6), (4..12).collect());
    assert_eq!(seen("prefix:3", 1), (0..3).collect());
    assert_eq!(seen("sinks:3", 9), (0..3).collect());
    assert_eq!(
        seen("causal & (window:1 | sinks:2)", 9),
        [0, 1, 8, 9].into()
    );
    assert_eq!(seen("global:2,5", 5), (0..12).collect());
    assert_eq!(seen("global:2,5", 6), [2, 5].into());
    assert_eq!(seen("global:..2", 1), (0..12).collect());
    assert_eq!(seen("global:..2", 2), [0, 1].into());
    // A query that stands where there is no key can be global as well.
    assert_eq!(seen("global:20", 20), (0..12).collect());
    assert_eq!(seen("global-keys:2,5", 5), [2, 5].into());
    assert_eq!(seen("global:-2", 5), [10, 11].into());
    assert_eq!(seen("global-queries:2,5", 5), (0..12).collect());
    assert_eq!(seen("global-queries:2,5", 6), [].into());
    assert_eq!(seen("blocks:4:1/0,2", 4), (0..4).chain(8..12).collect());
    assert_eq!(seen("blocks:4:1/0,2", 8), [].into());
    let heads = parse("heads(causal, full)");
    let at = |head| At {
        batch: 0,
        head,
        query: 0,
        key: 1,
        key_length: 2,
    };
    assert!(!heads.allows(&at(0), &BatchData::new()) && heads.allows(&at(1), &BatchData::new()));
}

#[test]
fn batch_data_belong_to_their_row() {
    let data = BatchData::new()
        .with_documents(vec![vec![3, 3, 8, 8, 3]])
        .with_globals(vec![vec![2]])
        .with_hidden_keys(vec![vec![false, true, false, false, false]]);
    let seen = |words, query| keys_with(&parse(words), query, 5, &data);
    assert_eq!(seen("documents", 0), [0, 4].into());
    assert_eq!(seen("documents", 2), [2, 3].into());
    assert_eq!(seen("global:batch", 0), [2].into());
    // Nobody sees a hidden key: not by global tokens, and not by what a pattern excludes.
    assert_eq!(seen("global:batch", 2), [0, 2, 3, 4].into());
    assert_eq!(seen("!documents", 2), [0, 4].into());
    // Cross-attention: queries with documents of their own.
    let data = data.with_query_documents(vec![vec![8, 3, 1]]);
    let seen = |query| keys_with(&Pattern::documents(), query, 5, &data);
    assert_eq!(
        [seen(0), seen(1), seen(2)],
        [[2, 3].into(), [0, 4].into(), [].into()]
    );
}

#[test]
fn random_blocks_are_distinct_and_reach_everything() {
    let random = RandomBlocks::everywhere(10, 3).with_seed(5);
    let mut counts = [0; 20];
    for row in 0..2000 {
        let blocks = random.key_blocks(row, 195);
        assert!(blocks.len() == 3 && blocks.windows(2).all(|pair| pair[0] < pair[1]));
        blocks.iter().for_each(|&block| counts[block] += 1);
    }
    // Mean 300, standard deviation 16.
    assert!(counts.iter().all(|n| (220..380).contains(n)), "{counts:?}");
    // Fewer candidates than blocks.
    assert_eq!(random.key_blocks(7, 20), [0, 1]);
    assert_eq!(RandomBlocks::past(10, 3).key_blocks(1, 1000), [0, 1]);
    assert_eq!(
        RandomBlocks::past(10, usize::MAX).key_blocks(2, 1000),
        [0, 1, 2]
    );
    assert_ne!(
        random.key_blocks(40, 10_000),
        random.with_seed(6).key_blocks(40, 10_000)
    );
    // The draw is part of the public interface: a saved model must see the same blocks again.
    assert_eq!(random.key_blocks(4, 1000), FROZEN_EVERYWHERE);
    assert_eq!(RandomBlocks::past(10, 3).key_blocks(50, 1000), FROZEN_PAST);
}

const FROZEN_EVERYWHERE: [usize; 3] = [42, 57, 82];
const FROZEN_PAST: [usize; 3] = [20, 24, 45];

#[test]
fn causal_rows_do_not_change_while_the_sequence_grows() {
    for words in [
        "strided:5",
        "fixed:6:2",
        "bigbird-causal:4:2",
        "causal & global:..3",
    ] {
        for query in 0..40 {
            let short = keys_of(&parse(words), query, query + 1);
            assert_eq!(keys_of(&parse(words), query, 40), short, "{words}");
        }
    }
}

#[test]
fn bigbird_is_its_three_parts() {
    let random = RandomBlocks::everywhere(4, 2).with_seed(1);
    let bigbird = Pattern::bigbird(random);
    let mut expected: BTreeSet<usize> = (0..4).chain(16..28).collect();
    for block in random.key_blocks(5, 80) {
        expected.extend(4 * block..4 * block + 4);
    }
    assert_eq!(keys_of(&bigbird, 21, 80), expected);
    assert_eq!(keys_of(&bigbird, 3, 80), (0..80).collect());
    assert_eq!(parse("bigbird:4:2:1"), bigbird);
    assert_eq!(
        bigbird.to_string(),
        "blockwise:4:1:1 | global:..4 | random:4:2:1"
    );
}

#[test]
fn words_are_those_of_the_constructors() {
    let cases = [
        (
            Pattern::causal() & Pattern::window(Window::one_sided(128)),
            "causal & window:128",
        ),
        (
            Pattern::causal() & (Pattern::window(Window::causal(9)) | Pattern::sinks(4)),
            "causal & (window:8:0 | sinks:4)",
        ),
        (
            !(Pattern::causal() | Pattern::prefix(3)) & !Pattern::documents(),
            "!(causal | prefix:3) & !documents",
        ),
        (
            Pattern::dilated(Window { back: 3, ahead: 0 }, 2) | Pattern::global([0, 5]),
            "dilated:3:0:2 | global:0,5",
        ),
        (
            Pattern::per_head([Pattern::global([0, 5]), Pattern::batch_global()]),
            "heads(global:0,5, global:batch)",
        ),
        (
            Pattern::fixed(Fixed::merged(64, 8).with_sub_index(1)),
            "fixed:64:8:1",
        ),
        (
            Pattern::blockwise(Blockwise::new(64).with_look_back(2)),
            "blockwise:64:2",
        ),
        (
            Pattern::random(RandomBlocks::past(64, 3).with_seed(u64::MAX)),
            "random-past:64:3:18446744073709551615",
        ),
        (Pattern::global([]), "global:none"),
        (Pattern::global_first(7), "global:..7"),
        (Pattern::GlobalKeys(Global::First(7)), "global-keys:..7"),
        (Pattern::Global(Global::Last(7)), "global:-7"),
        (
            Pattern::GlobalQueries(Global::Positions(vec![1, 5])),
            "global-queries:1,5",
        ),
        (
            Pattern::blocks(BlockPlan::new(4, vec![vec![], vec![0, 2], vec![]])),
            "blocks:4:/0,2",
        ),
        (Pattern::blocks(BlockPlan::new(4, vec![])), "blocks:4:"),
    ];
    for (pattern, words) in cases {
        assert_eq!(pattern.to_string(), words);
        assert_eq!(parse(words), pattern);
    }
}

#[test]
fn blanks_and_precedence() {
    let [causal, full, sinks] = [Pattern::causal(), Pattern::full(), Pattern::sinks(1)];
    assert_eq!(
        parse(" causal|full&!sinks:1 "),
        causal.clone() | (full.clone() & !sinks.clone())
    );
    assert_eq!(
        parse("(causal | full)&sinks:1"),
        (causal.clone() | full.clone()) & sinks.clone()
    );
    assert_eq!(parse("!!causal"), !!causal.clone());
    assert_eq!(parse("((causal))"), causal);
    assert_eq!(
        parse("heads( full ,heads(causal,sinks:1))"),
        Pattern::per_head([full, Pattern::per_head([causal, sinks])])
    );
}

#[test]
fn wrong_words_are_named() {
    let cases = [
        ("windwo:3", "\"windwo:3\" is no pattern"),
        ("causal & spiral", "\"spiral\" is no pattern"),
        ("causal:3", "\"causal:3\" must have the form causal"),
        ("window", "\"window\" must have the form window:SIDE"),
        ("window:1:2:3", "\"window:1:2:3\" must have the form"),
        ("global", "\"global\" must have the form global:POSITION"),
        ("fixed:8", "\"fixed:8\" must have the form fixed:STRIDE"),
        ("window:-1", "\"-1\" in \"window:-1\" is no number"),
        ("sinks:", "\"\" in \"sinks:\" is no number"),
        ("sinks:99999999999999999999", "\"99999999999999999999\" in"),
        ("global:1:x", "\"1:x\" in \"global:1:x\" is no number"),
        (
            "blocks",
            "\"blocks\" must have the form blocks:BLOCK:KEY_BLOCK",
        ),
        ("blocks:4:1,0", "\"blocks:4:1,0\": blocks.rows must rise"),
        ("blocks:0:1", "\"blocks:0:1\": blocks.block must be"),
        ("global:1,x", "\",x\" at character 8 does not belong there"),
        (
            "strided:0",
            "\"strided:0\": strided.stride must be at least 1",
        ),
        (
            "fixed:4:5",
            "\"fixed:4:5\": fixed.n_summary must be at most",
        ),
        ("fixed:4:2:2", "\"fixed:4:2:2\": fixed.sub_index must leave"),
        ("global:5,5", "\"global:5,5\": global.positions must rise"),
        ("", "the pattern ends too early: expected a pattern"),
        ("causal &", "the pattern ends too early"),
        ("(causal", "the pattern ends too early"),
        ("heads()", "\")\" at character 6 does not belong there"),
        (
            "causal full",
            "\"full\" at character 7 does not belong there",
        ),
        ("causal)", "\")\" at character 6"),
        ("causal, full", "\", full\" at character 6"),
        ("& causal", "\"& causal\" at character 0"),
    ];
    for (words, message) in cases {
        let error = words.parse::<Pattern>().unwrap_err().to_string();
        assert!(error.starts_with(message), "{words}: {error}");
    }
}

#[test]
fn deep_nesting_is_an_error_not_an_overflow() {
    let deep = |open: &str, close: &str, n: usize| {
        format!("{}causal{}", open.repeat(n), close.repeat(n)).parse::<Pattern>()
    };
    let limit = 48;
    let too_deep = Err(ParsePatternError::TooDeep { limit });
    assert_eq!(deep("(", ")", 100_000), too_deep);
    assert_eq!(deep("!", "", 100_000), too_deep);
    assert_eq!(deep("(full | full & ", ")", 40), too_deep);
    assert!(deep("heads(", ")", 40).is_ok());
    let mut pattern = Pattern::causal();
    for _ in 0..limit {
        pattern = Pattern::per_head([pattern]);
    }
    assert_eq!(pattern.validate(), Ok(()));
    let json = serde_json::to_string(&pattern).unwrap();
    assert_eq!(serde_json::from_str::<Pattern>(&json).unwrap(), pattern);
    let deeper = !pattern;
    assert_eq!(deeper.validate(), Err(PatternError::TooDeep { limit }));
    // A long chain is flat.
    let chain = vec!["causal"; 10_000].join(" | ");
    assert_eq!(parse(&chain).validate(), Ok(()));
}

#[test]
fn json_is_readable_and_strict() {
    let pattern = parse("causal & (window:8 | global:0,5 | fixed:8:2) & !documents");
    let json = r#"{"and":["causal",{"or":[{"window":{"back":8,"ahead":8}},{"global":{"positions":[0,5]}},{"fixed":{"merged":{"stride":8,"n_summary":2,"sub_index":0}}}]},{"not":"documents"}]}"#;
    assert_eq!(serde_json::to_string(&pattern).unwrap(), json);
    assert_eq!(serde_json::from_str::<Pattern>(json).unwrap(), pattern);
    let short = r#"{"blockwise":{"block":4}}"#;
    assert_eq!(
        serde_json::from_str::<Pattern>(short).unwrap(),
        parse("blockwise:4")
    );
    for wrong in [
        r#"{"window":{"back":8}}"#,
        r#"{"strided":{"merged":{"l":8}}}"#,
        r#""spiral""#,
    ] {
        assert!(serde_json::from_str::<Pattern>(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn wrong_fields_are_named() {
    let invalid = |pattern: Pattern, expected: PatternError| {
        assert_eq!(pattern.validate(), Err(expected.clone()));
        // Wherever it is.
        let inside = Pattern::causal() & !Pattern::per_head([Pattern::full(), pattern]);
        assert_eq!(inside.validate(), Err(expected));
    };
    let zero = |field| PatternError::Zero { field };
    let window = Window::one_sided(3);
    invalid(Pattern::dilated(window, 0), zero("dilated.dilation"));
    invalid(Pattern::strided(Strided::column(0)), zero("strided.stride"));
    invalid(Pattern::fixed(Fixed::local(0)), zero("fixed.stride"));
    invalid(Pattern::fixed(Fixed::merged(8, 0)), zero("fixed.n_summary"));
    invalid(
        Pattern::blockwise(Blockwise::new(0)),
        zero("blockwise.block"),
    );
    invalid(
        Pattern::random(RandomBlocks::past(0, 1)),
        zero("random.block"),
    );
    invalid(
        Pattern::fixed(Fixed::summary(8, 9)),
        PatternError::SummaryColumns {
            n_summary: 9,
            stride: 8,
        },
    );
    invalid(
        Pattern::fixed(Fixed::summary(8, 3).with_sub_index(2)),
        PatternError::SubIndex {
            sub_index: 2,
            n_summary: 3,
            stride: 8,
        },
    );
    invalid(
        Pattern::global([3, 1]),
        PatternError::Unsorted {
            field: "global.positions",
            position: 1,
            previous: 3,
        },
    );
    invalid(
        Pattern::per_head([]),
        PatternError::Empty { field: "per_head" },
    );
    invalid(Pattern::Or(Vec::new()), PatternError::Empty { field: "or" });
}

#[test]
fn what_does_not_fit_the_batch_is_named() {
    let lengths = Lengths::square(10).with_n_heads(2).with_batch_size(2);
    let check = |words, data: &BatchData| parse(words).check(&lengths, data);
    let none = BatchData::new();
    let missing = |pattern, data| Err(PatternError::MissingData { pattern, data });
    assert_eq!(
        check("causal & documents", &none),
        missing("documents", "document ids")
    );
    assert_eq!(
        check("heads(full, !global:batch)", &none),
        missing("global:batch", "global positions")
    );
    let beyond = |field, position| {
        Err(PatternError::GlobalBeyond {
            field,
            position,
            length: 10,
        })
    };
    assert_eq!(
        check("window:1 | global:9,10", &none),
        beyond("global.positions", 10)
    );
    assert_eq!(check("global:..11", &none), Ok(()));
    assert_eq!(
        check("full", &none.clone().with_globals(vec![vec![], vec![12]])),
        beyond("global positions", 12)
    );
    assert_eq!(
        check("heads(full, full, full)", &none),
        Err(PatternError::Heads {
            got: 3,
            expected: 2
        })
    );
    assert_eq!(
        check("full", &none.clone().with_documents(vec![vec![0; 10]])),
        Err(PatternError::BatchRows {
            data: "document ids",
            got: 1,
            expected: 2
        })
    );
    let short = vec![vec![false; 10], vec![false; 9]];
    assert_eq!(
        check("full", &none.clone().with_hidden_keys(short)),
        Err(PatternError::RowLength {
            data: "hidden keys",
            batch: 1,
            got: 9,
            expected: 10
        })
    );
    // Queries beyond the keys have no document.
    let documents = none.with_documents(vec![vec![0; 10]]);
    let lengths = Lengths::new(5, 10).with_first_position(6);
    assert_eq!(
        Pattern::documents().check(&lengths, &documents),
        missing(
            "documents",
            "query document ids for queries beyond the keys"
        )
    );
}

#[test]
fn lengths_that_no_schedule_can_hold() {
    let limit = (1 << 31) - 1;
    let too_large = |field, got| Err(PatternError::TooLarge { field, got, limit });
    assert_eq!(Lengths::square(limit).validate(), Ok(()));
    assert_eq!(
        Lengths::new(1, limit + 1).validate(),
        too_large("key_length", limit + 1)
    );
    let late = Lengths::new(2, 2).with_first_position(usize::MAX);
    assert_eq!(
        late.validate(),
        too_large("first_position + query_length", usize::MAX)
    );
    let overflow = Lengths::square(limit).with_batch_size(8);
    let error = overflow.validate().unwrap_err().to_string();
    assert!(error.ends_with("overflows 64 bits"), "{error}");
    assert_eq!(
        Lengths::square(1).with_n_heads(0).validate(),
        Err(PatternError::Zero { field: "n_heads" })
    );
    assert_eq!(
        Lengths::square(1).with_batch_size(0).validate(),
        Err(PatternError::Zero {
            field: "batch_size"
        })
    );
}

#[test]
fn pictures() {
    let text = parse("causal & (window:1 | sinks:1)")
        .to_text(4, 5)
        .unwrap();
    assert_eq!(text, "#....\n##...\n###..\n#.##.\n");
    let svg = parse("causal & (window:1 | sinks:1)").to_svg(4, 5).unwrap();
    assert!(
        svg.starts_with("<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"40\" height=\"32\"")
    );
    assert!(svg.contains("M0 3h1v1h-1zM2 3h2v1h-2z"), "{svg}");
    assert!(svg.ends_with("</svg>\n"));
    assert_eq!(
        Pattern::documents().to_text(3, 3),
        Err(PatternError::MissingData {
            pattern: "documents",
            data: "document ids"
        })
    );
    let lengths = Lengths::decode(4).with_n_heads(2);
    let heads = parse("heads(causal, window:1)");
    let picture = Picture::draw(&heads, &lengths, &BatchData::new(), 0, 1).unwrap();
    assert_eq!(picture.to_text(), "..##\n");
    assert_eq!(picture.size(), [1, 4]);
    assert!(picture.is_visible(0, 3) && !picture.is_visible(0, 0));
    assert_eq!(heads.to_text(2, 2).unwrap(), "#.\n##\n");
    assert_eq!(Pattern::full().to_text(0, 3).unwrap(), "");
    assert_eq!(Global::First(2).to_string(), "..2");
}

#[test]
fn shift_invariant_patterns_are_those_that_a_shift_leaves_alone() {
    let invariant = [
        "full",
        "causal",
        "window:3",
        "causal & dilated:2:3",
        "strided:4",
        "!causal",
    ];
    let absolute = [
        "sinks:2",
        "fixed:4:1",
        "blockwise:3",
        "global:1",
        "causal & !sinks:2",
        "random-past:2:1",
    ];
    let moved_is_same = |pattern: &Pattern| {
        (1..6).all(|shift| {
            (0..12).all(|query| {
                let keys = keys_of(pattern, query, 12);
                let moved = keys_of(pattern, query + shift, 12 + shift);
                keys.into_iter()
                    .map(|key| key + shift)
                    .collect::<BTreeSet<_>>()
                    == moved.into_iter().filter(|key| *key >= shift).collect()
            })
        })
    };
    for (words, expected) in [(invariant, true), (absolute, false)]
        .into_iter()
        .flat_map(|(all, expected)| all.map(|words| (words, expected)))
    {
        let pattern = parse(words);
        assert_eq!(pattern.is_shift_invariant(), expected, "{words}");
        assert_eq!(moved_is_same(&pattern), expected, "{words}");
    }
}
