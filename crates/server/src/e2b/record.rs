//! What is kept of a sandbox and of a template. Nothing here does I/O, and nothing asks what time
//! it is: what is to be done when, is told by [`Sandbox::due`] and its neighbours.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::wire::{Network, VolumeMount};

/// What happens to a sandbox when its time is over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum OnTimeout {
    /// It is removed.
    #[default]
    Kill,
    /// It is put to sleep.
    Pause,
}

/// A sandbox that sleeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Pause {
    /// With what ran in it.
    pub(crate) memory: bool,
}

/// What a sandbox begins with, beyond its files: of a template's steps, and what was asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Setup {
    /// What every command's environment has.
    pub(crate) env: BTreeMap<String, String>,
    /// Who runs commands, if they do not say.
    pub(crate) user: Option<String>,
    /// Where they start, if they do not say.
    pub(crate) workdir: Option<String>,
    /// What runs from its start on.
    pub(crate) start: Option<Start>,
}

/// What a sandbox runs from its start on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Start {
    /// A shell's line, and one that succeeds when the first is ready.
    Command { line: String, ready: Option<String> },
    /// The code interpreter.
    Interpreter,
}

/// A sandbox: a session, and what its clients were promised.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Sandbox {
    pub(crate) id: Uuid,
    /// The template's id, and the name by which it was asked for.
    pub(crate) template: String,
    pub(crate) alias: Option<String>,
    pub(crate) metadata: BTreeMap<String, String>,
    pub(crate) started_at: Timestamp,
    /// When its time is over.
    pub(crate) end_at: Timestamp,
    pub(crate) on_timeout: OnTimeout,
    /// Whether a pause at its end keeps what runs.
    pub(crate) keeps_memory: bool,
    /// Whether whoever asks for it wakes it.
    pub(crate) auto_resume: bool,
    pub(crate) paused: Option<Pause>,
    /// What lets a client in.
    pub(crate) token: String,
    /// What lets one in at its ports, if not everybody is.
    pub(crate) traffic_token: Option<String>,
    pub(crate) network: Network,
    pub(crate) allow_internet_access: Option<bool>,
    #[serde(default)]
    pub(crate) volume_mounts: Vec<VolumeMount>,
    pub(crate) setup: Setup,
}

/// The furthest that a deadline can be away: what has no end is as good as that.
const FOREVER: SignedDuration = SignedDuration::from_hours(24 * 365 * 100);

/// So many seconds after `now`.
pub(crate) fn after(now: Timestamp, seconds: u64) -> Timestamp {
    let wait = i64::try_from(seconds).map_or(FOREVER, SignedDuration::from_secs).min(FOREVER);
    now.checked_add(wait).unwrap_or(Timestamp::MAX)
}

impl Sandbox {
    /// When something is to be done with it; never, if it sleeps already.
    pub(crate) fn due(&self) -> Option<Timestamp> {
        self.paused.is_none().then_some(self.end_at)
    }

    /// Whether it is about to be ended: nobody is to count on it any more.
    pub(crate) fn is_over(&self, now: Timestamp) -> bool {
        self.on_timeout == OnTimeout::Kill && self.due().is_some_and(|due| due <= now)
    }

    /// A sandbox that sleeps without its memory wakes only when that is asked for by name: what
    /// ran in it is gone, and whoever sends it a request by chance would not see that.
    pub(crate) fn wakes_by_itself(&self) -> bool {
        self.auto_resume && self.paused.is_some_and(|pause| pause.memory)
    }

    /// Moves its end, but never to an earlier time.
    pub(crate) fn extend(&mut self, end: Timestamp) {
        self.end_at = self.end_at.max(end);
    }
}

/// Where a template's files are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Source {
    /// As every new session's.
    Root,
    /// An image, by its name.
    Image(String),
    /// A session that nobody uses: new ones are copies of it.
    Session(Uuid),
}

/// A state of a template.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Build {
    pub(crate) source: Source,
    pub(crate) setup: Setup,
    pub(crate) made_at: Timestamp,
}

/// A name for builds, of which one is what it stands for now, and others have tags.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Template {
    pub(crate) id: String,
    pub(crate) name: Option<String>,
    /// The sandbox that it is a snapshot of.
    pub(crate) snapshot_of: Option<Uuid>,
    pub(crate) builds: BTreeMap<Uuid, Build>,
    /// Which build each tag is for.
    pub(crate) tags: BTreeMap<String, Uuid>,
    pub(crate) created_at: Timestamp,
    pub(crate) updated_at: Timestamp,
    pub(crate) public: bool,
}

