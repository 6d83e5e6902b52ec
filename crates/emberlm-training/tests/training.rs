//! Gradients, optimizer, loaders and the loop, on a small decoder.

use std::{io::Write, path::Path, sync::Arc, time::Duration};

use burn::{
    data::dataloader::DataLoader,
    optim::{AdamWConfig, GradientsAccumulator, OptimizerRecord},
    tensor::{Device, Int, Tensor, s},
    train::{Interrupter, TrainStep},
};
use emberlm_models::{Decoder, DecoderConfig, EncoderDecoderConfig, PositionsConfig};
use emberlm_testkit::{
    device, largest_difference, optimizer_gradients_by_name, parameters_by_name, random_tokens,
    to_f64,
};
use emberlm_text::{BpeTraining, TokenFile};
use emberlm_training::{
    CheckpointStore, Corpus, Ending, EvaluationLoader, EvaluationWindows, LanguageModel,
    LineRenderer, MetricsLog, PairEvaluationLoader, PairLoader, Session, TokenBatch, TokenPair,
    Trainer, TrainingConfig, TrainingLoader, TrainingWindows, Watch, adamw, evaluate, global_norm,
    scale_gradients,
};

fn decoder(device: &Device) -> Decoder {
    DecoderConfig::new(256, 2, 12, 3)
        .with_positions(PositionsConfig::Learned { max_seq_length: 8 })
        .init(device)
}

fn config() -> TrainingConfig {
    TrainingConfig::new(6, 4, 8)
        .with_checkpoint_every(2)
        .with_validate_every(3)
        .with_validation_windows(3)
}

fn batch(tokens: Tensor<2, Int>) -> TokenBatch {
    let [_, length] = tokens.dims();
    TokenBatch::new(
        tokens.clone().slice(s![.., 0..length - 1]),
        tokens.slice(s![.., 1..length]),
    )
}

fn pairs() -> Arc<[TokenPair]> {
    let tokens = |first: u32, n: u32| (0..n).map(|i| (first * 7 + i * 3) % 30).collect();
    let pair = |i| TokenPair {
        source: tokens(i, 1 + i % 5),
        target: tokens(i + 1, 2 + i * i % 7),
    };
    (0..40).map(pair).collect()
}

#[test]
fn the_loss_over_pairs_does_not_depend_on_how_they_are_cut() {
    let device = device();
    let model = EncoderDecoderConfig::new(30, 1, 1, 12, 3).init(&device.clone().autodiff());
    let model = to_f64(LanguageModel::new(model, 0.0, 0.0));
    let chosen: Vec<usize> = (0..40).collect();
    let loss = |max_tokens| {
        let loader = PairEvaluationLoader::new(pairs(), &chosen, max_tokens, &device);
        let mut n_targets = 0.0;
        let loss = evaluate(&model, &loader, |output, _| {
            n_targets += output.n_targets;
            Ok(())
        });
        (loss.expect("nothing can fail").loss(), n_targets)
    };
    let real: usize = pairs().iter().map(TokenPair::n_predicted).sum();
    let (alone, n_alone) = loss(1);
    let (together, n_together) = loss(100);
    assert!((alone - together).abs() < 1e-12, "{alone} {together}");
    assert_eq!([n_alone, n_together], [real as f64; 2]);
}

#[test]
fn a_loader_of_pairs_goes_on_where_another_stopped() {
    let config = TrainingConfig::new(30, 4, 6).with_accumulation(2);
    let batches = |first_step| -> Vec<_> {
        let loader = PairLoader::new(pairs(), &config, first_step, &device());
        let batches = loader.iter().map(|batch| {
            let batch = batch.expect("nothing can fail");
            (
                numbers(batch.inputs),
                numbers(batch.targets),
                batch.dropout_key,
            )
        });
        batches.collect()
    };
    let whole = batches(1);
    assert_eq!(whole.len(), 60);
    let n_predicted: usize = pairs().iter().map(TokenPair::n_predicted).sum();
    assert!(n_predicted < 60 * 12, "more than an epoch");
    assert_eq!(batches(14), whole[26..]);
}

