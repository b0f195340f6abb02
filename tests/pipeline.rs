//! The path of a message on the in-memory broker, under virtual time: each rule of the worker, told as behaviour.

mod support;

use std::time::Duration;

use haul::{
    broker::Broker as _,
    failure::ErrorClass,
    protocol::{
        Event, Kind, Status,
        wire::{HeaderValue, header},
    },
    retry::RetrySettings,
    worker::Step,
};
use serde_json::json;
use support::pipeline::{Pipeline, Script, clone_task, task};

#[tokio::test(start_paused = true)]
async fn a_delivery_is_settled_last() {
    let pipeline = Pipeline::start().await;
    pipeline.script("t", [Script::Fail(ErrorClass::Auth)]);
    pipeline.publish(&clone_task("t", 1)).await;
    pipeline.ends("t", Status::Failed).await;
    pipeline.reached(Step::Acked).await;
    let steps = pipeline.steps("t");
    let expected = [
        Step::Decoded,
        Step::Admitted,
        Step::Queued,
        Step::Turn,
        Step::Begun,
        Step::Executed,
        Step::Settled,
        Step::DeadLetterConfirmed,
        Step::DeadLetterStruck,
        Step::EventConfirmed,
        Step::EventStruck,
        Step::Acked,
    ];
    assert_eq!(steps, expected);
}

#[tokio::test(start_paused = true)]
async fn a_task_is_started_and_succeeds_with_its_result() {
    let pipeline = Pipeline::start().await;
    pipeline.publish(&clone_task("t", 42)).await;
    let event = pipeline.ends("t", Status::Succeeded).await;
    assert_eq!(event.project_id, 42);
    assert_eq!(event.project_seq, 1);
    assert_eq!(serde_json::to_value(event.project_status).unwrap(), "ACTIVE");
    assert!(pipeline.statuses("t").contains(&Status::Started));
    pipeline.drained().await;
}

#[tokio::test(start_paused = true)]
async fn a_duplicate_is_answered_with_the_same_event_and_runs_nothing() {
    let pipeline = Pipeline::start().await;
    pipeline.publish(&clone_task("t", 1)).await;
    let first = pipeline.ends("t", Status::Succeeded).await;
    pipeline.drained().await;
    pipeline.publish(&clone_task("t", 1)).await;
    let ends = pipeline.told("t", 2).await;
    assert!(ends.iter().all(|event| event.event_id == first.event_id));
    assert_eq!(pipeline.executions("t"), 1);
}

#[tokio::test(start_paused = true)]
async fn a_duplicate_of_a_running_task_joins_it() {
    let pipeline = Pipeline::start().await;
    pipeline.script("t", [Script::Take(Duration::from_mins(1))]);
    pipeline.publish(&clone_task("t", 1)).await;
    pipeline.saw("t", Status::Started).await;
    pipeline.publish(&clone_task("t", 1)).await;
    pipeline.ends("t", Status::Succeeded).await;
    pipeline.drained().await;
    assert_eq!(pipeline.executions("t"), 1);
    assert_eq!(pipeline.terminal_events("t").len(), 1);
}

#[tokio::test(start_paused = true)]
async fn the_same_identity_with_another_body_is_dead_lettered_and_the_first_is_not_touched() {
    let pipeline = Pipeline::start().await;
    pipeline.publish(&clone_task("t", 1)).await;
    let first = pipeline.ends("t", Status::Succeeded).await;
    pipeline.publish(&clone_task("t", 2)).await;
    let letter = pipeline.dead_letter().await;
    assert_eq!(letter.headers[header::ERROR_CLASS], HeaderValue::from("invalid"));
    pipeline.drained().await;
    let ends = pipeline.terminal_events("t");
    assert_eq!(ends.iter().map(|event| &event.event_id).collect::<Vec<_>>(), [&first.event_id]);
}

#[tokio::test(start_paused = true)]
async fn a_failing_task_is_retried_with_growing_waits_and_then_dead_lettered() {
    let pipeline = Pipeline::start().await;
    pipeline.script("t", [Script::Fail(ErrorClass::Network); 5]);
    pipeline.publish(&clone_task("t", 1)).await;
    let event = pipeline.ends("t", Status::Failed).await;
    assert_eq!(event.attempt, 5);
    assert_eq!(pipeline.executions("t"), 5);
    let retries = pipeline.events("t").into_iter().filter(|event| event.status == Status::Retrying);
    let waits: Vec<f64> =
        retries.map(|event| event.error.unwrap().retry_at.unwrap().duration_since(event.at).as_secs_f64()).collect();
    assert_eq!(waits.len(), 4);
    for (wait, nominal) in waits.iter().zip([1.0, 2.0, 4.0, 8.0]) {
        assert!((0.75 * nominal - 0.01..=1.25 * nominal + 0.01).contains(wait), "{waits:?}");
    }
    let letter = pipeline.dead_letter().await;
    assert_eq!(letter.headers[header::ERROR_CLASS], HeaderValue::from("network"));
    assert_eq!(letter.headers[header::ATTEMPTS], HeaderValue::Int(5));
    assert_eq!(letter.headers[header::ROUND], HeaderValue::Int(1));
    assert_eq!(letter.headers[header::NODE], HeaderValue::from("n1"));
    assert_eq!(letter.headers[header::HISTORY].as_text().unwrap().lines().count(), 5);
    pipeline.drained().await;
}

