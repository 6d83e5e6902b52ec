//! Patterns as words: the same that the command line takes.

use std::fmt::{self, Display, Formatter, Write};

use super::{
    BlockPlan, Blockwise, Dilated, Fixed, Global, Pattern, RandomBlocks, Reach, Strided, Window,
};

/// The words that [`Pattern`]'s `FromStr` reads, so that a printed pattern can be given to a program.
impl Display for Pattern {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full => f.write_str("full"),
            Self::Causal => f.write_str("causal"),
            Self::Window(window) => write!(f, "window:{window}"),
            Self::Dilated(Dilated { window, dilation }) => {
                let Window { back, ahead } = window;
                if back == ahead {
                    write!(f, "dilated:{back}:{dilation}")
                } else {
                    write!(f, "dilated:{back}:{ahead}:{dilation}")
                }
            }
            Self::Strided(strided) => strided.fmt(f),
            Self::Fixed(fixed) => fixed.fmt(f),
            Self::Blockwise(blockwise) => blockwise.fmt(f),
            Self::Global(global) => write!(f, "global:{global}"),
            Self::GlobalQueries(global) => write!(f, "global-queries:{global}"),
            Self::GlobalKeys(global) => write!(f, "global-keys:{global}"),
            Self::Random(random) => random.fmt(f),
            Self::Blocks(plan) => plan.fmt(f),
            Self::Prefix(n) => write!(f, "prefix:{n}"),
            Self::Documents => f.write_str("documents"),
            Self::Sinks(n) => write!(f, "sinks:{n}"),
            Self::And(patterns) => joined(f, patterns, " & "),
            Self::Or(patterns) => joined(f, patterns, " | "),
            Self::Not(pattern) => {
                f.write_char('!')?;
                in_parentheses(f, pattern)
            }
            Self::PerHead(patterns) => {
                f.write_str("heads(")?;
                for (head, pattern) in patterns.iter().enumerate() {
                    let separator = if head == 0 { "" } else { ", " };
                    write!(f, "{separator}{pattern}")?;
                }
                f.write_char(')')
            }
        }
    }
}

fn joined(f: &mut Formatter<'_>, patterns: &[Pattern], operator: &str) -> fmt::Result {
    for (i, pattern) in patterns.iter().enumerate() {
        if i > 0 {
            f.write_str(operator)?;
        }
        in_parentheses(f, pattern)?;
    }
    Ok(())
}

/// Parentheses around every combination within another: nobody has to know whether `&` or `|` binds closer.
fn in_parentheses(f: &mut Formatter<'_>, pattern: &Pattern) -> fmt::Result {
    match pattern {
        Pattern::And(_) | Pattern::Or(_) => write!(f, "({pattern})"),
        _ => pattern.fmt(f),
    }
}

impl Display for Window {
    /// `n` for `n` keys to each side, else `back:ahead`.
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { back, ahead } = self;
        if back == ahead {
            write!(f, "{back}")
        } else {
            write!(f, "{back}:{ahead}")
        }
    }
}

impl Display for Strided {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Merged { stride } => write!(f, "strided:{stride}"),
            Self::Local { stride } => write!(f, "strided-local:{stride}"),
            Self::Column { stride } => write!(f, "strided-column:{stride}"),
        }
    }
}

impl Display for Fixed {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let (name, stride, n_summary, sub_index) = match *self {
            Self::Local { stride } => return write!(f, "fixed-local:{stride}"),
            Self::Merged {
                stride,
                n_summary,
                sub_index,
            } => ("fixed", stride, n_summary, sub_index),
            Self::Summary {
                stride,
                n_summary,
                sub_index,
            } => ("fixed-summary", stride, n_summary, sub_index),
        };
        write!(f, "{name}:{stride}:{n_summary}")?;
        if sub_index > 0 {
            write!(f, ":{sub_index}")?;
        }
        Ok(())
    }
}

impl Display for Blockwise {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self {
            block,
            look_back,
            look_ahead,
        } = self;
        match (look_back, look_ahead) {
            (0, 0) => write!(f, "blockwise:{block}"),
            (_, 0) => write!(f, "blockwise:{block}:{look_back}"),
            _ => write!(f, "blockwise:{block}:{look_back}:{look_ahead}"),
        }
    }
}

impl Display for Global {
    /// What follows the colon: positions, `none`, `..n` or `batch`.
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Positions(positions) if positions.is_empty() => f.write_str("none"),
            Self::Positions(positions) => with_commas(f, positions),
            Self::First(n) => write!(f, "..{n}"),
            Self::Last(n) => write!(f, "-{n}"),
            Self::Batch => f.write_str("batch"),
        }
    }
}

impl Display for BlockPlan {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "blocks:{}:", self.block)?;
        for (i, row) in self.rows.iter().enumerate() {
            if i > 0 {
                f.write_char('/')?;
            }
            with_commas(f, row)?;
        }
        Ok(())
    }
}

fn with_commas(f: &mut Formatter<'_>, numbers: &[usize]) -> fmt::Result {
    for (i, number) in numbers.iter().enumerate() {
        let separator = if i == 0 { "" } else { "," };
        write!(f, "{separator}{number}")?;
    }
    Ok(())
}

impl Display for RandomBlocks {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self {
            block,
            n_blocks,
            seed,
            reach,
        } = self;
        let name = match reach {
            Reach::Everywhere => "random",
            Reach::Past => "random-past",
        };
        write!(f, "{name}:{block}:{n_blocks}")?;
        if *seed > 0 {
            write!(f, ":{seed}")?;
        }
        Ok(())
    }
}
