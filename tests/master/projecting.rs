//! The four rules, against runs that were made up, in every order; and the table of cases that the Python example is held to
//! as well.

use haul::{
    master::{Applied, Ignored, Projection, TaskChange, TaskRow},
    protocol::{Event, ProjectStatus, Status, TaskId},
};
use jiff::SignedDuration;
use proptest::prelude::*;
use serde_json::{Map, Value};

use crate::{
    clone_of, node,
    runs::{Sim, Step, a_run},
};

fn applied<'a>(events: impl IntoIterator<Item = &'a Event>) -> Projection {
    let mut projection = Projection::new();
    for event in events {
        projection.apply(event);
    }
    projection
}

/// The events in an order, and some of them more than once, as `picks` say.
fn scrambled<'a>(events: &'a [Event], picks: &[usize]) -> Vec<&'a Event> {
    let mut order: Vec<&Event> = events.iter().collect();
    for (from, &to) in picks.iter().enumerate() {
        if !order.is_empty() {
            let length = order.len();
            order.swap(from % length, to % length);
            if to % 3 == 0 {
                order.insert((to / 3) % length, order[from % length]);
            }
        }
    }
    order
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn the_order_and_number_of_arrivals_change_nothing(
        (mut sim, steps) in a_run(),
        picks in proptest::collection::vec(0_usize..10_000, 0..200),
        finish in any::<bool>(),
    ) {
        for (task, step, _) in steps {
            sim.step(task, step);
        }
        if finish {
            sim.finish();
        }
        let in_order = applied(&sim.events);
        prop_assert_eq!(&applied(scrambled(&sim.events, &picks)), &in_order);
        prop_assert_eq!(&applied(sim.events.iter().rev()), &in_order);
    }

    #[test]
    fn when_all_has_ended_what_is_known_is_the_truth(
        (mut sim, steps) in a_run(),
        picks in proptest::collection::vec(0_usize..10_000, 0..200),
    ) {
        for (task, step, _) in steps {
            sim.step(task, step);
        }
        sim.finish();
        let known = applied(scrambled(&sim.events, &picks));
        for truth in &sim.tasks {
            let row = known.task(&truth.id).unwrap();
            prop_assert_eq!((row.round(), row.status()), (truth.round, truth.end));
        }
        for (&project, truth) in &sim.projects {
            let row = known.project(&node("n1"), project).unwrap();
            prop_assert_eq!((row.status(), row.project_seq()), (Some(truth.shown()), truth.seq));
            prop_assert_eq!(row.place().and_then(|place| place.head.clone()), truth.head.clone());
        }
    }

    #[test]
    fn clocks_that_are_set_do_not_change_how_anything_ends(
        (mut sim, steps) in a_run(),
        picks in proptest::collection::vec(0_usize..10_000, 0..200),
    ) {
        for task in &mut sim.tasks {
            // Order of arrival at the agent is by its clock: only a generation makes it one's own.
            task.generation = None;
        }
        for (task, step, by) in steps {
            if let Step::Restart = step {
                sim.set_clock(SignedDuration::from_secs(by));
            }
            sim.step(task, step);
        }
        sim.finish();
        let known = applied(scrambled(&sim.events, &picks));
        for truth in &sim.tasks {
            let row = known.task(&truth.id).unwrap();
            prop_assert_eq!((row.round(), row.status()), (truth.round, truth.end));
        }
        for (&project, truth) in &sim.projects {
            let row = known.project(&node("n1"), project).unwrap();
            prop_assert_eq!((row.status(), row.project_seq()), (Some(truth.shown()), truth.seq));
        }
    }

    #[test]
    fn rows_survive_being_kept_as_text_after_every_event((mut sim, steps) in a_run()) {
        for (task, step, _) in steps {
            sim.step(task, step);
        }
        let mut kept: std::collections::BTreeMap<TaskId, String> = std::collections::BTreeMap::new();
        for event in &sim.events {
            let row = kept.get(&event.task_id).map(|text| {
                let mut row: TaskRow = serde_json::from_str(text).unwrap();
                row.apply(event);
                row
            });
            let row = row.unwrap_or_else(|| TaskRow::heard(event));
            kept.insert(event.task_id.clone(), serde_json::to_string(&row).unwrap());
        }
        let known = applied(&sim.events);
        for (id, text) in kept {
            prop_assert_eq!(&serde_json::from_str::<TaskRow>(&text).unwrap(), known.task(&id).unwrap());
        }
    }
}

