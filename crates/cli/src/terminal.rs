//! What output may look like where it goes: colours and cut columns for people at a terminal, and
//! neither in a pipe.

use anstream::{AutoStream, ColorChoice};
use anstyle::{AnsiColor, Style};
use rustix::termios::tcgetwinsize;

/// Heads of columns.
pub const HEAD: Style = Style::new().bold();
/// What is well, what lacks something, and what fails.
pub const WELL: Style = AnsiColor::Green.on_default();
pub const LACK: Style = AnsiColor::Yellow.on_default();
pub const FAIL: Style = AnsiColor::Red.on_default().bold();

/// How many columns standard output has, if it is a terminal.
pub fn columns() -> Option<usize> {
    tcgetwinsize(std::io::stdout()).ok().map(|size| size.ws_col.into()).filter(|it| *it > 0)
}

/// Text in a style, if standard output is to have any (NO_COLOR, CLICOLOR, CLICOLOR_FORCE, TERM).
pub fn styled(text: &str, style: Style) -> String {
    if AutoStream::choice(&std::io::stdout()) == ColorChoice::Never {
        text.to_owned()
    } else {
        format!("{style}{text}{style:#}")
    }
}

/// The least that a column is cut to.
const LEAST: usize = 6;

/// Makes columns narrower, the widest first, until they fit into `room` with two blanks between
/// them, or none can be made narrower.
pub fn fit(widths: &mut [usize], room: usize) {
    let blanks = 2 * widths.len().saturating_sub(1);
    loop {
        let all: usize = widths.iter().sum();
        let Some(widest) = widths.iter_mut().max().filter(|it| **it > LEAST) else { return };
        if all + blanks <= room {
            return;
        }
        *widest -= 1;
    }
}

/// Text in so many columns: cut with a mark, or with blanks after it.
pub fn cell(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return format!("{text:<width$}");
    }
    let mut cut: String = text.chars().take(width.saturating_sub(1)).collect();
    cut.push('…');
    cut
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_widest_columns_give_way() {
        let mut widths = [4, 36, 10, 40];
        fit(&mut widths, 80);
        assert_eq!(widths.iter().sum::<usize>() + 6, 80);
        assert_eq!((widths[0], widths[2]), (4, 10));
        // Where nothing can be done, nothing is.
        fit(&mut widths, 1);
        assert_eq!(widths, [4, LEAST, LEAST, LEAST]);
        fit(&mut [], 0);
    }

    #[test]
    fn what_is_cut_says_so() {
        assert_eq!(cell("name", 6), "name  ");
        assert_eq!(cell("grüße und mehr", 6), "grüße…");
    }
}
