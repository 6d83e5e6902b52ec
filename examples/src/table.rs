//! Tables as text, and numbers in them.

pub(crate) const MIB: f64 = 1024.0 * 1024.0;

/// The text of a value, `-` if it is missing.
pub(crate) fn cell<T>(value: Option<T>, text: impl Fn(T) -> String) -> String {
    value.map_or("-".into(), text)
}

/// The number with commas between thousands: `12,345`.
pub(crate) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let groups: Vec<_> = digits.as_bytes().rchunks(3).rev().collect();
    String::from_utf8_lossy(&groups.join(&b',')).into_owned()
}

/// The time in seconds below two minutes, in minutes below two hours, in hours from there on.
pub(crate) fn duration(seconds: f64) -> String {
    match seconds {
        ..120.0 => format!("{seconds:.1} s"),
        ..7200.0 => format!("{:.1} min", seconds / 60.0),
        _ => format!("{:.1} h", seconds / 3600.0),
    }
}

/// The rows in columns: the first one, the names, flush left, numbers flush right.
pub(crate) fn aligned<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: [usize; N] = std::array::from_fn(|column| width(column).unwrap_or(0));
    let line = |row: &[String; N]| {
        let mut line = format!("{:<1$}", row[0], widths[0]);
        for (text, width) in row.iter().zip(widths).skip(1) {
            line += &format!("  {text:>width$}");
        }
        line + "\n"
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_to_be_read() {
        assert_eq!(
            [0, 999, 1000, 1_234_567].map(grouped),
            ["0", "999", "1,000", "1,234,567"]
        );
        let times = [0.0, 119.9, 120.0, 7199.0, 7200.0].map(duration);
        assert_eq!(times, ["0.0 s", "119.9 s", "2.0 min", "120.0 min", "2.0 h"]);
    }
}
