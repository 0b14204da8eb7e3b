//! What people see: tables and lines on a terminal, JSON where it was asked for.

use std::io::Write;

use denizen_client::Told;
use serde_json::Value;

use crate::config::Settings;
use crate::{Failure, Result, backups, progress, terminal};

/// Prints, or says that nobody reads.
fn print(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
        .map_err(|error| Failure::new(format!("cannot print: {error}")))
}

fn json(value: &Value) -> Result<()> {
    print(&format!("{value:#}\n"))
}

/// What the client has, as JSON.
pub fn value(typed: impl serde::Serialize) -> Result<Value> {
    serde_json::to_value(typed).map_err(|error| Failure::new(error.to_string()))
}

/// The configuration in force, as a file would have it.
pub fn config(settings: &Settings, as_json: bool) -> Result<()> {
    if as_json {
        let value = serde_json::to_value(settings);
        return json(&value.map_err(|error| Failure::new(error.to_string()))?);
    }
    print(&settings.to_toml()?)
}

/// All sessions.
pub fn sessions(value: &Value, as_json: bool) -> Result<()> {
    if as_json {
        return json(value);
    }
    let rows = value.as_array().into_iter().flatten().map(|session| {
        let state = match session["operation"].as_str() {
            Some(operation) => format!("{} ({})", text(&session["state"]), harmless(operation)),
            None if session["in_use"] == true => format!("{} (in use)", text(&session["state"])),
            None => text(&session["state"]),
        };
        let saved = match (session["unsaved"] == true, session["backup"].is_string()) {
            (false, true) => "yes",
            (true, true) => "older",
            _ => "no",
        };
        [
            if session["name"].is_null() { "-".to_owned() } else { text(&session["name"]) },
            text(&session["id"]),
            state,
            text(&session["isolation"]),
            age(&session["last_used"]),
            saved.to_owned(),
        ]
    });
    table(["NAME", "ID", "STATE", "ISOLATION", "USED", "SAVED"], rows)
}

/// One session.
pub fn session(value: &Value, as_json: bool) -> Result<()> {
    if as_json {
        return json(value);
    }
    let mut lines = String::new();
    for (name, value) in value.as_object().into_iter().flatten() {
        if value.is_null() {
            continue;
        }
        let shown = match name.as_str() {
            "last_used" | "unsaved_since" => age(value),
            name if name.ends_with("_at") => age(value),
            "backup_size" | "backup_added" => size(value),
            name if name.starts_with("disk_") => size(value),
            "usage" => used(value),
            _ => text(value),
        };
        lines.push_str(&format!("{:<17}{shown}\n", name.replace('_', " ")));
    }
    print(&lines)
}

/// What a session uses, in a line; nothing of what cannot be measured.
fn used(value: &Value) -> String {
    let memory = value["memory_bytes"].as_u64().map(|it| format!("{} of memory", bytes(it)));
    let cpu = value["cpu_microseconds"].as_u64();
    let cpu = cpu.map(|it| format!("{}.{:03} s of CPU", it / 1_000_000, it / 1000 % 1000));
    let processes = value["processes"].as_u64().map(|it| match it {
        1 => "1 process".to_owned(),
        many => format!("{many} processes"),
    });
    [memory, cpu, processes].into_iter().flatten().collect::<Vec<_>>().join(", ")
}

/// A key that was made: alone on standard output, where a script takes it from.
pub fn made_key(value: &Value, as_json: bool) -> Result<()> {
    if as_json {
        return json(value);
    }
    eprintln!("This key is not shown again; `denizen key revoke {}` ends it.", text(&value["id"]));
    print(&format!("{}\n", text(&value["key"])))
}

