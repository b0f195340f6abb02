//! Steps 4 to 6: waiting for a turn, and one attempt.

use std::{
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use futures_util::FutureExt as _;
use jiff::Timestamp;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    Interrupted, Worker,
    arrival::Arrival,
    hand_over::Parked,
    reporter::About,
    step::{Observe, Step},
    turns::{Queued, Turn},
};
use crate::{
    execute::{Job, Pace, ProjectState},
    failure::{ErrorClass, Failure},
    git::{Fence, Run},
    journal::{Admission, Entry, Ticket},
    protocol::{Outcome, Place, Progress, TaskId},
    retry::Next,
};

/// How long a task that goes round uncharged stays away.
const ROUND_TRIP: Duration = Duration::from_secs(5);
/// How long a task that waits for its project's clone stays away.
const BEHIND_A_CLONE: Duration = Duration::from_secs(5);
/// At most one progress event of a task in this time.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);
/// What an executor may take beyond its deadline before it is taken for stuck.
const DEADLINE_SLACK: Duration = Duration::from_secs(30);

/// What the journal said of a delivery.
pub(super) struct Admitted {
    pub(super) admission: Admission,
    /// Of a task that is to be done.
    pub(super) standing: Standing,
}

/// How a task that is to be done stands.
pub(super) enum Standing {
    /// It has its turn, and its attempt is noted; `mark` is what the journal knew of the project when it decided.
    Begun { turn: Turn, mark: Option<Place> },
    /// It waits for its turn.
    Waits(Queued),
    /// Its project has too many waiting here.
    TooMany,
    /// The executor does not do such tasks.
    Refused(Failure),
}

/// How the handling of a delivery ends.
pub(super) enum Ending {
    /// The task has ended in this round.
    Over { ticket: Ticket, outcome: Outcome },
    /// Another copy of it has to come.
    Again(Again),
    /// It had ended before.
    Answered(Box<Entry>),
    /// Its identity belongs to another body.
    Mismatch,
    /// A newer copy is under way already.
    Done,
}

/// When, and at what cost, a copy has to come.
pub(super) struct Again {
    pub(super) ticket: Ticket,
    /// The attempt that the copy asks for.
    pub(super) attempt: u32,
    pub(super) wait: Duration,
    pub(super) deferred_since: Option<Timestamp>,
    /// The attempt's failure, if one was made.
    pub(super) failure: Option<Failure>,
}

impl Ending {
    /// An uncharged round trip behind a clone of the project.
    pub(super) fn behind(ticket: Ticket) -> Self {
        Self::round_trip(ticket, BEHIND_A_CLONE, None)
    }

    /// The rest of a copy's wait.
    pub(super) fn early(ticket: Ticket, wait: Duration, deferred_since: Option<Timestamp>) -> Self {
        Self::round_trip(ticket, wait, deferred_since)
    }

    fn round_trip(ticket: Ticket, wait: Duration, deferred_since: Option<Timestamp>) -> Self {
        Self::Again(Again { ticket, attempt: ticket.attempt, wait, deferred_since, failure: None })
    }
}

/// The last question before the point of no return.
struct StillWanted {
    stop: CancellationToken,
    observer: Arc<dyn Observe>,
    task: TaskId,
}

#[async_trait]
impl Fence for StillWanted {
    async fn check(&self) -> Result<(), Failure> {
        if self.stop.is_cancelled() {
            return Err(Failure::internal("cancelled"));
        }
        self.observer.reached(Step::Asked, Some(&self.task));
        Ok(())
    }
}

