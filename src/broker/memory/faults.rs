//! What goes wrong with a real broker, made to go wrong here.

use super::{Memory, Shared, queue::Attached};

impl Memory {
    /// Breaks all connections: what is unsettled is delivered again, and consumers come back a moment later.
    pub fn cut(&self) {
        let mut state = self.0.lock();
        let lost: Vec<_> = state.queues.values_mut().flat_map(|queue| queue.consumers.drain(..)).collect();
        state.end_sessions();
        drop(state);
        self.end(lost);
    }

    /// Deletes a queue with what is in it; its consumers are cancelled.
    pub fn delete_queue(&self, name: &str) {
        let mut state = self.0.lock();
        state.bindings.retain(|binding| binding.queue != name);
        let gone = state.queues.remove(name);
        drop(state);
        self.end(gone.map(|queue| queue.consumers).unwrap_or_default());
    }

    /// Makes a queue refuse messages while it holds `limit` of them; `None` lifts it.
    pub fn set_limit(&self, queue: &str, limit: impl Into<Option<usize>>) {
        if let Some(queue) = self.0.lock().queues.get_mut(queue) {
            queue.limit = limit.into();
        }
    }

    /// Refuses every publish, or none any more.
    pub fn refuse_publishes(&self, refuse: bool) {
        self.0.lock().refusing = refuse;
    }

    /// Takes the next message but loses its confirm, as if the connection broke in between.
    pub fn lose_confirm_once(&self) {
        self.0.lock().losing = true;
    }

    /// Forgets the consumers of a queue without a word to them, as a broker at fault does.
    pub fn drop_consumers(&self, queue: &str) {
        if let Some(queue) = self.0.lock().queues.get_mut(queue) {
            queue.consumers.clear();
        }
    }

    /// Whether a queue gives messages to the consumers that it has now; those that come later are served in any case.
    pub fn serve_consumers(&self, name: &str, serve: bool) {
        let mut state = self.0.lock();
        if let Some(queue) = state.queues.get_mut(name) {
            queue.consumers.iter_mut().for_each(|consumer| consumer.deaf = !serve);
        }
        Shared::pump(&mut state, [name.to_owned()]);
    }

    /// Tells, or does not tell, who consumes: not every broker can be asked.
    pub fn tell_consumers(&self, tell: bool) {
        self.0.lock().telling = tell;
    }

    /// How often consumers looked at a queue, and how many sessions of consumers it has seen.
    #[must_use]
    pub fn looks_and_sessions(&self, queue: &str) -> (u64, u64) {
        let tally = self.0.lock().tally.get(queue).copied().unwrap_or_default();
        (tally.looks, tally.sessions)
    }

    /// Ends sessions; not under the lock, since each gives back what it holds.
    fn end(&self, lost: Vec<Attached>) {
        for attached in &lost {
            attached.hold.end();
            attached.inbox.forget_stale();
        }
        drop(lost);
        self.0.ended.notify_waiters();
    }
}
