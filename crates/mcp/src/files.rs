//! Files of a session. A path is absolute there, or relative to where commands start.

use std::io::Cursor;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use denizen_client::api::{Entry, escape_path};
use denizen_client::{Client, Error, NewProcess, RunEvent, empty, path};
use http_body_util::BodyExt;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::call::{Call, Place};
use crate::failure::{Failure, Result};
use crate::tools::Done;

/// Bytes of text that are given at once.
const SHOWN: usize = 64 * 1024;
/// Lines, if nothing is said.
const LINES: u64 = 2000;
/// Bytes of a file that is taken as a whole.
pub(crate) const WHOLE: usize = 1 << 20;
/// Bytes of a file that can be edited.
const EDITED: usize = 8 << 20;
/// Entries of a folder that are listed.
pub(crate) const ENTRIES: usize = 1000;
/// Lines that a search gives, if nothing is said; and at most.
const MATCHES: usize = 100;
const MOST_MATCHES: usize = 1000;
/// Characters of one of them.
const MATCH: usize = 400;

/// A path as the daemon has it: what is relative begins where commands start.
fn at(path: &str) -> Result<String> {
    if path.is_empty() {
        return Err(Failure::new("`path` is empty"));
    }
    Ok(match path {
        "~" | "." => "~/".to_owned(),
        path if path.starts_with('/') || path.starts_with("~/") => path.to_owned(),
        path => format!("~/{path}"),
    })
}

/// How much is read of a file.
pub(crate) struct Content {
    pub(crate) bytes: Vec<u8>,
    /// All that it has.
    pub(crate) size: u64,
}

/// Reads the beginning of a file until `enough`, or all of it.
pub(crate) async fn fetch(
    client: &Client,
    session: &str,
    at: &str,
    mut enough: impl FnMut(&[u8]) -> bool,
) -> std::result::Result<Content, Error> {
    let slash = if at.starts_with('/') { "" } else { "/" };
    let path = path(session, &format!("/files{slash}{}", escape_path(at.as_bytes())));
    let response = client.request("GET", &path, None, empty()).await?;
    let size = response.headers().get("content-length");
    let size = size.and_then(|size| size.to_str().ok()?.parse().ok());
    let mut body = response.into_body();
    let mut bytes = Vec::new();
    while !enough(&bytes)
        && let Some(frame) = body.frame().await
    {
        let frame = frame.map_err(|error| Error::Answer(error.to_string()))?;
        if let Some(data) = frame.data_ref() {
            bytes.extend_from_slice(data);
        }
    }
    let size = size.unwrap_or(bytes.len() as u64);
    Ok(Content { bytes, size })
}

/// Whether these bytes, or those that they begin with, are no text.
fn is_binary(bytes: &[u8]) -> bool {
    bytes.iter().take(8192).any(|byte| *byte == 0)
}

/// See the tool.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ReadFile {
    /// Absolute, or relative to the session's working directory.
    path: String,
    /// The session's name; the one of this client, if none is named.
    session: Option<String>,
    /// The first line to give, from 1.
    #[schemars(range(min = 1))]
    offset: Option<u64>,
    /// At most so many lines, 2000 if nothing is said.
    #[schemars(range(min = 1))]
    limit: Option<u64>,
    /// Give all of it in base64, at most 1 MiB; for what is no text.
    #[serde(default)]
    base64: bool,
}

/// A part of a file.
#[derive(Serialize, JsonSchema)]
pub(crate) struct FileRead {
    path: String,
    /// The lines as they are in the file, or all of it in base64.
    content: String,
    /// The first line that is given; none if there is none, or in base64.
    first_line: Option<u64>,
    /// The last one.
    last_line: Option<u64>,
    /// Whether the file has no more.
    at_end: bool,
    /// Bytes of the file.
    size: u64,
}

