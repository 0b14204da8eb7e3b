//! Whole lives of a pool, at random but repeatable: a seed is a history.
//!
//! The world here is the truth that the core cannot see: disks, backups, processes, durable
//! rows, who holds what. After every step the invariants of the lifecycle are checked against
//! it. `DENIZEN_SIM_SEED=n` replays one history and prints it; `DENIZEN_SIM_HISTORIES=n` runs
//! more of them.

use std::collections::{BTreeMap, BTreeSet};

use super::*;

const STEPS: usize = 150;
const SESSIONS: u64 = 6;

/// `SplitMix64`: small, and the same on every machine.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

#[derive(Clone, Debug)]
struct Disk {
    half: bool,
    /// Somebody has had it, or the session it is of.
    granted: bool,
    version: u64,
    bootstraps: u32,
}

#[derive(Clone, Debug)]
struct Flying {
    id: Uuid,
    seq: Seq,
    op: Op,
    /// Its row could not be written: it may only fail, and must not touch the disk.
    refused: bool,
    hangs: bool,
    interrupted: bool,
}

struct World {
    random: Random,
    core: Lifecycle,
    policy: Policy,
    fault: Option<Fault>,
    now: PoolTime,
    rows: BTreeMap<Uuid, Row>,
    disks: BTreeMap<Uuid, Disk>,
    backups: BTreeMap<(Uuid, String), u64>,
    /// Copies of sessions, which are their snapshots here.
    copies: BTreeMap<(Uuid, String), u64>,
    /// Sessions with processes that were left running, be they frozen.
    busy: BTreeSet<Uuid>,
    /// Whether these count as use.
    busy_counts: bool,
    /// Sessions with an instance that can do something.
    awake: BTreeSet<Uuid>,
    /// Sessions with an instance that stands still.
    frozen: BTreeSet<Uuid>,
    /// Sessions with an instance of which that is not known.
    broken: BTreeSet<Uuid>,
    flying: Vec<Flying>,
    holders: BTreeMap<Uuid, WaiterId>,
    /// Those of the holders who only read.
    readers: BTreeSet<Uuid>,
    lines: BTreeMap<Uuid, Vec<(WaiterId, Want)>>,
    /// What the next holder of a session must see; none if that is anybody's guess.
    expected: BTreeMap<Uuid, Option<u64>>,
    last_release: BTreeMap<Uuid, PoolTime>,
    stopped: BTreeMap<Uuid, PoolTime>,
    /// Sessions that were paused, and that nobody has taken since.
    paused: BTreeSet<Uuid>,
    /// Sessions that somebody wanted so at some time.
    to_pause: BTreeSet<Uuid>,
    /// Sessions whose removal somebody asked for.
    removals: BTreeSet<Uuid>,
    /// Instances that are no session's yet.
    spares: usize,
    /// Those that are being made.
    preparing: usize,
    next_version: u64,
    next_waiter: WaiterId,
    next_backup: u64,
    /// Above this many sessions none may be added: `max_vms`, or what a restart found.
    limit: usize,
    /// Nothing crashes and few ask, so that sessions are left alone for all that time does.
    calm: bool,
    trace: Vec<String>,
}

type Check = Result<(), String>;

macro_rules! ensure {
    ($condition:expr, $($message:tt)*) => {
        if !$condition {
            return Err(format!($($message)*));
        }
    };
}

fn session(n: u64) -> Uuid {
    Uuid::from_u128(u128::from(n) + 1)
}

impl World {
    fn new(seed: u64, fault: Option<Fault>) -> Self {
        let mut random = Random(seed);
        let sleep = if random.chance(50) { Sleep::Freeze } else { Sleep::Stop };
        let policy = Policy {
            max_vms: 1 + usize::try_from(random.below(4)).unwrap_or(0),
            idle_shutdown: Duration::from_secs(60),
            sleep,
            can_freeze: sleep == Sleep::Freeze || random.chance(50),
            prune_after: Duration::from_secs(300),
            backup_after: random.chance(70).then(|| Duration::from_secs(100)),
            has_destination: random.chance(75),
            spares: usize::try_from(random.below(3)).unwrap_or(0),
        };
        let mut world = Self {
            core: Lifecycle::new(policy.clone()),
            limit: policy.max_vms,
            busy_counts: random.chance(70),
            calm: random.chance(30),
            random,
            policy,
            fault,
            now: PoolTime(1_000_000),
            rows: BTreeMap::new(),
            disks: BTreeMap::new(),
            backups: BTreeMap::new(),
            copies: BTreeMap::new(),
            busy: BTreeSet::new(),
            awake: BTreeSet::new(),
            frozen: BTreeSet::new(),
            broken: BTreeSet::new(),
            flying: Vec::new(),
            holders: BTreeMap::new(),
            readers: BTreeSet::new(),
            lines: BTreeMap::new(),
            expected: BTreeMap::new(),
            last_release: BTreeMap::new(),
            stopped: BTreeMap::new(),
            paused: BTreeSet::new(),
            to_pause: BTreeSet::new(),
            removals: BTreeSet::new(),
            spares: 0,
            preparing: 0,
            next_version: 1,
            next_waiter: 1,
            next_backup: 1,
            trace: Vec::new(),
        };
        world.core.fault = fault;
        world
    }

