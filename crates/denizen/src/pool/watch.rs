//! Watches what sessions use of the disk, where that is limited: one task, that does nothing
//! while no session is in use. `disk.rs` says when to look and what is too much; this looks,
//! and ends what has to be ended. It must never end anything else.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use denizen_agent::Agent;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use uuid::Uuid;

use super::{Place, Pool, blocking};
use crate::disk::measure::{device, used};
use crate::disk::{Budget, Due, Known, LOOK, SAVINGS, Walk, nameless, room};
use crate::event::{Event, EventKind};

/// How often a session that nobody holds is asked whether anything still runs in it.
const ASK: Duration = Duration::from_secs(2);
/// How long it may take to end what runs; then its first process is ended with it.
const PATIENCE: Duration = Duration::from_secs(5);

/// A session as the watch sees it; in its [`Place`].
#[derive(Debug, Default)]
pub(super) struct Watched {
    /// The watch knows that the session is, or was just now, in use.
    seen: AtomicBool,
    pub(super) known: Mutex<Known>,
    /// How often what ran was ended, times two; odd while it is being done.
    endings: AtomicU64,
}

/// Tells afterwards whether what began now was ended because of the disk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mark(u64);

impl Watched {
    pub(crate) fn mark(&self) -> Mark {
        Mark(self.endings.load(Ordering::Acquire))
    }

    pub(crate) fn ended_since(&self, Mark(then): Mark) -> bool {
        // What is begun while all else is being ended waits until that is done.
        self.endings.load(Ordering::Acquire) > then + then % 2
    }
}

/// The pool's side of the watch.
pub(super) struct Watch {
    limit: u64,
    /// Sessions that have come into use.
    fresh: Mutex<Vec<Arc<Place>>>,
    wake: Notify,
}

impl Watch {
    pub(super) fn new(limit: u64) -> Self {
        Self { limit, fresh: Mutex::default(), wake: Notify::new() }
    }

    pub(super) fn limit(&self) -> u64 {
        self.limit
    }

    /// Somebody has got a session: it is looked at until it is quiet again.
    pub(super) fn in_use(&self, place: &Arc<Place>) {
        if !place.watched.seen.swap(true, Ordering::AcqRel) {
            self.fresh.lock().push(place.clone());
            self.wake.notify_one();
        }
    }
}

/// A session that is in use, or was until just now.
struct Session {
    place: Arc<Place>,
    asked: Option<Instant>,
    /// Nobody held it when it was last asked, and nothing ran in it.
    quiet: bool,
}

/// Watches for as long as there is a pool.
pub(super) async fn run(pool: Weak<Pool>) {
    let mut sessions: HashMap<Uuid, Session> = HashMap::new();
    let mut answers = JoinSet::new();
    let (clock, mut budget) = (Clock(Instant::now()), Budget::default());
    while let Some(pool) = pool.upgrade() {
        let Some(watch) = &pool.watch else { return };
        if sessions.is_empty() && watch.fresh.lock().is_empty() {
            watch.wake.notified().await;
        } else {
            tokio::time::sleep(LOOK).await;
        }
        for place in watch.fresh.lock().drain(..) {
            sessions
                .entry(place.site.id)
                .and_modify(|session| session.quiet = false)
                .or_insert(Session { place, asked: None, quiet: false });
        }
        while let Some(answer) = answers.try_join_next() {
            if let Ok((id, true)) = answer
                && let Entry::Occupied(mut session) = sessions.entry(id)
            {
                session.get_mut().quiet = true;
            }
        }
        look(&pool, watch, &mut sessions, &mut answers, clock, &mut budget).await;
    }
}

/// The watch's own time. Before its beginning nothing was walked, which is saved up.
#[derive(Clone, Copy)]
struct Clock(Instant);

impl Clock {
    fn now(self) -> Duration {
        self.0.elapsed() + SAVINGS
    }
}

/// One look: measures what is due, and lets go of what is quiet.
async fn look(
    pool: &Arc<Pool>,
    watch: &Watch,
    sessions: &mut HashMap<Uuid, Session>,
    answers: &mut JoinSet<(Uuid, bool)>,
    clock: Clock,
    budget: &mut Budget,
) {
    let limit = watch.limit;
    let mut measured = HashSet::new();
    loop {
        let room = room_of(pool).await;
        let now = clock.now();
        let due = |session: &Session| {
            let due = session.place.watched.known.lock().due(now, room, limit);
            // What it has in the end is known from then on.
            due.or(session.quiet.then_some(Due::Old))
        };
        let all = sessions.iter().filter(|(id, _)| !measured.contains(*id));
        let all = all.filter_map(|(id, session)| Some((due(session)?, *id, &session.place)));
        let Some((_, id, place)) = all.min_by_key(|(due, id, _)| (*due, *id)) else { break };
        if !budget.allows(now) {
            break;
        }
        measured.insert(id);
        let place = place.clone();
        let enough = place.watched.known.lock().enough(limit);
        let walk = walk(pool, &place, now, room, enough).await;
        budget.spend(clock.now(), walk.took);
        if place.watched.known.lock().measured(walk, limit) {
            end(pool, watch, &place, clock).await;
        }
    }
    sessions.retain(|id, session| {
        if session.place.agent().is_none() {
            return !leave(pool, session);
        }
        if is_held(pool, *id) {
            session.quiet = false;
            return true;
        }
        if session.quiet {
            return !leave(pool, session);
        }
        if session.asked.is_none_or(|at| at.elapsed() >= ASK) {
            session.asked = Some(Instant::now());
            if let Some(agent) = session.place.agent() {
                answers.spawn(is_quiet(*id, agent));
            }
        }
        true
    });
}

