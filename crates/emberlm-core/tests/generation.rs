//! Generation over a model whose scores are a function of the whole text: against an exhaustive search, and against
//! plain implementations that know neither caches nor batches.

use burn::tensor::{DType, Int, Tensor, TensorData};
use emberlm_core::{
    BatchGenerator, BeamConfig, BeamSearch, CachedModel, DecodingCache, EarlyStopping,
    ForbiddenTokens, ForcedFirstToken, GenerationError, Generator, Hypothesis, LengthPenalty,
    LogitProcessors, MinimumNewTokens, NoRepeatNGram, SampleError, SamplingConfig,
    log_probabilities,
};
use emberlm_testkit::device;
use proptest::prelude::*;

/// Scores between -2 and 2 that differ with every token of the text; one in eight is negative infinity.
struct Table {
    seed: u64,
    vocab_size: usize,
    max_seq_length: Option<usize>,
}

/// The tokens of each row, padding included.
#[derive(Clone)]
struct Texts {
    rows: Option<Vec<Vec<u32>>>,
    padding: Option<Vec<usize>>,
    len: usize,
    n_selects: usize,
}

impl DecodingCache for Texts {
    fn len(&self) -> usize {
        self.len
    }

    fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        for row in self.rows.iter_mut().flatten() {
            row.truncate(len);
        }
    }

    fn batch_size(&self) -> Option<usize> {
        self.rows.as_ref().map(Vec::len)
    }

    fn select(&mut self, rows: &[usize]) {
        self.n_selects += 1;
        let texts = self.rows.take().expect("rows");
        self.rows = Some(rows.iter().map(|row| texts[*row].clone()).collect());
        if let Some(padding) = self.padding.take() {
            self.padding = Some(rows.iter().map(|row| padding[*row]).collect());
        }
    }

    fn set_padding(&mut self, padding: &[usize]) {
        assert!(self.is_empty());
        self.padding = Some(padding.to_vec());
    }
}

fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Table {
    fn new(seed: u64, vocab_size: usize) -> Self {
        Self {
            seed,
            vocab_size,
            max_seq_length: None,
        }
    }

    fn scores(&self, text: &[u32]) -> Vec<f64> {
        let state = text.iter().fold(
            mix(self.seed),
            |state, token| mix(state ^ u64::from(*token)),
        );
        let score = |token| {
            let word = mix(state ^ (token << 32));
            match token > 0 && word.is_multiple_of(8) {
                true => f64::NEG_INFINITY,
                false => (word >> 11) as f64 / (1u64 << 51) as f64 - 2.0,
            }
        };
        (0..self.vocab_size as u64).map(score).collect()
    }

    fn log_probabilities(&self, text: &[u32]) -> Vec<f64> {
        let scores = self.scores(text);
        let sum: f64 = scores.iter().map(|score| score.exp()).sum();
        scores.iter().map(|score| score - sum.ln()).collect()
    }
}

impl CachedModel for Table {
    type Cache = Texts;

    fn max_seq_length(&self) -> Option<usize> {
        self.max_seq_length
    }

    fn new_cache(&self, _capacity: usize) -> Texts {
        Texts {
            rows: None,
            padding: None,
            len: 0,
            n_selects: 0,
        }
    }

    fn forward_cached(&self, tokens: Tensor<2, Int>, cache: &mut Texts) -> Tensor<3> {
        let ([n_rows, length], device) = (tokens.dims(), tokens.device());
        let tokens: Vec<i64> = tokens.into_data().iter().collect();
        let rows = cache.rows.get_or_insert_with(|| vec![Vec::new(); n_rows]);
        assert_eq!(rows.len(), n_rows);
        let mut scores = Vec::new();
        for (i, text) in rows.iter_mut().enumerate() {
            let padding = cache.padding.as_ref().map_or(0, |padding| padding[i]);
            for token in &tokens[i * length..][..length] {
                text.push(*token as u32);
                scores.extend(self.scores(&text[padding.min(text.len())..]));
            }
        }
        cache.len += length;
        let shape = [n_rows, length, self.vocab_size];
        Tensor::from_data(TensorData::new(scores, shape), (&device, DType::F64))
    }
}

