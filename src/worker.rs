//! The agent's role: from a delivery to its acknowledgement.
//!
//! [`Worker::handle`] is the path of one message; `docs/ARCHITECTURE.md` tells what holds if the agent dies at each of
//! its steps, and `tests/crash.rs` kills it there.

mod active;
mod arrival;
mod attempt;
mod caution;
mod consume;
mod control;
mod copies;
mod enrol;
mod error;
mod hand_over;
mod history;
mod leave;
mod line;
mod poison;
mod readiness;
mod reporter;
mod settings;
mod settle;
mod step;
mod turns;
mod upkeep;
mod watch;

use std::{
    panic::AssertUnwindSafe,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use futures_util::FutureExt as _;
use tokio::sync::{Notify, watch::Sender};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use enrol::Ahead;
pub use error::WorkerError;
pub use readiness::Readiness;
pub use settings::{Clock, WorkerSettings};
pub use step::{Observe, Step, Unobserved};

use crate::{
    broker::{Broker, Delivery},
    execute::Execute,
    failure::{ErrorClass, Failure},
    journal::{Admission, Entry},
    protocol::{Origin, Outcome, wire::Undecodable},
    store::Journal,
};
use active::{Active, Entered};
use arrival::Arrival;
use attempt::{Admitted, Ending, Standing};
use caution::Caution;
use error::Interrupted;
use history::Histories;
use leave::Through;
use line::Lines;
use poison::Trial;
use reporter::Reporter;
use turns::{Queued, Turn, Turns};
use watch::Verdict;

/// Everything that a worker is made of.
pub struct Parts {
    /// What it is told.
    pub settings: WorkerSettings,
    /// Where messages come from and go to.
    pub broker: Arc<dyn Broker>,
    /// What it remembers.
    pub journal: Journal,
    /// What does the work.
    pub executor: Arc<dyn Execute>,
    /// Who watches its steps.
    pub observer: Arc<dyn Observe>,
    /// The wall clock.
    pub clock: Clock,
    /// Identity of this start.
    pub boot: String,
}

/// The agent's role.
pub struct Worker {
    settings: WorkerSettings,
    broker: Arc<dyn Broker>,
    journal: Journal,
    executor: Arc<dyn Execute>,
    observer: Arc<dyn Observe>,
    clock: Clock,
    boot: String,
    reporter: Reporter,
    active: Active,
    turns: Arc<Turns>,
    lines: Arc<Lines>,
    /// Take no more: what waits is given back, what runs is finished.
    soft: CancellationToken,
    /// Stop: what runs is ended and given back.
    hard: CancellationToken,
    /// Every message in hand.
    handling: TaskTracker,
    /// Publishes and payments that no delivery waits for.
    background: TaskTracker,
    /// Histories that are being attached, or wait for another try.
    histories: Histories,
    /// Settled tasks whose debts the broker does not take.
    owing: AtomicUsize,
    /// Something that the consuming loop waits for has changed.
    changed: Notify,
    paused: Sender<bool>,
    /// The journal cannot be written.
    trouble: Sender<bool>,
    /// One delivery at a time, after unclean starts.
    caution: Caution,
    readiness: Sender<Readiness>,
    /// What the broker says of our consumer, compared with what we know.
    verdict: Sender<Verdict>,
    /// A successor waits for our storage: nothing more is begun.
    leaving: Sender<bool>,
    /// Nothing runs any more, and the successor is next in line for the queue.
    left: AtomicBool,
    /// Tasks in hand that wait for their turn.
    parked: AtomicUsize,
    /// Who asked for a drain, to be told when it is done.
    drains: Mutex<Vec<control::Draining>>,
}

impl Worker {
    /// Puts the parts together; nothing runs yet.
    #[must_use]
    pub fn new(parts: Parts, soft: CancellationToken, hard: CancellationToken) -> Arc<Self> {
        let Parts { settings, broker, journal, executor, observer, clock, boot } = parts;
        let (background, histories) = (TaskTracker::new(), Histories::new(settings.slots));
        let origin = Origin { node: settings.node.clone(), boot: boot.clone() };
        let reporter = Reporter::new(origin, settings.names.clone(), broker.clone(), clock.clone(), background.clone());
        Arc::new(Self {
            turns: Turns::new(settings.slots),
            lines: Arc::default(),
            settings,
            broker,
            journal,
            executor,
            observer,
            clock,
            boot,
            reporter,
            active: Active::default(),
            soft,
            // A token of our own below it: that we are done must not read as an order to stop.
            hard: hard.child_token(),
            handling: TaskTracker::new(),
            background,
            histories,
            owing: AtomicUsize::new(0),
            changed: Notify::new(),
            paused: Sender::new(false),
            trouble: Sender::new(false),
            caution: Caution::new(),
            readiness: Sender::new(Readiness::default()),
            verdict: Sender::new(Verdict::Well),
            leaving: Sender::new(false),
            left: AtomicBool::new(false),
            parked: AtomicUsize::new(0),
            drains: Mutex::default(),
        })
    }

    /// The path of one message, from its delivery to its acknowledgement.
    ///
    /// Each message in hand has a future of it: what rarely happens is boxed, here and below, which keeps that small.
    ///
    /// It is `read` already where others are handled beside it: then its place in the line of its project is taken.
    async fn handle(self: Arc<Self>, delivery: Delivery, read: Option<Result<Arrival, Undecodable>>) {
        let trial = self.try_alone(&delivery.message).await;
        if matches!(trial, Trial::Unreadable) {
            let done = Box::pin(self.bury(&delivery.message)).await;
            return Box::pin(self.finish(delivery, done)).await;
        }
        let mut arrival = match read.unwrap_or_else(|| self.read(&delivery.message)) {
            Ok(arrival) => arrival,
            Err(undecodable) => return Box::pin(self.refuse(delivery, undecodable)).await,
        };
        self.was_read(&arrival).await;
        if let Some(owner) = arrival.belongs_elsewhere(&self.settings.node) {
            return Box::pin(self.forward(&arrival, owner, delivery)).await;
        }
        arrival.cancel = match self.active.enter(&arrival.key, &arrival.digest, delivery) {
            Entered::First(cancel) => cancel,
            Entered::Joined => return,
            Entered::Mismatch(delivery) => return Box::pin(self.report_mismatch(&arrival, *delivery)).await,
        };
        if matches!(trial, Trial::GivenUp) {
            return Box::pin(self.give_up(&arrival)).await;
        }
        // A panic on the way is a fault of ours; the task must neither be lost nor block the window with its deliveries.
        match AssertUnwindSafe(self.conclude(&arrival)).catch_unwind().await {
            Ok(Ok(through)) => self.acknowledge(&arrival, through).await,
            Ok(Err(Interrupted::Broken)) | Err(_) => Box::pin(self.after_panic(&arrival)).await,
            Ok(Err(interrupted)) => Box::pin(self.give_back(&arrival, interrupted)).await,
        }
    }

    /// Steps 3 to 8: everything between knowing a task and owing nothing for it.
    async fn conclude(self: &Arc<Self>, arrival: &Arrival) -> Result<Through, Interrupted> {
        let mut turn: Option<Turn> = None;
        arrival.line.turn().await;
        let admitted = self.admit(arrival).await?;
        // It has its place in its project's queue, or needs none.
        arrival.line.pass();
        let ending = match admitted.admission {
            Admission::Fresh(ticket) => self.attempt(arrival, ticket, admitted.standing, &mut turn).await?,
            other => Self::without_running(arrival, other),
        };
        match ending {
            Ending::Over { ticket, outcome } => {
                let owed = self.settle(arrival, ticket, outcome).await?;
                drop(turn);
                self.pay(&arrival.key, owed).await?;
            }
            Ending::Again(again) => {
                let attempt = again.attempt;
                Box::pin(self.release(arrival, again)).await?;
                drop(turn);
                return Ok(Through::GoesOn(attempt));
            }
            Ending::Answered(entry) => Box::pin(self.answer(&arrival.key, *entry)).await?,
            Ending::Mismatch => Box::pin(self.dead_letter_mismatch(arrival)).await?,
            // The copy that was let go before this delivery came asks for a later attempt.
            Ending::Done => return Ok(Through::GoesOn(arrival.headers.attempt.saturating_add(1))),
        }
        Ok(Through::Ended)
    }

    /// Step 3: asks the journal what this delivery is. What is to be done is queued in the same step; where it has its turn
    /// at once its attempt begins there too, so that one commit holds both.
    async fn admit(self: &Arc<Self>, arrival: &Arrival) -> Result<Admitted, Interrupted> {
        let refused = self.executor.admit(&arrival.task).err();
        let mark = self.executor.project(arrival.task.project).await.mark;
        let sighting = arrival.sighting(mark, &self.boot, self.clock.now(), self.settings.retry.longest_wait());
        let (now, project, waiting) = (sighting.now, sighting.project, arrival.waiting());
        let (turns, alone) = (refused.is_none().then(|| self.turns.clone()), self.caution.is_on());
        let step = self.journal.step(&arrival.key.task_id, now, move |step| {
            let mut sighting = sighting;
            sighting.next_arrival = step.next_arrival;
            let (admission, closed) = step.page.admit(&sighting, &(step.clones)(project));
            let ticket = if let Admission::Fresh(ticket) = &admission { Some(*ticket) } else { None };
            let mut queued = turns.zip(ticket).and_then(|(turns, ticket)| turns.queue_work(waiting, ticket.place));
            let turn = queued.as_mut().and_then(Queued::at_once);
            let begun = turn.is_some();
            if let (true, Some(ticket)) = (begun, ticket) {
                step.page.begin(sighting.round, ticket.attempt, &sighting.boot, alone);
            }
            (admission, closed, queued, turn)
        });
        let (admission, closed, queued, turn) = step.await?;
        self.observer.reached(Step::Admitted, Some(&arrival.key.task_id));
        if !closed.is_empty() {
            Box::pin(self.close_lower_rounds(arrival, closed)).await?;
        }
        let standing = match (refused, queued, turn) {
            (Some(failure), ..) => Standing::Refused(failure),
            (None, None, _) => Standing::TooMany,
            (None, Some(_), Some(turn)) => Standing::Begun { turn, mark },
            (None, Some(queued), None) => Standing::Waits(queued),
        };
        Ok(Admitted { admission, standing })
    }

    /// What follows where nothing has to run.
    fn without_running(arrival: &Arrival, admission: Admission) -> Ending {
        let over = |ticket, outcome| Ending::Over { ticket, outcome };
        match admission {
            Admission::Fresh(ticket) | Admission::Behind(ticket) => Ending::behind(ticket),
            Admission::Early(ticket, wait) => Ending::early(ticket, wait, arrival.headers.deferred_since),
            Admission::Settled(entry) => Ending::Answered(entry),
            Admission::Released => Ending::Done,
            Admission::Cancelled(ticket) => over(ticket, Outcome::Cancelled),
            Admission::Superseded(ticket, reason) => over(ticket, Outcome::Superseded(reason)),
            Admission::Expired(ticket) => {
                let failure = Failure::new(ErrorClass::Expired, "its not_after had passed before it could start");
                let tried = arrival.headers.attempt > 1;
                over(ticket, if tried { Outcome::Failed(failure) } else { Outcome::Rejected(failure) })
            }
            Admission::Crashed(ticket) => over(ticket, poison::crashed()),
            Admission::Mismatch => Ending::Mismatch,
        }
    }

    /// A message that is no task of ours: dead-lettered with the reason, and reported where it can be named.
    async fn refuse(self: &Arc<Self>, delivery: Delivery, undecodable: Undecodable) {
        let message = &delivery.message;
        let done = self.sure(message, self.reject_undecodable(message, undecodable)).await;
        self.finish(delivery, done).await;
    }

    /// A task of another node, moved here by hand: it goes to its own queue.
    async fn forward(&self, arrival: &Arrival, owner: &crate::protocol::NodeName, delivery: Delivery) {
        tracing::info!(task.id = %arrival.key.task_id, node = %owner, "forwarded to the node it belongs to");
        let done = self.sure(&delivery.message, self.publish_forwarded(arrival, owner)).await;
        self.finish(delivery, done).await;
    }

    /// The same identity with another body while the first is in hand.
    async fn report_mismatch(&self, arrival: &Arrival, delivery: Delivery) {
        let done = self.sure(&delivery.message, self.dead_letter_mismatch(arrival)).await;
        self.finish(delivery, done).await;
    }

    /// How many settled tasks the broker does not take the debts of.
    fn owing(&self) -> usize {
        self.owing.load(Ordering::Relaxed)
    }

    /// Ends lower rounds of a task that are still open when a replay of it is admitted.
    async fn close_lower_rounds(self: &Arc<Self>, arrival: &Arrival, closed: Vec<Entry>) -> Result<(), Interrupted> {
        for entry in closed {
            self.settle_unheld(arrival.key.task_id.clone(), entry, Outcome::Superseded("a replay of it came".into()))
                .await?;
        }
        Ok(())
    }
}
