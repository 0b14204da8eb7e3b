//! `denizen backups`: what the destination holds, and whether it is sound.

use clap::{Args, Subcommand};
use denizen::Retention;
use jiff::{Span, Timestamp, Zoned};
use serde_json::Value;

use crate::client::{self, Client};
use crate::{Failure, Result, progress, show};

#[derive(Subcommand)]
pub enum BackupsVerb {
    /// Check all backups of the destination: that all that they need is there
    Verify {
        /// Also that every byte of them is what was written, which reads all of it
        #[arg(long)]
        read_data: bool,
    },
    /// Delete backups that are not kept, of the sessions known here
    #[command(after_help = "A backup stays if any of the rules keeps it: the newest ones, or the \
newest of each of so many hours, days, weeks, months or years (in UTC) that have one. A session's \
latest backup stays always. Without a rule here, those of the setting `retention` are taken.

Examples:
  denizen backups forget --dry-run --keep-last 3 --keep-daily 7
  denizen backups forget")]
    Forget {
        /// Print what would be deleted, and delete nothing
        #[arg(long)]
        dry_run: bool,
        #[command(flatten)]
        keep: Keep,
    },
    /// Delete backups, also of sessions that are not known here; not the latest of one that is
    Rm {
        /// Each by its name, or its first eight letters or more
        #[arg(required = true, value_name = "BACKUP")]
        backups: Vec<String>,
    },
}

/// Which backups are kept.
#[derive(Args)]
pub struct Keep {
    /// Keep the newest N
    #[arg(long = "keep-last", value_name = "N", default_value_t, hide_default_value = true)]
    last: u32,
    /// Keep those of N hours
    #[arg(long = "keep-hourly", value_name = "N", default_value_t, hide_default_value = true)]
    hourly: u32,
    /// Keep those of N days
    #[arg(long = "keep-daily", value_name = "N", default_value_t, hide_default_value = true)]
    daily: u32,
    /// Keep those of N weeks
    #[arg(long = "keep-weekly", value_name = "N", default_value_t, hide_default_value = true)]
    weekly: u32,
    /// Keep those of N months
    #[arg(long = "keep-monthly", value_name = "N", default_value_t, hide_default_value = true)]
    monthly: u32,
    /// Keep those of N years
    #[arg(long = "keep-yearly", value_name = "N", default_value_t, hide_default_value = true)]
    yearly: u32,
}

impl From<Keep> for Retention {
    fn from(keep: Keep) -> Self {
        Self {
            keep_last: keep.last,
            keep_hourly: keep.hourly,
            keep_daily: keep.daily,
            keep_weekly: keep.weekly,
            keep_monthly: keep.monthly,
            keep_yearly: keep.yearly,
        }
    }
}

/// A session, and what was kept of it.
#[derive(Args)]
pub struct Source {
    /// Name or UUID
    session: String,
    /// This backup, or the one whose name begins so
    #[arg(long)]
    backup: Option<String>,
    /// The newest backup that was taken at that time or before: `2 hours ago`, 2026-01-31T12:00:00Z
    #[arg(long, value_name = "TIME", conflicts_with = "backup", value_parser = past)]
    at: Option<Timestamp>,
    /// A snapshot instead of a backup
    #[arg(long, value_name = "NAME", conflicts_with_all = ["backup", "at"])]
    snapshot: Option<String>,
}

/// Does what is asked of the backups of a session, or of all; gives the exit code.
pub async fn run(
    client: &Client,
    session: Option<&str>,
    verb: Option<BackupsVerb>,
    json: bool,
) -> Result<i32> {
    match (verb, session) {
        (Some(BackupsVerb::Verify { read_data }), _) => {
            let path = format!("/v1/backups/verify?read_data={read_data}");
            let report = progress::showing(client, None, client.json("POST", &path)).await?;
            show::report(&report, json)?;
            // As diff(1) and its like tell: it was done, and something is not as it should be.
            Ok(i32::from(report["findings"].as_array().is_some_and(|all| !all.is_empty())))
        }
        (Some(BackupsVerb::Forget { dry_run, keep }), _) => {
            forget(client, dry_run, keep.into(), json).await.map(|()| 0)
        }
        (Some(BackupsVerb::Rm { backups }), _) => {
            let mut deleted = Vec::new();
            for backup in backups {
                deleted.push(client.delete_backup(&backup).await?);
            }
            show::forgotten(&show::value(deleted)?, false, json).map(|()| 0)
        }
        (None, Some(session)) => {
            let all = client.backups(Some(session)).await?;
            show::backups(&show::value(all)?, json).map(|()| 0)
        }
        (None, None) => {
            show::all_backups(&show::value(client.backups(None).await?)?, json).map(|()| 0)
        }
    }
}

