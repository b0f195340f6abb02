//! The checker's judgement, on histories made by hand: a good one is good, and each bad one is found out.

#![expect(clippy::unwrap_used, reason = "helpers of tests may fail as tests do")]

mod check {
    #[expect(dead_code, reason = "tasks are made and executed by the checker itself")]
    pub(crate) mod behaviour;
    #[expect(dead_code, reason = "histories are written and read by the checker itself")]
    pub(crate) mod history;
    #[expect(dead_code, reason = "its counts are for the checker's table")]
    pub(crate) mod judge;
}

use check::{
    history::{Accepted, Execution, Fault, FaultKind, Moment, Project, Record, Step, Told, Why, Work},
    judge::{Crime, Verdict, judge},
};
use haul::{
    failure::ErrorClass,
    protocol::{Kind, Place, ProjectStatus, Status},
};

/// A history that is made line by line; each line is a moment later.
#[derive(Default)]
struct Story {
    records: Vec<Record>,
    now: Moment,
    boot: u32,
}

const PROJECT: i64 = 7;

impl Story {
    fn tick(&mut self) -> Moment {
        self.now += 1000;
        self.now
    }

    fn published(&mut self, task: &str, kind: Kind, generation: u64) -> &mut Self {
        let accepted = Accepted {
            at: self.tick(),
            task: task.to_owned(),
            round: 0,
            node: "n1".to_owned(),
            project: PROJECT,
            kind,
            generation: Some(generation),
            why: Why::First,
            tries: 1,
        };
        self.records.push(Record::Accepted(accepted));
        self
    }

    fn step(&mut self, task: &str, kind: Kind, generation: u64, attempt: u32, step: Step) -> &mut Self {
        let execution = Execution {
            at: self.tick(),
            node: "n1".to_owned(),
            boot: self.boot.to_string(),
            task: task.to_owned(),
            round: 0,
            attempt,
            project: PROJECT,
            kind,
            place: Place { generation: Some(generation), arrived: i64::try_from(generation).unwrap() },
            step,
        };
        self.records.push(Record::Execution(execution));
        self
    }

    fn ended(&mut self, task: &str, status: Status, class: Option<ErrorClass>, seq: u64) -> &mut Self {
        let at = self.tick();
        let active = self.project().is_some_and(|project| project.active);
        let told = Told {
            at,
            event: format!("e{at}"),
            task: task.to_owned(),
            round: 0,
            attempt: 1,
            node: "n1".to_owned(),
            boot: self.boot.to_string(),
            project: PROJECT,
            project_seq: seq,
            status,
            project_status: if active { ProjectStatus::Active } else { ProjectStatus::Error },
            class,
            head: None,
        };
        self.records.push(Record::Event(told));
        self
    }

    fn project(&mut self) -> Option<&mut Project> {
        self.records.iter_mut().find_map(|record| match record {
            Record::Project(project) => Some(project),
            _ => None,
        })
    }

    fn event(&mut self) -> &mut Told {
        let mut events = self.records.iter_mut().filter_map(|record| match record {
            Record::Event(told) => Some(told),
            _ => None,
        });
        events.next_back().unwrap()
    }

    fn on_disk(&mut self, task: &str, generation: u64, active: bool) -> &mut Self {
        self.records.push(Record::Project(Project {
            node: "n1".to_owned(),
            project: PROJECT,
            active,
            task: Some(task.to_owned()),
            place: Some(Place { generation: Some(generation), arrived: i64::try_from(generation).unwrap() }),
            ..Project::default()
        }));
        self
    }

    fn fault(&mut self, kind: FaultKind) -> &mut Self {
        let at = self.tick();
        let node = Some("n1".to_owned());
        self.records.push(Record::Fault(Fault { at, until: at, kind, node, done: true, note: String::new() }));
        self.boot += 1;
        self
    }

    fn letter(&mut self, task: &str, round: u32, class: &str) -> &mut Self {
        self.records.push(Record::Letter { task: task.to_owned(), round, class: class.to_owned() });
        self
    }