async fn is_quiet(id: Uuid, agent: Agent) -> (Uuid, bool) {
    // One that gives no answer is asked again, until it is stopped.
    (id, agent.busy().await.is_ok_and(|running| running.is_empty()))
}

fn is_held(pool: &Pool, id: Uuid) -> bool {
    pool.state.lock().core.view(id).is_some_and(|view| view.held)
}

/// Lets go of a session, unless somebody has got it in this moment.
fn leave(pool: &Pool, session: &mut Session) -> bool {
    let seen = &session.place.watched.seen;
    seen.store(false, Ordering::Release);
    // Whoever gets it from here on says so; who has it already may have not.
    let stays = is_held(pool, session.place.site.id) && !seen.swap(true, Ordering::AcqRel);
    session.quiet &= !stays;
    !stays
}

/// How much room the pool's file system has; none if it does not tell, so that all that is in
/// use is measured as often as may be.
async fn room_of(pool: &Arc<Pool>) -> u64 {
    let root = pool.volumes.root().to_owned();
    match blocking(move || Ok(rustix::fs::statvfs(&root))).await {
        Ok(Ok(stat)) => room(stat.f_bfree.saturating_mul(stat.f_frsize), stat.f_ffree),
        _ => 0,
    }
}

async fn walk(
    pool: &Arc<Pool>,
    place: &Arc<Place>,
    began: Duration,
    room: u64,
    enough: u64,
) -> Walk {
    let own = place.site.trees();
    let shared = pool.shared_trees(place.site.id);
    let first = match place.agent() {
        Some(agent) => agent.first_process().await,
        None => None,
    };
    let measured = blocking(move || {
        let begin = Instant::now();
        let mut sum = used(own.iter().map(AsRef::as_ref), enough);
        if let (Some(first), Some(device)) = (first, device(&own[0])) {
            let processes = denizen_agent::descendants(first);
            sum += nameless::used(&processes, device, enough.saturating_sub(sum));
        }
        // Each may have as much as the session: who has much of their own is not ended for what
        // others write there, and all who have one that is too large are.
        for tree in &shared {
            sum = sum.max(used([tree.as_path()], enough));
        }
        Ok((sum, begin.elapsed()))
    });
    // The walk itself cannot fail; a runtime that ends can.
    let (used, took) = measured.await.unwrap_or_default();
    Walk { began, took, room, used }
}

/// Ends what runs in a session that is over its limit, and says so.
async fn end(pool: &Arc<Pool>, watch: &Watch, place: &Arc<Place>, clock: Clock) {
    let id = place.site.id;
    let endings = &place.watched.endings;
    endings.fetch_add(1, Ordering::AcqRel);
    if let Some(agent) = place.agent() {
        let cleared = tokio::time::timeout(PATIENCE, agent.clear()).await;
        if !matches!(cleared, Ok(Ok(()))) {
            tracing::warn!(session = %id, ?cleared, "what fills the disk is ended the hard way");
            if let Err(error) = agent.shutdown(Duration::ZERO).await {
                tracing::warn!(session = %id, %error, "cannot end what fills the disk");
            }
        }
    }
    endings.fetch_add(1, Ordering::AcqRel);
    let room = room_of(pool).await;
    let walk = walk(pool, place, clock.now(), room, u64::MAX).await;
    place.watched.known.lock().ended(walk);
    let (used, limit) = (walk.used, watch.limit);
    tracing::warn!(session = %id, used, limit, "over its disk limit: ended what ran in it");
    let name = pool.state.lock().names.get(&id).map(ToString::to_string);
    let kind = EventKind::LimitReached { resource: "disk", used, limit };
    pool.announcer.announce(Event { at: pool.clock.wall(), session: id, name, kind });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_tells_what_ended_after_it_and_not_before() {
        let watched = Watched::default();
        let early = watched.mark();
        assert!(!watched.ended_since(early));
        watched.endings.fetch_add(1, Ordering::AcqRel);
        let meanwhile = watched.mark();
        assert!(watched.ended_since(early) && !watched.ended_since(meanwhile));
        watched.endings.fetch_add(1, Ordering::AcqRel);
        let late = watched.mark();
        assert!(watched.ended_since(early), "also when it is over");
        assert!(!watched.ended_since(meanwhile), "it waited for the end of that");
        watched.endings.fetch_add(1, Ordering::AcqRel);
        assert!(watched.ended_since(meanwhile) && watched.ended_since(late));
    }
}
