//! One connection that is kept: made again whenever it is lost, until it is closed.

use std::{sync::Arc, time::Duration};

use futures_util::StreamExt as _;
use lapin::{Channel, Connection};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    dial::{DialError, Target, words},
    waits::Waits,
};
use crate::broker::Health;

/// How often the state of a quiet connection is looked at: its events say the rest.
const GLANCE: Duration = Duration::from_millis(500);
/// For the broker's part in the end of a connection.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(3);

/// A connection, from the pool or of one's own.
pub(super) enum Line {
    Pooled(deadpool_lapin::Object),
    Own(Connection),
}

impl Line {
    fn connection(&self) -> &Connection {
        match self {
            Self::Pooled(pooled) => pooled,
            Self::Own(connection) => connection,
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
    /// One pool for each address, each of one connection.
    Pools(Vec<deadpool_lapin::Pool>),
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
    /// Begins to connect.
    pub(super) fn start(targets: Arc<Vec<Target>>, source: Source, health: watch::Sender<Health>) -> Self {
        let (state_out, state) = watch::channel(State::Trying);
        let closing = CancellationToken::new();
        let watching = health.subscribe();
        let keeper = Keeper { targets, source, state: state_out, health, closing: closing.clone() };
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
            let goodbye = line.connection().close(200, "closing".into());
            let _ = tokio::time::timeout(CLOSE_TIMEOUT, goodbye).await;
        }
    }

    async fn keep(&self) {
        let mut waits = Waits::new();
        loop {
            match self.connect().await {
                Ok(line) => {
                    waits.reset();
                    self.state.send_replace(State::Up(Arc::clone(&line)));
                    self.watch(&line).await;
                    self.health.send_replace(Health::Down);
                    self.state.send_replace(State::Trying);
                    tracing::warn!("the connection to the broker was lost; connecting again");
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

    /// Tries every address once, in turn.
    async fn connect(&self) -> Result<Arc<Line>, DialError> {
        let mut failure = closed();
        for (index, target) in self.targets.iter().enumerate() {
            let line = match &self.source {
                Source::Own => target.connect().await.map(Line::Own),
                Source::Pools(pools) => target.bounded(pools[index].get()).await.map(Line::Pooled),
            };
            match line {
                Ok(line) => {
                    tracing::info!(broker.address = %target.address, "connected to the broker");
                    return Ok(Arc::new(line));
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
