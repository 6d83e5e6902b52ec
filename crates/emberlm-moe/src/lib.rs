//! Mixtures of experts: every published router and balance loss by name, dropless and with a capacity.
//!
//! A token's way through a [`MixtureOfExperts`]:
//!
//! 1. The [`Router`] scores the experts, chooses, and weighs the choice: a [`Routing`].
//! 2. A [`Capacity`], if there is one, drops what an expert has no room for.
//! 3. [`Dispatch`] sorts the tokens by expert.
//! 4. The [`Experts`] compute, where the [`Placement`] says, by
//!    [`grouped_matmul`](emberlm_core::operators::grouped_matmul).
//! 5. [`Dispatch`] adds the weighted outputs up by token.
//!
//! Beside the hidden states come losses, unweighted, and statistics: a [`BalanceLoss`], [`z_loss`], [`importance_loss`],
//! [`load_loss`].

mod balance;
mod capacity;
mod dispatch;
mod experts;
mod layer;
mod placement;
mod router;
mod upcycle;

pub use balance::{BalanceLoss, Counting, importance_loss, load_loss, z_loss};
pub use capacity::{Capacity, CapacityScope, CapacitySize, DropPriority, Renormalisation};
pub use dispatch::Dispatch;
pub use emberlm_core::{Choice, Choices};
pub use experts::{Experts, ExpertsConfig, GroupedLinear};
pub use layer::{
    BiasUpdate, MixtureOfExperts, MixtureOfExpertsConfig, SharedExpert, SharedExpertConfig,
};
pub use placement::{Local, LocalBy, Placement};
pub use router::{
    Chance, Draws, Gates, GroupScore, Groups, Method, Noise, Router, RouterConfig, RouterInput,
    Routing, Scoring,
};
pub use upcycle::UpcycleError;
