//! A master's way to the broker: publishing tasks, telling agents, subscribing.

use std::{sync::Arc, time::Duration};

use futures_util::{StreamExt as _, stream};
use jiff::Timestamp;

use super::{
    answers::{Answers, Untold},
    live::Live,
    news::Interest,
    publish::{self, Unpublished},
    results::Results,
    submission::Submission,
};
use crate::{
    broker::{Broker, BrokerError, Names, Outgoing},
    protocol::{Control, ControlAnswer, ControlCommand, ControlMessage, NodeName, TaskId, VERSION, wire::Message},
};

/// How a client behaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientSettings {
    /// The queue of events to read; nothing for `<prefix>.master.event`.
    pub results_queue: Option<String>,
    /// How long one publish may take in all, reconnecting included.
    pub deadline: Duration,
    /// How long an agent may take to answer a control message.
    pub answer_within: Duration,
    /// Publishes on their way at a time in [`Client::publish_all`].
    pub in_flight: usize,
    /// Events handed out and not acknowledged at a time.
    pub prefetch: u16,
}

impl Default for ClientSettings {
    fn default() -> Self {
        Self {
            results_queue: None,
            // Longer than a broker's fail-over, shorter than a person's patience.
            deadline: Duration::from_secs(10),
            answer_within: Duration::from_secs(10),
            in_flight: 512,
            prefetch: 100,
        }
    }
}

/// A master's way to the broker. Clones share it.
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

struct Shared {
    broker: Arc<dyn Broker>,
    names: Names,
    settings: ClientSettings,
    /// Held across the subscription, so that it is made once.
    answers: tokio::sync::Mutex<Option<Arc<Answers>>>,
}

impl Client {
    /// A client on a broker, with the names of its fleet.
    #[must_use]
    pub fn new(broker: Arc<dyn Broker>, names: Names, settings: ClientSettings) -> Self {
        Self { shared: Arc::new(Shared { broker, names, settings, answers: tokio::sync::Mutex::default() }) }
    }

    /// The broker behind it.
    #[must_use]
    pub fn broker(&self) -> &Arc<dyn Broker> {
        &self.shared.broker
    }

    /// The names of its fleet.
    #[must_use]
    pub fn names(&self) -> &Names {
        &self.shared.names
    }

    /// The master's queue of events.
    #[must_use]
    pub fn results_queue(&self) -> String {
        self.shared.settings.results_queue.clone().unwrap_or_else(|| self.names().master_event())
    }

    /// Makes what the fleet shares where it is not there yet, the master's queue of events included, as
    /// `haul topology apply` does but for policies. Needs the permission to configure.
    ///
    /// # Errors
    /// When something exists with other arguments, or the permission is missing.
    pub async fn declare(&self) -> Result<(), BrokerError> {
        self.broker().declare(&self.names().shared_topology(&self.results_queue())).await
    }

    /// Publishes a task to a node; once this returns well, the task is in the node's queue.
    ///
    /// # Errors
    /// Says whether the node is not enrolled (at once), nothing was sent, or it may have arrived. After each of them the
    /// same submission may be published again.
    pub async fn publish(&self, node: &NodeName, task: &Submission) -> Result<(), Unpublished> {
        self.publish_within(node, task, self.shared.settings.deadline).await
    }

    /// The same with a deadline of its own.
    ///
    /// # Errors
    /// See [`publish`](Self::publish).
    pub async fn publish_within(
        &self,
        node: &NodeName,
        task: &Submission,
        within: Duration,
    ) -> Result<(), Unpublished> {
        let message = task.message(Timestamp::now());
        self.send(self.names().task(), node, message, within).await
    }

    /// Publishes many tasks, many of them on their way at a time; the answers are in the order of the tasks. The deadline is
    /// that of each.
    pub async fn publish_all(
        &self,
        tasks: impl IntoIterator<Item = (NodeName, Submission)>,
    ) -> Vec<Result<(), Unpublished>> {
        let publishing = tasks.into_iter().map(|(node, task)| {
            let client = self.clone();
            async move { client.publish(&node, &task).await }
        });
        stream::iter(publishing).buffered(self.shared.settings.in_flight.max(1)).collect().await
    }

    /// Tells an agent something and waits for its answer: cancel a task, pause, resume, drain, inspect.
    ///
    /// # Errors
    /// When there is no such agent, it refuses, or it does not answer in time. A command may then still be obeyed when the
    /// agent is back, an inspection is forgotten; each may be told again.
    pub async fn tell(&self, node: &NodeName, control: Control) -> Result<ControlAnswer, Untold> {
        self.tell_within(node, control, self.shared.settings.answer_within).await
    }