    /// A clone that was published, executed and told of, and is on disk.
    fn cloned() -> Self {
        let mut story = Self::default();
        let (seed, work, broker) = (1, Work::Ledger, "3.10".to_owned());
        story.records.push(Record::Run { at: 0, seed, tasks: 1, faults: 0, nodes: 1, work, broker });
        story.on_disk("1.ok", 1, true).published("1.ok", Kind::Clone, 1);
        story.step("1.ok", Kind::Clone, 1, 1, Step::Started).step("1.ok", Kind::Clone, 1, 1, Step::Applied);
        story.ended("1.ok", Status::Succeeded, None, 1);
        story
    }

    /// The same, and a second task that failed for good and has its letter.
    fn failed() -> Self {
        let mut story = Self::cloned();
        story.published("2.fail", Kind::Pull, 2).step("2.fail", Kind::Pull, 2, 1, Step::Started);
        story.step("2.fail", Kind::Pull, 2, 1, Step::Failed(ErrorClass::Corrupt));
        story.ended("2.fail", Status::Failed, Some(ErrorClass::Corrupt), 1).letter("2.fail", 1, "corrupt");
        story
    }

    fn judged(&self) -> Verdict {
        judge(&self.records)
    }

    /// Exactly one thing is found, of this kind.
    fn is(&self, crime: Crime) {
        let found: Vec<_> = self.judged().findings.iter().map(|finding| finding.crime).collect();
        assert_eq!(found, [crime], "{:?}", self.judged().findings);
    }
}

#[test]
fn a_history_in_which_everything_ended_once_is_good() {
    for story in [Story::cloned(), Story::failed()] {
        let verdict = story.judged();
        assert!(verdict.is_good(), "{:?}", verdict.findings);
    }
    let verdict = Story::failed().judged();
    assert_eq!((verdict.tasks, verdict.executions, verdict.letters, verdict.projects), (2, 2, 1, 1));
}

#[test]
fn the_same_history_is_judged_the_same_after_it_was_written_and_read() {
    let story = Story::failed();
    let directory = tempfile::tempdir().unwrap();
    let history = check::history::History::create(directory.path()).unwrap();
    story.records.iter().for_each(|record| history.add(record));
    history.flush();
    let read = check::history::read(directory.path()).unwrap();
    assert_eq!(read, story.records);
    assert_eq!(judge(&read), story.judged());
}

#[test]
fn a_task_without_an_end_is_lost() {
    let mut story = Story::cloned();
    story.published("2.ok", Kind::Pull, 2);
    story.is(Crime::Lost);
}

#[test]
fn a_task_without_an_end_that_lies_in_a_queue_is_stuck() {
    let mut story = Story::cloned();
    story.published("2.ok", Kind::Pull, 2);
    story.records.push(Record::Left { queue: "q".to_owned(), task: "2.ok".to_owned(), round: 0 });
    story.is(Crime::Stuck);
}

#[test]
fn a_replay_without_an_end_is_lost_too() {
    let mut story = Story::failed();
    let (task, class) = ("2.fail".to_owned(), "corrupt".to_owned());
    story.records.push(Record::Replayed { at: 0, task, round: 1, class });
    story.is(Crime::Lost);
}

#[test]
fn two_terminal_events_of_one_round_are_a_double() {
    let mut story = Story::cloned();
    story.ended("1.ok", Status::Succeeded, None, 1);
    story.is(Crime::Doubled);
}

#[test]
fn two_statuses_of_one_round_are_a_double_even_with_one_identity() {
    let mut story = Story::cloned();
    let event = story.event().event.clone();
    story.ended("1.ok", Status::Superseded, None, 1);
    story.event().event = event;
    assert!(story.judged().count(Crime::Doubled) == 1, "{:?}", story.judged().findings);
}

#[test]
fn the_same_event_again_is_none() {
    let mut story = Story::cloned();
    let again = story.event().clone();
    story.records.push(Record::Event(again));
    let verdict = story.judged();
    assert!(verdict.is_good() && verdict.repeated_events == 1, "{:?}", verdict.findings);
}

