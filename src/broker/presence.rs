//! What our side of a consumer knows of itself, for whoever compares it with what the broker says.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicU64, Ordering},
};

use tokio::sync::watch;

/// Our side of a consumer, kept by its backend: which session stands, and how much of its window is used.
#[derive(Default)]
pub struct Presence {
    session: Mutex<Option<Session>>,
    rebuilds: watch::Sender<u64>,
}

struct Session {
    /// What was asked for before it began is not meant for it.
    mark: u64,
    tag: String,
    before: u32,
    counts: Arc<Counts>,
}

/// The deliveries of one session.
#[derive(Default)]
pub struct Counts {
    arrived: AtomicU64,
    settled: AtomicU64,
}

impl Counts {
    /// One more has come.
    pub fn arrived(&self) {
        self.arrived.fetch_add(1, Ordering::Relaxed);
    }

    /// One of them is settled, as far as the broker was told.
    pub fn settled(&self) {
        self.settled.fetch_add(1, Ordering::Relaxed);
    }
}

/// Our side at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ours {
    /// The tag of the session that stands, if one does.
    pub tag: Option<String>,
    /// Consumers that the broker counted when the session was opened, itself not among them. Of a queue with a single
    /// active consumer it counts the active one, and those that were cancelled and have not settled everything.
    pub before: u32,
    /// Deliveries of this session.
    pub arrived: u64,
    /// Those of them that are not settled.
    pub unsettled: u64,
}

impl Ours {
    /// Whether somebody was there before us and nothing has shown since that it is our turn.
    #[must_use]
    pub fn stands_in_line(&self) -> bool {
        self.before > 0 && self.arrived == 0
    }
}

impl Presence {
    /// A session stands; for backends.
    pub fn begin(&self, tag: &str, before: u32, counts: &Arc<Counts>) {
        let mark = *self.rebuilds.borrow();
        *self.lock() = Some(Session { mark, tag: tag.to_owned(), before, counts: Arc::clone(counts) });
    }

    /// No session stands; for backends.
    pub fn end(&self) {
        *self.lock() = None;
    }

    /// How it is now.
    #[must_use]
    pub fn now(&self) -> Ours {
        let session = self.lock();
        let Some(session) = session.as_ref() else { return Ours::default() };
        // In this order: what is settled in between must not seem to be more than what came.
        let settled = session.counts.settled.load(Ordering::Relaxed);
        let arrived = session.counts.arrived.load(Ordering::Relaxed);
        let unsettled = arrived.saturating_sub(settled);
        Ours { tag: Some(session.tag.clone()), before: session.before, arrived, unsettled }
    }

    /// Whoever was there before is known to be gone, or not to be served.
    pub fn leads(&self) {
        if let Some(session) = self.lock().as_mut() {
            session.before = 0;
        }
    }

    /// Asks for another session: a new channel and a new tag.
    pub fn rebuild(&self) {
        self.rebuilds.send_modify(|count| *count += 1);
    }

    /// Hears when the session that stands is to be replaced; for backends.
    pub(super) fn rebuilds(&self) -> Rebuilds {
        let mark = self.lock().as_ref().map_or(u64::MAX, |session| session.mark);
        Rebuilds { count: self.rebuilds.subscribe(), mark }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Session>> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is asked of one session.
pub(super) struct Rebuilds {
    count: watch::Receiver<u64>,
    mark: u64,
}

impl Rebuilds {
    /// Returns when another session was asked for.
    pub(super) async fn asked(&mut self) {
        let mark = self.mark;
        // Whoever asks lives as long as the consumer; without one nobody does.
        if self.count.wait_for(|count| *count > mark).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_session_counts_its_own_deliveries() {
        let presence = Presence::default();
        assert_eq!(presence.now(), Ours::default());
        let first = Arc::new(Counts::default());
        presence.begin("a-1", 1, &first);
        assert!(presence.now().stands_in_line());
        first.arrived();
        assert_eq!(presence.now(), Ours { tag: Some("a-1".to_owned()), before: 1, arrived: 1, unsettled: 1 });
        assert!(!presence.now().stands_in_line());
        let second = Arc::new(Counts::default());
        presence.begin("a-2", 0, &second);
        // What is settled late belongs to the session it came in.
        first.settled();
        second.arrived();
        assert_eq!((presence.now().arrived, presence.now().unsettled), (1, 1));
        second.settled();
        assert_eq!(presence.now().unsettled, 0);
        presence.end();
        assert_eq!(presence.now().tag, None);
    }

    #[test]
    fn who_learns_that_nobody_is_ahead_says_so() {
        let presence = Presence::default();
        presence.begin("a", 2, &Arc::default());
        presence.leads();
        assert!(!presence.now().stands_in_line());
    }
}
