//! What breaks the agent is given up after three times, and its neighbours are not: crashes and panics, under virtual
//! time. `tests/agent_faults.rs` has the same with a real process.

mod support;

use std::time::Duration;

use haul::{
    failure::ErrorClass,
    protocol::{Kind, Status, wire::header},
    worker::Step,
};
use support::pipeline::{Pipeline, Script, clone_task, task};

/// The class of a task's terminal event.
fn class(pipeline: &Pipeline, id: &str) -> Option<ErrorClass> {
    pipeline.terminal_events(id).first()?.error.as_ref().map(|error| error.class)
}

async fn crashes(pipeline: &mut Pipeline) {
    pipeline.crash().await;
    pipeline.restart().await;
}

#[tokio::test(start_paused = true)]
async fn neighbours_that_ran_beside_the_poison_are_tried_alone_and_end_well() {
    let mut pipeline = Pipeline::start().await;
    pipeline.script("poison", [Script::UntilStopped; 3]);
    pipeline.script("beside", [Script::UntilStopped; 2]);
    pipeline.publish(&clone_task("poison", 1)).await;
    pipeline.publish(&clone_task("beside", 2)).await;
    for number in 0..4 {
        pipeline.publish(&clone_task(&format!("waits{number}"), 10 + number)).await;
    }
    for _ in 0..2 {
        pipeline.until_executions(&["poison", "beside"]).await;
        crashes(&mut pipeline).await;
        pipeline.forget_executions();
    }
    // One delivery at a time from now on: the poison takes the agent down once more, alone.
    pipeline.until_executions(&["poison"]).await;
    assert_eq!(pipeline.executions("beside"), 0);
    crashes(&mut pipeline).await;
    pipeline.ends("poison", Status::Failed).await;
    assert_eq!(class(&pipeline, "poison"), Some(ErrorClass::Crashed));
    for id in ["beside", "waits0", "waits1", "waits2", "waits3"] {
        let event = pipeline.ends(id, Status::Succeeded).await;
        assert_eq!(event.attempt, 1, "{id}: a crash is no attempt");
    }
    pipeline.drained().await;
    assert_eq!(pipeline.dead_letters(), 1);
}

#[tokio::test(start_paused = true)]
async fn two_poisons_do_not_drag_down_whoever_runs_beside_them() {
    let mut pipeline = Pipeline::start().await;
    // Slots for two: the innocent one runs beside the first poison, the second waits.
    for id in ["poison1", "innocent", "poison2"] {
        pipeline.script(id, [Script::UntilStopped; 2]);
    }
    pipeline.script("poison1", [Script::UntilStopped]);
    pipeline.script("poison2", [Script::UntilStopped; 2]);
    for (number, id) in ["poison1", "innocent", "poison2"].into_iter().enumerate() {
        pipeline.publish(&clone_task(id, i64::try_from(number).unwrap())).await;
    }
    let mut rounds = 0;
    // Whenever a poison runs the agent dies of it a while later; nobody else takes that long by itself.
    while !["poison1", "poison2", "innocent"].iter().all(|id| !pipeline.terminal_events(id).is_empty()) {
        tokio::time::sleep(Duration::from_secs(30)).await;
        if pipeline.is_running(0) || pipeline.is_running(2) {
            crashes(&mut pipeline).await;
            rounds += 1;
        }
        assert!(rounds < 12, "it goes round for ever");
    }
    for id in ["poison1", "poison2"] {
        assert_eq!(class(&pipeline, id), Some(ErrorClass::Crashed), "{id}");
    }
    assert_eq!(pipeline.terminal_events("innocent")[0].status, Status::Succeeded);
    assert!(rounds <= 7, "{rounds} crashes");
}

