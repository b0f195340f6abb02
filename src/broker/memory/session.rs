//! One session of a consumer or a reader: its deliveries can be settled while it lives.

use std::sync::{
    Arc, Weak,
    atomic::{AtomicBool, Ordering},
};

use async_trait::async_trait;

use super::Shared;
use crate::broker::{Counts, Settle, Settlement, StaleDelivery};

/// What a channel is elsewhere. When the last who holds it lets go, what is unsettled is given back.
pub(super) struct Hold {
    id: u64,
    queue: String,
    alive: AtomicBool,
    counts: Arc<Counts>,
    shared: Weak<Shared>,
}

impl Hold {
    pub(super) fn new(id: u64, queue: &str, shared: &Arc<Shared>) -> Arc<Self> {
        let shared = Arc::downgrade(shared);
        Arc::new(Self { id, queue: queue.to_owned(), alive: AtomicBool::new(true), counts: Arc::default(), shared })
    }

    pub(super) fn id(&self) -> u64 {
        self.id
    }

    pub(super) fn counts(&self) -> &Arc<Counts> {
        &self.counts
    }

    pub(super) fn is_alive(&self) -> bool {
        self.alive.load(Ordering::SeqCst)
    }

    /// Ends the session: nothing of it can be settled any more.
    pub(super) fn end(&self) {
        if self.alive.swap(false, Ordering::SeqCst)
            && let Some(shared) = self.shared.upgrade()
        {
            shared.give_back(&self.queue, self.id);
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.end();
    }
}

/// The right to settle one delivery.
pub(super) struct Tag {
    pub(super) number: u64,
    pub(super) hold: Arc<Hold>,
}

#[async_trait]
impl Settle for Tag {
    async fn settle(&self, settlement: Settlement) -> Result<(), StaleDelivery> {
        let shared = self.hold.shared.upgrade().filter(|_| self.hold.is_alive()).ok_or(StaleDelivery)?;
        shared.settle(&self.hold.queue, self.number, settlement)?;
        self.hold.counts.settled();
        Ok(())
    }

    fn is_stale(&self) -> bool {
        !self.hold.is_alive()
    }
}