/// All continuations, by falling score.
fn exhaustive(model: &Table, prompt: &[u32], config: &BeamConfig) -> Vec<Hypothesis> {
    let mut all = Vec::new();
    let mut open = vec![(prompt.to_vec(), 0.0)];
    while let Some((text, before)) = open.pop() {
        for (token, x) in (0..).zip(model.log_probabilities(&text)) {
            if x == f64::NEG_INFINITY {
                continue;
            }
            let (mut text, log_probability) = (text.clone(), before + x);
            text.push(token);
            let n = text.len() - prompt.len();
            if config.end_tokens.contains(&token) || n == config.max_new_tokens {
                all.push(Hypothesis {
                    tokens: text.split_off(prompt.len()),
                    log_probability,
                    score: log_probability / config.length_penalty.divisor(n),
                });
            } else {
                open.push((text, log_probability));
            }
        }
    }
    all.sort_by(|a, b| b.score.total_cmp(&a.score));
    all
}

/// Beam search by the description of Hugging Face's: everything sorted in each step, texts scored from their beginning.
fn step_by_step(model: &Table, prompt: &[u32], config: &BeamConfig) -> Vec<Hypothesis> {
    let n_beams = config.n_beams;
    let penalised = |x: f64, n: usize| x / config.length_penalty.divisor(n);
    let mut running = vec![(prompt.to_vec(), 0.0)];
    let mut finished: Vec<Hypothesis> = Vec::new();
    for n in 1..=config.max_new_tokens {
        let mut candidates = Vec::new();
        for (text, before) in &running {
            for (token, x) in (0..).zip(model.log_probabilities(text)) {
                candidates.push(([&text[..], &[token]].concat(), before + x));
            }
        }
        candidates.retain(|(_, x)| *x > f64::NEG_INFINITY);
        candidates.sort_by(|a, b| b.1.total_cmp(&a.1));
        candidates.truncate(2.max(1 + config.end_tokens.len()) * n_beams);
        let ends = |(text, _): &(Vec<u32>, f64)| {
            n == config.max_new_tokens || config.end_tokens.contains(text.last().expect("a token"))
        };
        for candidate in candidates.iter().take(n_beams) {
            if ends(candidate) {
                finished.push(Hypothesis {
                    tokens: candidate.0[prompt.len()..].to_vec(),
                    log_probability: candidate.1,
                    score: penalised(candidate.1, n),
                });
            }
        }
        candidates.retain(|candidate| !ends(candidate));
        candidates.truncate(n_beams);
        running = candidates;
        finished.sort_by(|a, b| b.score.total_cmp(&a.score));
        finished.truncate(n_beams);
        if running.is_empty() {
            break;
        }
        if finished.len() == n_beams {
            let favours_long = match config.length_penalty {
                LengthPenalty::HuggingFace(p) | LengthPenalty::Gnmt(p) => p > 0.0,
            };
            let best_length = match favours_long && config.early_stopping == EarlyStopping::Never {
                true => config.max_new_tokens,
                false => n,
            };
            let improvable = penalised(running[0].1, best_length) > finished[n_beams - 1].score;
            if config.early_stopping == EarlyStopping::True || !improvable {
                break;
            }
        }
    }
    finished.truncate(config.n_best);
    finished
}

fn search(config: BeamConfig, model: &Table, prompts: &[Vec<u32>]) -> Vec<Vec<Hypothesis>> {
    let mut search = BeamSearch::new(config).expect("valid");
    search.search(model, prompts, &device()).expect("scores")
}

fn assert_same(actual: &[Hypothesis], expected: &[Hypothesis]) {
    let tokens = |all: &[Hypothesis]| all.iter().map(|h| h.tokens.clone()).collect::<Vec<_>>();
    assert_eq!(tokens(actual), tokens(expected));
    for (actual, expected) in actual.iter().zip(expected) {
        assert!((actual.log_probability - expected.log_probability).abs() < 1e-12);
        assert!((actual.score - expected.score).abs() < 1e-12 * (1.0 + expected.score.abs()));
    }
}

fn length_penalty() -> impl Strategy<Value = LengthPenalty> {
    prop_oneof![
        (-2.0..2.0).prop_map(LengthPenalty::HuggingFace),
        Just(LengthPenalty::HuggingFace(0.0)),
        (-1.0..1.5).prop_map(LengthPenalty::Gnmt),
    ]
}

fn early_stopping() -> impl Strategy<Value = EarlyStopping> {
    prop_oneof![
        Just(EarlyStopping::True),
        Just(EarlyStopping::False),
        Just(EarlyStopping::Never),
    ]
}