    fn saved(&self, id: Uuid, version: u64) -> bool {
        self.backups.iter().any(|((owner, _), saved)| *owner == id && *saved == version)
    }

    fn note(&mut self, what: String) {
        self.trace.push(what);
    }

    fn wants_slot(&self) -> bool {
        self.core.evicting > 0 || !self.core.slot_line.is_empty()
    }

    // ---- Carrying out effects -----------------------------------------------------------

    fn carry_out(&mut self, effects: Vec<Effect>, pressed: bool) -> Check {
        for effect in effects {
            self.note(format!("      {effect:?}"));
            match effect {
                Effect::Run { id, seq, op, row } => self.begin(id, seq, op, row, pressed)?,
                Effect::Interrupt { id, seq } => {
                    for flying in &mut self.flying {
                        flying.interrupted |= flying.id == id && flying.seq == seq;
                    }
                }
                Effect::Prepare => self.preparing += 1,
                Effect::Discard => {
                    ensure!(self.spares > 0, "a spare is ended that is not there");
                    self.spares -= 1;
                }
                // What nothing waits for may be lost.
                Effect::Save(row) => {
                    if self.random.chance(90) {
                        self.rows.insert(row.id, row);
                    }
                }
                Effect::Forget(id) => {
                    if self.random.chance(90) {
                        self.rows.remove(&id);
                    }
                }
                Effect::Grant { id, waiter } => self.granted(id, waiter)?,
                Effect::Fulfil { id, waiter } => {
                    let mut line = self.lines.get(&id).into_iter().flatten();
                    let paused = line.any(|asked| *asked == (waiter, Want::Paused));
                    ensure!(!paused || !self.awake.contains(&id), "{id} is not paused");
                    self.answered(id, waiter)?;
                }
                Effect::Refuse { id, waiter, why } => {
                    self.answered(id, waiter)?;
                    if why == Refusal::AtCapacity {
                        ensure!(
                            self.core.resident() + self.preparing >= self.policy.max_vms,
                            "turned away from a pool that is not full"
                        );
                    }
                }
                Effect::Notify { .. } => {}
            }
        }
        Ok(())
    }

    fn begin(&mut self, id: Uuid, seq: Seq, op: Op, row: Option<Row>, pressed: bool) -> Check {
        ensure!(
            !self.flying.iter().any(|flying| flying.id == id),
            "two operations at once for {id}"
        );
        let copied = matches!(op, Op::Copy(_)) && self.policy.can_freeze;
        ensure!(copied || !self.holders.contains_key(&id), "{op:?} of {id} while it is held");
        let asked = self.lines.get(&id).is_some_and(|line| !line.is_empty());
        let broken = self.broken.contains(&id);
        let ends_it = op == (Op::Stop { force: true });
        ensure!(!broken || ends_it, "{op:?} of {id}, whose instance is broken");
        if asked && op == (Op::Freeze { force: true }) {
            self.to_pause.insert(id);
        }
        if !pressed && !asked && !broken {
            let due = match &op {
                // At any time, if its volume is gone.
                Op::Stop { .. } if self.frozen.contains(&id) => {
                    let at = self.disks.get(&id).and_then(|_| self.stopped.get(&id));
                    at.map(|at| at.after(self.policy.prune_after))
                }
                Op::Freeze { force: true } => {
                    ensure!(self.to_pause.contains(&id), "{id} is paused though nobody asked");
                    None
                }
                Op::Stop { .. } | Op::Freeze { .. } => {
                    self.last_release.get(&id).map(|at| at.after(self.policy.idle_shutdown))
                }
                Op::Backup => {
                    let wait = self.policy.backup_after.unwrap_or(self.policy.prune_after);
                    let wait = wait.min(self.policy.prune_after);
                    self.stopped.get(&id).map(|at| at.after(wait))
                }
                Op::Prune if self.core.view(id).is_some_and(|view| view.row.backup.is_some()) => {
                    self.stopped.get(&id).map(|at| at.after(self.policy.prune_after))
                }
                _ => None,
            };
            let early = due.is_some_and(|due| due > self.now);
            ensure!(!early, "{op:?} of {id} at {:?}, due at {due:?}", self.now);
        }
        if op == Op::Remove {
            let half = self.disks.get(&id).is_none_or(|disk| disk.half || !disk.granted);
            let line = self.lines.get(&id).into_iter().flatten();
            let asked = line.map(|(_, want)| want).any(|want| *want == Want::Removed);
            let asked = asked || self.removals.contains(&id);
            ensure!(asked || half, "{id} removed though nobody asked");
            self.removals.insert(id);
        }
        if ends_it && self.busy.contains(&id) && self.awake.contains(&id) && !broken {
            let forced = self.lines.get(&id).into_iter().flatten();
            let forced = forced
                .map(|(_, want)| want)
                .any(|want| matches!(want, Want::Stopped { force: true } | Want::Removed));
            ensure!(forced, "processes of {id} ended though nobody forced it");
        }
        if op == (Op::Create { spare: true }) {
            ensure!(self.spares > 0, "{id} is made of a spare that is not there");
            self.spares -= 1;
        }
        let refused = row.is_some() && self.random.chance(4);
        if let (Some(row), false) = (row, refused) {
            self.rows.insert(id, row);
        }
        let hangs = self.random.chance(3);
        self.flying.push(Flying { id, seq, op, refused, hangs, interrupted: false });
        Ok(())
    }

