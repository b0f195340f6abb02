//! The `[git]` section.

mod host;

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use bytesize::ByteSize;
use serde::{Deserialize, Serialize};

/// What speaks git's protocol with an upstream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// The library that is built in.
    #[default]
    Gix,
    /// The `git` command of the node.
    Git,
}

pub(super) use host::of as of_tables;
pub use host::{HostSettings, Proxy};

use super::{child::Sandbox, owner::Owners};
use crate::protocol::Owner;

/// The least memory that a child may be given: below, even an empty project cannot be cloned.
const LEAST_MEMORY: ByteSize = ByteSize::mib(64);
/// The longest pause that may be set for a host that is down.
const LONGEST_PAUSE: Duration = Duration::from_hours(1);

/// How mirrors of many packs are made into mirrors of one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Repack {
    /// By the git of the node; fetched anew where there is none.
    #[default]
    Git,
    /// Fetched anew beside the old one.
    Fetch,
    /// Not at all.
    Off,
}

/// `[git]`: what is allowed, within which bounds, and how it is done.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GitSettings {
    /// Deadline of one attempt, unless the task asks for another.
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
    /// The longest deadline that a task may ask for.
    #[serde(with = "humantime_serde")]
    pub max_timeout: Duration,
    /// How long nothing may move, unless the task asks for another limit.
    #[serde(with = "humantime_serde")]
    pub stall: Duration,
    /// The longest such limit that a task may ask for.
    #[serde(with = "humantime_serde")]
    pub max_stall: Duration,
    /// How long the full fetch of an upstream that the node has no mirror of may take before a clone shows its tree
    /// first and has its history attached afterwards; `off` to wait for the whole of it always.
    #[serde(with = "tree_first")]
    pub tree_first_after: Option<Duration>,
    /// How long a child that was asked to end may take before it is killed.
    #[serde(with = "humantime_serde")]
    pub kill_grace: Duration,
    /// What speaks with upstreams.
    pub transport: Engine,
    /// Whether the `git` command of the node, where there is one that can be used, tries again what the library failed
    /// at with `corrupt` or `internal`.
    pub transport_fallback: bool,
    /// Whether `http://` upstreams are allowed.
    pub allow_http: bool,
    /// Whether `file://` upstreams are allowed; for tests and the demo.
    pub allow_file: bool,
    /// Whether loopback addresses are allowed; for tests and the demo.
    pub allow_loopback: bool,
    /// Whether private address ranges are allowed.
    pub allow_private: bool,
    /// Patterns of allowed hosts (`git.example`, `*.git.example`, `*`); empty for all.
    pub hosts: Vec<String>,
    /// Ports that upstreams may have; empty for all.
    pub ports: Vec<u16>,
    /// What holds for some hosts only, by pattern.
    pub host: BTreeMap<String, HostSettings>,
    /// Transfers at a time with one host.
    pub host_limit: u32,
    /// Failures to reach a host, one after the other, after which its tasks wait.
    pub breaker_after: u32,
    /// How long they wait until one of them tries; doubles each time that fails.
    #[serde(with = "humantime_serde")]
    pub breaker_pause: Duration,
    /// Directory of credentials, one file each.
    pub credentials_path: Option<PathBuf>,
    /// PEM file with the certificate authorities to trust for https, instead of the system's.
    pub ca_file: Option<PathBuf>,
    /// File of known hosts for ssh.
    pub known_hosts: Option<PathBuf>,
    /// Whether a mirror is kept when the last project cloned from it is deleted.
    ///
    /// Not by default: whoever deletes a project expects its disk back and its content gone from the node. A node that
    /// clones the same upstreams again and again may keep them.
    pub keep_mirrors: bool,
    /// How many bytes all mirrors together may have before those not used for longest are removed; 0 for no limit.
    ///
    /// Projects do not need them: they have their own copies. What goes is the saving of the next fetch.
    pub mirror_budget: ByteSize,
    /// How mirrors of many packs are made into mirrors of one.
    pub repack: Repack,
    /// The most files that a project may have.
    pub max_files: u64,
    /// The most bytes that a project's files may have.
    pub max_bytes: ByteSize,
    /// Whether children shut themselves in: always, where the kernel can, or never.
    pub sandbox: Sandbox,
    /// The most memory of its own that one child may take.
    pub child_memory: ByteSize,
    /// Whose projects are, and as whom children work in them, where a task names nobody; not set: the agent's own user.
    pub run_as: Option<Owner>,
    /// Whom tasks may name as the owner of a project.
    pub owners: Vec<Owners>,
}

