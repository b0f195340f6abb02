//! A master's half of the contract: publishing tasks, believing events, finding what is stuck.
//!
//! A master needs three things, and may use each without the others:
//!
//! - [`Client`] publishes a checked [`Submission`] with confirm, `mandatory` and a deadline, tells agents things, and
//!   subscribes: durably with [`Results`], live and with progress with [`Live`].
//! - [`Projection`], or [`TaskRow`] and [`ProjectRow`] where the rows are in a database of the master's own, turns events
//!   that come twice, late and in any order into the state of tasks and projects.
//! - [`Reconciler`] says of every task that has not ended why it has not, and what to do; [`diagnose`] is its pure core.
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use haul::{
//!     broker::{Names, rabbitmq::RabbitMq, settings::BrokerSettings},
//!     master::{Client, ClientSettings, News, Projection, Reconciler, ReconcilerSettings, Submission},
//!     protocol::NodeName,
//! };
//! use jiff::Timestamp;
//!
//! # async fn master() -> Result<(), Box<dyn std::error::Error>> {
//! let broker = Arc::new(RabbitMq::connect(&BrokerSettings::default(), "my master").await?);
//! let client = Client::new(broker, Names::default(), ClientSettings::default());
//! client.declare().await?;
//! let mut results = client.results().await?;
//! let mut projection = Projection::new();
//!
//! // Written down first, then published, then confirmed: what lies in between is found by the reconciler.
//! let node = NodeName::new("worker-001")?;
//! let task = Submission::clone(42, "https://git.example/team/app.git", "7_app").branch("main").build()?;
//! projection.want(&node, &task, Timestamp::now());
//! client.publish(&node, &task).await?;
//! projection.confirm(task.task_id(), Timestamp::now());
//!
//! while let Some(received) = results.next().await {
//!     match &received.news {
//!         // A database is committed here, before the acknowledgement.
//!         News::Event(event) => drop(projection.apply(event)),
//!         News::Answer(answer) => println!("{} answers {}", answer.node, answer.answer),
//!         News::Unreadable { reason, .. } => eprintln!("not understood: {reason}"),
//!     }
//!     // It comes again where its channel is gone, which changes nothing.
//!     let _ = received.ack().await;
//!     if projection.task(task.task_id()).is_some_and(|row| row.is_done()) {
//!         break;
//!     }
//! }
//!
//! // Every few minutes: what has not ended, why, and what to do.
//! let reconciler = Reconciler::new(client, ReconcilerSettings::default());
//! for stuck in reconciler.reconcile(projection.tasks(), Timestamp::now()).await? {
//!     println!("{stuck}");
//! }
//! # Ok(())
//! # }
//! ```

mod answers;
mod client;
mod diagnosis;
mod live;
mod news;
mod project;
mod projection;
mod publish;
mod reconciler;
mod results;
mod submission;
mod task;

pub use self::{
    answers::Untold,
    client::{Client, ClientSettings},
    diagnosis::{AgentSeen, DeadSeen, Mend, NodeSeen, Patience, Seen, Stuck, Why, diagnose},
    live::{Heard, Live},
    news::{Interest, News},
    project::{Place, ProjectRow},
    projection::{Applied, Projection},
    publish::Unpublished,
    reconciler::{Reconciler, ReconcilerSettings},
    results::{Received, Results},
    submission::{Draft, OfClone, OfDelete, OfPull, OfStatus, Submission},
    task::{Ignored, TaskChange, TaskRow},
};
