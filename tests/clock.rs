//! The wall clock is put forward and back by days while tasks wait, under virtual time: nothing is lost, nothing is held
//! for longer than it would have been, and nothing is forgotten or given up because of it.

mod support;

use std::time::Duration;

use haul::{
    failure::ErrorClass,
    protocol::{Kind, Status},
    retry::RetrySettings,
};
use serde_json::json;
use support::pipeline::{Pipeline, Script, clone_task, task};
use tokio::time::Instant;

/// Steps that a clock takes here, in days.
const STEPS: [i64; 4] = [3, -3, 400, -400];

fn minutes(begun: Instant) -> u64 {
    begun.elapsed().as_secs() / 60
}

#[tokio::test(start_paused = true)]
async fn a_retry_is_neither_lost_nor_held_when_the_clock_steps() {
    for days in STEPS {
        let pipeline = Pipeline::start().await;
        pipeline.script("t", [Script::Fail(ErrorClass::Network); 4]);
        pipeline.publish(&clone_task("t", 1)).await;
        pipeline.saw("t", Status::Retrying).await;
        let begun = Instant::now();
        pipeline.step_clock(days);
        let event = pipeline.ends("t", Status::Succeeded).await;
        assert_eq!((event.attempt, pipeline.executions("t")), (5, 5), "{days}");
        assert!(minutes(begun) < 1, "after {days} days it took {:?}", begun.elapsed());
        assert!(event.result.unwrap().duration_ms.unwrap() < 1000, "time spent does not depend on the clock");
        for retrying in pipeline.events("t").into_iter().filter(|event| event.status == Status::Retrying) {
            let wait = retrying.error.unwrap().retry_at.unwrap().duration_since(retrying.at);
            assert!((0..60).contains(&wait.as_secs()), "{days}: {wait}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_retry_that_asks_for_a_moment_far_away_is_not_held_for_days() {
    let pipeline = Pipeline::start().await;
    // As a hostile copy, or one of an agent whose clock was wrong and that knew nothing of what is left.
    let mut message = Pipeline::message(&clone_task("t", 1));
    let year = pipeline.now().as_millisecond() + 365 * 86_400_000;
    message.set(haul::protocol::wire::header::NOT_BEFORE, year);
    let begun = Instant::now();
    pipeline.put("haul.task", "n1", message).await;
    pipeline.ends("t", Status::Succeeded).await;
    let longest = RetrySettings::default().longest_wait();
    assert!(begun.elapsed() <= longest + Duration::from_secs(5), "{:?} of {longest:?}", begun.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_deferred_task_is_not_given_up_when_the_clock_steps_and_is_in_time() {
    for days in STEPS {
        let pipeline = Pipeline::start().await;
        pipeline.script("t", [Script::Fail(ErrorClass::Disk); 6]);
        pipeline.publish(&clone_task("t", 1)).await;
        pipeline.saw("t", Status::Retrying).await;
        let begun = Instant::now();
        pipeline.step_clock(days);
        let event = pipeline.ends("t", Status::Succeeded).await;
        assert_eq!((event.attempt, pipeline.executions("t")), (1, 7), "{days}");
        assert!(minutes(begun) < 10, "after {days} days it took {:?}", begun.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_deferred_for_longer_than_allowed_fails_however_the_clock_steps() {
    for days in STEPS {
        let retry = RetrySettings { defer_max: Duration::from_mins(10), ..RetrySettings::default() };
        let pipeline = Pipeline::start_with(retry).await;
        pipeline.script("t", [Script::Fail(ErrorClass::Disk); 400]);
        pipeline.publish(&clone_task("t", 1)).await;
        pipeline.saw("t", Status::Retrying).await;
        let begun = Instant::now();
        pipeline.step_clock(days);
        pipeline.ends("t", Status::Failed).await;
        assert!((9..=25).contains(&minutes(begun)), "after {days} days it took {:?}", begun.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn not_after_is_judged_by_the_clock_as_it_is_when_the_task_could_start() {
    for (days, expected) in [(1, Status::Rejected), (-1, Status::Succeeded)] {
        let pipeline = Pipeline::start().await;
        pipeline.script("first", [Script::Take(Duration::from_mins(3))]);
        pipeline.publish(&clone_task("first", 1)).await;
        pipeline.saw("first", Status::Started).await;
        let mut waits = clone_task("waits", 1);
        waits["not_after"] = json!((pipeline.now() + jiff::SignedDuration::from_hours(1)).to_string());
        pipeline.publish(&waits).await;
        pipeline.saw("waits", Status::Accepted).await;
        pipeline.step_clock(days);
        pipeline.ends("waits", expected).await;
        assert_eq!(pipeline.executions("waits"), usize::from(days < 0));
    }
}

#[tokio::test(start_paused = true)]
async fn records_are_not_forgotten_when_the_clock_steps_and_are_after_their_retention() {
    const RETENTION_AND_MORE: Duration = Duration::from_hours(15 * 24);
    for days in [30, -30] {
        let pipeline = Pipeline::start().await;
        pipeline.publish(&clone_task("t", 1)).await;
        pipeline.ends("t", Status::Succeeded).await;
        pipeline.drained().await;
        pipeline.step_clock(days);
        // Old records are looked for many times in this.
        tokio::time::sleep(Duration::from_hours(12 * 24)).await;
        pipeline.publish(&clone_task("t", 1)).await;
        pipeline.told("t", 2).await;
        assert_eq!(pipeline.executions("t"), 1, "{days}: a duplicate is answered from the journal");
        pipeline.drained().await;
        tokio::time::sleep(RETENTION_AND_MORE).await;
        if days < 0 {
            // It was seen at a date that has to come again.
            tokio::time::sleep(Duration::from_hours(24 * days.unsigned_abs())).await;
        }
        pipeline.publish(&clone_task("t", 1)).await;
        pipeline.told("t", 3).await;
        assert_eq!(pipeline.executions("t"), 2, "{days}: what was forgotten runs again");
    }
}

#[tokio::test(start_paused = true)]
async fn a_task_that_waits_is_known_after_a_forward_step_and_a_restart() {
    let mut pipeline = Pipeline::start().await;
    // So many deferrals that it waits for days.
    pipeline.script("t", [Script::Fail(ErrorClass::Throttled); 4]);
    pipeline.publish(&clone_task("t", 1)).await;
    pipeline.saw("t", Status::Retrying).await;
    pipeline.step_clock(60);
    pipeline.restart().await;
    tokio::time::sleep(Duration::from_hours(2)).await;
    pipeline.ends("t", Status::Succeeded).await;
    assert_eq!(pipeline.executions("t"), 5);
}

#[tokio::test(start_paused = true)]
async fn a_pull_waits_for_the_clone_of_its_project_however_the_clock_steps() {
    for days in STEPS {
        let mut pipeline = Pipeline::start().await;
        pipeline.script("clone", [Script::Fail(ErrorClass::Network); 4]);
        pipeline.publish(&clone_task("clone", 1)).await;
        pipeline.saw("clone", Status::Retrying).await;
        pipeline.step_clock(days);
        pipeline.publish(&task("pull", Kind::Pull, 1)).await;
        // Also where the agent starts anew meanwhile.
        if days > 100 {
            pipeline.restart().await;
        }
        let begun = Instant::now();
        pipeline.ends("pull", Status::Succeeded).await;
        pipeline.ends("clone", Status::Succeeded).await;
        let order = pipeline.start_order();
        assert_eq!(order.last().map(String::as_str), Some("pull"), "{days}: {order:?}");
        assert!(minutes(begun) < 2, "after {days} days it took {:?}", begun.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn a_task_that_comes_after_the_clock_was_put_back_is_newer_all_the_same() {
    for journal_is_lost in [false, true] {
        let mut pipeline = Pipeline::start().await;
        pipeline.step_clock(30);
        pipeline.publish(&clone_task("first", 1)).await;
        pipeline.ends("first", Status::Succeeded).await;
        pipeline.drained().await;
        pipeline.step_clock(-30);
        if journal_is_lost {
            // Only the project's own mark knows of that time.
            pipeline.crash_without_journal().await;
            pipeline.restart().await;
        }
        pipeline.script("second", [Script::Fail(ErrorClass::Network)]);
        for id in ["second", "third"] {
            pipeline.publish(&task(id, Kind::Pull, 1)).await;
            pipeline.ended_somehow(id).await;
        }
        // The retry of the second came back after the third was applied: by arrival it is the older one.
        assert_eq!(pipeline.terminal_events("third")[0].status, Status::Succeeded, "journal lost: {journal_is_lost}");
        let second = pipeline.terminal_events("second")[0].status;
        assert!([Status::Succeeded, Status::Superseded].contains(&second), "{second}");
        assert_eq!(pipeline.start_order().iter().filter(|id| *id == "third").count(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_replay_of_what_failed_under_another_clock_runs() {
    let pipeline = Pipeline::start().await;
    pipeline.step_clock(30);
    pipeline.script("t", [Script::Fail(ErrorClass::Network), Script::Fail(ErrorClass::Auth)]);
    pipeline.publish(&clone_task("t", 1)).await;
    pipeline.ends("t", Status::Failed).await;
    pipeline.step_clock(-30);
    let begun = Instant::now();
    pipeline.move_dead_letters_to("haul.node.n1").await;
    let event = pipeline.ends("t", Status::Succeeded).await;
    assert_eq!(event.round, 1);
    assert!(minutes(begun) < 1, "{:?}", begun.elapsed());
}

/// Steps, crashes, lost connections and failures, in an order that the seed decides.
#[tokio::test(start_paused = true)]
async fn every_task_ends_once_while_the_clock_steps_all_the_time() {
    for seed in 1..=8_u64 {
        let mut chance = Chance(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let mut pipeline = Pipeline::start().await;
        let mut tasks = Vec::new();
        for number in 0..40_i64 {
            let id = format!("s{seed}-{number}");
            let project = i64::try_from(chance.below(6)).unwrap_or(0);
            let body = match chance.below(3) {
                0 => task(&id, Kind::Pull, project),
                1 => task(&id, Kind::Delete, project),
                _ => clone_task(&id, project),
            };
            let script = [
                Script::Take(Duration::from_secs(2)),
                Script::Fail(ErrorClass::Network),
                Script::Fail(ErrorClass::Disk),
                Script::Fail(ErrorClass::Auth),
            ];
            for _ in 0..chance.below(3) {
                pipeline.script(&id, [script[chance.below(script.len())]]);
            }
            pipeline.publish(&body).await;
            match chance.below(8) {
                0 => {
                    pipeline.crash().await;
                    pipeline.restart().await;
                }
                1 => pipeline.broker.cut(),
                2 => tokio::time::sleep(Duration::from_secs(7)).await,
                _ => pipeline.step_clock(i64::try_from(chance.below(41)).unwrap_or(0) - 20),
            }
            tasks.push(id);
        }
        let begun = Instant::now();
        for id in &tasks {
            let ends = pipeline.ended_somehow(id).await;
            assert!(ends.iter().all(|event| event.event_id == ends[0].event_id), "seed {seed}: {ends:#?}");
        }
        pipeline.drained().await;
        assert!(begun.elapsed() < Duration::from_hours(2), "seed {seed}: it took {:?}", begun.elapsed());
        assert!(!pipeline.overlapped(), "seed {seed}");
        let failed = tasks.iter().filter(|id| pipeline.must_be_dead_lettered(id)).count();
        assert_eq!(pipeline.distinct_dead_letters(), failed, "seed {seed}");
    }
}

/// Numbers that only the seed decides (xorshift64).
struct Chance(u64);

impl Chance {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % limit as u64).unwrap_or(0)
    }
}
