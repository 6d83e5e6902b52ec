//! Random cases that are the same in every run.

use proptest::{prelude::ProptestConfig, test_runner::RngSeed};

/// As many cases as proptest's `PROPTEST_CASES` says, over `divisor`.
///
/// They are the same in every run, so that equal code passes equally often; others by `PROPTEST_RNG_SEED`.
pub fn same_cases(divisor: u32) -> ProptestConfig {
    let config = ProptestConfig::default();
    ProptestConfig {
        cases: config.cases.div_ceil(divisor),
        failure_persistence: None,
        rng_seed: match config.rng_seed {
            RngSeed::Random => RngSeed::Fixed(1),
            given => given,
        },
        ..config
    }
}
