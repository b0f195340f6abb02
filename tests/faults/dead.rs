//! Dead letters that nobody takes: nothing is lost, and what is owed is paid once somebody does.

use std::{collections::BTreeSet, time::Duration};

use haul::{broker::Broker as _, protocol::Status};
use serde_json::Value;

use crate::{
    blocking,
    support::{agent::Agent, repository::Repository},
    together,
};

/// A task that fails for good: nobody knows its project.
fn failing(number: usize) -> Value {
    Agent::task(&format!("fails-{number}"), "pull", i64::try_from(100 + number).unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_letter_exchange_that_is_missing_when_a_task_fails() {
    let (_together, rabbit) = together().await;
    let (mut agent, upstream) = (Agent::new(rabbit).await, Repository::new());
    agent.start(&[]);
    agent.ready().await;
    let exchange = agent.names.dlx();
    blocking(move || rabbit.delete_exchange(&exchange)).await;
    agent.publish(&failing(0)).await;
    agent.until_async("the letter not to be taken", async || agent.log().contains("owed message not taken")).await;
    // Others are not held up by it.
    agent.publish(&Agent::clone_task("fine", 1, &upstream, "1_app")).await;
    assert_eq!(agent.end("fine", 0).await.status, Status::Succeeded);
    // First the letter, then the word of the end.
    assert!(agent.terminal_states("fails-0", 0).is_empty());
    // The debt outlives the agent, which makes what is missing as it starts, where it may.
    agent.kill().await;
    agent.start(&[]);
    assert_eq!(agent.end("fails-0", 0).await.status, Status::Failed);
    agent.dead_letters(1).await;
    agent.drained().await;
    agent.each_ended_once();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_letter_queue_that_is_full_holds_back_half_a_window_and_no_more() {
    const WINDOW: usize = 8;
    const TASKS: usize = 4 * WINDOW;
    const TAKEN: usize = 3;
    let (_together, rabbit) = together().await;
    let mut agent = Agent::new(rabbit).await;
    agent.set("AGENT_WINDOW", &WINDOW.to_string());
    let (policy, pattern) = (agent.names.dead(), format!("^{}$", agent.names.dead().replace('.', "\\.")));
    let set = policy.clone();
    blocking(move || rabbit.ctl(&["set_policy", &set, &pattern, &format!(r#"{{"max-length":{TAKEN}}}"#)])).await;
    agent.start(&[]);
    for number in 0..TASKS {
        agent.publish(&failing(number)).await;
    }
    let begun = || {
        let events = agent.all_events().into_iter().filter(|event| event.status == Status::Started);
        events.map(|event| event.task_id.to_string()).collect::<BTreeSet<_>>().len()
    };
    // A quorum queue notices that it is full only after it is.
    let refused = async || agent.log().matches("owed message not taken").count() >= WINDOW;
    agent.until_async("letters to be refused", refused).await;
    // Time for it to take more than it should.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let queue = agent.names.dead();
    let taken = agent.master.depth(&queue).await.unwrap().unwrap().messages as usize;
    let held_back = begun() - taken;
    assert!((TAKEN..TASKS - WINDOW).contains(&taken), "{taken} letters were taken");
    assert!((WINDOW / 2..=WINDOW).contains(&held_back), "{held_back} tasks are held back; {taken} letters were taken");
    assert!(agent.is_running(), "{}", agent.log());
    blocking(move || rabbit.ctl(&["clear_policy", &policy])).await;
    for number in 0..TASKS {
        assert_eq!(agent.end(&format!("fails-{number}"), 0).await.status, Status::Failed);
    }
    agent.dead_letters(u32::try_from(TASKS).unwrap()).await;
    agent.drained().await;
    agent.each_ended_once();
}
