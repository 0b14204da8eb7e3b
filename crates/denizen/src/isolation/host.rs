//! `host`: no isolation but a folder, as the library began. The agent runs in this process;
//! its init process owns what the session runs.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use denizen_agent::Agent;
use denizen_image::Store;

use super::{Driver, Instance, Site, VOLUME};
use crate::error::{Error, Result};
use crate::usage::Usage;

pub(super) struct Host;

impl Driver for Host {
    fn start(&self, site: &Site) -> Result<Instance> {
        std::fs::read_dir(&site.volume)
            .map_err(|source| Error::volume("open", &site.volume, source))?;
        site.check_files("host")?;
        tracing::debug!(session = %site.id, "host instance ready");
        Ok(Instance { agent: Agent::with(site.launch()), env: BTreeMap::new() })
    }

    fn moved(self: Arc<Self>, _: Instance, _: &Site, to: &Site) -> Result<Instance> {
        // Nothing runs before the first command.
        self.start(to)
    }

    /// Nothing goes on without its owner here: no kernel would end it together.
    fn resume(&self, _: &Site) -> Option<Instance> {
        None
    }

    fn leave(&self, _: &Site) -> Result<()> {
        Ok(())
    }

    fn ended(&self, _: &Site) {}

    fn can_freeze(&self) -> bool {
        false
    }

    fn keeps_frozen(&self) -> bool {
        false
    }

    fn copied(&self, _: &Site, _: &Site) -> Result<()> {
        Ok(())
    }

    fn freeze(&self, site: &Site) -> Result<()> {
        let source = std::io::ErrorKind::Unsupported.into();
        Err(Error::Freezer { action: "freeze", session: site.id, source })
    }

    fn thaw(&self, _: &Site) -> Result<bool> {
        Ok(false)
    }

    fn workdir(&self, site: &Site) -> PathBuf {
        site.volume.clone()
    }

    fn kept(&self, site: &Site, path: &Path) -> Result<Option<PathBuf>> {
        let path = site.volume.join(path);
        Ok(path.strip_prefix(&site.home).ok().filter(|it| it.starts_with(VOLUME)).map(Into::into))
    }

    fn agent_command(&self) -> Option<Vec<OsString>> {
        None
    }

    fn limits(&self) -> Vec<&'static str> {
        Vec::new()
    }

    fn disk_limit(&self) -> Option<u64> {
        None
    }

    fn out_of_memory(&self, _: &Site) -> u64 {
        0
    }

    fn usage(&self, _: &Site) -> Usage {
        Usage::default()
    }

    fn images(&self) -> Option<&Store> {
        None
    }

    fn choose_image(&self, _: &Site, _: &str) -> Result<()> {
        Err(super::no_roots("host"))
    }

    fn image(&self, _: &Site) -> Option<String> {
        None
    }

    fn owners(&self) -> Option<denizen_archive::Owners> {
        None
    }

    fn layers(&self, _: &Site) -> Vec<PathBuf> {
        Vec::new()
    }
}
