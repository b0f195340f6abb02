//! Which pages the writer has in memory: those of tasks in hand, read once for a whole batch.

use std::collections::BTreeSet;

use super::{JournalError, Request, Rows, State};
use crate::{
    journal::{Entry, Page},
    protocol::TaskId,
};

/// Pages kept in memory at most. Every one of them is on disk too, so forgetting one costs a question, nothing else.
const LARGEST_CACHE: usize = 4096;

impl State {
    /// The tasks that these requests ask for and that are not in memory.
    pub(super) fn absent(&self, requests: &[Request]) -> Vec<TaskId> {
        let asked = requests.iter().filter_map(|request| match request {
            Request::Step { task, .. } if !self.live.contains_key(task) => Some(task),
            _ => None,
        });
        asked.collect::<BTreeSet<_>>().into_iter().cloned().collect()
    }

    /// Reads their pages, in one question.
    pub(super) async fn fetch(&mut self, rows: &mut impl Rows, absent: Vec<TaskId>) -> Result<(), JournalError> {
        if absent.is_empty() {
            return Ok(());
        }
        let found = rows.entries_of(&absent).await?;
        for task in absent {
            let page = Page { entries: Vec::new(), cancel_pending: self.cancels.contains_key(&task) };
            self.live.insert(task, page);
        }
        for (task, entry) in found {
            if let Some(page) = self.live.get_mut(&task) {
                page.entries.push(entry);
            }
        }
        Ok(())
    }

    /// Forgets pages that nobody here will ask for soon: what has ended and owes nothing, what waits in a retry queue.
    pub(super) fn settle_down(&mut self) {
        let in_hand = |entry: &Entry| entry.owes() || entry.is_open() && !entry.is_released();
        for task in self.touched.drain(..) {
            if self.live.get(&task).is_some_and(|page| !page.entries.iter().any(in_hand)) {
                self.live.remove(&task);
            }
        }
        if self.live.len() > LARGEST_CACHE {
            self.live.clear();
        }
    }
}
