//! What a session has received and nobody has taken yet.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
};

use tokio::sync::{Notify, watch};

use super::{Delivery, Stop};

/// Between a backend's session and its [`Consumer`](super::Consumer): the session can take back what was not handed
/// out. The prefetch window bounds it.
#[derive(Default)]
pub struct Inbox {
    inner: Mutex<Inner>,
    changed: Notify,
}

#[derive(Default)]
struct Inner {
    waiting: VecDeque<Delivery>,
    closed: bool,
}

impl Inbox {
    /// Adds a delivery.
    pub fn put(&self, delivery: Delivery) {
        self.lock().waiting.push_back(delivery);
        self.changed.notify_one();
    }

    /// Takes back what was not handed out; nothing is handed out of it any more.
    #[must_use]
    pub fn drain(&self) -> Vec<Delivery> {
        let mut inner = self.lock();
        inner.closed = true;
        let waiting = inner.waiting.drain(..).collect();
        drop(inner);
        self.changed.notify_one();
        waiting
    }

    /// Drops what can no longer be settled: it comes again.
    pub fn forget_stale(&self) {
        let mut inner = self.lock();
        let (stale, waiting) = inner.waiting.drain(..).partition(Delivery::is_stale);
        inner.waiting = waiting;
        drop(inner);
        let stale: VecDeque<Delivery> = stale;
        stale.into_iter().for_each(Delivery::abandon);
    }

    /// Says that nothing more comes, and leaves what is there to its channel.
    pub fn close(&self) {
        self.drain().into_iter().for_each(Delivery::abandon);
    }

    pub(super) async fn next(&self) -> Option<Delivery> {
        loop {
            {
                let mut inner = self.lock();
                while let Some(delivery) = inner.waiting.pop_front() {
                    if !delivery.is_stale() {
                        return Some(delivery);
                    }
                    delivery.abandon();
                }
                if inner.closed {
                    return None;
                }
            }
            self.changed.notified().await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns when a consumer was stopped or dropped.
pub(super) async fn stopped(stop: &mut watch::Receiver<Stop>) {
    // An error means that the consumer is gone, which asks for the same.
    let _ = stop.wait_for(|stop| *stop != Stop::No).await;
}

impl Drop for Inbox {
    fn drop(&mut self) {
        let waiting = std::mem::take(&mut self.lock().waiting);
        waiting.into_iter().for_each(Delivery::abandon);
    }
}
