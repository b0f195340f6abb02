//! A broker's address, with its secrets kept apart.

use std::{fmt, time::Duration};

use lapin::uri::{AMQPScheme, AMQPUri};
use secrecy::{ExposeSecret, SecretString};

use crate::broker::{BrokerError, address};

/// The largest frame that we ask for, in bytes: RabbitMQ's own default, so that a message with large headers can still be
/// delivered. Asked for at the start because lapin's buffers, 32 frames each, are zeroed page by page when they grow to
/// the negotiated size afterwards: 4 MB of resident memory for each of the four, in an agent that is idle.
const FRAME_MAX: u32 = 128 * 1024;

/// Where a broker listens, and what lapin is told about who we are there. Prints without user and password.
#[derive(Clone)]
pub(super) struct Address {
    /// Where it listens.
    pub(super) broker: address::Address,
    uri: AMQPUri,
}

impl Address {
    /// Reads one entry of `broker.urls`; `heartbeat` in seconds holds unless the address has its own.
    pub(super) fn parse(text: &SecretString, heartbeat: u16) -> Result<Self, BrokerError> {
        let broker = address::Address::parse(text)?;
        // The parser's own words may quote the address, and with it the password.
        let wrong = || BrokerError::Settings("broker.urls has an entry that is not an AMQP address".to_owned());
        let mut uri: AMQPUri = text.expose_secret().parse().map_err(|_| wrong())?;
        uri.query.heartbeat.get_or_insert(heartbeat);
        uri.query.frame_max.get_or_insert(FRAME_MAX);
        Ok(Self { broker, uri })
    }

    /// How long the broker may be silent: two heartbeats, of each of which it sends two. Nothing where there are none.
    pub(super) fn patience(&self) -> Option<Duration> {
        let heartbeat = self.uri.query.heartbeat.filter(|&seconds| seconds > 0)?;
        Some(Duration::from_secs(u64::from(heartbeat) * 2))
    }

    /// The address as lapin gets it: identity and tuning only, since dialling and TLS are ours.
    pub(super) fn for_lapin(&self) -> String {
        let mut uri = self.uri.clone();
        uri.scheme = AMQPScheme::AMQP;
        "127.0.0.1".clone_into(&mut uri.authority.host);
        uri.authority.port = 1;
        uri.to_string()
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", if self.broker.tls { "amqps" } else { "amqp" }, self.broker.authority())
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Address, BrokerError> {
        Address::parse(&SecretString::from(text), 4)
    }

    #[test]
    fn an_address_prints_without_user_and_password() {
        let address = parse("amqps://me:canary@broker.example/team").unwrap();
        assert_eq!(format!("{address} {address:?}"), "amqps://broker.example:5671 amqps://broker.example:5671");
    }

    #[test]
    fn an_unreadable_address_is_refused_without_repeating_it() {
        for text in ["amqp:canary", "amqp://u:canary@host:port/", "http://u:canary@host/", "canary"] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains("broker.urls") && !error.contains("canary"), "{error}");
        }
    }

    #[test]
    fn addresses_of_version_six_keep_their_host() {
        let address = parse("amqp://u:p@[::1]:5673/%2f").unwrap();
        assert_eq!((address.broker.host.as_str(), address.broker.port), ("::1", 5673));
        assert_eq!(address.to_string(), "amqp://[::1]:5673");
    }

    #[test]
    fn identity_virtual_host_and_heartbeat_reach_lapin() {
        let address = parse("amqps://me:p%40ss@broker/team%2fa").unwrap();
        let uri: AMQPUri = address.for_lapin().parse().unwrap();
        assert_eq!(uri.authority.userinfo.password, "p@ss");
        assert_eq!((uri.vhost.as_str(), uri.query.heartbeat), ("team/a", Some(4)));
        assert_eq!(uri.query.frame_max, Some(FRAME_MAX));
    }
}
