//! The broker's own side: what operators and accidents do to it.

use std::{path::PathBuf, sync::Arc, time::Duration};

use lapin::{
    BasicProperties, Connection, ConnectionProperties,
    options::{BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions, QueueDeleteOptions},
    types::{AMQPValue, FieldTable},
};
use serde_json::{Value, json};

use crate::support::rabbit::Rabbit;

/// `guest:guest`, the user of a private node.
const AUTHORIZATION: &str = "Basic Z3Vlc3Q6Z3Vlc3Q=";
/// How long a shared queue waits before it sends a held message again where nothing confirmed it; three minutes by
/// default, which would be most of a run.
const SETTLE_AGAIN: &str = "[{rabbit, [{dead_letter_worker_publisher_confirm_timeout, 5000}]}].\n";
/// The queue that shows whether the broker serves.
const PROBE: &str = "check-probe";
/// For the management API's answer.
const ANSWER: Duration = Duration::from_secs(15);

/// A private broker.
#[derive(Clone)]
pub(crate) struct BrokerNode {
    rabbit: Arc<Rabbit>,
}

impl BrokerNode {
    /// Starts one of the version under test.
    pub(crate) fn start() -> Self {
        let directory: PathBuf = Rabbit::directory();
        std::fs::create_dir_all(&directory).expect("the directory can be made");
        std::fs::write(directory.join("advanced.config"), SETTLE_AGAIN).expect("the directory can be written");
        Self { rabbit: Arc::new(Rabbit::start_in(directory, &[])) }
    }

    /// The node itself.
    pub(crate) fn rabbit(&self) -> &Rabbit {
        &self.rabbit
    }

    /// Whether a quorum queue can be made, written, read and removed: what no fault of ours takes for long.
    pub(crate) async fn serves(&self) -> bool {
        matches!(tokio::time::timeout(ANSWER, probe(&self.rabbit.url)).await, Ok(Ok(())))
    }

    /// Does something that blocks.
    pub(crate) async fn on<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Rabbit) -> T + Send + 'static,
    ) -> Result<T, String> {
        let rabbit = self.rabbit.clone();
        let done = tokio::task::spawn_blocking(move || work(&rabbit)).await;
        done.map_err(|_| "the script failed; it says why above".to_owned())
    }

    /// `rabbitmqctl`.
    pub(crate) async fn ctl(&self, arguments: &'static [&'static str]) -> Result<String, String> {
        self.on(|rabbit| rabbit.ctl(arguments)).await
    }

    /// What the management API says.
    pub(crate) async fn get(&self, path: String) -> Result<String, String> {
        let asked = self.on(move |rabbit| {
            ureq::get(format!("{}/api/{path}", rabbit.management_url))
                .header("authorization", AUTHORIZATION)
                .config()
                .timeout_global(Some(ANSWER))
                .build()
                .call()?
                .body_mut()
                .read_to_string()
        });
        asked.await?.map_err(|error: ureq::Error| error.to_string())
    }

    /// Deletes something by the management API; no error where it is not there.
    pub(crate) async fn delete(&self, path: String) -> Result<(), String> {
        self.call(move |base| {
            ureq::delete(format!("{base}/api/{path}"))
                .config()
                .timeout_global(Some(ANSWER))
                .http_status_as_error(false)
                .build()
                .header("authorization", AUTHORIZATION)
                .call()
        })
        .await
    }

    /// Puts something by the management API.
    pub(crate) async fn put(&self, path: String, body: Value) -> Result<(), String> {
        self.call(move |base| {
            ureq::put(format!("{base}/api/{path}"))
                .config()
                .timeout_global(Some(ANSWER))
                .http_status_as_error(false)
                .build()
                .header("authorization", AUTHORIZATION)
                .header("content-type", "application/json")
                .send(body.to_string())
        })
        .await
    }

    /// Lets a queue hold so few messages that it is full.
    pub(crate) async fn fill(&self, queue: &str) -> Result<(), String> {
        let pattern = format!("^{}$", queue.replace('.', "\\."));
        let policy = json!({"pattern": pattern, "definition": {"max-length": 1}, "priority": 99, "apply-to": "queues"});
        self.put("policies/%2F/check-full".to_owned(), policy).await
    }

    /// Takes that back.
    pub(crate) async fn unfill(&self) -> Result<(), String> {
        self.delete("policies/%2F/check-full".to_owned()).await
    }

    async fn call(
        &self,
        call: impl FnOnce(String) -> Result<ureq::http::Response<ureq::Body>, ureq::Error> + Send + 'static,
    ) -> Result<(), String> {
        let answer = self.on(move |rabbit| call(rabbit.management_url.clone())).await?;
        let status = answer.map_err(|error| error.to_string())?.status();
        if status.is_success() || status.as_u16() == 404 {
            Ok(())
        } else {
            Err(format!("the broker answered {status}"))
        }
    }
}

async fn probe(url: &str) -> lapin::Result<()> {
    let connection = Connection::connect(url, ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(PROBE.into(), durable, arguments).await?;
    let published = channel.basic_publish(
        "".into(),
        PROBE.into(),
        BasicPublishOptions::default(),
        b"probe",
        BasicProperties::default().with_delivery_mode(2),
    );
    published.await?.await?;
    channel.basic_get(PROBE.into(), BasicGetOptions { no_ack: true }).await?;
    channel.queue_delete(PROBE.into(), QueueDeleteOptions::default()).await?;
    connection.close(200, "probed".into()).await
}
