//! One connection that is kept: made again whenever it is lost, until it is closed.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::StreamExt as _;
use lapin::{Channel, Connection};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    dial::{DialError, Target, Wire, words},
    waits::Waits,
};
use crate::broker::Health;

/// How often the state of a quiet connection is looked at: its events say the rest.
const GLANCE: Duration = Duration::from_millis(500);
/// For the broker's part in the end of a connection.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(3);

/// A connection that lives no longer than this is no success: another is not made at once.
const SHORT_LIFE: Duration = Duration::from_secs(1);

/// A connection, from the pool or of one's own.
pub(super) struct Line {
    held: Held,
    /// When the broker last confirmed a publish on it; at first, when it was made.
    confirmed: Mutex<Instant>,
    given_up: CancellationToken,
}

enum Held {
    Pooled(deadpool_lapin::Object),
    Own(Connection),
}

impl Line {
    fn new(held: Held) -> Self {
        Self { held, confirmed: Mutex::new(Instant::now()), given_up: CancellationToken::new() }
    }

    /// A connection of one's own.
    pub(super) fn own(connection: Connection) -> Self {
        Self::new(Held::Own(connection))
    }

    fn connection(&self) -> &Connection {
        match &self.held {
            Held::Pooled(pooled) => pooled,
            Held::Own(connection) => connection,
        }
    }

    /// Whether it still stands.
    pub(super) fn connected(&self) -> bool {
        self.connection().status().connected()
    }

    /// Whether the broker has stopped reading from it.
    pub(super) fn blocked(&self) -> bool {
        self.connection().status().blocked()
    }

    /// The broker confirmed a publish.
    pub(super) fn confirmed(&self) {
        *self.confirmed.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// For how long it has confirmed no publish.
    pub(super) fn unconfirming(&self) -> Duration {
        self.confirmed.lock().unwrap_or_else(PoisonError::into_inner).elapsed()
    }

    /// Lets go of a connection that stands and is of no use: a node of a cluster that is cut off from the others answers
    /// heartbeats and nothing else. Whoever keeps it makes another, beginning at the next address.
    pub(super) fn give_up(&self, reason: &str) {
        if !self.given_up.is_cancelled() {
            tracing::warn!(error = reason, "the broker does not answer on this connection; making another");
            self.given_up.cancel();
        }
    }

    /// Says goodbye, within a time.
    pub(super) async fn close(&self, reason: &str) {
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, self.connection().close(200, reason.into())).await;
    }

    /// A new channel on it.
    pub(super) async fn channel(&self) -> lapin::Result<Channel> {
        self.connection().create_channel().await
    }
}

/// How a link is.
#[derive(Clone)]
pub(super) enum State {
    /// No attempt has ended since it was begun or lost.
    Trying,
    /// It stands.
    Up(Arc<Line>),
    /// The last attempt at every address failed; another follows.
    Failed(DialError),
    /// It was closed for good.
    Closed,
}

/// Where a link's connections come from.
pub(super) enum Source {
    /// One pool for each address, each of one connection, with the way that it connects.
    Pools(Vec<(deadpool_lapin::Pool, Wire)>),
    /// Our own.
    Own,
}

/// A kept connection; ends when dropped.
pub(super) struct Link {
    state: watch::Receiver<State>,
    health: watch::Receiver<Health>,
    closing: CancellationToken,
    _guard: DropGuard,
}

impl Link {
    /// Begins to connect, at the address that `first` has, which other links move on too.
    pub(super) fn start(
        targets: Arc<Vec<Target>>,
        first: Arc<AtomicUsize>,
        source: Source,
        health: watch::Sender<Health>,
    ) -> Self {
        let (state_out, state) = watch::channel(State::Trying);
        let closing = CancellationToken::new();
        let watching = health.subscribe();
        let keeper = Keeper { targets, first, source, state: state_out, health, closing: closing.clone() };
        tokio::spawn(keeper.run());
        Self { state, health: watching, _guard: closing.clone().drop_guard(), closing }
    }

    /// How it is, and becomes.
    pub(super) fn state(&self) -> watch::Receiver<State> {
        self.state.clone()
    }

    /// How it is, in short.
    pub(super) fn health(&self) -> watch::Receiver<Health> {
        self.health.clone()
    }

    /// The connection, or why the first attempt from now on failed.
    pub(super) async fn now(&self) -> Result<Arc<Line>, DialError> {
        let mut state = self.state();
        let settled = state.wait_for(|state| !matches!(state, State::Trying)).await;
        match settled.as_deref() {
            Ok(State::Up(line)) => Ok(Arc::clone(line)),
            Ok(State::Failed(error)) => Err(error.clone()),
            Ok(State::Trying | State::Closed) | Err(_) => Err(closed()),
        }
    }

