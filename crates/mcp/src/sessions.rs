//! Sessions as such: which there are, and what can be done with them as a whole.

use std::num::NonZeroU16;

use denizen_client::api::Session;
use denizen_client::path;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::call::{Call, name};
use crate::failure::{Failure, Result};
use crate::tools::Done;

/// See the tool.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ListSessions {}

/// The sessions.
#[derive(Serialize, JsonSchema)]
pub(crate) struct Sessions {
    /// The one that is used if a call names none. It is made when it is first needed.
    own: String,
    sessions: Vec<SessionInfo>,
}

/// A session.
#[derive(Serialize, JsonSchema)]
pub(crate) struct SessionInfo {
    /// What it is named by in other tools.
    session: String,
    /// Its UUID.
    id: String,
    /// `active` while something may run in it; `frozen`, `stopped` and `archived` are brought back
    /// by the next use.
    state: String,
    /// Whether somebody uses it right now.
    in_use: bool,
}

impl From<Session> for SessionInfo {
    fn from(session: Session) -> Self {
        Self {
            session: name(&session),
            id: session.id.to_string(),
            state: session.state,
            in_use: session.in_use,
        }
    }
}

fn told(session: Session) -> Done<SessionInfo> {
    let data = SessionInfo::from(session);
    Done::new(format!("Session {} is {}.", data.session, data.state), data)
}

pub(crate) async fn list_sessions(call: &Call<'_>, _: ListSessions) -> Result<Done<Sessions>> {
    let own = call.place(None).await?.session;
    let all = call.client().sessions().await?;
    let sessions: Vec<SessionInfo> = all.into_iter().map(SessionInfo::from).collect();
    let mut text = format!("A call that names no session uses {own}.\n");
    for session in &sessions {
        let in_use = if session.in_use { "\tin use" } else { "" };
        text.push_str(&format!("{}\t{}{in_use}\n", session.session, session.state));
    }
    Ok(Done::new(text, Sessions { own, sessions }))
}

/// See the tool.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct StartSession {
    /// The session's name; the one of this client, if none is named.
    session: Option<String>,
    /// The image to make it of, if it is not there; the daemon's own, if none is named.
    image: Option<String>,
}

pub(crate) async fn start_session(
    call: &Call<'_>,
    input: StartSession,
) -> Result<Done<SessionInfo>> {
    let place = call.place(input.session.as_deref()).await?;
    Ok(told(call.client().ensure(&place.session, input.image.as_deref()).await?))
}

/// See the tool.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct StopSession {
    /// The session's name; the one of this client, if none is named.
    session: Option<String>,
    /// End what runs in it too.
    #[serde(default)]
    force: bool,
}

pub(crate) async fn stop_session(call: &Call<'_>, input: StopSession) -> Result<Done<SessionInfo>> {
    let place = call.place(input.session.as_deref()).await?;
    call.client().stop(&place.session, input.force).await?;
    Ok(told(call.client().session(&place.session).await?))
}

/// See the tool.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ForkSession {
    /// The session to copy; the one of this client, if none is named.
    session: Option<String>,
    /// As this snapshot of it has it; as it is now, if none is named.
    snapshot: Option<String>,
}

pub(crate) async fn fork_session(call: &Call<'_>, input: ForkSession) -> Result<Done<SessionInfo>> {
    let place = call.place(input.session.as_deref()).await?;
    let query = denizen_client::query("snapshot", input.snapshot);
    let path = path(&place.session, &format!("/fork{query}"));
    let made = call.within(&place, || call.client().json("POST", &path)).await?;
    let made: Session = serde_json::from_value(made)
        .map_err(|error| Failure::new(format!("the answer is not understood: {error}")))?;
    let data = SessionInfo::from(made);
    let text = format!("The copy of {} is session {}.", place.session, data.session);
    Ok(Done::new(text, data))
}

/// See the tool.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct SnapshotSession {
    /// The snapshot's name, which no other of the session has.
    name: String,
    /// The session's name; the one of this client, if none is named.
    session: Option<String>,
}

/// A snapshot that was taken.
#[derive(Serialize, JsonSchema)]
pub(crate) struct SnapshotTaken {
    session: String,
    name: String,
}

pub(crate) async fn snapshot_session(
    call: &Call<'_>,
    input: SnapshotSession,
) -> Result<Done<SnapshotTaken>> {
    let place = call.place(input.session.as_deref()).await?;
    call.within(&place, || call.client().snapshot(&place.session, &input.name)).await?;
    let text = format!("Snapshot {} of session {} was taken.", input.name, place.session);
    Ok(Done::new(text, SnapshotTaken { session: place.session, name: input.name }))
}

