//! Clones that wait for a retry: later tasks of their projects wait for them.

use std::collections::HashMap;

use jiff::{SignedDuration, Timestamp};
use tokio::time::Instant;

use crate::{
    journal::{Entry, Key, Phase, WaitingClone},
    protocol::{Kind, Place, ProjectId, TaskId},
};

/// The clones that wait, by project.
#[derive(Debug, Default)]
pub(super) struct Clones {
    projects: HashMap<ProjectId, HashMap<Key, Waiting>>,
    /// Some were read from disk, and it is not known yet what time it is.
    undated: bool,
}

/// One of them. When it is due is told by the wall clock, and how far that has come since by one that nobody sets: a
/// clock that was put forward makes no clone overdue, and a start after a long absence none either.
#[derive(Debug)]
struct Waiting {
    place: Place,
    until: Timestamp,
    noted: Option<(Instant, Timestamp)>,
}

impl Waiting {
    fn seen_at(&self, now: Timestamp) -> WaitingClone {
        let step = match self.noted {
            Some((instant, then)) => now.duration_since(then) - elapsed(instant),
            None => SignedDuration::ZERO,
        };
        let until = self.until.saturating_add(step).unwrap_or(self.until);
        WaitingClone { place: self.place, until }
    }
}

fn elapsed(since: Instant) -> SignedDuration {
    SignedDuration::try_from(since.elapsed()).unwrap_or(SignedDuration::MAX)
}

impl Clones {
    /// Takes note of a clone that ran when the agent died: the broker delivers it again.
    pub(super) fn left_behind(&mut self, task: &TaskId, entry: &Entry) {
        if entry.kind == Kind::Clone {
            let released = Entry { phase: Phase::Released { until: entry.seen }, ..entry.clone() };
            self.track(task, &released, None);
        }
    }

    /// Takes note of what an entry has become.
    pub(super) fn track(&mut self, task: &TaskId, entry: &Entry, now: Option<Timestamp>) {
        let key = Key { task_id: task.clone(), round: entry.round };
        let Some(WaitingClone { place, until }) = entry.waiting_clone() else {
            if let Some(clones) = self.projects.get_mut(&entry.project) {
                clones.remove(&key);
                if clones.is_empty() {
                    self.projects.remove(&entry.project);
                }
            }
            return;
        };
        self.undated |= now.is_none();
        let noted = now.map(|now| (Instant::now(), now));
        self.projects.entry(entry.project).or_default().insert(key, Waiting { place, until, noted });
    }

    /// Says what time it is to those that were read from disk: what was due meanwhile is due now.
    pub(super) fn date(&mut self, now: Timestamp) {
        if !std::mem::replace(&mut self.undated, false) {
            return;
        }
        for clone in self.projects.values_mut().flat_map(HashMap::values_mut).filter(|clone| clone.noted.is_none()) {
            clone.noted = Some((Instant::now(), now));
            clone.until = clone.until.max(now);
        }
    }

    /// The clones of a project that wait.
    pub(super) fn of(&self, project: ProjectId, now: Timestamp) -> Vec<WaitingClone> {
        self.projects.get(&project).into_iter().flat_map(HashMap::values).map(|clone| clone.seen_at(now)).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + seconds).unwrap()
    }

    fn clone(until: i64) -> Entry {
        let place = Place { generation: None, arrived: 1 };
        let mut entry = Entry::new(0, "d".to_owned(), Kind::Clone, 7, place, at(0));
        entry.phase = Phase::Released { until: at(until) };
        entry
    }

    #[tokio::test(start_paused = true)]
    async fn a_clone_is_due_by_the_time_that_passes_however_the_clock_is_set() {
        let (mut clones, task) = (Clones::default(), TaskId::new("t").unwrap());
        clones.track(&task, &clone(10), Some(at(0)));
        tokio::time::advance(Duration::from_secs(4)).await;
        for step in [0, 30 * 86_400, -30 * 86_400] {
            let now = at(4 + step);
            let [seen] = clones.of(7, now)[..] else { panic!("one clone waits") };
            assert_eq!(seen.until.duration_since(now).as_secs(), 6, "{step}");
        }
        let settled = Entry { phase: Phase::Waiting, ..clone(10) };
        clones.track(&task, &settled, Some(at(5)));
        assert!(clones.of(7, at(5)).is_empty() && clones.projects.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_clone_that_ran_at_a_crash_is_waited_for_until_it_comes_again() {
        let (mut clones, task) = (Clones::default(), TaskId::new("t").unwrap());
        let running = Entry { phase: Phase::Running { boot: "b".to_owned(), alone: false }, ..clone(0) };
        clones.left_behind(&task, &running);
        clones.date(at(50));
        assert_eq!(clones.of(7, at(50)).len(), 1);
        clones.track(&task, &Entry { phase: Phase::Waiting, ..clone(0) }, Some(at(51)));
        assert!(clones.of(7, at(51)).is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_clone_that_was_due_while_nobody_was_there_is_due_now() {
        let (mut clones, task) = (Clones::default(), TaskId::new("t").unwrap());
        clones.track(&task, &clone(10), None);
        clones.date(at(100_000));
        assert_eq!(clones.of(7, at(100_000))[0].until, at(100_000));
        assert!(clones.of(8, at(100_000)).is_empty());
    }
}
