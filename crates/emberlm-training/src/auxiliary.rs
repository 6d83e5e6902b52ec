//! The weights of the losses that layers with experts have.

use burn::config::Config;
use emberlm_core::{AuxiliaryKind, InvalidConfig};

/// The weights of the auxiliary losses of layers that route their tokens. They matter where a model has such losses.
#[derive(Config, Debug, Copy, PartialEq)]
pub struct AuxiliaryWeights {
    /// Of the balance loss. Switch Transformer: 0.01. Default: 0.01.
    #[config(default = 0.01)]
    pub balance: f64,
    /// Of the loss that keeps a router's logits small. ST-MoE: 0.001. Default: 0.001.
    #[config(default = 1e-3)]
    pub router_z: f64,
    /// Of the loss by the sums of the gates. Shazeer et al. 2017: 0.1. Default: 0.1.
    #[config(default = 0.1)]
    pub importance: f64,
    /// Of the loss by the expected load. Shazeer et al. 2017: 0.1. Default: 0.1.
    #[config(default = 0.1)]
    pub load: f64,
}

impl AuxiliaryWeights {
    /// No auxiliary loss counts.
    pub fn none() -> Self {
        Self {
            balance: 0.0,
            router_z: 0.0,
            importance: 0.0,
            load: 0.0,
        }
    }

    /// The weight of a kind.
    pub fn of(&self, kind: AuxiliaryKind) -> f64 {
        match kind {
            AuxiliaryKind::Balance => self.balance,
            AuxiliaryKind::RouterZ => self.router_z,
            AuxiliaryKind::Importance => self.importance,
            AuxiliaryKind::Load => self.load,
        }
    }

    /// Checks the fields.
    ///
    /// # Errors
    ///
    /// A weight that is negative or no number.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        for (field, value) in [
            ("auxiliary.balance", self.balance),
            ("auxiliary.router_z", self.router_z),
            ("auxiliary.importance", self.importance),
            ("auxiliary.load", self.load),
        ] {
            if !(value.is_finite() && value >= 0.0) {
                return Err(InvalidConfig::Range {
                    field,
                    range: "a number of at least 0",
                    value,
                });
            }
        }
        Ok(())
    }
}
