//! Batches of each objective: what is hidden depends on seed, step and window alone.

use std::{fs, path::Path, sync::Arc};

use burn::{
    data::dataloader::DataLoader,
    tensor::{Int, Tensor},
};
use emberlm_core::{BatchData, CrossEntropyConfig, IGNORED_TARGET, LossModel, TokenBatch};
use emberlm_models::{DecoderConfig, PositionsConfig};
use emberlm_testkit::{device, to_f64};
use emberlm_training::{
    Batching, Corpus, EvaluationLoader, EvaluationWindows, MaskedConfig, Objective, SpansConfig,
    TrainingConfig, TrainingLoader, TrainingWindows,
};

const LENGTH: usize = 12;
const MASK: i64 = 257;

fn masked() -> Objective {
    Objective::Masked(MaskedConfig::new(MASK as u32, 256).with_rate(0.25))
}

fn spans() -> Objective {
    Objective::Spans(SpansConfig::new(299, 20, 257, 256).with_rate(0.5))
}

/// Three documents of 200 bytes, of which 20 are held out: 60 together, in windows at 0, 12, 24, 36 and 48.
fn corpus(folder: &Path) -> Corpus {
    let paths = ["a", "b", "c"].map(|letter| {
        let path = folder.join(letter);
        let lines = (0..20).map(|i| format!("{letter}{i:08}\n"));
        fs::write(&path, lines.collect::<String>()).expect("writable");
        path
    });
    Corpus::open(&paths).expect("texts")
}

fn training_loader(accumulation: usize, first_step: u64, batching: Batching) -> TrainingLoader {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let windows = TrainingWindows::new(corpus(folder.path()).training(), LENGTH, 5);
    let config = TrainingConfig::new(6, 4, LENGTH).with_accumulation(accumulation);
    let windows = Arc::new(windows.expect("long enough"));
    TrainingLoader::new(windows, &config, first_step, &device()).with_batching(batching)
}

fn evaluation_loader(batch_size: usize, batching: Batching) -> EvaluationLoader {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let windows = EvaluationWindows::new(corpus(folder.path()).held_out(), LENGTH);
    let windows = Arc::new(windows.expect("long enough"));
    let all: Vec<usize> = (0..windows.len()).collect();
    EvaluationLoader::new(windows, &all, batch_size, &device()).with_batching(batching)
}

fn batches(loader: &dyn DataLoader<TokenBatch>) -> Vec<TokenBatch> {
    let batches = loader.iter().map(|batch| batch.expect("in memory"));
    batches.collect()
}

fn rows(tokens: &Tensor<2, Int>) -> Vec<Vec<i64>> {
    let [_, length] = tokens.dims();
    let all: Vec<i64> = tokens.to_data().iter::<i64>().collect();
    all.chunks(length).map(<[i64]>::to_vec).collect()
}

/// Inputs, targets and source of each row of all batches.
fn all_rows(loader: &dyn DataLoader<TokenBatch>) -> Vec<[Vec<i64>; 3]> {
    let rows = batches(loader).into_iter().flat_map(|batch| {
        let inputs = rows(&batch.inputs);
        let source = match &batch.source {
            Some(source) => rows(&source.tokens),
            None => vec![Vec::new(); inputs.len()],
        };
        let targets = rows(&batch.targets);
        let rows = inputs.into_iter().zip(targets).zip(source);
        rows.map(|((inputs, targets), source)| [inputs, targets, source])
    });
    rows.collect()
}

#[test]
fn a_step_hides_the_same_however_it_is_split_and_resumed() {
    for objective in [Objective::Causal, masked(), spans()] {
        let rows = |accumulation, first_step, seed| {
            let batching = Batching::new(objective.clone(), seed);
            all_rows(&training_loader(accumulation, first_step, batching))
        };
        let whole = rows(1, 1, 5);
        assert_eq!(whole.len(), 6 * 4);
        assert_eq!(rows(4, 1, 5), whole, "{objective:?}");
        assert_eq!(rows(2, 4, 5), whole[3 * 4..], "{objective:?}");
        let draws = objective != Objective::Causal;
        assert_eq!(rows(1, 1, 6) != whole, draws, "{objective:?}");
    }
}

#[test]
fn each_window_hides_something_else() {
    let loader = training_loader(1, 1, Batching::new(masked(), 5));
    let places = all_rows(&loader).into_iter().map(|[_, targets, _]| {
        let asked = targets.iter().map(|target| *target != IGNORED_TARGET);
        asked.collect::<Vec<bool>>()
    });
    let places: std::collections::HashSet<Vec<bool>> = places.collect();
    // 220 ways to hide 3 of 12: 24 draws hardly repeat.
    assert!(places.len() > 18, "{}", places.len());
}

#[test]
fn the_held_out_text_hides_the_same_always() {
    for objective in [Objective::Causal, masked(), spans()] {
        let rows = |batch_size| {
            all_rows(&evaluation_loader(
                batch_size,
                Batching::new(objective.clone(), 5),
            ))
        };
        assert_eq!(rows(1), rows(3), "{objective:?}");
    }
}

