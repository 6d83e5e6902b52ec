//! Training on a disk that fails at every single operation of a checkpoint, and training that does not stay finite.

mod common;

use std::{fs, path::Path, sync::Arc, time::Duration};

use burn::{
    tensor::{Device, Tensor, s},
    train::Interrupter,
};
use common::{Place, TEXT, assert_same, assert_same_weights, checkpoints, metrics};
use emberlm::{
    models::{Decoder, DecoderConfig, PositionsConfig, save_weights},
    training::{
        CheckpointError, CheckpointStore, Corpus, Disk, Ending, EvaluationLoader,
        EvaluationWindows, Fault, FaultyDisk, LanguageModel, LineRenderer, MAX_SKIPPED_IN_A_ROW,
        MetricsLog, RunFolder, Session, Storage, Trainer, TrainingConfig, TrainingError,
        TrainingLoader, TrainingWindows, Watch,
    },
};
use emberlm_examples::choose_device;

/// A small training run, to be done again and again.
struct Setup {
    place: Place,
    device: Device,
    model: DecoderConfig,
    config: TrainingConfig,
    keep_last: usize,
}

/// A trainer after its training, and how that ended.
type Trained = (Trainer<Decoder>, Result<Ending, TrainingError>);

const SEQ_LENGTH: usize = 8;

impl Setup {
    /// Six steps, with checkpoints after each second one and after each that is validated and the best so far.
    fn new() -> Self {
        let positions = PositionsConfig::Learned {
            max_seq_length: SEQ_LENGTH,
        };
        Self {
            place: Place::new(),
            device: choose_device(None).expect("a device").1,
            model: DecoderConfig::new(256, 1, 8, 2)
                .with_positions(positions)
                .with_dropout(0.1),
            config: TrainingConfig::new(6, 4, SEQ_LENGTH)
                .with_accumulation(2)
                .with_checkpoint_every(2)
                .with_validate_every(3)
                .with_validation_windows(2),
            keep_last: 3,
        }
    }

    /// Makes the folder of a run that was killed after step 4 and whose newest checkpoint was damaged then.
    fn damage(&self, whole: &str, run: &str) {
        self.place.copy(whole, run);
        let checkpoints = self.place.path(run).join(RunFolder::CHECKPOINTS);
        fs::remove_dir_all(checkpoints.join("step-00000006")).expect("it was saved");
        let file = checkpoints.join("step-00000004").join("state.json");
        let content = fs::read(&file).expect("it was saved");
        fs::write(&file, &content[1..]).expect("writable");
    }

    /// Begins a run, or goes on, and reaches the end.
    fn finishes(&self, run: &Path, disk: impl Storage + 'static) {
        fs::create_dir_all(run).expect("writable");
        let trained = self.train(self.init(), run, Arc::new(disk));
        let (_, ending) = trained.expect("no fault");
        assert_eq!(ending.expect("no fault"), Ending::Finished);
    }

    fn init(&self) -> Decoder {
        self.model.init(&self.device.clone().autodiff())
    }

    /// Begins a run in a folder, or goes on from its newest intact checkpoint, as the program does.
    fn train(
        &self,
        model: Decoder,
        run: &Path,
        disk: Arc<dyn Storage>,
    ) -> Result<Trained, TrainingError> {
        let config = &self.config;
        let mut session = Session::new(LanguageModel::new(model, 0.0, 0.0), config);
        let checkpoints = CheckpointStore::open_on(&run.join(RunFolder::CHECKPOINTS), disk)?;
        if let Some(loaded) = checkpoints.reader().load_newest()? {
            session = session.restore(&loaded.checkpoint, checkpoints.reader().dir())?;
        }
        let step = session.counters.step;
        let log = run.join(MetricsLog::FILE_NAME);
        if log.exists() {
            MetricsLog::truncate_after(&log, step)?;
        }
        let corpus = Corpus::open(&[self.place.path(TEXT)])?;
        let windows = TrainingWindows::new(corpus.training(), config.seq_length, config.seed)?;
        let training = TrainingLoader::new(Arc::new(windows), config, step + 1, &self.device);
        let windows = Arc::new(EvaluationWindows::new(
            corpus.held_out(),
            config.seq_length,
        )?);
        let chosen = windows.fixed(config.validation_windows);
        let validation = EvaluationLoader::new(windows, &chosen, config.batch_size, &self.device);
        let trainer = Trainer {
            config: config.clone(),
            session,
            checkpoints: checkpoints.with_keep_last(self.keep_last),
            metrics: MetricsLog::open(run)?,
        };
        let every = config.validate_every;
        let lines = LineRenderer::new(std::io::sink(), config.steps, step, every, Duration::MAX);
        let watch = Watch {
            renderer: Some(Box::new(lines)),
            interrupter: Interrupter::new(),
            bytes_per_token: Some(1.0),
        };
        let trained = trainer.train(Arc::new(training), Arc::new(validation), run, watch);
        save_weights(
            &trained.0.session.model.model,
            &run.join(RunFolder::WEIGHTS),
        )
        .expect("the folder is writable");
        Ok(trained)
    }
}