impl Worker {
    /// Waits for a slot and the project's turn, then makes one attempt.
    pub(super) async fn attempt(
        self: &Arc<Self>,
        arrival: &Arrival,
        ticket: Ticket,
        standing: Standing,
        turn: &mut Option<Turn>,
    ) -> Result<Ending, Interrupted> {
        let over = |outcome| Ok(Ending::Over { ticket, outcome });
        let round_trip = || Ok(Ending::round_trip(ticket, ROUND_TRIP, arrival.headers.deferred_since));
        let begun = match standing {
            Standing::Refused(failure) => return over(Outcome::Rejected(failure)),
            Standing::TooMany => return round_trip(),
            Standing::Begun { turn: taken, mark } => {
                *turn = Some(taken);
                Some(mark)
            }
            Standing::Waits(queued) => {
                self.observer.reached(Step::Queued, Some(&arrival.key.task_id));
                match self.wait_for_turn(arrival, ticket, queued).await? {
                    Waited::Turn(taken) => *turn = Some(taken),
                    Waited::TooLong => return round_trip(),
                    Waited::Cancelled => return over(Outcome::Cancelled),
                }
                None
            }
        };
        if begun.is_some() {
            self.observer.reached(Step::Queued, Some(&arrival.key.task_id));
        }
        if self.soft.is_cancelled() {
            return Err(Interrupted::Stopping);
        }
        self.observer.reached(Step::Turn, Some(&arrival.key.task_id));
        // While it has the turn nobody else changes the project: what is known of it now holds until its end.
        let project = self.executor.project(arrival.task.project).await;
        let admission = match begun {
            // Nothing was applied to the project between the journal's decision and the turn.
            Some(mark) if mark == project.mark && !arrival.cancel.is_cancelled() => Admission::Fresh(ticket),
            // Much may have happened while it waited: the journal is asked again, and notes the attempt in the same step.
            _ => self.begin(arrival, project.mark).await?,
        };
        self.observer.reached(Step::Begun, Some(&arrival.key.task_id));
        match admission {
            Admission::Fresh(ticket) => self.execute(arrival, ticket, project).await,
            other => Ok(Self::without_running(arrival, other)),
        }
    }

    async fn wait_for_turn(
        &self,
        arrival: &Arrival,
        ticket: Ticket,
        mut queued: Queued,
    ) -> Result<Waited, Interrupted> {
        if self.soft.is_cancelled() {
            return Err(Interrupted::Stopping);
        }
        let project = self.executor.project(arrival.task.project).await;
        self.reporter.accepted(&About { attempt: 0, ..arrival.about(ticket, project) });
        let _parked = Parked::among(&self.parked);
        tokio::select! {
            biased;
            () = arrival.cancel.cancelled() => Ok(Waited::Cancelled),
            () = self.soft.cancelled() => Err(Interrupted::Stopping),
            // What is left of the journal's room is for what was begun.
            () = self.in_trouble() => Err(Interrupted::Stopping),
            turn = queued.turn() => turn.map(Waited::Turn).ok_or(Interrupted::Stopping),
            () = tokio::time::sleep(self.settings.longest_wait) => Ok(Waited::TooLong),
        }
    }

    /// Asks the journal again and, if the task is still wanted, notes that its attempt begins.
    async fn begin(self: &Arc<Self>, arrival: &Arrival, mark: Option<Place>) -> Result<Admission, Interrupted> {
        let mut sighting = arrival.sighting(mark, &self.boot, self.clock.now(), self.settings.retry.longest_wait());
        // It came in time; that it waited here does not make it early again.
        sighting.not_before = None;
        let (now, round, project) = (sighting.now, sighting.round, sighting.project);
        let (boot, alone, turns) = (self.boot.clone(), self.caution.is_on(), self.turns.clone());
        let needs_clone = arrival.task.kind().needs_clone();
        let step = self.journal.step(&arrival.key.task_id, now, move |step| {
            sighting.next_arrival = step.next_arrival;
            let (admission, _) = step.page.admit(&sighting, &(step.clones)(project));
            let Admission::Fresh(ticket) = admission else { return admission };
            // A clone that failed gives up its turn, and may be back before whoever got it has asked.
            if needs_clone && turns.clone_waits_before(project, ticket.place) {
                return Admission::Behind(ticket);
            }
            step.page.begin(round, ticket.attempt, &boot, alone);
            admission
        });
        Ok(step.await?)
    }

