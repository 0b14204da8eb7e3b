//! `host`: no isolation but a folder, as the library began. The agent runs in this process;
//! its init process owns what the session runs.

use denizen_agent::Agent;

use super::{Driver, Site};
use crate::error::{Error, Result};

pub(super) struct Host;

impl Driver for Host {
    fn start(&self, site: &Site) -> Result<Agent> {
        std::fs::read_dir(&site.volume)
            .map_err(|source| Error::volume("open", &site.volume, source))?;
        tracing::debug!(session = %site.id, "host instance ready");
        Ok(Agent::with(site.launch()))
    }
}
