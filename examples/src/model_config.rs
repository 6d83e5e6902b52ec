//! The model of a run, of whichever architecture.

use emberlm::{
    core::{BatchData, InvalidConfig, Lengths, Pattern},
    models::{
        DecoderConfig, EncoderConfig, EncoderDecoderConfig, ExpertLayers, LayerAttention,
        PositionsConfig,
    },
};
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{DeserializeOwned, Error},
};
use serde_json::{Map, Value};

use crate::ObjectiveKind;

/// The configuration of a run's model. In JSON the field `architecture` says which it is; where it is missing, as in
/// runs before there were several, it is a decoder.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "architecture")]
pub enum ModelConfig {
    /// Writes on.
    Decoder(DecoderConfig),
    /// Reads in both directions.
    Encoder(EncoderConfig),
    /// Reads a source and writes.
    EncoderDecoder(EncoderDecoderConfig),
}

/// The field of JSON that says which it is.
pub(crate) const ARCHITECTURE: &str = "architecture";

/// A field of JSON, and what is wrong with it.
pub(crate) struct FieldError {
    pub(crate) field: String,
    pub(crate) message: String,
}

/// Evaluates an expression for whichever configuration it is.
macro_rules! of_any {
    ($model:expr, $config:ident => $value:expr) => {
        match $model {
            ModelConfig::Decoder($config) => $value,
            ModelConfig::Encoder($config) => $value,
            ModelConfig::EncoderDecoder($config) => $value,
        }
    };
}

impl ModelConfig {
    /// As JSON has it.
    pub fn architecture(&self) -> &'static str {
        match self {
            Self::Decoder(_) => "Decoder",
            Self::Encoder(_) => "Encoder",
            Self::EncoderDecoder(_) => "EncoderDecoder",
        }
    }

    /// What a model of this architecture is trained for.
    pub fn objective(&self) -> ObjectiveKind {
        match self {
            Self::Decoder(_) => ObjectiveKind::Causal,
            Self::Encoder(_) => ObjectiveKind::Masked,
            Self::EncoderDecoder(_) => ObjectiveKind::Spans,
        }
    }

    /// The configuration of a decoder, if it is one.
    pub fn decoder(self) -> Option<DecoderConfig> {
        match self {
            Self::Decoder(config) => Some(config),
            _ => None,
        }
    }

    /// Checks the fields against each other.
    ///
    /// # Errors
    ///
    /// Those of the configuration that it is.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        of_any!(self, config => config.validate())
    }

    /// Which blocks have experts.
    pub(crate) fn experts_mut(&mut self) -> &mut Option<ExpertLayers> {
        of_any!(self, config => &mut config.experts)
    }

    /// What a token sees, in each block; of an encoder-decoder in its encoder.
    fn patterns(&self) -> Vec<Pattern> {
        let (layers, pattern) = match self {
            Self::Decoder(config) => (&config.layers, config.pattern.clone()),
            Self::Encoder(config) => (&config.layers, Some(config.pattern.clone())),
            Self::EncoderDecoder(config) => (&config.encoder_layers, None),
        };
        match layers {
            Some(layers) => layers.iter().map(LayerAttention::visible).collect(),
            None => pattern.into_iter().collect(),
        }
    }

    /// Checks what tokens see in sequences of this length, which bring nothing but tokens.
    ///
    /// # Errors
    ///
    /// Positions and dilations that no sequence reaches, or a pattern that the batch would have to decide.
    pub fn check_patterns(&self, seq_length: usize) -> Result<(), InvalidConfig> {
        let lengths =
            Lengths::square(seq_length).with_n_heads(of_any!(self, config => config.n_heads));
        let field = match self {
            Self::Decoder(_) | Self::Encoder(_) => "pattern",
            Self::EncoderDecoder(_) => "encoder_layers",
        };
        self.patterns().iter().try_for_each(|pattern| {
            let checked = pattern.check(&lengths, &BatchData::new());
            let checked = checked.and_then(|()| pattern.check_longest(seq_length));
            checked.map_err(|source| InvalidConfig::Pattern { field, source })
        })
    }

    /// Number of tokens that the model knows.
    pub fn vocab_size(&self) -> usize {
        of_any!(self, config => config.vocab_size)
    }

    /// Changes the number of tokens.
    pub fn set_vocab_size(&mut self, vocab_size: usize) {
        of_any!(self, config => config.vocab_size = vocab_size);
    }

    /// Changes the seed.
    pub fn set_seed(&mut self, seed: u64) {
        of_any!(self, config => config.seed = seed);
    }

    /// Longest sequence that has positions; nothing where positions know no limit.
    pub fn max_seq_length(&self) -> Option<usize> {
        of_any!(self, config => config.positions.max_seq_length())
    }

    /// Changes the number of learned positions, where they are learned.
    pub fn set_max_seq_length(&mut self, length: usize) {
        let positions = of_any!(self, config => &mut config.positions);
        if let PositionsConfig::Learned { max_seq_length } = positions {
            *max_seq_length = length;
        }
    }

    /// The model that the fields of JSON describe.
    pub(crate) fn from_fields(mut fields: Map<String, Value>) -> Result<Self, FieldError> {
        let architecture = fields.remove(ARCHITECTURE);
        let architecture = architecture.as_ref().map(Value::as_str);
        let fields = Value::Object(fields);
        match architecture {
            None | Some(Some("Decoder")) => parse_value(&fields).map(Self::Decoder),
            Some(Some("Encoder")) => parse_value(&fields).map(Self::Encoder),
            Some(Some("EncoderDecoder")) => parse_value(&fields).map(Self::EncoderDecoder),
            Some(_) => Err(FieldError {
                field: ARCHITECTURE.to_owned(),
                message: "expected Decoder, Encoder or EncoderDecoder".to_owned(),
            }),
        }
    }
}

