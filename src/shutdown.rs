//! How a process ends: softly first, then at once.
//!
//! The first signal cancels the soft token: take no more, finish what runs. When the grace is over, or at a second
//! signal, the hard token follows: stop now. Everything that must have ended before the process does is tracked.

pub mod exit;

use std::time::Duration;

use serde::Deserialize;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// How long what was told to stop at once may still take before the process ends without it.
const LAST_WAIT: Duration = Duration::from_secs(5);

/// `[shutdown]`: how the agent ends.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ShutdownSettings {
    /// How long what runs may go on after the first signal.
    #[serde(with = "humantime_serde")]
    pub grace: Duration,
}

impl Default for ShutdownSettings {
    fn default() -> Self {
        Self { grace: Duration::from_secs(30) }
    }
}

impl ShutdownSettings {
    /// What is wrong with the section, in a sentence.
    ///
    /// # Errors
    /// The sentence.
    pub fn check(&self) -> Result<(), String> {
        if self.grace > Duration::from_hours(24) {
            return Err("shutdown.grace must be at most 24h".to_owned());
        }
        Ok(())
    }
}

/// The end of a process, shared by everything that must know of it; clones are the same.
#[derive(Clone, Debug)]
pub struct Shutdown {
    soft: CancellationToken,
    hard: CancellationToken,
    interrupted: CancellationToken,
    tracker: TaskTracker,
    grace: Duration,
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Everything finished within the grace.
    Finished,
    /// The grace was over first: what still ran was stopped.
    OutOfTime,
    /// A second signal stopped it.
    Interrupted,
}

impl Ended {
    /// The exit code that says so.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::Finished => exit::OK,
            Self::OutOfTime => exit::TIMED_OUT,
            Self::Interrupted => exit::INTERRUPTED,
        }
    }
}

impl Shutdown {
    /// A shutdown that has not begun.
    #[must_use]
    pub fn new(settings: &ShutdownSettings) -> Self {
        let soft = CancellationToken::new();
        Self {
            soft,
            hard: CancellationToken::new(),
            interrupted: CancellationToken::new(),
            tracker: TaskTracker::new(),
            grace: settings.grace,
        }
    }

    /// Cancelled when no more is to be taken.
    #[must_use]
    pub fn soft(&self) -> &CancellationToken {
        &self.soft
    }

    /// Cancelled when everything is to stop at once.
    #[must_use]
    pub fn hard(&self) -> &CancellationToken {
        &self.hard
    }

    /// Follows what must have ended before the process does.
    #[must_use]
    pub fn tracker(&self) -> &TaskTracker {
        &self.tracker
    }

    /// Begins to end: softly at first, at once the second time.
    pub fn ask(&self) {
        if self.soft.is_cancelled() {
            self.interrupted.cancel();
            self.hard.cancel();
        } else {
            self.soft.cancel();
        }
    }

    /// Lets `SIGTERM` and `SIGINT` ask, from now on.
    ///
    /// # Errors
    /// When the process cannot have handlers.
    pub fn on_signals(&self) -> std::io::Result<()> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let shutdown = self.clone();
        tokio::spawn(async move {
            loop {
                let name = tokio::select! {
                    _ = terminate.recv() => "SIGTERM",
                    _ = interrupt.recv() => "SIGINT",
                };
                if shutdown.soft.is_cancelled() {
                    tracing::warn!(signal = name, "stopping at once");
                } else {
                    tracing::info!(signal = name, grace_secs = shutdown.grace.as_secs(), "finishing what runs");
                }
                shutdown.ask();
            }
        });
        Ok(())
    }

    /// Waits until it was asked for and everything tracked has ended, or will not.
    pub async fn ended(&self) -> Ended {
        self.soft.cancelled().await;
        self.tracker.close();
        tokio::select! {
            () = self.tracker.wait() => return self.reason(Ended::Finished),
            () = self.hard.cancelled() => {}
            () = tokio::time::sleep(self.grace) => self.hard.cancel(),
        }
        let _ = tokio::time::timeout(LAST_WAIT, self.tracker.wait()).await;
        self.reason(Ended::OutOfTime)
    }

    fn reason(&self, otherwise: Ended) -> Ended {
        if self.interrupted.is_cancelled() { Ended::Interrupted } else { otherwise }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shutdown() -> Shutdown {
        Shutdown::new(&ShutdownSettings { grace: Duration::from_secs(30) })
    }

    #[tokio::test(start_paused = true)]
    async fn what_finishes_within_the_grace_ends_it_well() {
        let shutdown = shutdown();
        shutdown.tracker().spawn(tokio::time::sleep(Duration::from_secs(20)));
        shutdown.ask();
        assert_eq!(shutdown.ended().await, Ended::Finished);
        assert!(!shutdown.hard().is_cancelled());
    }

    #[tokio::test(start_paused = true)]
    async fn when_the_grace_is_over_what_runs_is_told_to_stop() {
        let shutdown = shutdown();
        shutdown.tracker().spawn(shutdown.hard().clone().cancelled_owned());
        shutdown.ask();
        assert_eq!(shutdown.ended().await, Ended::OutOfTime);
    }

    #[tokio::test(start_paused = true)]
    async fn a_second_signal_stops_at_once() {
        let shutdown = shutdown();
        shutdown.tracker().spawn(shutdown.hard().clone().cancelled_owned());
        shutdown.ask();
        shutdown.ask();
        assert_eq!((shutdown.ended().await, Ended::Interrupted.code()), (Ended::Interrupted, 130));
    }

    #[tokio::test(start_paused = true)]
    async fn what_never_ends_is_left_behind_after_a_last_wait() {
        let shutdown = shutdown();
        shutdown.tracker().spawn(std::future::pending::<()>());
        shutdown.ask();
        assert_eq!(shutdown.ended().await, Ended::OutOfTime);
    }
}