/// All keys.
pub fn keys(value: &Value, as_json: bool) -> Result<()> {
    if as_json {
        return json(value);
    }
    let or_none = |value: &Value| if value.is_null() { "-".to_owned() } else { text(value) };
    let day = |value: &Value| or_none(value).chars().take("2026-01-31T12:00".len()).collect();
    let rows = value["keys"].as_array().into_iter().flatten().map(|key| {
        let sessions = match &key["sessions"] {
            Value::Null => "all".to_owned(),
            prefix => format!("{}*", text(prefix)),
        };
        [
            text(&key["id"]),
            text(&key["name"]),
            text(&key["scope"]),
            sessions,
            day(&key["expires_at"]),
            day(&key["last_used_at"]),
        ]
    });
    table(["ID", "NAME", "SCOPE", "SESSIONS", "EXPIRES", "USED"], rows)
}

/// The backups of a session.
pub fn backups(value: &Value, as_json: bool) -> Result<()> {
    if as_json {
        return json(value);
    }
    let rows = value.as_array().into_iter().flatten();
    table(
        ["TAKEN", "FORMAT", "ADDED", "NAME"],
        rows.map(|it| [text(&it["taken_at"]), text(&it["format"]), size(&it["bytes"]), name(it)]),
    )
}

/// The backups of all sessions.
pub fn all_backups(value: &Value, as_json: bool) -> Result<()> {
    if as_json {
        return json(value);
    }
    let rows = value.as_array().into_iter().flatten();
    let whose = |it: &Value| match &it["session_name"] {
        Value::Null => text(&it["session"]),
        name => text(name),
    };
    table(
        ["SESSION", "TAKEN", "FORMAT", "ADDED", "HOST", "NAME"],
        rows.map(|it| {
            let (taken, format) = (text(&it["taken_at"]), text(&it["format"]));
            [whose(it), taken, format, size(&it["bytes"]), text(&it["host"]), name(it)]
        }),
    )
}

/// The backups that were deleted, or would be.
pub fn forgotten(value: &Value, dry_run: bool, as_json: bool) -> Result<()> {
    let count = value.as_array().map_or(0, Vec::len);
    if as_json || count > 0 {
        all_backups(value, as_json)?;
    }
    if as_json {
        return Ok(());
    }
    let backups = if count == 1 { "backup" } else { "backups" };
    print(&format!("{count} {backups} {}\n", if dry_run { "would be deleted" } else { "deleted" }))
}

/// A backup's name, as short as it can be asked for by.
fn name(backup: &Value) -> String {
    let name = text(&backup["name"]);
    // Those of a repository are digests, of which the beginning is enough.
    if backup["format"] == "repository" { name.chars().take(12).collect() } else { name }
}

/// What a check of the backups has found.
pub fn report(value: &Value, as_json: bool) -> Result<()> {
    if as_json {
        return json(value);
    }
    let mut lines = String::new();
    for finding in value["findings"].as_array().into_iter().flatten() {
        lines.push_str(&harmless(&backups::finding(finding)));
        lines.push('\n');
    }
    let count = value["backups"].as_u64().unwrap_or(0);
    let read = match value["bytes"].as_u64() {
        Some(0) | None => String::new(),
        Some(read) => format!(", {} read", bytes(read)),
    };
    let unsound = value["findings"].as_array().map_or(0, Vec::len);
    lines.push_str(&format!("{count} backups{read}, {unsound} with something wrong\n"));
    print(&lines)
}

/// The snapshots of a session.
pub fn snapshots(value: &Value, as_json: bool) -> Result<()> {
    if as_json {
        return json(value);
    }
    let rows = value.as_array().into_iter().flatten();
    table(["TAKEN", "NAME"], rows.map(|one| [time(&one["taken_at"]), text(&one["name"])]))
}