pub(crate) async fn read_file(call: &Call<'_>, input: ReadFile) -> Result<Done<FileRead>> {
    let place = call.place(input.session.as_deref()).await?;
    let at = at(&input.path)?;
    if input.base64 {
        return read_whole(call, &place, input.path, &at).await;
    }
    let first = input.offset.unwrap_or(1).max(1);
    let limit = input.limit.unwrap_or(LINES).max(1);
    let mut lines = Lines::new(first, limit);
    let content = call
        .within(&place, || {
            let mut lines = Lines::new(first, limit);
            let (client, session, at) = (call.client(), &place.session, &at);
            async move { fetch(client, session, at, |bytes| lines.found(bytes)).await }
        })
        .await?;
    if is_binary(&content.bytes) {
        let text = format!(
            "{} is no text ({} bytes): `base64` gives its content, or look at it with run_command \
             (file, xxd)",
            input.path, content.size
        );
        return Err(Failure(text));
    }
    lines.found(&content.bytes);
    let is_whole = content.bytes.len() as u64 >= content.size;
    let Some((from, mut to, count)) = lines.given(&content.bytes, is_whole) else {
        let text = format!("{} has {} lines only", input.path, lines.ends.len());
        return Err(Failure(text));
    };
    let mut at_end = is_whole && to == content.bytes.len();
    let mut last = first + count - 1;
    let mut cut = false;
    if to - from > SHOWN {
        // As many whole lines as there is room for; of a line that is too long, a part.
        let ends = lines.ends.iter().copied().take_while(|end| *end <= from + SHOWN);
        let before = usize::try_from(first - 1).unwrap_or(usize::MAX);
        let fits = ends.skip(before).enumerate().last();
        (to, last) = match fits {
            Some((line, end)) => (end, first + line as u64),
            None => (from + SHOWN, first),
        };
        at_end = false;
        cut = fits.is_none();
    }
    let text = String::from_utf8_lossy(&content.bytes[from..to]).into_owned();
    let mut shown = text.clone();
    if !at_end {
        let gap = if shown.ends_with('\n') { "" } else { "\n" };
        let rest = if cut {
            format!("; the line goes on: run_command reads it, as `sed -n {first}p FILE | cut -c…`")
        } else {
            String::new()
        };
        let next = last + 1;
        shown.push_str(&format!("{gap}[lines {first} to {last}{rest}; offset {next} reads on]"));
    }
    let given = count > 0;
    let data = FileRead {
        path: input.path,
        content: text,
        first_line: given.then_some(first),
        last_line: given.then_some(last),
        at_end,
        size: content.size,
    };
    Ok(Done::new(shown, data))
}

async fn read_whole(
    call: &Call<'_>,
    place: &Place,
    path: String,
    at: &str,
) -> Result<Done<FileRead>> {
    let whole = || fetch(call.client(), &place.session, at, |bytes| bytes.len() > WHOLE);
    let content = call.within(place, whole).await?;
    if content.bytes.len() > WHOLE {
        let text =
            format!("{path} has {} bytes, and in base64 there are {WHOLE} at most", content.size);
        return Err(Failure(text));
    }
    let content = FileRead {
        path,
        content: STANDARD.encode(&content.bytes),
        first_line: None,
        last_line: None,
        at_end: true,
        size: content.size,
    };
    Ok(Done::new(content.content.clone(), content))
}

/// Where the lines of a file end, as far as it has been read.
struct Lines {
    /// The first that is wanted, from 1, and how many.
    first: u64,
    limit: u64,
    seen: usize,
    ends: Vec<usize>,
}

impl Lines {
    fn new(first: u64, limit: u64) -> Self {
        Self { first, limit, seen: 0, ends: Vec::new() }
    }

    /// Looks at what is new; says whether no more is needed.
    fn found(&mut self, bytes: &[u8]) -> bool {
        let new = bytes.get(self.seen..).unwrap_or_default();
        self.ends.extend(memchr::memchr_iter(b'\n', new).map(|at| self.seen + at + 1));
        self.seen = bytes.len();
        let last = self.first.saturating_add(self.limit);
        let begin = self.end_of(self.first - 1);
        self.ends.len() as u64 >= last
            || begin.is_some_and(|begin| bytes.len() > begin + SHOWN)
            || is_binary(bytes)
    }

    /// Where a line ends; 0 is what is before the first.
    fn end_of(&self, line: u64) -> Option<usize> {
        match usize::try_from(line).unwrap_or(usize::MAX) {
            0 => Some(0),
            line => self.ends.get(line - 1).copied(),
        }
    }