impl Default for GitSettings {
    fn default() -> Self {
        Self {
            timeout: Duration::from_mins(10),
            max_timeout: Duration::from_mins(25),
            stall: Duration::from_mins(1),
            max_stall: Duration::from_mins(10),
            tree_first_after: Some(Duration::from_millis(300)),
            kill_grace: Duration::from_secs(2),
            transport: Engine::default(),
            transport_fallback: true,
            allow_http: false,
            allow_file: false,
            allow_loopback: false,
            allow_private: true,
            hosts: Vec::new(),
            ports: Vec::new(),
            host: BTreeMap::new(),
            host_limit: 8,
            breaker_after: 5,
            breaker_pause: Duration::from_secs(30),
            credentials_path: None,
            ca_file: None,
            known_hosts: None,
            keep_mirrors: false,
            mirror_budget: ByteSize::gib(50),
            repack: Repack::default(),
            max_files: 1_000_000,
            max_bytes: ByteSize::gib(20),
            sandbox: Sandbox::Require,
            child_memory: ByteSize::gib(2),
            run_as: None,
            owners: Vec::new(),
        }
    }
}

impl GitSettings {
    /// What is wrong with the section, in a sentence.
    ///
    /// # Errors
    /// The sentence.
    pub fn check(&self) -> Result<(), String> {
        if self.timeout > self.max_timeout {
            return Err("git.timeout is longer than git.max_timeout".to_owned());
        }
        if self.timeout.is_zero() || self.stall.is_zero() {
            return Err("git.timeout and git.stall must be longer than nothing".to_owned());
        }
        if self.stall > self.max_stall {
            return Err("git.stall is longer than git.max_stall".to_owned());
        }
        if self.host_limit == 0 || self.breaker_after == 0 {
            return Err("git.host_limit and git.breaker_after must be at least 1".to_owned());
        }
        if self.breaker_pause.is_zero() || self.breaker_pause > LONGEST_PAUSE {
            return Err("git.breaker_pause must be longer than nothing and at most 1h".to_owned());
        }
        if self.child_memory < LEAST_MEMORY {
            return Err(format!("git.child_memory is less than {LEAST_MEMORY}, which no child can work with"));
        }
        host::check(&self.host, self.hosts.is_empty())
    }

    /// What holds for `host`: the tables that fit it, and for what they leave open the section itself.
    #[must_use]
    pub fn of_host(&self, host: &str) -> HostSettings {
        let found = host::of(&self.host, host);
        HostSettings {
            proxy: found.proxy,
            ca_file: found.ca_file.or_else(|| self.ca_file.clone()),
            limit: found.limit.or(Some(self.host_limit)),
        }
    }
}

/// A duration, or `off`.
mod tree_first {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, de::Error};

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
        let text = String::deserialize(from)?;
        if text == "off" {
            return Ok(None);
        }
        humantime_serde::re::humantime::parse_duration(&text)
            .map(Some)
            .map_err(|error| D::Error::custom(format!("{error}; or \"off\"")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tree_first_is_a_time_or_off() {
        let read = |text: &str| {
            serde_json::from_value::<GitSettings>(serde_json::json!({ "tree_first_after": text }))
                .map(|settings| settings.tree_first_after)
        };
        assert_eq!(read("off").unwrap(), None);
        assert_eq!(read("2s").unwrap(), Some(Duration::from_secs(2)));
        assert!(read("never").unwrap_err().to_string().contains("off"));
    }
}
