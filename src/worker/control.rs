//! Control messages: cancel, pause, resume, drain, inspect. Acknowledged once journalled.

use std::{
    sync::{Arc, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::watch, task::JoinHandle};
use tokio_util::task::AbortOnDropHandle;

use super::{
    Worker,
    consume::{CONTROL_WINDOW, PAUSED},
    watch::Verdict,
};
use crate::{
    broker::{Delivery, Health},
    failure::Failure,
    journal::{CancelAnswer, Key},
    protocol::{Control, ControlAnswer, ControlCommand, ControlMessage, Outcome, TaskId, wire},
    store::{JournalError, SET_ASIDE},
};

/// How long to wait before the control queue is tried again.
const AGAIN: Duration = Duration::from_secs(5);

/// Who asked for a drain, by `control_id`, and the publish that says it has begun: `drained` must not overtake it.
pub(super) type Draining = (Option<String>, JoinHandle<()>);

impl Worker {
    /// Follows the control queue. Its trouble lowers readiness and never stops tasks.
    pub(super) async fn control(self: Arc<Self>) {
        let queue = self.settings.names.control_node(&self.settings.node);
        loop {
            match self.broker.consume(self.control_consume()).await {
                Ok(mut consumer) => {
                    let mut health = consumer.health();
                    let watched = self.watched(&consumer, queue.clone(), CONTROL_WINDOW, false);
                    let verdict = watch::Sender::new(Verdict::Well);
                    let mut judged = verdict.subscribe();
                    let _watch = AbortOnDropHandle::new(tokio::spawn(watched.watch(verdict)));
                    loop {
                        let served = *judged.borrow_and_update() == Verdict::Well;
                        let up = served && *health.borrow_and_update() == Health::Up;
                        self.readiness
                            .send_if_modified(|readiness| std::mem::replace(&mut readiness.control, up) != up);
                        tokio::select! {
                            delivery = consumer.next() => match delivery {
                                Some(delivery) => self.obey(delivery).await,
                                None => break,
                            },
                            changed = health.changed() => if changed.is_err() { break },
                            // An error would mean that the watch has ended, which it does not.
                            Ok(()) = judged.changed() => {}
                        }
                    }
                }
                Err(error) => tracing::warn!(error = %error, "control messages cannot be received"),
            }
            self.readiness.send_modify(|readiness| readiness.control = false);
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// Does what a control message says, answers, acknowledges.
    async fn obey(self: &Arc<Self>, delivery: Delivery) {
        let message = match wire::decode_control(&delivery.message) {
            Ok(message) => message,
            Err(failure) => return self.refuse_command(delivery, None, failure).await,
        };
        let control = match Control::try_from(message.clone()) {
            Ok(control) => control,
            Err(failure) => return self.refuse_command(delivery, Some(message), failure).await,
        };
        tracing::info!(
            control.command = message.command.as_str(),
            task.id = message.task_id.as_ref().map(TaskId::as_str),
            "control"
        );
        let answered = match control {
            Control::Cancel(task) => self.cancel(task).await,
            Control::Pause => self.pause(true).await,
            Control::Resume => self.pause(false).await,
            Control::Drain => return self.drain(message, delivery).await,
            Control::Inspect => Ok(self.inspect().await),
        };
        match answered {
            Ok(mut answer) => {
                answer.command = Some(message.command);
                answer.control_id = message.control_id;
                self.reporter.send_answer(&answer);
                // A command that comes again does no harm: each of them can be obeyed twice.
                let _ = delivery.ack().await;
            }
            Err(error) => {
                tracing::error!(error = %error, "the command was not journalled; given back");
                tokio::time::sleep(AGAIN).await;
                let _ = delivery.requeue().await;
            }
        }
    }

    /// Ends the agent in order. Acknowledged first: a drain must not come again and end the next start.
    async fn drain(&self, message: ControlMessage, delivery: Delivery) {
        let mut answer = self.reporter.answer("draining", Some(message.command), None);
        answer.control_id.clone_from(&message.control_id);
        let said = self.reporter.send_answer(&answer);
        let _ = delivery.ack().await;
        self.drains().push((message.control_id, said));
        self.soft.cancel();
    }

    /// Tells who asked for a drain that nothing runs any more.
    pub(super) fn say_drained(&self) {
        for (control_id, said) in std::mem::take(&mut *self.drains()) {
            let mut answer = self.reporter.answer("drained", Some(ControlCommand::Drain), None);
            answer.control_id = control_id;
            self.reporter.send_answer_after(said, &answer);
        }
    }

    fn drains(&self) -> MutexGuard<'_, Vec<Draining>> {
        self.drains.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn refuse_command(&self, delivery: Delivery, message: Option<ControlMessage>, failure: Failure) {
        tracing::warn!(error = %failure, "control message refused");
        let mut answer = self.reporter.answer("refused", None, None);
        answer.reason = Some(failure.message);
        if let Some(message) = message {
            answer.command = Some(message.command);
            answer.control_id = message.control_id;
            answer.task_id = message.task_id;
        }
        self.reporter.send_answer(&answer);
        let _ = delivery.ack().await;
    }

    /// Cancels a queued, waiting or running task; idempotent, and may come before its task.
    async fn cancel(self: &Arc<Self>, task: TaskId) -> Result<ControlAnswer, JournalError> {
        let answer = self.journal.step(&task, self.clock.now(), |step| step.page.cancel()).await?;
        let said = match answer {
            CancelAnswer::Pending => "pending",
            CancelAnswer::Open(entry) => {
                let key = Key { task_id: task.clone(), round: entry.round };
                if !self.active.cancel(&key) {
                    // Nobody here holds it: it waits in a retry queue or at the broker, and is answered on its return.
                    let settled = self.settle_unheld(task.clone(), *entry, Outcome::Cancelled).await;
                    if let Err(super::Interrupted::Journal(error)) = settled {
                        return Err(error);
                    }
                }
                "cancelling"
            }
            CancelAnswer::Settled(event) => {
                if let Some(event) = event {
                    self.tell_again(event);
                }
                "settled"
            }
        };
        Ok(self.reporter.answer(said, None, Some(task)))
    }

    /// Whether it takes no tasks until it is resumed.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        *self.paused.borrow()
    }

    async fn pause(&self, pause: bool) -> Result<ControlAnswer, JournalError> {
        self.journal.set_note(PAUSED, pause.then_some("yes")).await?;
        self.paused.send_replace(pause);
        self.changed.notify_one();
        Ok(self.reporter.answer(if pause { "paused" } else { "resumed" }, None, None))
    }

    async fn inspect(&self) -> ControlAnswer {
        let (_, running) = self.active.counts();
        let mut answer = self.reporter.answer("state", None, None);
        let readiness = *self.readiness.borrow();
        (answer.ready, answer.consuming) = (Some(readiness.is_ready()), Some(readiness.consuming));
        answer.not_ready = Some(self.not_ready()).filter(|reasons| !reasons.is_empty());
        answer.paused = Some(*self.paused.borrow());
        answer.running = Some(running.len() as u64);
        answer.waiting = Some(self.turns.waiting() as u64);
        answer.busy_projects = Some(running);
        answer.hosts = Some(self.executor.hosts()).filter(|hosts| !hosts.is_empty());
        // It is told of while it can be read; its trouble shows in readiness.
        let set_aside = self.journal.note(SET_ASIDE).await.ok().flatten();
        answer.journal_set_aside = set_aside.and_then(|at| at.parse().ok());
        answer.agent_version = Some(env!("CARGO_PKG_VERSION").to_owned());
        answer
    }
}