    /// From where to where the wanted lines are, and how many; none if the file ends before.
    fn given(&self, bytes: &[u8], is_whole: bool) -> Option<(usize, usize, u64)> {
        let from = self.end_of(self.first - 1)?;
        if from == bytes.len() && is_whole {
            // An empty file is read as well as any.
            return (self.first == 1).then_some((0, 0, 0));
        }
        let last = self.first.saturating_add(self.limit) - 1;
        if let Some(to) = self.end_of(last) {
            return Some((from, to, self.limit));
        }
        let ended = self.ends.len() as u64;
        let open = u64::from(self.ends.last().copied().unwrap_or(0) < bytes.len());
        Some((from, bytes.len(), ended + open + 1 - self.first))
    }
}

/// See the tool.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct WriteFile {
    /// Absolute, or relative to the session's working directory.
    path: String,
    /// All that the file is to have.
    content: String,
    /// `content` is in base64.
    #[serde(default)]
    base64: bool,
    /// The session's name; the one of this client, if none is named.
    session: Option<String>,
}

/// A file that was written.
#[derive(Serialize, JsonSchema)]
pub(crate) struct FileWritten {
    /// From the session's root.
    path: String,
    size: u64,
}

pub(crate) async fn write_file(call: &Call<'_>, input: WriteFile) -> Result<Done<FileWritten>> {
    let place = call.place(input.session.as_deref()).await?;
    let bytes = if input.base64 {
        let bytes = STANDARD.decode(input.content.trim());
        bytes.map_err(|error| Failure::new(format!("`content` is no base64: {error}")))?
    } else {
        input.content.into_bytes()
    };
    let entry = write(call, &place, &at(&input.path)?, bytes).await?;
    let text = format!("{} was written, {} bytes.", entry.path, entry.size);
    Ok(Done::new(text, FileWritten { path: entry.path, size: entry.size }))
}

async fn write(call: &Call<'_>, place: &Place, at: &str, bytes: Vec<u8>) -> Result<Entry> {
    let bytes = bytes::Bytes::from(bytes);
    call.within(place, || call.client().write_file(&place.session, at, Cursor::new(bytes.clone())))
        .await
}

/// See the tool.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct EditFile {
    /// Absolute, or relative to the session's working directory.
    path: String,
    /// What is there, exactly, with all of its white space.
    old_text: String,
    /// What is to be there.
    new_text: String,
    /// Replace it wherever it is, not once.
    #[serde(default)]
    replace_all: bool,
    /// The session's name; the one of this client, if none is named.
    session: Option<String>,
}

/// A file that was edited.
#[derive(Serialize, JsonSchema)]
pub(crate) struct FileEdited {
    /// From the session's root.
    path: String,
    /// How often the text was replaced.
    replaced: usize,
    /// The lines at which that began, at most ten of them.
    lines: Vec<usize>,
}

pub(crate) async fn edit_file(call: &Call<'_>, input: EditFile) -> Result<Done<FileEdited>> {
    let place = call.place(input.session.as_deref()).await?;
    let at = at(&input.path)?;
    let whole = || fetch(call.client(), &place.session, &at, |bytes| bytes.len() > EDITED);
    let content = call.within(&place, whole).await?;
    if content.bytes.len() > EDITED {
        let text = format!("{} has {} bytes: that is too much to edit", input.path, content.size);
        return Err(Failure(text));
    }
    let Ok(before) = String::from_utf8(content.bytes) else {
        return Err(Failure(format!("{} is no text in UTF-8", input.path)));
    };
    let (after, lines) = replace(&before, &input)?;
    let replaced = lines.len();
    let entry = write(call, &place, &at, after.into_bytes()).await?;
    let lines: Vec<usize> = lines.into_iter().take(10).collect();
    let text = format!("{}: replaced {replaced} times, at line {}.", entry.path, listed(&lines));
    Ok(Done::new(text, FileEdited { path: entry.path, replaced, lines }))
}

