//! The configuration of every command: defaults, then the file, then the environment.
//!
//! Each section is owned by the module that lives by it. Only `cli` reads this module; what a role needs it is handed.

mod capacity;
mod keys;
mod load;

use std::path::{Path, PathBuf};

use bytesize::ByteSize;
use secrecy::SecretString;
use serde::Deserialize;

pub use load::{ConfigError, DEFAULT_FILE, PREFIX};

use crate::{
    broker::{
        Names,
        settings::{BrokerSettings, ResultsSettings},
    },
    git::settings::GitSettings,
    journal::settings::JournalSettings,
    protocol::NodeName,
    retry::RetrySettings,
    shutdown::ShutdownSettings,
    telemetry::LogSettings,
};

/// Everything that can be set.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Name of this node; the host name if it is not set.
    pub node_name: Option<NodeName>,
    /// Where the agent keeps its own things, and the projects unless they have a path of their own.
    pub storage_path: PathBuf,
    /// Where the projects are; `<storage_path>/projects` if it is not set.
    pub projects_path: Option<PathBuf>,
    /// Where data sets are; `<storage_path>/datasets` if it is not set. Read for files that have it; not used yet.
    pub datasets_path: Option<PathBuf>,
    /// Where jobs work; `<storage_path>/jobs` if it is not set. Not used yet.
    pub jobs_workspace: Option<PathBuf>,
    /// Address of the master, without a password. Not used yet.
    pub master_url: Option<String>,
    /// Port of the agent's own interface. Not used yet.
    pub api_port: u16,
    /// Token shared with the master. Not used yet.
    pub token: Option<SecretString>,
    /// Tasks executing at a time; 0 for a number from cores and memory.
    pub slots: usize,
    /// Deliveries held at a time; 0 for a number from the slots.
    pub window: u16,
    /// Beginning of every name on the broker.
    pub prefix: String,
    /// How the broker is reached.
    pub broker: BrokerSettings,
    /// Where events wait for the master.
    pub results: ResultsSettings,
    /// When failed tasks are tried again.
    pub retry: RetrySettings,
    /// What git may do.
    pub git: GitSettings,
    /// What is remembered.
    pub journal: JournalSettings,
    /// How the agent ends.
    pub shutdown: ShutdownSettings,
    /// What is kept free.
    pub disk: DiskSettings,
    /// What is logged.
    pub log: LogSettings,
}

/// `[disk]`: what is kept free.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DiskSettings {
    /// Below this much free space under `storage_path` no clone and no pull begins: they are deferred.
    pub reserve: ByteSize,
}

impl Default for DiskSettings {
    fn default() -> Self {
        Self { reserve: ByteSize::gib(1) }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            node_name: None,
            storage_path: PathBuf::from("/data"),
            projects_path: None,
            datasets_path: None,
            jobs_workspace: None,
            master_url: None,
            api_port: 8080,
            token: None,
            slots: 0,
            window: 0,
            prefix: "haul".to_owned(),
            broker: BrokerSettings::default(),
            results: ResultsSettings::default(),
            retry: RetrySettings::default(),
            git: GitSettings::default(),
            journal: JournalSettings::default(),
            shutdown: ShutdownSettings::default(),
            disk: DiskSettings::default(),
            log: LogSettings::default(),
        }
    }
}

impl Config {
    /// Reads the file (`file`, else [`DEFAULT_FILE`] if it exists) and the variables of this process.
    ///
    /// # Errors
    /// A sentence that names the source and the key.
    pub fn load(file: Option<&Path>) -> Result<Self, ConfigError> {
        load::load(file, std::env::vars_os())
    }

    /// What is wrong with the values, each in a sentence that begins with the key.
    fn check(&self) -> Result<(), String> {
        if !self.storage_path.is_absolute() {
            return Err("storage_path must be an absolute path".to_owned());
        }
        let paths = [
            ("projects_path", &self.projects_path),
            ("datasets_path", &self.datasets_path),
            ("jobs_workspace", &self.jobs_workspace),
        ];
        for (key, path) in paths {
            if path.as_ref().is_some_and(|path| !path.is_absolute()) {
                return Err(format!("{key} must be an absolute path"));
            }
        }
        if let Some(url) = &self.master_url {
            let parsed = url::Url::parse(url).ok().filter(|url| matches!(url.scheme(), "http" | "https"));
            let Some(parsed) = parsed else {
                return Err("master_url must be an http:// or https:// address".to_owned());
            };
            if !parsed.username().is_empty() || parsed.password().is_some() {
                return Err("master_url has a user or password in it; put the token into token".to_owned());
            }
        }
        let word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if self.prefix.is_empty() || self.prefix.len() > 64 || !self.prefix.chars().all(word) {
            return Err("prefix must be 1–64 characters of [A-Za-z0-9._-]".to_owned());
        }
        if self.slots > 1024 {
            return Err("slots must be at most 1024; 0 chooses by cores and memory".to_owned());
        }
        self.broker.check()?;
        self.retry.check()?;
        self.git.check()?;
        self.journal.check()?;
        self.shutdown.check()?;
        self.log.check()
    }

    /// The name of this node.
    ///
    /// # Errors
    /// A sentence, where none is set and the host name is not a node name.
    pub fn node(&self) -> Result<NodeName, ConfigError> {
        if let Some(node) = &self.node_name {
            return Ok(node.clone());
        }
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        NodeName::new(host.trim()).map_err(|_| ConfigError::NoNodeName { host: host.trim().to_owned() })
    }

    /// Where the projects are.
    #[must_use]
    pub fn projects(&self) -> PathBuf {
        self.projects_path.clone().unwrap_or_else(|| self.storage_path.join("projects"))
    }

    /// Tasks executing at a time.
    #[must_use]
    pub fn slots(&self) -> usize {
        if self.slots == 0 { capacity::slots(capacity::cores(), capacity::memory()) } else { self.slots }
    }

    /// Deliveries held at a time: at least one more than execute, so that the next one is at hand.
    #[must_use]
    pub fn window(&self) -> u16 {
        if self.window == 0 { capacity::window(self.slots()) } else { self.window }
    }

    /// The names of everything on the broker.
    #[must_use]
    pub fn names(&self) -> Names {
        Names::new(self.prefix.clone())
    }

    /// The master's queue of events; empty for none.
    #[must_use]
    pub fn results_queue(&self) -> String {
        self.results.queue.clone().unwrap_or_else(|| self.names().master_event())
    }
}