    fn granted(&mut self, id: Uuid, waiter: WaiterId) -> Check {
        ensure!(!self.holders.contains_key(&id), "two holders of {id}");
        ensure!(!self.flying.iter().any(|flying| flying.id == id), "{id} granted mid-operation");
        let line = self.lines.get(&id).cloned().unwrap_or_default();
        let want = line.iter().find(|(waiting, _)| *waiting == waiter).map(|(_, want)| want);
        let alike = |other: &Want| {
            matches!(
                (want, other),
                (Some(Want::Still), Want::Still) | (Some(Want::Guard { .. }), Want::Guard { .. })
            )
        };
        let first = line.iter().find(|(_, want)| alike(want));
        ensure!(first.map(|(first, _)| *first) == Some(waiter), "{id}: not served in order");
        self.answered(id, waiter)?;
        let reads = want == Some(&Want::Still);
        if !reads {
            self.paused.remove(&id);
        }
        if reads {
            ensure!(!self.awake.contains(&id), "{id} is not still");
            self.holders.insert(id, waiter);
            self.readers.insert(id);
            return Ok(());
        }
        ensure!(self.awake.contains(&id), "{id} granted though nothing can run in it");
        let Some(disk) = self.disks.get_mut(&id) else {
            // Taken away by hand; nobody can know.
            ensure!(self.expected.get(&id) == Some(&None), "{id} granted without a volume");
            self.holders.insert(id, waiter);
            return Ok(());
        };
        disk.granted = true;
        ensure!(!disk.half, "{id} granted half-made");
        ensure!(self.awake.contains(&id), "{id} granted with nothing to run it");
        ensure!(disk.bootstraps == 1, "{id} bootstrapped {} times", disk.bootstraps);
        if let Some(Some(expected)) = self.expected.get(&id) {
            ensure!(disk.version == *expected, "{id} has {}, not {expected}", disk.version);
        }
        self.holders.insert(id, waiter);
        Ok(())
    }

    fn answered(&mut self, id: Uuid, waiter: WaiterId) -> Check {
        let line = self.lines.entry(id).or_default();
        let before = line.len();
        line.retain(|(waiting, _)| *waiting != waiter);
        ensure!(line.len() < before, "{waiter} answered though not in line of {id}");
        Ok(())
    }

    /// Deletes or replaces what is on disk, if that loses nothing.
    fn give_up(&mut self, id: Uuid, why: &Op) -> Check {
        if let Some(disk) = self.disks.remove(&id) {
            let known = matches!(self.expected.get(&id), Some(Some(_)));
            ensure!(
                !self.policy.has_destination || !known || self.saved(id, disk.version),
                "{why:?} of {id} deletes version {} that no backup has",
                disk.version
            );
        }
        Ok(())
    }

    /// Processes that were left running write something, if they can.
    fn write_on(&mut self, id: Uuid) {
        let version = self.fresh();
        if self.busy.contains(&id)
            && self.awake.contains(&id)
            && let Some(disk) = self.disks.get_mut(&id)
        {
            disk.version = version;
            self.expected.insert(id, Some(version));
        }
    }

    fn end_instance(&mut self, id: Uuid) {
        for all in
            [&mut self.busy, &mut self.awake, &mut self.frozen, &mut self.broken, &mut self.paused]
        {
            all.remove(&id);
        }
    }

    /// What an operation on an instance does if it leaves it in a state nobody knows.
    fn break_instance(&mut self, id: Uuid) {
        if self.random.chance(50) && self.frozen.remove(&id) {
            self.awake.insert(id);
            self.write_on(id);
        }
        self.broken.insert(id);
        self.stopped.insert(id, self.now);
    }

