//! Answers that come bit by bit. Dropping one closes its connection.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use denizen_api::{Ended, Event, Output, OutputStream, Problem, Started};
use http_body_util::BodyExt;
use hyper::Response;
use hyper::body::Incoming;
use serde::Deserialize;

use crate::{Error, Result, typed};

/// The longest line that is read: a piece of output in base64 and some more.
const LINE: usize = 1 << 20;

/// A stream of lines.
pub struct Lines {
    body: Incoming,
    buffer: Vec<u8>,
}

impl Lines {
    /// Those of an answer.
    pub fn new(response: Response<Incoming>) -> Self {
        Self { body: response.into_body(), buffer: Vec::new() }
    }

    /// The next line, without its end; none at the end. Cancel-safe.
    ///
    /// # Errors
    /// [`Error::Answer`].
    pub async fn next(&mut self) -> Result<Option<String>> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return Ok(Some(String::from_utf8_lossy(&line[..end]).into_owned()));
            }
            if self.buffer.len() > LINE {
                return Err(Error::Answer("a line of it has no end".to_owned()));
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(Err(error)) => return Err(Error::Answer(error.to_string())),
                Some(Ok(frame)) => {
                    if let Some(bytes) = frame.data_ref() {
                        self.buffer.extend_from_slice(bytes);
                    }
                }
            }
        }
    }
}

/// Server-sent events, as much of them as the daemon uses.
pub(crate) struct Sent {
    target: String,
    lines: Lines,
    /// Of the event that is being read.
    kind: String,
    id: String,
    data: String,
}

impl Sent {
    pub(crate) fn new(target: String, response: Response<Incoming>) -> Self {
        let (kind, id, data) = Default::default();
        Self { target, lines: Lines::new(response), kind, id, data }
    }

    /// The next one, with its kind and data; its id is `self.id`. Cancel-safe: what has been read
    /// of one is kept.
    pub(crate) async fn next(&mut self) -> Result<Option<(String, serde_json::Value)>> {
        while let Some(line) = self.lines.next().await? {
            if line.is_empty() {
                let (kind, data) = (std::mem::take(&mut self.kind), std::mem::take(&mut self.data));
                if kind.is_empty() {
                    continue;
                }
                let data = serde_json::from_str(&data);
                let data = data.map_err(|error| Error::Answer(error.to_string()))?;
                return Ok(Some((kind, data)));
            }
            let Some((field, value)) = line.split_once(':') else { continue };
            let value = value.strip_prefix(' ').unwrap_or(value);
            match field {
                "event" => value.clone_into(&mut self.kind),
                "id" => value.clone_into(&mut self.id),
                "data" => self.data.push_str(value),
                _ => {}
            }
        }
        Ok(None)
    }

    pub(crate) fn broken_off(&self) -> Error {
        Error::Gone { target: self.target.clone(), source: "the answer broke off".into() }
    }
}

/// What there is to say of what happens.
#[derive(Clone, Debug, PartialEq)]
pub enum Told {
    /// This has happened.
    Event(Event),
    /// Some events are not kept any more, and would be here.
    Lost,
}

/// What happens.
pub struct Events(Sent);

impl Events {
    pub(crate) fn new(target: String, response: Response<Incoming>) -> Self {
        Self(Sent::new(target, response))
    }

    /// What is told next. There is no end of it but an error. Cancel-safe.
    ///
    /// # Errors
    /// [`Error::Gone`] if the daemon has ended: ask for what comes after [`Events::last`].
    pub async fn next(&mut self) -> Result<Told> {
        match self.0.next().await? {
            Some((kind, _)) if kind == "lost" => Ok(Told::Lost),
            Some((_, data)) => typed(data).map(Told::Event),
            None => Err(self.0.broken_off()),
        }
    }

    /// The id of the last event that was read.
    pub fn last(&self) -> Option<&str> {
        Some(self.0.id.as_str()).filter(|id| !id.is_empty())
    }
}

/// Something that a command has printed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where to.
    pub stream: OutputStream,
    /// How many bytes it had printed before.
    pub offset: u64,
    /// It.
    pub bytes: Bytes,
}

/// What there is to say of a command that runs.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RunEvent {
    /// It runs.
    Started(Started),
    /// It has printed something.
    Output(Piece),
    /// What it has printed from there to there is not kept any more.
    Gap {
        /// The first byte that is not.
        from: u64,
        /// The first one that is.
        to: u64,
    },
    /// It has ended. Nothing comes after that.
    Exit(Ended),
}

/// A command that runs, or one that is looked at.
pub struct Run {
    sent: Sent,
    ended: bool,
}

#[derive(Deserialize)]
struct Gap {
    from: u64,
    to: u64,
}

impl Run {
    pub(crate) fn new(target: String, response: Response<Incoming>) -> Self {
        Self { sent: Sent::new(target, response), ended: false }
    }

    /// What comes next; none after the end. Cancel-safe.
    ///
    /// # Errors
    /// [`Error::Refused`] if it ended otherwise than by itself, as by its timeout;
    /// [`Error::Gone`] if the daemon has.
    pub async fn next(&mut self) -> Result<Option<RunEvent>> {
        loop {
            let Some((kind, data)) = self.sent.next().await? else {
                return if self.ended { Ok(None) } else { Err(self.sent.broken_off()) };
            };
            return Ok(Some(match kind.as_str() {
                "started" => RunEvent::Started(typed(data)?),
                "output" => {
                    let Output { stream, offset, bytes } = typed(data)?;
                    let bytes = STANDARD.decode(bytes);
                    let bytes = bytes.map_err(|error| Error::Answer(error.to_string()))?;
                    RunEvent::Output(Piece { stream, offset, bytes: bytes.into() })
                }
                "gap" => {
                    let Gap { from, to } = typed(data)?;
                    RunEvent::Gap { from, to }
                }
                "exit" => {
                    self.ended = true;
                    RunEvent::Exit(typed(data)?)
                }
                "lost" => {
                    let problem: Problem = typed(data)?;
                    return Err(Error::Refused(Box::new(problem)));
                }
                // Of a later version.
                _ => continue,
            }));
        }
    }
}
