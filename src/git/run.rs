//! What bounds one execution: a deadline, a stall limit, a cancel, and a last question before the point of no return.

use std::time::Duration;

use async_trait::async_trait;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{failure::Failure, protocol::Progress};

/// The last question before an execution changes what its user sees: is the task still wanted?
#[async_trait]
pub trait Fence: Send + Sync {
    /// Whether to go on.
    ///
    /// # Errors
    /// A failure that the worker turns into the outcome it already knows (superseded, cancelled).
    async fn check(&self) -> Result<(), Failure>;
}

/// The bounds of one execution, and where its progress goes.
pub struct Run<'a> {
    /// When it must have ended.
    pub deadline: Instant,
    /// How long nothing may move.
    pub stall: Duration,
    /// Stops it.
    pub cancel: CancellationToken,
    /// Where progress goes; called as often as something moves.
    pub progress: &'a (dyn Fn(Progress) + Send + Sync),
    /// Asked before the point of no return.
    pub fence: &'a dyn Fence,
}
