//! The library's door: the manager, its builder and the guard.

use std::collections::HashMap;
use std::fmt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, SystemTime};

use denizen_agent::Agent;
use denizen_image::{ImportOptions, Progress, PullOptions, Store};
use denizen_network::EgressRules;
use denizen_repository::Report as BackupReport;
use tokio::io::AsyncRead;
use uuid::Uuid;

use crate::backup::{Backup, BackupFormat, Retention};
use crate::command::{Command, LimitWatch};
use crate::config::VmPoolRuntimeConfig;
use crate::error::{Error, Result};
use crate::event::Events;
use crate::isolation::{ImageInfo, Isolation, Limits, Network, Options, info};
use crate::lifecycle::{Saved, Sleep, Want};
use crate::name::{SessionName, SnapshotName};
use crate::pool::{Export, Figures, Hold, Pool, SessionInfo, Settings, Tasks, blocking};
use crate::share::{Mount, Share, SharedFiles};
use crate::snapshot::{Difference, Snapshot, Version};
use crate::time::{Clock, SystemClock};
use crate::usage::Usage;
use crate::volume::Volumes;

/// A pool of sessions under one folder. There is one for each volume root at any time: a
/// second one, in this process or another, is refused.
///
/// Dropping the manager stops its tasks. Guards still held stay usable until they are dropped;
/// after the last one nothing of the pool runs any more. [`MicroVmManager::shutdown`] is the
/// gentle way; [`MicroVmManager::leave`] lets what runs go on.
pub struct MicroVmManager {
    config: Arc<VmPoolRuntimeConfig>,
    /// None if the pool is disabled.
    pool: Option<Arc<Pool>>,
    _tasks: Option<Tasks>,
}

impl fmt::Debug for MicroVmManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MicroVmManager")
            .field("enabled", &self.config.enabled)
            .field("volume_root", &self.config.volume_root)
            .field("active_vms", &self.pool.as_ref().map_or(0, |pool| pool.resident()))
            .finish()
    }
}

/// What can be chosen for a pool beyond its configuration.
#[derive(Debug)]
#[must_use = "a builder does nothing until it is built"]
pub struct Builder {
    config: VmPoolRuntimeConfig,
    settings: Settings,
}

impl Builder {
    /// How far sessions are kept from their host. Default: [`Isolation::Host`].
    pub fn isolation(mut self, isolation: Isolation) -> Self {
        self.settings.isolation = isolation;
        self
    }

    /// What each session may use.
    pub fn limits(mut self, limits: Limits) -> Self {
        self.settings.instances.limits = limits;
        self
    }

    /// Which networks sessions can reach. Default: none. Under `host` isolation they share their
    /// host's.
    pub fn network(mut self, network: Network) -> Self {
        self.settings.instances.network = network;
        self
    }

    /// What new sessions have as their root: the name of an image in the pool
    /// ([`MicroVmManager::pull_image`]), or the absolute path of a folder. Default: what every
    /// user of the host sees of its operating system. Sessions keep the root they were made with.
    pub fn image(mut self, image: impl Into<String>) -> Self {
        self.settings.instances.image = Some(image.into());
        self
    }

    /// The folder for what can be made again, which pools of one user may share. Default: in
    /// the volume root.
    pub fn cache(mut self, folder: impl Into<PathBuf>) -> Self {
        self.settings.instances.cache = Some(folder.into());
        self
    }

    /// This program's own file, to be run within instances that have a root of their own with
    /// what [`VmExecutionGuard::agent_command`] says. Default: none.
    pub fn agent_program(mut self, program: impl Into<PathBuf>) -> Self {
        self.settings.instances.agent_program = Some(program.into());
        self
    }

    /// The kernel of virtual machines, and where its modules are if not in `/lib/modules` by its
    /// version. Default: the newest in `/boot` that can be one's, Debian's cloud kernel first.
    pub fn kernel(mut self, image: impl Into<PathBuf>, modules: Option<PathBuf>) -> Self {
        self.settings.instances.kernel = Some((image.into(), modules));
        self
    }

    /// How long a session in which something runs goes on when this process dies, or leaves it by
    /// [`MicroVmManager::leave`]: the next pool over the same folder finds it, and it ends if
    /// none comes. Commands in the foreground end all the same. Only where sessions have
    /// namespaces of their own: [`Isolation::Sandbox`]. Default: not at all, everything
    /// ends at once.
    pub fn linger(mut self, time: Duration) -> Self {
        self.settings.instances.linger = time;
        self
    }

