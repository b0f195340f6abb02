//! After two unclean starts in a row: one delivery at a time, until what ran when the agent died was tried alone.
//!
//! A task that kills the agent takes down whatever runs beside it. Alone it is told from its neighbours: they end, and
//! it is given up at its third crash.

use std::{
    collections::HashSet,
    sync::{Mutex, PoisonError},
};

use tokio::sync::watch;

use crate::journal::Key;

/// Whether one delivery is taken at a time, and until when.
pub(super) struct Caution {
    on: watch::Sender<bool>,
    rest: Mutex<Rest>,
}

#[derive(Default)]
struct Rest {
    /// What ran at a crash and was not tried alone yet.
    suspects: HashSet<Key>,
    /// Deliveries that are settled at most until it is over: a suspect's message may be gone.
    most: usize,
}

impl Caution {
    pub(super) fn new() -> Self {
        Self { on: watch::Sender::new(false), rest: Mutex::default() }
    }

    /// Begins, with what ran when the agent died, and for `most` deliveries at most.
    pub(super) fn begin(&self, suspects: impl IntoIterator<Item = Key>, most: usize) {
        let rest = Rest { suspects: suspects.into_iter().collect(), most: most.max(1) };
        *self.rest.lock().unwrap_or_else(PoisonError::into_inner) = rest;
        self.on.send_replace(true);
    }

    /// Whether one delivery is taken at a time.
    pub(super) fn is_on(&self) -> bool {
        *self.on.borrow()
    }

    /// A delivery was settled; whether caution is over with it.
    pub(super) fn settled(&self, key: Option<&Key>) -> bool {
        if !self.is_on() {
            return false;
        }
        let mut rest = self.rest.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(key) = key {
            rest.suspects.remove(key);
        }
        rest.most = rest.most.saturating_sub(1);
        let over = rest.suspects.is_empty() || rest.most == 0;
        if over {
            self.on.send_replace(false);
        }
        over
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::TaskId;

    fn key(id: &str) -> Key {
        Key { task_id: TaskId::new(id).unwrap(), round: 0 }
    }

    #[test]
    fn it_lasts_until_everything_that_ran_was_tried() {
        let caution = Caution::new();
        assert!(!caution.settled(None));
        caution.begin([key("a"), key("b")], 8);
        assert!(!caution.settled(Some(&key("other"))) && !caution.settled(Some(&key("a"))));
        assert!(caution.is_on() && caution.settled(Some(&key("b"))) && !caution.is_on());
    }

    #[test]
    fn it_ends_with_one_delivery_where_nothing_ran_and_some_time_where_a_message_is_gone() {
        let caution = Caution::new();
        caution.begin([], 8);
        assert!(caution.settled(None));
        caution.begin([key("gone")], 3);
        assert_eq!([(); 3].map(|()| caution.settled(None)), [false, false, true]);
    }
}
