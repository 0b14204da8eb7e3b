//! The table of tools: what each is called, what it takes and gives, and what a client may assume
//! of it. The tools themselves are in the modules that are named there.

use std::sync::{Arc, LazyLock};

use rmcp::model::{CallToolResult, ContentBlock, JsonObject, Tool, ToolAnnotations};
use schemars::JsonSchema;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::call::Call;
use crate::failure::{Failure, Result};
use crate::{commands, files, sessions};

/// What a tool has done: for a model to read, and for a program.
pub(crate) struct Done<T> {
    pub(crate) text: String,
    pub(crate) data: T,
    /// It was not all that was asked for.
    pub(crate) failed: bool,
}

impl<T> Done<T> {
    pub(crate) fn new(text: String, data: T) -> Self {
        Self { text, data, failed: false }
    }
}

/// What a client may assume of a tool.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Reads,
    Adds,
    /// Adds, and once more is the same as once.
    Sets,
    Destroys,
    /// Destroys, and once more is the same as once.
    Replaces,
    /// And may reach what is outside of the session.
    DoesAnything,
}

use Kind::{Adds, Destroys, DoesAnything, Reads, Replaces, Sets};

fn tool<I: JsonSchema + 'static, O: JsonSchema + 'static>(
    name: &'static str,
    title: &'static str,
    kind: Kind,
    text: &'static str,
) -> Tool {
    let annotations = ToolAnnotations::with_title(title)
        .read_only(kind == Reads)
        .destructive(matches!(kind, Destroys | Replaces | DoesAnything))
        .idempotent(matches!(kind, Reads | Sets | Replaces))
        .open_world(kind == DoesAnything);
    let mut tool = Tool::new(name, text, JsonObject::new())
        .with_title(title)
        .with_annotations(annotations)
        .with_input_schema::<I>()
        .with_output_schema::<O>();
    tool.input_schema = plain(&tool.input_schema, true);
    tool.output_schema = tool.output_schema.as_ref().map(|schema| plain(schema, false));
    tool
}

/// A schema without the formats of numbers, which JSON Schema does not have; and for what a client
/// sends, without `null` for what is left out, as some look for one type only.
fn plain(schema: &Arc<JsonObject>, is_input: bool) -> Arc<JsonObject> {
    fn strip(value: &mut Value, is_input: bool) {
        match value {
            Value::Object(object) => {
                // A property that is called so is no text.
                object.retain(|name, value| name != "format" || !value.is_string());
                if is_input && let Some(Value::Array(types)) = object.get_mut("type") {
                    types.retain(|it| it != "null");
                    if let [one] = types.as_slice() {
                        let one = one.clone();
                        object.insert("type".to_owned(), one);
                    }
                }
                object.values_mut().for_each(|value| strip(value, is_input));
            }
            Value::Array(all) => all.iter_mut().for_each(|value| strip(value, is_input)),
            _ => {}
        }
    }
    let mut schema = schema.as_ref().clone();
    schema.values_mut().for_each(|value| strip(value, is_input));
    // Some look for it even where there is nothing in it.
    schema.entry("properties").or_insert_with(|| Value::Object(JsonObject::new()));
    Arc::new(schema)
}

fn read<T: DeserializeOwned>(arguments: Value) -> Result<T> {
    serde_json::from_value(arguments).map_err(|error| {
        Failure::new(format!("the arguments are not as the tool has them: {error}"))
    })
}

fn result<T: Serialize>(done: Result<Done<T>>) -> CallToolResult {
    let told = done.and_then(|done| {
        let data = serde_json::to_value(&done.data)
            .map_err(|error| Failure::new(format!("the result cannot be told: {error}")))?;
        Ok((done.text, data, done.failed))
    });
    match told {
        Ok((text, data, failed)) => {
            let mut result = CallToolResult::success(vec![ContentBlock::text(text)]);
            result.is_error = Some(failed);
            result.structured_content = Some(data);
            result
        }
        Err(failure) => CallToolResult::error(vec![ContentBlock::text(failure.0)]),
    }
}

/// All tools, as they are listed.
pub fn list() -> Vec<Tool> {
    ALL.clone()
}

/// The tool of this name.
pub(crate) fn named(name: &str) -> Option<Tool> {
    ALL.iter().find(|tool| tool.name == name).cloned()
}

macro_rules! tools {
    ($($module:ident :: $name:ident ($input:ident) -> $output:ident, $title:literal, $kind:ident, $text:literal;)+) => {
        static ALL: LazyLock<Vec<Tool>> = LazyLock::new(|| {
            vec![$(tool::<$module::$input, $module::$output>(
                stringify!($name), $title, $kind, $text,
            )),+]
        });

        /// Calls a tool, if there is one of this name.
        pub(crate) async fn call(
            call: &Call<'_>,
            name: &str,
            arguments: Value,
        ) -> Option<CallToolResult> {
            match name {
                $(stringify!($name) => Some(result(match read(arguments) {
                    Ok(input) => $module::$name(call, input).await,
                    Err(failure) => Err(failure),
                })),)+
                _ => None,
            }
        }
    };
}