async fn forget(client: &Client, dry_run: bool, retention: Retention, json: bool) -> Result<()> {
    let retention = (!retention.is_empty()).then_some(retention);
    let body = serde_json::json!({ "dry_run": dry_run, "retention": retention });
    let done = client.json_with("POST", "/v1/backups/forget", &body).await?;
    show::forgotten(&done, dry_run, json)
}

/// A time that is over: as RFC 3339 has it, or how long ago it was.
pub fn past(text: &str) -> std::result::Result<Timestamp, String> {
    if let Ok(at) = text.parse::<Timestamp>() {
        return Ok(at);
    }
    let span: Span = text.parse().map_err(|_| {
        "neither a time (2026-01-31T12:00:00Z) nor how long ago (`2 hours ago`)".to_owned()
    })?;
    // `2 hours` is as good as `2 hours ago`.
    let span = if span.is_positive() { span.negate() } else { span };
    let at = Zoned::now().checked_add(span).map_err(|error| error.to_string())?;
    Ok(at.timestamp())
}

/// Backs a session up, and shows what is known of it then.
pub async fn backup(client: &Client, session: &str, json: bool) -> Result<()> {
    let done = progress::showing(client, Some(session), client.backup(session)).await?;
    let done = show::value(done)?;
    show::session(&done, json)
}

impl Source {
    /// Whose it is.
    pub fn session(&self) -> &str {
        &self.session
    }

    /// The path of what is done with it.
    fn path(&self, what: &str) -> String {
        let Self { session, backup, at, snapshot } = self;
        let at = at.map(|at| at.to_string());
        // At most one of them is there.
        let from = [("at", at), ("backup", backup.clone()), ("snapshot", snapshot.clone())];
        let from = from.into_iter().map(|(name, value)| client::query(name, value));
        client::path(session, what) + &from.collect::<String>()
    }
}

/// Puts a session, or these of its files, back, and shows what is known of it then.
pub async fn restore(client: &Client, source: Source, paths: &[String], json: bool) -> Result<()> {
    let (path, session) = (source.path("/restore"), Some(&*source.session));
    let body = serde_json::json!({ "paths": paths });
    let asked = async {
        if paths.is_empty() {
            client.json("POST", &path).await
        } else {
            client.json_with("POST", &path, &body).await
        }
    };
    show::session(&progress::showing(client, session, asked).await?, json)
}

/// Makes a new session, and shows what is known of it.
pub async fn fork(client: &Client, source: Source, json: bool) -> Result<()> {
    let (path, session) = (source.path("/fork"), Some(&*source.session));
    let made = progress::showing(client, session, client.json("POST", &path)).await?;
    show::session(&made, json)
}

/// Recovers sessions, and says how many.
pub async fn recover(client: &Client, json: bool) -> Result<()> {
    let found = show::value(client.recover().await?)?;
    if !json && found.as_array().is_some_and(Vec::is_empty) {
        return Err(Failure::new("no session is in the destination that is not known here"));
    }
    show::sessions(&found, json)
}

/// Where a report tells of a backup.
pub fn finding(finding: &Value) -> String {
    let text = |field: &str| finding[field].as_str().map(str::to_owned);
    let mut line = text("backup").unwrap_or_else(|| "the destination".to_owned());
    if let Some(session) = text("session") {
        line.push_str(&format!(" of {session}"));
    }
    line.push_str(&format!(": {}", text("problem").unwrap_or_default()));
    match text("instead") {
        Some(instead) => line.push_str(&format!("\n  the newest sound one is {instead}")),
        None if finding["session"].is_string() => {
            line.push_str("\n  there is no sound one of that session");
        }
        None => {}
    }
    line
}
