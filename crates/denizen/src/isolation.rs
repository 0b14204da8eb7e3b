//! The seam for places to run: how far a session is kept from its host.
//!
//! An isolation makes a session's instance and ends it; what runs inside is reached through
//! the instance's [`Agent`]. It must never decide when: that is the lifecycle's.

mod host;

use std::path::PathBuf;
use std::sync::Arc;

use denizen_agent::{Agent, Launch};
use uuid::Uuid;

use crate::error::Result;

/// How far a session is kept from its host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Isolation {
    /// Nothing but a folder: commands run as the user the pool runs as, with all that user may
    /// do. For trusted code only.
    #[default]
    Host,
}

impl Isolation {
    /// The word for it in configuration and output.
    pub fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
        }
    }

    pub(crate) fn driver(self) -> Arc<dyn Driver> {
        match self {
            Self::Host => Arc::new(host::Host),
        }
    }
}

/// Where an instance finds its session.
#[derive(Clone, Debug)]
pub(crate) struct Site {
    pub(crate) id: Uuid,
    /// The folder that belongs to the session.
    pub(crate) home: PathBuf,
    /// The session's persistent files, where commands start.
    pub(crate) volume: PathBuf,
}

impl Site {
    /// How its init is launched: leaving a number to end it by, should all else die.
    pub(crate) fn launch(&self) -> Launch {
        Launch { record: Some(self.record()), ..Launch::default() }
    }

    /// The number that the last init of the session has left.
    pub(crate) fn recorded_init(&self) -> Option<u32> {
        denizen_agent::recorded(&self.record())
    }

    fn record(&self) -> PathBuf {
        self.home.join("init")
    }
}

/// Makes instances of one isolation.
pub(crate) trait Driver: Send + Sync {
    /// Makes the instance of a session whose volume is whole.
    fn start(&self, site: &Site) -> Result<Agent>;
}