/// See the tool.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ListSnapshots {
    /// The session's name; the one of this client, if none is named.
    session: Option<String>,
}

/// A session's snapshots.
#[derive(Serialize, JsonSchema)]
pub(crate) struct Snapshots {
    session: String,
    snapshots: Vec<OneSnapshot>,
}

/// A snapshot.
#[derive(Serialize, JsonSchema)]
pub(crate) struct OneSnapshot {
    name: String,
    /// When it was taken, in seconds since 1970.
    taken_at: f64,
}

pub(crate) async fn list_snapshots(
    call: &Call<'_>,
    input: ListSnapshots,
) -> Result<Done<Snapshots>> {
    let place = call.place(input.session.as_deref()).await?;
    let all = call.within(&place, || call.client().snapshots(&place.session)).await?;
    let snapshots: Vec<OneSnapshot> = all
        .into_iter()
        .map(|snapshot| OneSnapshot { name: snapshot.name, taken_at: snapshot.taken_at })
        .collect();
    let mut text = String::new();
    for snapshot in &snapshots {
        text.push_str(&format!("{}\n", snapshot.name));
    }
    if text.is_empty() {
        text = format!("Session {} has no snapshot.", place.session);
    }
    Ok(Done::new(text, Snapshots { session: place.session, snapshots }))
}

/// See the tool.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct RestoreSession {
    /// The snapshot; the latest backup, if none is named.
    snapshot: Option<String>,
    /// The session's name; the one of this client, if none is named.
    session: Option<String>,
    /// End what runs in it first.
    #[serde(default)]
    force: bool,
}

pub(crate) async fn restore_session(
    call: &Call<'_>,
    input: RestoreSession,
) -> Result<Done<SessionInfo>> {
    let place = call.place(input.session.as_deref()).await?;
    let query = denizen_client::query("snapshot", input.snapshot);
    let path = path(&place.session, &format!("/restore{query}"));
    if input.force {
        call.client().stop(&place.session, true).await?;
    }
    call.client().json("POST", &path).await?;
    Ok(told(call.client().session(&place.session).await?))
}

/// See the tool.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct RemoveSession {
    /// The session's name. It has to be named.
    session: String,
    /// End what runs in it first.
    #[serde(default)]
    force: bool,
}

/// Something that is gone.
#[derive(Serialize, JsonSchema)]
pub(crate) struct Removed {
    /// What was removed.
    removed: String,
}

pub(crate) async fn remove_session(call: &Call<'_>, input: RemoveSession) -> Result<Done<Removed>> {
    call.client().remove(&input.session, input.force).await?;
    let text = format!("Session {} is gone.", input.session);
    Ok(Done::new(text, Removed { removed: input.session }))
}

/// See the tool.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ExposePort {
    /// The port within the session.
    port: NonZeroU16,
    /// The session's name; the one of this client, if none is named.
    session: Option<String>,
}

/// Where a port is reached.
#[derive(Serialize, JsonSchema)]
pub(crate) struct Exposed {
    session: String,
    port: u16,
    /// Where it is reached, for as long as this server runs.
    url: Option<String>,
    /// The command that brings it to a port of the machine that it is run on, for longer.
    command: String,
    /// Whether something listens there now.
    listening: bool,
}

pub(crate) async fn expose_port(call: &Call<'_>, input: ExposePort) -> Result<Done<Exposed>> {
    let place = call.place(input.session.as_deref()).await?;
    let (session, port) = (place.session.clone(), input.port.get());
    // Made, if it is the client's own; and that it may be touched is seen here too.
    let known = call.within(&place, || call.client().session(&session)).await?;
    let listening = call.client().port(&session, port).await.is_ok();
    let (url, with) = match (call.forwards, &call.door.ports) {
        (Some(forwards), _) => {
            // Another session of that name would be another one.
            let here = forwards.of(call.client(), &known.id.to_string(), port).await;
            let here = here.map_err(|error| Failure::new(format!("no port is free: {error}")))?;
            (Some(format!("http://{here}/")), "")
        }
        (None, Some(ports)) => (Some(ports.of(&session, port)), " with the key of this client"),
        (None, None) => (None, ""),
    };
    let command = format!("denizen port {session} {port}");
    let now = if listening { "" } else { " Nothing listens there yet." };
    let text = match &url {
        Some(url) => format!(
            "Port {port} of session {session} is reached at {url}{with}, and by `{command}`.{now}"
        ),
        None => format!(
            "`{command}`, run on the daemon's machine, makes port {port} of session {session} a \
             port of that machine, and prints which.{now}"
        ),
    };
    Ok(Done::new(text, Exposed { session, port, url, command, listening }))
}
