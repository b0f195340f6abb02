//! What only a real broker can do to us: restarts, lost connections, alarms, timeouts, TLS.

#![expect(clippy::unwrap_used, reason = "a helper of a test that cannot go on fails the test")]

mod support;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use haul::{
    broker::{
        Broker, BrokerError, Consume, Consumer, Delivery, Health, Outgoing, StaleDelivery, Topology,
        rabbitmq::RabbitMq,
        settings::BrokerSettings,
        topology::{Binding, Exchange, ExchangeKind, Lifetime, Queue},
    },
    protocol::wire::{HeaderValue, Message},
};
use secrecy::SecretString;
use support::{eventually, rabbit::Rabbit, soon, unique};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Mutex, MutexGuard},
};

/// What is promised, counted from the moment the broker can be reached.
const CONSUMING_AGAIN: Duration = Duration::from_secs(10);

/// The node of this binary, to oneself: these tests break it for everybody.
async fn rabbit() -> (MutexGuard<'static, ()>, &'static Node) {
    static ALONE: Mutex<()> = Mutex::const_new(());
    static NODE: OnceLock<Option<Node>> = OnceLock::new();
    support::logs();
    let alone = ALONE.lock().await;
    let start = || NODE.get_or_init(|| std::panic::catch_unwind(Node::start).ok()).as_ref();
    let node = tokio::task::spawn_blocking(start).await.unwrap();
    (alone, node.expect("the node started; the first test that wanted it says why not"))
}

/// A node with a TLS listener that wants client certificates, and a short consumer timeout.
struct Node {
    rabbit: Rabbit,
    certificates: PathBuf,
    tls_port: u16,
}

impl Node {
    fn start() -> Self {
        let directory = Rabbit::directory();
        let certificates = directory.join("certificates");
        make_certificates(&certificates);
        let tls_port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let file = |name: &str| certificates.join(name).display().to_string();
        let configuration = [
            format!("listeners.ssl.default = 127.0.0.1:{tls_port}"),
            format!("ssl_options.cacertfile = {}", file("ca.pem")),
            format!("ssl_options.certfile = {}", file("server.pem")),
            format!("ssl_options.keyfile = {}", file("server.key")),
            "ssl_options.verify = verify_peer".to_owned(),
            "ssl_options.fail_if_no_peer_cert = true".to_owned(),
            "consumer_timeout = 10000".to_owned(),
        ];
        let rabbit = Rabbit::start_in(directory, &configuration.each_ref().map(String::as_str));
        Self { rabbit, certificates, tls_port }
    }

    fn tls_settings(&self) -> BrokerSettings {
        BrokerSettings {
            urls: vec![SecretString::from(format!("amqps://guest:guest@localhost:{}/%2f", self.tls_port))],
            ca_file: Some(self.certificates.join("ca.pem")),
            cert_file: Some(self.certificates.join("client.pem")),
            key_file: Some(self.certificates.join("client.key")),
            ..BrokerSettings::default()
        }
    }
}

fn make_certificates(directory: &Path) {
    std::fs::create_dir_all(directory).unwrap();
    let openssl = |arguments: &[&str]| {
        let output = Command::new("openssl").current_dir(directory).args(arguments).output().unwrap();
        assert!(output.status.success(), "openssl: {}", String::from_utf8_lossy(&output.stderr));
    };
    let key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];
    let ca = ["req", "-x509", "-days", "2", "-subj", "/CN=test authority", "-keyout", "ca.key", "-out", "ca.pem"];
    openssl(&[&ca[..], &key].concat());
    std::fs::write(directory.join("server.ext"), "subjectAltName = DNS:localhost, IP:127.0.0.1\n").unwrap();
    std::fs::write(directory.join("client.ext"), "extendedKeyUsage = clientAuth\n").unwrap();
    for name in ["server", "client"] {
        let (csr, pem, key_file, ext) =
            (format!("{name}.csr"), format!("{name}.pem"), format!("{name}.key"), format!("{name}.ext"));
        let subject = format!("/CN={name}");
        openssl(&[&["req", "-subj", &subject, "-keyout", &key_file, "-out", &csr][..], &key].concat());
        let sign = ["x509", "-req", "-days", "2", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"];
        openssl(&[&sign[..], &["-in", &csr, "-out", &pem, "-extfile", &ext]].concat());
    }
}

