//! The lifecycle core: the one place that decides what may happen to a session.
//!
//! [`Lifecycle`] is a state machine. Calls tell it what happened ([`Lifecycle::acquire`],
//! [`Lifecycle::finished`], [`Lifecycle::tick`] …) and when; it answers with [`Effect`]s,
//! which the pool carries out in order. It must never do I/O, wait, read a clock or draw a
//! random number: the same calls give the same effects, so that whole lives of a pool can be
//! simulated (`lifecycle/simulation.rs`).
//!
//! How it thinks: a session has a [`Phase`] (durable), at most one operation in flight, at
//! most one holder, and a line of waiters. After every change [`Lifecycle::advance`] looks at
//! the session and takes the next step there is: serve the line, go on with an eviction, or do
//! what time has made due. Nothing else starts an operation.

#[cfg(test)]
mod simulation;

use std::collections::{BTreeSet, VecDeque};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

// Seeded as std's are, and a third of their price on the way of a warm acquire.
use foldhash::{HashMap, HashMapExt};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::Error;

/// First wait after a failed operation; doubled with every further failure.
const FIRST_RETRY: Duration = Duration::from_secs(10);
/// Longest wait between two tries.
const LONGEST_RETRY: Duration = Duration::from_hours(1);

/// Milliseconds on the pool's own clock, which never goes back (see `time.rs`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PoolTime(pub u64);

impl PoolTime {
    /// This time and `wait` more; stays at the end of time rather than wrap.
    #[must_use]
    pub fn after(self, wait: Duration) -> Self {
        let wait = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        Self(self.0.saturating_add(wait))
    }
}

/// Names one caller in a line; never used twice by one pool.
pub type WaiterId = u64;
/// Names one run of an operation; never used twice by one pool.
pub type Seq = u64;

/// What becomes of a session that nobody has used for a while.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Sleep {
    /// Its processes are told to end, then killed; it is started again when it is next wanted.
    #[default]
    Stop,
    /// Its processes stand still where they are, and go on when it is next wanted. They keep
    /// their memory.
    Freeze,
}

impl Sleep {
    /// The word for it in configuration and output.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Freeze => "freeze",
        }
    }
}

impl FromStr for Sleep {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        let known = [Self::Stop, Self::Freeze];
        known.into_iter().find(|sleep| sleep.name() == name).ok_or_else(|| {
            Error::config("sleep", format!("is {name:?}, which is not stop or freeze"))
        })
    }
}

/// The rules a pool is run by.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Most sessions that may have files on local disk at once.
    pub max_vms: usize,
    /// Unused for this long, an active session is put to sleep.
    pub idle_shutdown: Duration,
    /// How it sleeps.
    pub sleep: Sleep,
    /// Stopped for this long, a session's local files are deleted.
    pub prune_after: Duration,
    /// Stopped for this long, a session's changes are backed up.
    pub backup_after: Option<Duration>,
    /// Whether backups have somewhere to go.
    pub has_destination: bool,
    /// How many spares are kept ready, as far as there is room.
    pub spares: usize,
    /// Whether what runs in a session can be made to stand still while it is copied.
    pub can_freeze: bool,
}

impl Policy {
    /// When the changes of a session that sleeps are backed up.
    fn saves_at(&self, row: &Row) -> PoolTime {
        let wait = self.backup_after.unwrap_or(self.prune_after);
        row.stopped_at.after(wait.min(self.prune_after))
    }
}

/// Where a session stands. What is written here is durable before the disk follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Not made yet: known only because somebody waits for it. Never durable.
    Absent,
    /// The volume is being made and bootstrapped, and the session made ready; undone if that
    /// does not end well.
    Creating,
    /// Local files, and an instance that may be running.
    Active,
    /// Local files, and an instance whose processes all stand still.
    Frozen,
    /// Local files, nothing running.
    Stopped,
    /// Local files are about to be replaced from a backup.
    Restoring,
    /// Local files are about to be deleted.
    Pruning,
    /// No local files; a verified backup holds everything.
    Archived,
    /// The local files are gone though nobody here deleted them.
    Missing,
    /// The user asked for the session to be forgotten.
    Removing,
}

impl Phase {
    /// Whether the session takes up one of the pool's `max_vms` places.
    pub fn is_resident(self) -> bool {
        !matches!(self, Self::Absent | Self::Archived | Self::Missing)
    }
}

/// Work the pool does for a session, one at a time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Make the volume, bootstrap it and make the session ready to run commands; all or nothing.
    Create {
        /// Out of a spare, which is used up whatever becomes of it.
        spare: bool,
    },
    /// Make the session ready to run commands.
    Start,
    /// End the instance. Without `force`, answer [`Outcome::Busy`] if something still runs.
    /// What is frozen is thawed first.
    Stop {
        /// End background processes too.
        force: bool,
    },
    /// Have all processes of the instance stand still. Without `force`, [`Outcome::Busy`] as with
    /// [`Op::Stop`].
    Freeze {
        /// Background processes too.
        force: bool,
    },
    /// Let the processes go on.
    Thaw,
    /// Write a verified backup of the volume.
    Backup,
    /// Delete the local files.
    Prune,
    /// Put the local files back as they were saved; all or nothing.
    Restore(Saved),
    /// Copy the local files to where this copy goes; all or nothing. What runs stands still
    /// meanwhile and then goes on; where that cannot be, [`Outcome::Busy`] if something runs.
    Copy(Uuid),
    /// Delete the local files, whatever they hold.
    Remove,
}

impl Op {
    /// Whether a session counts as paused when this is done; none if that stays as it is.
    fn pauses(&self) -> Option<bool> {
        match self {
            Self::Start | Self::Thaw | Self::Stop { .. } => Some(false),
            Self::Freeze { force } => Some(*force),
            _ => None,
        }
    }
}

/// What a session can be put back from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Saved {
    /// The backup of this name.
    Backup(String),
    /// The snapshot of this name, a copy that is no backup: it is on the same disk.
    Snapshot(String),
    /// Only these of its files and folders. The others stay as they are, so that what the session
    /// has then is in no backup.
    Part {
        /// What has them.
        of: Box<Saved>,
        /// Where they are, as those within the session see it.
        paths: Vec<PathBuf>,
    },
}

impl Saved {
    /// The backup that it is read from, if it is.
    pub fn backup(&self) -> Option<&str> {
        match self {
            Self::Backup(name) => Some(name),
            Self::Snapshot(_) => None,
            Self::Part { of, .. } => of.backup(),
        }
    }
}

/// How an operation ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Done.
    Done,
    /// Done, and nothing had been running in the instance: its files are as they were.
    Quiet,
    /// Done: the verified backup has this name.
    BackedUp(String),
    /// Not done, and nothing changed.
    Failed,
    /// Not done, and what state the processes are in is not known: the instance has to go.
    Broken,
    /// Not done: processes are still running in the session.
    Busy,
    /// Not done: the session's volume is not on disk any more.
    Missing,
}

/// What a caller in line waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Want {
    /// The exclusive use of the session.
    Guard {
        /// Wait for a place in a full pool rather than be refused at once.
        patient: bool,
    },
    /// The exclusive use of the session's files, local or archived, while nothing runs in it.
    /// Whoever has it changes nothing.
    Still,
    /// Instance ended, files kept.
    Stopped {
        /// End background processes too.
        force: bool,
    },
    /// Asleep as it stands: what runs stands still until somebody takes the session.
    Paused,
    /// Everything saved in a verified backup.
    BackedUp,
    /// Local files as they were saved.
    Restored(Saved),
    /// The local files copied, with everything in the session at rest. Does not wait for the
    /// holder of a session that can be made to stand still.
    Copied {
        /// Which copy.
        copy: Uuid,
        /// As in [`Want::Guard`], should the session have to be brought back for it.
        patient: bool,
    },
    /// Session and local files gone.
    Removed,
}

