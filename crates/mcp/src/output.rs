//! What commands have printed: the beginning and the end of it, at most so much. An answer shows
//! less than what is kept here, and the rest can be read for a while. It must never hold more than
//! [`ALL`] bytes of commands that have ended.

use std::collections::VecDeque;

use parking_lot::Mutex;

/// Bytes that are kept of a command's beginning, and as many of its end.
const HALF: usize = 1 << 20;
/// Bytes that are kept of all commands that have ended.
const ALL: usize = 64 << 20;

/// What a command has printed.
#[derive(Debug, Default)]
pub(crate) struct Printed {
    head: Vec<u8>,
    tail: VecDeque<u8>,
    total: u64,
}

/// A part of what was printed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Part {
    /// Where it begins: not where it was asked for, if that is not kept.
    pub(crate) offset: u64,
    pub(crate) bytes: Vec<u8>,
}

impl Printed {
    pub(crate) fn add(&mut self, bytes: &[u8]) {
        self.total += bytes.len() as u64;
        let (head, rest) = bytes.split_at(bytes.len().min(HALF - self.head.len()));
        self.head.extend_from_slice(head);
        let rest = &rest[rest.len().saturating_sub(HALF)..];
        let over = (self.tail.len() + rest.len()).saturating_sub(HALF);
        self.tail.drain(..over);
        self.tail.extend(rest);
    }

    /// How much it was.
    pub(crate) fn total(&self) -> u64 {
        self.total
    }

    fn kept(&self) -> usize {
        self.head.len() + self.tail.len()
    }

    /// At most so many bytes from there on, without a gap.
    pub(crate) fn part(&self, offset: u64, most: usize) -> Part {
        let (head, tail) = (self.head.len() as u64, self.total - self.tail.len() as u64);
        if offset < head {
            // What follows the head is the tail, if nothing is left out between them.
            let at = usize::try_from(offset).unwrap_or(usize::MAX);
            let more = if tail == head { self.tail.len() } else { 0 };
            let all = self.head.iter().skip(at).chain(self.tail.iter().take(more));
            return Part { offset, bytes: all.take(most).copied().collect() };
        }
        let offset = offset.clamp(tail, self.total);
        let at = usize::try_from(offset - tail).unwrap_or(usize::MAX);
        Part { offset, bytes: self.tail.iter().skip(at).take(most).copied().collect() }
    }

    /// Its last line that is not empty, at most so many characters of it.
    pub(crate) fn last_line(&self, most: usize) -> Option<String> {
        let from = self.total.saturating_sub(4096);
        let end = self.part(from, 4096).bytes;
        let end = String::from_utf8_lossy(&end);
        let line = end.split(['\n', '\r']).rev().map(str::trim).find(|line| !line.is_empty())?;
        Some(line.chars().filter(|it| !it.is_control()).take(most).collect())
    }

    /// All of it as text, if that is no more than so many bytes; else its beginning and its end,
    /// and between them how much is left out, and how `command` gives it.
    pub(crate) fn shown(&self, most: usize, command: &str) -> (String, u64) {
        let whole = usize::try_from(self.total).is_ok_and(|total| total <= most);
        if whole {
            let all = self.part(0, most).bytes;
            return (String::from_utf8_lossy(&all).into_owned(), 0);
        }
        let half = (most / 2).min(HALF);
        let head = cut_end(self.part(0, half).bytes);
        let tail = cut_begin(self.part(self.total - half as u64, half).bytes);
        let (from, to) = (head.len() as u64, self.total - tail.len() as u64);
        let text = format!(
            "{}\n[… {} bytes are left out here, {from} to {to} of {}: read_output with command_id \
             {command:?} and offset {from} gives them …]\n{}",
            String::from_utf8_lossy(&head).trim_end_matches('\n'),
            to - from,
            self.total,
            String::from_utf8_lossy(&tail),
        );
        (text, to - from)
    }
}

/// How much is looked at for the end of a line.
const LINE: usize = 512;

/// Without the part of a line, or at least of a character, at its end.
fn cut_end(mut bytes: Vec<u8>) -> Vec<u8> {
    let from = bytes.len().saturating_sub(LINE);
    match bytes[from..].iter().rposition(|byte| *byte == b'\n') {
        Some(at) => bytes.truncate(from + at + 1),
        None => bytes.truncate(whole_characters(&bytes)),
    }
    bytes
}

/// Without the part of a line, or at least of a character, at its beginning.
fn cut_begin(mut bytes: Vec<u8>) -> Vec<u8> {
    let line = bytes.iter().take(LINE).position(|byte| *byte == b'\n').map(|at| at + 1);
    let character = || bytes.iter().take(3).take_while(|byte| **byte & 0xc0 == 0x80).count();
    let at = line.unwrap_or_else(character);
    bytes.drain(..at);
    bytes
}

/// How many bytes there are up to a character that is cut off at the end, if one is.
pub(crate) fn whole_characters(bytes: &[u8]) -> usize {
    match std::str::from_utf8(&bytes[bytes.len().saturating_sub(4)..]) {
        Err(error) if error.error_len().is_none() => {
            bytes.len() - (bytes.len().min(4) - error.valid_up_to())
        }
        // It may begin within a character, which is not its end.
        _ => {
            let last = bytes.iter().rev().take(3).position(|byte| *byte & 0xc0 != 0x80);
            let Some(back) = last else { return bytes.len() };
            let at = bytes.len() - 1 - back;
            let long = match bytes[at] {
                0xc0..=0xdf => 2,
                0xe0..=0xef => 3,
                0xf0..=0xff => 4,
                _ => 1,
            };
            if back + 1 < long { at } else { bytes.len() }
        }
    }
}