#[tokio::test(start_paused = true)]
async fn a_task_that_waited_at_three_crashes_is_charged_nothing() {
    let mut pipeline = Pipeline::start().await;
    pipeline.script("poison", [Script::UntilStopped; 3]);
    pipeline.publish(&clone_task("poison", 1)).await;
    // Of the same project: it waits for its turn each time.
    pipeline.publish(&task("behind", Kind::Status, 1)).await;
    for _ in 0..3 {
        pipeline.until_executions(&["poison"]).await;
        crashes(&mut pipeline).await;
        pipeline.forget_executions();
    }
    pipeline.ends("poison", Status::Failed).await;
    let event = pipeline.ends("behind", Status::Succeeded).await;
    assert_eq!((event.attempt, pipeline.executions("behind")), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_message_that_breaks_the_decoder_is_dead_lettered_and_harms_nobody() {
    let pipeline = Pipeline::start().await;
    pipeline.until_ready(true).await;
    pipeline.break_at(Step::Received, "poison", 1);
    pipeline.publish(&clone_task("poison", 1)).await;
    let letter = pipeline.dead_letter().await;
    assert_eq!(letter.headers[header::ERROR_CLASS], "crashed".into());
    assert_eq!(letter.message_id.as_deref(), Some("poison"));
    pipeline.publish(&clone_task("fine", 2)).await;
    pipeline.ends("fine", Status::Succeeded).await;
    pipeline.drained().await;
    assert_eq!(pipeline.executions("poison"), 0);
}

#[tokio::test(start_paused = true)]
async fn a_task_whose_handling_panics_is_given_up_at_the_third_time_wherever_that_is() {
    let steps = [Step::Decoded, Step::Admitted, Step::Queued, Step::Turn, Step::Begun, Step::Executed, Step::Settled];
    for step in steps {
        let pipeline = Pipeline::start().await;
        pipeline.break_at(step, "poison", 3);
        pipeline.publish(&clone_task("poison", 1)).await;
        pipeline.publish(&clone_task("fine", 2)).await;
        pipeline.ends("fine", Status::Succeeded).await;
        if step == Step::Decoded {
            // Nobody knows its task yet.
            pipeline.dead_letter().await;
        } else {
            let ends = pipeline.ended_somehow("poison").await;
            // What was settled before it broke stands.
            let expected = if step == Step::Settled { Status::Succeeded } else { Status::Failed };
            assert!(ends.iter().all(|event| event.status == expected), "{step}: {ends:?}");
            assert!(ends.iter().all(|event| event.event_id == ends[0].event_id), "{step}: {ends:?}");
        }
        pipeline.drained().await;
        assert!(!pipeline.overlapped());
    }
}

#[tokio::test(start_paused = true)]
async fn a_task_whose_handling_panics_once_goes_on() {
    for step in [Step::Admitted, Step::Turn, Step::Begun, Step::Executed, Step::Settled, Step::EventConfirmed] {
        let pipeline = Pipeline::start().await;
        pipeline.break_at(step, "t", 1);
        pipeline.publish(&clone_task("t", 1)).await;
        let ends = pipeline.ended_somehow("t").await;
        assert_eq!(ends[0].status, Status::Succeeded, "{step}");
        pipeline.drained().await;
        assert_eq!(pipeline.dead_letters(), 0, "{step}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_panics_at_every_step_even_when_it_is_given_up_is_dead_lettered_without_a_look() {
    let pipeline = Pipeline::start().await;
    for step in [Step::Begun, Step::Settled] {
        pipeline.break_at(step, "poison", usize::MAX);
    }
    pipeline.publish(&clone_task("poison", 1)).await;
    let letter = pipeline.dead_letter().await;
    assert_eq!(letter.message_id.as_deref(), Some("poison"));
    pipeline.drained().await;
    pipeline.publish(&clone_task("fine", 2)).await;
    pipeline.ends("fine", Status::Succeeded).await;
}

#[tokio::test(start_paused = true)]
async fn a_task_that_the_journal_lost_while_it_ran_ends_once() {
    let pipeline = Pipeline::start().await;
    pipeline.script("t", [Script::Take(Duration::from_mins(1))]);
    pipeline.publish(&clone_task("t", 1)).await;
    pipeline.saw("t", Status::Started).await;
    pipeline.damage_journal();
    // Somebody else finds the damage, is given back and comes again.
    pipeline.publish(&clone_task("other", 2)).await;
    pipeline.ends("other", Status::Succeeded).await;
    let end = pipeline.ends("t", Status::Succeeded).await;
    pipeline.drained().await;
    assert_eq!(pipeline.executions("t"), 1);
    pipeline.publish(&clone_task("t", 1)).await;
    assert!(pipeline.told("t", 2).await.iter().all(|event| event.event_id == end.event_id));
    pipeline.until_ready(true).await;
}

#[tokio::test(start_paused = true)]
async fn a_journal_that_is_damaged_when_a_task_ends_gives_it_back_and_it_ends_once() {
    let pipeline = Pipeline::start().await;
    pipeline.script("t", [Script::Take(Duration::from_mins(1))]);
    pipeline.publish(&clone_task("t", 1)).await;
    pipeline.saw("t", Status::Started).await;
    pipeline.damage_journal();
    pipeline.ends("t", Status::Succeeded).await;
    pipeline.drained().await;
    pipeline.until_ready(true).await;
    assert_eq!((pipeline.executions("t"), pipeline.terminal_events("t").len()), (2, 1));
}
