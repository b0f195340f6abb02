//! A small master: asks a node for a project, follows it to its end, and says why it does not come where it does not.
//!
//!     AGENT_AMQP_URL=amqp://guest:guest@127.0.0.1:5672/%2f \
//!         cargo run --example master -- worker-001 42 https://git.example/team/app.git 7_app
//!
//! What it knows is in memory, so the live subscription is enough for it. A master that keeps its rows in a database reads
//! the durable queue instead, and commits before it acknowledges: the documentation of `haul::master` shows that.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "it is a program for a terminal")]

use std::{error::Error, process::ExitCode, sync::Arc, time::Duration};

use haul::{
    broker::{Names, rabbitmq::RabbitMq, settings::BrokerSettings},
    master::{
        Client, ClientSettings, Heard, Interest, Live, News, Projection, Reconciler, ReconcilerSettings, Submission,
    },
    protocol::{NodeName, Status, TaskId},
};
use jiff::Timestamp;

#[tokio::main]
async fn main() -> ExitCode {
    match run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

async fn run() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [node, project, url, path] = &arguments[..] else {
        return Err("give a node, a project's number, the URL of its upstream, and its directory".into());
    };
    let node = NodeName::new(node.as_str())?;
    let mut settings = BrokerSettings::default();
    if let Ok(url) = std::env::var("AGENT_AMQP_URL") {
        settings.urls = vec![url.into()];
    }
    let names = Names::new(std::env::var("AGENT_PREFIX").unwrap_or_else(|_| "haul".to_owned()));
    let broker = Arc::new(RabbitMq::connect(&settings, "example master").await?);
    let client = Client::new(broker, names, ClientSettings::default());
    // Subscribed before the task is published: no event of it can be missed.
    let mut live = client.follow(&Interest::all().node(&node)).await?;
    let mut projection = Projection::new();

    let task = Submission::clone(project.parse()?, url.as_str(), path.as_str()).build()?;
    projection.want(&node, &task, Timestamp::now());
    client.publish(&node, &task).await?;
    projection.confirm(task.task_id(), Timestamp::now());
    println!("published {}", task.task_id());

    let reconciler = Reconciler::new(client.clone(), ReconcilerSettings::default());
    let mut every = tokio::time::interval(Duration::from_mins(1));
    let status = loop {
        tokio::select! {
            ended = follow(&mut live, &mut projection, task.task_id()) => match ended? {
                Some(status) => break status,
                // Its end may have been missed. The agent tells it again, and does nothing twice.
                None => client.publish(&node, &task).await?,
            },
            _ = every.tick() => {
                for stuck in reconciler.reconcile(projection.tasks(), Timestamp::now()).await? {
                    println!("{stuck}");
                }
            }
        }
    };
    if let Some(place) = projection.project(&node, task.project_id()).and_then(|project| project.place()) {
        println!("{:?} at {:?}", place.local_path, place.head);
    }
    client.broker().close().await;
    if status == Status::Succeeded { Ok(()) } else { Err(format!("the task ended as {status}").into()) }
}

/// Applies events until the task has ended, or some may have been missed. Safe to drop while it waits.
async fn follow(live: &mut Live, known: &mut Projection, task: &TaskId) -> Result<Option<Status>, Box<dyn Error>> {
    loop {
        match live.next().await.ok_or("the subscription was ended")? {
            Heard::News(News::Event(event)) => {
                if known.apply(&event).is_news() {
                    println!("{} {} {}", event.kind, event.task_id, event.status);
                }
            }
            Heard::News(News::Answer(_)) => {}
            Heard::News(News::Unreadable { reason, .. }) => println!("not understood: {reason}"),
            Heard::Gap => return Ok(None),
        }
        if let Some(row) = known.task(task).filter(|row| row.is_done()) {
            return Ok(row.status());
        }
    }
}
