//! `denizen port`: connections to a port of this machine lead to one of a session, until this
//! program is ended.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::io::copy_bidirectional;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

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
    let client = Arc::new(client.clone());
    let mut joined = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let (mut ours, _) = accepted.map_err(failed)?;
                let (client, session) = (client.clone(), session.to_owned());
                joined.spawn(async move {
                    match client.port(&session, port).await {
                        // Either side may end it at any time.
                        Ok(mut theirs) => {
                            let _ = copy_bidirectional(&mut ours, &mut theirs).await;
                        }
                        Err(error) => {
                            eprintln!("denizen: {}", show::harmless(&error.to_string()));
                        }
                    }
                });
            }
            Some(_) = joined.join_next() => {}
        }
    }
}