/// An exchange and a queue of a test's own.
struct Place {
    exchange: String,
    queue: String,
    topology: Topology,
}

impl Place {
    fn new(test: &str) -> Self {
        let prefix = unique(test);
        let (exchange, queue) = (format!("{prefix}.in"), format!("{prefix}.queue"));
        let arguments = BTreeMap::from([
            ("x-queue-type".to_owned(), "quorum".into()),
            ("x-single-active-consumer".to_owned(), HeaderValue::Bool(true)),
        ]);
        let topology = Topology {
            exchanges: vec![Exchange { name: exchange.clone(), kind: ExchangeKind::Direct, alternate: None }],
            queues: vec![Queue { name: queue.clone(), arguments, lifetime: Lifetime::Durable }],
            bindings: vec![Binding { exchange: exchange.clone(), queue: queue.clone(), routing_key: "key".to_owned() }],
        };
        Self { exchange, queue, topology }
    }

    async fn consumer(&self, broker: &RabbitMq) -> Consumer {
        let consume =
            Consume { queue: self.queue.clone(), tag: "test".to_owned(), prefetch: 10, declare: self.topology.clone() };
        let consumer = broker.consume(consume).await.unwrap();
        up(&consumer).await;
        consumer
    }

    fn outgoing(&self, id: &str) -> Outgoing {
        let message = Message::json(&id, id, "task.test".to_owned(), jiff::Timestamp::UNIX_EPOCH);
        Outgoing { exchange: self.exchange.clone(), routing_key: "key".to_owned(), message, mandatory: true }
    }
}

async fn up(consumer: &Consumer) {
    soon("a session", consumer.health().wait_for(|health| *health == Health::Up)).await.unwrap();
}

async fn next(consumer: &mut Consumer) -> Delivery {
    soon("a delivery", consumer.next()).await.expect("the consumer runs")
}