/// Why a caller is turned away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// `max_vms` sessions are resident and none may be evicted.
    AtCapacity,
    /// A guard is held, or processes are running.
    InUse,
    /// The session is not known here.
    Unknown,
    /// The volume has vanished.
    Missing,
    /// No backup destination is set.
    NoDestination,
    /// What runs cannot be made to stand still here.
    CannotFreeze,
    /// The operation done on the caller's behalf failed.
    Failed,
}

/// What the pool has to do, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Make `row` durable if there is one, then do `op`, then call [`Lifecycle::finished`]
    /// with `seq`, whatever happened. A row that cannot be written is a failed operation.
    Run {
        /// The session.
        id: Uuid,
        /// To be given back to [`Lifecycle::finished`].
        seq: Seq,
        /// What to do.
        op: Op,
        /// What has to be durable before.
        row: Option<Row>,
    },
    /// Somebody wants the session: give up the running operation if that is quick.
    Interrupt {
        /// The session.
        id: Uuid,
        /// The operation to give up.
        seq: Seq,
    },
    /// Make a spare, an instance that is no session's yet, then call [`Lifecycle::prepared`],
    /// whatever happened.
    Prepare,
    /// End a spare. What is ordered after it begins when it has ended.
    Discard,
    /// Make a row durable; nothing waits for it, and a crash before it loses nothing.
    Save(Row),
    /// Forget a row, as [`Effect::Save`].
    Forget(Uuid),
    /// The waiter now holds the session: to run commands in it, or to read its files if that
    /// is what it wanted.
    Grant {
        /// The session.
        id: Uuid,
        /// Who was waiting.
        waiter: WaiterId,
    },
    /// What the waiter asked for is done.
    Fulfil {
        /// The session.
        id: Uuid,
        /// Who was waiting.
        waiter: WaiterId,
    },
    /// The waiter is turned away.
    Refuse {
        /// The session.
        id: Uuid,
        /// Who was waiting.
        waiter: WaiterId,
        /// Why.
        why: Refusal,
    },
    /// Something a user may want to know.
    Notify {
        /// The session.
        id: Uuid,
        /// What happened to it.
        change: Change,
    },
}

/// A step in a session's life, as told to whoever listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Volume made and bootstrapped.
    Created,
    /// Ready to run commands.
    Started,
    /// Instance ended.
    Stopped,
    /// Its processes stand still.
    Frozen,
    /// Its processes go on.
    Thawed,
    /// Idle by the clock, but processes are running, which counts as use.
    StillRunning,
    /// A verified backup was written.
    BackedUp(String),
    /// The local files were put back.
    Restored(Saved),
    /// Local files deleted, a backup holds them.
    Archived,
    /// Local files deleted, and no backup holds them.
    Deleted,
    /// Removed at the user's wish.
    Removed,
    /// A volume without a row was found and taken in.
    Adopted,
    /// It was known by its backups alone, and is archived here now.
    Recovered,
    /// The volume has vanished from the disk.
    Missing,
    /// An operation failed; tried again at the given time if it is one that is retried.
    Failed {
        /// What failed.
        op: Op,
        /// When it is tried again.
        retry_at: Option<PoolTime>,
    },
}

/// What is remembered of a session across restarts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// The session.
    pub id: Uuid,
    /// Where it stands.
    pub phase: Phase,
    /// When it was made.
    pub created_at: PoolTime,
    /// When it was last released.
    pub last_used: PoolTime,
    /// Since when nothing runs in it, be it frozen or ended.
    pub stopped_at: PoolTime,
    /// Whether there may be changes that no verified backup holds.
    pub unsaved: bool,
    /// The latest verified backup.
    pub backup: Option<String>,
    /// Whether somebody has paused it, and nobody taken it since.
    pub paused: bool,
}

/// What a start finds on disk for a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// No volume.
    Nothing,
    /// A volume whose making or bootstrap did not end.
    Half,
    /// A volume.
    Whole,
    /// A volume, and the session's instance, which still runs.
    Running,
}

#[derive(Clone, Debug)]
struct Waiter {
    id: WaiterId,
    want: Want,
}

#[derive(Clone, Debug)]
struct Running {
    op: Op,
    seq: Seq,
    /// The waiter whose wish this is part of; none for the pool's own housekeeping.
    wished_by: Option<WaiterId>,
    /// Where the session stands if the operation fails.
    fallback: Phase,
    interrupted: bool,
}

#[derive(Clone, Debug)]
#[allow(clippy::struct_excessive_bools, reason = "each holds or not whatever the others do")]
struct Session {
    row: Row,
    running: Option<Running>,
    held: bool,
    /// Its instance, frozen or meant to be, has to be ended before anything else.
    broken: bool,
    /// Chosen to make room for another session.
    evicting: bool,
    /// In [`Lifecycle::slot_line`].
    wants_slot: bool,
    waiters: VecDeque<Waiter>,
    failures: u32,
    retry_at: PoolTime,
    /// Its key in the due-queue. May be early: a warm release does not move it.
    due: Option<PoolTime>,
}

/// A session as others may see it.
#[derive(Clone, Debug)]
pub struct View<'a> {
    /// What is durable.
    pub row: &'a Row,
    /// What is being done for it.
    pub running: Option<&'a Op>,
    /// Whether somebody waits for that, or for the place that the session has.
    pub hurried: bool,
    /// Whether a guard is held.
    pub held: bool,
    /// How many callers are in line.
    pub waiting: usize,
    /// Failures in a row of what is retried.
    pub failures: u32,
    /// When the failed operation is tried again.
    pub retry_at: Option<PoolTime>,
    /// When its changes are backed up, if it is left alone until then. Not known of one that is
    /// active.
    pub backup_due: Option<PoolTime>,
}

/// The state of a pool. See the module's page.
#[derive(Debug)]
pub struct Lifecycle {
    policy: Policy,
    now: PoolTime,
    next_seq: Seq,
    sessions: HashMap<Uuid, Session>,
    resident: usize,
    evicting: usize,
    /// What time makes due, earliest first.
    due: BTreeSet<(PoolTime, Uuid)>,
    /// Sessions with a failure that is being waited out.
    failing: BTreeSet<Uuid>,
    /// Sessions that wait for a place, in order.
    slot_line: VecDeque<Uuid>,
    /// Operations begun and not ended.
    running: usize,
    /// Those of them that a caller waits for.
    wished: usize,
    /// Spares that are ready. Each takes a place as a session does.
    spares: usize,
    /// Spares being made, which take places too.
    preparing: usize,
    /// Those of them that are to be ended as soon as they are made.
    outdated: usize,
    /// The last spare could not be made, and no session has been since.
    cannot_prepare: bool,
    #[cfg(test)]
    fault: Option<Fault>,
}

