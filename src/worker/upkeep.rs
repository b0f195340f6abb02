//! What the worker looks after beside its messages: old records, and a journal that runs out of room.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use tokio::time::Instant;

use super::Worker;
use crate::journal::Ages;

/// How often old records are removed.
const UPKEEP_INTERVAL: Duration = Duration::from_mins(10);
/// The note of how old records are.
const AGES: &str = "ages";

impl Worker {
    /// Removes old records, once the queue was seen drained: before that a record may answer a delivery that waits.
    pub(super) async fn upkeep(self: Arc<Self>) {
        let queue = self.settings.names.node(&self.settings.node);
        let retention = self.settings.retention;
        let (mut drained, mut last) = (false, Instant::now());
        // What cannot be read keeps records for longer, no more.
        let mut ages = Ages::read(&self.journal.note(AGES).await.ok().flatten().unwrap_or_default());
        loop {
            tokio::time::sleep(UPKEEP_INTERVAL).await;
            let now = Instant::now();
            ages.pass(now.duration_since(std::mem::replace(&mut last, now)), self.clock.now(), retention);
            if let Err(error) = self.journal.set_note(AGES, Some(&ages.text())).await {
                tracing::warn!(error = %error, "the age of journal records could not be noted");
            }
            let (in_hand, _) = self.active.counts();
            drained |=
                in_hand == 0 && matches!(self.broker.depth(&queue).await, Ok(Some(depth)) if depth.messages == 0);
            let Some(limit) = ages.limit(retention).filter(|_| drained) else { continue };
            self.prune(limit).await;
        }
    }

    /// Removes all records last seen before `limit`, some at a time, so that nobody waits long behind it.
    async fn prune(&self, limit: Timestamp) {
        let mut removed = 0;
        loop {
            match self.journal.prune(limit).await {
                Ok(0) => break,
                Ok(some) => removed += some,
                Err(error) => {
                    tracing::warn!(error = %error, "old journal records could not be removed");
                    break;
                }
            }
        }
        if removed > 0 {
            tracing::info!(removed, "removed old journal records");
        }
    }

    /// Stops taking messages once the journal gave up its reserve: what room is left is for what was begun.
    pub(super) async fn spare_the_journal(self: Arc<Self>) {
        let mut strained = self.journal.strained();
        while strained.wait_for(|strained| *strained).await.is_ok() {
            self.trouble.send_replace(true);
            self.changed.notify_one();
            if strained.wait_for(|strained| !*strained).await.is_err() {
                return;
            }
        }
    }

    /// Waits until the journal is in trouble.
    pub(super) async fn in_trouble(&self) {
        let mut trouble = self.trouble.subscribe();
        if trouble.wait_for(|trouble| *trouble).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