impl Template {
    pub(crate) fn new(id: String, name: Option<String>, now: Timestamp) -> Self {
        let (builds, tags) = Default::default();
        let (snapshot_of, public) = Default::default();
        Self { id, name, snapshot_of, builds, tags, created_at: now, updated_at: now, public }
    }

    /// Adds a build under these tags, and gives those that have no tag any more.
    pub(crate) fn add(&mut self, id: Uuid, build: Build, tags: &[String]) -> Vec<Build> {
        self.updated_at = build.made_at;
        self.builds.insert(id, build);
        self.tags.extend(tags.iter().map(|tag| (tag.clone(), id)));
        self.take_untagged()
    }

    /// Takes tags away, and gives builds that have none any more.
    pub(crate) fn untag(&mut self, tags: &[String]) -> Vec<Build> {
        self.tags.retain(|tag, _| !tags.contains(tag));
        self.take_untagged()
    }

    fn take_untagged(&mut self) -> Vec<Build> {
        let tagged: Vec<Uuid> = self.tags.values().copied().collect();
        let untagged = |id: &Uuid| !tagged.contains(id);
        let gone: Vec<Uuid> = self.builds.keys().copied().filter(untagged).collect();
        gone.iter().filter_map(|id| self.builds.remove(id)).collect()
    }

    /// What it is called.
    pub(crate) fn shown(&self) -> &str {
        self.name.as_deref().unwrap_or(&self.id)
    }

    /// Its names with its tags, if it has a name.
    pub(crate) fn names(&self) -> Vec<String> {
        let name = self.name.iter();
        name.flat_map(|name| self.tags.keys().map(move |tag| format!("{name}:{tag}"))).collect()
    }

    /// The same, that with this tag first.
    pub(crate) fn names_from(&self, tag: &str) -> Vec<String> {
        let mut names = self.names();
        names.sort_by_key(|name| tagged(name).1 != tag);
        names
    }
}

/// What a new sandbox is made of.
#[derive(Clone, Debug)]
pub(crate) struct Model {
    /// The id of the template.
    pub(crate) template: String,
    pub(crate) alias: Option<String>,
    pub(crate) source: Source,
    pub(crate) setup: Setup,
    /// Whether what runs in the source goes on in what is made of it.
    pub(crate) goes_on: bool,
}

/// The tag of a name that has none.
pub(crate) const DEFAULT_TAG: &str = "default";

/// A name and its tag.
pub(crate) fn tagged(name: &str) -> (&str, &str) {
    // A registry's port is no tag: that has no slash.
    match name.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, tag),
        _ => (name, DEFAULT_TAG),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn names_have_tags_and_registries_have_ports() {
        assert_eq!(tagged("a"), ("a", "default"));
        assert_eq!(tagged("a:b"), ("a", "b"));
        assert_eq!(tagged("host:5000/a"), ("host:5000/a", "default"));
        assert_eq!(tagged("host:5000/a:b"), ("host:5000/a", "b"));
    }

    #[test]
    fn a_build_is_kept_for_as_long_as_a_tag_is_for_it() {
        let build = |name: &str| Build {
            source: Source::Image(name.to_owned()),
            setup: Setup::default(),
            made_at: Timestamp::now(),
        };
        let [one, two] = [Uuid::from_u128(1), Uuid::from_u128(2)];
        let tags = |all: &[&str]| all.iter().map(|tag| (*tag).to_owned()).collect::<Vec<_>>();
        let mut template = Template::new("id".to_owned(), Some("a".to_owned()), Timestamp::now());
        assert!(template.add(one, build("one"), &tags(&["default", "v1"])).is_empty());
        assert!(template.add(two, build("two"), &tags(&["default"])).is_empty());
        assert_eq!(template.names(), ["a:default", "a:v1"]);
        assert_eq!(template.names_from("v1"), ["a:v1", "a:default"]);
        let gone = template.untag(&tags(&["v1", "v2"]));
        assert_eq!(gone.len(), 1);
        assert_eq!(gone[0].source, Source::Image("one".to_owned()));
        assert_eq!(template.tags["default"], two);
    }

    #[test]
    fn an_end_has_no_limit_but_the_calendar() {
        let now = Timestamp::now();
        assert_eq!(after(now, 0), now);
        assert_eq!(after(now, 60).duration_since(now), SignedDuration::from_mins(1));
        assert!(after(now, 25 * 3600) > after(now, 24 * 3600));
        assert_eq!(after(now, u64::MAX), after(now, u64::MAX - 1));
        assert_eq!(after(Timestamp::MAX, 1), Timestamp::MAX);
    }
}