fn listed(lines: &[usize]) -> String {
    lines.iter().take(10).map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// The text after an edit, and the lines at which it was replaced.
fn replace(before: &str, input: &EditFile) -> Result<(String, Vec<usize>)> {
    let (old, new) = (input.old_text.as_str(), input.new_text.as_str());
    if old.is_empty() {
        return Err(Failure::new("`old_text` is empty: write_file writes a whole file"));
    }
    if old == new {
        return Err(Failure::new("`old_text` and `new_text` are the same: nothing to do"));
    }
    let line = |at: usize| before[..at].matches('\n').count() + 1;
    let lines: Vec<usize> = before.match_indices(old).map(|(at, _)| line(at)).take(1001).collect();
    match lines.len() {
        0 => Err(Failure(format!("`old_text` is not in {}: {}", input.path, hint(before, old)))),
        1 => Ok((before.replacen(old, new, 1), lines)),
        _ if input.replace_all && lines.len() <= 1000 => Ok((before.replace(old, new), lines)),
        many => {
            let at = listed(&lines);
            let more = if many > 10 { ", …" } else { "" };
            let text = format!(
                "`old_text` is in {} more than once, at the lines {at}{more}: add lines around it \
                 so that it is there once, or set `replace_all` (for up to 1000 places)",
                input.path
            );
            Err(Failure(text))
        }
    }
}

/// What a text that is not there may have been meant to be.
fn hint(before: &str, old: &str) -> String {
    let bare = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let Some(first) = old.lines().map(bare).find(|line| !line.is_empty()) else {
        return "it is only white space".to_owned();
    };
    let alike = before.lines().enumerate().find(|(_, line)| bare(line) == first);
    match alike {
        Some((at, line)) if !old.contains(line) => format!(
            "line {} is the same as its first line but for white space, and is {line:?}",
            at + 1
        ),
        Some((at, _)) => format!(
            "its first line is line {} of the file, but what follows there is something else: \
             read_file shows it",
            at + 1
        ),
        None => "nor is its first line; read_file shows what is there".to_owned(),
    }
}

/// See the tool.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ListFiles {
    /// Absolute, or relative to the session's working directory, which it is if none is named.
    path: Option<String>,
    /// The session's name; the one of this client, if none is named.
    session: Option<String>,
}

/// What is in a folder.
#[derive(Serialize, JsonSchema)]
pub(crate) struct Files {
    /// At most 1000.
    files: Vec<FileInfo>,
    /// How many there are more.
    omitted: usize,
}

/// A file, a folder or whatever else is there.
#[derive(Serialize, JsonSchema)]
pub(crate) struct FileInfo {
    name: String,
    /// From the session's root.
    path: String,
    /// `file`, `folder`, `symlink`, `fifo`, `socket` or `device`.
    kind: String,
    /// Bytes of its content.
    size: u64,
    /// Its permissions, in octal digits.
    mode: String,
    /// When its content was last changed, in seconds since 1970.
    modified_at: f64,
}

impl From<Entry> for FileInfo {
    fn from(entry: Entry) -> Self {
        let Entry { name, path, kind, size, mode, modified_at, .. } = entry;
        Self { name, path, kind, size, mode, modified_at }
    }
}

pub(crate) async fn list_files(call: &Call<'_>, input: ListFiles) -> Result<Done<Files>> {
    let place = call.place(input.session.as_deref()).await?;
    let at = at(input.path.as_deref().unwrap_or("."))?;
    let mut all = call.within(&place, || call.client().list(&place.session, &at)).await?;
    let omitted = all.len().saturating_sub(ENTRIES);
    all.truncate(ENTRIES);
    let mut text = String::new();
    for entry in &all {
        let mark = match (entry.kind.as_str(), &entry.target) {
            ("folder", _) => "/".to_owned(),
            (_, Some(target)) => format!(" -> {target}"),
            _ => String::new(),
        };
        text.push_str(&format!("{:>10}  {}{mark}\n", entry.size, entry.name));
    }
    if omitted > 0 {
        text.push_str(&format!("[{omitted} more: run_command with ls lists them]\n"));
    }
    if text.is_empty() {
        "[nothing is there]".clone_into(&mut text);
    }
    let files = all.into_iter().map(FileInfo::from).collect();
    Ok(Done::new(text, Files { files, omitted }))
}