#[test]
fn accumulated_gradients_equal_the_large_batch() {
    let device = device().autodiff();
    let model = to_f64(LanguageModel::new(decoder(&device), 0.1, 1e-3));
    let tokens = random_tokens([8, 9], 256, 1, &device);
    let whole = TrainStep::step(&model, batch(tokens.clone()));
    let expected = scale_gradients(&model, whole.grads, 1.0 / whole.item.n_targets);

    // Micro-batches of different sizes: a mean of means would be wrong.
    let mut accumulator = GradientsAccumulator::new();
    let mut n_targets = 0.0;
    for (from, to) in [(0, 3), (3, 4), (4, 8)] {
        let part = TrainStep::step(&model, batch(tokens.clone().slice(s![from..to, ..])));
        n_targets += part.item.n_targets;
        accumulator.accumulate(&model, part.grads);
    }
    let accumulated = scale_gradients(&model, accumulator.grads(), 1.0 / n_targets);
    let [accumulated, expected] =
        [accumulated, expected].map(|gradients| optimizer_gradients_by_name(&model, &gradients));
    assert_eq!(accumulated.len(), parameters_by_name(&model).len());
    for (name, gradient) in &accumulated {
        let difference = largest_difference(gradient, &expected[name]);
        assert!(difference < 1e-10, "{name}: {difference:e}");
    }
}

#[test]
fn the_global_norm_is_that_of_one_long_vector() {
    let device = device().autodiff();
    let model = LanguageModel::new(decoder(&device), 0.0, 0.0);
    let step = TrainStep::step(&model, batch(random_tokens([2, 9], 256, 1, &device)));
    let norm = global_norm(&model, &step.grads);
    let by_name = optimizer_gradients_by_name(&model, &step.grads);
    let squares: f64 = by_name
        .values()
        .flat_map(|data| data.iter::<f64>().map(|x| x * x))
        .sum();
    assert!((norm / squares.sqrt() - 1.0).abs() < 1e-6);
    let scaled = scale_gradients(&model, step.grads, 0.5);
    assert!((global_norm(&model, &scaled) / norm - 0.5).abs() < 1e-6);
}

#[test]
fn weight_decay_acts_on_linear_weights_only() {
    let device = device().autodiff();
    let config = DecoderConfig::new(256, 1, 12, 3)
        .with_positions(PositionsConfig::Learned { max_seq_length: 8 })
        .with_bias(true)
        .with_tied_embedding(false);
    let model = LanguageModel::new(config.init(&device), 0.0, 0.0);
    let before = parameters_by_name(&model);
    let mut optimizer = adamw(&config_with_decay(0.1), &model);
    let gradients = TrainStep::step(&model, batch(random_tokens([1, 9], 256, 1, &device))).grads;
    let gradients = scale_gradients(&model, gradients, 0.0);
    let after = parameters_by_name(&optimizer.step(0.5, model, gradients));
    for (name, before) in &before {
        let decays = name.ends_with("weight")
            && !name.contains("tokens")
            && !name.contains("positions")
            && !name.contains("norm");
        let factor = if decays { 1.0 - 0.5 * 0.1 } else { 1.0 };
        for (before, after) in before.iter::<f64>().zip(after[name].iter::<f64>()) {
            assert!(
                (after - before * factor).abs() < 1e-7,
                "{name}: {before} became {after}"
            );
        }
    }
}

fn config_with_decay(weight_decay: f64) -> TrainingConfig {
    config().with_weight_decay(weight_decay)
}

