//! Shows what the experts of a trained model have specialised in.
//!
//! cargo run --release --example experts -- --run runs/0001

use std::{fs, path::PathBuf, process::ExitCode};

use burn::tensor::{Device, Int, Tensor, TensorData};
use clap::Parser;
use emberlm::core::{CrossEntropyConfig, LossModel, TokenBatch};
use emberlm_examples::{
    ClassifiedText, ExpertClasses, Information, LoadedRun, RunModel, Stop, Work, by_character,
    by_part_of_speech, check_writable, choose_device, draw_attention, exit_with, say, shipped,
    write_json,
};
use serde::Serialize;

/// Show which tokens the experts of a trained model get
#[derive(Parser)]
#[command(version)]
struct Args {
    /// The run's folder
    #[arg(long, value_name = "DIR")]
    run: PathBuf,
    /// A text, whose tokens have the kinds of their characters for classes [default: the last tenth of the novels that
    /// come with the repository]
    #[arg(long, value_name = "FILE", conflicts_with = "tagged")]
    text: Option<PathBuf>,
    /// Words with their parts of speech, word/tag as in the Brown corpus: a file, or a folder of files
    #[arg(long, value_name = "FILE|DIR")]
    tagged: Option<PathBuf>,
    /// Tokens of the text that are read at most
    #[arg(long, value_name = "N", default_value_t = 100_000)]
    tokens: usize,
    /// Random orders of the classes that the experts are compared with
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..))]
    shuffles: u16,
    /// Where the map of experts and classes goes [default: specialisation.png in the run's folder]
    #[arg(long, value_name = "FILE.png")]
    png: Option<PathBuf>,
    /// Where the figures go too
    #[arg(long, value_name = "FILE.json")]
    report: Option<PathBuf>,
    /// Device, such as flex, ndarray, vulkan:0
    #[arg(long)]
    device: Option<String>,
}

/// What was found of a layer.
#[derive(Serialize)]
struct LayerReport {
    layer: usize,
    classes: Vec<String>,
    /// Choices of each expert for each class.
    counts: Vec<Vec<u64>>,
    mutual_information_bits: f64,
    shuffled_mean_bits: f64,
    shuffled_most_bits: f64,
    class_entropy_bits: f64,
}

type AnyError = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    emberlm::kernels::keep_freed_memory();
    exit_with(experts(&Args::parse()))
}

fn experts(args: &Args) -> Result<(), AnyError> {
    let (device_name, device) = choose_device(args.device.as_deref())?;
    if let Some(path) = &args.report {
        check_writable("--report", path)?;
    }
    let run = LoadedRun::load(&args.run, &device)?;
    let text = text(args)?;
    let tokens = Tokens::new(&run, &text, args.tokens);
    let length = run.config.training.seq_length;
    if tokens.ids.len() < length {
        return Err(format!(
            "the text has {} tokens, a sequence of the run {length}: give a longer one",
            tokens.ids.len()
        )
        .into());
    }
    let model: &dyn LossModel = match &run.model {
        RunModel::Decoder(model) => model,
        RunModel::Encoder(model) => model,
        RunModel::EncoderDecoder(_) => return Err(run.unfit(&args.run)),
    };
    if model.n_routed_layers() == 0 {
        return Err(format!(
            "{} has no experts: take a run of --preset moe-tiny",
            args.run.display()
        )
        .into());
    }
    say(format_args!("device: {device_name}"));
    let stop = Stop::on_signals()?;
    let layers = read(model, &tokens, &text, length, &device, &stop)?;
    let reports: Vec<LayerReport> = (layers.iter())
        .map(|(layer, classes)| {
            let information = classes.information(usize::from(args.shuffles), 0);
            LayerReport::new(*layer, classes, &text, &information)
        })
        .collect();
    for report in &reports {
        report.say();
    }
    let png = (args.png.clone()).unwrap_or_else(|| args.run.join("specialisation.png"));
    draw(&reports, &png)?;
    if let Some(path) = &args.report {
        write_json(path, &reports)?;
    }
    say(format_args!("\nmap: {}", png.display()));
    Ok(())
}

fn text(args: &Args) -> Result<ClassifiedText, AnyError> {
    if let Some(path) = &args.tagged {
        return Ok(by_part_of_speech(path)?);
    }
    let path = args.text.clone().unwrap_or_else(|| shipped("austen.txt"));
    let whole =
        fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let text = match args.text {
        Some(_) => whole,
        // What a run on it has not seen.
        None => {
            let mut begin = whole.len() / 10 * 9;
            while !whole.is_char_boundary(begin) {
                begin += 1;
            }
            whole[begin..].to_owned()
        }
    };
    Ok(by_character(text))
}

/// Tokens, and the class of each: that of its first byte that is no space, where it has one.
struct Tokens {
    ids: Vec<u32>,
    classes: Vec<u32>,
}

