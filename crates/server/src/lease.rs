//! The daemon's hold on sessions.
//!
//! A guard is exclusive, but a session's user may run several commands at once. So the daemon
//! takes one guard for a session and shares it among all requests that use the session; when
//! the last of them is done, the guard is given back.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::BoxError;
use axum::body::Bytes;
use axum::http::HeaderMap;
use connectrpc::ConnectError;
use denizen::{Error, Histogram, MicroVmManager, SessionName, VmExecutionGuard};
use denizen_agent::envd::{Hold, Instance, Instances, Jobs, KeptLogs, Watchers};
use hyper::body::{Body, Frame, SizeHint};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tracing::Instrument;
use uuid::Uuid;

use crate::access::guard;
use crate::e2b;
use crate::files::Within;
use crate::stream::Messages;
use crate::{SESSION, trace};

/// What commands of a session get unless they say otherwise, where that is not what all sessions'
/// do.
#[derive(Clone, Debug, Default)]
pub(crate) struct Defaults {
    /// What their environment has beside that of all sessions.
    pub(crate) env: BTreeMap<String, String>,
    /// Who runs them, and has the files that are made.
    pub(crate) user: Option<String>,
    /// Where they start.
    pub(crate) workdir: Option<String>,
}

/// A guard that is shared.
pub(crate) struct Lease {
    pub(crate) guard: VmExecutionGuard,
    pub(crate) jobs: Arc<Jobs>,
    watchers: Arc<Watchers>,
    pub(crate) within: Arc<Within>,
    pub(crate) defaults: Arc<Defaults>,
    starts: Arc<Mutex<Histogram>>,
    /// Cancelled when whoever has it is to give it back.
    ended: CancellationToken,
}

impl Lease {
    /// Ends when the session is stopped by force, or the daemon ends: whatever takes long has to
    /// give the lease back then. Cancel-safe.
    pub(crate) async fn ended(&self) {
        self.ended.cancelled().await;
    }

    /// A body that keeps its session in use until its last byte is out, and breaks off when the
    /// lease has ended; also if nobody reads it.
    pub(crate) fn hold<B>(self: Arc<Self>, body: B) -> Held<B> {
        let ended = self.ended.clone();
        Held {
            body,
            ended: Box::pin(ended.clone().cancelled_owned()),
            messages: None,
            is_over: false,
            _hold: Hold::new(self, ended),
        }
    }

    /// Where commands run and files are, for a request with these headers.
    pub(crate) fn instance(self: Arc<Self>, headers: &HeaderMap) -> Result<Instance, Error> {
        let limits = self.guard.limit_watch();
        let starts = self.starts.clone();
        let mut env = self.guard.base_environment();
        env.extend(self.defaults.env.clone());
        let workdir = self.defaults.workdir.as_ref().map(PathBuf::from);
        Ok(Instance {
            trace: trace::of_commands(self.guard.session_id(), headers),
            explain: Arc::new(move |exit| Some(limits.reached(exit)?.to_string())),
            started: Arc::new(move |took| starts.lock().count(took)),
            agent: self.guard.agent()?,
            workdir: workdir.unwrap_or_else(|| self.guard.workdir().to_owned()),
            env,
            default_user: self.defaults.user.clone(),
            jobs: self.jobs.clone(),
            watchers: self.watchers.clone(),
            over: self.ended.clone(),
            lease: self,
        })
    }
}

/// As [`Lease::hold`] makes it.
pub(crate) struct Held<B> {
    body: B,
    ended: Pin<Box<WaitForCancellationFutureOwned>>,
    /// If it is a stream of messages: it ends with one that says why.
    messages: Option<Messages>,
    is_over: bool,
    _hold: Hold,
}

impl<B> Held<B> {
    /// The body of an answer with these headers.
    pub(crate) fn of(self, headers: &HeaderMap) -> Self {
        Self { messages: Messages::of(headers), ..self }
    }
}

