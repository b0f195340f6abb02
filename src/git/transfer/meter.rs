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
const PACK_BYTES: Id = *b"BWRB";
/// Its name for that of objects received.
const INDEXED_OBJECTS: Id = *b"IWIO";
/// Its name for that of objects whose deltas were resolved.
const RESOLVED_OBJECTS: Id = *b"IWRO";

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

    /// A plain counter of things that move.
    pub(super) fn moved(&self) -> StepShared {
        self.add(String::new(), UNKNOWN).counter.count
    }

    /// The bytes of packs received so far.
    pub(super) fn pack_bytes(&self) -> u64 {
        self.sum(PACK_BYTES).0
    }

    /// How many objects of packs were received and are expected, so far.
    pub(super) fn objects(&self) -> (u64, u64) {
        self.sum(INDEXED_OBJECTS)
    }

    /// Does `work` while everything that moves is reported every `tick`.
    pub(super) fn reporting<T>(&self, tick: Duration, reporter: &Reporter, work: impl FnOnce() -> T) -> T {
        let (done, ended) = channel::<()>();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                reporter.progress(self.progress());
                let mut before = self.total();
                while ended.recv_timeout(tick) == Err(RecvTimeoutError::Timeout) {
                    let now = self.total();
                    if now != before {
                        reporter.progress(self.progress());
                    }
                    before = now;
                }
            });
            let result = work();
            drop(done);
            result
        })
    }

    fn progress(&self) -> Progress {
        let bytes = self.pack_bytes();
        let (resolved, of) = self.sum(RESOLVED_OBJECTS);
        let (received, expected) = self.sum(INDEXED_OBJECTS);
        let (phase, done, most) = match (resolved, bytes) {
            (0, 0) => ("connecting", 0, 0),
            (0, _) => ("receiving", received, expected),
            _ => ("resolving", resolved, of),
        };
        Progress { phase: phase.to_owned(), done, total: Some(most).filter(|&most| most > 0), bytes }
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

    /// A number that changes whenever anything is counted.
    fn total(&self) -> usize {
        let counters = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        counters.iter().fold(counters.len(), |sum, counter| sum.wrapping_add(counter.count.load(Ordering::Relaxed)))
    }

    fn add(&self, name: String, id: Id) -> Hand {
        let counter = Counter { id, count: Arc::new(AtomicUsize::new(0)), most: Arc::new(AtomicUsize::new(0)) };
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(counter.clone());
        Hand { meter: self.clone(), counter, name }
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
        // What the upstream says beside the pack arrives as a name: it is a sign of life.
        if name != self.name {
            self.inc_by(1);
            self.name = name;
        }
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
    fn anything_counted_is_a_sign_of_life() {
        let meter = Meter::default();
        let before = meter.total();
        let moved = meter.moved();
        let between = meter.total();
        moved.fetch_add(1, Ordering::Relaxed);
        assert!(before != between && between != meter.total());
    }
}