impl Tokens {
    fn new(run: &LoadedRun, text: &ClassifiedText, most: usize) -> Self {
        let mut ids = run.tokenizer.encode(&text.text);
        ids.truncate(most);
        let bytes = text.text.as_bytes();
        let mut first = 0;
        let classes = ids.iter().map(|id| {
            let length = run.tokenizer.decode_bytes(&[*id]).len();
            let end = (first + length).min(bytes.len());
            let of_token = first..end;
            let named = of_token.clone().find(|byte| bytes[*byte] != b' ');
            let byte = named.unwrap_or(of_token.start.min(bytes.len() - 1));
            first = end;
            text.classes[byte]
        });
        let classes = classes.collect();
        Self { ids, classes }
    }
}

/// The choices of all layers that route, over whole sequences of the text.
fn read(
    model: &dyn LossModel,
    tokens: &Tokens,
    text: &ClassifiedText,
    length: usize,
    device: &Device,
    stop: &Stop,
) -> Result<Vec<(usize, ExpertClasses)>, AnyError> {
    let mut layers: Vec<(usize, ExpertClasses)> = Vec::new();
    let n_sequences = tokens.ids.len() / length;
    let mut work = Work::new("reading the text", "sequences").on_standard_error();
    for sequence in 0..n_sequences {
        let range = sequence * length..(sequence + 1) * length;
        let ids: Vec<i64> = tokens.ids[range.clone()]
            .iter()
            .map(|id| i64::from(*id))
            .collect();
        let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [1, length]), device);
        // What the targets are does not matter: it is the way that is looked at.
        let batch = TokenBatch::new(ids.clone(), ids);
        let loss = model.loss(batch, &CrossEntropyConfig::new());
        for routing in loss.routing {
            let n_experts = routing.choices.n_experts();
            let known = layers.iter().position(|(layer, _)| *layer == routing.layer);
            let i = known.unwrap_or_else(|| {
                let classes = ExpertClasses::new(n_experts, text.names.len());
                layers.push((routing.layer, classes));
                layers.len() - 1
            });
            layers[i]
                .1
                .add(&routing.choices, &tokens.classes[range.clone()]);
        }
        work.tell(sequence as u64 + 1, n_sequences as u64);
        if stop.requested() {
            return Err("stopped before the text was read".into());
        }
    }
    Ok(layers)
}

impl LayerReport {
    fn new(
        layer: usize,
        classes: &ExpertClasses,
        text: &ClassifiedText,
        information: &Information,
    ) -> Self {
        Self {
            layer,
            classes: text.names.clone(),
            counts: classes.counts(),
            mutual_information_bits: information.bits,
            shuffled_mean_bits: information.shuffled_mean,
            shuffled_most_bits: information.shuffled_most,
            class_entropy_bits: information.of_classes,
        }
    }

    /// Share of each class's choices that went to each expert, over the share of all choices: 1 is no preference.
    fn preferences(&self) -> Vec<Vec<f64>> {
        let total: u64 = self.counts.iter().flatten().sum();
        let of_class = |class: usize| -> u64 { self.counts.iter().map(|of| of[class]).sum() };
        let row = |of: &Vec<u64>| {
            let share = of.iter().sum::<u64>() as f64 / total as f64;
            let classes = of.iter().enumerate();
            let preference = |(class, count): (usize, &u64)| match of_class(class) {
                0 => 0.0,
                n => *count as f64 / n as f64 / share.max(f64::MIN_POSITIVE),
            };
            classes.map(preference).collect()
        };
        self.counts.iter().map(row).collect()
    }

    fn say(&self) {
        say(format_args!(
            "\nlayer {}: the expert tells {:.4} of {:.4} bits of the class; shuffled {:.4}, at most {:.4}",
            self.layer,
            self.mutual_information_bits,
            self.class_entropy_bits,
            self.shuffled_mean_bits,
            self.shuffled_most_bits
        ));
        for (expert, (preferences, counts)) in
            self.preferences().iter().zip(&self.counts).enumerate()
        {
            let mut order: Vec<usize> = (0..preferences.len())
                .filter(|class| counts[*class] > 0)
                .collect();
            order.sort_by(|a, b| preferences[*b].total_cmp(&preferences[*a]));
            let best = order.iter().take(3);
            let best =
                best.map(|class| format!("{} {:.2}", self.classes[*class], preferences[*class]));
            say(format_args!(
                "  expert {expert}: {} choices; most above its share: {}",
                counts.iter().sum::<u64>(),
                best.collect::<Vec<_>>().join(", ")
            ));
        }
    }
}

/// A row for each expert of each layer, a column for each class; the darkest is twice the share or more.
fn draw(reports: &[LayerReport], png: &std::path::Path) -> Result<(), AnyError> {
    let (mut rows, mut names) = (Vec::new(), Vec::new());
    for report in reports {
        for (expert, preferences) in report.preferences().iter().enumerate() {
            rows.push(
                preferences
                    .iter()
                    .map(|x| (x / 2.0) as f32)
                    .collect::<Vec<f32>>(),
            );
            names.push(format!("layer {} expert {expert}", report.layer));
        }
    }
    let classes = reports.first().map_or(&[][..], |report| &report.classes);
    Ok(draw_attention(&rows, classes, &names, png)?)
}
