//! Leaving for a successor that stands ready.

use std::{
    pin::pin,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use super::{Worker, consume::LAST_WORDS};

/// Between looks whether everything has ended; only while a successor waits.
const GLANCE: Duration = Duration::from_millis(10);
/// How long what was told to stop may take to do so: children are asked first, and killed then.
const STOPPED: Duration = Duration::from_secs(15);

/// A task that waits for its turn, while this is held.
pub(super) struct Parked<'a>(&'a AtomicUsize);

impl<'a> Parked<'a> {
    pub(super) fn among(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(count)
    }
}

impl Drop for Parked<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Worker {
    /// Leaves for a successor: begins no task any more, lets what runs end within `grace`, and gives the queue up only
    /// when nothing runs. What has not ended by then is stopped and given back, uncharged. Then the worker ends as the
    /// soft token would have it.
    ///
    /// False if it was called off before, with everything as it was: the successor is gone.
    pub async fn hand_over(&self, grace: Duration, called_off: impl Future<Output = ()>) -> bool {
        let mut called_off = pin!(called_off);
        self.turns.hold(true);
        self.leaving.send_replace(true);
        tokio::select! {
            () = self.quiet() => {}
            () = self.soft.cancelled() => return true,
            () = tokio::time::sleep(grace) => {
                let (_, running) = self.active.counts();
                tracing::warn!(tasks.running = running.len(), "the time for the hand-over is up: what runs is given back");
            }
            () = &mut called_off => {
                self.turns.hold(false);
                self.leaving.send_replace(false);
                return false;
            }
        }
        // What runs by now had its time. Histories and payments go on with the successor: the journal has them.
        self.hard.cancel();
        if tokio::time::timeout(STOPPED, self.quiet()).await.is_err() {
            tracing::warn!("some tasks do not stop");
        }
        let last_words = async {
            while !self.background.is_empty() {
                tokio::time::sleep(GLANCE).await;
            }
        };
        let _ = tokio::time::timeout(LAST_WORDS, last_words).await;
        // Only now is the consumer given up, and what waits goes to who is next in line.
        self.left.store(true, Ordering::SeqCst);
        self.soft.cancel();
        true
    }

    /// Returns when every task in hand waits for its turn.
    async fn quiet(&self) {
        while self.handling.len() > self.parked.load(Ordering::SeqCst) {
            tokio::time::sleep(GLANCE).await;
        }
    }
}