    /// What an operation does to the world, if it does it.
    fn effect_of(&mut self, id: Uuid, op: &Op) -> Result<Outcome, String> {
        let still_there = self.awake.contains(&id) || self.frozen.contains(&id);
        if matches!(op, Op::Create { .. } | Op::Start | Op::Prune | Op::Restore(_)) {
            ensure!(!still_there, "{op:?} of {id} while it has an instance");
        }
        match op {
            Op::Create { .. } => {
                let version = self.fresh();
                self.disks.insert(id, Disk { half: false, granted: false, version, bootstraps: 1 });
                self.expected.insert(id, Some(version));
                self.awake.insert(id);
            }
            Op::Start => {
                if !self.disks.contains_key(&id) {
                    return Ok(Outcome::Missing);
                }
                self.awake.insert(id);
            }
            Op::Stop { force } => {
                let was_frozen = self.frozen.remove(&id);
                let slept = was_frozen || self.broken.contains(&id);
                self.awake.insert(id);
                self.write_on(id);
                let runs = self.busy.contains(&id);
                if !force && self.busy_counts && runs {
                    return Ok(Outcome::Busy);
                }
                self.end_instance(id);
                if !slept {
                    self.stopped.insert(id, self.now);
                }
                if was_frozen && !runs {
                    return Ok(Outcome::Quiet);
                }
            }
            Op::Freeze { force } => {
                if !force && self.busy_counts && self.busy.contains(&id) {
                    return Ok(Outcome::Busy);
                }
                ensure!(self.awake.remove(&id), "{id} frozen though nothing runs in it");
                self.frozen.insert(id);
                if *force {
                    self.paused.insert(id);
                }
                self.stopped.insert(id, self.now);
            }
            Op::Thaw => {
                ensure!(self.frozen.remove(&id), "{id} thawed though it is not frozen");
                // Whoever wanted it may be gone by now.
                self.paused.remove(&id);
                self.awake.insert(id);
                self.write_on(id);
            }
            Op::Backup => {
                ensure!(!self.awake.contains(&id), "{id} backed up while it runs");
                let Some(disk) = self.disks.get(&id) else { return Ok(Outcome::Missing) };
                let name = format!("backup-{}", self.next_backup);
                self.next_backup += 1;
                self.backups.insert((id, name.clone()), disk.version);
                return Ok(Outcome::BackedUp(name));
            }
            Op::Prune => {
                self.give_up(id, op)?;
                if !self.policy.has_destination {
                    self.expected.remove(&id);
                }
            }
            Op::Restore(saved) => {
                let Some(mut version) = self.version_of(id, saved) else {
                    return Ok(Outcome::Failed);
                };
                if let Saved::Part { .. } = saved {
                    if !self.disks.contains_key(&id) {
                        let taken = self.expected.get(&id) == Some(&None);
                        ensure!(taken, "a part is put into {id}, of which nothing is there");
                        return Ok(Outcome::Missing);
                    }
                    // Which nobody has had before.
                    version = self.fresh();
                }
                self.give_up(id, op)?;
                self.disks.insert(id, Disk { half: false, granted: true, version, bootstraps: 1 });
                self.expected.insert(id, Some(version));
                self.stopped.insert(id, self.now);
            }
            Op::Copy(copy) => {
                let runs = self.awake.contains(&id);
                if runs && !self.policy.can_freeze && self.busy.contains(&id) {
                    return Ok(Outcome::Busy);
                }
                let Some(disk) = self.disks.get(&id) else {
                    return Ok(if still_there { Outcome::Failed } else { Outcome::Missing });
                };
                ensure!(!disk.half, "{id} is copied half-made");
                self.copies.insert((id, copy.to_string()), disk.version);
            }
            Op::Remove => {
                self.copies.retain(|(of, _), _| *of != id);
                self.disks.remove(&id);
                self.end_instance(id);
                self.expected.remove(&id);
                self.removals.remove(&id);
            }
        }
        Ok(Outcome::Done)
    }

    fn version_of(&self, id: Uuid, saved: &Saved) -> Option<u64> {
        match saved {
            Saved::Backup(name) => self.backups.get(&(id, name.clone())).copied(),
            Saved::Snapshot(name) => self.copies.get(&(id, name.clone())).copied(),
            Saved::Part { of, .. } => self.version_of(id, of),
        }
    }

    fn fresh(&mut self) -> u64 {
        self.next_version += 1;
        self.next_version
    }

    // ---- Steps --------------------------------------------------------------------------

    fn call(&mut self, call: impl FnOnce(&mut Lifecycle, PoolTime, &mut Vec<Effect>)) -> Check {
        let mut effects = Vec::new();
        let pressed = self.wants_slot();
        call(&mut self.core, self.now, &mut effects);
        let pressed = pressed || self.wants_slot();
        self.carry_out(effects, pressed)?;
        self.consistent()
    }

