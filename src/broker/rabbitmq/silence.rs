//! Noticing that a broker says nothing any more.
//!
//! lapin minds the heartbeat too, but looks only once in half of one, which is late by that much.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    task::{Context, Waker},
    time::Duration,
};

use tokio::time::Instant;

/// A deadline that moves whenever something is heard. A task of its own watches it, since lapin reads on a thread
/// that may outlive the runtime and its timers.
pub(super) struct Silence(Mutex<Inner>);

struct Inner {
    deadline: Option<Instant>,
    /// Between what is heard; nothing where there are no heartbeats, and silence means nothing.
    patience: Option<Duration>,
    over: bool,
    reader: Option<Waker>,
}

impl Silence {
    /// Begins to listen: the first word must come within `first`, and later ones within `patience` of each other.
    /// Needs a tokio context.
    pub(super) fn start(first: Duration, patience: Option<Duration>) -> Arc<Self> {
        let deadline = Some(Instant::now() + first);
        let silence = Arc::new(Self(Mutex::new(Inner { deadline, patience, over: false, reader: None })));
        tokio::spawn(watch(Arc::downgrade(&silence)));
        silence
    }

    /// Something was heard.
    pub(super) fn heard(&self) {
        let mut inner = self.lock();
        inner.deadline = inner.patience.map(|patience| Instant::now() + patience);
    }

    /// Whether it has lasted too long; if not, the reader is woken when it has.
    pub(super) fn is_over(&self, cx: &Context<'_>) -> bool {
        let mut inner = self.lock();
        if !inner.reader.as_ref().is_some_and(|reader| reader.will_wake(cx.waker())) {
            inner.reader = Some(cx.waker().clone());
        }
        inner.over
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn watch(silence: Weak<Silence>) {
    loop {
        let Some(deadline) = silence.upgrade().and_then(|silence| silence.lock().deadline) else { return };
        tokio::time::sleep_until(deadline).await;
        let Some(silence) = silence.upgrade() else { return };
        let mut inner = silence.lock();
        if inner.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            inner.over = true;
            if let Some(reader) = inner.reader.take() {
                reader.wake();
            }
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, task::Poll};

    use super::*;

    async fn over(silence: &Silence) {
        poll_fn(|cx| if silence.is_over(cx) { Poll::Ready(()) } else { Poll::Pending }).await;
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_over_when_nothing_was_heard_for_the_time_given() {
        let begun = Instant::now();
        let silence = Silence::start(Duration::from_secs(10), Some(Duration::from_secs(8)));
        tokio::time::sleep(Duration::from_secs(9)).await;
        silence.heard();
        tokio::time::sleep(Duration::from_secs(7)).await;
        silence.heard();
        over(&silence).await;
        assert_eq!(begun.elapsed().as_secs(), 24);
    }

    #[tokio::test(start_paused = true)]
    async fn without_heartbeats_only_the_first_word_is_waited_for() {
        let silence = Silence::start(Duration::from_secs(10), None);
        silence.heard();
        let waited = tokio::time::timeout(Duration::from_hours(9), over(&silence)).await;
        assert!(waited.is_err());
    }
}
