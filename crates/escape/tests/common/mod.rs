//! The host's side of the escape suite, for tests.

#![allow(dead_code, clippy::unwrap_used, missing_docs, reason = "each test uses a part of it")]

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde_json::Value;

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_denizen-escape");

/// The host's side, with its facts.
pub struct Stage {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    pub arguments: Vec<String>,
    pub environment: Vec<(String, String)>,
}

impl Stage {
    pub fn new(folder: &std::path::Path) -> Self {
        let mut child = Command::new(PROGRAM)
            .arg("stage")
            .arg(folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().unwrap());
        let (arguments, environment) = (Vec::new(), Vec::new());
        let mut stage = Self { child, input, output, arguments, environment };
        let told = stage.line();
        stage.arguments = texts(&told["args"]);
        stage.environment = told["env"]
            .as_object()
            .unwrap()
            .iter()
            .map(|(name, value)| (name.clone(), value.as_str().unwrap().to_owned()))
            .collect();
        stage
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    pub fn traces(&mut self) -> Vec<String> {
        self.input.as_mut().unwrap().write_all(b"\n").unwrap();
        let line = self.line();
        texts(&line["traces"])
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        drop(self.input.take());
        let _ = self.child.wait();
    }
}

fn texts(list: &Value) -> Vec<String> {
    list.as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_owned()).collect()
}

pub fn list() -> Vec<Value> {
    let output = Command::new(PROGRAM).arg("list").output().unwrap();
    assert!(output.status.success());
    let lines = String::from_utf8(output.stdout).unwrap();
    lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}
