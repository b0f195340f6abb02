//! The side of the agent that leaves: minds its door, and lets a successor in.

use std::{
    path::Path,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use crate::{
    lock::{
        StorageLock,
        door::{Answer, Door, Holder, Visitor},
    },
    worker::Worker,
};

/// What became of the door.
pub(super) struct Minded(Arc<Minding>);

struct Minding {
    /// The worker ends for itself, and what it holds with it.
    worker: Weak<Worker>,
    holder: Holder,
    /// A visitor was let in and has not left again.
    busy: AtomicBool,
    handed_over: AtomicBool,
}

impl Minded {
    /// Whether the storage was left to a successor.
    pub(super) fn handed_over(&self) -> bool {
        self.0.handed_over.load(Ordering::SeqCst)
    }
}

/// Opens the door and lets in who asks for the storage.
pub(super) fn mind(storage: &Path, lock: &StorageLock, worker: &Arc<Worker>, holder: Holder) -> Minded {
    let worker = Arc::downgrade(worker);
    let minding =
        Arc::new(Minding { worker, holder, busy: AtomicBool::new(false), handed_over: AtomicBool::new(false) });
    match Door::open(storage, lock) {
        Ok(door) => drop(tokio::spawn(minding.clone().mind(door))),
        Err(error) => tracing::warn!(error = %error, "no other process can take over from this one"),
    }
    Minded(minding)
}

impl Minding {
    async fn mind(self: Arc<Self>, door: Door) {
        loop {
            match door.next().await {
                Ok(visitor) => drop(tokio::spawn(self.clone().receive(visitor))),
                Err(error) => {
                    // No descriptor was free, or the visitor left at once.
                    tracing::debug!(error = %error, "a visitor was missed");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    async fn receive(self: Arc<Self>, mut visitor: Visitor) {
        let Some(worker) = self.worker.upgrade() else { return };
        let holder = Holder { paused: worker.is_paused(), ..self.holder.clone() };
        drop(worker);
        let Ok(Some(ask)) = visitor.ask(&holder).await else { return };
        if self.busy.swap(true, Ordering::SeqCst) {
            let reason = "another process takes over already".to_owned();
            let _ = visitor.answer(&Answer::Refused { reason }).await;
            return;
        }
        let Some(worker) = self.worker.upgrade() else { return };
        let grace_ms = ask.grace_ms.unwrap_or(self.holder.grace_ms);
        if visitor.answer(&Answer::Leaving { grace_ms }).await.is_ok() {
            tracing::info!(
                process.id = ask.pid,
                version = ask.version,
                grace_secs = grace_ms / 1000,
                "another process takes over; finishing what runs"
            );
            if worker.hand_over(Duration::from_millis(grace_ms), visitor.gone()).await {
                drop(worker);
                self.handed_over.store(true, Ordering::SeqCst);
                // The visit ends with this process: then the lock is free.
                std::future::pending::<()>().await;
            }
            tracing::warn!(process.id = ask.pid, "the process that wanted to take over is gone; going on");
        }
        self.busy.store(false, Ordering::SeqCst);
    }
}