#[test]
fn masked_rows_ask_for_what_they_hide() {
    let causal = all_rows(&training_loader(1, 1, Batching::new(Objective::Causal, 5)));
    let masked = all_rows(&training_loader(1, 1, Batching::new(masked(), 5)));
    let mut n_masks = 0;
    for ([text, _, _], [inputs, targets, _]) in causal.iter().zip(&masked) {
        let asked = targets.iter().filter(|target| **target != IGNORED_TARGET);
        assert_eq!(asked.count(), LENGTH / 4);
        for ((token, input), target) in text.iter().zip(inputs).zip(targets) {
            match *target {
                IGNORED_TARGET => assert_eq!(input, token),
                target => assert_eq!(target, *token),
            }
        }
        n_masks += inputs.iter().filter(|token| **token == MASK).count();
    }
    assert!(n_masks > masked.len(), "{n_masks}");
}

#[test]
fn the_decoder_of_spans_reads_its_target_one_position_late() {
    for [inputs, targets, source] in all_rows(&training_loader(1, 1, Batching::new(spans(), 5))) {
        assert_eq!(inputs[0], 256);
        assert_eq!(inputs[1..], targets[..targets.len() - 1]);
        assert_eq!((targets.last(), source.last()), (Some(&257), Some(&257)));
        assert_eq!(targets[0], 299);
        let lengths = SpansConfig::new(299, 20, 257, 256)
            .with_rate(0.5)
            .lengths(LENGTH);
        assert_eq!((source.len(), targets.len()), lengths);
    }
}

#[test]
fn a_last_window_of_one_token_is_none_for_spans() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let held_out = corpus(folder.path()).held_out();
    let length = held_out.len() - 2;
    let windows = Arc::new(EvaluationWindows::new(held_out, length).expect("long enough"));
    assert_eq!(windows.len(), 2);
    let loader = EvaluationLoader::new(windows, &[0, 1], 4, &device());
    assert_eq!(loader.num_items(), 2);
    let loader = loader.with_batching(Batching::new(spans(), 5));
    assert_eq!((loader.num_items(), batches(&loader).len()), (1, 1));
}

#[test]
fn documents_are_told_and_their_first_tokens_are_no_targets() {
    let of = |objective: Objective, apart| {
        let batching = Batching::new(objective, 5).with_documents(apart);
        batches(&evaluation_loader(1, batching))
    };
    let (plain, apart) = (of(Objective::Causal, false), of(Objective::Causal, true));
    assert_eq!(plain.len(), 5);
    for (window, (plain, apart)) in plain.iter().zip(&apart).enumerate() {
        let inputs = rows(&plain.inputs).concat();
        assert_eq!(rows(&apart.inputs).concat(), inputs);
        let places = 12 * window..12 * window + inputs.len();
        let documents = places.clone().map(|place| place as u32 / 20).collect();
        assert_eq!(plain.data, BatchData::new());
        assert_eq!(apart.data, BatchData::new().with_documents(vec![documents]));
        let mut expected = rows(&plain.targets).concat();
        for (place, target) in places.zip(&mut expected) {
            if place % 20 == 19 {
                *target = IGNORED_TARGET;
            }
        }
        assert_eq!(rows(&apart.targets).concat(), expected);
    }
    let (masked_apart, masked) = (of(masked(), true), of(masked(), false));
    for (window, batch) in masked_apart.iter().enumerate() {
        assert_eq!(batch.data, apart[window].data);
        assert_eq!(rows(&batch.targets), rows(&masked[window].targets));
    }
}

#[test]
fn a_packed_window_has_the_loss_of_its_documents() {
    let device = device();
    let model = DecoderConfig::new(256, 2, 12, 3)
        .with_positions(PositionsConfig::Alibi)
        .init(&device);
    let model = to_f64(model);
    let config = CrossEntropyConfig::new().with_ignored_target(Some(IGNORED_TARGET));
    let loss = |batch: TokenBatch| {
        let loss = model.loss(batch, &config).cross_entropy;
        let number = |sum: Tensor<1>| sum.into_data().iter::<f64>().next().expect("one number");
        (number(loss.nll_sum), number(loss.n_targets))
    };
    let batching = Batching::new(Objective::Causal, 5).with_documents(true);
    let whole: (f64, f64) = batches(&evaluation_loader(1, batching))
        .into_iter()
        .map(loss)
        .fold((0.0, 0.0), |sum, loss| (sum.0 + loss.0, sum.1 + loss.1));

    let folder = tempfile::tempdir().expect("a temporary folder");
    let stream = emberlm_training::TokenStream::from(corpus(folder.path()).held_out());
    let pieces = [
        (0, 13),
        (12, 20),
        (20, 25),
        (24, 37),
        (36, 40),
        (40, 49),
        (48, 60),
    ];
    let (mut nll_sum, mut n_targets) = (0.0, 0.0);
    for (start, end) in pieces {
        let tokens: Vec<i64> = stream
            .tokens(start..end)
            .into_iter()
            .map(i64::from)
            .collect();
        let row = |tokens: &[i64]| Tensor::<1, Int>::from_ints(tokens, &device).unsqueeze::<2>();
        let (_, inputs) = tokens.split_last().expect("two tokens");
        let part = loss(TokenBatch::new(row(inputs), row(&tokens[1..])));
        nll_sum += part.0;
        n_targets += part.1;
    }
    assert_eq!(whole.1, n_targets);
    assert!(
        (whole.0 - nll_sum).abs() < 1e-9,
        "{} and {nll_sum}",
        whole.0
    );
}

#[test]
#[should_panic(expected = "documents: spans cannot keep them apart")]
fn spans_keep_no_documents_apart() {
    let _ = Batching::new(spans(), 5).with_documents(true);
}