#[test]
fn a_second_end_is_excused_only_by_a_journal_that_was_lost_in_between() {
    for (kind, good) in [(FaultKind::JournalLost, true), (FaultKind::AgentKilled, false)] {
        let mut story = Story::cloned();
        story.fault(kind).step("1.ok", Kind::Clone, 1, 1, Step::Started);
        story.step("1.ok", Kind::Clone, 1, 1, Step::Applied).ended("1.ok", Status::Succeeded, None, 1);
        assert_eq!(story.judged().is_good(), good, "{:?}", story.judged().findings);
    }
}

#[test]
fn an_execution_again_is_counted_by_its_cause() {
    let mut story = Story::cloned();
    story.published("2.ok", Kind::Pull, 2).step("2.ok", Kind::Pull, 2, 1, Step::Started).fault(FaultKind::AgentKilled);
    story.step("2.ok", Kind::Pull, 2, 1, Step::Started).step("2.ok", Kind::Pull, 2, 1, Step::Applied);
    story.ended("2.ok", Status::Succeeded, None, 2);
    *story.project().unwrap() = project(2);
    let verdict = story.judged();
    assert!(verdict.is_good(), "{:?}", verdict.findings);
    assert_eq!(verdict.repeated.into_iter().collect::<Vec<_>>(), [("agent-killed", 1)]);
}

fn project(generation: u64) -> Project {
    let mut story = Story::default();
    story.on_disk(&format!("{generation}.ok"), generation, true);
    story.project().unwrap().clone()
}

#[test]
fn an_execution_again_without_a_cause_is_found() {
    let mut story = Story::cloned();
    story.step("1.ok", Kind::Clone, 1, 1, Step::Started).step("1.ok", Kind::Clone, 1, 1, Step::Applied);
    story.is(Crime::Unexplained);
}

#[test]
fn an_execution_again_in_the_same_start_of_the_agent_is_found_though_another_agent_was_killed() {
    let mut story = Story::cloned();
    story.fault(FaultKind::AgentKilled).boot = 0;
    story.step("1.ok", Kind::Clone, 1, 1, Step::Started).step("1.ok", Kind::Clone, 1, 1, Step::Applied);
    story.is(Crime::Unexplained);
}

#[test]
fn the_attempt_that_a_failure_asks_for_is_no_repetition() {
    let mut story = Story::cloned();
    story.published("2.retry1", Kind::Status, 2).step("2.retry1", Kind::Status, 2, 1, Step::Started);
    story.step("2.retry1", Kind::Status, 2, 1, Step::Failed(ErrorClass::Network));
    story.step("2.retry1", Kind::Status, 2, 2, Step::Started).step("2.retry1", Kind::Status, 2, 2, Step::Done);
    story.ended("2.retry1", Status::Succeeded, None, 1);
    assert!(story.judged().is_good() && story.judged().repeated.is_empty(), "{:?}", story.judged().findings);
}

#[test]
fn two_executions_of_one_project_at_once_are_found() {
    let mut story = Story::cloned();
    for (task, generation) in [("2.ok", 2), ("3.ok", 3)] {
        story.published(task, Kind::Status, generation).step(task, Kind::Status, generation, 1, Step::Started);
    }
    for (task, generation) in [("2.ok", 2), ("3.ok", 3)] {
        story.step(task, Kind::Status, generation, 1, Step::Done).ended(task, Status::Succeeded, None, 1);
    }
    story.is(Crime::Overlapped);
}

#[test]
fn an_end_that_the_work_never_comes_to_is_wrong() {
    let mut story = Story::cloned();
    story.event().status = Status::Cancelled;
    story.is(Crime::WrongEnd);
}

#[test]
fn a_task_that_nobody_published_and_that_ended_is_found() {
    let mut story = Story::cloned();
    story.ended("9.ok", Status::Succeeded, None, 1);
    assert!(story.judged().count(Crime::WrongEnd) == 1, "{:?}", story.judged().findings);
}

#[test]
fn a_task_that_was_given_up_after_too_few_crashes_is_found() {
    for (crashes, good) in [(3, true), (2, false)] {
        let mut story = Story::cloned();
        story.published("2.ok", Kind::Pull, 2);
        for _ in 0..crashes {
            story.step("2.ok", Kind::Pull, 2, 1, Step::Started).fault(FaultKind::AgentKilled);
        }
        story.ended("2.ok", Status::Failed, Some(ErrorClass::Crashed), 1).letter("2.ok", 1, "crashed");
        assert_eq!(story.judged().is_good(), good, "{:?}", story.judged().findings);
    }
}