proptest! {
    #[test]
    fn a_beam_that_keeps_all_is_an_exhaustive_search(
        seed: u64,
        vocab_size in 2..5usize,
        max_new_tokens in 1..5usize,
        penalty in length_penalty(),
        ends in prop::bool::ANY,
    ) {
        let model = Table::new(seed, vocab_size);
        let end_tokens = if ends { vec![1] } else { vec![] };
        // As many as there are candidates in the last step: finished hypotheses have to compete.
        let going_on = vocab_size - end_tokens.len();
        let n_beams = vocab_size * going_on.pow(max_new_tokens as u32 - 1);
        let config = BeamConfig::new(n_beams, max_new_tokens)
            .with_end_tokens(end_tokens)
            .with_length_penalty(penalty)
            .with_early_stopping(EarlyStopping::Never)
            .with_n_best(n_beams);
        let prompts = [vec![0, 1], vec![1]];
        let found = search(config.clone(), &model, &prompts);
        for (found, prompt) in found.iter().zip(&prompts) {
            let mut expected = exhaustive(&model, prompt, &config);
            expected.truncate(n_beams);
            assert_same(found, &expected);
        }
    }

    #[test]
    fn narrow_beams_over_many_prompts_equal_the_plain_search_one_by_one(
        seed: u64,
        vocab_size in 2..8usize,
        n_beams in 1..6usize,
        max_new_tokens in 1..9usize,
        penalty in length_penalty(),
        early_stopping in early_stopping(),
        end_tokens in prop::collection::btree_set(0..2u32, 0..3),
        prompts in prop::collection::vec(prop::collection::vec(0..2u32, 1..5), 1..4),
    ) {
        let model = Table::new(seed, vocab_size);
        let config = BeamConfig::new(n_beams, max_new_tokens)
            .with_end_tokens(end_tokens.into_iter().collect())
            .with_length_penalty(penalty)
            .with_early_stopping(early_stopping)
            .with_n_best(1 + n_beams / 2);
        let config = config.clone().with_n_best(config.n_best.min(n_beams));
        let found = search(config.clone(), &model, &prompts);
        for (found, prompt) in found.iter().zip(&prompts) {
            assert_same(found, &step_by_step(&model, prompt, &config));
        }
    }

    #[test]
    fn the_first_of_several_groups_is_a_plain_beam_search(seed: u64, penalty in 0.0..3.0) {
        let model = Table::new(seed, 5);
        let plain = BeamConfig::new(2, 4).with_end_tokens(vec![1]).with_n_best(2);
        let grouped = BeamConfig::new(6, 4)
            .with_end_tokens(vec![1])
            .with_n_best(6)
            .with_n_groups(3)
            .with_diversity_penalty(penalty);
        let prompts = [vec![2]];
        let all = search(grouped, &model, &prompts).remove(0);
        for hypothesis in &search(plain, &model, &prompts)[0] {
            prop_assert!(all.contains(hypothesis));
        }
    }
}

#[test]
fn one_beam_is_greedy_and_reports_its_probabilities() {
    let model = Table::new(5, 6);
    let prompt = [3, 1];
    let found = search(BeamConfig::new(1, 8), &model, &[prompt.to_vec()]);
    let greedy = SamplingConfig::new().with_temperature(0.0);
    let mut generator = Generator::new(&model, &prompt, 8, greedy, &device()).expect("a prompt");
    let tokens: Vec<u32> = generator
        .by_ref()
        .map(|token| token.expect("a token"))
        .collect();
    assert_eq!(found[0][0].tokens, tokens);
    let sum: f64 = generator.log_probabilities().iter().sum();
    assert!((found[0][0].log_probability - sum).abs() < 1e-12);
    let given = log_probabilities(&model, &[generator.text()], &device()).expect("scores");
    for (given, own) in given[0][1..].iter().zip(generator.log_probabilities()) {
        assert!((given - own).abs() < 1e-12);
    }
}

/// A model that knows no text: tokens with these probabilities.
struct Dice(Vec<f64>);

impl CachedModel for Dice {
    type Cache = Texts;

    fn max_seq_length(&self) -> Option<usize> {
        None
    }

    fn new_cache(&self, capacity: usize) -> Texts {
        Table::new(0, 1).new_cache(capacity)
    }

    fn forward_cached(&self, tokens: Tensor<2, Int>, cache: &mut Texts) -> Tensor<3> {
        let [n_rows, length] = tokens.dims();
        Table::new(0, 1).forward_cached(tokens.clone(), cache);
        let scores: Vec<f64> = self.0.iter().map(|p| p.ln()).collect();
        let scores = TensorData::new(scores, [1, 1, self.0.len()]);
        Tensor::<3>::from_data(scores, (&tokens.device(), DType::F64)).repeat(&[n_rows, length, 1])
    }
}

