//! Which waiting task runs next. Pure: no clock, no broker, no executor.
//!
//! Priority orders projects; within one project the tasks run in their own order, one at a time, and a project that
//! is busy never holds up another.

use std::{cmp::Reverse, collections::BTreeMap};

use crate::protocol::{Kind, Place, Priority, ProjectId};

/// Waiting tasks of one project that the window keeps; the others go round through a retry queue, uncharged, so that
/// one project never fills the window.
pub const WAITING_PER_PROJECT: usize = 4;

/// A waiting task's number, given by the caller.
pub type Number = u64;

/// A task that wants to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// Its number.
    pub number: Number,
    /// Its project.
    pub project: ProjectId,
    /// Its kind.
    pub kind: Kind,
    /// How urgent it is.
    pub priority: Priority,
    /// Its place in the order of its project.
    pub place: Place,
}

/// The waiting and running tasks of an agent.
#[derive(Debug)]
pub struct Schedule {
    slots: usize,
    waiting: BTreeMap<ProjectId, Vec<Waiting>>,
    running: BTreeMap<ProjectId, Kind>,
}

impl Schedule {
    /// A schedule with `slots` slots, and one more that only `delete` and `status` may take.
    #[must_use]
    pub fn new(slots: usize) -> Self {
        Self { slots: slots.max(1), waiting: BTreeMap::new(), running: BTreeMap::new() }
    }

    /// Adds a task; false if its project has too many waiting already, and it has to go round.
    pub fn enqueue(&mut self, task: Waiting) -> bool {
        let queue = self.waiting.entry(task.project).or_default();
        if queue.len() >= WAITING_PER_PROJECT {
            return false;
        }
        let behind = |other: &Waiting| !task.place.is_older_than(other.place);
        let position = queue.iter().position(|other| !behind(other)).unwrap_or(queue.len());
        queue.insert(position, task);
        true
    }

    /// Takes the next task that may run now, and gives it its project's turn.
    pub fn start_next(&mut self) -> Option<Waiting> {
        let project = self
            .waiting
            .iter()
            .filter(|(project, queue)| !self.running.contains_key(project) && !queue.is_empty())
            .filter(|(_, queue)| self.has_slot(queue[0].kind))
            .max_by_key(|(_, queue)| {
                let urgency = queue.iter().map(|task| task.priority).max();
                (urgency, Reverse(queue[0].place.arrived))
            })
            .map(|(project, _)| *project)?;
        let queue = self.waiting.get_mut(&project)?;
        let task = queue.remove(0);
        if queue.is_empty() {
            self.waiting.remove(&project);
        }
        self.running.insert(project, task.kind);
        Some(task)
    }

    /// Whether a task of this kind finds a slot: delete and status have one of their own beside the shared ones.
    fn has_slot(&self, kind: Kind) -> bool {
        let light = |kind: Kind| matches!(kind, Kind::Delete | Kind::Status);
        let shared = self.running.len();
        let heavy = self.running.values().filter(|kind| !light(**kind)).count();
        if light(kind) { shared < self.slots + 1 } else { heavy < self.slots && shared < self.slots + 1 }
    }

    /// Ends a project's turn.
    pub fn finish(&mut self, project: ProjectId) {
        self.running.remove(&project);
    }

    /// Takes a task out that need not wait any longer; false if it is not waiting.
    pub fn withdraw(&mut self, project: ProjectId, number: Number) -> bool {
        let Some(queue) = self.waiting.get_mut(&project) else { return false };
        let before = queue.len();
        queue.retain(|task| task.number != number);
        let found = queue.len() < before;
        if queue.is_empty() {
            self.waiting.remove(&project);
        }
        found
    }

    /// Whether a clone of the project waits that comes before `place`.
    #[must_use]
    pub fn clone_waits_before(&self, project: ProjectId, place: Place) -> bool {
        let mut queue = self.waiting.get(&project).into_iter().flatten();
        queue.any(|task| task.kind == Kind::Clone && task.place.is_older_than(place))
    }

