//! Reading events: acknowledged after the application has applied them, lenient, and without a loop of poison.

use std::time::Duration;

use haul::{
    broker::{Broker as _, Outgoing, memory::Memory},
    master::{Heard, Interest, News, Projection},
    protocol::{Control, Status, wire::Message},
};
use serde_json::json;

use crate::{client, fleet, node, runs::Sim};

async fn tell(memory: &Memory, message: Message, routing_key: &str) {
    let (exchange, routing_key) = ("haul.event".to_owned(), routing_key.to_owned());
    memory.publish(Outgoing { exchange, routing_key, message, mandatory: false }).await.unwrap();
}

/// A run of one task, told to the results exchange.
async fn tell_run(memory: &Memory) {
    for event in Sim::one_clone() {
        tell(memory, Message::event(&event, None), &event.routing_key()).await;
    }
}

#[tokio::test(start_paused = true)]
async fn what_was_not_acknowledged_comes_again_and_applying_it_twice_changes_nothing() {
    let (memory, names) = fleet().await;
    let client = client(memory.clone());
    let mut results = client.results().await.unwrap();
    tell_run(&memory).await;
    let mut projection = Projection::new();
    let mut apply = |news: &News| {
        let News::Event(event) = news else { panic!("{news:?}") };
        projection.apply(event).is_news()
    };
    // Applied, and the connection is lost before any acknowledgement.
    let mut held = Vec::new();
    for _ in 0..3 {
        let received = results.next().await.unwrap();
        assert!(apply(&received.news));
        held.push(received);
    }
    memory.cut();
    for received in held {
        assert!(received.ack().await.is_err(), "its channel is gone");
    }
    for _ in 0..3 {
        let received = results.next().await.unwrap();
        assert!(!apply(&received.news), "{:?}", received.news);
        received.ack().await.unwrap();
    }
    assert!(memory.messages(&names.master_event()).is_empty());
    assert_eq!(projection.tasks().next().unwrap().status(), Some(Status::Succeeded));
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_read_is_handed_out_once_and_does_not_block_or_loop() {
    let (memory, names) = fleet().await;
    let mut results = client(memory.clone()).results().await.unwrap();
    for body in ["{", "[]", "{\"v\":7}", "{\"status\":\"dreaming\"}"] {
        tell(&memory, Message { body: body.into(), ..Message::default() }, "n1.clone.failed").await;
    }
    tell_run(&memory).await;
    for acknowledged in [true, false, true, false] {
        let received = results.next().await.unwrap();
        assert!(matches!(received.news, News::Unreadable { .. }), "{:?}", received.news);
        if acknowledged { received.ack().await.unwrap() } else { received.give_back().await.unwrap() }
    }
    for _ in 0..3 {
        let received = results.next().await.unwrap();
        assert!(matches!(received.news, News::Event(_)), "{:?}", received.news);
        received.ack().await.unwrap();
    }
    assert!(memory.messages(&names.master_event()).is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_event_that_was_given_back_comes_again() {
    let (memory, _) = fleet().await;
    let mut results = client(memory.clone()).results().await.unwrap();
    tell_run(&memory).await;
    let first = results.next().await.unwrap();
    let news = first.news.clone();
    first.give_back().await.unwrap();
    let mut seen = Vec::new();
    for _ in 0..3 {
        let received = results.next().await.unwrap();
        seen.push(received.news.clone());
        received.ack().await.unwrap();
    }
    assert!(seen.contains(&news));
}

#[tokio::test(start_paused = true)]
async fn a_live_subscription_has_progress_and_says_when_it_missed_something() {
    let (memory, names) = fleet().await;
    let client = client(memory.clone());
    let mut live = client.follow(&Interest::all().node(&node("n1"))).await.unwrap();
    let progress = Sim::one_clone().into_iter().map(|event| haul::protocol::Event {
        status: Status::Progress,
        progress: Some(haul::protocol::Progress { phase: "receiving".to_owned(), ..Default::default() }),
        ..event
    });
    let progress = progress.into_iter().next().unwrap();
    tell(&memory, Message::event(&progress, None), &progress.routing_key()).await;
    let mut next =
        async || tokio::time::timeout(Duration::from_mins(1), live.next()).await.expect("something is heard");
    assert_eq!(next().await, Some(Heard::News(News::Event(Box::new(progress)))));
    assert!(memory.messages(&names.master_event()).is_empty(), "progress is not kept for anybody");
    memory.cut();
    assert_eq!(next().await, Some(Heard::Gap));
    // Lost and back while nobody looked.
    memory.cut();
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(next().await, Some(Heard::Gap));
}

/// Answers every command of node `n1` as an agent would, after dropping the first `ignored`.
fn answering(memory: &Memory, answer: &'static str, ignored: usize) {
    let memory = memory.clone();
    tokio::spawn(async move {
        let consume = haul::broker::Consume {
            queue: "haul.control.n1".to_owned(),
            tag: "agent".to_owned(),
            prefetch: 10,
            declare: haul::broker::Topology::default(),
        };
        let mut consumer = memory.consume(consume).await.unwrap();
        let mut count = 0;
        while let Some(delivery) = consumer.next().await {
            let asked: serde_json::Value = serde_json::from_slice(&delivery.message.body).unwrap();
            let _ = delivery.ack().await;
            count += 1;
            if count <= ignored {
                memory.cut();
                continue;
            }
            let body = json!({"v": 1, "event_id": "e", "at": "2026-01-02T03:04:05Z", "node": "n1", "boot": "b",
                "answer": answer, "command": asked["command"], "control_id": asked["control_id"], "reason": "because"});
            let message = Message { body: body.to_string().into(), ..Message::default() };
            tell(&memory, message, &format!("n1.control.{answer}")).await;
        }
    });
}

#[tokio::test(start_paused = true)]
async fn commands_are_answered_by_their_control_id_many_at_a_time() {
    let (memory, _) = fleet().await;
    answering(&memory, "state", 0);
    let client = client(memory.clone());
    let asking: Vec<_> = (0..20)
        .map(|_| {
            let client = client.clone();
            tokio::spawn(async move { client.tell(&node("n1"), Control::Inspect).await })
        })
        .collect();
    for asked in asking {
        assert_eq!(asked.await.unwrap().unwrap().answer, "state");
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_was_missed_while_away_is_asked_for_again() {
    let (memory, _) = fleet().await;
    answering(&memory, "paused", 1);
    assert_eq!(client(memory).tell(&node("n1"), Control::Pause).await.unwrap().answer, "paused");
}

#[tokio::test(start_paused = true)]
async fn a_refusal_an_absent_agent_and_an_unknown_node_are_different_errors() {
    use haul::master::{Unpublished, Untold};
    let (memory, names) = fleet().await;
    let client = client(memory.clone());
    let unknown = client.tell(&node("nobody"), Control::Drain).await.unwrap_err();
    assert!(matches!(unknown, Untold::Unpublished(Unpublished::NotEnrolled { .. })), "{unknown}");
    let absent = client.tell_within(&node("n1"), Control::Inspect, Duration::from_secs(3)).await.unwrap_err();
    assert!(matches!(absent, Untold::NoAnswer { .. }), "{absent}");
    // An inspection that nobody waits for any more is not there for the agent that comes back.
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(memory.messages(&names.control_node(&node("n1"))).is_empty());
    answering(&memory, "refused", 0);
    let refused = client.tell(&node("n1"), Control::Resume).await.unwrap_err();
    assert!(refused.to_string().contains("because"), "{refused}");
}
