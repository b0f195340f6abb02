//! Messages that are no tasks, and tasks with properties that no master would give them: by a raw AMQP client.

use haul::{failure::ErrorClass, protocol::Status};
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties,
    options::{BasicPublishOptions, ConfirmSelectOptions},
    types::{AMQPValue, ByteArray, DecimalValue, FieldArray, FieldTable, LongString, ShortString},
};
use serde_json::{Value, json};

use crate::{
    support::{agent::Agent, rabbit::Rabbit},
    world::{GOOD_PROJECT, World, assert_is_a_sentence},
};

/// A client that publishes whatever it is told to.
struct Raw {
    _connection: Connection,
    channel: Channel,
    exchange: String,
}

impl Raw {
    async fn new(world: &World) -> Self {
        let connection = Connection::connect(&Rabbit::shared().url, ConnectionProperties::default()).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        Self { _connection: connection, channel, exchange: world.agent.names.task() }
    }

    async fn publish(&self, body: &[u8], properties: BasicProperties) {
        let shown: String = format!("{properties:?}").chars().take(300).collect();
        let (exchange, options) = (ShortString::from(self.exchange.as_str()), BasicPublishOptions::default());
        let confirm = self.channel.basic_publish(exchange, "n1".into(), options, body, properties).await.unwrap();
        let confirm = confirm.await.unwrap_or_else(|error| panic!("{error} for {shown}"));
        assert!(confirm.is_ack());
    }
}

fn status(id: &str) -> Value {
    Agent::task(id, "status", GOOD_PROJECT)
}

fn headers(pairs: Vec<(&str, AMQPValue)>) -> BasicProperties {
    let mut table = FieldTable::default();
    for (name, value) in pairs {
        table.insert(ShortString::from(name), value);
    }
    BasicProperties::default().with_headers(table)
}

fn text(text: impl Into<String>) -> AMQPValue {
    AMQPValue::LongString(LongString::from(text.into().into_bytes()))
}

#[tokio::test]
async fn messages_that_are_no_tasks_are_dead_letters_with_a_reason() {
    let world = World::strict().await;
    let raw = Raw::new(&world).await;
    let (before, plain) = (world.files(), status("plain").to_string());
    let deep = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
    let with = |field: &str| plain.replacen('{', &format!("{{{field},"), 1);
    let huge = format!("{{\"v\":1,\"x\":\"{}\"}}", "x".repeat(16 << 20))[..16 << 20].to_owned();
    let bodies: Vec<Vec<u8>> = [
        "",
        " ",
        "\0",
        "null",
        "true",
        "1",
        "\"clone\"",
        "[]",
        "{}",
        "{",
        "}",
        "clone https://upstream.invalid/x 99_app",
        "<task/>",
        &plain[..plain.len() - 1],
        &format!("{plain}{plain}"),
        &format!("{plain}\0"),
        &format!("\u{feff}{plain}"),
        &format!("[{plain}]"),
        &deep(200),
        &deep(30_000),
        &with(&format!("\"x\":{}", deep(200))),
        &"{\"x\":".repeat(10_000),
        &with("\"v\":1"),
        &with("\"task_id\":\"other\""),
        &with("\"kind\":\"delete\""),
        &with("\"project_id\":2"),
        &with("\"v\":1e400"),
        &with("\"x\":1e999"),
        &with(&format!("\"x\":\"{}\"", "x".repeat(70_000))),
        &plain.replace("\"v\":1", "\"v\":2"),
        &plain.replace("\"v\":1", "\"v\":0"),
        &plain.replace("\"v\":1", "\"v\":-1"),
        &plain.replace("\"v\":1", "\"v\":1.5"),
        &plain.replace("\"v\":1", "\"v\":\"1\""),
        &plain.replace("\"v\":1", "\"v\":18446744073709551616"),
        &plain.replace("\"v\":1", "\"v\":null"),
        &plain.replace("\"status\"", "\"explode\""),
        &plain.replace("\"status\"", "\"STATUS\""),
        &plain.replace("\"status\"", "[\"status\"]"),
        &plain.replace("\"project_id\":1", "\"project_id\":9223372036854775808"),
        &plain.replace("\"project_id\":1", "\"project_id\":1.0"),
        &plain.replace("\"project_id\":1", "\"project_id\":\"1\""),
        &plain.replace("\"project_id\":1", "\"project_id\":{}"),
        &plain.replace("\"plain\"", "\"\""),
        &plain.replace("\"plain\"", "\"../plain\""),
        &plain.replace("\"plain\"", "7"),
        &plain.replace("\"plain\"", "\"\\ud800\""),
        &plain.replace("\"plain\"", &format!("\"{}\"", "x".repeat(129))),
        &with("\"generation\":-1"),
        &with("\"timeout_secs\":0"),
        &with("\"timeout_secs\":1e30"),
        &with("\"not_after\":\"tomorrow\""),
        &with("\"priority\":\"urgent\""),
        &huge,
    ]
    .iter()
    .map(|text| text.as_bytes().to_vec())
    .chain([
        b"\xff\xfe".to_vec(),
        plain.replace("plain", "pl\u{e4}in").chars().map(|c| c as u8).collect(),
        vec![0x1f, 0x8b, 8],
    ])
    .collect();
    for body in &bodies {
        raw.publish(body, BasicProperties::default()).await;
    }
    let kinds =
        ["text/plain", "application/xml", "application/octet-stream", "application/jsonx", "a\u{1b}[2J", "\n", "*/*"];
    for (number, kind) in kinds.iter().enumerate() {
        let body = status(&format!("kind-{number}")).to_string();
        raw.publish(body.as_bytes(), BasicProperties::default().with_content_type((*kind).into())).await;
        assert_eq!(world.agent.end(&format!("kind-{number}"), 0).await.status, Status::Rejected);
    }
    let letters = world.new_letters(bodies.len() + kinds.len()).await;
    for letter in &letters {
        assert_eq!(letter.class, "invalid", "{}", letter.reason);
        assert_is_a_sentence(&letter.reason);
    }
    for body in &bodies {
        assert!(
            letters.iter().any(|letter| letter.message.body == body),
            "{:?}",
            String::from_utf8_lossy(&body[..body.len().min(80)])
        );
    }
    assert!(world.agent.events("plain").iter().all(|event| event.status == Status::Rejected));
    world.untouched(&before);
    world.unharmed().await;
}