impl<B> Body for Held<B>
where
    B: Body<Data = Bytes, Error: Into<BoxError>> + Unpin,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if self.is_over {
            return Poll::Ready(None);
        }
        if self.messages.as_ref().is_some_and(Messages::are_over) {
            return Pin::new(&mut self.body).poll_frame(context).map_err(Into::into);
        }
        if self.ended.as_mut().poll(context).is_ready() {
            self.is_over = true;
            let end = Messages::cut(self.messages.as_ref(), "the session is being stopped");
            return Poll::Ready(Some(end));
        }
        let frame = Pin::new(&mut self.body).poll_frame(context).map_err(Into::into);
        Messages::follow(&mut self.messages, &frame);
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[derive(Default)]
struct Slot {
    shared: Mutex<Shared>,
    /// Told when there is a lease to share, and when it may be taken again.
    told: Notify,
    jobs: Mutex<Option<Arc<Jobs>>>,
    watchers: Arc<Watchers>,
    within: Arc<Within>,
}

#[derive(Default)]
struct Shared {
    lease: Weak<Lease>,
    /// How many are ending the session by force: nobody is let in meanwhile.
    ending: usize,
}

impl Shared {
    /// The lease that there is, unless it is to be given back.
    fn lease(&self) -> Option<Arc<Lease>> {
        self.lease.upgrade().filter(|lease| !lease.ended.is_cancelled())
    }
}

/// A session that nobody is let into, until this is dropped.
pub(crate) struct Closed(Arc<Slot>);

impl Drop for Closed {
    fn drop(&mut self) {
        self.0.shared.lock().ending -= 1;
        self.0.told.notify_waiters();
    }
}

/// All leases of the daemon.
pub(crate) struct Leases {
    pool: Arc<MicroVmManager>,
    slots: Mutex<HashMap<Uuid, Arc<Slot>>>,
    defaults: Mutex<HashMap<Uuid, Arc<Defaults>>>,
    last_use: Mutex<Instant>,
    /// How long it took to be given sessions.
    acquires: Mutex<Histogram>,
    /// How long it took to start commands.
    starts: Arc<Mutex<Histogram>>,
    /// Cancelled when nobody is given a session any more who has none.
    closing: CancellationToken,
    /// Cancelled when the daemon ends, and every lease with it.
    ended: CancellationToken,
    /// Whoever has a copy is doing something.
    busy: Arc<()>,
    logs: KeptLogs,
}

/// Something that the daemon does without a session's guard; until this is dropped.
pub(crate) struct Busy {
    _one: Arc<()>,
}

/// How often it is looked whether commands still run, when the daemon waits for their end.
const LOOK: Duration = Duration::from_millis(20);

impl Leases {
    pub(crate) fn new(pool: Arc<MicroVmManager>, logs: KeptLogs) -> Self {
        let last_use = Mutex::new(Instant::now());
        let (slots, defaults, acquires, starts, closing, ended, busy) = Default::default();
        Self { pool, slots, defaults, last_use, acquires, starts, closing, ended, busy, logs }
    }

    /// The session of that name or UUID, if it is known.
    pub(crate) fn find(&self, session: &str) -> Result<Uuid, Error> {
        if let Ok(id) = Uuid::try_parse(session) {
            return Ok(id);
        }
        let unknown = || Error::Unknown { session: session.to_owned() };
        self.pool.find(&session.parse()?)?.ok_or_else(unknown)
    }

    /// The session of that name or UUID; a new name is given an id.
    pub(crate) async fn find_or_name(&self, session: &str) -> Result<Uuid, Error> {
        match Uuid::try_parse(session) {
            Ok(id) => Ok(id),
            Err(_) => self.pool.find_or_name(&session.parse::<SessionName>()?).await,
        }
    }

    /// Shares the session's guard, acquiring it if nobody has it; a new session is made of this
    /// image, if one is named. Cancel-safe.
    pub(crate) async fn take(&self, id: Uuid, image: Option<&str>) -> Result<Arc<Lease>, Error> {
        self.touch();
        let slot = self.slots.lock().entry(id).or_default().clone();
        loop {
            let mut told = std::pin::pin!(slot.told.notified());
            told.as_mut().enable();
            let (lease, closed) = {
                let shared = slot.shared.lock();
                (shared.lease(), shared.ending > 0)
            };
            if closed {
                let was_there = self.pool.inspect(id).is_ok();
                told.await;
                if was_there {
                    // Who was in line for what is removed does not make it anew.
                    self.pool.inspect(id)?;
                }
                continue;
            }
            if let Some(lease) = lease {
                self.is_of(id, image)?;
                return Ok(lease);
            }
            let begun = Instant::now();
            // Everybody waits in the pool's own line, each no longer than that allows. Whoever is
            // given the session shares it with the rest, who leave the line then.
            let guard = tokio::select! {
                biased;
                () = self.closing.cancelled() => return Err(Error::ShuttingDown),
                guard = self.acquire(id, image) => guard?,
                () = told => continue,
            };
            self.acquires.lock().count(begun.elapsed());
            if let Some(lease) = self.share(&slot, id, guard)? {
                self.forget_unused();
                return Ok(lease);
            }
        }
    }

