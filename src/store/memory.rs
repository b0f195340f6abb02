//! Pages in memory: for pipeline tests under virtual time and for the embedded demo.

use std::collections::BTreeMap;

use async_trait::async_trait;
use jiff::Timestamp;

use super::{JournalError, Rows, Write};
use crate::{
    journal::{Entry, Phase},
    protocol::{Round, TaskId},
};

/// Pages in memory.
#[derive(Clone, Debug, Default)]
pub struct MemoryRows {
    contents: Contents,
    /// Refuses every write, as a full disk does.
    full: std::sync::Arc<std::sync::atomic::AtomicBool>,
}

#[derive(Clone, Debug, Default)]
struct Contents {
    entries: BTreeMap<(TaskId, Round), Entry>,
    notes: BTreeMap<String, String>,
}

impl MemoryRows {
    /// A switch that makes every write fail while it is on.
    #[must_use]
    pub fn full_switch(&self) -> std::sync::Arc<std::sync::atomic::AtomicBool> {
        self.full.clone()
    }
}

#[async_trait]
impl Rows for MemoryRows {
    async fn write(&mut self, batch: &[Write]) -> Result<(), JournalError> {
        self.replenish().await?;
        for write in batch.iter().cloned() {
            match write {
                Write::Entry(task, entry) => drop(self.contents.entries.insert((task, entry.round), *entry)),
                Write::Note(name, Some(value)) => drop(self.contents.notes.insert(name, value)),
                Write::Note(name, None) => drop(self.contents.notes.remove(&name)),
            }
        }
        Ok(())
    }

    async fn relieve(&mut self) -> bool {
        false
    }

    async fn replenish(&mut self) -> Result<(), JournalError> {
        if self.full.load(std::sync::atomic::Ordering::SeqCst) {
            return Err(JournalError::Database {
                path: "memory".to_owned(),
                doing: "written",
                reason: "it was told to be full".to_owned(),
            });
        }
        Ok(())
    }

    async fn entries(&mut self, task: &TaskId) -> Result<Vec<Entry>, JournalError> {
        let range = (task.clone(), 0)..=(task.clone(), Round::MAX);
        Ok(self.contents.entries.range(range).map(|(_, entry)| entry.clone()).collect())
    }

    async fn owing(&mut self) -> Result<Vec<(TaskId, Entry)>, JournalError> {
        Ok(self.select(Entry::owes))
    }

    async fn waiting_clones(&mut self) -> Result<Vec<(TaskId, Entry)>, JournalError> {
        Ok(self.select(|entry| entry.waiting_clone().is_some()))
    }

    async fn running(&mut self) -> Result<Vec<(TaskId, Entry)>, JournalError> {
        Ok(self.select(|entry| matches!(entry.phase, Phase::Running { .. })))
    }

    async fn note(&mut self, name: &str) -> Result<Option<String>, JournalError> {
        Ok(self.contents.notes.get(name).cloned())
    }

    async fn notes(&mut self, prefix: &str) -> Result<Vec<(String, String)>, JournalError> {
        let found = self.contents.notes.iter().filter(|(name, _)| name.starts_with(prefix));
        Ok(found.map(|(name, value)| (name.clone(), value.clone())).collect())
    }

    async fn prune(&mut self, limit: Timestamp, most: u32) -> Result<u64, JournalError> {
        let old: Vec<_> = self
            .contents
            .entries
            .iter()
            .filter(|(_, entry)| entry.seen < limit && !entry.owes())
            .map(|(key, _)| key.clone())
            .take(usize::try_from(most).unwrap_or(usize::MAX))
            .collect();
        for key in &old {
            self.contents.entries.remove(key);
        }
        Ok(old.len() as u64)
    }
}

impl MemoryRows {
    fn select(&self, wanted: impl Fn(&Entry) -> bool) -> Vec<(TaskId, Entry)> {
        let chosen = self.contents.entries.iter().filter(|(_, entry)| wanted(entry));
        chosen.map(|((task, _), entry)| (task.clone(), entry.clone())).collect()
    }
}