    /// Where the pool reads the time. Default: [`SystemClock`].
    pub fn clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.settings.clock = clock;
        self
    }

    /// How long a caller waits, in line with the others, for a session in use or for a place
    /// in a full pool. Default: for a session in use as long as it takes, for a place not at
    /// all.
    pub fn acquire_timeout(mut self, limit: Duration) -> Self {
        self.settings.acquire_timeout = Some(limit);
        self
    }

    /// Whether processes that a command left running keep their session from being stopped
    /// or frozen when idle. Default: yes.
    pub fn background_is_use(mut self, counts: bool) -> Self {
        self.settings.background_is_use = counts;
        self
    }

    /// How many sandboxes are kept ready for sessions to come, so that a new one need not wait
    /// for its own. They take places of `max_vms` only while these are free. None where there
    /// is a bootstrap command, and of no use under `host` isolation. Default: 0.
    pub fn spares(mut self, count: usize) -> Self {
        self.settings.spares = count;
        self
    }

    /// How new backups are written. What the destination has in the other format can be restored
    /// all the same. Default: [`BackupFormat::Archive`].
    pub fn backup_format(mut self, format: BackupFormat) -> Self {
        self.settings.backup_format = format;
        self
    }

    /// The file with the password of the backup repository. It is made, with a new one, where
    /// there is neither the file nor a repository; without it nothing of a repository can be
    /// read, here or elsewhere. Default: `.denizen/backup.key` in the volume root.
    pub fn backup_key(mut self, file: impl Into<PathBuf>) -> Self {
        self.settings.backup_key = Some(file.into());
        self
    }

    /// Which backups are kept; once a day, the others of the sessions that are known here are
    /// deleted. Never are a session's newest, the one that it was last saved in or put back from,
    /// and one that it is being put back from. Default: all are kept.
    pub fn retention(mut self, retention: Retention) -> Self {
        self.settings.retention = retention;
        self
    }

    /// What becomes of sessions that are idle. Default: [`Sleep::Stop`]. Freezing needs
    /// [`Isolation::Sandbox`] and a control group that this process is granted, or
    /// [`Isolation::MicroVm`].
    pub fn sleep(mut self, sleep: Sleep) -> Self {
        self.settings.instances.sleep = sleep;
        self
    }

    /// Opens the pool: makes its folders, takes its lock and takes up what an earlier process
    /// left.
    ///
    /// # Errors
    /// [`Error::NoRuntime`] outside of a Tokio runtime; [`Error::Config`], [`Error::Root`],
    /// [`Error::RootOwner`] and [`Error::Registry`] if the volume root cannot be used;
    /// [`Error::NoFreezer`] if sessions shall be frozen and cannot be.
    pub fn build(self) -> Result<Arc<MicroVmManager>> {
        let config = Arc::new(self.config);
        if !config.enabled {
            return Ok(Arc::new(MicroVmManager { config, pool: None, _tasks: None }));
        }
        if tokio::runtime::Handle::try_current().is_err() {
            return Err(Error::NoRuntime);
        }
        let (pool, tasks) = Pool::open(config.clone(), self.settings)?;
        Ok(Arc::new(MicroVmManager { config, pool: Some(pool), _tasks: Some(tasks) }))
    }
}

impl MicroVmManager {
    /// Opens a pool with the defaults of [`Builder`].
    ///
    /// # Errors
    /// As [`Builder::build`].
    pub fn new(config: VmPoolRuntimeConfig) -> Result<Arc<Self>> {
        Self::builder(config).build()
    }

    /// Begins to choose what the configuration has no fields for.
    pub fn builder(config: VmPoolRuntimeConfig) -> Builder {
        let settings = Settings {
            backup_format: BackupFormat::default(),
            backup_key: None,
            retention: Retention::default(),
            isolation: Isolation::default(),
            instances: Options::default(),
            clock: Arc::new(SystemClock),
            acquire_timeout: None,
            background_is_use: true,
            spares: 0,
        };
        Builder { config, settings }
    }

    /// Whether there is a pool at all.
    pub fn is_enabled(&self) -> bool {
        self.config.enabled
    }

    /// The configuration the pool was opened with.
    pub fn config(&self) -> &VmPoolRuntimeConfig {
        &self.config
    }

    /// How far sessions are kept from their host.
    ///
    /// # Errors
    /// [`Error::Disabled`].
    pub fn isolation(&self) -> Result<Isolation> {
        Ok(self.pool()?.isolation())
    }