tools! {
    commands::run_command(RunCommand) -> Ran, "Run a command", DoesAnything,
        "Run a line of shell in the session and give what it prints, on standard output and \
         standard error in one, and its exit code. The session is made if it is not there, and \
         files stay in it between calls. The command is killed with all that it has started when \
         its time is over. Of long output only the beginning and the end are given; read_output \
         gives the rest. With `background` it goes on by itself, and the answer comes at once.";
    commands::read_output(ReadOutput) -> OutputRead, "Read a command's output", Reads,
        "Read what a command has printed: the part that run_command left out, by the command_id \
         that it gave and an offset in bytes, or what a command in the background prints.";
    commands::list_processes(ListProcesses) -> Processes, "List processes", Reads,
        "List the commands of the session that run, and those in the background that have ended \
         a short while ago.";
    commands::kill_process(KillProcess) -> Killed, "Kill a process", Destroys,
        "Send a signal to a command that runs in the session. The default kills it with all that \
         it has started.";
    commands::write_stdin(WriteStdin) -> Written, "Write to a command's standard input", DoesAnything,
        "Write text to a command that run_command has started with `background` and `stdin`.";
    files::read_file(ReadFile) -> FileRead, "Read a file", Reads,
        "Read lines of a text file. Of a binary file, its content in base64 if that is asked for.";
    files::write_file(WriteFile) -> FileWritten, "Write a file", Replaces,
        "Write a file, in the place of what is there. Folders above it are made.";
    files::edit_file(EditFile) -> FileEdited, "Edit a file", Destroys,
        "Replace a piece of text in a file by another. It has to be there exactly once, unless \
         `replace_all` is set; nothing is changed otherwise.";
    files::list_files(ListFiles) -> Files, "List files", Reads,
        "List what is in a folder.";
    files::search_files(SearchFiles) -> Matches, "Search in files", Reads,
        "Search the text files below a folder for a regular expression, as `grep -rE` does.";
    files::make_folder(MakeFolder) -> FileInfo, "Make a folder", Sets,
        "Make a folder, and those above it. One that is there already is fine.";
    files::move_file(MoveFile) -> FileInfo, "Move a file or folder", Destroys,
        "Move or rename a file or folder. What is at the new place stays, unless `replace` is set.";
    files::remove_file(RemoveFile) -> Removed, "Remove a file or folder", Destroys,
        "Remove a file or a folder. One with something in it only if `recursive` is set.";
    sessions::list_sessions(ListSessions) -> Sessions, "List sessions", Reads,
        "List the sessions that there are, and which one is used if a call names none.";
    sessions::start_session(StartSession) -> SessionInfo, "Start a session", Sets,
        "Start a session, which is made if it is not there.";
    sessions::stop_session(StopSession) -> SessionInfo, "Stop a session", Destroys,
        "Stop a session: its processes end, its files stay. The next use starts it again. Refused \
         while something runs in it, unless `force` is set.";
    sessions::fork_session(ForkSession) -> SessionInfo, "Fork a session", Adds,
        "Make a new session that begins with a copy of another's files, as they are or as a \
         snapshot has them. The answer has the name to use it by.";
    sessions::snapshot_session(SnapshotSession) -> SnapshotTaken, "Take a snapshot", Adds,
        "Keep the session's files as they are now under a name, for restore_session.";
    sessions::list_snapshots(ListSnapshots) -> Snapshots, "List snapshots", Reads,
        "List the session's snapshots.";
    sessions::restore_session(RestoreSession) -> SessionInfo, "Restore a session", Replaces,
        "Put the session's files back as a snapshot, or else the latest backup, has them. What \
         was changed since is lost. Refused while something runs in it, unless `force` is set.";
    sessions::remove_session(RemoveSession) -> Removed, "Remove a session", Destroys,
        "Remove a session with its files and snapshots. Backups stay.";
    sessions::expose_port(ExposePort) -> Exposed, "Expose a port", Sets,
        "Tell where an HTTP server that listens on a port of the session is reached from outside.";
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_tool_is_described() {
        let all = list();
        for tool in &all {
            let name = &tool.name;
            assert_eq!(tool.input_schema["type"], "object", "{name}");
            assert_eq!(tool.input_schema["additionalProperties"], false, "{name}");
            assert_eq!(tool.output_schema.as_ref().unwrap()["type"], "object", "{name}");
            let hints = tool.annotations.as_ref().unwrap();
            assert_eq!(hints.title, tool.title, "{name}");
            let given = [
                hints.read_only_hint,
                hints.destructive_hint,
                hints.idempotent_hint,
                hints.open_world_hint,
            ];
            assert!(given.iter().all(Option::is_some), "{name}");
            // A model is told of each of them.
            let properties = tool.input_schema["properties"].as_object().cloned();
            for (property, schema) in properties.unwrap_or_default() {
                assert!(schema["description"].is_string(), "{name}: {property}");
                assert!(schema["type"].is_string(), "{name}: {property}");
            }
        }
        let mut names: Vec<_> = all.iter().map(|tool| &tool.name).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), all.len());
    }
}
