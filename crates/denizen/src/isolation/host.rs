//! `host`: no isolation but a folder, as the library began. The agent runs in this process;
//! its init process owns what the session runs.

use std::ffi::OsString;
use std::path::PathBuf;

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

    fn ended(&self, _: &Site) {}

    fn workdir(&self, site: &Site) -> PathBuf {
        site.volume.clone()
    }

    fn agent_command(&self) -> Option<Vec<OsString>> {
        None
    }

    fn limits(&self) -> Vec<&'static str> {
        Vec::new()
    }
}