    fn step(&mut self) -> Check {
        let id = session(self.random.below(SESSIONS));
        match self.random.below(100) {
            5..=24 | 97.. if self.calm => self.finish(false),
            0..=24 => {
                let patient = self.random.chance(60);
                self.ask(id, Want::Guard { patient })
            }
            25..=29 => {
                let want = match self.random.below(13) {
                    0 => Want::Stopped { force: false },
                    1 => Want::Stopped { force: true },
                    2 => Want::BackedUp,
                    3 => {
                        let backups = self.backups.keys().filter(|(of, _)| *of == id);
                        let name = backups.last().map(|(_, name)| name.clone());
                        Want::Restored(Saved::Backup(name.unwrap_or_default()))
                    }
                    4 => {
                        let copies = self.copies.keys().filter(|(of, _)| *of == id);
                        let name = copies.last().map(|(_, name)| name.clone());
                        Want::Restored(Saved::Snapshot(name.unwrap_or_default()))
                    }
                    5..=6 => {
                        let copy = Uuid::from_u128(u128::from(self.fresh()));
                        Want::Copied { copy, patient: self.random.chance(60) }
                    }
                    7 => Want::Still,
                    8..=9 => {
                        let backups = self.backups.keys().filter(|(of, _)| *of == id);
                        let backup = backups.last().map(|(_, name)| Saved::Backup(name.clone()));
                        let copies = self.copies.keys().filter(|(of, _)| *of == id);
                        let copy = copies.last().map(|(_, name)| Saved::Snapshot(name.clone()));
                        let of =
                            if self.random.chance(50) { backup.or(copy) } else { copy.or(backup) };
                        let part = |of| Saved::Part { of: Box::new(of), paths: Vec::new() };
                        let none = Saved::Snapshot(String::new());
                        Want::Restored(part(of.unwrap_or(none)))
                    }
                    10..=11 => Want::Paused,
                    _ => Want::Removed,
                };
                self.ask(id, want)
            }
            30..=36 => self.cancel(id),
            37..=52 => self.release(id),
            53..=56 => self.prepare(80),
            57..=77 => self.finish(false),
            78..=92 => self.pass_time(),
            93..=94 => {
                // By hand, while nobody looks.
                if !self.holders.contains_key(&id) && self.disks.remove(&id).is_some() {
                    self.note(format!("vanish {id}"));
                    self.expected.insert(id, None);
                }
                Ok(())
            }
            95..=96 => {
                self.busy.remove(&id);
                Ok(())
            }
            _ => self.crash(),
        }
    }

    fn ask(&mut self, id: Uuid, want: Want) -> Check {
        let waiter = self.next_waiter;
        self.next_waiter += 1;
        self.note(format!("ask {id} {waiter} {want:?}"));
        if want == (Want::Guard { patient: false }) && self.core.acquire_warm(id) {
            self.lines.entry(id).or_default().insert(0, (waiter, want));
            return self.granted(id, waiter);
        }
        if want == Want::Removed && !self.holders.contains_key(&id) {
            self.removals.insert(id);
        }
        self.lines.entry(id).or_default().push((waiter, want.clone()));
        self.call(|core, now, out| core.acquire(now, id, waiter, want, out))
    }

    fn cancel(&mut self, id: Uuid) -> Check {
        let line = self.lines.entry(id).or_default();
        if line.is_empty() {
            return Ok(());
        }
        let at = usize::try_from(self.random.below(line.len() as u64)).unwrap_or(0);
        let (waiter, _) = line.remove(at);
        self.note(format!("cancel {id} {waiter}"));
        self.call(|core, now, out| core.cancel(now, id, waiter, out))
    }

    fn release(&mut self, id: Uuid) -> Check {
        if self.holders.remove(&id).is_none() {
            return Ok(());
        }
        self.note(format!("release {id}"));
        if self.readers.remove(&id) {
            return self.call(|core, now, out| core.release(now, id, out));
        }
        let version = self.fresh();
        if let Some(disk) = self.disks.get_mut(&id) {
            disk.version = version;
            self.expected.insert(id, Some(version));
        }
        if self.random.chance(20) {
            self.busy.insert(id);
        }
        self.last_release.insert(id, self.now);
        self.call(|core, now, out| core.release(now, id, out))
    }

    /// Ends one operation that is in flight.
    fn finish(&mut self, well: bool) -> Check {
        let ready: Vec<usize> =
            (0..self.flying.len()).filter(|at| well || !self.flying[*at].hangs).collect();
        if ready.is_empty() {
            return Ok(());
        }
        let at = usize::try_from(self.random.below(ready.len() as u64)).unwrap_or(0);
        let Flying { id, seq, op, refused, interrupted, .. } = self.flying.remove(ready[at]);
        let fails = refused || (!well && self.random.chance(if interrupted { 60 } else { 12 }));
        let breaks = match op {
            Op::Freeze { .. } | Op::Thaw => true,
            Op::Copy(_) => self.awake.contains(&id) && self.policy.can_freeze,
            Op::Stop { .. } => self.frozen.contains(&id) || self.broken.contains(&id),
            _ => false,
        };
        let outcome = match fails {
            true if breaks && !refused && self.random.chance(70) => {
                self.break_instance(id);
                Outcome::Broken
            }
            true => Outcome::Failed,
            false => self.effect_of(id, &op)?,
        };
        if outcome == Outcome::Busy {
            // What runs counts as use until now.
            self.last_release.insert(id, self.now);
        }
        self.note(format!("finish {id} {op:?}: {outcome:?}"));
        self.call(|core, now, out| core.finished(now, id, seq, outcome, out))
    }

