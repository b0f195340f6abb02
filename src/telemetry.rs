//! Logging: where it goes, how it looks, what its fields are called.
//!
//! Everything goes to the standard error stream: human lines, coloured on a terminal, or one JSON object a line.
//! Field names are dotted and fixed; a number has its unit at the end.
//!
//! | field | holds |
//! |---|---|
//! | `node` | name of the node |
//! | `boot` | identity of this start of the agent |
//! | `task.id`, `task.kind` | identity and kind of a task |
//! | `task.round`, `task.attempt` | its round, its charged attempt |
//! | `project.id` | identity of a project |
//! | `message.id` | `message_id` of a message |
//! | `event.status` | status of an event |
//! | `error.class`, `error` | class of a failure, and its sentence |
//! | `broker.exchange`, `broker.queue`, `broker.address` | names on the broker; an address never has a password |
//! | `git.host`, `git.port`, `git.phase` | host and port of an upstream, what a child is doing |
//! | `git.paused` | why a host is left alone: `down`, `throttled` |
//! | `child.role`, `child.pid` | a child process |
//! | `wait_ms`, `duration_ms` | a wait, how long something took |
//! | `bytes`, `objects`, `count` | amounts |
//! | `path` | a path on this node |
//! | `signal` | name of a signal |

use std::io::IsTerminal;

use serde::Deserialize;
use tracing_subscriber::EnvFilter;

/// `[log]`: what is logged, and how.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogSettings {
    /// How lines look.
    pub format: LogFormat,
    /// What is logged, in the words of `tracing`'s filter; each command has a default of its own.
    pub filter: Option<String>,
}

/// How lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Human,
    /// For programs: one object a line.
    Json,
}

impl LogSettings {
    /// What is wrong with the section, in a sentence.
    ///
    /// # Errors
    /// The sentence.
    pub fn check(&self) -> Result<(), String> {
        match self.filter.as_deref().map(EnvFilter::try_new) {
            Some(Err(error)) => Err(format!("log.filter is no filter such as \"info,haul=debug\": {error}")),
            _ => Ok(()),
        }
    }

    /// Sends all logging of this process to the standard error stream; `default` is the filter where none is set.
    ///
    /// A second call changes nothing.
    pub fn install(&self, default: &str) {
        let filter = EnvFilter::new(self.filter.as_deref().unwrap_or(default));
        let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
        // Who installed one before us (a test) keeps it.
        let _ = match self.format {
            LogFormat::Human => lines.with_ansi(std::io::stderr().is_terminal()).try_init(),
            LogFormat::Json => lines.json().flatten_event(true).try_init(),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_that_cannot_be_read_is_refused() {
        let filter = |text: &str| LogSettings { filter: Some(text.to_owned()), ..LogSettings::default() }.check();
        assert!(filter("info,haul=debug").is_ok());
        assert!(filter("haul=loud").unwrap_err().contains("log.filter"));
    }
}