fn id(delivery: &Delivery) -> String {
    delivery.message.message_id.clone().unwrap_or_default()
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_was_stopped_or_killed_is_consumed_from_again_within_ten_seconds_of_its_return() {
    let (_alone, node) = rabbit().await;
    let settings = BrokerSettings { confirm_timeout: Duration::from_mins(2), ..node.rabbit.settings() };
    let broker = Arc::new(RabbitMq::connect(&settings, "haul test").await.unwrap());
    let place = Place::new("restart");
    let mut consumer = place.consumer(&broker).await;
    // First a stop in order: a queue that is younger than the broker's own tables on disk may not survive a kill.
    for kill in [false, true] {
        broker.publish(place.outgoing("before")).await.unwrap();
        let held = next(&mut consumer).await;
        let restarting = tokio::task::spawn_blocking(move || {
            if kill {
                node.rabbit.kill();
            }
            node.rabbit.restart();
            Instant::now()
        });
        eventually("the loss is noticed", async || *consumer.health().borrow() == Health::Down).await;
        let publishing = tokio::spawn({
            let (broker, outgoing) = (Arc::clone(&broker), place.outgoing("during"));
            async move { broker.publish(outgoing).await }
        });
        let back = restarting.await.unwrap();
        let mut ids = Vec::new();
        for _ in 0..2 {
            let delivery = next(&mut consumer).await;
            ids.push(id(&delivery));
            delivery.ack().await.unwrap();
        }
        assert!(back.elapsed() < CONSUMING_AGAIN, "it took {:?}", back.elapsed());
        ids.sort();
        assert_eq!(ids, ["before", "during"]);
        publishing.await.unwrap().unwrap();
        assert_eq!(held.ack().await, Err(StaleDelivery));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn closed_connections_are_made_again_and_nothing_is_acked_twice() {
    let (_alone, node) = rabbit().await;
    let broker = node.rabbit.client().await;
    let place = Place::new("closed");
    let mut consumer = place.consumer(&broker).await;
    broker.publish(place.outgoing("one")).await.unwrap();
    let held = next(&mut consumer).await;
    blocking(|| node.rabbit.ctl(&["close_all_connections", "a test"])).await;
    let closed = Instant::now();
    let again = next(&mut consumer).await;
    assert!(closed.elapsed() < CONSUMING_AGAIN, "it took {:?}", closed.elapsed());
    assert!(again.redelivered && id(&again) == "one");
    assert_eq!(held.ack().await, Err(StaleDelivery));
    again.ack().await.unwrap();
    broker.publish(place.outgoing("two")).await.unwrap();
    next(&mut consumer).await.ack().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn publishes_in_flight_when_connections_close_are_sent_again() {
    let (_alone, node) = rabbit().await;
    let broker = Arc::new(node.rabbit.client().await);
    let place = Place::new("resent");
    broker.declare(&place.topology).await.unwrap();
    let publishing = tokio::spawn({
        let (broker, place) = (Arc::clone(&broker), place_of(&place));
        async move {
            for round in 0..40 {
                let publishes = (0..50).map(async |n| broker.publish(place.outgoing(&format!("{round}-{n}"))).await);
                for told in futures_util::future::join_all(publishes).await {
                    told.unwrap();
                }
            }
        }
    });
    blocking(|| node.rabbit.ctl(&["close_all_connections", "a test"])).await;
    publishing.await.unwrap();
    let mut consumer = place.consumer(&broker).await;
    let mut seen = std::collections::BTreeSet::new();
    while seen.len() < 2000 {
        let delivery = next(&mut consumer).await;
        seen.insert(id(&delivery));
        delivery.ack().await.unwrap();
    }
}

fn place_of(place: &Place) -> Place {
    Place { exchange: place.exchange.clone(), queue: place.queue.clone(), topology: place.topology.clone() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deleted_queue_is_declared_and_consumed_again() {
    let (_alone, node) = rabbit().await;
    let broker = node.rabbit.client().await;
    let place = Place::new("deleted");
    let mut consumer = place.consumer(&broker).await;
    let queue = place.queue.clone();
    blocking(move || node.rabbit.ctl(&["delete_queue", &queue])).await;
    let deleted = Instant::now();
    eventually("the queue is back", async || {
        broker.depth(&place.queue).await.unwrap().is_some_and(|depth| depth.consumers == 1)
    })
    .await;
    assert!(deleted.elapsed() < CONSUMING_AGAIN, "it took {:?}", deleted.elapsed());
    broker.publish(place.outgoing("one")).await.unwrap();
    next(&mut consumer).await.ack().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_delivery_held_beyond_the_consumer_timeout_comes_again() {
    let (_alone, node) = rabbit().await;
    // How often the broker looks at its channels; once a minute by default.
    blocking(|| node.rabbit.ctl(&["eval", "application:set_env(rabbit, channel_tick_interval, 1000)."])).await;
    let broker = node.rabbit.client().await;
    let place = Place::new("timeout");
    let mut consumer = place.consumer(&broker).await;
    broker.publish(place.outgoing("slow")).await.unwrap();
    let held = next(&mut consumer).await;
    let again = tokio::time::timeout(Duration::from_mins(1), consumer.next()).await.unwrap().unwrap();
    assert_eq!(id(&again), "slow");
    assert!(held.is_stale());
    assert_eq!(held.ack().await, Err(StaleDelivery));
    again.ack().await.unwrap();
    broker.publish(place.outgoing("next")).await.unwrap();
    next(&mut consumer).await.ack().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_a_memory_alarm_publishing_is_blocked_and_acks_still_work() {
    let (_alone, node) = rabbit().await;
    let broker = Arc::new(node.rabbit.client().await);
    let place = Place::new("alarm");
    let mut consumer = place.consumer(&broker).await;
    broker.publish(place.outgoing("one")).await.unwrap();
    let held = next(&mut consumer).await;
    blocking(|| node.rabbit.ctl(&["set_vm_memory_high_watermark", "0.00001"])).await;
    let publishing = tokio::spawn({
        let (broker, outgoing) = (Arc::clone(&broker), place.outgoing("two"));
        async move { broker.publish(outgoing).await }
    });
    let mut health = broker.health();
    let blocked = tokio::time::timeout(support::PATIENCE, health.wait_for(|health| *health == Health::Blocked)).await;
    let acked = tokio::time::timeout(support::PATIENCE, held.ack()).await;
    blocking(|| node.rabbit.ctl(&["set_vm_memory_high_watermark", "0.4"])).await;
    blocked.expect("the alarm is seen").unwrap();
    acked.expect("the ack is sent").unwrap();
    publishing.await.unwrap().unwrap();
    soon("the end of the alarm", health.wait_for(|health| *health == Health::Up)).await.unwrap();
    let delivery = next(&mut consumer).await;
    assert_eq!(id(&delivery), "two");
    delivery.ack().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_half_open_connection_is_given_up_within_ten_seconds() {
    let (_alone, node) = rabbit().await;
    let proxy = Proxy::start(broker_address(&node.rabbit)).await;
    let settings = BrokerSettings {
        urls: vec![SecretString::from(format!("amqp://guest:guest@127.0.0.1:{}/%2f", proxy.port))],
        ..node.rabbit.settings()
    };
    let behind = RabbitMq::connect(&settings, "haul test").await.unwrap();
    let place = Place::new("stalled");
    let consumer = place.consumer(&behind).await;
    proxy.stall();
    let stalled = Instant::now();
    let mut health = consumer.health();
    soon("the loss", health.wait_for(|health| *health == Health::Down)).await.unwrap();
    assert!(stalled.elapsed() < CONSUMING_AGAIN, "it took {:?}", stalled.elapsed());
    up(&consumer).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_works_with_an_authority_and_a_client_certificate_of_ones_own() {
    let (_alone, node) = rabbit().await;
    let broker = RabbitMq::connect(&node.tls_settings(), "haul test").await.unwrap();
    let place = Place::new("tls");
    let mut consumer = place.consumer(&broker).await;
    broker.publish(place.outgoing("one")).await.unwrap();
    next(&mut consumer).await.ack().await.unwrap();
    assert!(broker.about().await.unwrap().address.starts_with("amqps://localhost:"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_fails_without_the_right_certificates() {
    let (_alone, node) = rabbit().await;
    let anonymous = BrokerSettings { cert_file: None, key_file: None, ..node.tls_settings() };
    let distrustful = BrokerSettings { ca_file: Some(node.certificates.join("client.pem")), ..node.tls_settings() };
    for settings in [anonymous, distrustful] {
        let error = RabbitMq::connect(&settings, "haul test").await.unwrap().about().await.unwrap_err();
        assert!(matches!(error, BrokerError::Unreachable { .. }), "{error}");
    }
    let absent = BrokerSettings { ca_file: Some("/nonexistent".into()), ..node.tls_settings() };
    assert!(matches!(RabbitMq::connect(&absent, "haul test").await, Err(BrokerError::Settings(_))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_broker_tells_its_version() {
    let (_alone, node) = rabbit().await;
    let about = node.rabbit.client().await.about().await.unwrap();
    assert_eq!(about.product.as_deref(), Some("RabbitMQ"));
    assert_eq!(about.version.as_deref(), Some(node.rabbit.ctl(&["version"]).trim()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn addresses_are_tried_in_turn() {
    let (_alone, node) = rabbit().await;
    let mut settings = node.rabbit.settings();
    settings.urls.insert(0, SecretString::from("amqp://guest:guest@127.0.0.1:1/%2f"));
    let broker = RabbitMq::connect(&settings, "haul test").await.unwrap();
    let place = Place::new("turn");
    let mut consumer = place.consumer(&broker).await;
    broker.publish(place.outgoing("one")).await.unwrap();
    next(&mut consumer).await.ack().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_password_is_an_error_at_once_and_is_not_repeated() {
    let (_alone, node) = rabbit().await;
    let settings = BrokerSettings {
        urls: vec![SecretString::from(node.rabbit.url.replace("guest:guest", "guest:canary"))],
        ..node.rabbit.settings()
    };
    let broker = RabbitMq::connect(&settings, "haul test").await.unwrap();
    let place = Place::new("password");
    let consume = Consume { queue: place.queue, tag: "t".to_owned(), prefetch: 1, declare: place.topology.clone() };
    let errors = [
        soon("an answer", broker.consume(consume)).await.err().unwrap(),
        soon("an answer", broker.declare(&place.topology)).await.unwrap_err(),
        soon("an answer", broker.about()).await.unwrap_err(),
    ];
    for error in errors {
        assert!(matches!(error, BrokerError::Refused { .. }), "{error}");
        assert!(!format!("{error} {error:?}").contains("canary"), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_is_down_at_the_start_is_waited_for_and_told_of_when_asked() {
    let (_alone, node) = rabbit().await;
    let proxy = Proxy::start(broker_address(&node.rabbit)).await;
    proxy.refuse(true);
    let settings = BrokerSettings {
        urls: vec![SecretString::from(format!("amqp://guest:guest@127.0.0.1:{}/%2f", proxy.port))],
        ..node.rabbit.settings()
    };
    let broker = RabbitMq::connect(&settings, "haul test").await.unwrap();
    let place = Place::new("down");
    let consume =
        Consume { queue: place.queue.clone(), tag: "test".to_owned(), prefetch: 1, declare: place.topology.clone() };
    let mut consumer = soon("a consumer", broker.consume(consume)).await.unwrap();
    let error = soon("an answer", broker.depth(&place.queue)).await.unwrap_err();
    assert!(matches!(error, BrokerError::Unreachable { .. }), "{error}");
    proxy.refuse(false);
    up(&consumer).await;
    broker.publish(place.outgoing("one")).await.unwrap();
    next(&mut consumer).await.ack().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_headers_harm_no_consumer() {
    let (_alone, node) = rabbit().await;
    let broker = node.rabbit.client().await;
    let place = Place::new("hostile");
    let mut consumer = place.consumer(&broker).await;
    let mut nested = vec![b'V'];
    for _ in 0..10_000 {
        nested = [&b"A"[..], &long(&nested)].concat();
    }
    let table = |value: &[u8]| long(&[&short(b"header")[..], value].concat());
    let own = broker_address(&node.rabbit);
    // Content type, headers and message id; the last is the only one that is text in all of them.
    for (content_type, headers) in [
        (&b"\xff\xfe"[..], table(b"V")),
        (b"application/json", table(&nested)),
        (b"application/json", table(&[&b"S"[..], &long(b"\xff")].concat())),
        (b"application/json", long(&[&short(b"\xff")[..], b"t\x01"].concat())),
    ] {
        let properties = [short(content_type), headers, short(b"hostile")].concat();
        publish_raw(
            &own,
            &place.exchange,
            &[&((1_u16 << 15) | (1 << 13) | (1 << 7)).to_be_bytes()[..], &properties].concat(),
        )
        .await;
        let delivery = next(&mut consumer).await;
        assert_eq!((id(&delivery).as_str(), delivery.redelivered), ("hostile", false));
        delivery.ack().await.unwrap();
    }
    broker.publish(place.outgoing("harmless")).await.unwrap();
    let delivery = next(&mut consumer).await;
    assert_eq!((id(&delivery).as_str(), delivery.redelivered), ("harmless", false));
    delivery.ack().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousands_of_messages_a_second_are_confirmed() {
    let (_alone, node) = rabbit().await;
    let broker = Arc::new(node.rabbit.client().await);
    let place = Arc::new(Place::new("many"));
    broker.declare(&place.topology).await.unwrap();
    broker.publish(place.outgoing("first")).await.unwrap();
    let begun = Instant::now();
    let callers = (0..500).map(|caller| {
        let (broker, place) = (Arc::clone(&broker), Arc::clone(&place));
        tokio::spawn(async move {
            for n in 0..20 {
                broker.publish(place.outgoing(&format!("{caller}-{n}"))).await.unwrap();
            }
        })
    });
    for caller in callers.collect::<Vec<_>>() {
        caller.await.unwrap();
    }
    let rate = 10_000.0 / begun.elapsed().as_secs_f64();
    println!("{rate:.0} confirmed messages a second");
    // A floor far below what an idle machine does, to notice a window that does not fill.
    assert!(rate > 500.0, "{rate:.0} a second");
}

fn broker_address(rabbit: &Rabbit) -> String {
    rabbit.url.rsplit(['@', '/']).nth(1).unwrap().to_owned()
}

fn short(bytes: &[u8]) -> Vec<u8> {
    [&[u8::try_from(bytes.len()).unwrap()][..], bytes].concat()
}

fn long(bytes: &[u8]) -> Vec<u8> {
    [&u32::try_from(bytes.len()).unwrap().to_be_bytes()[..], bytes].concat()
}

/// Publishes with properties that no client library would write.
async fn publish_raw(address: &str, exchange: &str, flags_and_properties: &[u8]) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    fn frame(kind: u8, channel: u16, payload: &[u8]) -> Vec<u8> {
        [&[kind][..], &channel.to_be_bytes(), &long(payload), &[0xce]].concat()
    }
    async fn answer(stream: &mut TcpStream) {
        let mut head = [0; 7];
        stream.read_exact(&mut head).await.unwrap();
        let size = u32::from_be_bytes([head[3], head[4], head[5], head[6]]) as usize;
        stream.read_exact(&mut vec![0; size + 1]).await.unwrap();
    }
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(b"AMQP\0\0\x09\x01").await.unwrap();
    let start_ok =
        [&[0, 10, 0, 11, 0, 0, 0, 0][..], &short(b"PLAIN"), &long(b"\0guest\0guest"), &short(b"en_US")].concat();
    answer(&mut stream).await;
    stream.write_all(&frame(1, 0, &start_ok)).await.unwrap();
    answer(&mut stream).await;
    stream.write_all(&frame(1, 0, &[0, 10, 0, 31, 0, 10, 0, 2, 0, 0, 0, 0])).await.unwrap();
    stream.write_all(&frame(1, 0, &[&[0, 10, 0, 40][..], &short(b"/"), &[0, 0]].concat())).await.unwrap();
    answer(&mut stream).await;
    stream.write_all(&frame(1, 1, &[0, 20, 0, 10, 0])).await.unwrap();
    answer(&mut stream).await;
    let publish = [&[0, 60, 0, 40, 0, 0][..], &short(exchange.as_bytes()), &short(b"key"), &[0]].concat();
    let content = [&[0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2][..], flags_and_properties].concat();
    let frames = [frame(1, 1, &publish), frame(2, 1, &content), frame(3, 1, b"{}")].concat();
    stream.write_all(&frames).await.unwrap();
    // The broker's answer to the close comes after it has read the message.
    stream.write_all(&frame(1, 0, &[0, 10, 0, 50, 0, 200, 0, 0, 0, 0, 0])).await.unwrap();
    answer(&mut stream).await;
}

/// Between us and the broker: passes bytes on, until told to keep them or to turn everybody away.
struct Proxy {
    port: u16,
    stalled: Arc<std::sync::Mutex<Arc<AtomicBool>>>,
    refusing: Arc<AtomicBool>,
}

impl Proxy {
    async fn start(broker: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let stalled = Arc::new(std::sync::Mutex::new(Arc::new(AtomicBool::new(false))));
        let refusing = Arc::new(AtomicBool::new(false));
        let proxy = Self { port, stalled: Arc::clone(&stalled), refusing: Arc::clone(&refusing) };
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                if refusing.load(Ordering::SeqCst) {
                    continue;
                }
                let Ok(far) = TcpStream::connect(&broker).await else { continue };
                let stalled = Arc::clone(&stalled.lock().unwrap());
                let (near_in, near_out) = near.into_split();
                let (far_in, far_out) = far.into_split();
                tokio::spawn(pass(near_in, far_out, Arc::clone(&stalled)));
                tokio::spawn(pass(far_in, near_out, stalled));
            }
        });
        proxy
    }

    /// Keeps every byte of the connections that stand, for ever; new ones are passed on.
    fn stall(&self) {
        let mut current = self.stalled.lock().unwrap();
        current.store(true, Ordering::SeqCst);
        *current = Arc::new(AtomicBool::new(false));
    }

    fn refuse(&self, refuse: bool) {
        self.refusing.store(refuse, Ordering::SeqCst);
    }
}

async fn pass(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    stalled: Arc<AtomicBool>,
) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut bytes = vec![0; 64 * 1024];
    while let Ok(count) = from.read(&mut bytes).await {
        if stalled.load(Ordering::SeqCst) {
            return std::future::pending().await;
        }
        if count == 0 || to.write_all(&bytes[..count]).await.is_err() {
            return;
        }
    }
}