/// Faults that the tests plant to see that the simulation notices them. Outside of tests none
/// can be set, and the checks for them compile to nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// One session too many.
    CapacityOffByOne,
    /// A session counts as saved for ever after its first backup.
    SavedForEver,
    /// Held sessions are stopped and pruned.
    PruneWhileHeld,
    /// A failed backup counts as one.
    FailedBackupCounts,
    /// Eviction does not save first.
    EvictUnsaved,
    /// A second holder is let in.
    TwoHolders,
    /// The line is served last come, first served.
    LineReversed,
    /// A cancelled waiter stays in line.
    CancelForgotten,
    /// A crash while active counts as saved.
    CrashCountsAsSaved,
    /// A half-made volume is kept at the next start.
    HalfMadeKept,
    /// The row of a prune is not written before it.
    PruneNotDurable,
    /// Idle time is counted from the first use.
    IdleFromFirstUse,
    /// Two operations at once.
    TwoOperations,
    /// Processes left running do not count.
    BusyIgnored,
    /// A freed place wakes nobody.
    SlotWakesNobody,
    /// An archived session starts empty.
    ArchivedStartsEmpty,
    /// Spares take no place.
    SparesNotCounted,
    /// A spare is given to two sessions.
    SpareGivenTwice,
    /// Somebody waits for ever for the place of a spare.
    SpareKeepsPlace,
    /// A frozen session is granted as it is.
    FrozenGranted,
    /// Who wants a session to be still has it as it is.
    StillGrantedRunning,
    /// Held sessions are frozen.
    FrozenWhileHeld,
    /// Frozen sessions are pruned with their processes alive.
    FrozenPruned,
    /// What processes do that were thawed to be ended counts as saved.
    LastWordsCountAsSaved,
    /// A session that could not be thawed counts as thawed.
    BrokenGranted,
    /// A frozen session whose volume has vanished is forgotten with its processes.
    VanishedLeftFrozen,
    /// A session whose instance has outlived its pool counts as stopped.
    RunningCountsAsStopped,
    /// A held session is copied though nothing makes it stand still.
    CopiedWhileWritten,
    /// What is put back from a snapshot counts as saved.
    SnapshotCountsAsSaved,
    /// What is put back in part counts as saved.
    PartCountsAsSaved,
    /// What a crash in a restore has left counts as what its row says.
    HalfRestoredCountsAsSaved,
    /// Of an archived session, only the part that is wanted is put back.
    PartIsAllThereIs,
    /// A session counts as paused while it runs.
    PausedRunning,
    /// A paused session that is not stopped, as something runs in it, goes on.
    PausedWakesUnasked,
}

impl Lifecycle {
    /// An empty pool.
    pub fn new(policy: Policy) -> Self {
        Self {
            policy,
            now: PoolTime::default(),
            next_seq: 1,
            sessions: HashMap::new(),
            resident: 0,
            evicting: 0,
            due: BTreeSet::new(),
            failing: BTreeSet::new(),
            slot_line: VecDeque::new(),
            running: 0,
            wished: 0,
            spares: 0,
            preparing: 0,
            outdated: 0,
            cannot_prepare: false,
            #[cfg(test)]
            fault: None,
        }
    }

    #[cfg(test)]
    fn has(&self, fault: Fault) -> bool {
        self.fault == Some(fault)
    }

    #[cfg(not(test))]
    #[allow(clippy::unused_self)]
    fn has(&self, _: Fault) -> bool {
        false
    }

    /// How many sessions take up a place.
    pub fn resident(&self) -> usize {
        self.resident
    }

    /// How many operations have begun and not ended.
    pub fn in_flight(&self) -> usize {
        self.running
    }

    /// How many of them are the pool's own housekeeping, not a caller's wish.
    pub fn housekeeping(&self) -> usize {
        self.running - self.wished
    }

    /// When [`Lifecycle::tick`] has something to do next.
    pub fn next_due(&self) -> Option<PoolTime> {
        self.due.first().map(|(at, _)| *at)
    }

