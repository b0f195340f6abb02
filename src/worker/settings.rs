//! What a worker is told by its assembly.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;

use crate::{broker::Names, protocol::NodeName, retry::RetrySettings};

/// What a worker needs to know.
#[derive(Clone, Debug)]
pub struct WorkerSettings {
    /// The node.
    pub node: NodeName,
    /// Names on the broker.
    pub names: Names,
    /// Tasks that run at a time; one more where it is a delete or a status.
    pub slots: usize,
    /// Unsettled deliveries at a time; fixed while consuming.
    pub window: u16,
    /// When to try again.
    pub retry: RetrySettings,
    /// The master's queue of events; empty for none: then an unrouted terminal event counts as delivered.
    pub results_queue: String,
    /// How long a journal record is kept after its last sighting.
    pub retention: Duration,
    /// How long a task may wait in the window before it goes round through a retry queue, uncharged, so that waiting
    /// and deadline together stay under the broker's consumer timeout.
    pub longest_wait: Duration,
    /// How long a consumer left on the queue by a lost connection of ours may linger.
    pub ghost_limit: Duration,
    /// Take the queue although somebody else consumes it.
    pub force: bool,
}

/// The wall clock, as an argument: tests tie it to virtual time.
#[derive(Clone)]
pub struct Clock(Arc<dyn Fn() -> Timestamp + Send + Sync>);

impl Clock {
    /// The machine's clock.
    #[must_use]
    pub fn system() -> Self {
        Self(Arc::new(Timestamp::now))
    }

    /// A clock that starts at `epoch` and moves with tokio's, which tests can pause and advance.
    #[must_use]
    pub fn following_tokio(epoch: Timestamp) -> Self {
        let origin = tokio::time::Instant::now();
        Self(Arc::new(move || epoch + origin.elapsed()))
    }

    /// A clock that says what `tell` does: tests set it.
    #[must_use]
    pub fn told_by(tell: impl Fn() -> Timestamp + Send + Sync + 'static) -> Self {
        Self(Arc::new(tell))
    }

    /// Now.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        (self.0)()
    }
}
