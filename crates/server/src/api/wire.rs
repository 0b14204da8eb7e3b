//! The library's answers in the words of the API.

use std::time::{SystemTime, UNIX_EPOCH};

use denizen_api as api;

/// Bytes, as they are, in the description.
pub(super) struct Binary;

impl utoipa::PartialSchema for Binary {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::Schema> {
        utoipa::openapi::ObjectBuilder::new()
            .schema_type(utoipa::openapi::schema::Type::String)
            .format(Some(utoipa::openapi::SchemaFormat::KnownFormat(
                utoipa::openapi::KnownFormat::Binary,
            )))
            .into()
    }
}

impl utoipa::ToSchema for Binary {}

/// A server-sent event, in the description.
#[derive(utoipa::ToSchema)]
#[allow(dead_code, reason = "it is only described here: axum writes them")]
pub(super) struct ServerSent {
    /// What kind of event it is, which says what its data is.
    event: String,
    /// Where a later request goes on, as `Last-Event-ID`.
    #[schema(nullable = false)]
    id: Option<String>,
    /// JSON.
    data: String,
}

fn seconds(at: SystemTime) -> f64 {
    match at.duration_since(UNIX_EPOCH) {
        Ok(since) => since.as_secs_f64(),
        Err(before) => -before.duration().as_secs_f64(),
    }
}

pub(super) fn session(info: denizen::SessionInfo) -> api::Session {
    api::Session {
        id: info.id,
        name: info.name,
        isolation: info.isolation.to_owned(),
        image: info.image,
        state: info.state.to_owned(),
        operation: info.operation.map(str::to_owned),
        in_use: info.in_use,
        waiting: info.waiting,
        created_at: seconds(info.created_at),
        last_used: seconds(info.last_used),
        unsaved: info.unsaved,
        unsaved_since: info.unsaved_since.map(seconds),
        backup: info.backup,
        backup_taken_at: info.backup_taken_at.map(seconds),
        backup_size: info.backup_size,
        backup_added: info.backup_added,
        backup_due_at: info.backup_due_at.map(seconds),
        backup_failure: info.backup_failure,
        backup_failed_at: info.backup_failed_at.map(seconds),
        failures: info.failures,
        last_failure: info.last_failure,
        retry_at: info.retry_at.map(seconds),
        usage: None,
        disk_used: info.disk_used,
        disk_limit: info.disk_limit,
        volume: info.volume,
    }
}

pub(super) fn usage(usage: denizen::Usage) -> api::Usage {
    api::Usage {
        memory_bytes: usage.memory_bytes,
        cpu_microseconds: usage.cpu_time.and_then(|it| u64::try_from(it.as_micros()).ok()),
        processes: usage.processes,
    }
}

pub(super) fn backup(backup: denizen::Backup) -> api::Backup {
    api::Backup {
        name: backup.name,
        session: backup.session,
        session_name: backup.session_name,
        host: backup.host,
        taken_at: backup.taken_at.to_string(),
        format: backup.format.name().to_owned(),
        bytes: backup.bytes,
        size: backup.size,
        path: backup.path,
    }
}

pub(super) fn backups(backups: Vec<denizen::Backup>) -> Vec<api::Backup> {
    backups.into_iter().map(backup).collect()
}

pub(super) fn report(report: denizen::BackupReport) -> api::BackupReport {
    let findings = report.findings.into_iter().map(|finding| api::Finding {
        backup: finding.backup,
        session: finding.session,
        problem: finding.problem,
        instead: finding.instead,
    });
    api::BackupReport { backups: report.backups, bytes: report.bytes, findings: findings.collect() }
}

pub(super) fn retention(retention: api::Retention) -> denizen::Retention {
    let api::Retention {
        keep_last,
        keep_hourly,
        keep_daily,
        keep_weekly,
        keep_monthly,
        keep_yearly,
    } = retention;
    denizen::Retention {
        keep_last,
        keep_hourly,
        keep_daily,
        keep_weekly,
        keep_monthly,
        keep_yearly,
    }
}

pub(super) fn image(image: denizen::ImageInfo) -> api::Image {
    api::Image { name: image.name, digest: image.digest, layers: image.layers }
}

pub(super) fn snapshot(snapshot: &denizen::Snapshot) -> api::Snapshot {
    let name = snapshot.name.as_str().to_owned();
    api::Snapshot { name, taken_at: seconds(snapshot.taken_at) }
}

pub(super) fn difference(difference: denizen::Difference) -> api::Difference {
    let denizen::Difference { tree, path, before, after, aspects, .. } = difference;
    let change = match (&before, &after) {
        (None, _) => "added",
        (_, None) => "removed",
        _ => "changed",
    };
    api::Difference {
        change: change.to_owned(),
        tree: tree.to_owned(),
        path: path.to_string_lossy().into_owned(),
        aspects: aspects.into_iter().map(|aspect| aspect.name().to_owned()).collect(),
        before: before.as_ref().map(node),
        after: after.as_ref().map(node),
    }
}

fn node(node: &denizen::Node) -> api::Node {
    let &denizen::Node { kind, size, mode, user, group } = node;
    api::Node { kind: kind.to_owned(), size, mode: format!("{mode:04o}"), user, group }
}
