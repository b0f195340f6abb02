//! Pages in memory: for pipeline tests under virtual time and for the embedded demo.

use std::collections::BTreeMap;

use async_trait::async_trait;
use jiff::Timestamp;

use super::{JournalError, Rows};
use crate::{
    journal::Entry,
    protocol::{Round, TaskId},
};

/// Pages in memory. What was not committed is forgotten, as on disk.
#[derive(Clone, Debug, Default)]
pub struct MemoryRows {
    now: Contents,
    before: Option<Contents>,
    /// Refuses every commit, as a full disk does.
    full: std::sync::Arc<std::sync::atomic::AtomicBool>,
}

#[derive(Clone, Debug, Default)]
struct Contents {
    entries: BTreeMap<(TaskId, Round), Entry>,
    notes: BTreeMap<String, String>,
}

impl MemoryRows {
    /// A switch that makes every commit fail while it is on.
    #[must_use]
    pub fn full_switch(&self) -> std::sync::Arc<std::sync::atomic::AtomicBool> {
        self.full.clone()
    }
}

#[async_trait]
impl Rows for MemoryRows {
    async fn begin(&mut self) -> Result<(), JournalError> {
        self.before = Some(self.now.clone());
        Ok(())
    }

    async fn commit(&mut self) -> Result<(), JournalError> {
        if self.full.load(std::sync::atomic::Ordering::SeqCst) {
            return Err(JournalError::Database {
                path: "memory".to_owned(),
                doing: "written",
                reason: "it was told to be full".to_owned(),
            });
        }
        self.before = None;
        Ok(())
    }

    async fn rollback(&mut self) {
        if let Some(before) = self.before.take() {
            self.now = before;
        }
    }

    async fn entries(&mut self, task: &TaskId) -> Result<Vec<Entry>, JournalError> {
        let range = (task.clone(), 0)..=(task.clone(), Round::MAX);
        Ok(self.now.entries.range(range).map(|(_, entry)| entry.clone()).collect())
    }

    async fn put(&mut self, task: &TaskId, entry: &Entry) -> Result<(), JournalError> {
        self.now.entries.insert((task.clone(), entry.round), entry.clone());
        Ok(())
    }

    async fn owing(&mut self) -> Result<Vec<(TaskId, Entry)>, JournalError> {
        Ok(self.select(Entry::owes))
    }

    async fn waiting_clones(&mut self) -> Result<Vec<(TaskId, Entry)>, JournalError> {
        Ok(self.select(|entry| entry.waiting_clone().is_some()))
    }

    async fn note(&mut self, name: &str) -> Result<Option<String>, JournalError> {
        Ok(self.now.notes.get(name).cloned())
    }

    async fn set_note(&mut self, name: &str, value: Option<&str>) -> Result<(), JournalError> {
        match value {
            Some(value) => drop(self.now.notes.insert(name.to_owned(), value.to_owned())),
            None => drop(self.now.notes.remove(name)),
        }
        Ok(())
    }

    async fn notes(&mut self, prefix: &str) -> Result<Vec<String>, JournalError> {
        Ok(self.now.notes.keys().filter(|name| name.starts_with(prefix)).cloned().collect())
    }

    async fn prune(&mut self, limit: Timestamp, most: u32) -> Result<u64, JournalError> {
        let old: Vec<_> = self
            .now
            .entries
            .iter()
            .filter(|(_, entry)| entry.seen < limit && !entry.owes())
            .map(|(key, _)| key.clone())
            .take(usize::try_from(most).unwrap_or(usize::MAX))
            .collect();
        for key in &old {
            self.now.entries.remove(key);
        }
        Ok(old.len() as u64)
    }
}

impl MemoryRows {
    fn select(&self, wanted: impl Fn(&Entry) -> bool) -> Vec<(TaskId, Entry)> {
        let chosen = self.now.entries.iter().filter(|(_, entry)| wanted(entry));
        chosen.map(|((task, _), entry)| (task.clone(), entry.clone())).collect()
    }
}