/// How a command has ended, and what it has printed.
#[derive(Debug)]
pub(crate) struct Kept {
    pub(crate) printed: Printed,
    pub(crate) exit_code: Option<i32>,
}

/// Whose a command was, in which session, and its own name.
type Key = (String, String, String);

/// What commands in the foreground have printed that an answer did not show.
#[derive(Debug, Default)]
pub struct Outputs(Mutex<VecDeque<(Key, Kept)>>);

impl Outputs {
    pub(crate) fn keep(&self, who: &str, session: &str, command: &str, kept: Kept) {
        let mut all = self.0.lock();
        all.push_back(((who.to_owned(), session.to_owned(), command.to_owned()), kept));
        let mut bytes: usize = all.iter().map(|(_, kept)| kept.printed.kept()).sum();
        while bytes > ALL
            && let Some((_, oldest)) = all.pop_front()
        {
            bytes -= oldest.printed.kept();
        }
    }

    /// Looks at what a command has printed, if that is kept.
    pub(crate) fn look<T>(
        &self,
        (who, session, command): (&str, &str, &str),
        look: impl FnOnce(&Kept) -> T,
    ) -> Option<T> {
        let all = self.0.lock();
        let found = all.iter().find(|((its, of, id), _)| {
            (its.as_str(), of.as_str(), id.as_str()) == (who, session, command)
        });
        found.map(|(_, kept)| look(kept))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn printed(text: &[u8]) -> Printed {
        let mut printed = Printed::default();
        for piece in text.chunks(1000) {
            printed.add(piece);
        }
        printed
    }

    #[test]
    fn what_is_short_is_shown_whole() {
        assert_eq!(printed(b"one\ntwo\n").shown(100, "c"), ("one\ntwo\n".to_owned(), 0));
        assert_eq!(printed(b"").shown(100, "c"), (String::new(), 0));
        assert_eq!(printed(b"a\n \nlast \r\n\n").last_line(3), Some("las".to_owned()));
    }

    #[test]
    fn of_what_is_long_the_middle_is_left_out_and_can_be_read() {
        let text: String = (0..5000).map(|n| format!("line {n}\n")).collect();
        let all = printed(text.as_bytes());
        let (shown, left_out) = all.shown(1000, "c");
        assert!(shown.starts_with("line 0\n") && shown.ends_with("line 4999\n"));
        assert!(shown.len() < 1200 && shown.contains("command_id \"c\""), "{shown}");
        let marker = shown.lines().find(|line| line.starts_with('[')).unwrap_or_default();
        let from: u64 = marker
            .split("offset ")
            .nth(1)
            .and_then(|it| it.split(' ').next())
            .and_then(|it| it.parse().ok())
            .unwrap_or_default();
        let rest = all.part(from, usize::MAX);
        assert_eq!(rest.offset, from);
        // Whole lines on both sides of it.
        assert!(text.as_bytes()[..usize::try_from(from).unwrap_or(0)].ends_with(b"\n"));
        assert_eq!(&rest.bytes, &text.as_bytes()[usize::try_from(from).unwrap_or(0)..]);
        assert!(marker.contains(&format!("{left_out} bytes")));
    }

    #[test]
    fn it_keeps_no_more_than_its_ends() {
        let mut all = Printed::default();
        for n in 0..5_u8 {
            all.add(&vec![n; HALF]);
        }
        all.add(b"end");
        assert_eq!((all.total(), all.kept()), (5 * HALF as u64 + 3, 2 * HALF));
        let gone = all.part(HALF as u64, 10);
        assert_eq!((gone.offset, gone.bytes), (4 * HALF as u64 + 3, vec![4; 10]));
        assert_eq!(all.part(u64::MAX, 10), Part { offset: all.total(), bytes: Vec::new() });
        assert_eq!(all.part(HALF as u64 - 2, 10).bytes, [0, 0]);
    }

    #[test]
    fn no_character_is_cut() {
        let text = "äöü€🦀".repeat(400);
        for most in 100..120 {
            let (shown, _) = printed(text.as_bytes()).shown(most, "c");
            assert!(!shown.contains('\u{fffd}'), "{most}: {shown}");
        }
        assert_eq!(whole_characters("aä".as_bytes()), 3);
        assert_eq!(whole_characters(&"aä".as_bytes()[..2]), 1);
        assert_eq!(whole_characters(&"🦀🦀".as_bytes()[..7]), 4);
        assert_eq!(whole_characters(b""), 0);
    }

    #[test]
    fn one_caller_does_not_see_what_another_has() {
        let outputs = Outputs::default();
        let kept = Kept { printed: printed(b"x"), exit_code: Some(0) };
        outputs.keep("a", "s", "c", kept);
        assert!(outputs.look(("a", "s", "c"), |_| ()).is_some());
        for (who, session, command) in [("b", "s", "c"), ("a", "t", "c"), ("a", "s", "d")] {
            assert!(outputs.look((who, session, command), |_| ()).is_none());
        }
    }

    #[test]
    fn the_oldest_make_room() {
        let outputs = Outputs::default();
        for n in 0..100 {
            let kept = Kept { printed: printed(&vec![0; 2 * HALF]), exit_code: None };
            outputs.keep("a", "s", &n.to_string(), kept);
        }
        let there = |n: u32| outputs.look(("a", "s", &n.to_string()), |_| ()).is_some();
        assert!(!there(67) && there(68) && there(99));
    }
}