/// See the tool.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct SearchFiles {
    /// An extended regular expression.
    pattern: String,
    /// Where to search: absolute, or relative to the session's working directory, which it is if
    /// none is named.
    path: Option<String>,
    /// Only files whose names match this, as `*.rs`.
    glob: Option<String>,
    /// Upper and lower case are the same.
    #[serde(default)]
    ignore_case: bool,
    /// The pattern is plain text.
    #[serde(default)]
    literal: bool,
    /// At most so many lines, 100 if nothing is said.
    #[schemars(range(min = 1, max = 1000))]
    max_matches: Option<usize>,
    /// The session's name; the one of this client, if none is named.
    session: Option<String>,
}

/// Lines that match.
#[derive(Serialize, JsonSchema)]
pub(crate) struct Matches {
    matches: Vec<Match>,
    /// Whether there are more.
    more: bool,
}

/// A line that matches.
#[derive(Serialize, JsonSchema)]
pub(crate) struct Match {
    path: String,
    line: u64,
    /// It, or the beginning of it.
    text: String,
}

pub(crate) async fn search_files(call: &Call<'_>, input: SearchFiles) -> Result<Done<Matches>> {
    let place = call.place(input.session.as_deref()).await?;
    call.known(&place).await?;
    let mut words: Vec<String> =
        ["grep", "-rInsH", "--null", "--exclude-dir=.git"].map(str::to_owned).into();
    words.push(if input.literal { "-F" } else { "-E" }.to_owned());
    if input.ignore_case {
        words.push("-i".to_owned());
    }
    if let Some(glob) = input.glob {
        words.push(format!("--include={glob}"));
    }
    let from = input.path.unwrap_or_else(|| ".".to_owned());
    let from = if from == "~" { "." } else { from.strip_prefix("~/").unwrap_or(&from) };
    words.extend(["-e".to_owned(), input.pattern, "--".to_owned(), from.to_owned()]);
    let most = input.max_matches.unwrap_or(MATCHES).clamp(1, MOST_MATCHES);
    let new = NewProcess { timeout_seconds: Some(60), ..NewProcess::command(words) };
    // Dropped with enough of it read, it is killed.
    let mut run = call.client().run(&place.session, &new).await?;
    let mut printed = Vec::new();
    let mut lines = 0;
    let code = loop {
        match run.next().await? {
            Some(RunEvent::Output(piece)) => {
                lines += memchr::memchr_iter(b'\n', &piece.bytes).count();
                printed.extend_from_slice(&piece.bytes);
                if lines > most || printed.len() > WHOLE {
                    break 0;
                }
            }
            Some(RunEvent::Exit(ended)) => break ended.code,
            Some(_) => {}
            None => break 0,
        }
    };
    let text = String::from_utf8_lossy(&printed);
    if code > 1 {
        return Err(Failure(format!("the search failed: {}", text.trim())));
    }
    let mut matches: Vec<Match> = text.lines().filter_map(matched).take(most + 1).collect();
    let more = matches.len() > most || printed.len() > WHOLE;
    matches.truncate(most);
    let mut text = String::new();
    for Match { path, line, text: matched } in &matches {
        text.push_str(&format!("{path}:{line}:{matched}\n"));
    }
    if more {
        text.push_str("[there are more: narrow the search, or raise max_matches]\n");
    }
    if text.is_empty() {
        "[nothing matches]".clone_into(&mut text);
    }
    Ok(Done::new(text, Matches { matches, more }))
}

fn matched(line: &str) -> Option<Match> {
    let (path, rest) = line.split_once('\0')?;
    let (line, text) = rest.split_once(':')?;
    let path = path.strip_prefix("./").unwrap_or(path).to_owned();
    let text = text.chars().take(MATCH).collect();
    Some(Match { path, line: line.parse().ok()?, text })
}

/// See the tool.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct MakeFolder {
    /// Absolute, or relative to the session's working directory.
    path: String,
    /// The session's name; the one of this client, if none is named.
    session: Option<String>,
}

pub(crate) async fn make_folder(call: &Call<'_>, input: MakeFolder) -> Result<Done<FileInfo>> {
    let place = call.place(input.session.as_deref()).await?;
    let at = at(&input.path)?;
    let entry = call.within(&place, || call.client().make_folder(&place.session, &at)).await?;
    Ok(Done::new(format!("{} is there.", entry.path), entry.into()))
}