/// Two groups of one beam, two tokens long.
fn two_groups(diversity_penalty: f64) -> Vec<(Vec<u32>, f64)> {
    let config = BeamConfig::new(2, 2)
        .with_n_best(2)
        .with_n_groups(2)
        .with_length_penalty(LengthPenalty::HuggingFace(0.0))
        .with_diversity_penalty(diversity_penalty);
    let mut search = BeamSearch::new(config).expect("valid");
    let model = Dice(vec![0.6, 0.3, 0.1]);
    let found = search.search(&model, &[[0]], &device()).expect("scores");
    let pairs = found[0].iter().map(|h| (h.tokens.clone(), h.score.exp()));
    pairs.collect()
}

#[test]
fn groups_avoid_the_tokens_of_earlier_groups() {
    let close = |found: Vec<(Vec<u32>, f64)>, expected: [([u32; 2], f64); 2]| {
        for ((tokens, p), (expected_tokens, expected)) in found.into_iter().zip(expected) {
            assert_eq!(tokens, expected_tokens);
            assert!((p - expected).abs() < 1e-12, "{p}, {expected}");
        }
    };
    // ln 0.6 - ln 0.3 is ln 2 = 0.693: a smaller penalty changes nothing.
    close(two_groups(0.69), [([0, 0], 0.36), ([0, 0], 0.36)]);
    // A larger one makes the second group take the second token, in the last step as well, and costs the hypothesis
    // nothing: it keeps its own probability.
    close(two_groups(0.70), [([0, 0], 0.36), ([1, 1], 0.09)]);
    close(two_groups(9.0), [([0, 0], 0.36), ([1, 1], 0.09)]);
}

#[test]
fn processors_bind_beams_and_samples() {
    let model = Table::new(8, 6);
    let processors = || {
        LogitProcessors::new()
            .with(ForcedFirstToken(4))
            .with(ForbiddenTokens(vec![2]))
            .with(MinimumNewTokens {
                n: 3,
                end_tokens: vec![0],
            })
            .with(NoRepeatNGram::new(1).expect("positive"))
    };
    let check = |tokens: &[u32]| {
        let mut sorted = tokens.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!(sorted.len(), tokens.len(), "a repetition in {tokens:?}");
        assert_eq!(tokens[0], 4);
        assert!(!tokens.contains(&2) && !tokens[..3.min(tokens.len())].contains(&0));
    };
    let prompts = [vec![3], vec![2, 1]];
    let config = BeamConfig::new(3, 4)
        .with_end_tokens(vec![0])
        .with_n_best(3);
    let mut search = BeamSearch::new(config)
        .expect("valid")
        .with_processors(processors());
    for found in search.search(&model, &prompts, &device()).expect("scores") {
        found
            .iter()
            .for_each(|hypothesis| check(&hypothesis.tokens));
    }
    let sampling = SamplingConfig::new().with_seed(2);
    let generator = Generator::new(&model, &prompts[0], 3, sampling, &device()).expect("a prompt");
    let tokens: Result<Vec<u32>, _> = generator.with_processors(processors()).collect();
    check(&tokens.expect("tokens"));
}

#[test]
fn a_batch_is_its_rows_one_by_one() {
    let model = Table::new(21, 7);
    let prompts = [vec![1], vec![3, 3, 4, 0], vec![2, 5], vec![6, 1]];
    let sampling = SamplingConfig::new().with_seed(40);
    let batch = BatchGenerator::new(&model, &prompts, 12, sampling.clone(), &device())
        .expect("prompts")
        .with_end_tokens(vec![0])
        .run()
        .expect("scores");
    for (i, (row, prompt)) in (40..).zip(batch.iter().zip(&prompts)) {
        let sampling = sampling.clone().with_seed(i);
        let mut alone = Generator::new(&model, prompt, 12, sampling, &device()).expect("a prompt");
        let mut tokens = Vec::new();
        while tokens.last() != Some(&0)
            && let Some(token) = alone.next()
        {
            tokens.push(token.expect("a token"));
        }
        assert_eq!(row.tokens, tokens);
        assert_eq!(row.log_probabilities, alone.log_probabilities());
    }
    let lengths: Vec<usize> = batch.iter().map(|row| row.tokens.len()).collect();
    assert!(
        lengths.iter().any(|n| *n < 12) && lengths.iter().any(|n| *n > lengths[0]),
        "texts of several lengths: {lengths:?}"
    );
}