    /// Which resources are limited for a session as a whole (`memory`, `pids`, `cpu`), rather
    /// than for each of its processes.
    ///
    /// # Errors
    /// [`Error::Disabled`].
    pub fn limited_resources(&self) -> Result<Vec<&'static str>> {
        Ok(self.pool()?.driver().limits())
    }

    /// What each session may use.
    ///
    /// # Errors
    /// [`Error::Disabled`].
    pub fn limits(&self) -> Result<Limits> {
        Ok(self.pool()?.limits().clone())
    }

    /// What runs the sessions' virtual machines, and whether with KVM, for people; none where
    /// sessions have none. The first time, a guest is run to find out.
    ///
    /// Cancel-safe: that goes on.
    pub async fn hypervisor(&self) -> Result<Option<String>> {
        let pool = self.pool()?.clone();
        pool.hypervisor().await
    }

    /// Whether sessions can be frozen here: while they are copied, when they are paused, and idle
    /// ones where [`Builder::sleep`] says so.
    ///
    /// # Errors
    /// [`Error::Disabled`].
    pub fn can_freeze(&self) -> Result<bool> {
        Ok(self.pool()?.driver().can_freeze())
    }

    pub(crate) fn pool(&self) -> Result<&Arc<Pool>> {
        self.pool.as_ref().ok_or(Error::Disabled)
    }

    /// Takes a session for exclusive use: makes it if it is new, restores it if it is archived,
    /// starts it if it is stopped. Callers for one session are served in order.
    ///
    /// Cancel-safe: dropped at any point, the call leaves no trace in the line, and a session
    /// that was just granted is given back. A session that was being made is made to the end.
    ///
    /// # Errors
    /// [`Error::Disabled`], [`Error::AtCapacity`], [`Error::AcquireTimeout`],
    /// [`Error::Bootstrap`], [`Error::VolumeMissing`], [`Error::ShuttingDown`], or what kept
    /// the session from being made, restored or started.
    pub async fn acquire(&self, session_id: Uuid) -> Result<VmExecutionGuard> {
        let hold = self.pool()?.acquire(session_id).await?;
        Ok(VmExecutionGuard { hold })
    }

    /// As [`MicroVmManager::acquire`], but a new session is made of this image (its name, as
    /// [`MicroVmManager::images`] tells it) rather than of the pool's default. Cancel-safe as
    /// that.
    ///
    /// # Errors
    /// As [`MicroVmManager::acquire`]; [`Error::OtherImage`] if there is such a session and it
    /// is made of something else, [`Error::Image`] if there is no such image.
    pub async fn acquire_with_image(
        &self,
        session_id: Uuid,
        image: &str,
    ) -> Result<VmExecutionGuard> {
        let image = self.image(image).await?.name;
        let hold = self.pool()?.acquire_with_image(session_id, &image).await?;
        Ok(VmExecutionGuard { hold })
    }

    /// Does now what is due: stops or freezes idle sessions, backs up, prunes, makes spares,
    /// forgets backups. What
    /// failed before and is being waited out is tried again at once. Returns when it is done; a
    /// failure shows in [`MicroVmManager::inspect`] and in the events, and stops nothing else.
    ///
    /// Cancel-safe: what has begun goes on.
    ///
    /// # Errors
    /// None at present; a disabled pool has nothing to do.
    pub async fn run_maintenance_now(&self) -> Result<()> {
        if let Some(pool) = &self.pool {
            pool.maintain().await;
        }
        Ok(())
    }

    /// All sessions, by name.
    ///
    /// # Errors
    /// [`Error::Disabled`].
    pub fn sessions(&self) -> Result<Vec<SessionInfo>> {
        Ok(self.pool()?.sessions())
    }

    /// What is known of one session.
    ///
    /// # Errors
    /// [`Error::Disabled`], [`Error::Unknown`].
    pub fn inspect(&self, session_id: Uuid) -> Result<SessionInfo> {
        self.pool()?.inspect(session_id)
    }

    /// What those of the sessions use that run; others are not in the answer. A thousand take
    /// less than a tenth of a second. Cancel-safe.
    ///
    /// # Errors
    /// [`Error::Disabled`].
    pub async fn usage(&self, sessions: &[Uuid]) -> Result<HashMap<Uuid, Usage>> {
        self.pool()?.usage(sessions).await
    }

    /// The session of that name, if there is one.
    ///
    /// # Errors
    /// [`Error::Disabled`].
    pub fn find(&self, name: &SessionName) -> Result<Option<Uuid>> {
        Ok(self.pool()?.named(name))
    }

    /// The session of that name; if there is none, the id that a session of that name will
    /// have from now on. Cancel-safe.
    ///
    /// # Errors
    /// [`Error::Disabled`], [`Error::Registry`].
    pub async fn find_or_name(&self, name: &SessionName) -> Result<Uuid> {
        self.pool()?.id_for(name).await
    }

    /// Ends what runs in a session; its files stay. With `force`, background processes are
    /// ended too, which otherwise are [`Error::InUse`]; a guard being held always is. Already
    /// stopped is fine. Cancel-safe: what has begun goes on.
    ///
    /// # Errors
    /// [`Error::Disabled`], [`Error::Unknown`], [`Error::InUse`], [`Error::VolumeMissing`].
    pub async fn stop(&self, session_id: Uuid, force: bool) -> Result<()> {
        self.pool()?.ask(session_id, Want::Stopped { force }).await.map(drop)
    }

    /// Puts a session to sleep as it stands, whatever runs in it and whatever becomes of idle ones
    /// ([`Builder::sleep`]): a sandbox is frozen, a virtual machine suspended to disk. It sleeps
    /// until [`MicroVmManager::acquire`] is next called for it, and then goes on where it was; until
    /// then it is backed up, pruned and sent away as idle ones are that sleep. Already asleep,
    /// stopped or archived is fine. Cancel-safe: what has begun goes on.
    ///
    /// # Errors
    /// [`Error::NoFreezer`] where sessions cannot be frozen ([`MicroVmManager::can_freeze`]);
    /// [`Error::Freezer`] if this one could not be; [`Error::InUse`] while a guard is held;
    /// [`Error::Disabled`], [`Error::Unknown`], [`Error::VolumeMissing`].
    pub async fn pause(&self, session_id: Uuid) -> Result<()> {
        self.pool()?.ask(session_id, Want::Paused).await.map(drop)
    }

    /// Narrows what a session has of the pool's network ([`Builder::network`]); with none, it has all
    /// of that again. In force at once in one that runs: connections to what is closed now are cut.
    /// Kept with the session, also while it is archived, and given to its forks. Where the pool has
    /// no network, it stays so. [`EgressRules::nothing`] is a session without any. Cancel-safe: what
    /// has begun goes on.
    ///
    /// # Errors
    /// [`Error::Egress`] if a name is denied; [`Error::Isolation`] under `host` isolation;
    /// [`Error::Disabled`], [`Error::Unknown`], [`Error::Registry`].
    pub async fn set_egress(&self, session_id: Uuid, rules: Option<EgressRules>) -> Result<()> {
        self.pool()?.set_egress(session_id, rules).await
    }

    /// What a session has of the pool's network, if that was narrowed.
    ///
    /// # Errors
    /// [`Error::Disabled`], [`Error::Unknown`].
    pub fn egress(&self, session_id: Uuid) -> Result<Option<EgressRules>> {
        self.pool()?.egress(session_id)
    }

    /// Makes a shared folder: files that several sessions can have at once, and that stay when all
    /// of those are gone. They are on this disk, and in no backup. Cancel-safe: what has begun goes
    /// on.
    ///
    /// # Errors
    /// [`Error::Name`], [`Error::ShareExists`], [`Error::Volume`], [`Error::Registry`],
    /// [`Error::Disabled`].
    pub async fn create_share(&self, name: &str) -> Result<Share> {
        self.pool()?.create_share(name.to_owned()).await
    }

    /// All shared folders, by name. Cancel-safe.
    ///
    /// # Errors
    /// [`Error::Disabled`], [`Error::Registry`].
    pub async fn shares(&self) -> Result<Vec<Share>> {
        self.pool()?.shares().await
    }

    /// Removes a shared folder with all that is in it. Cancel-safe: what has begun goes on.
    ///
    /// # Errors
    /// [`Error::UnknownShare`]; [`Error::ShareInUse`] while a session has it, whether that runs or
    /// not; [`Error::Volume`], [`Error::Registry`], [`Error::Disabled`].
    pub async fn remove_share(&self, share: Uuid) -> Result<()> {
        self.pool()?.remove_share(share).await
    }

    /// A shared folder's files, to be read and written from outside of all sessions. Cancel-safe.
    ///
    /// # Errors
    /// [`Error::UnknownShare`], [`Error::Registry`], [`Error::Disabled`].
    pub async fn shared_files(&self, share: Uuid) -> Result<SharedFiles> {
        self.pool()?.shared_files(share).await
    }

    /// Says which shared folders a session has, and where, from its next start on: one that runs
    /// goes on without until it is stopped. Kept with the session, also while it is archived, and
    /// given to its forks. Each may have as much as a session ([`Limits::disk_bytes`]): what runs in
    /// those that have one with more is ended. No link may be on the way to where it is. Cancel-safe:
    /// what has begun goes on.
    ///
    /// # Errors
    /// [`Error::Mounts`] if it cannot have them there; [`Error::UnknownShare`];
    /// [`Error::Isolation`] but under `sandbox` isolation; [`Error::Disabled`],
    /// [`Error::Unknown`], [`Error::Registry`].
    pub async fn set_mounts(&self, session_id: Uuid, mounts: Vec<Mount>) -> Result<()> {
        self.pool()?.set_mounts(session_id, mounts).await
    }

    /// Which shared folders a session has.
    ///
    /// # Errors
    /// [`Error::Disabled`], [`Error::Unknown`].
    pub fn mounts(&self, session_id: Uuid) -> Result<Vec<Mount>> {
        self.pool()?.mounts(session_id)
    }

    /// Waits until nobody holds a guard of the session; at once if it is not known. Cancel-safe.
    ///
    /// # Errors
    /// [`Error::Disabled`].
    pub async fn released(&self, session_id: Uuid) -> Result<()> {
        self.pool()?.released(session_id).await;
        Ok(())
    }

    /// Saves a session now; stops it for that, or freezes it where the pool does that. Nothing
    /// to save is fine. Cancel-safe: what has begun goes on.
    ///
    /// # Errors
    /// As [`MicroVmManager::stop`], [`Error::NoDestination`], or why the backup failed.
    pub async fn backup(&self, session_id: Uuid) -> Result<()> {
        self.pool()?.ask(session_id, Want::BackedUp).await.map(drop)
    }

    /// What a session can be restored from, newest first. Cancel-safe.
    ///
    /// # Errors
    /// [`Error::Disabled`], [`Error::NoDestination`], [`Error::Backup`].
    pub async fn backups(&self, session_id: Uuid) -> Result<Vec<Backup>> {
        let pool = self.pool()?.clone();
        blocking(move || pool.backups()?.list(Some(session_id))).await
    }

    /// What all sessions can be restored from, newest first: also such as are not known here,
    /// which [`MicroVmManager::recover`] brings. Cancel-safe.
    ///
    /// # Errors
    /// As [`MicroVmManager::backups`].
    pub async fn all_backups(&self) -> Result<Vec<Backup>> {
        let pool = self.pool()?.clone();
        blocking(move || pool.backups()?.list(None)).await
    }

    /// The newest backup of a session that was taken at `time` or before. Cancel-safe.
    ///
    /// # Errors
    /// As [`MicroVmManager::backups`]; [`Error::NoBackup`] if it is later than that that the
    /// first one was taken.
    pub async fn backup_at(&self, session_id: Uuid, time: SystemTime) -> Result<Backup> {
        let found = self
            .backups(session_id)
            .await?
            .into_iter()
            .find(|backup| SystemTime::from(backup.taken_at) <= time);
        found.ok_or(Error::NoBackup { session: session_id, name: None })
    }

    /// Checks all backups of the destination: that what they need is there; with `read_data`
    /// also that every byte of it is what was written. What is wrong is no error but in the
    /// report. Cancel-safe: dropped, it is given up.
    ///
    /// # Errors
    /// As [`MicroVmManager::backups`].
    pub async fn verify_backups(&self, read_data: bool) -> Result<BackupReport> {
        self.pool()?.verify_backups(read_data).await
    }

    /// Deletes the backups of sessions known here that `retention` does not keep, or with
    /// `dry_run` does not; gives them, newest first. What [`Builder::retention`] never deletes is
    /// never deleted, and nothing is if there is no rule. The room that they took in a repository
    /// is given back when this is next done a day later or more, as other hosts may be counting on
    /// it. Cancel-safe: what has begun goes on.
    ///
    /// # Errors
    /// As [`MicroVmManager::backups`]; then some may be deleted, each as a whole.
    pub async fn forget_backups(
        &self,
        retention: &Retention,
        dry_run: bool,
    ) -> Result<Vec<Backup>> {
        let (pool, retention) = (self.pool()?.clone(), *retention);
        blocking(move || pool.forget_backups(&retention, dry_run)).await
    }

    /// Deletes a backup, also one of a session that is not known here, and gives it. The first eight
    /// letters of its name will do, or more, if no other begins with them. The room that it took in
    /// a repository is given back as by [`MicroVmManager::forget_backups`]. Cancel-safe: what has begun goes on.
    ///
    /// # Errors
    /// [`Error::UnknownBackup`]; [`Error::BackupNeeded`] if it is the latest of a session known
    /// here; as [`MicroVmManager::backups`].
    pub async fn delete_backup(&self, name: &str) -> Result<Backup> {
        let (pool, name) = (self.pool()?.clone(), name.to_owned());
        blocking(move || pool.delete_backup(&name)).await
    }

    /// What [`Builder::retention`] was given, or [`MicroVmManager::set_retention`] since.
    ///
    /// # Errors
    /// [`Error::Disabled`].
    pub fn retention(&self) -> Result<Retention> {
        Ok(self.pool()?.retention())
    }

    /// Changes which backups are kept, from the next time on at which others are deleted.
    ///
    /// # Errors
    /// [`Error::Disabled`].
    pub fn set_retention(&self, retention: Retention) -> Result<()> {
        self.pool()?.set_retention(retention);
        Ok(())
    }

    /// Changes what [`Builder::acquire_timeout`] was given, for callers from now on.
    ///
    /// # Errors
    /// [`Error::Disabled`].
    pub fn set_acquire_timeout(&self, limit: Option<Duration>) -> Result<()> {
        self.pool()?.set_acquire_timeout(limit);
        Ok(())
    }

    /// Makes every session of which there is a backup, and that is not known here, known as
    /// archived, under the name that it had unless another has it here: its files come with its
    /// first use. Gives those that are new. For a new machine, which has nothing but the
    /// destination and the key. Cancel-safe: what has begun goes on.
    ///
    /// # Errors
    /// As [`MicroVmManager::backups`], [`Error::Registry`].
    pub async fn recover(&self) -> Result<Vec<SessionInfo>> {
        self.pool()?.recover_sessions().await
    }

    /// Puts a session back as a backup (if none is named, the one that is the latest now) has it.
    /// The beginning of a backup's name will do, if no other begins with it. Changes since the last
    /// backup are saved first. A restore that fails leaves what was there.
    /// Cancel-safe: what has begun goes on.
    ///
    /// # Errors
    /// As [`MicroVmManager::backup`], [`Error::NoBackup`], [`Error::AtCapacity`].
    pub async fn restore(&self, session_id: Uuid, backup: Option<&str>) -> Result<()> {
        let backup = self.named_or_latest(session_id, backup).await?;
        self.pool()?.ask(session_id, Want::Restored(Saved::Backup(backup))).await.map(drop)
    }

    /// The whole name of a backup.
    async fn named_or_latest(&self, session: Uuid, backup: Option<&str>) -> Result<String> {
        let pool = self.pool()?;
        if let Some(name) = backup {
            return pool.find_backup(session, name).await;
        }
        pool.backups()?;
        pool.inspect(session)?.backup.ok_or(Error::NoBackup { session, name: None })
    }

    /// Puts some files and folders of a session back as a backup (if none is named, the latest) has
    /// them; the others stay. A folder is then as it was, without what has been added to it. Paths
    /// are those that commands in the session see; relative ones begin where commands start. The
    /// session is stopped for it, and its changes are saved first, as with
    /// [`MicroVmManager::restore`]. All are put back, or none. An archive is read as a whole for
    /// this. Cancel-safe: what has begun goes on.
    ///
    /// # Errors
    /// [`Error::NotPutBack`] if one of them is not in the backup, or what is on the way to it is
    /// no folder now; and as [`MicroVmManager::restore`].
    pub async fn restore_paths(
        &self,
        session_id: Uuid,
        backup: Option<&str>,
        paths: &[PathBuf],
    ) -> Result<()> {
        let name = self.named_or_latest(session_id, backup).await?;
        self.restore_part(session_id, Saved::Backup(name), paths).await
    }

    /// As [`MicroVmManager::restore_paths`], as a snapshot has them. Cancel-safe as that.
    ///
    /// # Errors
    /// As [`MicroVmManager::restore_paths`], [`Error::NoSnapshot`].
    pub async fn restore_snapshot_paths(
        &self,
        session_id: Uuid,
        name: &SnapshotName,
        paths: &[PathBuf],
    ) -> Result<()> {
        let (pool, wanted) = (self.pool()?, name.clone());
        pool.with_volumes(session_id, move |volumes| volumes.snapshot(session_id, &wanted)).await?;
        self.restore_part(session_id, Saved::Snapshot(name.to_string()), paths).await
    }

    async fn restore_part(&self, session: Uuid, of: Saved, paths: &[PathBuf]) -> Result<()> {
        let goes_up = |path: &&PathBuf| path.components().any(|it| it == Component::ParentDir);
        if let Some(path) = paths.iter().find(goes_up) {
            let problem = "`..` in it may lead anywhere".to_owned();
            return Err(Error::NotPutBack { session, path: path.clone(), problem });
        }
        if paths.is_empty() {
            return Ok(());
        }
        let part = Saved::Part { of: Box::new(of), paths: paths.to_owned() };
        self.pool()?.ask(session, Want::Restored(part)).await.map(drop)
    }

    /// Makes a new session that begins with a copy of another's files, and gives its id. Files
    /// share their blocks where the file system can do that (btrfs, xfs), and are copied
    /// elsewhere.
    ///
    /// Where sessions can be made to stand still ([`MicroVmManager::can_freeze`]), the other one
    /// may be in use: its processes are frozen while it is copied, and go on. Elsewhere this
    /// waits until nobody holds it, and is refused while something runs in its background.
    ///
    /// Cancel-safe: no session is made, and what was copied goes; or, if it was being made, it is
    /// made to the end.
    ///
    /// # Errors
    /// As [`MicroVmManager::acquire`], [`Error::Unknown`], [`Error::InUse`], or why the files
    /// could not be copied.
    pub async fn fork(&self, session_id: Uuid) -> Result<Uuid> {
        self.pool()?.fork(session_id, None).await
    }

    /// A session as one archive, of which [`MicroVmManager::import`] makes it again, in this pool
    /// or another: its files, its root's changes, who they belong to. Stops it for that, or
    /// freezes it where the pool does that; one that is archived is read from its latest
    /// backup. The archive is whole and checked when this returns, and the session is free
    /// again. Takes as much room in the volume root, until it is read or dropped, unless it
    /// comes from a backup. Cancel-safe: dropped, it is given up.
    ///
    /// # Errors
    /// As [`MicroVmManager::stop`]; [`Error::Backup`], [`Error::NoBackup`], [`Error::Volume`] if
    /// its files, or its backup, could not be read, or there is no room.
    pub async fn export(&self, session_id: Uuid) -> Result<Export> {
        self.pool()?.export(session_id).await
    }

    /// Makes a new session of an archive: one of [`MicroVmManager::export`], a backup, or any
    /// other compressed tar file of a folder (`tar --zstd`), which becomes the volume. All of it
    /// is received first, into the volume root, and nothing is kept of an import that fails.
    /// It is not bootstrapped: what that gave it comes with it. Where
    /// sessions' use of the disk is limited, an archive that holds more is refused.
    ///
    /// Cancel-safe: dropped, it is given up; the session may be there nonetheless if all that
    /// was left was to tell so.
    ///
    /// # Errors
    /// [`Error::AlreadyExists`]; [`Error::NotImported`] if it is no whole archive, holds what is
    /// refused or more than there is room for; [`Error::BrokenOff`] if `content` fails;
    /// [`Error::Image`] if it is of an image that is not there; as [`MicroVmManager::acquire`].
    pub async fn import(
        &self,
        session_id: Uuid,
        content: impl AsyncRead + Send + Unpin,
    ) -> Result<()> {
        self.pool()?.import(session_id, content).await
    }

    /// As [`MicroVmManager::fork`], of the session as a snapshot has it. Cancel-safe as that.
    ///
    /// # Errors
    /// As [`MicroVmManager::fork`], [`Error::NoSnapshot`].
    pub async fn fork_snapshot(&self, session_id: Uuid, snapshot: &SnapshotName) -> Result<Uuid> {
        self.pool()?.fork(session_id, Some(snapshot.clone())).await
    }

    /// Makes a new session that begins with what another one has in a backup, asked for by its
    /// name or the beginning of it, and gives its id. The other one is not touched, whatever is
    /// done with it, and need not be on local disk or even be known here. Takes as long as a
    /// restore. What was saved before stays the other one's: the new session has no backup yet.
    ///
    /// Cancel-safe: as [`MicroVmManager::fork`].
    ///
    /// # Errors
    /// [`Error::NoDestination`], [`Error::NoBackup`], or why it could not be restored
    /// ([`Error::Backup`], [`Error::Repository`], [`Error::Volume`]), and as
    /// [`MicroVmManager::acquire`]. Nothing is left then.
    pub async fn fork_backup(&self, session_id: Uuid, backup: &str) -> Result<Uuid> {
        let pool = self.pool()?;
        let backup = pool.find_backup(session_id, backup).await?;
        pool.fork_backup(session_id, backup).await
    }

    /// Keeps a copy of a session's files under a name, on the same disk, as they are now; taken
    /// as by [`MicroVmManager::fork`]. It is no backup, and never counts as one.
    ///
    /// It stays until it is removed, or the session is: also while the session is archived. A
    /// session that is deleted for want of a backup destination takes its snapshots with it.
    ///
    /// Cancel-safe: what has begun goes on.
    ///
    /// # Errors
    /// [`Error::SnapshotExists`], and as [`MicroVmManager::fork`].
    pub async fn snapshot(&self, session_id: Uuid, name: &SnapshotName) -> Result<()> {
        self.pool()?.snapshot(session_id, name.clone()).await
    }

    /// A session's snapshots, the latest first. Cancel-safe.
    ///
    /// # Errors
    /// [`Error::Disabled`], [`Error::Unknown`], [`Error::Volume`].
    pub async fn snapshots(&self, session_id: Uuid) -> Result<Vec<Snapshot>> {
        self.pool()?.with_volumes(session_id, move |volumes| volumes.snapshots(session_id)).await
    }

    /// Deletes a snapshot; false if there is none of that name. Cancel-safe: what has begun goes
    /// on.
    ///
    /// # Errors
    /// [`Error::Disabled`], [`Error::Unknown`], [`Error::Volume`].
    pub async fn remove_snapshot(&self, session_id: Uuid, name: &SnapshotName) -> Result<bool> {
        let name = name.clone();
        let remove = move |volumes: &Volumes| volumes.discard_snapshot(session_id, &name);
        self.pool()?.with_volumes(session_id, remove).await
    }

    /// Puts a session back as a snapshot has it, which stays. With a backup destination changes
    /// since the last backup are saved first; without one they are gone, unless there is a
    /// snapshot of them. A restore that fails leaves what was there. Cancel-safe: what has begun
    /// goes on.
    ///
    /// # Errors
    /// [`Error::NoSnapshot`], and as [`MicroVmManager::restore`].
    pub async fn restore_snapshot(&self, session_id: Uuid, name: &SnapshotName) -> Result<()> {
        let (pool, wanted) = (self.pool()?, name.clone());
        pool.with_volumes(session_id, move |volumes| volumes.snapshot(session_id, &wanted)).await?;
        let saved = Saved::Snapshot(name.to_string());
        pool.ask(session_id, Want::Restored(saved)).await.map(drop)
    }

    /// What two versions of sessions differ in, by path: kinds, contents, permissions, owners and
    /// attributes, in their volumes and in what was changed in their roots. A file with the same
    /// size and the same time of change counts as the same. What a session has now is copied for
    /// this as by [`MicroVmManager::fork`].
    ///
    /// Cancel-safe: what was copied goes.
    ///
    /// # Errors
    /// [`Error::NoSnapshot`], and as [`MicroVmManager::fork`].
    pub async fn diff(&self, before: Version, after: Version) -> Result<Vec<Difference>> {
        self.pool()?.diff(before, after).await
    }

    /// Forgets a session and deletes its local files, saved or not, and its snapshots. Its
    /// backups stay where they are. What runs in it is killed: it has nothing to save. Cancel-safe:
    /// what has begun goes on.
    ///
    /// # Errors
    /// [`Error::Disabled`], [`Error::Unknown`], [`Error::InUse`] while a guard is held, or why
    /// the files could not be deleted.
    pub async fn remove(&self, session_id: Uuid) -> Result<()> {
        self.pool()?.ask(session_id, Want::Removed).await.map(drop)
    }

    /// The images that sessions can be made of. Cancel-safe.
    ///
    /// # Errors
    /// [`Error::Disabled`], [`Error::Image`], [`Error::Isolation`] where sessions have no root
    /// of their own.
    pub async fn images(&self) -> Result<Vec<ImageInfo>> {
        let images = self.pool()?.with_images(|_, store| Ok(store.list()?)).await?;
        Ok(images.iter().map(info).collect())
    }

    /// The image of that name; a short one (`debian:12`) will do. Cancel-safe.
    ///
    /// # Errors
    /// As [`MicroVmManager::images`]; [`Error::Image`] too if there is none.
    pub async fn image(&self, name: &str) -> Result<ImageInfo> {
        let wanted = name.to_owned();
        let image = self.pool()?.with_images(move |_, store| Ok(store.get(&wanted)?)).await?;
        image.as_ref().map(info).ok_or_else(|| Error::no_image(name))
    }

    /// Brings an image from a registry; `progress` is told of every step. Cancel-safe: dropped,
    /// what is on its way is given up.
    ///
    /// # Errors
    /// As [`MicroVmManager::images`].
    pub async fn pull_image(
        &self,
        reference: &str,
        options: &PullOptions,
        progress: impl Fn(Progress) + Send + Sync + 'static,
    ) -> Result<ImageInfo> {
        let pool = self.pool()?;
        let image = pool.images()?.pull(reference, options, progress).await?;
        pool.renew_spares();
        Ok(info(&image))
    }

    /// Brings an image from an OCI layout or from what `docker save` wrote. Cancel-safe: dropped,
    /// the import goes on to its end.
    ///
    /// # Errors
    /// As [`MicroVmManager::images`].
    pub async fn import_image(
        &self,
        path: PathBuf,
        options: ImportOptions,
        progress: impl Fn(Progress) + Send + Sync + 'static,
    ) -> Result<ImageInfo> {
        let never = AtomicBool::new(false);
        let import = move |pool: &Arc<Pool>, store: &Store| {
            let image = store.import(&path, &options, &never, &progress)?;
            pool.renew_spares();
            Ok(info(&image))
        };
        self.pool()?.with_images(import).await
    }

    /// Removes an image, and its layers as far as no session on this disk needs them. False if
    /// there is none of that name. Cancel-safe: what has begun goes on.
    ///
    /// # Errors
    /// As [`MicroVmManager::images`].
    pub async fn remove_image(&self, name: &str) -> Result<bool> {
        let name = name.to_owned();
        let remove = move |pool: &Arc<Pool>, store: &Store| {
            let removed = store.remove(&name, |layer| pool.needs_layer(layer))?;
            pool.renew_spares();
            Ok(removed.image)
        };
        self.pool()?.with_images(remove).await
    }

    /// Whether the pool can do its work at this moment: its registry can be read, its volume root
    /// written, and both are still what it has begun with. Says nothing of the backup destination,
    /// without which sessions go on: [`MicroVmManager::check_destination`] does. Cancel-safe.
    ///
    /// # Errors
    /// [`Error::Registry`] or [`Error::Volume`] with what cannot be done, [`Error::ShuttingDown`],
    /// [`Error::Disabled`].
    pub async fn check(&self) -> Result<()> {
        self.pool()?.check().await
    }

    /// Whether the backup destination can be written to at this moment, where it is a folder. A
    /// bucket is not asked, nor is a pool without one. Cancel-safe.
    ///
    /// # Errors
    /// [`Error::Volume`] with the folder, [`Error::Disabled`].
    pub async fn check_destination(&self) -> Result<()> {
        self.pool()?.check_destination().await
    }

    /// What the pool has done since it was opened.
    ///
    /// # Errors
    /// [`Error::Disabled`].
    pub fn figures(&self) -> Result<Figures> {
        Ok(self.pool()?.figures())
    }

    /// What happens to sessions from now on.
    ///
    /// # Errors
    /// [`Error::Disabled`].
    pub fn events(&self) -> Result<Events> {
        Ok(self.pool()?.events())
    }

    /// The folder of a session, whether or not it is there.
    ///
    /// # Errors
    /// [`Error::Disabled`].
    pub fn session_folder(&self, session_id: Uuid) -> Result<PathBuf> {
        Ok(self.pool()?.site(session_id))
    }

    /// Lets nobody in any more, waits until all guards are dropped and all operations have
    /// ended, and ends what still runs in sessions. Callers in line get
    /// [`Error::ShuttingDown`].
    ///
    /// Cancel-safe: dropped, the pool stays closed and what has begun goes on.
    ///
    /// # Errors
    /// [`Error::Registry`] if the last state could not be written; nothing is lost then.
    pub async fn shutdown(&self) -> Result<()> {
        match &self.pool {
            Some(pool) => pool.shutdown(false).await,
            None => Ok(()),
        }
    }

    /// As [`MicroVmManager::shutdown`], but what runs in the background goes on for as long as
    /// [`Builder::linger`] says, or until the next pool over the same folder takes it up. Drop
    /// the manager then: it does nothing more.
    ///
    /// Cancel-safe: dropped, the pool stays closed and what has begun goes on.
    ///
    /// # Errors
    /// As [`MicroVmManager::shutdown`].
    pub async fn leave(&self) -> Result<()> {
        match &self.pool {
            Some(pool) => pool.shutdown(true).await,
            None => Ok(()),
        }
    }
}