#[test]
fn the_optimizer_is_burns_and_continues_from_its_record() {
    let device = device().autodiff();
    let initial = to_f64(LanguageModel::new(decoder(&device), 0.0, 0.0));
    let gradients = |model: &LanguageModel<Decoder>, seed| {
        TrainStep::step(model, batch(random_tokens([2, 9], 256, seed, &device))).grads
    };
    // Burn takes these as f32, which holds them and the powers of the betas exactly.
    let config = config_with_decay(0.0)
        .with_beta_1(0.875)
        .with_beta_2(63.0 / 64.0)
        .with_epsilon(2_f64.powi(-27));
    let mut ours = adamw(&config, &initial);
    let mut burns = AdamWConfig::new()
        .with_beta_1(config.beta_1 as f32)
        .with_beta_2(config.beta_2 as f32)
        .with_epsilon(config.epsilon as f32)
        .with_weight_decay(0.0)
        .init();
    let (mut model, mut reference) = (initial.clone(), initial.clone());
    for seed in 0..3 {
        model = ours.step(1e-2, model.clone(), gradients(&model, seed));
        reference = burns.step(1e-2, reference.clone(), gradients(&reference, seed));
    }
    let reference = parameters_by_name(&reference);
    for (name, ours) in parameters_by_name(&model) {
        let difference = largest_difference(&ours, &reference[&name]);
        assert!(difference < 1e-12, "{name}: {difference:e}");
    }

    let record = ours.to_record().into_bytes().expect("serialisable");
    let record = OptimizerRecord::from_bytes(record).expect("intact");
    let mut loaded = adamw(&config, &initial).load_record(record);
    // Saved again before any step, it is still all there.
    let again = OptimizerRecord::from_bytes(loaded.to_record().into_bytes().expect("serialisable"));
    loaded = adamw(&config, &initial).load_record(again.expect("intact"));
    let gradients = || gradients(&model, 9);
    let continued = loaded.step(1e-2, model.clone(), gradients());
    let uninterrupted = ours.step(1e-2, model.clone(), gradients());
    assert_eq!(
        parameters_by_name(&continued),
        parameters_by_name(&uninterrupted)
    );
}

fn corpus(folder: &Path) -> Corpus {
    let path = folder.join("text.txt");
    let mut file = std::fs::File::create(&path).expect("writable");
    for i in 0..200 {
        writeln!(file, "line {i} of a text that is long enough").expect("writable");
    }
    Corpus::open(&[path]).expect("a text")
}

fn numbers(tokens: Tensor<2, Int>) -> Vec<i64> {
    tokens.into_data().iter::<i64>().collect()
}

#[test]
fn a_step_sees_the_same_windows_however_it_is_split() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let windows =
        Arc::new(TrainingWindows::new(corpus(folder.path()).training(), 8, 5).expect("long"));
    let all = |accumulation, first_step| -> Vec<(Vec<i64>, Vec<i64>)> {
        let config = config().with_accumulation(accumulation);
        TrainingLoader::new(windows.clone(), &config, first_step, &device())
            .iter()
            .map(|batch| {
                let batch = batch.expect("in memory");
                (numbers(batch.inputs), numbers(batch.targets))
            })
            .collect()
    };
    let whole = all(1, 1);
    assert_eq!(whole.len(), 6);
    let split = all(2, 1);
    for (step, (inputs, targets)) in whole.iter().enumerate() {
        let parts = &split[2 * step..2 * step + 2];
        assert_eq!(*inputs, [parts[0].0.clone(), parts[1].0.clone()].concat());
        assert_eq!(*targets, [parts[0].1.clone(), parts[1].1.clone()].concat());
        // Within a window the target of a position is the input of the next.
        assert_eq!(inputs[1..8], targets[0..7]);
    }
    assert_eq!(all(1, 4), whole[3..]);
}

