//! Ports that something in a session listens on.

use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use denizen_api::Code;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use super::Api;
use super::extract::Path;
use super::refusal::{Answer, Refused};
use crate::lease::Lease;

/// Connect to a port; the connection of the request becomes it (RFC 9110, 7.8), under the name
/// `tcp`.
#[utoipa::path(get, path = "/v1/sessions/{session}/ports/{port}", tag = "ports",
    params(("session" = String, Path, description = "Name or UUID"),
        ("port" = u16, Path, description = "The port within the session")),
    responses((status = 101, description = "It is connected"), Refused))]
pub(crate) async fn connect(
    State(api): State<Api>,
    Path((session, port)): Path<(String, u16)>,
    mut request: Request,
) -> Answer<Response> {
    let upgrades = request.headers().get("upgrade").is_some_and(|it| it == "tcp");
    if !upgrades {
        let detail = "a port is reached by an upgrade of the connection to tcp";
        return Err(Refused::new(Code::Upgrade, detail));
    }
    let id = api.leases.find(&session)?;
    let lease = api.leases.take(id, None).await?;
    let reached = tokio::select! {
        reached = reach(&lease, port) => reached,
        () = lease.ended() => Err(std::io::Error::other("the session is being stopped")),
    };
    let inside = reached.map_err(|error| {
        let detail = format!("port {port} of session {session} cannot be reached: {error}");
        Refused::new(Code::Port, detail)
    })?;
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let Ok(outside) = upgrade.await else { return };
        let (mut outside, mut inside) = (TokioIo::new(outside), inside);
        // Either side may end it at any time.
        tokio::select! {
            _ = tokio::io::copy_bidirectional(&mut outside, &mut inside) => {}
            () = lease.ended() => {}
        }
    });
    let headers = [("connection", "upgrade"), ("upgrade", "tcp")];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}

/// A connection to the port within.
async fn reach(lease: &Lease, port: u16) -> std::io::Result<TcpStream> {
    let agent = lease.guard.agent().map_err(std::io::Error::other)?;
    let inside = agent.connect(port).await.map_err(std::io::Error::other)?;
    let inside = TcpStream::from_std(inside)?;
    // Whether it was refused shows when it can be written to.
    inside.writable().await?;
    inside.take_error()?.map_or(Ok(inside), Err)
}
