//! Dead letters by the thousand: the real command lists them again and again and replays them at a rate.
//!
//! `scripts/full-scale dead` runs this at ten thousand letters, a hundred lists and ten thousand replays.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::{
    collections::BTreeSet,
    io::{BufRead as _, BufReader},
    path::PathBuf,
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use haul::{
    broker::{Broker as _, Names, Outgoing, rabbitmq::RabbitMq},
    protocol::{
        NodeName,
        wire::{Message, header},
    },
};
use serde_json::Value;
use support::{eventually, rabbit::Rabbit, unique};

/// What is asked for, unless the variable says otherwise.
fn scale(variable: &str, usual: usize) -> usize {
    std::env::var(variable).map_or(usual, |text| text.parse().unwrap_or_else(|_| panic!("{variable} is no number")))
}

/// A fleet of one node with its policies, and the settings of the command.
struct Fleet {
    broker: Arc<RabbitMq>,
    names: Names,
    config: PathBuf,
}

impl Fleet {
    async fn new(test: &str) -> Self {
        let rabbit = tokio::task::spawn_blocking(Rabbit::shared).await.unwrap();
        let names = Names::new(unique(test));
        let config = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{test}-{}.toml", std::process::id()));
        let (url, management, prefix) = (&rabbit.url, &rabbit.management_url, names.prefix());
        std::fs::write(
            &config,
            format!("prefix = {prefix:?}\n[broker]\nurls = [{url:?}]\nmanagement_url = {management:?}\n"),
        )
        .unwrap();
        let fleet = Self { broker: Arc::new(rabbit.client().await), names, config };
        // With the policies that lift the delivery limits of newer brokers.
        let applied = fleet.haul(&["topology", "apply", "--node", "a"]).output().unwrap();
        assert!(applied.status.success(), "{}", String::from_utf8_lossy(&applied.stderr));
        fleet
    }

    fn haul(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_haul"));
        command.env_clear().arg("--config").arg(&self.config).args(arguments);
        command
    }

    /// Dead-letters so many tasks, many at a time.
    async fn bury(&self, count: usize) {
        for begin in (0..count).step_by(500) {
            let letters = (begin..count.min(begin + 500)).map(async |number| {
                let mut message =
                    Message { body: "{}".into(), message_id: Some(format!("t-{number}")), ..Message::default() };
                message.set(header::NODE, "a");
                message.set(header::ERROR_CLASS, "network");
                message.set(header::ERROR, "the upstream did not answer");
                message.set(header::KIND, "clone");
                message.set(header::PROJECT, i64::try_from(number).unwrap());
                message.set(header::ROUND, 1);
                let (exchange, routing_key) = (self.names.dlx(), "a".to_owned());
                self.broker.publish(Outgoing { exchange, routing_key, message, mandatory: true }).await
            });
            for told in futures_util::future::join_all(letters).await {
                told.unwrap();
            }
        }
        self.counts(&self.names.dead(), count).await;
    }

    async fn counts(&self, queue: &str, count: usize) {
        eventually("the broker counts all of them", async || {
            self.broker.depth(queue).await.unwrap().is_some_and(|depth| depth.messages as usize == count)
        })
        .await;
    }

    /// What `haul dead list` says, in its order.
    fn listed(&self) -> Vec<String> {
        let output = self.haul(&["dead", "list", "--json"]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let letters = serde_json::Deserializer::from_slice(&output.stdout).into_iter::<Value>();
        letters.map(|letter| letter.unwrap()["task_id"].as_str().unwrap().to_owned()).collect()
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.config);
    }
}

/// One after the other without a pause, as a script would.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn listing_again_and_again_loses_no_dead_letter_and_changes_no_order() {
    let (letters, lists) = (scale("HAUL_DEAD_LETTERS", 1_000), scale("HAUL_DEAD_LISTS", 10));
    let fleet = Arc::new(Fleet::new("lists").await);
    fleet.bury(letters).await;
    let mut times = Vec::new();
    let mut first: Option<Vec<String>> = None;
    for number in 0..lists {
        let (asking, begun) = (Arc::clone(&fleet), Instant::now());
        let listed = tokio::task::spawn_blocking(move || asking.listed()).await.unwrap();
        times.push(begun.elapsed());
        let first = first.get_or_insert_with(|| listed.clone());
        assert_eq!(listed.len(), letters, "list {number}");
        let parting = listed.iter().zip(first.iter()).position(|(one, other)| one != other);
        if let Some(at) = parting {
            let part = |list: &[String]| list[at..list.len().min(at + 8)].join(" ");
            panic!("list {number} has another order from {at} on: {}; before: {}", part(&listed), part(first));
        }
    }
    let wanted: BTreeSet<_> = (0..letters).map(|number| format!("t-{number}")).collect();
    assert_eq!(first.unwrap().into_iter().collect::<BTreeSet<_>>(), wanted);
    fleet.counts(&fleet.names.dead(), letters).await;
    times.sort();
    println!("{lists} lists of {letters} letters: median {:?}, worst {:?}", times[lists / 2], times[lists - 1]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replay_of_many_keeps_to_its_rate_and_reports_each() {
    let (letters, rate) = (scale("HAUL_DEAD_REPLAYS", 300), scale("HAUL_DEAD_RATE", 100));
    let fleet = Arc::new(Fleet::new("replays").await);
    fleet.bury(letters).await;
    let replayer = Arc::clone(&fleet);
    let told = tokio::task::spawn_blocking(move || replayer.replayed(rate)).await.unwrap();
    let ids: BTreeSet<_> = told.iter().map(|(_, letter)| letter["task_id"].as_str().unwrap().to_owned()).collect();
    assert_eq!((told.len(), ids.len()), (letters, letters));
    assert!(told.iter().all(|(_, letter)| letter["outcome"] == "replayed"));
    let whole = told[letters - 1].0 - told[0].0;
    let due = Duration::from_secs(letters as u64 - 1) / u32::try_from(rate).unwrap();
    println!("{letters} letters at {rate}/s in {whole:?}, due in {due:?}");
    assert!(whole > due.mul_f64(0.99), "too fast: {whole:?} instead of {due:?}");
    // A machine that has much else to do is slower; far slower would be another fault.
    assert!(whole < due * 2 + Duration::from_secs(20), "too slow: {whole:?} instead of {due:?}");
    // In no second more than it may be; what is read here may have waited in the pipe for a moment.
    for (index, (at, _)) in told.iter().enumerate() {
        let within = told[index..].iter().take_while(|(later, _)| *later - *at < Duration::from_secs(1)).count();
        assert!(within <= rate + rate / 4 + 1, "{within} letters within a second of letter {index}");
    }
    fleet.counts(&fleet.names.dead(), 0).await;
    fleet.counts(&fleet.names.node(&NodeName::new("a").unwrap()), letters).await;
}

impl Fleet {
    /// Replays all of them; each line with the moment at which it came.
    fn replayed(&self, rate: usize) -> Vec<(Instant, Value)> {
        let rate = format!("{rate}/s");
        let mut command = self.haul(&["dead", "replay", "--all", "--json", "--rate", &rate]);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let told = lines.map(|line| (Instant::now(), serde_json::from_str(&line.unwrap()).unwrap())).collect();
        assert!(child.wait().unwrap().success());
        told
    }
}