#[test]
fn batches_hold_tokens_of_any_vocabulary() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let corpus = corpus(folder.path());
    let tokenizer = BpeTraining::new(300).train(&corpus.training(), |_| ());
    let tokenizer = tokenizer.expect("long enough");
    let file = TokenFile::cached(&corpus, &tokenizer, folder.path(), |_| ());
    let (file, _) = file.expect("the folder is writable");

    let windows = Arc::new(TrainingWindows::new(file.training(), 8, 5).expect("long"));
    let loader = TrainingLoader::new(windows.clone(), &config(), 1, &device());
    let batch = loader.iter().next().expect("a step").expect("in memory");
    let inputs = numbers(batch.inputs);
    assert!(inputs.iter().any(|&token| token > 255));
    let mut window = Vec::new();
    windows.sample(1, 0, &mut window);
    let window: Vec<i64> = window.into_iter().map(i64::from).collect();
    assert_eq!(inputs[..8], window[..8]);
    assert_eq!(numbers(batch.targets)[..8], window[1..]);

    let windows = Arc::new(EvaluationWindows::new(file.held_out(), 8).expect("long"));
    let all: Vec<usize> = (0..windows.len()).collect();
    let loader = EvaluationLoader::new(windows, &all, 4, &device());
    let targets = loader
        .iter()
        .flat_map(|batch| numbers(batch.expect("in memory").targets));
    let targets: Vec<u32> = targets.map(|token| token as u32).collect();
    let held_out = file.held_out();
    assert_eq!(targets, held_out.tokens(1..held_out.len()));
}

#[test]
fn the_held_out_loss_counts_each_byte_once() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let held_out = corpus(folder.path()).held_out();
    let n_bytes = held_out.len();
    let windows = Arc::new(EvaluationWindows::new(held_out, 8).expect("long"));
    let all: Vec<usize> = (0..windows.len()).collect();
    let device = device();
    let model = LanguageModel::new(decoder(&device), 0.3, 0.0);
    let loss = |batch_size| {
        let loader = EvaluationLoader::new(windows.clone(), &all, batch_size, &device);
        assert_eq!(loader.num_items(), all.len());
        let mut n_targets = 0.0;
        let loss = evaluate(&model, &loader, |output, _| {
            n_targets += output.n_targets;
            Ok(())
        });
        assert_eq!(n_targets as usize, n_bytes - 1);
        loss.expect("in memory").loss()
    };
    assert!((loss(1) - loss(4)).abs() < 1e-6);
}

fn trainer(folder: &Path, config: &TrainingConfig, device: &Device) -> Trainer<Decoder> {
    let model = LanguageModel::new(decoder(&device.clone().autodiff()), 0.0, 0.0);
    Trainer {
        config: config.clone(),
        session: Session::new(model, config),
        checkpoints: CheckpointStore::open(&folder.join("checkpoints")).expect("a folder"),
        metrics: MetricsLog::open(folder).expect("a folder"),
    }
}