#[test]
fn probabilities_of_given_texts() {
    let model = Table::new(3, 4);
    let long: Vec<u32> = (0..300).map(|i| mix(i) as u32 % 4).collect();
    let sequences = [vec![2], vec![0, 3, 1], long];
    let found = log_probabilities(&model, &sequences, &device()).expect("scores");
    for (found, sequence) in found.iter().zip(&sequences) {
        assert_eq!(found.len(), sequence.len() - 1);
        for (t, found) in found.iter().enumerate() {
            let expected = model.log_probabilities(&sequence[..=t])[sequence[t + 1] as usize];
            assert!(*found == expected || (found - expected).abs() < 1e-12);
        }
    }
    let nothing: [Vec<u32>; 0] = [];
    assert!(
        log_probabilities(&model, &nothing, &device())
            .expect("none")
            .is_empty()
    );
}

#[test]
fn a_step_reorders_the_cache_once() {
    struct Counted<'a>(&'a Table, std::cell::RefCell<Vec<(usize, usize)>>);
    impl CachedModel for Counted<'_> {
        type Cache = Texts;

        fn max_seq_length(&self) -> Option<usize> {
            None
        }

        fn new_cache(&self, capacity: usize) -> Texts {
            self.0.new_cache(capacity)
        }

        fn forward_cached(&self, tokens: Tensor<2, Int>, cache: &mut Texts) -> Tensor<3> {
            self.1
                .borrow_mut()
                .push((tokens.dims()[0], cache.n_selects));
            self.0.forward_cached(tokens, cache)
        }
    }
    let table = Table::new(4, 9);
    let model = Counted(&table, Default::default());
    let mut search = BeamSearch::new(BeamConfig::new(3, 5)).expect("valid");
    search
        .search(&model, &[vec![1], vec![2, 3]], &device())
        .expect("scores");
    let passes = model.1.into_inner();
    // Prompts are encoded once, not once a beam; then one pass a step for all beams of all prompts.
    let rows: Vec<usize> = passes.iter().map(|(n_rows, _)| *n_rows).collect();
    assert_eq!(rows, [2, 6, 6, 6, 6]);
    for (step, (_, n_selects)) in passes.iter().enumerate() {
        assert!(*n_selects <= step);
    }
}

#[test]
fn what_cannot_be_searched_is_an_error() {
    let (model, device) = (Table::new(1, 4), device());
    let mut search = BeamSearch::new(BeamConfig::new(2, 3)).expect("valid");
    let empty = search.search(&model, &[vec![1], vec![]], &device);
    assert_eq!(empty, Err(GenerationError::EmptyPrompt));
    let nothing: [Vec<u32>; 0] = [];
    assert_eq!(search.search(&model, &nothing, &device), Ok(vec![]));

    let short = Table {
        max_seq_length: Some(5),
        ..Table::new(1, 4)
    };
    // The last token needs no position: nothing follows it.
    search.search(&short, &[[1, 2, 3]], &device).expect("room");
    let error = search.search(&short, &[[1, 2, 3, 0]], &device).unwrap_err();
    let too_long = GenerationError::TooLong {
        needed: 6,
        longest: 5,
    };
    assert_eq!(error, too_long);
    let sampling = SamplingConfig::new();
    let batch = BatchGenerator::new(&short, &[[1, 2, 3, 0]], 3, sampling, &device);
    assert_eq!(batch.err(), Some(too_long));

    for p in [f64::NAN, f64::INFINITY] {
        let error = search
            .search(&Dice(vec![0.5, p]), &[[0]], &device)
            .unwrap_err();
        assert!(matches!(
            error,
            GenerationError::Sample(SampleError::Logit { token: 1, .. })
        ));
    }
    let error = log_probabilities(&Dice(vec![0.5, f64::NAN]), &[[0, 1]], &device).unwrap_err();
    assert!(matches!(
        error,
        GenerationError::Sample(SampleError::Logit { .. })
    ));

    let forbidden = LogitProcessors::new().with(ForbiddenTokens(vec![0, 1, 2, 3]));
    let mut search = search.with_processors(forbidden);
    let error = search.search(&model, &[[0]], &device).unwrap_err();
    let none = SampleError::NoCandidate { vocab_size: 4 };
    assert_eq!(error, GenerationError::Sample(none));
    let broken = LogitProcessors::new().with(|_: &[u32], scores: &mut [f32]| scores[2] = f32::NAN);
    let error = search
        .with_processors(broken)
        .search(&model, &[[0]], &device)
        .unwrap_err();
    assert!(matches!(
        error,
        GenerationError::Sample(SampleError::Logit { token: 2, .. })
    ));
    assert!(BeamSearch::new(BeamConfig::new(0, 3)).is_err());
}