#[test]
fn every_event_says_what_it_changed() {
    use TaskChange::{Ended, HistoryTold, Moved, Nothing};
    let mut sim = Sim::new([(haul::protocol::Kind::Clone, 7, None)]);
    let steps = [Step::Accept, Step::Start, Step::Retry, Step::Restart, Step::Start, Step::Succeed, Step::History];
    for step in steps {
        sim.step(0, step);
    }
    let [accepted, started, retrying, again, succeeded, history] = &sim.events[..] else { panic!("{:?}", sim.events) };
    let mut projection = Projection::new();
    let mut tell = |event: &Event| projection.apply(event);
    let news = |task, project_status| Applied { task, project: true, project_status: Some(project_status) };
    assert_eq!(tell(started), news(Moved, ProjectStatus::Syncing));
    assert_eq!(tell(accepted).task, Nothing(Ignored::Overtaken));
    assert_eq!(tell(started).task, Nothing(Ignored::Again));
    assert_eq!(tell(history).task, HistoryTold, "it is not lost for coming before the end");
    assert_eq!(tell(again).task, Moved, "a restarted agent counts from one again");
    assert_eq!(tell(retrying).task, Nothing(Ignored::OlderBoot));
    assert_eq!(tell(succeeded), news(Ended, ProjectStatus::Active));
    let ignored = tell(succeeded);
    assert_eq!(ignored.task, Nothing(Ignored::Again));
    assert!(!ignored.is_news());
    assert_eq!(tell(again).task, Nothing(Ignored::AfterEnd));
    let contradiction = Event { event_id: "another".to_owned(), status: Status::Failed, ..succeeded.clone() };
    let before = projection.clone();
    assert_eq!(projection.apply(&contradiction).task, Nothing(Ignored::SecondEnd));
    assert_eq!(projection, before, "the first end of a round stands");
    let row = projection.task(&sim.tasks[0].id).unwrap();
    assert_eq!(row.history().unwrap().event_id, history.event_id);
    assert!(row.is_done() && row.result().is_some() && row.error().is_none());
}

#[test]
fn an_event_may_come_before_the_row_of_its_task() {
    let task = clone_of(42);
    let mut event = Sim::one_clone().remove(1);
    event.task_id = task.task_id().clone();
    let now = event.at;
    let mut early = Projection::new();
    early.apply(&event);
    early.want(&node("n1"), &task, now);
    let mut late = Projection::new();
    late.want(&node("n1"), &task, now);
    late.apply(&event);
    assert_eq!(early, late);
    assert_eq!(late.task(task.task_id()).unwrap().status(), Some(Status::Started));
    assert_eq!(late.task(task.task_id()).unwrap().host(), Some("git.example"));
}

#[test]
fn one_project_on_two_nodes_is_two_rows() {
    let here = Sim::one_clone();
    let mut projection = applied(&here);
    for event in &here {
        let there = Event { node: node("n2"), project_seq: 0, status: event.status, ..event.clone() };
        let id = TaskId::new(format!("there-{}", event.task_id)).unwrap();
        projection.apply(&Event { task_id: id, project_status: ProjectStatus::Error, ..there });
    }
    assert_eq!(projection.project(&node("n1"), 42).unwrap().status(), Some(ProjectStatus::Active));
    assert_eq!(projection.project(&node("n2"), 42).unwrap().status(), Some(ProjectStatus::Error));
}