    async fn acquire(&self, id: Uuid, image: Option<&str>) -> Result<VmExecutionGuard, Error> {
        let span = tracing::info_span!("acquire", session = %id);
        match image {
            Some(image) => self.pool.acquire_with_image(id, image).instrument(span).await,
            None => self.pool.acquire(id).instrument(span).await,
        }
    }

    /// That a session is of this image, if one is named.
    fn is_of(&self, id: Uuid, image: Option<&str>) -> Result<(), Error> {
        if image.is_some() {
            let of = self.pool.inspect(id)?.image;
            if of.as_deref() != image {
                return Err(Error::OtherImage { session: id, image: of });
            }
        }
        Ok(())
    }

    /// Makes a lease of a guard, for all who want one; unless the session is being ended.
    fn share(
        &self,
        slot: &Slot,
        id: Uuid,
        guard: VmExecutionGuard,
    ) -> Result<Option<Arc<Lease>>, Error> {
        let logs = self.pool.session_folder(id)?.join("logs");
        let new = || Arc::new(Jobs::new(logs, self.logs));
        let jobs = slot.jobs.lock().get_or_insert_with(new).clone();
        let watchers = slot.watchers.clone();
        let within = slot.within.clone();
        let (starts, ended) = (self.starts.clone(), self.ended.child_token());
        let defaults = self.defaults.lock().get(&id).cloned().unwrap_or_default();
        let lease = Arc::new(Lease { guard, jobs, watchers, within, defaults, starts, ended });
        let mut shared = slot.shared.lock();
        if shared.ending > 0 {
            return Ok(None);
        }
        shared.lease = Arc::downgrade(&lease);
        drop(shared);
        slot.told.notify_waiters();
        Ok(Some(lease))
    }

    /// What commands of a session get from now on; of a session that is in use, when it is so the
    /// next time.
    pub(crate) fn set_defaults(&self, id: Uuid, defaults: Defaults) {
        self.defaults.lock().insert(id, Arc::new(defaults));
    }

    /// As all sessions' again.
    pub(crate) fn unset_defaults(&self, id: Uuid) {
        self.defaults.lock().remove(&id);
    }

    /// Stops a session. With force, what requests do in it is ended first, and they give the guard
    /// back on their own; then nobody is let in until what is returned is dropped. Cancel-safe.
    ///
    /// # Errors
    /// As [`MicroVmManager::stop`].
    pub(crate) async fn stop(&self, id: Uuid, force: bool) -> Result<Option<Closed>, Error> {
        let mut closed = None;
        loop {
            match self.pool.stop(id, force).await {
                Err(Error::InUse { .. }) if force => closed = Some(self.close(id).await?),
                done => return done.map(|()| closed),
            }
        }
    }

    /// Removes a session, whatever is done or runs in it. Cancel-safe.
    ///
    /// # Errors
    /// As [`MicroVmManager::remove`].
    pub(crate) async fn remove(&self, id: Uuid) -> Result<(), Error> {
        let mut closed = None;
        loop {
            match self.pool.remove(id).await {
                Err(Error::InUse { .. }) => closed = Some(self.close(id).await?),
                removed => break removed?,
            }
        }
        // Another session of that id begins with nothing of this one's; who is in line goes on with
        // the slot that it has.
        self.slots.lock().remove(&id);
        self.unset_defaults(id);
        drop(closed);
        Ok(())
    }

    /// What was started in a session through the daemon, if anything was.
    pub(crate) fn jobs(&self, id: Uuid) -> Option<Arc<Jobs>> {
        self.slots.lock().get(&id)?.jobs.lock().clone()
    }

    /// How long it took to be given sessions.
    pub(crate) fn acquires(&self) -> Histogram {
        self.acquires.lock().clone()
    }

    /// How long it took to start commands.
    pub(crate) fn starts(&self) -> Histogram {
        self.starts.lock().clone()
    }

    /// Tells that the daemon is being used.
    pub(crate) fn touch(&self) {
        *self.last_use.lock() = Instant::now();
    }

