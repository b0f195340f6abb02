//! The `[broker]` and `[results]` sections.

use std::{path::PathBuf, time::Duration};

use secrecy::SecretString;
use serde::Deserialize;

/// `[broker]`: how RabbitMQ is reached.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BrokerSettings {
    /// Addresses, tried in turn: `amqp://user:password@host:5672/vhost` or `amqps://…`.
    pub urls: Vec<SecretString>,
    /// Heartbeat; a connection that is silent for about twice as long is given up.
    #[serde(with = "humantime_serde")]
    pub heartbeat: Duration,
    /// How long to wait for a confirm before the message counts as unconfirmed.
    #[serde(with = "humantime_serde")]
    pub confirm_timeout: Duration,
    /// PEM file with the certificate authorities to trust, instead of the system's.
    pub ca_file: Option<PathBuf>,
    /// PEM file with the client certificate and its chain.
    pub cert_file: Option<PathBuf>,
    /// PEM file with the client certificate's key.
    pub key_file: Option<PathBuf>,
    /// Address of the management API for `haul topology doctor` and for the agent's look at who consumes its queue, e.g.
    /// `http://host:15672`; the user and password are those of the first entry of `urls` unless it has its own.
    pub management_url: Option<SecretString>,
    /// The broker's `consumer_timeout` where the management API cannot tell it.
    #[serde(with = "humantime_serde")]
    pub consumer_timeout: Duration,
}

impl Default for BrokerSettings {
    fn default() -> Self {
        Self {
            urls: vec![SecretString::from("amqp://guest:guest@127.0.0.1:5672/%2f")],
            heartbeat: Duration::from_secs(4),
            confirm_timeout: Duration::from_secs(30),
            ca_file: None,
            cert_file: None,
            key_file: None,
            management_url: None,
            consumer_timeout: Duration::from_mins(30),
        }
    }
}

impl BrokerSettings {
    /// What is wrong with the section, in a sentence.
    ///
    /// # Errors
    /// The sentence.
    pub fn check(&self) -> Result<(), String> {
        use secrecy::ExposeSecret;
        if self.urls.is_empty() {
            return Err("broker.urls is empty: give at least one amqp:// or amqps:// address".to_owned());
        }
        for url in &self.urls {
            let text = url.expose_secret();
            if !text.starts_with("amqp://") && !text.starts_with("amqps://") {
                return Err("broker.urls has an address that does not begin with amqp:// or amqps://".to_owned());
            }
        }
        if !(Duration::from_secs(1)..=Duration::from_mins(10)).contains(&self.heartbeat) {
            return Err("broker.heartbeat must be between 1s and 10m".to_owned());
        }
        if self.cert_file.is_some() != self.key_file.is_some() {
            return Err("broker.cert_file and broker.key_file belong together: give both or neither".to_owned());
        }
        Ok(())
    }
}

/// `[results]`: where events wait for the master.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ResultsSettings {
    /// The durable queue that is bound to every event but progress, declared early so that events wait for a master
    /// that has not started yet; empty for none. The default is `<prefix>.master.event`.
    pub queue: Option<String>,
}

#[expect(clippy::derivable_impls, reason = "the default is a decision and is written where the others are")]
impl Default for ResultsSettings {
    fn default() -> Self {
        Self { queue: None }
    }
}