    /// One attempt, within its bounds.
    async fn execute(
        self: &Arc<Self>,
        arrival: &Arrival,
        ticket: Ticket,
        project: ProjectState,
    ) -> Result<Ending, Interrupted> {
        let started = Instant::now();
        let about = arrival.about(ticket, project);
        self.active.running(&arrival.key, arrival.task.project);
        self.reporter.started(&about);
        let limits = self.executor.limits(&arrival.task);
        let last = Mutex::new((None::<Instant>, Pace::default()));
        let progress = |progress: Progress| {
            let now = Instant::now();
            let mut last = last.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let (last, pace) = &mut *last;
            let progress = pace.measure(now.into_std(), progress);
            if last.is_none_or(|last| now.duration_since(last) >= PROGRESS_INTERVAL) {
                *last = Some(now);
                self.reporter.progress(&about, progress);
            }
        };
        let stop = arrival.cancel.child_token();
        let fence =
            StillWanted { stop: stop.clone(), observer: self.observer.clone(), task: arrival.key.task_id.clone() };
        let run = Run {
            deadline: started + limits.timeout,
            stall: limits.stall,
            cancel: stop.clone(),
            progress: &progress,
            fence: &fence,
        };
        let job =
            Job { task: arrival.task.clone(), round: arrival.key.round, attempt: ticket.attempt, place: ticket.place };
        let work = AssertUnwindSafe(self.executor.execute(&job, &run)).catch_unwind();
        let mut work = std::pin::pin!(tokio::time::timeout(limits.timeout + DEADLINE_SLACK, work));
        let result = tokio::select! {
            result = &mut work => result,
            () = self.hard.cancelled() => {
                stop.cancel();
                work.await
            }
        };
        let result = match result {
            Ok(Ok(result)) => result,
            Ok(Err(_panic)) => Err(Failure::internal("the executor panicked; this is a fault of the agent")),
            Err(_elapsed) => Err(Failure::internal("the executor did not end at its deadline")),
        };
        self.observer.reached(Step::Executed, Some(&arrival.key.task_id));
        match result {
            Ok(mut result) => {
                let took = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
                result.duration_ms.get_or_insert(took);
                Ok(Ending::Over { ticket, outcome: Outcome::Succeeded(result) })
            }
            Err(_) if arrival.cancel.is_cancelled() => Ok(Ending::Over { ticket, outcome: Outcome::Cancelled }),
            Err(_) if self.hard.is_cancelled() => Err(Interrupted::Stopping),
            Err(failure) => Ok(self.after_failure(arrival, ticket, failure)),
        }
    }

    /// What follows from a failed attempt.
    fn after_failure(&self, arrival: &Arrival, ticket: Ticket, failure: Failure) -> Ending {
        let (now, since) = (self.clock.now(), arrival.headers.deferred_since);
        let told = failure.clone();
        if failure.class == ErrorClass::Internal {
            tracing::error!(task.id = %arrival.key.task_id, task.attempt = ticket.attempt, error = %failure, "attempt failed");
        } else {
            tracing::info!(task.id = %arrival.key.task_id, task.attempt = ticket.attempt, error = %failure, "attempt failed");
        }
        match self.settings.retry.decide(ticket.attempt, failure, since, now, rand::random()) {
            Next::Fail(failure) => Ending::Over { ticket, outcome: Outcome::Failed(failure) },
            Next::Retry(wait) => Ending::Again(Again {
                ticket,
                attempt: ticket.attempt + 1,
                wait,
                deferred_since: None,
                failure: Some(told),
            }),
            Next::Defer(wait) => Ending::Again(Again {
                ticket,
                attempt: ticket.attempt,
                wait,
                deferred_since: Some(since.unwrap_or(now)),
                failure: Some(told),
            }),
        }
    }
}

/// What came of waiting.
enum Waited {
    /// A slot and the project's turn.
    Turn(Turn),
    /// It waited as long as it may.
    TooLong,
    /// The master cancelled it.
    Cancelled,
}