    /// Ends what is being done in a session through the daemon, and waits until its guard is given
    /// back. Nobody is let in until what is returned is dropped. What runs in the background is
    /// not touched: it may be frozen, and whoever stops the session ends it. Cancel-safe.
    ///
    /// # Errors
    /// As [`MicroVmManager::released`].
    pub(crate) async fn close(&self, id: Uuid) -> Result<Closed, Error> {
        let slot = self.slots.lock().entry(id).or_default().clone();
        slot.shared.lock().ending += 1;
        let closed = Closed(slot);
        // Those in line leave it.
        closed.0.told.notify_waiters();
        closed.0.end();
        self.pool.released(id).await?;
        Ok(closed)
    }

    /// As [`Leases::close`], of all sessions and for good. Waits for nothing.
    pub(crate) fn close_all(&self) {
        self.close_to_others();
        self.ended.cancel();
        for slot in self.slots.lock().values() {
            slot.end();
        }
    }

    /// Keeps the daemon from leaving because nothing runs.
    pub(crate) fn busy(&self) -> Busy {
        self.touch();
        Busy { _one: self.busy.clone() }
    }

    /// From now on, only who uses a session may go on to.
    pub(crate) fn close_to_others(&self) {
        self.closing.cancel();
    }

    /// Ends when nothing runs in the foreground. Cancel-safe.
    pub(crate) async fn foreground_ends(&self) {
        let mut look = tokio::time::interval(LOOK);
        loop {
            look.tick().await;
            if !self.slots.lock().values().any(|slot| slot.has_foreground()) {
                return;
            }
        }
    }

    /// Whether any command is being run, any guard is held or anything else is being done.
    pub(crate) fn any(&self) -> bool {
        Arc::strong_count(&self.busy) > 1 || self.slots.lock().values().any(|slot| slot.is_used())
    }

    pub(crate) fn used_since(&self, then: Instant) -> bool {
        *self.last_use.lock() > then
    }

    fn forget_unused(&self) {
        self.slots.lock().retain(|_, slot| {
            let told_of = || {
                slot.jobs
                    .lock()
                    .as_ref()
                    .is_some_and(|jobs| jobs.have_ended() || jobs.have_variables())
            };
            let watched = !slot.watchers.is_empty() || slot.within.is_watching();
            Arc::strong_count(slot) > 1 || slot.is_used() || watched || told_of()
        });
    }
}

impl Slot {
    /// Has the lease given back, if there is one.
    fn end(&self) {
        self.watchers.clear();
        let lease = self.shared.lock().lease();
        if let Some(lease) = lease {
            lease.ended.cancel();
        }
    }

    fn has_foreground(&self) -> bool {
        self.jobs.lock().as_ref().is_some_and(|jobs| jobs.have_foreground())
    }

    fn is_used(&self) -> bool {
        self.shared.lock().lease.strong_count() > 0
            || self.jobs.lock().as_ref().is_some_and(|jobs| !jobs.is_empty())
    }
}

/// Finds the instance for an envd request by its header.
pub(crate) struct Resolver(pub(crate) Arc<Leases>);

impl Resolver {
    /// The lease of the session that a request names.
    pub(crate) async fn lease(&self, headers: &HeaderMap) -> Result<Arc<Lease>, ConnectError> {
        let session = guard::named(headers).ok_or_else(|| {
            ConnectError::invalid_argument(format!("which session? set the header {SESSION}"))
        })?;
        let Self(leases) = self;
        let id = leases.find_or_name(session).await.map_err(|error| refused(&error))?;
        if e2b::id(session).is_some() {
            // A sandbox is made in its own way, and by no request that comes late.
            leases.pool.inspect(id).map_err(|error| refused(&error))?;
        }
        leases.take(id, None).await.map_err(|error| refused(&error))
    }
}

impl Instances for Resolver {
    async fn instance(&self, headers: &HeaderMap) -> Result<Instance, ConnectError> {
        self.lease(headers).await?.instance(headers).map_err(|error| refused(&error))
    }
}

/// A pool's refusal in the words of Connect. `failed_precondition` tells a client that it was
/// the session, not the command, that failed.
fn refused(error: &Error) -> ConnectError {
    let text = error.to_string();
    match error.kind() {
        Error::AtCapacity { .. } | Error::AcquireTimeout { .. } => ConnectError::aborted(text),
        Error::ShuttingDown => ConnectError::unavailable(text),
        _ => ConnectError::failed_precondition(text),
    }
}