    /// Closes the connection for good.
    pub(super) async fn close(&self) {
        self.closing.cancel();
        let mut state = self.state();
        let done = state.wait_for(|state| matches!(state, State::Closed));
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, done).await;
    }
}

/// The connection, once there is one; `None` when there will be none.
pub(super) async fn up(state: &mut watch::Receiver<State>) -> Option<Arc<Line>> {
    let ready = state.wait_for(|state| matches!(state, State::Up(_) | State::Closed)).await.ok()?;
    match &*ready {
        State::Up(line) => Some(Arc::clone(line)),
        _ => None,
    }
}

fn closed() -> DialError {
    DialError { address: "the broker".to_owned(), reason: "the connection was closed".to_owned(), refused: false }
}

struct Keeper {
    targets: Arc<Vec<Target>>,
    /// The address to begin with: behind the one that was lost last, which may be gone for long.
    first: Arc<AtomicUsize>,
    source: Source,
    state: watch::Sender<State>,
    health: watch::Sender<Health>,
    closing: CancellationToken,
}

impl Keeper {
    async fn run(self) {
        let closing = self.closing.clone();
        let kept = closing.run_until_cancelled(self.keep()).await;
        debug_assert!(kept.is_none(), "a link is kept until it is closed");
        self.health.send_replace(Health::Down);
        if let State::Up(line) = self.state.send_replace(State::Closed) {
            line.close("closing").await;
        }
    }

    async fn keep(&self) {
        let mut waits = Waits::to_connect();
        loop {
            match self.connect().await {
                Ok((index, line)) => {
                    let begun = Instant::now();
                    self.state.send_replace(State::Up(Arc::clone(&line)));
                    tokio::select! {
                        () = self.watch(&line) => {}
                        () = line.given_up.cancelled() => drop(tokio::spawn(async move { line.close("of no use").await })),
                    }
                    self.first.store(index + 1, Ordering::Relaxed);
                    self.health.send_replace(Health::Down);
                    self.state.send_replace(State::Trying);
                    tracing::warn!("the connection to the broker was lost; connecting again");
                    if begun.elapsed() > SHORT_LIFE {
                        waits.reset();
                    } else {
                        tokio::time::sleep(waits.next()).await;
                    }
                }
                Err(error) => {
                    let wait = waits.next();
                    tracing::warn!(
                        broker.address = error.address,
                        error = error.reason,
                        retry_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX),
                        "cannot connect to the broker"
                    );
                    self.state.send_replace(State::Failed(error));
                    tokio::time::sleep(wait).await;
                }
            }
        }
    }

    /// Tries every address once, in turn; the connection, and the number of its address.
    async fn connect(&self) -> Result<(usize, Arc<Line>), DialError> {
        let mut failure = closed();
        let begin = self.first.load(Ordering::Relaxed);
        for index in (0..self.targets.len()).map(|step| (begin + step) % self.targets.len()) {
            let target = &self.targets[index];
            let held = match &self.source {
                Source::Own => target.connect().await.map(Held::Own),
                Source::Pools(pools) => {
                    let (pool, wire) = &pools[index];
                    target.over(wire, pool.get()).await.map(Held::Pooled)
                }
            };
            match held {
                Ok(held) => {
                    tracing::info!(broker.address = %target.address, "connected to the broker");
                    return Ok((index, Arc::new(Line::new(held))));
                }
                // A refusal says more than silence, whichever came first.
                Err(error) if !failure.refused || error.refused => failure = error,
                Err(_) => {}
            }
        }
        Err(failure)
    }

    /// Returns when the connection is lost.
    async fn watch(&self, line: &Arc<Line>) {
        let mut events = Box::pin(line.connection().events_listener());
        let mut glance = tokio::time::interval(GLANCE);
        while line.connected() {
            let health = if line.blocked() { Health::Blocked } else { Health::Up };
            self.health.send_if_modified(|old| std::mem::replace(old, health) != health);
            tokio::select! {
                event = events.next() => match event {
                    Some(lapin::Event::ConnectionBlocked(reason)) => {
                        tracing::warn!(reason, "the broker has an alarm and takes no messages");
                    }
                    Some(lapin::Event::ConnectionUnblocked) => tracing::info!("the broker takes messages again"),
                    Some(lapin::Event::Error(error)) => tracing::debug!(error = words(&error), "broker connection"),
                    Some(_) => {}
                    None => return,
                },
                _ = glance.tick() => {}
            }
        }
    }
}
