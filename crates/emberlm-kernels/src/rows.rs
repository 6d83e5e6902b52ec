//! Rows shared among threads, and sums over them that do not depend on the number of threads.

use std::ops::Range;

use rayon::prelude::*;

/// Elements below which one thread is faster than two.
const SERIAL: usize = 1 << 14;
/// Into how many parts sums over rows are cut at most.
const MAX_PARTS: usize = 16;
/// Rows that are summed one after another. Sums of such sums are more exact than one long sum.
const BLOCK: usize = 128;

/// Calls `work` with ranges that cover `n_rows` rows of `width` elements, on all threads of the pool.
pub fn for_each_range(n_rows: usize, width: usize, work: impl Fn(Range<usize>) + Sync) {
    // Nothing depends on the ranges: two for each thread, so that one that is late is helped.
    in_parts(n_rows, width, 2 * rayon::current_num_threads(), work);
}

/// Calls `work` with ranges as [`for_each_range`] does, and joins the results from the first to the last, so that a sum
/// does not depend on the number of threads. Nothing for no rows.
pub fn sum_ranges<T: Send>(
    n_rows: usize,
    width: usize,
    work: impl Fn(Range<usize>) -> T + Sync,
    join: impl Fn(T, T) -> T + Sync,
) -> Option<T> {
    let part = |Range { start, end }| {
        let blocks = (start..end).step_by(BLOCK);
        let sums = blocks.map(|first| work(first..end.min(first + BLOCK)));
        sums.reduce(&join)
    };
    let sums = in_parts(n_rows, width, MAX_PARTS, part);
    sums.into_iter().flatten().reduce(join)
}

/// The results of `most` ranges, or of fewer that are worth a thread.
fn in_parts<T: Send>(
    n_rows: usize,
    width: usize,
    most: usize,
    work: impl Fn(Range<usize>) -> T + Sync,
) -> Vec<T> {
    let rows_a_part = n_rows.div_ceil(most).max(SERIAL.div_ceil(2 * width.max(1)));
    let range = |part: usize| part * rows_a_part..n_rows.min((part + 1) * rows_a_part);
    let n_parts = n_rows.div_ceil(rows_a_part);
    match n_rows * width <= SERIAL {
        true => (0..n_parts).map(|part| work(range(part))).collect(),
        false => {
            let parts = (0..n_parts).into_par_iter().with_max_len(1);
            parts.map(|part| work(range(part))).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_cover_all_rows_once_and_in_order() {
        for (n_rows, width) in [
            (0, 5),
            (1, 1),
            (7, 100_000),
            (1000, 384),
            (100_000, 1),
            (3, 0),
        ] {
            let covered = sum_ranges(
                n_rows,
                width,
                |range| range.collect::<Vec<_>>(),
                |a, b| [a, b].concat(),
            );
            assert_eq!(covered.unwrap_or_default(), (0..n_rows).collect::<Vec<_>>());
        }
    }
}