/// What differs, a line for each path.
pub fn differences(value: &Value, as_json: bool) -> Result<()> {
    if as_json {
        return json(value);
    }
    let mut lines = String::new();
    for one in value.as_array().into_iter().flatten() {
        let (sign, node) = match one["change"].as_str() {
            Some("added") => ('+', &one["after"]),
            Some("removed") => ('-', &one["before"]),
            _ => ('~', &one["after"]),
        };
        let mut what = text(&node["kind"]);
        if node["kind"] == "file" && sign != '~' {
            what.push_str(&format!(", {} bytes", node["size"]));
        }
        for aspect in one["aspects"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            let of = |side: &str| match aspect {
                "kind" => text(&one[side]["kind"]),
                "content" if node["kind"] == "file" => format!("{} bytes", one[side]["size"]),
                "mode" => text(&one[side]["mode"]),
                "owner" => format!("{}:{}", one[side]["user"], one[side]["group"]),
                _ => String::new(),
            };
            let (before, after) = (of("before"), of("after"));
            what.push_str(&format!(", {aspect}"));
            if before != after {
                what.push_str(&format!(" {before} -> {after}"));
            }
        }
        // A name may hold anything; a line of output may not.
        let path = one["path"].as_str().unwrap_or_default().escape_debug();
        lines.push_str(&format!("{sign} {}/{path}  ({what})\n", text(&one["tree"])));
    }
    print(&lines)
}

/// Images.
pub fn images(value: &Value, as_json: bool) -> Result<()> {
    list(value, as_json, ["NAME", "LAYERS", "DIGEST"], ["name", "layers", "digest"])
}

/// A list of objects, by some of their fields.
fn list<const N: usize>(
    value: &Value,
    as_json: bool,
    heads: [&str; N],
    fields: [&str; N],
) -> Result<()> {
    if as_json {
        return json(value);
    }
    let items = value.as_array().into_iter().flatten();
    table(heads, items.map(|item| fields.map(|field| text(&item[field]))))
}

/// What is told of what happens.
pub fn told(told: Told, as_json: bool) -> Result<()> {
    let value = match told {
        Told::Event(event) => value(event)?,
        Told::Lost if as_json => serde_json::json!({ "event": "lost" }),
        Told::Lost => return print("some events are lost: they came faster than they were read\n"),
    };
    if as_json {
        return print(&format!("{value}\n"));
    }
    let who = [&value["name"], &value["session"]].into_iter().find(|it| !it.is_null());
    let who = who.map(text).unwrap_or_default();
    let what = text(&value["event"]).replace('_', " ");
    let mut more = ["operation", "backup", "snapshot", "error", "missed", "resource"]
        .iter()
        .filter(|field| !value[**field].is_null())
        .map(|field| format!(" {}", text(&value[*field])))
        .collect::<String>();
    if value["event"] == "progress" {
        more = format!(" {}", harmless(&progress::said(&value)));
    }
    if value["limit"].is_u64() {
        more.push_str(&format!(" {} of {}", size(&value["used"]), size(&value["limit"])));
    }
    print(&format!("{}  {who}  {what}{more}\n", time(&value["at"])))
}

/// The heads of what sessions use.
pub const USAGE: [&str; 6] = ["NAME", "STATE", "CPU", "MEMORY", "PROCESSES", "DISK"];

/// What a session uses; `share` is how much of a processor.
pub fn usage_row(session: &Value, share: Option<f64>) -> [String; 6] {
    let used = &session["usage"];
    let or_none = |shown: Option<String>| shown.unwrap_or_else(|| "-".to_owned());
    [
        text(if session["name"].is_string() { &session["name"] } else { &session["id"] }),
        text(&session["state"]),
        or_none(share.map(|share| format!("{share:.1} %"))),
        or_none(used["memory_bytes"].as_u64().map(bytes)),
        or_none(used["processes"].as_u64().map(|count| count.to_string())),
        or_none(session["disk_used"].as_u64().map(bytes)),
    ]
}