    /// Ends the making of a spare.
    fn prepare(&mut self, percent: u64) -> Check {
        if self.random.chance(10) {
            self.note("renew spares".to_owned());
            self.call(super::Lifecycle::renew_spares)?;
        }
        if self.preparing == 0 {
            return Ok(());
        }
        self.preparing -= 1;
        let made = self.random.chance(percent);
        self.spares += usize::from(made);
        self.note(format!("prepared: {made}"));
        self.call(|core, now, out| core.prepared(now, made, out))
    }

    fn pass_time(&mut self) -> Check {
        let wait = match self.random.below(10) {
            0..=2 => self.random.below(1000),
            3..=5 => self.random.below(120_000),
            // So that what sleeps is often left alone for long enough to be saved.
            6..=7 => 60_000 + self.random.below(120_000),
            8 => self.random.below(3_600_000),
            _ => 365 * 24 * 3_600_000,
        };
        self.now = PoolTime(self.now.0 + wait);
        let eager = self.random.chance(20);
        self.note(format!("{wait} ms pass, eager: {eager}"));
        // A clock that goes back is not believed.
        let told = if self.random.chance(10) { PoolTime(self.now.0 / 2) } else { self.now };
        self.call(|core, _, out| {
            if eager {
                core.tick_eagerly(told, out);
            } else {
                core.tick(told, out);
            }
        })?;
        if told == self.now && self.fault.is_none() {
            let due = self.core.next_due();
            ensure!(due.is_none_or(|due| due > self.now), "left undone: due at {due:?}");
        }
        Ok(())
    }

    /// Ends the process at any instant, also within an operation, and starts it again.
    fn crash(&mut self) -> Check {
        self.note("crash".to_owned());
        for flying in std::mem::take(&mut self.flying) {
            let Flying { id, op, refused, .. } = flying;
            if refused {
                continue;
            }
            match self.random.below(3) {
                0 => {}
                1 if matches!(op, Op::Create { .. }) => {
                    let version = self.fresh();
                    self.disks
                        .insert(id, Disk { half: true, granted: false, version, bootstraps: 0 });
                }
                1 => {}
                _ => {
                    self.effect_of(id, &op)?;
                }
            }
        }
        let readers = std::mem::take(&mut self.readers);
        for id in std::mem::take(&mut self.holders).into_keys() {
            if readers.contains(&id) {
                continue;
            }
            let version = self.fresh();
            if let Some(disk) = self.disks.get_mut(&id) {
                disk.version = version;
                self.expected.insert(id, Some(version));
            }
        }
        // What was frozen is thawed before it is ended, or found.
        let mut kept = BTreeSet::new();
        for id in std::mem::take(&mut self.frozen) {
            self.awake.insert(id);
            self.write_on(id);
            let paused =
                self.rows.get(&id).is_some_and(|row| row.paused && row.phase == Phase::Frozen);
            let whole = self.disks.get(&id).is_some_and(|disk| !disk.half);
            if paused && whole && !self.broken.contains(&id) && self.random.chance(70) {
                kept.insert(id);
            } else {
                self.end_instance(id);
            }
        }
        self.broken.clear();
        self.paused.retain(|id| kept.contains(id));
        self.lines.clear();
        (self.spares, self.preparing) = (0, 0);
        if self.random.chance(20) {
            self.policy.max_vms = 1 + usize::try_from(self.random.below(4)).unwrap_or(0);
        }
        if self.random.chance(5) {
            // A registry that was put aside: all volumes are orphans.
            let archived: Vec<Uuid> = self.rows.keys().copied().collect();
            for id in archived {
                if !self.disks.contains_key(&id) {
                    self.expected.insert(id, None);
                }
            }
            self.rows.clear();
        }
        self.now = PoolTime(self.now.0 + self.random.below(200_000));
        self.outlive(&kept);
        let awake = &self.awake;
        self.paused.retain(|id| awake.contains(id));
        let found = |disk: Option<&Disk>| match disk {
            None => Found::Nothing,
            Some(disk) if disk.half => Found::Half,
            Some(_) => Found::Whole,
        };
        let rows = self.rows.values().map(|row| {
            let found = match self.awake.contains(&row.id) {
                true => Found::Running,
                false => found(self.disks.get(&row.id)),
            };
            (row.clone(), found)
        });
        let rows: Vec<_> = rows.collect();
        let orphans: Vec<_> = self
            .disks
            .iter()
            .filter(|(id, _)| !self.rows.contains_key(id))
            .map(|(id, disk)| (*id, found(Some(disk))))
            .collect();
        for id in self.disks.keys() {
            match self.rows.get(id) {
                _ if self.awake.contains(id) => self.stopped.remove(id),
                // Begun before the crash, perhaps to make room; goes on whenever.
                Some(row) if row.phase == Phase::Pruning => self.stopped.remove(id),
                Some(row) if row.phase == Phase::Stopped => {
                    self.stopped.insert(*id, row.stopped_at)
                }
                _ => self.stopped.insert(*id, self.now),
            };
        }
        self.core = Lifecycle::new(self.policy.clone());
        self.core.fault = self.fault;
        self.limit = usize::MAX;
        self.call(|core, now, out| core.recover(now, rows, &orphans, out))?;
        for (id, disk) in &self.disks {
            let known = self.core.view(*id).is_some();
            ensure!(known || disk.half, "{id} is on disk but not known after a restart");
        }
        for view in self.core.views().filter(|view| view.row.phase == Phase::Missing) {
            let id = view.row.id;
            ensure!(self.expected.get(&id) == Some(&None), "{id} is missing, nobody took it");
        }
        Ok(())
    }