    /// One session.
    pub fn view(&self, id: Uuid) -> Option<View<'_>> {
        self.sessions.get(&id).map(|session| self.seen(session))
    }

    /// All sessions, in no order.
    pub fn views(&self) -> impl Iterator<Item = View<'_>> {
        self.sessions.values().map(|session| self.seen(session))
    }

    /// The sessions that are known, and what each counts on ([`Lifecycle::counts_on`]).
    pub fn counted_on(&self) -> std::collections::HashMap<Uuid, Vec<String>> {
        let known = self.sessions.values().filter(|session| session.row.phase != Phase::Absent);
        known.map(|it| (it.row.id, it.counts_on().map(str::to_owned).collect())).collect()
    }

    /// Whether nobody may delete this backup of a session: the session's row names it as the
    /// latest, or somebody waits for the session to be put back from it, or that is being done. Of
    /// a session that is not known, all.
    pub fn counts_on(&self, id: Uuid, backup: &str) -> bool {
        let known = self.sessions.get(&id).filter(|session| session.row.phase != Phase::Absent);
        known.is_none_or(|session| session.counts_on().any(|name| name == backup))
    }

    fn seen<'a>(&self, session: &'a Session) -> View<'a> {
        let sleeps = matches!(session.row.phase, Phase::Stopped | Phase::Frozen);
        let saves = sleeps && self.policy.has_destination && session.row.unsaved;
        let retry_at = (session.failures > 0).then_some(session.retry_at);
        View {
            row: &session.row,
            running: session.running.as_ref().map(|running| &running.op),
            hurried: session.evicting
                || session.running.as_ref().is_some_and(|running| running.wished_by.is_some()),
            held: session.held,
            waiting: session.waiters.len(),
            failures: session.failures,
            retry_at,
            backup_due: saves
                .then(|| self.policy.saves_at(&session.row))
                .max(retry_at.filter(|_| saves)),
        }
    }

    // ---- What happens to the pool -------------------------------------------------------

    /// Takes up what an earlier process left: `rows` with what is on disk for each, and
    /// volumes without a row. Half-done work is finished or undone.
    pub fn recover(
        &mut self,
        now: PoolTime,
        rows: Vec<(Row, Found)>,
        orphans: &[(Uuid, Found)],
        out: &mut Vec<Effect>,
    ) {
        self.now = now;
        for (row, found) in rows {
            self.recover_row(row, found, out);
        }
        for &(id, found) in orphans {
            let row = Row {
                id,
                phase: if found == Found::Whole { Phase::Stopped } else { Phase::Removing },
                created_at: now,
                last_used: now,
                stopped_at: now,
                unsaved: true,
                backup: None,
                paused: false,
            };
            if found == Found::Whole {
                out.push(Effect::Save(row.clone()));
                out.push(Effect::Notify { id, change: Change::Adopted });
            }
            self.take_in(row);
        }
        let mut ids: Vec<Uuid> = self.sessions.keys().copied().collect();
        // The same rows give the same effects, in the same order.
        ids.sort_unstable();
        for id in ids {
            self.advance(id, out);
        }
        self.keep_spares(out);
    }

    fn recover_row(&mut self, mut row: Row, found: Found, out: &mut Vec<Effect>) {
        let id = row.id;
        let was = row.phase;
        row.phase = match (was, found) {
            (Phase::Creating, Found::Half) if self.has(Fault::HalfMadeKept) => Phase::Stopped,
            // Perhaps somebody was granted it already.
            (Phase::Creating, Found::Whole) => Phase::Stopped,
            // Nobody was granted what was still being made, so nothing is lost with it.
            (Phase::Absent | Phase::Creating | Phase::Removing, _) => Phase::Removing,
            (Phase::Active, Found::Running) if !self.has(Fault::RunningCountsAsStopped) => {
                Phase::Active
            }
            // It had to be thawed to be found; it is paused again before anybody has it.
            (Phase::Frozen, Found::Running) if row.paused => Phase::Active,
            (Phase::Pruning, Found::Whole | Found::Half | Found::Running) => Phase::Pruning,
            (_, Found::Whole | Found::Half | Found::Running) => Phase::Stopped,
            (Phase::Pruning, Found::Nothing) if row.backup.is_none() => Phase::Removing,
            // What it was to be put back from was no backup.
            (Phase::Restoring, Found::Nothing) if row.backup.is_none() => Phase::Missing,
            (Phase::Restoring | Phase::Pruning | Phase::Archived, Found::Nothing) => {
                Phase::Archived
            }
            (Phase::Stopped | Phase::Missing, Found::Nothing)
                if row.backup.is_some() && !row.unsaved =>
            {
                Phase::Archived
            }
            (Phase::Active | Phase::Frozen | Phase::Stopped | Phase::Missing, Found::Nothing) => {
                Phase::Missing
            }
        };
        match was {
            // Whoever held it may have written until the very end; and what was frozen is
            // thawed to be ended or found.
            Phase::Active | Phase::Creating | Phase::Frozen => {
                row.unsaved = !self.has(Fault::CrashCountsAsSaved) || row.backup.is_none();
                row.stopped_at = self.now;
                if row.phase == Phase::Active {
                    // It has been running until now.
                    row.last_used = self.now;
                }
            }
            // A volume that reappeared holds who knows what.
            Phase::Archived | Phase::Missing if row.phase == Phase::Stopped => {
                row.unsaved = true;
                row.stopped_at = self.now;
            }
            // It may be as the backup has it that its row names, or as it was before.
            Phase::Restoring if row.phase == Phase::Stopped => {
                row.unsaved = !self.has(Fault::HalfRestoredCountsAsSaved);
                row.stopped_at = self.now;
            }
            _ => {}
        }
        row.paused &= row.phase == Phase::Active;
        if row.phase == Phase::Missing && was != Phase::Missing {
            out.push(Effect::Notify { id, change: Change::Missing });
        }
        if row.phase != was {
            out.push(Effect::Save(row.clone()));
        }
        self.take_in(row);
    }

    /// A session is known by its backups alone; false if it is known here already. It is
    /// archived from now on.
    pub fn recovered(
        &mut self,
        now: PoolTime,
        id: Uuid,
        backup: String,
        out: &mut Vec<Effect>,
    ) -> bool {
        self.now = self.now.max(now);
        // One that is about to be made is nobody's yet, but will be another one.
        if self.sessions.contains_key(&id) {
            return false;
        }
        let (now, backup) = (self.now, Some(backup));
        let row = Row {
            id,
            phase: Phase::Archived,
            created_at: now,
            last_used: now,
            stopped_at: now,
            unsaved: false,
            backup,
            paused: false,
        };
        out.push(Effect::Save(row.clone()));
        out.push(Effect::Notify { id, change: Change::Recovered });
        self.take_in(row);
        true
    }

    fn take_in(&mut self, row: Row) {
        self.resident += usize::from(row.phase.is_resident());
        let session = Session::new(row);
        self.sessions.insert(session.row.id, session);
    }

    /// The warm path: takes the session if it is active, idle and nobody is in line.
    pub fn acquire_warm(&mut self, id: Uuid) -> bool {
        match self.sessions.get_mut(&id) {
            Some(session)
                if session.row.phase == Phase::Active
                    && !session.held
                    && session.running.is_none()
                    && session.waiters.is_empty()
                    && !session.evicting =>
            {
                session.held = true;
                session.row.unsaved = true;
                session.row.paused = false;
                true
            }
            _ => false,
        }
    }

    /// A caller wants something of a session. It is answered by [`Effect::Grant`],
    /// [`Effect::Fulfil`] or [`Effect::Refuse`], now or later.
    pub fn acquire(
        &mut self,
        now: PoolTime,
        id: Uuid,
        waiter: WaiterId,
        want: Want,
        out: &mut Vec<Effect>,
    ) {
        self.at(now);
        let guard = matches!(want, Want::Guard { .. });
        if !guard && !self.sessions.contains_key(&id) {
            out.push(Effect::Refuse { id, waiter, why: Refusal::Unknown });
            return;
        }
        let reversed = self.has(Fault::LineReversed);
        let session = self.sessions.entry(id).or_insert_with(|| Session::absent(id, now));
        let waits = guard || matches!(want, Want::Copied { .. });
        if session.held && !waits {
            out.push(Effect::Refuse { id, waiter, why: Refusal::InUse });
            return;
        }
        let waiter = Waiter { id: waiter, want };
        if reversed {
            session.waiters.push_front(waiter);
        } else {
            session.waiters.push_back(waiter);
        }
        self.advance(id, out);
    }

    /// A caller in line has gone away. Calling it for one that was already answered is
    /// harmless.
    pub fn cancel(&mut self, now: PoolTime, id: Uuid, waiter: WaiterId, out: &mut Vec<Effect>) {
        self.at(now);
        if self.has(Fault::CancelForgotten) {
            return;
        }
        let Some(session) = self.sessions.get_mut(&id) else { return };
        session.waiters.retain(|waiting| waiting.id != waiter);
        self.leave_slot_line(id);
        self.advance(id, out);
        self.fill_slots(out);
    }

    /// The holder is done.
    pub fn release(&mut self, now: PoolTime, id: Uuid, out: &mut Vec<Effect>) {
        self.at(now);
        let now = self.now;
        let keep_last_use = self.has(Fault::IdleFromFirstUse);
        if let Some(session) = self.sessions.get_mut(&id) {
            session.held = false;
            if !keep_last_use {
                session.row.last_used = now;
            }
            // Warm: nobody waits, nothing is due earlier than what the queue has.
            if session.waiters.is_empty() && session.due.is_some() && self.slot_line.is_empty() {
                return;
            }
            self.advance(id, out);
            self.fill_slots(out);
        }
    }

    /// Time has passed.
    pub fn tick(&mut self, now: PoolTime, out: &mut Vec<Effect>) {
        self.at(now);
        while let Some(&(at, id)) = self.due.first() {
            if at > self.now {
                break;
            }
            self.due.pop_first();
            if let Some(session) = self.sessions.get_mut(&id) {
                session.due = None;
            }
            self.advance(id, out);
        }
        self.fill_slots(out);
    }

    /// As [`Lifecycle::tick`], but what failed is tried again without waiting: the operator
    /// asked.
    pub fn tick_eagerly(&mut self, now: PoolTime, out: &mut Vec<Effect>) {
        self.at(now);
        let failing: Vec<Uuid> = self.failing.iter().copied().collect();
        for id in failing {
            if let Some(session) = self.sessions.get_mut(&id) {
                session.retry_at = self.now;
            }
            self.advance(id, out);
        }
        self.tick(now, out);
    }

    /// An operation has ended.
    pub fn finished(
        &mut self,
        now: PoolTime,
        id: Uuid,
        seq: Seq,
        outcome: Outcome,
        out: &mut Vec<Effect>,
    ) {
        self.at(now);
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let Some(running) = session.running.take_if(|running| running.seq == seq) else { return };
        self.running -= 1;
        self.wished -= usize::from(running.wished_by.is_some());
        match outcome {
            // Nothing of the session has changed, what failed before included.
            Outcome::Done if matches!(running.op, Op::Copy(_)) => {
                self.fulfil_wish(id, &running, out);
            }
            Outcome::Done | Outcome::Quiet | Outcome::BackedUp(_) => {
                self.succeeded(id, &running, outcome, out);
            }
            Outcome::Broken => self.broke(id, &running, out),
            Outcome::Busy => self.was_busy(id, &running, out),
            Outcome::Missing => self.went_missing(id, &running, out),
            Outcome::Failed => self.failed(id, &running, out),
        }
        self.advance(id, out);
        if !self.has(Fault::SlotWakesNobody) {
            self.fill_slots(out);
        }
        self.keep_spares(out);
    }

    /// A spare has been made, or could not be.
    pub fn prepared(&mut self, now: PoolTime, made: bool, out: &mut Vec<Effect>) {
        self.at(now);
        self.preparing = self.preparing.saturating_sub(1);
        self.spares += usize::from(made);
        self.cannot_prepare = !made;
        if self.outdated > 0 {
            self.outdated -= 1;
            if made {
                self.discard_spare(out);
            }
        }
        self.fill_slots(out);
        self.keep_spares(out);
    }

    /// What spares are made of has changed: new ones take their places.
    pub fn renew_spares(&mut self, now: PoolTime, out: &mut Vec<Effect>) {
        self.at(now);
        self.outdated = self.preparing;
        while self.discard_spare(out) {}
        self.keep_spares(out);
    }

    /// No more spares are wanted.
    pub fn end_spares(&mut self, now: PoolTime, out: &mut Vec<Effect>) {
        self.policy.spares = 0;
        self.renew_spares(now, out);
    }

    fn at(&mut self, now: PoolTime) {
        self.now = self.now.max(now);
    }

    // ---- How operations end -------------------------------------------------------------

    fn succeeded(&mut self, id: Uuid, running: &Running, outcome: Outcome, out: &mut Vec<Effect>) {
        let now = self.now;
        let saved_for_ever = self.has(Fault::SavedForEver);
        let last_words_count = self.has(Fault::LastWordsCountAsSaved);
        let counts_as_saved = match &running.op {
            Op::Restore(Saved::Part { .. }) => self.has(Fault::PartCountsAsSaved),
            _ => self.has(Fault::SnapshotCountsAsSaved),
        };
        let Some(session) = self.sessions.get_mut(&id) else { return };
        session.failures = 0;
        self.failing.remove(&id);
        let row = &mut session.row;
        row.paused = running.op.pauses().unwrap_or(row.paused);
        let change = match &running.op {
            Op::Create { .. } => {
                row.last_used = now;
                // Whoever is granted it need not wait until that is durable: from what is
                // (`Creating`, and a volume that is whole) a start concludes the same.
                self.enter(id, Phase::Active);
                if let Some(session) = self.sessions.get(&id) {
                    out.push(Effect::Save(session.row.clone()));
                }
                self.cannot_prepare = false;
                out.push(Effect::Notify { id, change: Change::Created });
                out.push(Effect::Notify { id, change: Change::Started });
                return;
            }
            Op::Start | Op::Thaw => {
                // The row that says so is already durable.
                row.unsaved = !saved_for_ever || row.backup.is_none();
                row.last_used = now;
                let started = running.op == Op::Start;
                self.cannot_prepare &= !started;
                let change = if started { Change::Started } else { Change::Thawed };
                out.push(Effect::Notify { id, change });
                return;
            }
            Op::Stop { .. } => {
                session.broken = false;
                if running.fallback != Phase::Frozen {
                    row.stopped_at = now;
                } else if outcome != Outcome::Quiet && !last_words_count {
                    // What was told to end may have written once more.
                    row.unsaved = true;
                }
                self.enter(id, Phase::Stopped);
                Change::Stopped
            }
            Op::Freeze { .. } => {
                row.stopped_at = now;
                self.enter(id, Phase::Frozen);
                Change::Frozen
            }
            Op::Backup => {
                if let Outcome::BackedUp(name) = outcome {
                    row.unsaved = false;
                    row.backup = Some(name.clone());
                    Change::BackedUp(name)
                } else {
                    return;
                }
            }
            Op::Prune => {
                if row.backup.is_some() {
                    self.enter(id, Phase::Archived);
                    Change::Archived
                } else {
                    self.forget(id, out);
                    out.push(Effect::Notify { id, change: Change::Deleted });
                    return;
                }
            }
            Op::Restore(saved) => {
                match saved {
                    Saved::Backup(name) => {
                        row.unsaved = false;
                        row.backup = Some(name.clone());
                    }
                    Saved::Snapshot(_) | Saved::Part { .. } => row.unsaved = !counts_as_saved,
                }
                row.stopped_at = now;
                self.enter(id, Phase::Stopped);
                Change::Restored(saved.clone())
            }
            Op::Remove => {
                self.forget(id, out);
                self.fulfil_wish(id, running, out);
                out.push(Effect::Notify { id, change: Change::Removed });
                return;
            }
            // Has changed nothing; see `finished`.
            Op::Copy(_) => return,
        };
        if let Some(session) = self.sessions.get(&id) {
            out.push(Effect::Save(session.row.clone()));
        }
        // It may only have been brought back for a part to be put into it.
        if let (Op::Restore(restored), Some(waiter)) = (&running.op, running.wished_by)
            && let Some(session) = self.sessions.get_mut(&id)
            && let Some(front) = session.waiters.front()
            && front.id == waiter
            && matches!(&front.want, Want::Restored(saved) if saved == restored)
        {
            session.waiters.pop_front();
            out.push(Effect::Fulfil { id, waiter });
        }
        out.push(Effect::Notify { id, change });
    }

    fn was_busy(&mut self, id: Uuid, running: &Running, out: &mut Vec<Effect>) {
        let now = self.now;
        self.end_eviction(id);
        if let Some(session) = self.sessions.get_mut(&id) {
            // What runs in the background counts as use until now.
            session.row.last_used = now;
            // It may have been thawed to find that out.
            session.row.unsaved = true;
            session.retry_at = now.after(FIRST_RETRY);
            if running.wished_by.is_none() {
                out.push(Effect::Notify { id, change: Change::StillRunning });
            }
        }
        self.refuse_wish(id, running, &Refusal::InUse, out);
    }

    fn went_missing(&mut self, id: Uuid, running: &Running, out: &mut Vec<Effect>) {
        self.end_eviction(id);
        let left_frozen = self.has(Fault::VanishedLeftFrozen);
        let Some(session) = self.sessions.get_mut(&id) else { return };
        if session.row.phase == Phase::Frozen && !left_frozen {
            // Its processes are still there. Once they are not, this is found out again.
            session.broken = true;
            self.refuse_wish(id, running, &Refusal::Missing, out);
            return;
        }
        if session.row.backup.is_some() && !session.row.unsaved {
            // Nothing is lost: whoever waits gets the backup.
            self.enter(id, Phase::Archived);
            if let Some(session) = self.sessions.get(&id) {
                out.push(Effect::Save(session.row.clone()));
            }
            out.push(Effect::Notify { id, change: Change::Missing });
            return;
        }
        self.enter(id, Phase::Missing);
        if let Some(session) = self.sessions.get(&id) {
            out.push(Effect::Save(session.row.clone()));
        }
        out.push(Effect::Notify { id, change: Change::Missing });
        self.refuse_wish(id, running, &Refusal::Missing, out);
    }

    /// An instance was left in a state that nobody knows: it is ended by force, and whoever
    /// waits is then served by a new one.
    fn broke(&mut self, id: Uuid, running: &Running, out: &mut Vec<Effect>) {
        let now = self.now;
        if running.op == Op::Thaw && self.has(Fault::BrokenGranted) {
            return;
        }
        let Some(session) = self.sessions.get_mut(&id) else { return };
        session.broken = true;
        session.row.unsaved = true;
        session.row.stopped_at = now;
        if running.op == (Op::Stop { force: true }) {
            return self.failed(id, running, out);
        }
        self.enter(id, Phase::Frozen);
        if let Some(session) = self.sessions.get(&id) {
            out.push(Effect::Save(session.row.clone()));
        }
        let change = Change::Failed { op: running.op.clone(), retry_at: None };
        out.push(Effect::Notify { id, change });
    }

    fn failed(&mut self, id: Uuid, running: &Running, out: &mut Vec<Effect>) {
        self.end_eviction(id);
        if running.op == Op::Backup && self.has(Fault::FailedBackupCounts) {
            if let Some(session) = self.sessions.get_mut(&id) {
                session.row.unsaved = false;
            }
            return;
        }
        if let Op::Create { .. } = running.op {
            self.refuse_guards(id, out);
            self.forget(id, out);
            let op = running.op.clone();
            out.push(Effect::Notify { id, change: Change::Failed { op, retry_at: None } });
            return;
        }
        let now = self.now;
        self.enter(id, running.fallback);
        let Some(session) = self.sessions.get_mut(&id) else { return };
        // Giving up for a caller is no failure of the operation.
        if !running.interrupted {
            let retried = running.wished_by.is_none();
            if retried {
                let wait = FIRST_RETRY.saturating_mul(1 << session.failures.min(20));
                session.failures += 1;
                session.retry_at = now.after(wait.min(LONGEST_RETRY));
                self.failing.insert(id);
            }
            out.push(Effect::Notify {
                id,
                change: Change::Failed {
                    op: running.op.clone(),
                    retry_at: retried.then_some(session.retry_at),
                },
            });
        }
        let wrote = match running.op {
            Op::Stop { .. } => running.fallback == Phase::Frozen,
            Op::Freeze { force } => force,
            Op::Backup | Op::Copy(_) => false,
            _ => true,
        };
        if wrote {
            // Its row says what was begun.
            out.push(Effect::Save(session.row.clone()));
        }
        // It has to end before anybody is served, and may never.
        let hinders = matches!(running.fallback, Phase::Pruning | Phase::Removing);
        if hinders || matches!(running.op, Op::Start | Op::Thaw | Op::Restore(_)) {
            self.refuse_guards(id, out);
        }
        self.refuse_wish(id, running, &Refusal::Failed, out);
    }

    /// Answers the waiter for whom the operation was run, if it is still there.
    fn fulfil_wish(&mut self, id: Uuid, running: &Running, out: &mut Vec<Effect>) {
        let (Some(waiter), Some(session)) = (running.wished_by, self.sessions.get_mut(&id)) else {
            return;
        };
        let before = session.waiters.len();
        session.waiters.retain(|waiting| waiting.id != waiter);
        if session.waiters.len() < before {
            out.push(Effect::Fulfil { id, waiter });
        }
    }

    /// Turns away the waiter for whom the operation was run, if it is still there.
    fn refuse_wish(&mut self, id: Uuid, running: &Running, why: &Refusal, out: &mut Vec<Effect>) {
        let (Some(waiter), Some(session)) = (running.wished_by, self.sessions.get_mut(&id)) else {
            return;
        };
        let before = session.waiters.len();
        session.waiters.retain(|waiting| waiting.id != waiter);
        if session.waiters.len() < before {
            out.push(Effect::Refuse { id, waiter, why: why.clone() });
        }
    }

    /// Turns away all who wait for a guard: what just failed would fail for them too.
    fn refuse_guards(&mut self, id: Uuid, out: &mut Vec<Effect>) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        session.waiters.retain(|waiting| {
            let guard = matches!(waiting.want, Want::Guard { .. });
            if guard {
                out.push(Effect::Refuse { id, waiter: waiting.id, why: Refusal::Failed });
            }
            !guard
        });
    }

    // ---- What happens next --------------------------------------------------------------

    /// Takes the next step for a session, if there is one.
    fn advance(&mut self, id: Uuid, out: &mut Vec<Effect>) {
        let stands_still = self.policy.can_freeze || self.has(Fault::CopiedWhileWritten);
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let guard_waits = session.guard_waits();
        if let Some(running) = &mut session.running {
            let housekeeping = running.wished_by.is_none() && running.op == Op::Backup;
            if housekeeping && !running.interrupted && guard_waits {
                running.interrupted = true;
                out.push(Effect::Interrupt { id, seq: running.seq });
            }
            if self.has(Fault::TwoOperations) {
                self.keep_house(id, out);
            }
            return;
        }
        if session.held {
            // A copy changes nothing of a session, and what runs in it will go on.
            let copied = session.waiters.iter().find_map(|waiting| match waiting.want {
                Want::Copied { copy, .. } => Some((waiting.id, copy)),
                _ => None,
            });
            if let Some((waiter, copy)) = copied
                && stands_still
                && session.row.phase == Phase::Active
            {
                return self.run(id, Op::Copy(copy), Some(waiter), out);
            }
            let freezes = self.policy.sleep == Sleep::Freeze && self.has(Fault::FrozenWhileHeld);
            if self.has(Fault::PruneWhileHeld) || freezes {
                self.keep_house(id, out);
            }
            if self.has(Fault::TwoHolders) {
                self.serve_line(id, out);
            }
            return;
        }
        // Left behind by a crash, or of no use any more: finish before anybody is served.
        match session.row.phase {
            Phase::Removing => {
                if self.may_retry(id) {
                    self.run(id, Op::Remove, None, out);
                }
                return;
            }
            Phase::Pruning => {
                if self.may_retry(id) {
                    self.run(id, Op::Prune, None, out);
                }
                return;
            }
            _ if session.broken => {
                let waiter = session.waiters.front().map(|front| front.id);
                if waiter.is_some() || self.may_retry(id) {
                    self.run(id, Op::Stop { force: true }, waiter, out);
                }
                return;
            }
            _ => {}
        }
        if !session.waiters.is_empty() {
            self.end_eviction(id);
            self.serve_line(id, out);
            return;
        }
        self.drop_if_absent(id);
        self.keep_house(id, out);
    }

    /// Whether the last failure has been waited out; if not, comes back when it has.
    fn may_retry(&mut self, id: Uuid) -> bool {
        let Some(session) = self.sessions.get(&id) else { return false };
        if session.failures == 0 || session.retry_at <= self.now {
            return true;
        }
        let at = session.retry_at;
        self.schedule(id, at);
        false
    }

    /// Serves the front of a session's line until it has to wait for something.
    fn serve_line(&mut self, id: Uuid, out: &mut Vec<Effect>) {
        let grants_frozen = self.has(Fault::FrozenGranted);
        let grants_running = self.has(Fault::StillGrantedRunning);
        let part_is_all = self.has(Fault::PartIsAllThereIs);
        loop {
            let has_room = self.has_room() || self.spares > 0;
            let (can_freeze, pauses_running) =
                (self.policy.can_freeze, self.has(Fault::PausedRunning));
            let Some(session) = self.sessions.get_mut(&id) else { return };
            let Some(front) = session.waiters.front() else { break };
            let (waiter, phase) = (front.id, session.row.phase);
            let answer = match (front.want.clone(), phase) {
                (Want::Guard { .. }, Phase::Frozen) if !grants_frozen => {
                    return self.run(id, Op::Thaw, Some(waiter), out);
                }
                (Want::Guard { .. }, Phase::Active | Phase::Frozen) => {
                    session.waiters.pop_front();
                    session.held = true;
                    session.row.unsaved = true;
                    session.row.paused = false;
                    out.push(Effect::Grant { id, waiter });
                    return;
                }
                (Want::Guard { .. }, Phase::Stopped) => {
                    return self.run(id, Op::Start, Some(waiter), out);
                }
                (Want::Guard { .. }, Phase::Absent | Phase::Archived) => {
                    return self.want_slot(id, out);
                }
                (Want::Guard { .. }, Phase::Missing) => Err(Refusal::Missing),
                // Not reached: an operation is in flight in these, or `advance` began one.
                (_, Phase::Creating | Phase::Restoring | Phase::Pruning | Phase::Removing) => {
                    return;
                }

                // Removed while the caller was in line.
                (Want::Removed, Phase::Absent) => Ok(()),
                (_, Phase::Absent) => Err(Refusal::Unknown),

                (Want::Stopped { .. } | Want::Paused | Want::Still, Phase::Missing) => {
                    Err(Refusal::Missing)
                }
                (Want::Stopped { force }, Phase::Active | Phase::Frozen) => {
                    return self.run(id, Op::Stop { force }, Some(waiter), out);
                }
                (Want::Paused, Phase::Active) if !can_freeze => Err(Refusal::CannotFreeze),
                (Want::Paused, Phase::Active) if !pauses_running => {
                    return self.run(id, Op::Freeze { force: true }, Some(waiter), out);
                }
                (Want::Stopped { .. } | Want::Paused, _) => Ok(()),
                (Want::Still, Phase::Stopped | Phase::Frozen | Phase::Archived) => {
                    return self.grant_still(id, out);
                }
                (Want::Still, Phase::Active) if grants_running => {
                    return self.grant_still(id, out);
                }

                (Want::Copied { copy, .. }, Phase::Active | Phase::Frozen | Phase::Stopped) => {
                    return self.run(id, Op::Copy(copy), Some(waiter), out);
                }
                (Want::Copied { .. }, Phase::Archived) => return self.want_slot(id, out),
                (Want::Copied { .. }, Phase::Missing) => Err(Refusal::Missing),

                (Want::BackedUp, _) if !self.policy.has_destination => Err(Refusal::NoDestination),
                (Want::Restored(saved), _)
                    if saved.backup().is_some() && !self.policy.has_destination =>
                {
                    Err(Refusal::NoDestination)
                }
                // Standing still is enough for whoever only reads.
                (Want::BackedUp | Want::Still, Phase::Active)
                    if self.policy.sleep == Sleep::Freeze =>
                {
                    return self.run(id, Op::Freeze { force: false }, Some(waiter), out);
                }
                (Want::BackedUp | Want::Still | Want::Restored(_), Phase::Active)
                | (Want::Restored(_), Phase::Frozen) => {
                    return self.run(id, Op::Stop { force: false }, Some(waiter), out);
                }
                (Want::BackedUp, Phase::Missing) => Err(Refusal::Missing),
                (Want::BackedUp, Phase::Stopped | Phase::Frozen) if session.row.unsaved => {
                    return self.run(id, Op::Backup, Some(waiter), out);
                }
                (Want::BackedUp, _) => Ok(()),

                // It has to be all there for a part of it to be put back.
                (Want::Restored(Saved::Part { .. }), Phase::Archived) if !part_is_all => {
                    return self.want_slot(id, out);
                }
                (Want::Restored(Saved::Part { .. }), Phase::Missing) => Err(Refusal::Missing),

                // What is there is saved before it is replaced.
                (Want::Restored(_), Phase::Stopped)
                    if session.row.unsaved && self.policy.has_destination =>
                {
                    return self.run(id, Op::Backup, Some(waiter), out);
                }
                (Want::Restored(saved), _) if phase.is_resident() || has_room => {
                    return self.put_back(id, saved, waiter, out);
                }
                (Want::Restored(_), _) => Err(Refusal::AtCapacity),

                (Want::Removed, _) => return self.run(id, Op::Remove, Some(waiter), out),
            };
            session.waiters.pop_front();
            out.push(match answer {
                Ok(()) => Effect::Fulfil { id, waiter },
                Err(why) => Effect::Refuse { id, waiter, why },
            });
        }
        self.drop_if_absent(id);
        self.keep_house(id, out);
    }

    /// Begins to put a session back; if it has to take the place of a spare, in that.
    fn put_back(&mut self, id: Uuid, saved: Saved, waiter: WaiterId, out: &mut Vec<Effect>) {
        let resident = self.sessions.get(&id).is_some_and(|it| it.row.phase.is_resident());
        if !resident && !self.has_room() {
            self.discard_spare(out);
        }
        self.run(id, Op::Restore(saved), Some(waiter), out);
    }

    /// Gives the session to the first in line as it is, for its files to be read.
    fn grant_still(&mut self, id: Uuid, out: &mut Vec<Effect>) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let Some(Waiter { id: waiter, .. }) = session.waiters.pop_front() else { return };
        session.held = true;
        out.push(Effect::Grant { id, waiter });
    }

    /// What time, or the need for room, asks of a session nobody waits for.
    fn keep_house(&mut self, id: Uuid, out: &mut Vec<Effect>) {
        let policy = &self.policy;
        let Some(session) = self.sessions.get(&id) else { return };
        let row = &session.row;
        let pressed = session.evicting;
        let (at, op) = match row.phase {
            // It was thawed to be stopped, and was not.
            Phase::Active if row.paused && !pressed && !self.has(Fault::PausedWakesUnasked) => {
                (self.now, Op::Freeze { force: true })
            }
            Phase::Active => {
                // Where room is needed, it will have to stop anyway.
                let freezes = policy.sleep == Sleep::Freeze && !pressed;
                let op =
                    if freezes { Op::Freeze { force: false } } else { Op::Stop { force: false } };
                (row.last_used.after(policy.idle_shutdown), op)
            }
            Phase::Frozen => {
                let prune = row.stopped_at.after(policy.prune_after);
                let backup = row.stopped_at.after(policy.backup_after.unwrap_or(Duration::MAX));
                // Later, it is saved once it has been ended: being told, it may write again.
                let saved_as_it_is = policy.has_destination && row.unsaved && !pressed;
                if saved_as_it_is && backup < prune && self.now < prune {
                    (backup, Op::Backup)
                } else {
                    (prune, Op::Stop { force: true })
                }
            }
            Phase::Stopped if policy.has_destination && row.unsaved => {
                (policy.saves_at(row), Op::Backup)
            }
            Phase::Stopped => (row.stopped_at.after(policy.prune_after), Op::Prune),
            _ => return,
        };
        let op = match op {
            Op::Backup if pressed && self.has(Fault::EvictUnsaved) => Op::Prune,
            Op::Stop { .. } if self.has(Fault::BusyIgnored) => Op::Stop { force: true },
            Op::Stop { force: true } if self.has(Fault::FrozenPruned) => Op::Prune,
            op => op,
        };
        let at = if pressed { self.now } else { at };
        let at = if session.failures > 0 { at.max(session.retry_at) } else { at };
        if at <= self.now {
            self.run(id, op, None, out);
        } else {
            self.schedule(id, at);
        }
    }

    fn schedule(&mut self, id: Uuid, at: PoolTime) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        if let Some(before) = session.due {
            if before == at {
                return;
            }
            self.due.remove(&(before, id));
        }
        session.due = Some(at);
        self.due.insert((at, id));
    }

    /// Begins an operation, its row first.
    fn run(&mut self, id: Uuid, op: Op, wished_by: Option<WaiterId>, out: &mut Vec<Effect>) {
        let seq = self.next_seq;
        self.next_seq += 1;
        let Some(session) = self.sessions.get(&id) else { return };
        // A prune or removal that a crash left half-done falls back to itself: it has to end.
        let fallback = session.row.phase;
        let next = match &op {
            Op::Create { .. } => Some(Phase::Creating),
            // What sleeps may write from then on.
            Op::Start | Op::Thaw => Some(Phase::Active),
            Op::Stop { .. } if fallback == Phase::Frozen => Some(Phase::Active),
            Op::Prune => Some(Phase::Pruning),
            Op::Restore(_) => Some(Phase::Restoring),
            // What has no local files takes no place while it is forgotten.
            Op::Remove if !fallback.is_resident() => Some(fallback),
            Op::Remove => Some(Phase::Removing),
            Op::Stop { .. } | Op::Freeze { .. } | Op::Backup | Op::Copy(_) => None,
        };
        let mut row = None;
        if op == (Op::Freeze { force: true }) {
            // Whoever is told that it is paused may count on it, whatever happens then.
            row = Some(Row { paused: true, ..session.row.clone() });
        }
        if let Some(phase) = next {
            self.enter(id, phase);
            let Some(session) = self.sessions.get(&id) else { return };
            let mut durable = session.row.clone();
            match &op {
                Op::Start | Op::Thaw | Op::Stop { .. } => {
                    durable.unsaved = true;
                    durable.paused = false;
                }
                Op::Restore(Saved::Backup(name)) => durable.backup = Some(name.clone()),
                Op::Restore(_) => durable.unsaved = true,
                Op::Remove => durable.phase = Phase::Removing,
                _ => {}
            }
            if op != Op::Prune || !self.has(Fault::PruneNotDurable) {
                row = Some(durable);
            }
        }
        if let Some(session) = self.sessions.get_mut(&id) {
            // Its end decides anew what is due.
            if let Some(at) = session.due.take() {
                self.due.remove(&(at, id));
            }
            session.running =
                Some(Running { op: op.clone(), seq, wished_by, fallback, interrupted: false });
            self.running += 1;
            self.wished += usize::from(wished_by.is_some());
            out.push(Effect::Run { id, seq, op, row });
        }
    }

    /// Moves a session to a phase, keeping count of the places taken.
    fn enter(&mut self, id: Uuid, phase: Phase) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let before = session.row.phase.is_resident();
        session.row.phase = phase;
        self.resident = self.resident + usize::from(phase.is_resident()) - usize::from(before);
        if !phase.is_resident() {
            self.end_eviction(id);
        }
    }

    /// Drops all that is known of a session, but not those who wait for it.
    fn forget(&mut self, id: Uuid, out: &mut Vec<Effect>) {
        self.enter(id, Phase::Absent);
        let Some(session) = self.sessions.get_mut(&id) else { return };
        if let Some(at) = session.due {
            self.due.remove(&(at, id));
        }
        self.failing.remove(&id);
        let waiters = std::mem::take(&mut session.waiters);
        let wants_slot = session.wants_slot;
        *session = Session { wants_slot, waiters, ..Session::absent(id, self.now) };
        self.leave_slot_line(id);
        out.push(Effect::Forget(id));
        self.drop_if_absent(id);
    }

    fn drop_if_absent(&mut self, id: Uuid) {
        if self.sessions.get(&id).is_some_and(|session| {
            session.row.phase == Phase::Absent
                && session.waiters.is_empty()
                && session.running.is_none()
        }) {
            self.sessions.remove(&id);
        }
    }

    // ---- Places in a full pool ----------------------------------------------------------

    fn has_room(&self) -> bool {
        let spares = if self.has(Fault::SparesNotCounted) { 0 } else { self.spares };
        let most = self.policy.max_vms + usize::from(self.has(Fault::CapacityOffByOne));
        self.resident + spares + self.preparing < most
    }

    /// Has spares made while there is room that nobody waits for.
    fn keep_spares(&mut self, out: &mut Vec<Effect>) {
        while self.spares + self.preparing < self.policy.spares
            && !self.cannot_prepare
            && self.outdated == 0
            && self.slot_line.is_empty()
            && self.has_room()
        {
            self.preparing += 1;
            out.push(Effect::Prepare);
        }
    }

    /// Gives up a spare, if there is one.
    fn discard_spare(&mut self, out: &mut Vec<Effect>) -> bool {
        let is_there = self.spares > 0;
        if is_there {
            self.spares -= 1;
            out.push(Effect::Discard);
        }
        is_there
    }

    /// Puts a session at the end of the line for a place.
    fn want_slot(&mut self, id: Uuid, out: &mut Vec<Effect>) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        if !session.wants_slot {
            session.wants_slot = true;
            self.slot_line.push_back(id);
        }
        self.fill_slots(out);
    }

    /// Takes a session out of the line if nobody waits any more who needs a place for it; gives
    /// whether it did.
    fn leave_slot_line(&mut self, id: Uuid) -> bool {
        let Some(session) = self.sessions.get_mut(&id) else { return false };
        let leaves = session.wants_slot && !session.waits_for_place();
        if leaves {
            session.wants_slot = false;
            self.slot_line.retain(|waiting| *waiting != id);
        }
        leaves
    }

    /// Gives free places to the line, makes room if there is none, and turns away those for
    /// whom no room is being made and who would not wait.
    fn fill_slots(&mut self, out: &mut Vec<Effect>) {
        while let Some(&id) = self.slot_line.front() {
            let starts_empty = self.has(Fault::ArchivedStartsEmpty);
            let backup = self.sessions.get(&id).and_then(|session| match session.row.phase {
                Phase::Archived if !starts_empty => session.row.backup.clone(),
                _ => None,
            });
            let spare = backup.is_none() && self.spares > 0;
            let keeps_place = self.has(Fault::SpareKeepsPlace);
            if !spare && !self.has_room() && (keeps_place || !self.discard_spare(out)) {
                break;
            }
            self.slot_line.pop_front();
            let Some(session) = self.sessions.get_mut(&id) else { continue };
            session.wants_slot = false;
            // Whoever was first in its line has left, and the next one wanted something else
            // of it: it comes back when that is done.
            if session.running.is_some() || session.held {
                continue;
            }
            let Some(front) = session.waiters.front() else { continue };
            let wished_by = Some(front.id);
            if spare && !self.has(Fault::SpareGivenTwice) {
                self.spares -= 1;
            }
            let op = backup.map_or(Op::Create { spare }, |name| Op::Restore(Saved::Backup(name)));
            self.run(id, op, wished_by, out);
        }
        // A spare that is being made gives way when it is there.
        while self.evicting + self.preparing < self.slot_line.len() && self.evict_one(out) {}
        let on_their_way = self.evicting + self.preparing;
        let turned_away: Vec<Uuid> = self.slot_line.iter().skip(on_their_way).copied().collect();
        for id in turned_away {
            self.turn_away_impatient(id, out);
        }
    }

    fn turn_away_impatient(&mut self, id: Uuid, out: &mut Vec<Effect>) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        session.waiters.retain(|waiting| {
            let impatient = matches!(
                waiting.want,
                Want::Guard { patient: false }
                    | Want::Copied { patient: false, .. }
                    | Want::Restored(Saved::Part { .. })
            );
            if impatient {
                let why = Refusal::AtCapacity;
                out.push(Effect::Refuse { id, waiter: waiting.id, why });
            }
            !impatient
        });
        if self.leave_slot_line(id) {
            // Whoever else is in its line can be answered now.
            self.advance(id, out);
        }
    }

    /// Begins to make room by sending the session away that has been of no use for longest.
    fn evict_one(&mut self, out: &mut Vec<Effect>) -> bool {
        // Every resident session that nothing happens to is in the due-queue.
        let chosen = self
            .due
            .iter()
            .filter_map(|(_, id)| self.sessions.get(id))
            .filter(|session| self.is_evictable(session))
            .min_by_key(|session| match session.row.phase {
                Phase::Stopped => (0, session.row.stopped_at, session.row.id),
                Phase::Frozen => (1, session.row.stopped_at, session.row.id),
                _ => (2, session.row.last_used, session.row.id),
            })
            .map(|session| session.row.id);
        let Some(id) = chosen else { return false };
        if let Some(session) = self.sessions.get_mut(&id) {
            session.evicting = true;
            self.evicting += 1;
        }
        self.advance(id, out);
        true
    }

    /// Sessions that sleep may be evicted; idle ones too where that costs no data.
    fn is_evictable(&self, session: &Session) -> bool {
        let phase = match session.row.phase {
            Phase::Stopped | Phase::Frozen => true,
            Phase::Active => self.policy.has_destination,
            _ => false,
        };
        phase
            && !session.held
            && !session.evicting
            && session.running.is_none()
            && session.waiters.is_empty()
            && session.retry_at <= self.now
    }

    fn end_eviction(&mut self, id: Uuid) {
        if let Some(session) = self.sessions.get_mut(&id)
            && session.evicting
        {
            session.evicting = false;
            self.evicting -= 1;
        }
    }
}