/// What sessions use and have used: of the processor, the time.
pub fn usage(value: &Value, as_json: bool) -> Result<()> {
    if as_json {
        return json(value);
    }
    let rows = value.as_array().into_iter().flatten().map(|session| {
        let mut row = usage_row(session, None);
        if let Some(used) = session["usage"]["cpu_microseconds"].as_u64() {
            row[2] = format!("{}.{:02} s", used / 1_000_000, used / 10_000 % 100);
        }
        row
    });
    table(USAGE, rows)
}

fn table<const N: usize>(heads: [&str; N], rows: impl Iterator<Item = [String; N]>) -> Result<()> {
    print(&lines(heads, rows))
}

/// A table, as wide as the terminal at most.
pub fn lines<const N: usize>(heads: [&str; N], rows: impl Iterator<Item = [String; N]>) -> String {
    let rows: Vec<_> = std::iter::once(heads.map(str::to_owned)).chain(rows).collect();
    let mut widths = [0; N];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    if let Some(room) = terminal::columns() {
        terminal::fit(&mut widths, room);
    }
    let mut lines = String::new();
    for (place, row) in rows.iter().enumerate() {
        let cells: Vec<_> =
            widths.iter().zip(row).map(|(width, cell)| terminal::cell(cell, *width)).collect();
        let line = cells.join("  ");
        let line = line.trim_end();
        if place == 0 {
            lines.push_str(&terminal::styled(line, terminal::HEAD));
        } else {
            lines.push_str(line);
        }
        lines.push('\n');
    }
    lines
}

/// Bytes, as people read them.
#[allow(clippy::cast_precision_loss)] // One digit is shown.
pub fn bytes(bytes: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB"];
    let mut amount = bytes as f64 / 1024.0;
    let mut unit = 0;
    while amount >= 1024.0 && unit + 1 < units.len() {
        amount /= 1024.0;
        unit += 1;
    }
    format!("{amount:.1} {}", units[unit])
}

fn size(value: &Value) -> String {
    value.as_u64().map_or_else(|| text(value), bytes)
}

/// A value on one line.
fn text(value: &Value) -> String {
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    harmless(&text).replace('\n', "\\n").replace('\t', "\\t")
}

/// What others may have written, with nothing in it that a terminal obeys but the ends of lines.
pub fn harmless(text: &str) -> String {
    let turns = |c: char| matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if turns(c) || c.is_control() && !matches!(c, '\n' | '\t') {
            shown.extend(c.escape_default());
        } else {
            shown.push(c);
        }
    }
    shown
}

#[allow(clippy::cast_possible_truncation)] // Whole seconds are what is shown.
fn timestamp(value: &Value) -> Option<jiff::Timestamp> {
    jiff::Timestamp::from_second(value.as_f64()? as i64).ok()
}

fn time(value: &Value) -> String {
    timestamp(value).map_or_else(|| text(value), |at| at.to_string())
}

fn age(value: &Value) -> String {
    let Some(at) = timestamp(value) else { return text(value) };
    let since = jiff::Timestamp::now().as_second().saturating_sub(at.as_second());
    match since {
        ..0 => format!("in {}", span(since.unsigned_abs())),
        0..=59 => "just now".to_owned(),
        _ => format!("{} ago", span(since.unsigned_abs())),
    }
}

/// So many seconds, in the largest unit of which there is one.
pub fn span(seconds: u64) -> String {
    match seconds {
        ..=59 => format!("{seconds} s"),
        60..=3599 => format!("{} min", seconds / 60),
        3600..=86399 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_terminal_obeys_what_others_wrote() {
        let hostile = "a\u{1b}[2J\u{9b}2J\r\u{7f}\u{202e}\n\tä";
        assert_eq!(harmless(hostile), "a\\u{1b}[2J\\u{9b}2J\\r\\u{7f}\\u{202e}\n\tä");
        assert_eq!(text(&Value::from("a\nb\u{1b}")), "a\\nb\\u{1b}");
        assert_eq!(text(&serde_json::json!({ "a": "\u{9b}" })), r#"{"a":"\u{9b}"}"#);
    }
}
