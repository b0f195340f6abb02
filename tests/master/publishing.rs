//! Publishing: confirmed, or a typed error that says what is known; within the deadline whatever the broker does.

use std::time::Duration;

use haul::{
    broker::{Broker as _, Names},
    master::{Client, ClientSettings, Submission, Unpublished},
    protocol::wire::{LARGEST_BODY, decode_task},
};
use tokio::time::Instant;

use crate::{
    away::{Away, Link},
    client, clone_of, fleet, node,
};

const DEADLINE: Duration = Duration::from_secs(10);

#[tokio::test(start_paused = true)]
async fn a_published_task_is_in_the_queue_of_its_node_with_its_trace() {
    let (memory, names) = fleet().await;
    let task =
        Submission::pull(42).traceparent("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01").build().unwrap();
    client(memory.clone()).publish(&node("n1"), &task).await.unwrap();
    let message = memory.messages(&names.node(&node("n1"))).remove(0);
    assert_eq!(message.traceparent(), Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"));
    assert_eq!(message.message_id.as_deref(), Some(task.task_id().as_str()));
    assert_eq!(decode_task(&message).unwrap().id, *task.task_id());
    assert!(message.body.len() < LARGEST_BODY && message.priority == Some(4));
}

#[tokio::test(start_paused = true)]
async fn a_node_that_is_not_enrolled_is_an_error_at_once_and_is_named() {
    let (memory, _) = fleet().await;
    let begun = Instant::now();
    let error = client(memory).publish(&node("nobody"), &clone_of(1)).await.unwrap_err();
    assert_eq!(error, Unpublished::NotEnrolled { node: node("nobody") });
    assert_eq!(begun.elapsed(), Duration::ZERO);
    assert!(error.to_string().contains("haul topology apply --node nobody"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn with_the_broker_away_the_deadline_is_kept_and_nothing_was_sent() {
    let (memory, names) = fleet().await;
    let away = Away::new(memory.clone(), Link::Down);
    let begun = Instant::now();
    let error = client(away.clone()).publish(&node("n1"), &clone_of(1)).await.unwrap_err();
    assert!(matches!(error, Unpublished::NotSent { .. }) && !error.may_have_arrived(), "{error}");
    assert_eq!(begun.elapsed(), DEADLINE);
    away.is_now(Link::Up);
    assert!(memory.messages(&names.node(&node("n1"))).is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_broker_that_comes_back_within_the_deadline_gets_the_task() {
    let (memory, names) = fleet().await;
    let away = Away::new(memory.clone(), Link::Down);
    let client = client(away.clone());
    let (n1, task) = (node("n1"), clone_of(1));
    let (published, ()) = tokio::join!(client.publish_within(&n1, &task, DEADLINE), async {
        tokio::time::sleep(DEADLINE.mul_f64(0.9)).await;
        away.is_now(Link::Up);
    });
    published.unwrap();
    assert_eq!(memory.messages(&names.node(&node("n1"))).len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_lost_confirm_is_in_doubt_and_the_same_task_may_be_published_again() {
    for link in [Link::Mute, Link::BackMute] {
        let (memory, names) = fleet().await;
        let away = Away::new(memory.clone(), link);
        let (client, task) = (client(away.clone()), clone_of(1));
        let begun = Instant::now();
        let error = client.publish(&node("n1"), &task).await.unwrap_err();
        assert!(matches!(error, Unpublished::InDoubt { .. }) && error.may_have_arrived(), "{link:?}: {error}");
        assert_eq!(begun.elapsed(), DEADLINE);
        away.is_now(Link::Up);
        client.publish(&node("n1"), &task).await.unwrap();
        let bodies: Vec<_> =
            memory.messages(&names.node(&node("n1"))).into_iter().map(|message| message.body).collect();
        assert_eq!(bodies.len(), 2);
        assert_eq!(bodies[0], bodies[1], "a duplicate to the byte");
    }
}

#[tokio::test(start_paused = true)]
async fn a_confirm_that_is_lost_once_is_made_up_for_within_the_deadline() {
    let (memory, _) = fleet().await;
    memory.lose_confirm_once();
    client(memory).publish(&node("n1"), &clone_of(1)).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_queue_that_refuses_is_tried_until_the_deadline() {
    let (memory, names) = fleet().await;
    memory.set_limit(&names.node(&node("n1")), 0);
    let client = client(memory.clone());
    let error = client.publish(&node("n1"), &clone_of(1)).await.unwrap_err();
    assert!(matches!(error, Unpublished::Refused { .. }), "{error}");
    let (n1, task) = (node("n1"), clone_of(2));
    let (published, ()) = tokio::join!(client.publish(&n1, &task), async {
        tokio::time::sleep(Duration::from_secs(3)).await;
        memory.set_limit(&names.node(&node("n1")), None);
    });
    published.unwrap();
}

#[tokio::test(start_paused = true)]
async fn without_the_fleets_exchanges_the_error_says_what_to_run() {
    let error = client(haul::broker::memory::Memory::new()).publish(&node("n1"), &clone_of(1)).await.unwrap_err();
    assert!(matches!(error, Unpublished::Forbidden { .. }), "{error}");
    assert!(error.to_string().contains("haul topology apply"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_batch_is_answered_task_by_task_in_its_order() {
    let (memory, names) = fleet().await;
    let tasks: Vec<_> =
        (0..2000).map(|number| (node(if number % 10 == 3 { "nobody" } else { "n1" }), clone_of(number))).collect();
    let settings = ClientSettings { in_flight: 64, ..ClientSettings::default() };
    let client = Client::new(std::sync::Arc::new(memory.clone()), Names::default(), settings);
    let answers = client.publish_all(tasks.clone()).await;
    for (number, answer) in answers.iter().enumerate() {
        assert_eq!(answer.is_err(), number % 10 == 3, "{number}: {answer:?}");
    }
    assert_eq!(memory.depth(&names.node(&node("n1"))).await.unwrap().unwrap().messages, 1800);
}