#[derive(Clone, Default)]
struct Lines(Arc<std::sync::Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("one writer").write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn run(trainer: Trainer<Decoder>, folder: &Path, lines: &Lines) -> (Trainer<Decoder>, Ending) {
    let config = trainer.config.clone();
    let step = trainer.session.counters.step;
    let corpus = corpus(folder);
    let windows = TrainingWindows::new(corpus.training(), config.seq_length, config.seed);
    let device = device();
    let training =
        TrainingLoader::new(Arc::new(windows.expect("long")), &config, step + 1, &device);
    let windows = Arc::new(EvaluationWindows::new(corpus.held_out(), 8).expect("long"));
    let chosen = windows.fixed(config.validation_windows);
    let validation = EvaluationLoader::new(windows, &chosen, config.batch_size, &device);
    let renderer = LineRenderer::new(
        lines.clone(),
        config.steps,
        step,
        config.validate_every,
        Duration::ZERO,
    );
    let watch = Watch {
        renderer: Some(Box::new(renderer)),
        interrupter: Interrupter::new(),
        bytes_per_token: Some(1.0),
    };
    let (trainer, ending) = trainer.train(Arc::new(training), Arc::new(validation), folder, watch);
    (trainer, ending.expect("nothing fails"))
}

#[test]
fn a_run_tells_each_step_and_each_validation() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let lines = Lines::default();
    let (trainer, ending) = run(
        trainer(folder.path(), &config(), &device()),
        folder.path(),
        &lines,
    );
    assert_eq!(ending, Ending::Finished);
    assert_eq!(trainer.session.counters.step, 6);
    let told = String::from_utf8(lines.0.lock().expect("one writer").clone()).expect("text");
    let lines: Vec<&str> = told.lines().collect();
    assert_eq!(lines.len(), 8, "{told}");
    assert!(lines[0].starts_with("step      1/6  loss 5.5"), "{told}");
    assert!(
        lines[3].starts_with("step      3/6  validation: loss 5."),
        "{told}"
    );
    assert!(lines[6].starts_with("step      6/6  loss 5."), "{told}");
    assert!(
        lines[7].starts_with("step      6/6  validation: loss 5."),
        "{told}"
    );
    let records = MetricsLog::read(folder.path().join(MetricsLog::FILE_NAME)).expect("intact");
    let steps: Vec<u64> = records.iter().map(|record| record.step).collect();
    assert_eq!(steps, [1, 2, 3, 4, 5, 6]);
    let validated: Vec<u64> = records
        .iter()
        .filter(|record| record.valid_loss.is_some())
        .map(|record| record.step)
        .collect();
    assert_eq!(validated, [3, 6]);
    // The newest three of 2, 3 (a new best), 4, 6, and whichever is the best.
    let kept = trainer.checkpoints.reader().steps().expect("readable");
    assert_eq!(kept, [3, 4, 6]);
}

#[test]
fn training_learns_a_repetitive_text() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let config = TrainingConfig::new(150, 8, 8)
        .with_learning_rate(1e-2)
        .with_validate_every(150)
        .with_checkpoint_every(150);
    let (_, _) = run(
        trainer(folder.path(), &config, &device()),
        folder.path(),
        &Lines::default(),
    );
    let records = MetricsLog::read(folder.path().join(MetricsLog::FILE_NAME)).expect("intact");
    let last = records.last().expect("150 steps");
    assert!(records[0].train_loss.expect("finite") > 5.0);
    assert!(last.valid_loss.expect("validated") < 2.0, "{last:?}");
}

#[test]
fn a_restored_session_is_the_saved_one() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (done, _) = run(
        trainer(folder.path(), &config(), &device()),
        folder.path(),
        &Lines::default(),
    );
    let expected = parameters_by_name(&done.session.model);
    let counters = done.session.counters.clone();
    drop(done);
    let other = tempfile::tempdir().expect("a temporary folder");
    let fresh = trainer(other.path(), &config(), &device());
    let store = CheckpointStore::open(&folder.path().join("checkpoints")).expect("a folder");
    let loaded = store
        .reader()
        .load_newest()
        .expect("readable")
        .expect("a checkpoint");
    let session = fresh
        .session
        .restore(&loaded.checkpoint, folder.path())
        .expect("it fits");
    assert_eq!(parameters_by_name(&session.model), expected);
    assert_eq!(session.counters, counters);

    let wider = DecoderConfig::new(256, 2, 24, 3).init(&device().autodiff());
    let wider = Session::new(LanguageModel::new(wider, 0.0, 0.0), &config());
    let error = wider
        .restore(&loaded.checkpoint, folder.path())
        .err()
        .expect("it does not fit");
    assert!(
        error.to_string().contains("does not fit this model"),
        "{error}"
    );
}

#[test]
fn configs_name_the_field_that_is_wrong() {
    let message = |config: TrainingConfig| config.validate().expect_err("invalid").to_string();
    assert!(message(config().with_accumulation(3)).contains("accumulation"));
    assert!(message(config().with_learning_rate(f64::NAN)).contains("learning_rate"));
    assert!(message(config().with_beta_2(1.0)).contains("beta_2"));
    assert!(message(TrainingConfig::new(0, 1, 1)).contains("steps"));
    assert!(config().validate().is_ok());
}
