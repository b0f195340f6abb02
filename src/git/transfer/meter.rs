//! Counts what a transfer moves, and tells the agent.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
        mpsc::{RecvTimeoutError, channel},
    },
    time::Duration,
};

use gix::progress::{Count, Id, MessageLevel, NestedProgress, Step, StepShared, UNKNOWN, Unit};

use crate::{git::child::Reporter, protocol::Progress};

/// The engine's name for the counter of bytes of the pack.
pub(super) const PACK_BYTES: Id = *b"BWRB";
/// Its name for that of objects received.
pub(super) const INDEXED_OBJECTS: Id = *b"IWIO";
/// Its name for that of objects whose deltas were resolved.
pub(super) const RESOLVED_OBJECTS: Id = *b"IWRO";
/// Its name for that of bytes of the index written.
const INDEX_BYTES: Id = *b"IWBW";
/// Ours for what was read from the upstream, listings and answers included.
const RECEIVED: Id = *b"HRCV";
/// Ours for a plain sign of life.
const MOVED: Id = *b"HMVD";
/// What counts as movement of an upstream, in bytes: one that sends less within the stall limit keeps the connection
/// and nothing else, however often it sends a little. Keep-alives of git come to a few bytes a second.
const MOVEMENT: u64 = 512;

/// How often it is looked whether the number of objects to come is known.
const GLANCE: Duration = Duration::from_millis(20);

/// All counters of one transfer; clones count together.
#[derive(Clone, Default)]
pub(super) struct Meter(Arc<Mutex<Vec<Counter>>>);

#[derive(Clone)]
struct Counter {
    id: Id,
    count: StepShared,
    /// 0 while unknown.
    most: StepShared,
}

/// What tells whether anything moves. Two kinds, because one of them is the upstream's to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Signs {
    /// What the node itself does, a step at a time.
    steps: u64,
    /// What the upstream has sent.
    received: u64,
    /// The phases are few: each may count once.
    phase: &'static str,
}

/// One counter, as the engine wants it.
pub(super) struct Hand {
    meter: Meter,
    counter: Counter,
    name: String,
}

impl Meter {
    /// A new counter of no particular meaning.
    pub(super) fn hand(&self) -> Hand {
        self.add(String::new(), UNKNOWN)
    }

    /// A counter of steps that the node makes by itself: each is a sign of life.
    pub(super) fn moved(&self) -> StepShared {
        self.add(String::new(), MOVED).counter.count
    }

    /// A counter of bytes that an upstream sends: a sign of life once there are enough of them.
    pub(super) fn received(&self) -> StepShared {
        self.add(String::new(), RECEIVED).counter.count
    }

    /// The bytes of packs received so far.
    pub(super) fn pack_bytes(&self) -> u64 {
        self.sum(PACK_BYTES).0
    }

    /// How many objects of packs were received and are expected, so far.
    pub(super) fn objects(&self) -> (u64, u64) {
        self.sum(INDEXED_OBJECTS)
    }

    /// Does `work` while everything that moves is reported every `tick`. Nothing is said while nothing does, and the
    /// agent's stall limit passes. How many objects a pack has is said as soon as it is known.
    pub(super) fn reporting<T>(&self, tick: Duration, reporter: &Reporter, work: impl FnOnce() -> T) -> T {
        let (done, ended) = channel::<()>();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                reporter.progress(self.progress());
                let (mut before, mut announced, mut since) = (self.signs(), false, Duration::ZERO);
                while ended.recv_timeout(GLANCE.min(tick)) == Err(RecvTimeoutError::Timeout) {
                    let news = !announced && self.objects().1 > 0;
                    announced |= news;
                    since += GLANCE.min(tick);
                    if since < tick && !news {
                        continue;
                    }
                    since = Duration::ZERO;
                    let now = self.signs();
                    if news || now.moved_since(&before) {
                        reporter.progress(self.progress());
                        before = now;
                    }
                }
            });
            let result = work();
            drop(done);
            result
        })
    }

    fn progress(&self) -> Progress {
        let (phase, bytes) = (self.phase(), self.pack_bytes());
        let (done, most) = match phase {
            "receiving" => self.sum(INDEXED_OBJECTS),
            "resolving" => self.sum(RESOLVED_OBJECTS),
            _ => (0, 0),
        };
        let total = Some(most).filter(|&most| most > 0);
        Progress { phase: phase.to_owned(), done, total, bytes, ..Progress::default() }
    }

    fn phase(&self) -> &'static str {
        match (self.sum(RESOLVED_OBJECTS).0, self.pack_bytes(), self.sum(RECEIVED).0) {
            (0, 0, 0) => "connecting",
            (0, 0, _) => "listing",
            (0, _, _) => "receiving",
            _ => "resolving",
        }
    }

    fn signs(&self) -> Signs {
        let steps = [RESOLVED_OBJECTS, INDEX_BYTES, MOVED].map(|id| self.sum(id).0).into_iter().sum();
        // A transport may count only one of them.
        let received = self.sum(RECEIVED).0.max(self.pack_bytes());
        Signs { steps, received, phase: self.phase() }
    }

    /// How much was counted and is expected under `id`.
    fn sum(&self, id: Id) -> (u64, u64) {
        let counters = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let load = |step: &StepShared| step.load(Ordering::Relaxed) as u64;
        counters
            .iter()
            .filter(|counter| counter.id == id)
            .fold((0, 0), |(count, most), counter| (count + load(&counter.count), most + load(&counter.most)))
    }

    fn add(&self, name: String, id: Id) -> Hand {
        let counter = Counter { id, count: Arc::new(AtomicUsize::new(0)), most: Arc::new(AtomicUsize::new(0)) };
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(counter.clone());
        Hand { meter: self.clone(), counter, name }
    }
}