#[tokio::test]
async fn what_has_expired_on_arrival_is_not_begun() {
    let world = World::strict().await;
    let before = world.files();
    for limit in
        ["1970-01-01T00:00:00Z", "2020-06-30T23:59:60Z", "-009999-01-02T01:59:59Z", "2001-01-01T00:00:00+14:00"]
    {
        let task = world.clone_with(&json!({"not_after": limit}));
        world.agent.publish(&task).await;
        let end = world.agent.end(task["task_id"].as_str().unwrap(), 0).await;
        assert_eq!(end.error.unwrap().class, ErrorClass::Expired, "{limit}");
        assert_eq!(world.new_letters(1).await.last().unwrap().class, "expired");
    }
    world.untouched(&before);
    world.unharmed().await;
}

#[tokio::test]
async fn hostile_properties_change_nothing_about_a_task() {
    let world = World::strict().await;
    let raw = Raw::new(&world).await;
    let before = world.files();
    let number = AMQPValue::LongLongInt;
    let year_9999 = 253_370_764_800_000;
    let table = || {
        let mut table = FieldTable::default();
        table.insert("x".into(), AMQPValue::LongInt(3));
        AMQPValue::FieldTable(table)
    };
    let nested = (0..40).fold(AMQPValue::Void, |inner, _| AMQPValue::FieldArray(FieldArray::from(vec![inner])));
    // Each of these is done all the same, in round 0.
    let mut cases = vec![
        BasicProperties::default().with_user_id("guest".into()),
        BasicProperties::default().with_priority(255),
        BasicProperties::default().with_delivery_mode(1),
        BasicProperties::default().with_timestamp(u64::MAX),
        BasicProperties::default().with_message_id("m".repeat(255).into()),
        BasicProperties::default().with_message_id("\u{1b}[2J\n".into()),
        BasicProperties::default().with_type("task.delete".into()),
        BasicProperties::default().with_reply_to("amq.rabbitmq.reply-to.x".into()),
        BasicProperties::default().with_correlation_id("\n".into()),
        BasicProperties::default().with_cluster_id("x".into()),
        BasicProperties::default().with_app_id("haul".into()),
        BasicProperties::default().with_content_encoding("gzip".into()),
        BasicProperties::default().with_content_type("Application/JSON; charset=latin1".into()),
        BasicProperties::default().with_expiration("600000".into()),
        headers(vec![("CC", AMQPValue::FieldArray(FieldArray::from(vec![text("n1"), text("n2")])))]),
        headers(vec![("BCC", AMQPValue::FieldArray(FieldArray::from(vec![text("n2")])))]),
        headers(vec![("traceparent", text("\u{1b}[2J\n"))]),
        headers(vec![("traceparent", text("0".repeat(100_000)))]),
        headers(vec![("x-death", table())]),
        headers(vec![("x-death", AMQPValue::FieldArray(FieldArray::from(vec![table()])))]),
        headers(vec![("x", nested)]),
        headers(vec![("x", text("x".repeat(120_000)))]),
        headers((0..2000).map(|_| ("y", AMQPValue::Void)).collect()),
        headers(vec![("x-haul-history", text("h\n".repeat(50_000)))]),
        headers(vec![("x-haul-arrived", number(i64::MIN))]),
        headers(vec![("x-haul-arrived", number(i64::MAX))]),
        headers(vec![("x-haul-attempt", number(i64::MAX))]),
        headers(vec![("x-haul-attempt", number(-1))]),
        headers(vec![("x-haul-deferred", number(i64::MAX))]),
        headers(vec![("x-haul-deferred", number(year_9999))]),
        headers(vec![("x-haul-not-before", number(i64::MAX))]),
        headers(vec![("x-haul-not-before", number(-1))]),
        headers(vec![("x-haul-round", number(i64::MIN))]),
        headers(vec![("x-haul-node", text("../../etc"))]),
        headers(vec![("x-haul-node", text("n".repeat(100)))]),
    ];
    let many: Vec<String> = (0..3000).map(|n| format!("header-{n}")).collect();
    cases.push(headers(many.iter().map(|name| (name.as_str(), AMQPValue::Boolean(true))).collect()));
    let odd = || {
        [
            AMQPValue::Void,
            AMQPValue::Boolean(true),
            AMQPValue::Float(1.5),
            AMQPValue::Double(f64::MAX),
            AMQPValue::DecimalValue(DecimalValue { scale: 255, value: u32::MAX }),
            AMQPValue::Timestamp(u64::MAX),
            AMQPValue::ByteArray(ByteArray::from(&b"\xff\0"[..])),
            AMQPValue::LongString(LongString::from(b"\xff\xfe".to_vec())),
            text("-1 "),
            table(),
        ]
    };
    for name in ["round", "attempt", "arrived", "deferred", "not-before", "node", "history"] {
        cases.extend(odd().map(|value| headers(vec![(format!("x-haul-{name}").as_str(), value)])));
    }
    for (index, properties) in cases.into_iter().enumerate() {
        let id = format!("property-{index}");
        raw.publish(status(&id).to_string().as_bytes(), properties.clone()).await;
        let end = world.agent.end(&id, 0).await;
        assert_eq!(end.status, Status::Succeeded, "{properties:?}: {end:?}");
    }
    // A round that is beyond belief is the highest that is believed.
    raw.publish(status("round").to_string().as_bytes(), headers(vec![("x-haul-round", number(i64::MAX))])).await;
    assert_eq!(world.agent.end("round", 1_000_000).await.status, Status::Succeeded);
    // A task that asks to wait until the year 9999 waits no longer than a retry may; it can be cancelled meanwhile.
    raw.publish(status("parked").to_string().as_bytes(), headers(vec![("x-haul-not-before", number(year_9999))])).await;
    world.agent.drained().await;
    world.agent.control(&json!({"v": 1, "command": "cancel", "task_id": "parked"})).await;
    assert_eq!(world.agent.end("parked", 0).await.status, Status::Cancelled);
    // One that is said to belong to a node that nobody enrolled can be neither run here nor lost.
    raw.publish(status("astray").to_string().as_bytes(), headers(vec![("x-haul-node", text("-1"))])).await;
    assert_eq!(world.new_letters(1).await[0].class, "not_found");
    // The same identity with another body touches nothing and is a dead letter.
    raw.publish(
        status("round").to_string().replace('}', ",\"x\":1}").as_bytes(),
        headers(vec![("x-haul-round", number(i64::MAX))]),
    )
    .await;
    assert_eq!(world.new_letters(1).await[1].class, "invalid");
    // A refused one with all of it (the broker counts deliveries itself): what is in the dead letter is ours alone.
    let mut task = world.clone_with(&json!({"target_path": ".."}));
    task["task_id"] = "stripped".into();
    let properties = headers(vec![
        ("CC", AMQPValue::FieldArray(FieldArray::from(vec![text("n2")]))),
        ("x", text("x".repeat(100_000))),
        ("x-haul-history", text("h".repeat(10_000))),
        ("x-haul-error-class", text("forged")),
    ]);
    let properties = properties.with_expiration("600000".into()).with_user_id("guest".into()).with_priority(9);
    raw.publish(task.to_string().as_bytes(), properties).await;
    let letters = world.new_letters(1).await;
    let letter = &letters.last().unwrap().message;
    assert_eq!(letters.last().unwrap().class, "invalid");
    assert!(
        letter.headers.keys().all(|name| name.starts_with("x-haul-") || name == "x-delivery-count"),
        "{:?}",
        letter.headers.keys()
    );
    assert_eq!((letter.expiration_ms, letter.priority), (None, None));
    world.untouched(&before);
    world.unharmed().await;
}