/// The exclusive use of a session. Dropping it gives the session back; processes that were
/// left running in the background go on.
pub struct VmExecutionGuard {
    hold: Hold,
}

impl fmt::Debug for VmExecutionGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VmExecutionGuard")
            .field("session_id", &self.session_id())
            .field("workdir", &self.workdir())
            .finish_non_exhaustive()
    }
}

impl VmExecutionGuard {
    /// The session.
    pub fn session_id(&self) -> Uuid {
        self.hold.place.site.id
    }

    /// The shell that runs command lines.
    pub fn shell_path(&self) -> &Path {
        &self.hold.pool.config.shell
    }

    /// What the shell is given before the command line.
    pub fn shell_args(&self) -> &[String] {
        &self.hold.pool.config.shell_args
    }

    /// What the configuration adds to every command's environment.
    pub fn environment(&self) -> &HashMap<String, String> {
        &self.hold.pool.config.env
    }

    /// Where commands start, as they see it: `<volume_root>/<uuid>/volume` under `host`
    /// isolation, `/volume` in a sandbox.
    pub fn workdir(&self) -> &Path {
        &self.hold.place.workdir
    }

    /// Tells afterwards whether a limit of the session has ended what is started now, for
    /// whoever starts it by [`VmExecutionGuard::agent`].
    pub fn limit_watch(&self) -> LimitWatch {
        LimitWatch::new(&self.hold.pool, &self.hold.place)
    }

