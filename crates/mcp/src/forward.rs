//! Ports of sessions as ports of this machine, for a client on it: for as long as its server runs.
//! They must be of the loopback alone; within this machine, whoever connects is let in.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};

use denizen_client::Client;
use tokio::net::TcpListener;
use tokio::sync::Mutex;
use tokio::task::JoinSet;

/// What is forwarded.
#[derive(Default)]
pub(crate) struct Forwards(Mutex<Known>);

#[derive(Default)]
struct Known {
    ports: HashMap<(String, u16), SocketAddr>,
    /// Those who do it: they end with this.
    at_work: JoinSet<()>,
}

impl Forwards {
    /// Where a port of a session is reached here, from now on. Cancel-safe.
    pub(crate) async fn of(
        &self,
        client: &Client,
        session: &str,
        port: u16,
    ) -> std::io::Result<SocketAddr> {
        let mut known = self.0.lock().await;
        let key = (session.to_owned(), port);
        if let Some(address) = known.ports.get(&key) {
            return Ok(*address);
        }
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let (client, session) = (client.clone(), session.to_owned());
        known.at_work.spawn(async move {
            // Whoever connects sees what becomes of it.
            client.forward(listener, &session, port, drop).await;
        });
        known.ports.insert(key, address);
        Ok(address)
    }
}
