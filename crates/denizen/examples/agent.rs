//! An agent that has a computer: a session that is still there next time.
//!
//! ```sh
//! export OPENAI_BASE_URL=https://api.openai.com/v1 OPENAI_API_KEY=… OPENAI_MODEL=…
//! cargo run --example agent -- "Write a program that prints the first ten primes, and run it"
//! cargo run --example agent -- "Now make it print twenty"
//! ```
//!
//! Any server will do that speaks `OpenAI`'s chat completions. `AGENT_NAME` is whose session it
//! is, and `AGENT_FOLDER` where the sessions are.

use std::env;
use std::error::Error;
use std::path::Path;
use std::time::Duration;

use denizen::{Builder, Isolation, MicroVmManager, Output, VmExecutionGuard, VmPoolConfig};
use serde_json::{Value, json};

type Result<T, E = Box<dyn Error + Send + Sync>> = std::result::Result<T, E>;

/// A model that has not come to an end after so many answers is not going to.
const MAX_STEPS: usize = 30;
const COMMAND_TIME: Duration = Duration::from_mins(1);
/// What a tool says goes into the model's context, and that is small.
const MAX_OUTPUT: usize = 8000;

const INSTRUCTIONS: &str = "You have a Linux computer, which you use through your tools. Files \
    stay there from one conversation to the next. Do what the user asks, check that it worked, \
    and then report.";

#[tokio::main]
async fn main() -> Result<()> {
    let mut arguments = env::args().skip(1);
    let (Some(task), None) = (arguments.next(), arguments.next()) else {
        return Err("usage: agent \"what is to be done\"".into());
    };
    let folder = env::var("AGENT_FOLDER").unwrap_or_else(|_| "agent-sessions".to_owned());
    let name = env::var("AGENT_NAME").unwrap_or_else(|_| "agent".to_owned());
    let model = Model {
        url: env::var("OPENAI_BASE_URL").map_err(|_| "OPENAI_BASE_URL is not set")?,
        key: env::var("OPENAI_API_KEY").map_err(|_| "OPENAI_API_KEY is not set")?,
        name: env::var("OPENAI_MODEL").map_err(|_| "OPENAI_MODEL is not set")?,
    };
    let pool = sessions(folder.as_ref())?.build()?;
    let answer = run(&pool, &name, &model, &task).await;
    pool.shutdown().await?;
    println!("{}", answer?);
    Ok(())
}

/// The sessions that are kept in a folder: sandboxes, which reach no network.
pub fn sessions(folder: &Path) -> Result<Builder> {
    let config = VmPoolConfig {
        enabled: true,
        volume_root: std::path::absolute(folder.join("pool"))?,
        // With a place for backups nothing is ever deleted that is not saved there.
        backup_destination: Some(std::path::absolute(folder.join("backups"))?),
        ..VmPoolConfig::default()
    };
    config.validate()?;
    Ok(MicroVmManager::builder((&config).into()).isolation(Isolation::Sandbox))
}

/// Has the agent of a name work on a task in its session; its answer.
pub async fn run(pool: &MicroVmManager, name: &str, model: &Model, task: &str) -> Result<String> {
    // The session as it was left, or a new one. It is ours while the guard lives.
    let session = pool.find_or_name(&name.parse()?).await?;
    let computer = pool.acquire(session).await?;
    work(&computer, model, task).await
}

/// The loop: the model asks for tools, and sees what they said, until it has an answer.
async fn work(computer: &VmExecutionGuard, model: &Model, task: &str) -> Result<String> {
    let mut messages = vec![
        json!({ "role": "system", "content": INSTRUCTIONS }),
        json!({ "role": "user", "content": task }),
    ];
    for _ in 0..MAX_STEPS {
        let said = model.next(&messages).await?;
        messages.push(said.clone());
        let calls = said["tool_calls"].as_array().cloned().unwrap_or_default();
        if calls.is_empty() {
            return Ok(said["content"].as_str().unwrap_or_default().to_owned());
        }
        for call in calls {
            // What goes wrong in a tool is told to the model, which may know better.
            let result = match use_tool(computer, &call["function"]).await {
                Ok(said) => shortened(&said),
                Err(error) => format!("error: {error}"),
            };
            messages.push(json!({
                "role": "tool", "tool_call_id": call["id"], "content": result,
            }));
        }
    }
    Err(format!("no answer after {MAX_STEPS} steps").into())
}

