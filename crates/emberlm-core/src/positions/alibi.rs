//! ALiBi: attention with linear biases.

/// The slope of each head: with `n` heads, a power of two, head `h = 1 .. n` has `2^(-8h/n)`.
///
/// Press et al. 2022, <https://arxiv.org/abs/2108.12409>: a score loses the slope times the distance of query and key.
/// Other numbers of heads get the slopes of the next smaller power of two, then every second one of the next larger, as
/// in the authors' code, Bloom and MPT.
///
/// The attention modules and `AttendOptions` of `emberlm-attention` take these numbers. Falcon divides the biases by the
/// root of the head's width, so its slopes are these over that root.
///
/// ```
/// use emberlm_core::alibi_slopes;
///
/// assert_eq!(alibi_slopes(4), [0.25, 0.0625, 0.015625, 0.00390625]);
/// assert_eq!(alibi_slopes(3), [0.0625, 0.00390625, 0.25]);
/// ```
///
/// # Panics
///
/// If there are no heads.
pub fn alibi_slopes(n_heads: usize) -> Vec<f64> {
    assert!(n_heads > 0, "n_heads: ALiBi needs at least one head");
    let smaller = 1 << n_heads.ilog2();
    let of_smaller = geometric(smaller);
    let of_larger = geometric(2 * smaller).step_by(2);
    of_smaller.chain(of_larger).take(n_heads).collect()
}

/// `2^(-8h/n)` for `h = 1 .. n`.
fn geometric(n: usize) -> impl Iterator<Item = f64> {
    (1..=n).map(move |head| (-8.0 * head as f64 / n as f64).exp2())
}