#[test]
fn a_node_that_lost_its_storage_is_believed_again_with_a_higher_generation() {
    let event = |id: &str, generation, project_seq, second| Event {
        task_id: TaskId::new(id).unwrap(),
        event_id: id.to_owned(),
        generation: Some(generation),
        project_seq,
        at: jiff::Timestamp::from_second(second).unwrap(),
        ..Sim::one_clone().remove(2)
    };
    let (before, after) = (event("before", 5, 7, 100), event("after", 6, 1, 200));
    for order in [[&before, &after], [&after, &before]] {
        assert_eq!(applied(order).project(&node("n1"), 42).unwrap().project_seq(), 1);
    }
    let stale = event("stale", 4, 6, 300);
    let known = applied([&before, &stale]);
    assert_eq!(known.project(&node("n1"), 42).unwrap().project_seq(), 7, "an older generation never wins");
    assert_eq!(known.project(&node("n1"), 42).unwrap().next_generation(), 6);
}

#[test]
fn a_task_that_is_forgotten_leaves_nothing_under_way() {
    let mut projection = applied(&Sim::one_clone()[..2]);
    assert_eq!(projection.project(&node("n1"), 42).unwrap().status(), Some(ProjectStatus::Syncing));
    projection.forget(&TaskId::new("t0").unwrap()).unwrap();
    assert_eq!(projection.project(&node("n1"), 42).unwrap().status(), None);
}

/// Every case of the table: its events, in the order given or, where it says so, in every order, lead to what is expected.
#[test]
fn the_shared_table_of_cases_holds() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/master/cases.json");
    let table: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let cases = table["cases"].as_array().unwrap();
    assert!(cases.len() >= 12);
    for case in cases {
        let events: Vec<Event> = case["events"].as_array().unwrap().iter().map(|event| full(&table, event)).collect();
        let orders =
            if case["any_order"] == true { permutations(events.len()) } else { vec![(0..events.len()).collect()] };
        for order in orders {
            let known = applied(order.iter().map(|&index| &events[index]));
            for (id, expected) in case["tasks"].as_object().into_iter().flatten() {
                let row = known.task(&TaskId::new(id.as_str()).unwrap()).unwrap();
                holds(
                    case,
                    &order,
                    expected,
                    &serde_json::json!({"round": row.round(), "status": row.status(),
                    "attempt": row.attempt(), "done": row.is_done(), "error": row.error().map(|error| error.class),
                    "head": row.result().and_then(|result| result.head.clone()),
                    "phase": row.progress().map(|progress| progress.phase.clone())}),
                );
            }
            for (key, expected) in case["projects"].as_object().into_iter().flatten() {
                let (project, at) = key.split_once('@').unwrap();
                let row = known.project(&node(at), project.parse().unwrap()).unwrap();
                let place = row.place().cloned().unwrap_or_default();
                holds(
                    case,
                    &order,
                    expected,
                    &serde_json::json!({"status": row.status(), "seq": row.project_seq(),
                    "head": place.head, "branch": place.branch, "error": row.error().map(|error| error.class)}),
                );
            }
        }
    }
}

/// An event of the table with what it leaves out.
fn full(table: &Value, event: &Value) -> Event {
    let mut fields: Map<String, Value> = table["defaults"].as_object().unwrap().clone();
    fields.extend(event.as_object().unwrap().clone());
    let id = fields.get("event_id").cloned().unwrap_or_else(|| event.to_string().into());
    fields.insert("event_id".to_owned(), id);
    serde_json::from_value(Value::Object(fields)).unwrap()
}

fn holds(case: &Value, order: &[usize], expected: &Value, known: &Value) {
    for (field, value) in expected.as_object().unwrap() {
        assert_eq!(&known[field], value, "{field} of {} in the order {order:?}", case["name"]);
    }
}

fn permutations(length: usize) -> Vec<Vec<usize>> {
    if length == 0 {
        return vec![Vec::new()];
    }
    let shorter = permutations(length - 1);
    let insert = |order: &Vec<usize>, at: usize| {
        let mut order = order.clone();
        order.insert(at, length - 1);
        order
    };
    shorter.iter().flat_map(|order| (0..length).map(move |at| insert(order, at))).collect()
}