#[test]
fn a_kill_at_any_operation() {
    survives_at_every_operation(Fault::Killed, Beginning::New);
}

#[test]
fn a_kill_within_any_write() {
    survives_at_every_operation(Fault::TornWrite, Beginning::New);
}

#[test]
fn a_power_failure_that_loses_contents() {
    survives_at_every_operation(Fault::LostContents, Beginning::New);
}

#[test]
fn a_power_failure_that_loses_names() {
    survives_at_every_operation(Fault::LostEntries, Beginning::New);
}

#[test]
fn a_full_disk_at_any_operation() {
    survives_at_every_operation(Fault::DiskFull, Beginning::New);
}

#[test]
fn a_kill_while_a_damaged_checkpoint_is_replaced() {
    survives_at_every_operation(Fault::Killed, Beginning::Damaged);
}

/// What a training finds in its folder.
#[derive(Clone, Copy, PartialEq)]
enum Beginning {
    /// Nothing.
    New,
    /// A run whose newest checkpoint is damaged.
    Damaged,
}

/// Trains on a disk with a fault at its first operation, then at its second, and so on to the last; after each of
/// them training goes on, on a disk without a fault, to what an undisturbed run reaches.
fn survives_at_every_operation(fault: Fault, beginning: Beginning) {
    let mut setup = Setup::new();
    let undisturbed = setup.place.path("undisturbed");
    setup.keep_last = usize::MAX;
    setup.finishes(&undisturbed, Disk);
    let published = checkpoints(&undisturbed);
    assert!(
        published.len() >= 3 && published.contains(&4),
        "{published:?}"
    );
    setup.keep_last = 3;

    let mut n_faults = 0;
    for at in 0.. {
        let name = format!("{fault:?}-{at}");
        let run = setup.place.path(&name);
        match beginning {
            Beginning::New => fs::create_dir(&run).expect("free"),
            Beginning::Damaged => setup.damage("undisturbed", &name),
        }
        let disk = Arc::new(FaultyDisk::new(fault, at));
        let trained = setup.train(setup.init(), &run, disk.clone());
        let ending = trained.and_then(|(_, ending)| ending);
        if !disk.struck() {
            assert_eq!(ending.expect("no fault"), Ending::Finished);
            break;
        }
        n_faults += 1;
        let error = ending.expect_err("training must notice the fault");
        if fault == Fault::DiskFull {
            assert_says_disk_full(&error);
        }
        assert_nothing_published_is_lost(&run, &published);

        // The real disk, but it does not wait for syncs, of which there are thousands here.
        setup.finishes(&run, FaultyDisk::new(Fault::Killed, usize::MAX));
        assert_same(&run, &undisturbed);
        assert_eq!(checkpoints(&run).last(), Some(&6));
        fs::remove_dir_all(&run).expect("writable");
    }
    println!("{fault:?} at each of {n_faults} operations");
    // Each checkpoint has a folder, three files, a manifest, their syncs and a rename.
    assert!(n_faults > 20, "{n_faults} operations cannot be all");
}

fn assert_says_disk_full(error: &TrainingError) {
    let message = error.to_string();
    match error {
        TrainingError::Checkpoint(CheckpointError::DiskFull { .. }) => {
            assert!(
                message.contains("the previous checkpoint is intact"),
                "{message}"
            );
        }
        TrainingError::Checkpoint(CheckpointError::Cleanup { .. }) => {
            assert!(message.contains("is saved"), "{message}");
        }
        other => panic!("{other}"),
    }
    assert!(
        message.contains("the disk is full") && !message.contains('\n'),
        "{message}"
    );
}

/// Checks that the newest intact checkpoint is at least the last one before the step that failed.
fn assert_nothing_published_is_lost(run: &Path, published: &[u64]) {
    if !run.join(MetricsLog::FILE_NAME).exists() {
        return;
    }
    let failed = metrics(run).last().expect("a step").step;
    let before = published.iter().rev().find(|step| **step < failed);
    let store = CheckpointStore::open(&run.join(RunFolder::CHECKPOINTS)).expect("no fault");
    let newest = store.reader().load_newest().expect("readable");
    let newest = newest.map(|loaded| loaded.checkpoint.step);
    assert!(
        newest >= before.copied(),
        "{newest:?} after a fault in step {failed}"
    );
}

