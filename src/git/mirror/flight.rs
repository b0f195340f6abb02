//! One writer at a time for each mirror of this process, and how many wait for it.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicUsize, Ordering},
    },
};

use futures_util::future::BoxFuture;
use serde_json::Value;

use crate::{
    failure::Failure,
    git::{
        Run, child,
        hosts::{Hosts, Pass},
        transfer::{self, Heard},
    },
    protocol::{GitUrl, Progress},
};

/// The right to write into one mirror; whoever writes holds it, whoever only lists and reads does not need it.
#[derive(Debug, Default)]
pub(super) struct Flight {
    turn: Arc<tokio::sync::Mutex<()>>,
    waiting: AtomicUsize,
}

/// That right, while it lasts.
pub(super) type Turn = tokio::sync::OwnedMutexGuard<()>;

/// The flights of all mirrors, kept only while somebody uses them.
#[derive(Debug, Default)]
pub(super) struct Flights(Mutex<HashMap<String, Weak<Flight>>>);

impl Flights {
    /// The flight of one mirror.
    pub(super) fn of(&self, key: &str) -> Arc<Flight> {
        let mut flights = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(flight) = flights.get(key).and_then(Weak::upgrade) {
            return flight;
        }
        flights.retain(|_, flight| flight.strong_count() > 0);
        let flight = Arc::new(Flight::default());
        flights.insert(key.to_owned(), Arc::downgrade(&flight));
        flight
    }
}

/// Counts one that waits, for as long as it does.
struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Flight {
    /// Waits for the right to write, and tells whether it had to.
    ///
    /// # Errors
    /// When a bound of `run` is passed first.
    pub(super) async fn turn(&self, run: &Run<'_>) -> Result<(Turn, bool), Failure> {
        match self.at_once() {
            Some(turn) => Ok((turn, false)),
            None => Ok((self.wait(run).await?, true)),
        }
    }

    /// The right to write, if nobody has it.
    fn at_once(&self) -> Option<Turn> {
        Arc::clone(&self.turn).try_lock_owned().ok()
    }

    async fn wait(&self, run: &Run<'_>) -> Result<Turn, Failure> {
        let waiting = self.waiting.fetch_add(1, Ordering::Relaxed) + 1;
        let _counted = Waiting(&self.waiting);
        tracing::debug!(mirror.waiting = waiting, "a fetch waits for another one into the same mirror");
        (run.progress)(Progress { phase: "waiting".to_owned(), ..Progress::default() });
        child::within(run, None, Arc::clone(&self.turn).lock_owned()).await
    }
}

/// The place of one transfer at its host; others have it while the transfer waits for its turn.
#[derive(Clone)]
pub(super) struct Seat {
    hosts: Arc<Hosts>,
    url: GitUrl,
    pass: Arc<Mutex<Option<Pass>>>,
}

impl Seat {
    /// Takes one.
    ///
    /// # Errors
    /// Where the host is left alone or busy, or a bound of `run` is passed.
    pub(super) async fn take(hosts: Arc<Hosts>, url: GitUrl, run: &Run<'_>) -> Result<Self, Failure> {
        let seat = Self { hosts, url, pass: Arc::default() };
        seat.again(run).await?;
        Ok(seat)
    }

    /// Notes from a transfer's progress that the host has answered.
    pub(super) fn watch(&self, progress: &Progress) {
        if let Some(pass) = self.pass.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
            pass.watch(progress);
        }
    }

    /// Gives it up for a while: the host has answered.
    fn leave(&self) {
        if let Some(pass) = self.left() {
            let _ = pass.settle(Ok(()));
        }
    }

    /// Takes it again, if it was given up.
    async fn again(&self, run: &Run<'_>) -> Result<(), Failure> {
        if self.pass.lock().unwrap_or_else(PoisonError::into_inner).is_none() {
            let pass = self.hosts.enter(&self.url, run).await?;
            *self.pass.lock().unwrap_or_else(PoisonError::into_inner) = Some(pass);
        }
        Ok(())
    }

    /// Gives it back with what became of the transfer.
    ///
    /// # Errors
    /// That of the transfer.
    pub(super) fn settle<T>(&self, result: Result<T, Failure>) -> Result<T, Failure> {
        match self.left() {
            Some(pass) => pass.settle(result),
            None => result,
        }
    }

    fn left(&self) -> Option<Pass> {
        self.pass.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Answers the questions of one transfer child, and holds what it was given until the child has ended.
pub(super) struct Desk<'a> {
    flight: Arc<Flight>,
    seat: Seat,
    heard: Option<&'a (dyn Fn(Heard) + Send + Sync)>,
    run: &'a Run<'a>,
    held: Arc<Mutex<Option<Turn>>>,
}

impl<'a> Desk<'a> {
    pub(super) fn new(
        flight: Arc<Flight>,
        seat: &Seat,
        heard: Option<&'a (dyn Fn(Heard) + Send + Sync)>,
        run: &'a Run<'a>,
    ) -> Self {
        Self { flight, seat: seat.clone(), heard, run, held: Arc::default() }
    }

    /// Answers one question.
    pub(super) fn answer(&self, question: Value) -> BoxFuture<'a, Result<Value, Failure>> {
        let (flight, seat, held) = (Arc::clone(&self.flight), self.seat.clone(), Arc::clone(&self.held));
        let (heard, run) = (self.heard, self.run);
        Box::pin(async move {
            let wrong = |error: serde_json::Error| Failure::internal(format!("a transfer child asked: {error}"));
            let waited = match serde_json::from_value(question).map_err(wrong)? {
                // A second engine goes on where the first one failed.
                transfer::Question::Turn if held.lock().unwrap_or_else(PoisonError::into_inner).is_some() => false,
                transfer::Question::Turn => {
                    let (turn, waited) = if let Some(turn) = flight.at_once() {
                        (turn, false)
                    } else {
                        seat.leave();
                        (flight.wait(run).await?, true)
                    };
                    *held.lock().unwrap_or_else(PoisonError::into_inner) = Some(turn);
                    waited
                }
                transfer::Question::Place => {
                    seat.again(run).await?;
                    return Ok(Value::Null);
                }
                transfer::Question::Heard(what) => {
                    if let Some(heard) = heard {
                        heard(what);
                    }
                    return Ok(Value::Null);
                }
            };
            serde_json::to_value(transfer::Granted { waited }).map_err(wrong)
        })
    }

    /// The right to write that the child was given, if it asked.
    pub(super) fn into_turn(self) -> Option<Turn> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}
