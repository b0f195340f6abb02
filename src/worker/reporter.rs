//! Events: what the agent says of its tasks.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::task::JoinHandle;
use tokio_util::task::TaskTracker;

use super::Clock;
use crate::{
    broker::{Broker, Names, Outgoing, PublishError},
    execute::ProjectState,
    failure::{ErrorClass, Failure},
    journal::Envelope,
    protocol::{
        ControlAnswer, ControlCommand, Event, EventError, Kind, Origin, Outcome, Progress, ProjectStatus, Round,
        Status, TaskId, TaskResult, VERSION, new_event_id,
        wire::{Identity, Message},
    },
};

/// How long a progress event may wait in a queue.
const PROGRESS_EXPIRY: Duration = Duration::from_secs(10);

/// Builds events and publishes those that nothing waits for.
pub(super) struct Reporter {
    origin: Origin,
    names: Names,
    broker: Arc<dyn Broker>,
    clock: Clock,
    seq: AtomicU64,
    background: TaskTracker,
}

/// What an event is about.
#[derive(Clone, Debug)]
pub(super) struct About<'a> {
    pub(super) identity: &'a Identity,
    pub(super) round: Round,
    pub(super) attempt: u32,
    pub(super) project: ProjectState,
    pub(super) traceparent: Option<&'a str>,
}

impl Reporter {
    pub(super) fn new(
        origin: Origin,
        names: Names,
        broker: Arc<dyn Broker>,
        clock: Clock,
        background: TaskTracker,
    ) -> Self {
        Self { origin, names, broker, clock, seq: AtomicU64::new(0), background }
    }

    /// The terminal event of an outcome, as it is kept until the broker has it.
    pub(super) fn terminal(&self, about: &About<'_>, outcome: &Outcome) -> Envelope {
        let mut event = self.event(about, outcome.status());
        event.project_status = after(about.project, about.identity.kind, outcome);
        match outcome {
            Outcome::Succeeded(result) => event.result = Some(result.clone()),
            Outcome::Failed(failure) | Outcome::Rejected(failure) => {
                event.error = Some(EventError::new(failure, None));
            }
            Outcome::Superseded(reason) => {
                let failure = Failure::new(ErrorClass::Expired, format!("superseded: {reason}"));
                event.error = Some(EventError::new(&failure, None));
            }
            Outcome::Cancelled => {}
        }
        self.envelope(&event, about.traceparent)
    }

    /// The event that tells what became of a history, as it is kept until the broker has it.
    pub(super) fn history(&self, about: &About<'_>, outcome: &Result<TaskResult, Failure>) -> Envelope {
        let mut event = self.event(about, Status::History);
        event.project_status = if about.project.active { ProjectStatus::Active } else { ProjectStatus::Error };
        match outcome {
            Ok(result) => event.result = Some(result.clone()),
            Err(failure) => event.error = Some(EventError::new(failure, None)),
        }
        self.envelope(&event, about.traceparent)
    }

    /// Says that a task waits.
    pub(super) fn accepted(&self, about: &About<'_>) {
        let mut event = self.event(about, Status::Accepted);
        event.project_status = ProjectStatus::Pending;
        self.publish_soon(self.envelope(&event, about.traceparent), true);
    }

    /// Says that an attempt has begun.
    pub(super) fn started(&self, about: &About<'_>) {
        self.publish_soon(self.envelope(&self.event(about, Status::Started), about.traceparent), true);
    }

    /// Says that an attempt failed and when the next one is due.
    pub(super) fn retrying(&self, about: &About<'_>, failure: &Failure, due: jiff::Timestamp) {
        let mut event = self.event(about, Status::Retrying);
        event.error = Some(EventError::new(failure, Some(due)));
        self.publish_soon(self.envelope(&event, about.traceparent), true);
    }

    /// Says how far a task is; transient, and lost where nobody listens.
    pub(super) fn progress(&self, about: &About<'_>, progress: Progress) {
        let mut event = self.event(about, Status::Progress);
        event.progress = Some(progress);
        let mut envelope = self.envelope(&event, about.traceparent);
        envelope.message.transient = true;
        envelope.message.expiration_ms = u64::try_from(PROGRESS_EXPIRY.as_millis()).ok();
        self.publish_soon(envelope, false);
    }