impl Session {
    fn new(row: Row) -> Self {
        Self {
            row,
            running: None,
            held: false,
            broken: false,
            evicting: false,
            wants_slot: false,
            waiters: VecDeque::new(),
            failures: 0,
            retry_at: PoolTime::default(),
            due: None,
        }
    }

    fn absent(id: Uuid, now: PoolTime) -> Self {
        Self::new(Row {
            id,
            phase: Phase::Absent,
            created_at: now,
            last_used: now,
            stopped_at: now,
            unsaved: true,
            backup: None,
            paused: false,
        })
    }

    fn counts_on(&self) -> impl Iterator<Item = &str> {
        let wanted = self.waiters.iter().filter_map(|waiting| match &waiting.want {
            Want::Restored(saved) => Some(saved),
            _ => None,
        });
        let restored = self.running.iter().filter_map(|running| match &running.op {
            Op::Restore(saved) => Some(saved),
            _ => None,
        });
        let named = wanted.chain(restored).filter_map(Saved::backup);
        self.row.backup.iter().map(String::as_str).chain(named)
    }

    fn guard_waits(&self) -> bool {
        self.waiters.iter().any(|waiting| matches!(waiting.want, Want::Guard { .. }))
    }

    /// Whether a caller in line needs the session to be on local disk. No copy is made of what
    /// has never been.
    fn waits_for_place(&self) -> bool {
        self.waiters.iter().any(|waiting| match waiting.want {
            Want::Guard { .. } => true,
            Want::Copied { .. } => self.row.phase != Phase::Absent,
            Want::Restored(Saved::Part { .. }) => self.row.phase == Phase::Archived,
            _ => false,
        })
    }
}
