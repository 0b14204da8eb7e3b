//! `denizen port`: connections to a port of this machine lead to one of a session, until this
//! program is ended.

use std::net::SocketAddr;

use denizen_client::Error;
use tokio::net::TcpListener;

use crate::client::Client;
use crate::{Failure, Result, show};

/// Listens, says where, and joins what comes.
pub async fn run(
    client: &Client,
    session: &str,
    port: u16,
    listen: SocketAddr,
    json: bool,
) -> Result<()> {
    // That it is there is known before anybody connects.
    client.session(session).await?;
    let failed =
        |error: std::io::Error| Failure::new(format!("cannot listen on {listen}: {error}"));
    let listener = TcpListener::bind(listen).await.map_err(failed)?;
    let here = listener.local_addr().map_err(failed)?;
    if json {
        println!("{}", serde_json::json!({ "address": here }));
    } else {
        println!("{here}");
    }
    let told = |error: Error| eprintln!("denizen: {}", show::harmless(&error.to_string()));
    client.forward(listener, session, port, told).await;
    Ok(())
}
