//! What haul is compared with: a bare loop on the same AMQP library, and Celery.

use std::{
    io::{BufRead as _, BufReader, Lines},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    time::Instant,
};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use lapin::{
    options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions},
    types::FieldTable,
};

use crate::rig;

/// Unsettled deliveries of the bare loop at a time, and of Celery.
const PREFETCH: u16 = 100;
/// About as much as an event of ours has.
const ANSWER: usize = 450;
/// The routing keys of what is told of a task.
const STORY: [&str; 2] = ["bench.pull.started", "bench.pull.succeeded"];

/// Consumes `expect` messages, publishes for each, and acknowledges each once that is confirmed: nothing else.
///
/// It publishes one message to the queue `{queue}.told` or, where it is told of an exchange, the two that tell of a task
/// there. It runs in a process of its own, as the agent does; its output is the time it took, from the first delivery to the
/// last acknowledgement.
pub(crate) fn be_bare(url: &str, queue: &str, events: Option<&str>, expect: u64) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime can be started");
    runtime.block_on(async {
        let (_connection, channel) = rig::connect(url).await;
        channel.basic_qos(PREFETCH, BasicQosOptions::default()).await.expect("a window can be set");
        let options = BasicConsumeOptions::default();
        let mut deliveries = channel
            .basic_consume(queue.into(), "bare".into(), options, FieldTable::default())
            .await
            .expect("it is ours");
        let (told, body) = (format!("{queue}.told"), vec![b'x'; ANSWER]);
        let (exchange, keys) = match events {
            Some(exchange) => (exchange, STORY.to_vec()),
            None => ("", vec![told.as_str()]),
        };
        let mut flying = FuturesUnordered::new();
        let (mut taken, mut begun) = (0, None);
        while taken < expect || !flying.is_empty() {
            tokio::select! {
                delivery = deliveries.next(), if taken < expect => {
                    let delivery = delivery.expect("the queue is there").expect("the channel is open");
                    begun.get_or_insert_with(Instant::now);
                    taken += 1;
                    let (channel, keys, body) = (&channel, &keys, &body);
                    flying.push(async move {
                        let mut confirms = Vec::with_capacity(keys.len());
                        for key in keys {
                            confirms.push(rig::publish(channel, exchange, key, body).await);
                        }
                        for confirm in confirms {
                            confirm.await.expect("the broker confirms");
                        }
                        delivery.ack(BasicAckOptions::default()).await.expect("the channel is open");
                    });
                }
                Some(()) = flying.next() => {}
            }
        }
        let took = begun.expect("something was consumed").elapsed();
        println!("done {}", took.as_nanos());
    });
}

/// One round of the bare loop: messages a second. It `tells` the master's queue what Haul does, or publishes one message.
pub(crate) async fn bare(rig: &rig::Rig, tasks: u64, tells: bool) -> f64 {
    let [queue, told] = rig.queues_of("bare").await;
    rig::publish_all(&rig.channel, "", &queue, (0..tasks).map(|number| rig::task(number).1)).await;
    let mut command = Command::new(std::env::current_exe().expect("this program has a path"));
    command.args(["--bare", &queue, "--url", &rig.url, "--expect", &tasks.to_string()]);
    if tells {
        command.args(["--bare-tells", &rig.names.event()]);
    }
    let mut process = Lively::start(command);
    let took: f64 = process.says("done").parse().expect("it is a number");
    process.end();
    if tells {
        assert_eq!(u64::from(rig.take_events().await), 2 * tasks, "the bare loop told of every begin and end");
    } else {
        assert_eq!(u64::from(rig.purge(&told).await), tasks, "the bare loop published one message for each");
    }
    tasks as f64 / took * 1e9
}

/// Python with Celery, if this run has one.
pub(crate) fn python() -> Option<PathBuf> {
    std::env::var_os("HAUL_BENCH_PYTHON").map(PathBuf::from)
}

/// One round of a Celery worker of two processes: tasks a second, from the first's start to the last's end.
///
/// It `tells` a durable queue of the begin and the end of each, as its results backend over AMQP does it, or nobody.
pub(crate) async fn celery(rig: &rig::Rig, python: &Path, tasks: u64, tells: bool, log: &Path) -> f64 {
    let [queue, results] = rig.queues_of(if tells { "celery-tells" } else { "celery" }).await;
    let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("benches/throughput/celery_side.py");
    let command = |role: &str| {
        let mut command = Command::new(python);
        command
            .arg(&script)
            .args([role, &rig.url, &queue, &tasks.to_string(), &PREFETCH.to_string()])
            .args(tells.then_some(&results))
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .stderr(std::fs::File::create(log).expect("the log can be written"));
        command
    };
    let filled = command("fill").status().expect("python can be run");
    assert!(filled.success(), "Celery could not publish: {}", crate::agent::last_words(log));
    assert_eq!(u64::from(rig.ready(&queue).await), tasks, "Celery's tasks are there");
    let mut process = Lively::start(command("work"));
    let took: f64 = process.says("done").parse().expect("it is a number");
    process.end();
    if tells {
        assert_eq!(u64::from(rig.purge(&results).await), 2 * tasks, "Celery told of every begin and end");
    }
    tasks as f64 / took * 1e9
}

/// A process that says something.
struct Lively {
    process: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Lively {
    fn start(mut command: Command) -> Self {
        let mut process = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("it can be started");
        let lines = BufReader::new(process.stdout.take().expect("it is piped")).lines();
        Self { process, lines }
    }

    /// What follows `word` in the first line that begins with it.
    fn says(&mut self, word: &str) -> String {
        let mut lines = self.lines.by_ref().map_while(Result::ok);
        let said = lines.find_map(|line| line.strip_prefix(word).map(|rest| rest.trim().to_owned()));
        said.unwrap_or_else(|| panic!("the other side ended without a word of {word:?}"))
    }

    /// Ends it, in order where it can be.
    fn end(mut self) {
        if let Some(pid) = i32::try_from(self.process.id()).ok().and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let _ = self.process.wait();
    }
}

impl Drop for Lively {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