    /// Some instances go on without a pool, and what is busy in them; the others have ended when
    /// the next one looks.
    fn outlive(&mut self, paused: &BTreeSet<Uuid>) {
        for id in std::mem::take(&mut self.awake) {
            if paused.contains(&id) && self.rows.contains_key(&id) {
                self.note(format!("{id} is found paused"));
                self.awake.insert(id);
                continue;
            }
            let active = self.rows.get(&id).is_some_and(|row| row.phase == Phase::Active);
            let whole = self.disks.get(&id).is_some_and(|disk| !disk.half);
            if !(active && whole && self.random.chance(50)) {
                self.busy.remove(&id);
                continue;
            }
            self.note(format!("{id} runs on"));
            self.awake.insert(id);
            self.last_release.insert(id, self.now);
            let version = self.fresh();
            if let Some(disk) = self.disks.get_mut(&id).filter(|_| self.busy.contains(&id)) {
                disk.version = version;
                self.expected.insert(id, Some(version));
            }
        }
    }

    /// Lets everything come to rest, and sees that nobody was forgotten.
    fn settle(&mut self) -> Check {
        self.note("settle".to_owned());
        let mut quiet = 0;
        while quiet < 10 {
            ensure!(self.trace.len() < 20_000, "never comes to rest");
            for flying in &mut self.flying {
                flying.hangs = false;
            }
            while !self.flying.is_empty() || self.preparing > 0 {
                self.finish(true)?;
                self.prepare(100)?;
            }
            self.busy.clear();
            let held: Vec<Uuid> = self.holders.keys().copied().collect();
            for id in held {
                self.release(id)?;
            }
            self.busy.clear();
            let still = self.lines.values().all(Vec::is_empty) && self.flying.is_empty();
            quiet = if still { quiet + 1 } else { 0 };
            self.now = PoolTime(self.now.0 + 400_000);
            self.note("400 s pass".to_owned());
            self.call(super::Lifecycle::tick)?;
        }
        let all = [&self.awake, &self.frozen, &self.broken];
        ensure!(all.iter().all(|all| all.is_empty()), "instances are left: {all:?}");
        let waiting: Vec<_> = self.lines.iter().filter(|(_, line)| !line.is_empty()).collect();
        ensure!(waiting.is_empty(), "nobody answers {waiting:?}");
        for (id, disk) in &self.disks {
            ensure!(!disk.half, "{id} stays half-made");
            ensure!(!self.policy.has_destination, "{id} is never archived");
        }
        ensure!(
            self.spares == self.policy.spares.min(self.policy.max_vms - self.core.resident())
                || self.core.cannot_prepare,
            "{} spares are there",
            self.spares
        );
        if self.policy.has_destination {
            for (id, expected) in &self.expected {
                let Some(version) = expected else { continue };
                ensure!(self.saved(*id, *version), "{id}: version {version} is lost");
            }
        }
        Ok(())
    }

    // ---- What must hold after every step ------------------------------------------------

