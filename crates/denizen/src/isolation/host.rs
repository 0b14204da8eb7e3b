//! `host`: no isolation but a folder, as the library began. The agent runs in this process;
//! its init process owns what the session runs.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;

use denizen_agent::Agent;
use denizen_image::Store;

use super::{Driver, Instance, Site};
use crate::error::{Error, Result};

pub(super) struct Host;

impl Driver for Host {
    fn start(&self, site: &Site) -> Result<Instance> {
        std::fs::read_dir(&site.volume)
            .map_err(|source| Error::volume("open", &site.volume, source))?;
        tracing::debug!(session = %site.id, "host instance ready");
        Ok(Instance { agent: Agent::with(site.launch()), env: BTreeMap::new() })
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

    fn out_of_memory(&self, _: &Site) -> u64 {
        0
    }

    fn images(&self) -> Option<&Store> {
        None
    }

    fn owners(&self) -> Option<denizen_archive::Owners> {
        None
    }

    fn layers(&self, _: &Site) -> Vec<PathBuf> {
        Vec::new()
    }
}