    /// The same with a time of its own.
    ///
    /// # Errors
    /// See [`tell`](Self::tell).
    pub async fn tell_within(
        &self,
        node: &NodeName,
        control: Control,
        within: Duration,
    ) -> Result<ControlAnswer, Untold> {
        let answers = self.answers().await?;
        let id = crate::protocol::new_event_id();
        let (command, task_id) = command(control);
        let body = ControlMessage { v: VERSION, command, task_id, control_id: Some(id.clone()) };
        let mut message = Message::control(&body, Timestamp::now());
        if command == ControlCommand::Inspect {
            // Nobody waits for it any more then, and an agent that is away must not find a pile of them.
            message.expiration_ms = u64::try_from(within.as_millis()).ok();
        }
        let mut expected = answers.expect(id);
        let mut gaps = answers.gaps();
        let end = tokio::time::Instant::now() + within;
        loop {
            let left = end.saturating_duration_since(tokio::time::Instant::now());
            self.send(self.names().control(), node, message.clone(), left).await?;
            tokio::select! {
                biased;
                answer = expected.answer() => {
                    let answer = answer.ok_or(Untold::Ended)?;
                    return match answer.answer.as_str() {
                        "refused" => Err(Untold::Refused {
                            node: node.clone(),
                            reason: answer.reason.unwrap_or_else(|| "it gave no reason".to_owned()),
                        }),
                        _ => Ok(*answer),
                    };
                }
                // The answer may have been missed; every command may be obeyed twice.
                changed = gaps.changed() => if changed.is_err() { return Err(Untold::Ended) },
                () = tokio::time::sleep_until(end) => return Err(Untold::NoAnswer { node: node.clone(), within }),
            }
        }
    }

    /// Cancels a task, queued, waiting or running; it may come before its task. The terminal event tells how it ended.
    ///
    /// # Errors
    /// See [`tell`](Self::tell).
    pub async fn cancel(&self, node: &NodeName, task: &TaskId) -> Result<ControlAnswer, Untold> {
        self.tell(node, Control::Cancel(task.clone())).await
    }

    /// The durable subscription: every event but progress, and the answers of agents, until they are acknowledged.
    ///
    /// # Errors
    /// When the broker cannot be reached, or has no such queue: [`declare`](Self::declare) makes it.
    pub async fn results(&self) -> Result<Results, BrokerError> {
        let queue = self.results_queue();
        if queue.is_empty() {
            return Err(BrokerError::Settings("the results queue has no name: there is nothing to read".to_owned()));
        }
        Results::start(self.broker(), queue, self.shared.settings.prefetch).await
    }

    /// The live subscription: progress too, from now on, for as long as it is held.
    ///
    /// # Errors
    /// When the broker cannot be reached, or refuses.
    pub async fn follow(&self, interest: &Interest) -> Result<Live, BrokerError> {
        Live::start(self.broker(), self.names(), &interest.patterns()).await
    }

    async fn send(
        &self,
        exchange: String,
        node: &NodeName,
        message: Message,
        within: Duration,
    ) -> Result<(), Unpublished> {
        let outgoing = Outgoing { exchange, routing_key: node.to_string(), message, mandatory: true };
        publish::publish(self.broker().as_ref(), node, &outgoing, within).await
    }

    /// The one subscription to answers that all who tell something share, made when first needed.
    async fn answers(&self) -> Result<Arc<Answers>, BrokerError> {
        let mut shared = self.shared.answers.lock().await;
        if let Some(answers) = shared.as_ref().filter(|answers| !answers.has_ended()) {
            return Ok(Arc::clone(answers));
        }
        let live = self.follow(&Interest::all().answers()).await?;
        Ok(Arc::clone(shared.insert(Arc::new(Answers::start(live)))))
    }
}

/// A command as it is written on the wire.
fn command(control: Control) -> (ControlCommand, Option<TaskId>) {
    match control {
        Control::Cancel(task) => (ControlCommand::Cancel, Some(task)),
        Control::Pause => (ControlCommand::Pause, None),
        Control::Resume => (ControlCommand::Resume, None),
        Control::Drain => (ControlCommand::Drain, None),
        Control::Inspect => (ControlCommand::Inspect, None),
    }
}
