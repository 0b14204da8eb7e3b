//! What is said on the wire: names and shapes are those of E2B's control plane, and no others are
//! promised to anybody. What is asked for and not known here is refused, not forgotten, where
//! leaving it out would be less than its caller counts on.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// The version of envd that sandboxes say they have: the first that does all that is done here.
pub(crate) const ENVD_VERSION: &str = "0.6.4";
/// Who a client is; a thing of the past that clients must be told.
pub(crate) const CLIENT: &str = "denizen";

/// How long a sandbox lives, in seconds, if that is not said; and as clients of the first version
/// have it.
pub(crate) const TIMEOUT: u64 = 300;
pub(crate) const OLD_TIMEOUT: u64 = 15;

/// Whether a path is one of E2B's control plane, or would be.
pub(crate) fn is_ours(path: &str) -> bool {
    let first = [
        "/v2",
        "/v3",
        "/teams",
        "/sandboxes",
        "/templates",
        "/snapshots",
        "/default-templates",
        "/volumes",
        "/volumecontent",
        "/secrets",
    ];
    first.iter().any(|ours| {
        path.strip_prefix(ours).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    })
}

/// So many seconds.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
#[serde(try_from = "i64")]
pub(crate) struct Seconds(pub(crate) u64);

impl TryFrom<i64> for Seconds {
    type Error = &'static str;

    fn try_from(seconds: i64) -> Result<Self, Self::Error> {
        seconds.try_into().map(Self).map_err(|_| "a time is a number of seconds, and not negative")
    }
}

/// `POST /sandboxes`, `POST /v2/sandboxes`.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct NewSandbox {
    #[serde(rename = "templateID")]
    pub(crate) template_id: String,
    pub(crate) timeout: Option<Seconds>,
    #[serde(default)]
    pub(crate) auto_pause: bool,
    pub(crate) auto_pause_memory: Option<bool>,
    pub(crate) auto_resume: Option<AutoResume>,
    #[serde(rename = "allow_internet_access")]
    pub(crate) allow_internet_access: Option<bool>,
    pub(crate) network: Option<Network>,
    #[serde(default)]
    pub(crate) metadata: Option<BTreeMap<String, String>>,
    #[serde(default)]
    pub(crate) env_vars: Option<BTreeMap<String, String>>,
    pub(crate) iam: Option<serde_json::Value>,
    #[serde(default)]
    pub(crate) volume_mounts: Vec<VolumeMount>,
}

/// That a sandbox has a volume, and where.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub(crate) struct VolumeMount {
    pub(crate) name: String,
    pub(crate) path: String,
}

#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct AutoResume {
    #[serde(default)]
    pub(crate) enabled: bool,
}

/// What a sandbox may reach, and who may reach it.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Network {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) allow_public_traffic: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) allow_out: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) deny_out: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) mask_request_host: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) dns_servers: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) egress_proxy: Option<serde_json::Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) https_ports: Option<Vec<u16>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) rules: Option<serde_json::Value>,
    /// What is not known here, which is refused by its name.
    #[serde(flatten)]
    pub(crate) others: BTreeMap<String, serde_json::Value>,
}

/// `PUT /sandboxes/{id}/network`: in the place of what was, what is left out is no more.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct NetworkUpdate {
    pub(crate) allow_out: Option<Vec<String>>,
    pub(crate) deny_out: Option<Vec<String>>,
    pub(crate) dns_servers: Option<Vec<String>>,
    pub(crate) egress_proxy: Option<serde_json::Value>,
    pub(crate) rules: Option<serde_json::Value>,
    pub(crate) mask_request_host: Option<String>,
    #[serde(rename = "allow_internet_access")]
    pub(crate) allow_internet_access: Option<bool>,
    #[serde(flatten)]
    pub(crate) others: BTreeMap<String, serde_json::Value>,
}

/// A sandbox, to whoever is to use it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Sandbox {
    #[serde(rename = "templateID")]
    pub(crate) template_id: String,
    #[serde(rename = "sandboxID")]
    pub(crate) id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) alias: Option<String>,
    #[serde(rename = "clientID")]
    pub(crate) client_id: &'static str,
    pub(crate) envd_version: &'static str,
    pub(crate) envd_access_token: String,
    pub(crate) traffic_access_token: Option<String>,
    pub(crate) domain: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum State {
    Running,
    Paused,
}

/// A sandbox in a list.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Listed {
    #[serde(rename = "templateID")]
    pub(crate) template_id: String,
    #[serde(rename = "sandboxID")]
    pub(crate) id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) alias: Option<String>,
    #[serde(rename = "clientID")]
    pub(crate) client_id: &'static str,
    pub(crate) started_at: Timestamp,
    pub(crate) end_at: Timestamp,
    pub(crate) cpu_count: u32,
    #[serde(rename = "memoryMB")]
    pub(crate) memory_mb: u32,
    #[serde(rename = "diskSizeMB")]
    pub(crate) disk_size_mb: u32,
    pub(crate) state: State,
    pub(crate) envd_version: &'static str,
    pub(crate) metadata: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) volume_mounts: Vec<VolumeMount>,
}

/// A sandbox with all that is told of it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Detail {
    #[serde(flatten)]
    pub(crate) listed: Listed,
    pub(crate) envd_access_token: String,
    pub(crate) allow_internet_access: Option<bool>,
    pub(crate) domain: Option<String>,
    pub(crate) network: Network,
    pub(crate) lifecycle: Lifecycle,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) pause_mode: Option<&'static str>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Lifecycle {
    pub(crate) auto_resume: bool,
    pub(crate) on_timeout: super::record::OnTimeout,
}

/// `POST …/connect`, `…/resume`.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Connect {
    pub(crate) timeout: Option<Seconds>,
    pub(crate) auto_pause: Option<bool>,
    pub(crate) memory: Option<bool>,
}

/// `POST …/pause`.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct PauseAs {
    pub(crate) memory: Option<bool>,
}

/// `POST …/timeout`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct SetTimeout {
    pub(crate) timeout: Seconds,
    /// Whether it takes no time away.
    #[serde(default)]
    pub(crate) extend_only: bool,
}

/// `POST …/refreshes`.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct Refresh {
    pub(crate) duration: Option<Seconds>,
}

/// `POST …/fork`.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct Fork {
    pub(crate) timeout: Option<Seconds>,
    pub(crate) count: Option<usize>,
}

/// What became of one fork.
#[derive(Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Forked {
    Sandbox(Sandbox),
    Error { code: u16, message: String },
}

/// `POST …/snapshots`.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct NewSnapshot {
    pub(crate) name: Option<String>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Snapshot {
    #[serde(rename = "snapshotID")]
    pub(crate) snapshot_id: String,
    pub(crate) names: Vec<String>,
}

/// What a sandbox used at one time.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Metric {
    pub(crate) timestamp: Timestamp,
    pub(crate) timestamp_unix: i64,
    pub(crate) cpu_count: u32,
    pub(crate) cpu_used_pct: f64,
    pub(crate) mem_used: u64,
    pub(crate) mem_total: u64,
    pub(crate) mem_cache: u64,
    pub(crate) disk_used: u64,
    pub(crate) disk_total: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Level {
    Info,
    Warn,
    Error,
}

/// A line of a log.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct LogEntry {
    pub(crate) timestamp: Timestamp,
    pub(crate) level: Level,
    pub(crate) message: String,
    pub(crate) fields: BTreeMap<String, String>,
}
