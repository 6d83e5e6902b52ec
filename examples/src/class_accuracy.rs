//! How many sequences a classifier knows.

use burn::{
    data::dataloader::DataLoader,
    tensor::{DType, s},
};
use emberlm::{
    core::{CrossEntropyConfig, TokenBatch},
    models::SequenceClassifier,
    training::TrainingError,
};

/// The figures of a classifier on some sequences.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ClassAccuracy {
    /// Mean cross-entropy in nats.
    pub loss: f64,
    /// Share of the sequences whose class has the highest score.
    pub accuracy: f64,
}

/// Classifies the sequences of a loader's batches by their first position, where their classes stand as targets. `watch` is
/// told the number of rows of each batch.
///
/// # Errors
///
/// Those of the loader and of `watch`.
pub fn class_accuracy(
    model: &SequenceClassifier,
    loader: &dyn DataLoader<TokenBatch>,
    mut watch: impl FnMut(usize) -> Result<(), TrainingError>,
) -> Result<ClassAccuracy, TrainingError> {
    let (mut nll_sum, mut n_known, mut n_rows) = (0.0, 0, 0);
    for batch in loader.iter() {
        let batch = batch.map_err(|error| TrainingError::Data(error.to_string()))?;
        let targets = batch.targets.slice(s![.., 0..1]).squeeze_dim::<1>(1);
        let scores = model.scores(batch.inputs, None, batch.data, None);
        let found = scores.clone().argmax(1).squeeze_dim::<1>(1).into_data();
        let loss = CrossEntropyConfig::new().forward(scores, targets.clone());
        let nll = loss.nll_sum.into_data().convert_dtype(DType::F64);
        nll_sum += nll.iter::<f64>().sum::<f64>();
        let targets = targets.into_data();
        let known = found.iter::<i64>().zip(targets.iter::<i64>());
        n_known += known.filter(|(found, target)| found == target).count();
        let [rows] = targets.shape()[..] else {
            unreachable!("targets were squeezed to one axis")
        };
        n_rows += rows;
        watch(rows)?;
    }
    Ok(ClassAccuracy {
        loss: nll_sum / n_rows as f64,
        accuracy: n_known as f64 / n_rows as f64,
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use emberlm::{
        models::{EncoderConfig, SequenceClassifierConfig},
        training::{LanguageModel, evaluate},
    };

    use super::*;
    use crate::{CaseLoader, N_NGRAMS, Novel, NovelCases, choose_device};

    #[test]
    fn the_figures_are_those_of_each_case() {
        let (_, device) = choose_device(None).unwrap();
        let novel = |i: u8| Novel {
            name: i.to_string(),
            training: vec![i; 20],
            held_out: (0..20).map(|at| i + 3 * at).collect(),
        };
        let cases = NovelCases::new((0..3).map(novel).collect(), 10, 4, 0).unwrap();
        let encoder = EncoderConfig::new(N_NGRAMS, 1, 12, 3);
        let model = SequenceClassifierConfig::new(encoder, 3).init(&device);
        let loader = CaseLoader::held_out(Arc::new(cases), 11, 4, &device);
        let mut rows = Vec::new();
        let figures = class_accuracy(&model, &loader, |n| {
            rows.push(n);
            Ok(())
        })
        .unwrap();
        assert_eq!(rows, [4, 4, 3]);

        let language_model = LanguageModel::new(model.clone(), 0.0, 0.0);
        let loss = evaluate(&language_model, &loader, |_, _| Ok(()))
            .unwrap()
            .loss();
        assert!((figures.loss - loss).abs() < 1e-6 * loss);
        let mut n_known = 0;
        for batch in loader.iter() {
            let batch = batch.unwrap();
            let scores = model.scores(batch.inputs, None, batch.data, None);
            let scores: Vec<f64> = scores.into_data().iter::<f64>().collect();
            let targets: Vec<i64> = batch.targets.into_data().iter::<i64>().collect();
            for (scores, targets) in scores.chunks(3).zip(targets.chunks(10)) {
                let best = scores.iter().copied().fold(f64::MIN, f64::max);
                n_known += usize::from(scores[targets[0] as usize] == best);
            }
        }
        assert_eq!(figures.accuracy, n_known as f64 / 11.0);
    }
}