#[tokio::test(start_paused = true)]
async fn a_copy_comes_back_no_earlier_than_it_said_and_at_most_the_shortest_delay_late() {
    let pipeline = Pipeline::start().await;
    pipeline.script("t", [Script::Fail(ErrorClass::Network); 4]);
    pipeline.publish(&clone_task("t", 1)).await;
    pipeline.ends("t", Status::Succeeded).await;
    let events = pipeline.events("t");
    let due: Vec<_> = events.iter().filter_map(|event| event.error.as_ref()?.retry_at).collect();
    let starts: Vec<_> = events.iter().filter(|event| event.status == Status::Started).map(|event| event.at).collect();
    for (due, started) in due.iter().zip(&starts[1..]) {
        let late = started.duration_since(*due).as_secs_f64();
        assert!((-0.001..=1.5).contains(&late), "started {late} s after it was due");
    }
}

#[tokio::test(start_paused = true)]
async fn a_replayed_dead_letter_runs_in_a_new_round_by_a_console_move_too() {
    let pipeline = Pipeline::start().await;
    pipeline.script("t", [Script::Fail(ErrorClass::Auth)]);
    pipeline.publish(&clone_task("t", 1)).await;
    pipeline.ends("t", Status::Failed).await;
    pipeline.move_dead_letters_to("haul.node.n1").await;
    let event = pipeline.ends("t", Status::Succeeded).await;
    assert_eq!((event.round, event.attempt), (1, 1));
    pipeline.drained().await;
    assert_eq!(pipeline.terminal_events("t").len(), 2, "one a round");
}

#[tokio::test(start_paused = true)]
async fn a_retry_after_a_console_move_goes_to_this_node_by_its_own_name() {
    let pipeline = Pipeline::start().await;
    pipeline.script("t", [Script::Fail(ErrorClass::Auth), Script::Fail(ErrorClass::Network)]);
    pipeline.publish(&clone_task("t", 1)).await;
    pipeline.ends("t", Status::Failed).await;
    pipeline.move_dead_letters_to("haul.node.n1").await;
    assert_eq!(pipeline.ends("t", Status::Succeeded).await.attempt, 2);
}

