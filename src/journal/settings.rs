//! The `[journal]` section.

use std::time::Duration;

use serde::Deserialize;

/// `[journal]`: how long what was settled is remembered.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct JournalSettings {
    /// How long a task's record is kept after its acknowledgement or last sighting. A duplicate that comes later than
    /// this runs again.
    #[serde(with = "humantime_serde")]
    pub retention: Duration,
}

impl Default for JournalSettings {
    fn default() -> Self {
        Self { retention: Duration::from_hours(14 * 24) }
    }
}

impl JournalSettings {
    /// What is wrong with the section, in a sentence.
    ///
    /// # Errors
    /// The sentence.
    pub fn check(&self) -> Result<(), String> {
        if self.retention < Duration::from_hours(1) {
            return Err("journal.retention must be at least 1h: duplicates are answered from it".to_owned());
        }
        Ok(())
    }
}