/// The tools, as the model has to see them.
fn tools() -> Value {
    let tool = |name: &str, description: &str, parameters: &[(&str, &str)]| {
        let properties: serde_json::Map<_, _> = parameters
            .iter()
            .map(|&(name, text)| {
                (name.to_owned(), json!({ "type": "string", "description": text }))
            })
            .collect();
        let required: Vec<_> = parameters.iter().map(|(name, _)| name).collect();
        let schema = json!({ "type": "object", "properties": properties, "required": required });
        json!({
            "type": "function",
            "function": { "name": name, "description": description, "parameters": schema },
        })
    };
    json!([
        tool("run_command", "Runs a command line in a shell.", &[("command", "the command line")]),
        tool("read_file", "Reads a text file.", &[("path", "where it is")]),
        tool(
            "write_file",
            "Writes a text file, in place of one that is there.",
            &[("path", "where it shall be"), ("content", "all that shall be in it")],
        ),
    ])
}

/// Does what the model asked for.
async fn use_tool(computer: &VmExecutionGuard, call: &Value) -> Result<String> {
    // The arguments are a text of the model's, which may be anything.
    let arguments: Value = serde_json::from_str(call["arguments"].as_str().unwrap_or_default())?;
    let argument = |name: &str| {
        arguments[name].as_str().ok_or_else(|| format!("the argument '{name}' is missing"))
    };
    match call["name"].as_str().unwrap_or_default() {
        "run_command" => {
            let command = computer.command(argument("command")?).timeout(COMMAND_TIME);
            let done = command.output().await?;
            let exit = match done.exit {
                denizen::Exit::Code(code) => format!("exit code {code}"),
                other => format!("{other:?}"),
            };
            Ok(format!("{}\n[{exit}]", text(&done)))
        }
        // Files are read and written by commands: a path means something only in the session.
        "read_file" => checked(&computer.program("cat").arg(argument("path")?).output().await?),
        "write_file" => {
            let path = argument("path")?;
            let line = r#"mkdir -p "$(dirname "$1")" && cat > "$1""#;
            let command = computer.program("sh").args(["-c", line, "sh", path]);
            checked(&command.stdin(argument("content")?).output().await?)?;
            Ok(format!("wrote {path}"))
        }
        other => Err(format!("there is no tool '{other}'").into()),
    }
}

/// What a command has printed, if it went well.
fn checked(done: &Output) -> Result<String> {
    if done.exit.success() { Ok(text(done)) } else { Err(text(done).into()) }
}

fn text(done: &Output) -> String {
    String::from_utf8_lossy(&[&done.stdout[..], &done.stderr[..]].concat()).into_owned()
}

/// The text without its middle, if it is long: what matters is at the ends.
fn shortened(text: &str) -> String {
    if text.len() <= MAX_OUTPUT {
        return text.to_owned();
    }
    let head = &text[..text.floor_char_boundary(MAX_OUTPUT / 2)];
    let tail = &text[text.ceil_char_boundary(text.len() - MAX_OUTPUT / 2)..];
    let left_out = text.len() - head.len() - tail.len();
    format!("{head}\n[{left_out} bytes left out]\n{tail}")
}

/// Where a model is.
pub struct Model {
    /// The base URL of its API.
    pub url: String,
    /// The key to it.
    pub key: String,
    /// Which of the models there.
    pub name: String,
}

impl Model {
    /// What it says next.
    async fn next(&self, messages: &[Value]) -> Result<Value> {
        // TLS needs somebody to choose who does its arithmetic.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let body = json!({ "model": self.name, "messages": messages, "tools": tools() });
        let answer = reqwest::Client::builder()
            .timeout(Duration::from_mins(5))
            .build()?
            .post(format!("{}/chat/completions", self.url.trim_end_matches('/')))
            .bearer_auth(&self.key)
            .header("content-type", "application/json")
            .body(body.to_string())
            .send()
            .await?;
        let (status, body) = (answer.status(), answer.text().await?);
        if !status.is_success() {
            return Err(format!("the model answers {status}: {body}").into());
        }
        let mut body: Value = serde_json::from_str(&body)?;
        match body["choices"][0]["message"].take() {
            Value::Null => Err("the model says nothing".into()),
            said => Ok(said),
        }
    }
}