#[test]
fn ten_steps_in_a_row_that_are_not_finite_save_and_stop() {
    let mut setup = Setup::new();
    setup.config = setup
        .config
        .with_checkpoint_every(50)
        .with_validate_every(50);
    setup.config.steps = 50;
    let mut model = setup.init();
    model.embedding.tokens.weight = model
        .embedding
        .tokens
        .weight
        .map(|weight| leaf(weight * f32::NAN));
    let [before, run] = ["before", "run"].map(|name| setup.place.path(name));
    fs::create_dir(&before).expect("free");
    fs::create_dir(&run).expect("free");
    save_weights(&model, &before.join(RunFolder::WEIGHTS)).expect("writable");

    let (trainer, ending) = setup.train(model, &run, Arc::new(Disk)).expect("no fault");
    assert_eq!(ending.expect("no fault"), Ending::Diverged);
    let counters = &trainer.session.counters;
    assert_eq!(
        (counters.step, counters.skipped),
        (MAX_SKIPPED_IN_A_ROW, MAX_SKIPPED_IN_A_ROW)
    );
    assert_eq!(checkpoints(&run), [MAX_SKIPPED_IN_A_ROW]);
    let steps = metrics(&run);
    assert_eq!(steps.len() as u64, MAX_SKIPPED_IN_A_ROW);
    assert!(
        steps
            .iter()
            .all(|step| step.skipped && step.train_loss.is_none()),
        "{steps:?}"
    );
    assert_same_weights(&run, &before);
}

#[test]
fn a_step_that_is_not_finite_is_skipped_and_counted() {
    let mut setup = Setup::new();
    setup
        .place
        .write(TEXT, common::words(3000).replace(" h", " #"));
    setup.model = setup.model.with_tied_embedding(false);
    setup.config = setup.config.with_checkpoint_every(1);
    setup.config.steps = 30;
    setup.keep_last = usize::MAX;
    // What reads this character is not finite; what does not read it is.
    let mut model = setup.init();
    let row = usize::from(b'#');
    let poison = |weight: Tensor<2>| leaf(weight.slice_fill(s![row..=row, ..], f32::NAN));
    model.embedding.tokens.weight = model.embedding.tokens.weight.map(poison);
    let run = setup.place.path("run");
    fs::create_dir(&run).expect("free");
    let (trainer, ending) = setup.train(model, &run, Arc::new(Disk)).expect("no fault");
    assert_eq!(ending.expect("no fault"), Ending::Finished);

    let steps = metrics(&run);
    let skipped: Vec<bool> = steps.iter().map(|step| step.skipped).collect();
    let n_skipped = skipped.iter().filter(|skipped| **skipped).count();
    assert!(
        n_skipped > 2 && n_skipped < 28,
        "both kinds are wanted: {skipped:?}"
    );
    assert_eq!(trainer.session.counters.skipped, n_skipped as u64);
    for step in &steps {
        assert_eq!(step.skipped, step.train_loss.is_none(), "{step:?}");
        assert!(step.skipped || step.gradient_norm.is_some(), "{step:?}");
    }
    // A skipped step leaves weights and optimizer as they were, any other changes both.
    let reader = trainer.checkpoints.reader();
    let states: Vec<_> = (1..=30)
        .map(|step| reader.load(step).expect("it was saved").files)
        .collect();
    for (pair, skipped) in states.windows(2).zip(&skipped[1..]) {
        for file in ["model.bpk", "optimizer.bpk"] {
            assert_eq!(pair[0][file] == pair[1][file], *skipped, "{file}");
        }
    }
}

/// A tensor as a parameter holds it: with a gradient of its own.
fn leaf(tensor: Tensor<2>) -> Tensor<2> {
    tensor.detach().require_grad()
}

#[test]
fn a_program_whose_training_diverges_says_so() {
    let place = Place::new();
    let config = common::SMALL.replace(r#""batch_size""#, r#""learning_rate": 1e30, "batch_size""#);
    place.write("diverges.json", config);
    let args = ["--config", "diverges.json", "--text", TEXT, "--out", "run"];
    let ended = place.run("pretrain", &args);
    assert_eq!(ended.code(), Some(1), "{ended:?}");
    assert_eq!(ended.stderr.lines().count(), 1, "{ended:?}");
    for mention in ["error: 10 steps in a row", "learning rate", "--resume run"] {
        assert!(
            ended.stderr.contains(mention),
            "{mention:?} is missing in {ended:?}"
        );
    }
    let run = place.path("run");
    let steps = metrics(&run);
    assert!(
        steps.iter().rev().take(10).all(|step| step.skipped),
        "{steps:?}"
    );
    assert!(steps.len() < 40 && !steps[0].skipped, "{steps:?}");
    assert_eq!(
        checkpoints(&run).last(),
        steps.last().map(|step| &step.step)
    );
}