#[test]
fn a_project_that_is_not_what_was_applied_last_is_wrong() {
    let mut story = Story::cloned();
    story.project().unwrap().task = Some("other".to_owned());
    story.is(Crime::WrongState);
}

#[test]
fn a_project_that_is_not_what_the_newest_event_says_is_wrong() {
    let mut story = Story::cloned();
    story.event().project_status = ProjectStatus::Deleted;
    story.is(Crime::WrongState);
}

#[test]
fn a_project_that_is_gone_though_the_newest_task_made_it_is_wrong() {
    let mut story = Story::cloned();
    story.records.retain(|record| !matches!(record, Record::Project(_)));
    assert!(story.judged().count(Crime::WrongState) >= 1);
}

#[test]
fn something_older_that_was_applied_after_something_newer_is_wrong() {
    let mut story = Story::cloned();
    story.published("2.ok", Kind::Pull, 0).step("2.ok", Kind::Pull, 0, 1, Step::Started);
    story.step("2.ok", Kind::Pull, 0, 1, Step::Applied).ended("2.ok", Status::Succeeded, None, 2);
    assert!(story.judged().count(Crime::WrongState) >= 1);
}

#[test]
fn a_task_that_was_superseded_by_nothing_is_wrong() {
    let mut story = Story::cloned();
    story.published("2.ok", Kind::Pull, 2).ended("2.ok", Status::Superseded, None, 1);
    story.is(Crime::WrongState);
}

#[test]
fn damaged_files_are_a_wrong_state() {
    let mut story = Story::cloned();
    story.project().unwrap().damage = Some("git fsck says no".to_owned());
    story.is(Crime::WrongState);
}

#[test]
fn a_failure_without_a_dead_letter_is_unaccounted() {
    let mut story = Story::failed();
    story.records.retain(|record| !matches!(record, Record::Letter { .. }));
    story.is(Crime::Unaccounted);
}

#[test]
fn a_dead_letter_of_a_task_that_did_not_fail_is_unaccounted() {
    let mut story = Story::cloned();
    story.letter("1.ok", 1, "corrupt");
    story.is(Crime::Unaccounted);
}

#[test]
fn a_letter_of_a_failure_that_was_never_told_is_excused_only_by_a_journal_that_was_lost_after_it() {
    for (kind, good) in [(FaultKind::JournalLost, true), (FaultKind::AgentKilled, false)] {
        let mut story = Story::cloned();
        story.published("2.ok", Kind::Status, 2).step("2.ok", Kind::Status, 2, 1, Step::Started);
        story.step("2.ok", Kind::Status, 2, 1, Step::Failed(ErrorClass::NotFound)).letter("2.ok", 1, "not_found");
        story.fault(kind).step("2.ok", Kind::Status, 2, 1, Step::Started);
        story.step("2.ok", Kind::Status, 2, 1, Step::Done).ended("2.ok", Status::Succeeded, None, 1);
        assert_eq!(story.judged().is_good(), good, "{kind:?}: {:?}", story.judged().findings);
    }
}

#[test]
fn a_letter_of_the_broker_s_own_is_excused_only_by_a_deleted_queue() {
    for (kind, good) in [(FaultKind::QueueDeleted, true), (FaultKind::BrokerKilled, false)] {
        let mut story = Story::cloned();
        story.fault(kind).letter("1.ok", 0, haul::dead::UNKNOWN);
        assert_eq!(story.judged().is_good(), good, "{:?}", story.judged().findings);
    }
}

#[test]
fn an_agent_that_ended_by_itself_or_panicked_is_found() {
    for (how, asked, good) in [("ended with 0", true, true), ("ended with 1", false, false), ("panicked", true, false)]
    {
        let mut story = Story::cloned();
        story.records.push(Record::Ended { at: 1, node: "n1".to_owned(), how: how.to_owned(), asked });
        assert_eq!(story.judged().is_good(), good, "{how}");
    }
}
