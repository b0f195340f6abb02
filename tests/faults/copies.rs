//! What strangers put on a message does not travel on with the copies that are made of it.

use haul::{
    broker::Broker as _,
    protocol::{NodeName, Status, wire::Message},
};
use lapin::{
    BasicProperties, Connection, ConnectionProperties,
    options::{BasicPublishOptions, ConfirmSelectOptions},
    types::{AMQPValue, FieldArray, FieldTable, LongString},
};
use serde_json::json;
use std::time::Duration;

use crate::{
    githttp::{Behaviour, Server, Upstream},
    support::agent::Agent,
    together,
};

/// What the headers of a copy may take in all.
const LARGEST: usize = 8 * 1024;

fn text(text: &str) -> AMQPValue {
    AMQPValue::LongString(LongString::from(text.as_bytes()))
}

/// Everything that a broker or an agent could be led astray by.
fn hostile() -> BasicProperties {
    let mut death = FieldTable::default();
    death.insert("count".into(), AMQPValue::LongLongInt(99));
    death.insert("queue".into(), text("elsewhere"));
    let mut headers = FieldTable::default();
    for (name, value) in [
        ("CC", AMQPValue::FieldArray(FieldArray::from(vec![text("n2")]))),
        ("BCC", AMQPValue::FieldArray(FieldArray::from(vec![text("n2")]))),
        ("x-death", AMQPValue::FieldArray(FieldArray::from(vec![AMQPValue::FieldTable(death)]))),
        ("x-first-death-queue", text("elsewhere")),
        ("x-delay", AMQPValue::LongLongInt(1)),
        ("x", text(&"x".repeat(60_000))),
        ("x-haul-history", text(&"h\n".repeat(10_000))),
        ("x-haul-error-class", text("forged")),
        ("x-haul-attempts", AMQPValue::LongLongInt(i64::MIN)),
        ("x-haul-unknown", text(&"u".repeat(20_000))),
    ] {
        headers.insert(name.into(), value);
    }
    BasicProperties::default()
        .with_headers(headers)
        .with_expiration("600000".into())
        .with_user_id("guest".into())
        .with_reply_to("elsewhere".into())
        .with_correlation_id("c".into())
        .with_app_id("forged".into())
        .with_delivery_mode(1)
        .with_priority(200)
}

fn assert_clean(copy: &Message) {
    // The broker adds its own notes of deaths and deliveries.
    let added =
        ["x-death", "x-first-death-exchange", "x-first-death-queue", "x-first-death-reason", "x-delivery-count"];
    let foreign =
        |name: &str| !name.starts_with("x-haul-") && !added.contains(&name) && !name.starts_with("x-last-death");
    assert!(!copy.headers.keys().any(|name| foreign(name)), "{:?}", copy.headers.keys());
    let said = format!("{copy:?}");
    assert!(!said.contains("elsewhere") && !said.contains("forged"), "{said}");
    let ours = copy.headers.iter().filter(|(name, _)| name.starts_with("x-haul-"));
    assert!(ours.map(|(name, value)| name.len() + format!("{value:?}").len()).sum::<usize>() < LARGEST, "{said}");
    assert!(copy.expiration_ms.is_none() && !copy.transient, "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn copies_carry_nothing_of_hostile_properties_and_headers() {
    let (_together, rabbit) = together().await;
    let repository = Upstream::new();
    repository.commit("main", &[("a.txt", "hello\n")]);
    let server = Server::start(repository.root());
    server.behave(Behaviour::status(503));
    let mut agent = Agent::new(rabbit).await;
    agent.set("AGENT_RETRY__BASE", "7s");
    agent.start(&[]);
    agent.ready().await;
    let other = NodeName::new("n2").unwrap();
    agent.master.declare(&agent.names.node_topology(&other)).await.unwrap();
    let task = |id: &str, project: i64| {
        json!({"v": 1, "task_id": id, "kind": "clone", "project_id": project, "git_url": server.url("app.git"),
               "target_path": format!("{project}_app"), "generation": 1})
    };
    let connection = Connection::connect(&rabbit.url, ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
    let publish = async |body: serde_json::Value| {
        let exchange = agent.names.task().into();
        let (options, body) = (BasicPublishOptions::default(), body.to_string());
        let sent = channel.basic_publish(exchange, "n1".into(), options, body.as_bytes(), hostile()).await.unwrap();
        assert!(sent.await.unwrap().is_ack());
    };
    publish(task("again", 1)).await;
    agent.saw("again", Status::Retrying).await;
    // Between 5 and 9 seconds after the first failure.
    let waiting = agent.names.retry(Duration::from_secs(5));
    let mut browse = agent.master.browse(&waiting).await.unwrap();
    let copy = browse.next().await.unwrap().expect("the copy waits");
    assert_clean(&copy.message);
    copy.abandon();
    browse.give_back().await.unwrap();
    server.behave(Behaviour::Serve);
    let end = agent.end("again", 0).await;
    assert_eq!((end.status, end.attempt), (Status::Succeeded, 2), "{end:?}");
    // And one that fails for good.
    server.behave(Behaviour::status(404));
    publish(task("never", 2)).await;
    assert_eq!(agent.end("never", 0).await.status, Status::Failed);
    agent.dead_letters(1).await;
    let mut browse = agent.master.browse(&agent.names.dead()).await.unwrap();
    let copy = browse.next().await.unwrap().expect("the dead letter");
    assert_clean(&copy.message);
    copy.abandon();
    browse.give_back().await.unwrap();
    // The broker put the two that the stranger published there, and nothing of ours followed them.
    let strays = agent.master.depth(&agent.names.node(&other)).await.unwrap().unwrap();
    assert_eq!(strays.messages, 2);
    agent.each_ended_once();
}