    /// How the program that was given as [`Builder::agent_program`] is run in the session; none
    /// where files can be reached from here, or no program was given.
    pub fn agent_command(&self) -> Option<Vec<std::ffi::OsString>> {
        self.hold.pool.driver().agent_command()
    }

    /// The session's persistent files as the host sees them.
    pub fn volume(&self) -> &Path {
        &self.hold.place.site.volume
    }

    /// A command line, to be run by the pool's shell.
    pub fn command(&self, line: impl Into<std::ffi::OsString>) -> Command<'_> {
        let args = self.shell_args().iter().map(Into::into).chain([line.into()]).collect();
        Command::new(self, self.shell_path().into(), args)
    }

    /// A program, to be run as it is; without a `/` it is looked for in the command's `PATH`.
    pub fn program(&self, program: impl Into<std::ffi::OsString>) -> Command<'_> {
        Command::new(self, program.into(), Vec::new())
    }

    /// The session's agent: its processes, beyond what [`VmExecutionGuard::command`] offers.
    ///
    /// # Errors
    /// [`Error::Task`] if the session has no instance, a fault in denizen.
    pub fn agent(&self) -> Result<Agent> {
        let agent = self.hold.place.agent();
        agent.ok_or_else(|| Error::Task("an active session has no instance".to_owned()))
    }

    /// What a command's environment begins with: a plain `PATH`, `HOME` and `PWD` in the
    /// volume, a UTF-8 locale, then what the session's image has, and then the configuration's
    /// own. Nothing of the host's.
    pub fn base_environment(&self) -> std::collections::BTreeMap<String, String> {
        let shell = self.shell_path().to_string_lossy().into_owned();
        let mut env = self.hold.place.environment();
        env.insert("SHELL".to_owned(), shell);
        env.extend(self.hold.place.env());
        env.insert("DENIZEN_SESSION".to_owned(), self.session_id().to_string());
        env.extend(self.environment().clone());
        env
    }
}