    /// Tasks that wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting.values().map(Vec::len).sum()
    }

    /// Projects whose turn is taken.
    pub fn busy(&self) -> impl Iterator<Item = ProjectId> {
        self.running.keys().copied()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn task(number: Number, project: ProjectId, kind: Kind, priority: Priority) -> Waiting {
        let place = Place { generation: None, arrived: i64::try_from(number).unwrap() };
        Waiting { number, project, kind, priority, place }
    }

    fn pull(number: Number, project: ProjectId) -> Waiting {
        task(number, project, Kind::Pull, Priority::Normal)
    }

    fn started(schedule: &mut Schedule) -> Vec<Number> {
        std::iter::from_fn(|| schedule.start_next()).map(|task| task.number).collect()
    }

    #[test]
    fn two_tasks_of_one_project_never_run_at_once() {
        let mut schedule = Schedule::new(4);
        for task in [pull(1, 7), pull(2, 7), pull(3, 8)] {
            assert!(schedule.enqueue(task));
        }
        assert_eq!(started(&mut schedule), [1, 3]);
        schedule.finish(7);
        assert_eq!(started(&mut schedule), [2]);
    }

    #[test]
    fn a_slow_project_never_blocks_another() {
        let mut schedule = Schedule::new(2);
        schedule.enqueue(pull(1, 7));
        assert_eq!(started(&mut schedule), [1]);
        for number in 2..=4 {
            schedule.enqueue(pull(number, 7));
        }
        schedule.enqueue(pull(9, 8));
        assert_eq!(started(&mut schedule), [9]);
    }

    #[test]
    fn priority_orders_projects_and_arrival_the_tasks_of_one() {
        let mut schedule = Schedule::new(1);
        schedule.enqueue(task(1, 7, Kind::Pull, Priority::Normal));
        schedule.enqueue(task(2, 8, Kind::Pull, Priority::Low));
        schedule.enqueue(task(3, 8, Kind::Pull, Priority::Critical));
        assert_eq!(started(&mut schedule), [2], "the urgent task pulls its project forward, not itself past its elder");
        schedule.finish(8);
        assert_eq!(started(&mut schedule), [3]);
        schedule.finish(8);
        assert_eq!(started(&mut schedule), [1]);
    }

    #[test]
    fn only_an_older_clone_of_the_same_project_waits_before_a_task() {
        let mut schedule = Schedule::new(1);
        schedule.enqueue(pull(1, 7));
        schedule.enqueue(task(5, 7, Kind::Clone, Priority::Normal));
        let before = |project, arrived| schedule.clone_waits_before(project, Place { generation: None, arrived });
        assert_eq!((before(7, 9), before(7, 5), before(7, 2), before(8, 9)), (true, false, false, false));
    }

    #[test]
    fn generations_order_the_tasks_of_a_project() {
        let mut schedule = Schedule::new(1);
        let of = |number, generation| {
            let place = Place { generation: Some(generation), arrived: i64::try_from(number).unwrap() };
            Waiting { place, ..pull(number, 7) }
        };
        schedule.enqueue(of(1, 5));
        schedule.enqueue(of(2, 4));
        assert_eq!(started(&mut schedule), [2]);
    }

    #[test]
    fn one_slot_is_always_open_to_delete_and_status() {
        let mut schedule = Schedule::new(2);
        for number in 1..=3 {
            schedule.enqueue(task(number, i64::try_from(number).unwrap(), Kind::Clone, Priority::Critical));
        }
        schedule.enqueue(task(8, 8, Kind::Status, Priority::Idle));
        schedule.enqueue(task(9, 9, Kind::Delete, Priority::Idle));
        assert_eq!(started(&mut schedule), [1, 2, 8]);
        schedule.finish(8);
        assert_eq!(started(&mut schedule), [9]);
    }

    #[test]
    fn one_project_never_fills_the_window() {
        let mut schedule = Schedule::new(1);
        let taken = (0..10).filter(|&number| schedule.enqueue(pull(number, 7))).count();
        assert_eq!(taken, WAITING_PER_PROJECT);
    }

    #[test]
    fn a_withdrawn_task_never_starts() {
        let mut schedule = Schedule::new(1);
        schedule.enqueue(pull(1, 7));
        assert!(schedule.withdraw(7, 1));
        assert!(!schedule.withdraw(7, 1));
        assert!(started(&mut schedule).is_empty());
    }

    proptest! {
        #[test]
        fn every_task_runs_once_and_never_beside_its_own_project(
            tasks in prop::collection::vec((0i64..6, 0usize..4, 0usize..5), 1..60),
            slots in 1usize..4,
        ) {
            let priorities = [Priority::Idle, Priority::Low, Priority::Normal, Priority::High, Priority::Critical];
            let mut schedule = Schedule::new(slots);
            let mut expected = 0;
            for (number, (project, kind, priority)) in tasks.into_iter().enumerate() {
                expected += usize::from(schedule.enqueue(task(number as u64, project, Kind::ALL[kind], priorities[priority])));
            }
            let (mut ran, mut running) = (BTreeSet::new(), Vec::new());
            loop {
                while let Some(task) = schedule.start_next() {
                    prop_assert!(!running.contains(&task.project));
                    prop_assert!(ran.insert(task.number));
                    running.push(task.project);
                }
                prop_assert!(running.len() <= slots + 1);
                let Some(done) = running.pop() else { break };
                schedule.finish(done);
            }
            prop_assert_eq!(ran.len(), expected);
        }
    }
}