    /// Answers a control message.
    pub(super) fn answer(&self, answer: &str, command: Option<ControlCommand>, task: Option<TaskId>) -> ControlAnswer {
        ControlAnswer {
            v: VERSION,
            event_id: new_event_id(),
            at: self.clock.now(),
            node: self.origin.node.clone(),
            boot: self.origin.boot.clone(),
            answer: answer.to_owned(),
            command,
            control_id: None,
            task_id: task,
            reason: None,
            ready: None,
            consuming: None,
            not_ready: None,
            paused: None,
            running: None,
            waiting: None,
            busy_projects: None,
            hosts: None,
            journal_set_aside: None,
            agent_version: None,
        }
    }

    /// Publishes a control answer; nobody needs to wait for it.
    pub(super) fn send_answer(&self, answer: &ControlAnswer) -> JoinHandle<()> {
        self.background.spawn(self.publish(self.answered(answer), false))
    }

    /// Publishes a control answer once the one before it is out, or lost.
    pub(super) fn send_answer_after(&self, before: JoinHandle<()>, answer: &ControlAnswer) {
        let publish = self.publish(self.answered(answer), false);
        self.background.spawn(async move {
            let _ = before.await;
            publish.await;
        });
    }

    fn answered(&self, answer: &ControlAnswer) -> Envelope {
        let message = Message::json(answer, &answer.event_id, format!("control.{}", answer.answer), self.clock.now());
        let routing_key = format!("{}.control.{}", self.origin.node, answer.answer);
        Envelope { exchange: self.names.event(), routing_key, message }
    }

    fn event(&self, about: &About<'_>, status: Status) -> Event {
        Event {
            v: VERSION,
            event_id: new_event_id(),
            at: self.clock.now(),
            node: self.origin.node.clone(),
            boot: self.origin.boot.clone(),
            seq: self.seq.fetch_add(1, Ordering::Relaxed) + 1,
            task_id: about.identity.task_id.clone(),
            kind: about.identity.kind,
            project_id: about.identity.project_id,
            generation: about.identity.generation,
            project_seq: about.project.seq,
            round: about.round,
            attempt: about.attempt,
            status,
            project_status: ProjectStatus::Syncing,
            result: None,
            progress: None,
            error: None,
        }
    }

    fn envelope(&self, event: &Event, traceparent: Option<&str>) -> Envelope {
        Envelope {
            exchange: self.names.event(),
            routing_key: event.routing_key(),
            message: Message::event(event, traceparent),
        }
    }

    /// Publishes what no task waits for; a loss is logged, never repaired.
    fn publish_soon(&self, envelope: Envelope, mandatory: bool) {
        self.background.spawn(self.publish(envelope, mandatory));
    }

    fn publish(&self, envelope: Envelope, mandatory: bool) -> impl Future<Output = ()> + Send + use<> {
        let broker = self.broker.clone();
        async move {
            let Envelope { exchange, routing_key, message } = envelope;
            let outgoing = Outgoing { exchange, routing_key, message, mandatory };
            match broker.publish(outgoing).await {
                Ok(()) => {}
                Err(PublishError::Unroutable { routing_key, .. }) => {
                    tracing::debug!(routing.key = routing_key, "no queue takes this event");
                }
                Err(error) => tracing::warn!(error = %error, "event lost"),
            }
        }
    }
}

/// What the master should show for the project after an outcome.
fn after(project: ProjectState, kind: Kind, outcome: &Outcome) -> ProjectStatus {
    match outcome {
        Outcome::Succeeded(_) if kind == Kind::Delete => ProjectStatus::Deleted,
        Outcome::Succeeded(_) => ProjectStatus::Active,
        _ if project.active => ProjectStatus::Active,
        _ if project.deleted => ProjectStatus::Deleted,
        _ => ProjectStatus::Error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_shows_error_only_where_no_usable_project_exists() {
        let project = |active, deleted| ProjectState { seq: 3, mark: None, active, deleted };
        let failed = Outcome::Failed(Failure::new(ErrorClass::Auth, "x"));
        let done = Outcome::Succeeded(TaskResult::default());
        let cases = [
            (project(true, false), Kind::Pull, &failed, ProjectStatus::Active),
            (project(false, false), Kind::Clone, &failed, ProjectStatus::Error),
            (project(false, true), Kind::Pull, &failed, ProjectStatus::Deleted),
            (project(false, false), Kind::Clone, &Outcome::Cancelled, ProjectStatus::Error),
            (project(true, false), Kind::Clone, &Outcome::Cancelled, ProjectStatus::Active),
            (project(true, false), Kind::Clone, &done, ProjectStatus::Active),
            (project(false, true), Kind::Delete, &done, ProjectStatus::Deleted),
        ];
        for (project, kind, outcome, status) in cases {
            assert_eq!(after(project, kind, outcome), status, "{project:?} {kind} {outcome:?}");
        }
    }
}