impl Signs {
    fn moved_since(&self, before: &Self) -> bool {
        self.steps != before.steps || self.phase != before.phase || self.received >= before.received + MOVEMENT
    }
}

impl Count for Hand {
    fn set(&self, step: Step) {
        self.counter.count.store(step, Ordering::Relaxed);
    }

    fn step(&self) -> Step {
        self.counter.count.load(Ordering::Relaxed)
    }

    fn inc_by(&self, step: Step) {
        self.counter.count.fetch_add(step, Ordering::Relaxed);
    }

    fn counter(&self) -> StepShared {
        self.counter.count.clone()
    }
}

impl gix::Progress for Hand {
    fn init(&mut self, max: Option<Step>, _: Option<Unit>) {
        self.set_max(max);
    }

    fn set_max(&mut self, max: Option<Step>) -> Option<Step> {
        Some(self.counter.most.swap(max.unwrap_or(0), Ordering::Relaxed)).filter(|&most| most > 0)
    }

    fn set_name(&mut self, name: String) {
        // What the upstream says beside the pack arrives as a name. That it said something is in the bytes received.
        self.name = name;
    }

    fn name(&self) -> Option<String> {
        Some(self.name.clone())
    }

    fn id(&self) -> Id {
        self.counter.id
    }

    fn message(&self, _: MessageLevel, _: String) {}
}

impl NestedProgress for Hand {
    type SubProgress = Self;

    fn add_child(&mut self, name: impl Into<String>) -> Self {
        self.add_child_with_id(name, UNKNOWN)
    }

    fn add_child_with_id(&mut self, name: impl Into<String>, id: Id) -> Self {
        self.meter.add(name.into(), id)
    }
}

#[cfg(test)]
mod tests {
    use gix::Progress as _;

    use super::*;

    #[test]
    fn the_phase_follows_what_was_counted() {
        let meter = Meter::default();
        let mut root = meter.hand();
        assert_eq!(meter.progress().phase, "connecting");
        let bytes = root.add_child_with_id("read pack", PACK_BYTES);
        let mut objects = root.add_child_with_id("indexing", INDEXED_OBJECTS);
        objects.init(Some(10), None);
        bytes.inc_by(100);
        objects.inc_by(4);
        let progress = meter.progress();
        assert_eq!(
            (progress.phase.as_str(), progress.done, progress.total, progress.bytes),
            ("receiving", 4, Some(10), 100)
        );
        let resolved = root.add_child_with_id("Resolving", RESOLVED_OBJECTS);
        resolved.inc_by(1);
        assert_eq!(meter.progress().phase, "resolving");
    }

    #[test]
    fn a_trickle_of_the_upstream_is_no_movement_and_a_step_of_our_own_is() {
        let meter = Meter::default();
        let mut root = meter.hand();
        let received = meter.received();
        received.fetch_add(1, Ordering::Relaxed);
        let bytes = root.add_child_with_id("read pack", PACK_BYTES);
        let objects = root.add_child_with_id("indexing", INDEXED_OBJECTS);
        bytes.inc_by(1);
        let before = meter.signs();
        for said in 0..100 {
            received.fetch_add(1, Ordering::Relaxed);
            bytes.inc_by(1);
            objects.inc_by(1);
            root.set_name(format!("remote: still there {said}"));
        }
        assert!(!meter.signs().moved_since(&before));
        received.fetch_add(500, Ordering::Relaxed);
        assert!(meter.signs().moved_since(&before));
        let before = meter.signs();
        root.add_child_with_id("writing", INDEX_BYTES).inc_by(1);
        assert!(meter.signs().moved_since(&before));
    }

    #[test]
    fn each_phase_counts_as_movement_once() {
        let meter = Meter::default();
        let received = meter.received();
        let before = meter.signs();
        received.fetch_add(1, Ordering::Relaxed);
        let after = meter.signs();
        assert!(after.moved_since(&before));
        received.fetch_add(1, Ordering::Relaxed);
        assert!(!meter.signs().moved_since(&after));
    }
}