/// See the tool.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct MoveFile {
    /// What is moved: absolute, or relative to the session's working directory.
    from: String,
    /// Its new path.
    to: String,
    /// It takes the place of what is there.
    #[serde(default)]
    replace: bool,
    /// The session's name; the one of this client, if none is named.
    session: Option<String>,
}

pub(crate) async fn move_file(call: &Call<'_>, input: MoveFile) -> Result<Done<FileInfo>> {
    let place = call.place(input.session.as_deref()).await?;
    let (from, to) = (at(&input.from)?, at(&input.to)?);
    let moved = || call.client().move_file(&place.session, &from, &to, input.replace);
    let entry = call.within(&place, moved).await?;
    Ok(Done::new(format!("It is {} now.", entry.path), entry.into()))
}

/// See the tool.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct RemoveFile {
    /// Absolute, or relative to the session's working directory.
    path: String,
    /// A folder with all that is in it.
    #[serde(default)]
    recursive: bool,
    /// The session's name; the one of this client, if none is named.
    session: Option<String>,
}

/// Something that is gone.
#[derive(Serialize, JsonSchema)]
pub(crate) struct Removed {
    /// What was removed.
    removed: String,
}

pub(crate) async fn remove_file(call: &Call<'_>, input: RemoveFile) -> Result<Done<Removed>> {
    let place = call.place(input.session.as_deref()).await?;
    let at = at(&input.path)?;
    let remove = || call.client().remove_file(&place.session, &at, input.recursive);
    call.within(&place, remove).await?;
    Ok(Done::new(format!("{} is gone.", input.path), Removed { removed: input.path }))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn edit(before: &str, old: &str, all: bool) -> std::result::Result<String, String> {
        let input = EditFile {
            path: "f".to_owned(),
            old_text: old.to_owned(),
            new_text: "NEW".to_owned(),
            replace_all: all,
            session: None,
        };
        replace(before, &input).map(|(after, _)| after).map_err(|failure| failure.0)
    }

    #[test]
    fn an_edit_is_exact_or_says_why_it_is_not() {
        let file = "one\n  two\nthree\n  two\n";
        assert_eq!(edit(file, "three\n  two", false).unwrap(), "one\n  two\nNEW\n");
        assert_eq!(edit(file, "  two", true).unwrap(), "one\nNEW\nthree\nNEW\n");
        assert!(edit(file, "  two", false).unwrap_err().contains("at the lines 2, 4"));
        assert!(edit(file, "two\t\n", false).unwrap_err().contains("line 2"));
        assert!(edit(file, "one\nthree", false).unwrap_err().contains("what follows"));
        assert!(edit(file, "four", false).unwrap_err().contains("read_file"));
        assert!(edit(file, " \n ", false).unwrap_err().contains("white space"));
        assert!(edit(file, "", false).unwrap_err().contains("empty"));
    }

    fn given(file: &str, first: u64, limit: u64) -> Option<(String, u64)> {
        let mut lines = Lines::new(first, limit);
        lines.found(file.as_bytes());
        let (from, to, count) = lines.given(file.as_bytes(), true)?;
        Some((file[from..to].to_owned(), count))
    }

    #[test]
    fn lines_are_found() {
        let file = "a\nb\nc";
        assert_eq!(given(file, 1, 9), Some((file.to_owned(), 3)));
        assert_eq!(given(file, 2, 1), Some(("b\n".to_owned(), 1)));
        assert_eq!(given(file, 3, 5), Some(("c".to_owned(), 1)));
        assert_eq!(given(file, 4, 1), None);
        assert_eq!(given("", 1, 1), Some((String::new(), 0)));
        assert_eq!(given("a\n", 2, 1), None);
        assert_eq!(given("a\n", 1, u64::MAX), Some(("a\n".to_owned(), 1)));
    }

    #[test]
    fn a_path_begins_where_commands_start() {
        for (path, wanted) in [
            ("a/b", "~/a/b"),
            ("/a", "/a"),
            ("~/a", "~/a"),
            ("~", "~/"),
            (".", "~/"),
            ("..", "~/.."),
        ] {
            assert_eq!(at(path).unwrap(), wanted);
        }
        assert!(at("").is_err());
    }
}