impl<'de> Deserialize<'de> for ModelConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let fields = Map::deserialize(deserializer)?;
        Self::from_fields(fields).map_err(|FieldError { field, message }| {
            D::Error::custom(format!("{field}: {message}"))
        })
    }
}

/// Any configuration from JSON; the error names the field.
pub(crate) fn parse_value<T: DeserializeOwned>(value: &Value) -> Result<T, FieldError> {
    serde_path_to_error::deserialize(value).map_err(|error| FieldError {
        field: error.path().to_string(),
        message: error.inner().to_string(),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(value: Value) -> Result<ModelConfig, String> {
        serde_json::from_value(value).map_err(|error| error.to_string())
    }

    #[test]
    fn what_is_written_says_which_it_is_and_is_read_again() {
        let models = [
            ModelConfig::Decoder(DecoderConfig::new(256, 2, 12, 3)),
            ModelConfig::Encoder(EncoderConfig::new(257, 3, 12, 3)),
            ModelConfig::EncoderDecoder(EncoderDecoderConfig::new(300, 1, 2, 12, 3)),
        ];
        for model in models {
            let written = serde_json::to_value(&model).expect("plain data");
            assert_eq!(written["architecture"], model.architecture());
            assert_eq!(written["vocab_size"], model.vocab_size());
            let again = read(written.clone()).expect("it was written");
            assert_eq!(serde_json::to_value(&again).expect("plain data"), written);
        }
    }

    #[test]
    fn a_model_without_an_architecture_is_a_decoder() {
        let mut fields =
            serde_json::to_value(DecoderConfig::new(256, 2, 12, 3)).expect("plain data");
        assert_eq!(fields.get(ARCHITECTURE), None);
        assert_eq!(
            read(fields.clone()).expect("a decoder").architecture(),
            "Decoder"
        );
        fields[ARCHITECTURE] = json!("Perceptron");
        let error = read(fields).expect_err("there is no such");
        assert!(
            error.contains("Decoder, Encoder or EncoderDecoder"),
            "{error}"
        );
    }
}
