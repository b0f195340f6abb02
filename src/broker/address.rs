//! A broker's address, taken apart once.

use percent_encoding::percent_decode_str;
use secrecy::{ExposeSecret, SecretString};
use url::Url;

use super::BrokerError;

/// `amqp://user:password@host:port/vhost`, in parts; the password does not print.
#[derive(Clone, Debug)]
pub struct Address {
    /// Whether it is `amqps://`.
    pub tls: bool,
    /// The host.
    pub host: String,
    /// The port.
    pub port: u16,
    /// The user.
    pub user: String,
    /// The password.
    pub password: SecretString,
    /// The virtual host.
    pub vhost: String,
}

impl Address {
    /// Takes an address apart.
    ///
    /// # Errors
    /// When it is not one; the text is not repeated, since it may hold a password.
    pub fn parse(text: &SecretString) -> Result<Self, BrokerError> {
        let unfit =
            || BrokerError::Settings("broker.urls has an address that is no amqp:// or amqps:// URL".to_owned());
        let url = Url::parse(text.expose_secret()).map_err(|_| unfit())?;
        let tls = match url.scheme() {
            "amqp" => false,
            "amqps" => true,
            _ => return Err(unfit()),
        };
        let decoded = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
        let host = url.host_str().filter(|host| !host.is_empty()).ok_or_else(unfit)?;
        Ok(Self {
            tls,
            host: decoded(host.trim_matches(['[', ']'])),
            port: url.port().unwrap_or(if tls { 5671 } else { 5672 }),
            user: if url.username().is_empty() { "guest".to_owned() } else { decoded(url.username()) },
            password: SecretString::from(url.password().map_or_else(|| "guest".to_owned(), decoded)),
            vhost: match url.path() {
                "" | "/" => "/".to_owned(),
                path => decoded(&path[1..]),
            },
        })
    }

    /// Whether the broker is on this machine.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        is_loopback(&self.host)
    }

    /// Where it is, without user and password: `amqp://host:port/vhost`.
    #[must_use]
    pub fn location(&self) -> String {
        let scheme = if self.tls { "amqps" } else { "amqp" };
        let vhost = self.vhost.replace('/', "%2f");
        format!("{scheme}://{}/{vhost}", self.authority())
    }

    /// Host and port, as they stand in a URL.
    #[must_use]
    pub fn authority(&self) -> String {
        format!("{}:{}", bracketed(&self.host), self.port)
    }
}

/// Whether a host is this machine, as far as its name says.
pub(crate) fn is_loopback(host: &str) -> bool {
    let host = host.trim_matches(['[', ']']);
    host.eq_ignore_ascii_case("localhost")
        || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback())
}

pub(crate) fn bracketed(host: &str) -> String {
    if host.contains(':') { format!("[{host}]") } else { host.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Address, BrokerError> {
        Address::parse(&SecretString::from(text))
    }

    #[test]
    fn an_address_comes_apart() {
        let address = parse("amqps://ha%40ul:p%2Fw@mq.example/fleet%2fa").unwrap();
        assert_eq!((address.user.as_str(), address.password.expose_secret()), ("ha@ul", "p/w"));
        assert_eq!((address.tls, address.port, address.vhost.as_str()), (true, 5671, "fleet/a"));
        let plain = parse("amqp://127.0.0.1").unwrap();
        assert_eq!((plain.user.as_str(), plain.port, plain.vhost.as_str()), ("guest", 5672, "/"));
        assert_eq!(parse("amqp://h:1/%2f").unwrap().vhost, "/");
        assert_eq!(address.location(), "amqps://mq.example:5671/fleet%2fa");
    }

    #[test]
    fn a_bad_address_is_not_repeated() {
        for bad in ["http://u:hunter2@h", "amqp:hunter2", "hunter2", "amqp://"] {
            assert!(!parse(bad).unwrap_err().to_string().contains("hunter2"), "{bad}");
        }
    }

    #[test]
    fn loopback_is_told_from_remote() {
        for (host, local) in
            [("127.0.0.1", true), ("[::1]", true), ("localhost", true), ("10.0.0.5", false), ("mq.example", false)]
        {
            assert_eq!(parse(&format!("amqp://{host}:5672/")).unwrap().is_loopback(), local, "{host}");
        }
    }
}