#[tokio::test(start_paused = true)]
async fn a_retry_copy_that_comes_right_behind_the_delivery_it_replaced_is_not_settled_with_it() {
    let mut pipeline = Pipeline::start().await;
    pipeline.script("t", [Script::Fail(ErrorClass::Network)]);
    pipeline.publish(&clone_task("t", 1)).await;
    pipeline.saw("t", Status::Retrying).await;
    pipeline.reached(Step::Acked).await;
    // As after an outage: a delivery whose ack was lost, and behind it the copy, whose time is over.
    pipeline.stop_now().await;
    pipeline.publish(&clone_task("t", 1)).await;
    let both = async {
        while pipeline.depth("haul.node.n1") < 2 {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(Duration::from_mins(1), both).await.unwrap();
    pipeline.restart().await;
    assert_eq!(pipeline.ends("t", Status::Succeeded).await.attempt, 2);
}

#[tokio::test(start_paused = true)]
async fn a_retry_copy_that_comes_before_its_own_confirm_is_not_settled_with_the_delivery_that_it_replaces() {
    // As where the connection for publishing stalls for longer than the shortest wait.
    let pipeline = Pipeline::start().await;
    pipeline.confirm_late("haul.retry", Duration::from_mins(1));
    pipeline.script("t", [Script::Fail(ErrorClass::Network); 3]);
    pipeline.publish(&clone_task("t", 1)).await;
    assert_eq!(pipeline.ends("t", Status::Succeeded).await.attempt, 4);
    assert_eq!(pipeline.executions("t"), 4);
    pipeline.drained().await;
}

/// A clone whose first attempt has failed, and two more will.
async fn clone_in_retry(pipeline: &Pipeline, id: &str, project: i64) {
    pipeline.script(id, [Script::Fail(ErrorClass::Network); 3]);
    pipeline.publish(&clone_task(id, project)).await;
    pipeline.saw(id, Status::Retrying).await;
}

/// Publishes a pull of the project that `clone` waits to clone: both succeed, and the pull is tried once. Its end.
async fn pull_behind_the_clone(pipeline: &Pipeline) -> Event {
    pipeline.publish(&task("pull", Kind::Pull, 1)).await;
    pipeline.ends("clone", Status::Succeeded).await;
    let end = pipeline.ends("pull", Status::Succeeded).await;
    assert_eq!(pipeline.executions("pull"), 1);
    end
}

#[tokio::test(start_paused = true)]
async fn a_copy_that_waits_for_a_clone_is_not_settled_with_its_delivery_either() {
    let pipeline = Pipeline::start().await;
    clone_in_retry(&pipeline, "clone", 1).await;
    // Copies of the pull ask for the attempt that its delivery itself asked for.
    pipeline.confirm_late("haul.retry", Duration::from_mins(1));
    assert_eq!(pull_behind_the_clone(&pipeline).await.attempt, 1);
    pipeline.drained().await;
}

#[tokio::test(start_paused = true)]
async fn a_pull_waits_for_its_clone_also_where_the_copy_of_the_clone_is_confirmed_late() {
    let pipeline = Pipeline::start().await;
    pipeline.confirm_late("haul.retry", Duration::from_mins(1));
    // The clone has its turn until its copy is confirmed.
    clone_in_retry(&pipeline, "clone", 1).await;
    pull_behind_the_clone(&pipeline).await;
    pipeline.drained().await;
}

#[tokio::test(start_paused = true)]
async fn a_task_of_another_node_is_forwarded_or_dead_lettered_where_that_node_is_gone() {
    let pipeline = Pipeline::start().await;
    pipeline.declare_node("n2").await;
    for (id, node) in [("theirs", "n2"), ("nobodys", "vanished")] {
        let mut message = Pipeline::message(&clone_task(id, 1));
        message.set(header::NODE, node);
        pipeline.put("", "haul.node.n1", message).await;
    }
    let letter = pipeline.dead_letter().await;
    assert_eq!(letter.message_id.as_deref(), Some("nobodys"));
    assert_eq!(letter.headers[header::NODE], HeaderValue::from("vanished"));
    pipeline.drained().await;
    assert_eq!(pipeline.depth("haul.node.n2"), 1);
    assert_eq!(pipeline.executions("theirs") + pipeline.executions("nobodys"), 0);
}

#[tokio::test(start_paused = true)]
async fn two_tasks_of_one_project_never_run_at_once_and_a_slow_project_never_blocks_another() {
    let pipeline = Pipeline::start().await;
    pipeline.script("slow", [Script::Take(Duration::from_mins(10))]);
    pipeline.publish(&clone_task("slow", 1)).await;
    pipeline.saw("slow", Status::Started).await;
    for number in 0..4 {
        pipeline.publish(&task(&format!("same{number}"), Kind::Pull, 1)).await;
        pipeline.publish(&clone_task(&format!("other{number}"), 10 + number)).await;
    }
    for number in 0..4 {
        pipeline.ends(&format!("other{number}"), Status::Succeeded).await;
        assert_eq!(pipeline.executions(&format!("same{number}")), 0);
    }
    for number in 0..4 {
        pipeline.ends(&format!("same{number}"), Status::Succeeded).await;
    }
    assert!(!pipeline.overlapped());
}

#[tokio::test(start_paused = true)]
async fn one_project_with_a_backlog_of_three_windows_holds_up_nobody_and_loses_nothing() {
    let pipeline = Pipeline::start().await;
    pipeline.script("slow", [Script::Take(Duration::from_mins(2))]);
    pipeline.publish(&clone_task("slow", 1)).await;
    pipeline.saw("slow", Status::Started).await;
    let backlog = 3 * usize::from(support::pipeline::WINDOW);
    for number in 0..backlog {
        pipeline.publish(&task(&format!("b{number}"), Kind::Status, 1)).await;
    }
    pipeline.publish(&clone_task("other", 2)).await;
    pipeline.ends("other", Status::Succeeded).await;
    assert_eq!(pipeline.terminal_events("slow").len(), 0, "the other one came through while the project was busy");
    for number in 0..backlog {
        pipeline.ends(&format!("b{number}"), Status::Succeeded).await;
        assert_eq!(pipeline.executions(&format!("b{number}")), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_task_older_than_what_was_applied_is_superseded_however_it_was_delayed() {
    let pipeline = Pipeline::start().await;
    let with = |id: &str, generation: u64| {
        let mut task = clone_task(id, 1);
        task["generation"] = generation.into();
        task
    };
    pipeline.publish(&with("new", 5)).await;
    pipeline.ends("new", Status::Succeeded).await;
    pipeline.publish(&with("old", 4)).await;
    pipeline.ends("old", Status::Superseded).await;
    assert_eq!(pipeline.executions("old"), 0);
    // Without generations the order of arrival decides: a retry that comes back after a newer task is stale.
    pipeline.script("late", [Script::Fail(ErrorClass::Network)]);
    pipeline.publish(&task("late", Kind::Pull, 2)).await;
    pipeline.saw("late", Status::Retrying).await;
    pipeline.publish(&task("newer", Kind::Pull, 2)).await;
    pipeline.ends("newer", Status::Succeeded).await;
    pipeline.ends("late", Status::Superseded).await;
    assert_eq!(pipeline.dead_letters(), 0);
}

#[tokio::test(start_paused = true)]
async fn later_tasks_wait_for_a_clone_in_retry_and_a_delete_ends_it() {
    let pipeline = Pipeline::start().await;
    clone_in_retry(&pipeline, "clone", 1).await;
    pull_behind_the_clone(&pipeline).await;

    clone_in_retry(&pipeline, "again", 2).await;
    pipeline.publish(&task("delete", Kind::Delete, 2)).await;
    pipeline.ends("delete", Status::Succeeded).await;
    pipeline.ends("again", Status::Superseded).await;
}

#[tokio::test(start_paused = true)]
async fn an_expired_task_is_rejected_and_dead_lettered() {
    let pipeline = Pipeline::start().await;
    let mut late = clone_task("t", 1);
    late["not_after"] = json!("2020-01-01T00:00:00Z");
    pipeline.publish(&late).await;
    let event = pipeline.ends("t", Status::Rejected).await;
    assert_eq!(event.error.unwrap().class, ErrorClass::Expired);
    assert_eq!(pipeline.dead_letter().await.headers[header::ERROR_CLASS], HeaderValue::from("expired"));
}

#[tokio::test(start_paused = true)]
async fn a_full_disk_defers_without_spending_attempts() {
    let pipeline = Pipeline::start().await;
    pipeline.script("t", [Script::Fail(ErrorClass::Disk); 9]);
    pipeline.publish(&clone_task("t", 1)).await;
    let event = pipeline.ends("t", Status::Succeeded).await;
    assert_eq!(event.attempt, 1);
    assert_eq!(pipeline.executions("t"), 10);
}

#[tokio::test(start_paused = true)]
async fn what_is_deferred_for_longer_than_allowed_fails() {
    let retry = RetrySettings { defer_max: Duration::from_mins(10), ..RetrySettings::default() };
    let pipeline = Pipeline::start_with(retry).await;
    pipeline.script("t", [Script::Fail(ErrorClass::Disk); 200]);
    pipeline.publish(&clone_task("t", 1)).await;
    let event = pipeline.ends("t", Status::Failed).await;
    assert_eq!(event.error.unwrap().class, ErrorClass::Disk);
    assert_eq!(event.attempt, 1);
}

#[tokio::test(start_paused = true)]
async fn an_executor_that_panics_or_never_ends_is_a_fault_of_ours_and_tried_again() {
    let pipeline = Pipeline::start().await;
    pipeline.script("panics", [Script::Panic]);
    pipeline.publish(&clone_task("panics", 1)).await;
    assert_eq!(pipeline.ends("panics", Status::Succeeded).await.attempt, 2);
    pipeline.script("stuck", [Script::Stuck]);
    let mut stuck = clone_task("stuck", 2);
    stuck["timeout_secs"] = 10.into();
    pipeline.publish(&stuck).await;
    let retrying = pipeline.saw("stuck", Status::Retrying).await;
    assert_eq!(retrying.error.unwrap().class, ErrorClass::Internal);
    assert_eq!(pipeline.ends("stuck", Status::Succeeded).await.attempt, 2);
}

#[tokio::test(start_paused = true)]
async fn records_are_forgotten_after_their_retention_but_not_before_the_queue_was_seen_drained() {
    const RETENTION_AND_MORE: Duration = Duration::from_hours(15 * 24);
    let mut pipeline = Pipeline::start().await;
    pipeline.publish(&clone_task("t", 1)).await;
    pipeline.ends("t", Status::Succeeded).await;
    pipeline.drained().await;
    // Never idle after its start: a delivery that waits somewhere may still have to be answered.
    pipeline.restart().await;
    let mut busy = clone_task("busy", 2);
    busy["timeout_secs"] = (20 * 24 * 60 * 60).into();
    pipeline.script("busy", [Script::Take(RETENTION_AND_MORE + Duration::from_hours(24))]);
    pipeline.publish(&busy).await;
    tokio::time::sleep(RETENTION_AND_MORE).await;
    pipeline.publish(&clone_task("t", 1)).await;
    pipeline.told("t", 2).await;
    assert_eq!(pipeline.executions("t"), 1);
    pipeline.ends("busy", Status::Succeeded).await;
    pipeline.drained().await;
    tokio::time::sleep(RETENTION_AND_MORE).await;
    pipeline.publish(&clone_task("t", 1)).await;
    pipeline.told("t", 3).await;
    assert_eq!(pipeline.executions("t"), 2, "what was forgotten runs again, and is idempotent");
}

#[tokio::test(start_paused = true)]
async fn a_conflict_is_final_and_no_dead_letter() {
    let pipeline = Pipeline::start().await;
    pipeline.script("t", [Script::Fail(ErrorClass::Conflict)]);
    pipeline.publish(&clone_task("t", 1)).await;
    pipeline.ends("t", Status::Failed).await;
    pipeline.drained().await;
    assert_eq!(pipeline.dead_letters(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_running_task_is_cancelled() {
    let pipeline = Pipeline::start().await;
    pipeline.script("t", [Script::UntilStopped]);
    pipeline.publish(&clone_task("t", 1)).await;
    pipeline.saw("t", Status::Started).await;
    pipeline.control(json!({"v": 1, "command": "cancel", "task_id": "t", "control_id": "c1"})).await;
    pipeline.ends("t", Status::Cancelled).await;
    pipeline.answered("cancelling").await;
    pipeline.drained().await;
    assert_eq!(pipeline.dead_letters(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_cancel_that_comes_too_late_reports_the_real_outcome() {
    let pipeline = Pipeline::start().await;
    pipeline.script("t", [Script::IgnoreStop(Duration::from_secs(5))]);
    pipeline.publish(&clone_task("t", 1)).await;
    pipeline.saw("t", Status::Started).await;
    pipeline.control(json!({"v": 1, "command": "cancel", "task_id": "t"})).await;
    let first = pipeline.ends("t", Status::Succeeded).await;
    pipeline.control(json!({"v": 1, "command": "cancel", "task_id": "t"})).await;
    pipeline.answered("settled").await;
    assert!(pipeline.terminal_events("t").iter().all(|event| event.event_id == first.event_id));
}

#[tokio::test(start_paused = true)]
async fn a_waiting_task_is_cancelled_at_once() {
    let pipeline = Pipeline::start().await;
    pipeline.script("first", [Script::Take(Duration::from_mins(10))]);
    pipeline.publish(&clone_task("first", 1)).await;
    pipeline.saw("first", Status::Started).await;
    pipeline.publish(&task("waiting", Kind::Pull, 1)).await;
    pipeline.saw("waiting", Status::Accepted).await;
    pipeline.control(json!({"v": 1, "command": "cancel", "task_id": "waiting"})).await;
    pipeline.ends("waiting", Status::Cancelled).await;
    assert_eq!(pipeline.terminal_events("first").len(), 0);
    assert_eq!(pipeline.executions("waiting"), 0);
}

#[tokio::test(start_paused = true)]
async fn a_task_in_retry_is_cancelled_at_once_and_its_copy_is_acknowledged_on_return() {
    let pipeline = Pipeline::start().await;
    pipeline.script("t", [Script::Fail(ErrorClass::Network); 4]);
    pipeline.publish(&clone_task("t", 1)).await;
    pipeline.saw("t", Status::Retrying).await;
    pipeline.control(json!({"v": 1, "command": "cancel", "task_id": "t"})).await;
    let cancelled = pipeline.ends("t", Status::Cancelled).await;
    pipeline.drained().await;
    assert_eq!(pipeline.executions("t"), 1);
    assert!(pipeline.terminal_events("t").iter().all(|event| event.event_id == cancelled.event_id));
}

#[tokio::test(start_paused = true)]
async fn a_cancel_may_come_before_its_task() {
    let pipeline = Pipeline::start().await;
    pipeline.control(json!({"v": 1, "command": "cancel", "task_id": "t"})).await;
    pipeline.answered("pending").await;
    pipeline.publish(&clone_task("t", 1)).await;
    pipeline.ends("t", Status::Cancelled).await;
    assert_eq!(pipeline.executions("t"), 0);
}

#[tokio::test(start_paused = true)]
async fn a_pause_takes_no_more_survives_a_restart_and_a_resume_takes_again() {
    let mut pipeline = Pipeline::start().await;
    pipeline.control(json!({"v": 1, "command": "pause"})).await;
    pipeline.answered("paused").await;
    pipeline.publish(&clone_task("t", 1)).await;
    pipeline.restart().await;
    tokio::time::sleep(Duration::from_mins(1)).await;
    assert_eq!(pipeline.executions("t"), 0);
    assert_eq!(pipeline.depth("haul.node.n1"), 1);
    pipeline.control(json!({"v": 1, "command": "resume"})).await;
    pipeline.ends("t", Status::Succeeded).await;
}

#[tokio::test(start_paused = true)]
async fn inspect_says_how_the_agent_is_and_a_wrong_command_is_refused() {
    let pipeline = Pipeline::start().await;
    pipeline.control(json!({"v": 1, "command": "inspect"})).await;
    let state = pipeline.answered("state").await;
    assert_eq!((state.paused, state.running, state.waiting), (Some(false), Some(0), Some(0)));
    pipeline.control(json!({"v": 1, "command": "cancel"})).await;
    assert!(pipeline.answered("refused").await.reason.unwrap().contains("task_id"));
}

#[tokio::test(start_paused = true)]
async fn a_drain_finishes_what_runs_and_gives_back_the_rest_without_charging_it() {
    let mut pipeline = Pipeline::start().await;
    pipeline.script("runs", [Script::Take(Duration::from_secs(10))]);
    pipeline.publish(&clone_task("runs", 1)).await;
    pipeline.saw("runs", Status::Started).await;
    pipeline.publish(&task("waits", Kind::Pull, 1)).await;
    pipeline.saw("waits", Status::Accepted).await;
    pipeline.control(json!({"v": 1, "command": "drain"})).await;
    pipeline.ended().await;
    assert_eq!(pipeline.terminal_events("runs").len(), 1);
    assert_eq!(pipeline.executions("waits"), 0);
    assert_eq!(pipeline.depth("haul.node.n1"), 1);
    pipeline.restart().await;
    assert_eq!(pipeline.ends("waits", Status::Succeeded).await.attempt, 1);
}

#[tokio::test(start_paused = true)]
async fn the_end_of_a_drain_is_told_after_its_begin_however_slow_that_is_to_publish() {
    let mut pipeline = Pipeline::start().await;
    pipeline.slow_down(".control.draining");
    pipeline.control(json!({"v": 1, "command": "drain"})).await;
    pipeline.ended().await;
    pipeline.answered("drained").await;
    assert_eq!(pipeline.answers(), ["draining", "drained"]);
}

#[tokio::test(start_paused = true)]
async fn a_second_signal_ends_what_runs_and_charges_it_nothing() {
    let mut pipeline = Pipeline::start().await;
    for _ in 0..4 {
        pipeline.script("t", [Script::UntilStopped]);
        if pipeline.executions("t") == 0 {
            pipeline.publish(&clone_task("t", 1)).await;
        }
        pipeline.saw("t", Status::Started).await;
        pipeline.stop_now().await;
        pipeline.forget_events();
        pipeline.restart().await;
    }
    pipeline.script("t", [Script::Succeed]);
    pipeline.stop_now().await;
    pipeline.restart().await;
    let event = pipeline.ends("t", Status::Succeeded).await;
    assert_eq!(event.attempt, 1, "a stop by the operator is no attempt and no crash");
}

#[tokio::test(start_paused = true)]
async fn a_lost_connection_loses_nothing_and_runs_nothing_twice_at_once() {
    let pipeline = Pipeline::start().await;
    for number in 0..20 {
        pipeline.script(&format!("t{number}"), [Script::Take(Duration::from_secs(3))]);
        pipeline.publish(&clone_task(&format!("t{number}"), number)).await;
    }
    for _ in 0..8 {
        tokio::time::sleep(Duration::from_millis(1300)).await;
        pipeline.broker.cut();
    }
    for number in 0..20 {
        pipeline.ends(&format!("t{number}"), Status::Succeeded).await;
        let ends = pipeline.terminal_events(&format!("t{number}"));
        assert!(ends.iter().all(|event| event.event_id == ends[0].event_id), "one terminal state");
        assert_eq!(pipeline.executions(&format!("t{number}")), 1);
    }
    pipeline.drained().await;
    assert!(!pipeline.overlapped());
}

/// Crashes, lost connections, duplicates, cancels and failures of every kind, in an order that the seed decides.
#[tokio::test(start_paused = true)]
async fn every_accepted_task_reaches_exactly_one_terminal_state_a_round() {
    for seed in 1..=12_u64 {
        let mut chance = Chance(seed);
        let mut pipeline = Pipeline::start().await;
        let mut tasks = Vec::new();
        for number in 0..60_i64 {
            let id = format!("s{seed}-{number}");
            let project = i64::try_from(chance.below(6)).unwrap();
            let body = match chance.below(4) {
                0 => task(&id, Kind::Pull, project),
                1 => task(&id, Kind::Delete, project),
                2 => task(&id, Kind::Status, project),
                _ => clone_task(&id, project),
            };
            let script = [
                Script::Succeed,
                Script::Take(Duration::from_millis(700)),
                Script::Take(Duration::from_secs(20)),
                Script::Fail(ErrorClass::Network),
                Script::Fail(ErrorClass::Auth),
                Script::Fail(ErrorClass::Disk),
                Script::Fail(ErrorClass::Conflict),
            ];
            for _ in 0..chance.below(3) {
                pipeline.script(&id, [script[chance.below(script.len())]]);
            }
            pipeline.publish(&body).await;
            match chance.below(12) {
                0 => pipeline.broker.cut(),
                1 => {
                    pipeline.crash().await;
                    pipeline.restart().await;
                }
                2 => pipeline.publish(&body).await,
                3 => pipeline.control(json!({"v": 1, "command": "cancel", "task_id": id})).await,
                4 => pipeline.broker.lose_confirm_once(),
                5 => tokio::time::sleep(Duration::from_secs(3)).await,
                _ => {}
            }
            tasks.push(id);
        }
        for id in &tasks {
            let ends = pipeline.ended_somehow(id).await;
            assert!(ends.iter().all(|event| event.event_id == ends[0].event_id), "seed {seed}: {ends:#?}");
        }
        pipeline.drained().await;
        assert!(!pipeline.overlapped(), "seed {seed}: two tasks of one project ran at once");
        let failed = tasks.iter().filter(|id| pipeline.must_be_dead_lettered(id)).count();
        assert_eq!(pipeline.distinct_dead_letters(), failed, "seed {seed}");
    }
}

/// Numbers that only the seed decides (xorshift64).
struct Chance(u64);

impl Chance {
    #[expect(clippy::unwrap_used, reason = "a number below a usize is one")]
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % limit as u64).unwrap()
    }
}

#[tokio::test(start_paused = true)]
async fn a_full_dead_letter_queue_holds_back_half_a_window_and_no_more() {
    let pipeline = Pipeline::start().await;
    pipeline.broker.set_limit("haul.dead", Some(0));
    let failing = usize::from(support::pipeline::WINDOW) * 2;
    for number in 0..failing {
        let id = format!("f{number}");
        pipeline.script(&id, [Script::Fail(ErrorClass::Auth)]);
        pipeline.publish(&clone_task(&id, i64::try_from(number).unwrap())).await;
    }
    tokio::time::sleep(Duration::from_mins(2)).await;
    let run = (0..failing).filter(|number| pipeline.executions(&format!("f{number}")) > 0).count();
    let half = usize::from(support::pipeline::WINDOW) / 2;
    assert!((half..=usize::from(support::pipeline::WINDOW)).contains(&run), "{run} tasks ran");
    pipeline.broker.set_limit("haul.dead", None);
    for number in 0..failing {
        pipeline.ends(&format!("f{number}"), Status::Failed).await;
    }
    pipeline.drained().await;
    assert_eq!(pipeline.dead_letters(), failing);
}

#[tokio::test(start_paused = true)]
async fn a_journal_that_cannot_write_stops_consumption_and_gives_back() {
    let pipeline = Pipeline::start().await;
    pipeline.until_ready(true).await;
    pipeline.journal_full(true);
    pipeline.publish(&clone_task("t", 1)).await;
    pipeline.until_ready(false).await;
    assert_eq!(pipeline.executions("t"), 0);
    pipeline.journal_full(false);
    pipeline.ends("t", Status::Succeeded).await;
    pipeline.until_ready(true).await;
}

#[tokio::test(start_paused = true)]
async fn after_two_unclean_starts_one_delivery_is_taken_at_a_time_until_one_settles() {
    let mut pipeline = Pipeline::start().await;
    for _ in 0..2 {
        pipeline.until_ready(true).await;
        pipeline.crash().await;
        pipeline.restart().await;
    }
    for number in 0..4 {
        pipeline.script(&format!("t{number}"), [Script::Take(Duration::from_secs(5))]);
        pipeline.publish(&clone_task(&format!("t{number}"), number)).await;
    }
    pipeline.saw("t0", Status::Started).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let started = (0..4).filter(|number| pipeline.executions(&format!("t{number}")) > 0).count();
    assert_eq!(started, 1);
    for number in 0..4 {
        pipeline.ends(&format!("t{number}"), Status::Succeeded).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_task_that_was_running_at_three_crashes_is_dead_lettered_and_its_neighbours_are_not() {
    let mut pipeline = Pipeline::start().await;
    pipeline.script("killer", [Script::UntilStopped; 3]);
    pipeline.publish(&clone_task("killer", 1)).await;
    for _ in 0..3 {
        pipeline.saw("killer", Status::Started).await;
        pipeline.crash().await;
        pipeline.forget_events();
        pipeline.restart().await;
    }
    let event = pipeline.ends("killer", Status::Failed).await;
    assert_eq!(event.error.unwrap().class, ErrorClass::Crashed);
    pipeline.publish(&clone_task("innocent", 2)).await;
    pipeline.ends("innocent", Status::Succeeded).await;
    assert_eq!(pipeline.dead_letters(), 1);
}

#[tokio::test(start_paused = true)]
async fn what_was_owed_at_a_crash_is_paid_at_the_next_start_with_the_same_identity() {
    let mut pipeline = Pipeline::start().await;
    pipeline.script("t", [Script::Fail(ErrorClass::Auth)]);
    pipeline.broker.set_limit("haul.master.event", Some(0));
    pipeline.publish(&clone_task("t", 1)).await;
    pipeline.reached(Step::DeadLetterStruck).await;
    pipeline.crash().await;
    pipeline.broker.set_limit("haul.master.event", None);
    pipeline.restart().await;
    pipeline.ends("t", Status::Failed).await;
    pipeline.drained().await;
    let ends = pipeline.terminal_events("t");
    assert!(ends.iter().all(|event| event.event_id == ends[0].event_id));
    assert_eq!(pipeline.dead_letters(), 1);
    assert_eq!(pipeline.executions("t"), 1);
}

#[tokio::test(start_paused = true)]
async fn what_is_no_task_is_dead_lettered_with_the_reason_and_harms_nobody() {
    let pipeline = Pipeline::start().await;
    let named = json!({"v": 1, "task_id": "named", "kind": "clone", "project_id": 3, "git_url": "ext::sh -c id", "target_path": "x"});
    let bodies: Vec<Vec<u8>> = vec![
        b"not json".to_vec(),
        vec![0xff, 0xfe],
        b"{\"v\":1}".to_vec(),
        [b"[".repeat(10_000), b"]".repeat(10_000)].concat(),
        b"x".repeat(1 << 20),
        named.to_string().into_bytes(),
        json!({"v": 2, "task_id": "later", "kind": "clone", "project_id": 3}).to_string().into_bytes(),
    ];
    let count = bodies.len();
    for body in bodies {
        let mut message = Pipeline::message(&clone_task("ignored", 1));
        message.body = body.into();
        message.set(header::ROUND, -5);
        message.set(header::ATTEMPT, i64::MAX);
        message.set("x-death", HeaderValue::Other);
        pipeline.put("haul.task", "n1", message).await;
    }
    pipeline.publish(&clone_task("fine", 9)).await;
    pipeline.ends("fine", Status::Succeeded).await;
    assert_eq!(pipeline.ends("named", Status::Rejected).await.error.unwrap().class, ErrorClass::Invalid);
    pipeline.ends("later", Status::Rejected).await;
    pipeline.drained().await;
    assert_eq!(pipeline.dead_letters(), count);
}

#[tokio::test(start_paused = true)]
async fn what_the_agent_does_not_support_is_rejected_by_name() {
    let pipeline = Pipeline::start().await;
    let mut odd = clone_task("t", 1);
    odd["submodules"] = true.into();
    pipeline.publish(&odd).await;
    let event = pipeline.ends("t", Status::Rejected).await;
    assert!(event.error.unwrap().message.contains("submodules"));
}

#[tokio::test(start_paused = true)]
async fn priority_decides_who_goes_first_in_the_window() {
    let pipeline = Pipeline::start().await;
    for slot in 0..2 {
        pipeline.script(&format!("busy{slot}"), [Script::Take(Duration::from_secs(30))]);
        pipeline.publish(&clone_task(&format!("busy{slot}"), slot)).await;
        pipeline.saw(&format!("busy{slot}"), Status::Started).await;
    }
    for (number, priority) in ["idle", "low", "normal", "high", "critical"].into_iter().enumerate() {
        let mut task = clone_task(priority, 10 + i64::try_from(number).unwrap());
        task["priority"] = priority.into();
        task["generation"] = 1.into();
        pipeline.script(priority, [Script::Take(Duration::from_secs(30))]);
        pipeline.publish(&task).await;
        pipeline.saw(priority, Status::Accepted).await;
    }
    pipeline.ends("idle", Status::Succeeded).await;
    let order = pipeline.start_order();
    let urgent: Vec<_> = order.iter().filter(|id| !id.starts_with("busy")).collect();
    assert_eq!(urgent, ["critical", "high", "normal", "low", "idle"]);
}

#[tokio::test(start_paused = true)]
async fn a_status_task_is_answered_while_every_slot_is_busy() {
    let pipeline = Pipeline::start().await;
    for slot in 0..2 {
        pipeline.script(&format!("busy{slot}"), [Script::Take(Duration::from_mins(5))]);
        pipeline.publish(&clone_task(&format!("busy{slot}"), slot)).await;
    }
    pipeline.publish(&task("status", Kind::Status, 9)).await;
    pipeline.ends("status", Status::Succeeded).await;
    assert_eq!(pipeline.terminal_events("busy0").len(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_second_agent_on_the_same_queue_is_refused_in_a_sentence() {
    let pipeline = Pipeline::start().await;
    let refused = pipeline.second_agent().await.unwrap_err();
    assert!(refused.to_string().contains("haul.node.n1"), "{refused}");
}

#[tokio::test(start_paused = true)]
async fn an_event_that_no_queue_takes_is_owed_until_one_does() {
    let pipeline = Pipeline::start().await;
    pipeline.broker.set_limit("haul.master.event", Some(0));
    pipeline.publish(&clone_task("t", 1)).await;
    pipeline.reached(Step::Settled).await;
    tokio::time::sleep(Duration::from_secs(90)).await;
    assert_eq!(pipeline.terminal_events("t").len(), 0);
    assert!(!pipeline.steps("t").contains(&Step::Acked));
    pipeline.broker.set_limit("haul.master.event", None);
    pipeline.ends("t", Status::Succeeded).await;
    pipeline.drained().await;
}

#[tokio::test(start_paused = true)]
async fn the_trace_of_a_task_is_carried_to_its_events() {
    let pipeline = Pipeline::start().await;
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let mut message = Pipeline::message(&clone_task("t", 1));
    message.set(header::TRACEPARENT, trace);
    pipeline.put("haul.task", "n1", message).await;
    pipeline.ends("t", Status::Succeeded).await;
    assert_eq!(pipeline.trace_of("t"), Some(trace.to_owned()));
    pipeline.broker.close().await;
}

#[tokio::test(start_paused = true)]
async fn a_history_is_told_of_after_the_end() {
    let pipeline = Pipeline::start().await;
    pipeline.script("t", [Script::TreeFirst]);
    pipeline.script_history("t", [Script::Take(Duration::from_mins(3))]);
    pipeline.publish(&clone_task("t", 1)).await;
    let end = pipeline.ends("t", Status::Succeeded).await;
    assert_eq!(end.result.unwrap().history.as_deref(), Some("pending"));
    // The delivery does not wait for it.
    pipeline.drained().await;
    let told = pipeline.saw("t", Status::History).await;
    assert_eq!(told.result.unwrap().history.as_deref(), Some("attached"));
    assert_eq!(serde_json::to_value(told.project_status).unwrap(), "ACTIVE");
    assert!(told.error.is_none() && told.at.duration_since(end.at).as_secs() >= 180);
    assert_eq!(pipeline.statuses("t"), [Status::Started, Status::Succeeded, Status::History]);
    pipeline.reached(Step::HistoryStruck).await;
    // Told once, whatever comes again.
    pipeline.publish(&clone_task("t", 1)).await;
    pipeline.told("t", 2).await;
    pipeline.drained().await;
    assert_eq!(pipeline.statuses("t").iter().filter(|status| **status == Status::History).count(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_crash_before_a_history_is_attached_loses_nothing() {
    for step in [Step::Settled, Step::EventStruck, Step::Acked] {
        let mut pipeline = Pipeline::start().await;
        pipeline.script("t", [Script::TreeFirst]);
        pipeline.script_history("t", [Script::UntilStopped]);
        pipeline.publish(&clone_task("t", 1)).await;
        pipeline.reached(step).await;
        pipeline.crash().await;
        pipeline.restart().await;
        pipeline.saw("t", Status::History).await;
        pipeline.drained().await;
        assert_eq!(pipeline.executions("t"), 1, "{step}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_history_that_is_stopped_goes_on_at_the_next_start() {
    let mut pipeline = Pipeline::start().await;
    pipeline.script("t", [Script::TreeFirst]);
    pipeline.script_history("t", [Script::UntilStopped]);
    pipeline.publish(&clone_task("t", 1)).await;
    pipeline.reached(Step::Acked).await;
    pipeline.stop_now().await;
    assert!(!pipeline.statuses("t").contains(&Status::History));
    pipeline.restart().await;
    assert!(pipeline.saw("t", Status::History).await.error.is_none());
}

#[tokio::test(start_paused = true)]
async fn a_crash_after_a_history_is_attached_tells_of_it_all_the_same() {
    for step in [Step::HistoryDone, Step::HistoryNoted, Step::HistoryConfirmed] {
        let mut pipeline = Pipeline::start().await;
        pipeline.script("t", [Script::TreeFirst]);
        pipeline.publish(&clone_task("t", 1)).await;
        pipeline.reached(step).await;
        pipeline.crash().await;
        pipeline.restart().await;
        let told = pipeline.saw("t", Status::History).await;
        assert!(told.error.is_none(), "{step}: {told:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_history_whose_project_was_deleted_is_dropped_and_not_told_of() {
    let mut pipeline = Pipeline::start().await;
    pipeline.script("t", [Script::TreeFirst]);
    pipeline.script_history("t", [Script::Fail(ErrorClass::Network)]);
    pipeline.publish(&clone_task("t", 1)).await;
    pipeline.ends("t", Status::Succeeded).await;
    pipeline.publish(&task("d", Kind::Delete, 1)).await;
    pipeline.ends("d", Status::Succeeded).await;
    pipeline.reached(Step::HistoryNoted).await;
    pipeline.drained().await;
    pipeline.restart().await;
    pipeline.until_ready(true).await;
    assert!(!pipeline.statuses("t").contains(&Status::History));
}

#[tokio::test(start_paused = true)]
async fn a_pull_waits_while_a_history_is_attached() {
    let pipeline = Pipeline::start().await;
    pipeline.script("t", [Script::TreeFirst]);
    pipeline.script_history("t", [Script::Take(Duration::from_mins(2))]);
    pipeline.publish(&clone_task("t", 1)).await;
    pipeline.ends("t", Status::Succeeded).await;
    pipeline.publish(&task("p", Kind::Pull, 1)).await;
    pipeline.publish(&task("other", Kind::Pull, 2)).await;
    pipeline.ends("other", Status::Succeeded).await;
    pipeline.ends("p", Status::Succeeded).await;
    pipeline.saw("t", Status::History).await;
    assert_eq!(pipeline.start_order(), ["t", "history-of-t", "other", "p"]);
    assert!(!pipeline.overlapped());
}

#[tokio::test(start_paused = true)]
async fn a_history_that_fails_is_tried_again_and_then_given_up_with_the_reason() {
    let pipeline = Pipeline::start().await;
    pipeline.script("t", [Script::TreeFirst]);
    pipeline.script_history("t", [Script::Fail(ErrorClass::Network); 2]);
    pipeline.publish(&clone_task("t", 1)).await;
    assert!(pipeline.saw("t", Status::History).await.error.is_none());
    pipeline.script("u", [Script::TreeFirst]);
    pipeline.script_history("u", [Script::Fail(ErrorClass::Network); 5]);
    pipeline.publish(&clone_task("u", 2)).await;
    let told = pipeline.saw("u", Status::History).await;
    assert_eq!(told.error.unwrap().class, ErrorClass::Network);
    assert_eq!(serde_json::to_value(told.project_status).unwrap(), "ACTIVE", "its tree is there all the same");
    assert_eq!(pipeline.dead_letters(), 0);
    pipeline.script("v", [Script::TreeFirst]);
    pipeline.script_history("v", [Script::Fail(ErrorClass::Conflict)]);
    pipeline.publish(&clone_task("v", 3)).await;
    assert_eq!(pipeline.saw("v", Status::History).await.error.unwrap().class, ErrorClass::Conflict);
}

#[tokio::test(start_paused = true)]
async fn the_wait_of_a_history_outlives_a_restart_and_its_failures_are_counted_on() {
    let mut pipeline = Pipeline::start().await;
    pipeline.script("t", [Script::TreeFirst]);
    pipeline.script_history("t", [Script::Fail(ErrorClass::Network); 5]);
    pipeline.publish(&clone_task("t", 1)).await;
    pipeline.ends("t", Status::Succeeded).await;
    tokio::time::sleep(Duration::from_millis(1700)).await;
    pipeline.restart().await;
    let told = pipeline.saw("t", Status::History).await;
    assert!(told.error.is_some(), "five tries in all, whatever happened in between");
    assert!(pipeline.executions("history-of-t") <= 6, "{}", pipeline.executions("history-of-t"));
}
