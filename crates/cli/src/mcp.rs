//! `denizen mcp`: a server of MCP on standard input and output, until the input ends. Nothing else
//! may be written there: what there is to say goes to standard error.

use std::sync::Arc;

use denizen_mcp::{Door, Wake};

use crate::client::{self, Client};
use crate::config::Settings;
use crate::{Failure, Result};

/// Serves a client by the daemon, which is started anew if it leaves.
pub async fn run(client: Client, settings: Settings, session: Option<String>) -> Result<()> {
    let door = Door { client, identity: String::new(), session, ports: None };
    let settings = Arc::new(settings);
    let wake: Wake = Box::new(move || {
        let settings = settings.clone();
        Box::pin(async move {
            client::connect(&settings).await.map(drop).map_err(|failure| failure.to_string())
        })
    });
    denizen_mcp::stdio(door, wake).await.map_err(|error| Failure::new(error.to_string()))
}