    fn consistent(&mut self) -> Check {
        let core = &self.core;
        let resident =
            core.sessions.values().filter(|session| session.row.phase.is_resident()).count();
        ensure!(core.resident == resident, "{} counted, {resident} resident", core.resident);
        if self.limit == usize::MAX {
            self.limit = resident;
        }
        self.limit = self.limit.min(resident).max(self.policy.max_vms);
        let spares = self.spares + self.preparing;
        let taken = resident + spares;
        ensure!(taken <= self.limit, "{resident} and {spares} are there, {} allowed", self.limit);
        ensure!(
            core.slot_line.is_empty() || resident + self.preparing >= self.policy.max_vms,
            "a place is free, and somebody waits for one"
        );
        let evicting = core.sessions.values().filter(|session| session.evicting).count();
        ensure!(core.evicting == evicting, "{} counted, {evicting} evicting", core.evicting);
        ensure!(
            core.running == self.flying.len(),
            "{} running, not {}",
            core.running,
            self.flying.len()
        );
        for id in self.awake.iter().chain(&self.frozen) {
            let session = core.sessions.get(id);
            let known = session.is_some_and(|session| {
                session.running.is_some()
                    || matches!(session.row.phase, Phase::Active | Phase::Frozen)
            });
            ensure!(known, "the instance of {id} is forgotten");
        }
        for id in &self.paused {
            let awake = self.awake.contains(id) && !self.broken.contains(id);
            let sleeps = core.sessions.get(id).is_none_or(|session| {
                session.running.is_some() || session.failures > 0 || session.evicting
            });
            ensure!(!awake || sleeps, "{id} was paused, and goes on by itself");
        }
        for (id, session) in &core.sessions {
            if session.running.is_none() && session.row.phase == Phase::Frozen {
                let frozen = self.frozen.contains(id) || self.broken.contains(id);
                ensure!(frozen, "{id} counts as frozen, and is not");
            }
            ensure!(session.held == self.holders.contains_key(id), "{id}: who holds it?");
            if let Some(due) = session.due {
                ensure!(core.due.contains(&(due, *id)), "{id} not in the queue");
            }
            ensure!(
                session.wants_slot == core.slot_line.contains(id),
                "{id}: does it want a place?"
            );
            let idle = session.running.is_none() && !session.held && session.waiters.is_empty();
            let settled = matches!(session.row.phase, Phase::Archived | Phase::Missing);
            ensure!(!idle || settled || session.due.is_some(), "{id} has been forgotten");
            ensure!(
                session.waiters.len() == self.lines.get(id).map_or(0, Vec::len),
                "{id}: who is in line?"
            );
        }
        ensure!(
            core.due.len()
                == core.sessions.values().filter(|session| session.due.is_some()).count(),
            "the queue holds what no session knows of"
        );
        Ok(())
    }
}

/// Lives one history; gives what was done, and what was wrong with it.
fn live(seed: u64, fault: Option<Fault>) -> (Vec<String>, Check) {
    let mut world = World::new(seed, fault);
    let mut result = world.call(|core, now, out| core.recover(now, Vec::new(), &[], out));
    for _ in 0..STEPS {
        if result.is_err() {
            break;
        }
        result = world.step();
    }
    let result = result.and_then(|()| world.settle());
    (world.trace, result)
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn histories_keep_the_invariants() {
    if let Some(seed) = number("DENIZEN_SIM_SEED") {
        let (trace, result) = live(seed, None);
        println!("{}", trace.join("\n"));
        assert_eq!(result, Ok(()), "seed {seed}");
        return;
    }
    for seed in 0..number("DENIZEN_SIM_HISTORIES").unwrap_or(20_000) {
        let (_, result) = live(seed, None);
        assert_eq!(
            result,
            Ok(()),
            "seed {seed}; replay it with DENIZEN_SIM_SEED={seed} cargo test -p denizen --lib \
             histories -- --nocapture"
        );
    }
}

#[test]
fn a_seed_is_a_history() {
    for seed in 0..50 {
        assert_eq!(live(seed, None), live(seed, None));
    }
}

#[test]
fn every_planted_fault_is_caught() {
    const ALL: [Fault; 34] = [
        Fault::CapacityOffByOne,
        Fault::SavedForEver,
        Fault::PruneWhileHeld,
        Fault::FailedBackupCounts,
        Fault::EvictUnsaved,
        Fault::TwoHolders,
        Fault::LineReversed,
        Fault::CancelForgotten,
        Fault::CrashCountsAsSaved,
        Fault::HalfMadeKept,
        Fault::PruneNotDurable,
        Fault::IdleFromFirstUse,
        Fault::TwoOperations,
        Fault::BusyIgnored,
        Fault::SlotWakesNobody,
        Fault::ArchivedStartsEmpty,
        Fault::SparesNotCounted,
        Fault::SpareGivenTwice,
        Fault::SpareKeepsPlace,
        Fault::FrozenGranted,
        Fault::StillGrantedRunning,
        Fault::FrozenWhileHeld,
        Fault::FrozenPruned,
        Fault::LastWordsCountAsSaved,
        Fault::BrokenGranted,
        Fault::VanishedLeftFrozen,
        Fault::RunningCountsAsStopped,
        Fault::CopiedWhileWritten,
        Fault::SnapshotCountsAsSaved,
        Fault::PartCountsAsSaved,
        Fault::PartIsAllThereIs,
        Fault::HalfRestoredCountsAsSaved,
        Fault::PausedRunning,
        Fault::PausedWakesUnasked,
    ];
    for fault in ALL {
        let caught = (0..20_000).find_map(|seed| {
            let (_, result) = live(seed, Some(fault));
            // By the fault, not by the history itself.
            result.err().filter(|_| live(seed, None).1.is_ok()).map(|why| (seed, why))
        });
        let (seed, why) = caught.unwrap_or_else(|| panic!("{fault:?} is not noticed"));
        println!("{fault:?}: seed {seed}: {why}");
    }
}
