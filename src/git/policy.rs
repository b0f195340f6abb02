//! Which upstreams this node may talk to: schemes, hosts, and above all addresses.
//!
//! An address is judged after every notation and every way to wrap an IPv4 address in an IPv6 one was taken off,
//! and the very address that was judged is the one connected to.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use super::settings::GitSettings;
use crate::{
    failure::Failure,
    protocol::{GitUrl, Scheme},
};

/// What the `[git]` section allows. Travels to the transfer child with each request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    allow_http: bool,
    allow_file: bool,
    allow_loopback: bool,
    allow_private: bool,
    hosts: Vec<String>,
    #[serde(default)]
    ports: Vec<u16>,
}

/// Names that lead to a machine's own metadata service wherever they are resolved.
const METADATA: [&str; 4] =
    ["metadata.google.internal", "metadata.goog", "instance-data", "instance-data.ec2.internal"];

/// What kind of address it is, as far as the policy cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Reach {
    Public,
    Private,
    Loopback,
    /// Never an upstream, whatever the settings say.
    Never(&'static str),
}

impl From<&GitSettings> for Policy {
    fn from(settings: &GitSettings) -> Self {
        Self {
            allow_http: settings.allow_http,
            allow_file: settings.allow_file,
            allow_loopback: settings.allow_loopback,
            allow_private: settings.allow_private,
            hosts: settings.hosts.clone(),
            ports: settings.ports.clone(),
        }
    }
}

impl Policy {
    /// Judges an upstream as far as that is possible without asking anybody.
    ///
    /// # Errors
    /// `forbidden`, with the setting that would allow it.
    pub fn allow(&self, url: &GitUrl) -> Result<(), Failure> {
        match url.scheme() {
            Scheme::Http if !self.allow_http => {
                return Err(Failure::forbidden(
                    "http upstreams are not allowed here; use https, or set git.allow_http",
                ));
            }
            Scheme::File if !self.allow_file => {
                return Err(Failure::forbidden("file upstreams are not allowed here (git.allow_file)"));
            }
            Scheme::File => return Ok(()),
            Scheme::Https | Scheme::Http | Scheme::Ssh => {}
        }
        let host = url.host();
        if !self.hosts.is_empty() && !self.hosts.iter().any(|pattern| fits(host, pattern)) {
            return Err(Failure::forbidden(format!("the host {host} is not among git.hosts")));
        }
        if !self.ports.is_empty() && !self.ports.contains(&url.port()) {
            return Err(Failure::forbidden(format!("the port {} of {host} is not among git.ports", url.port())));
        }
        match host.parse() {
            Ok(address) => self.allow_address(host, address),
            Err(_) => Ok(()),
        }
    }

    /// Judges an address that `host` is or resolved to.
    ///
    /// # Errors
    /// `forbidden`, with the setting that would allow it where there is one.
    pub fn allow_address(&self, host: &str, address: IpAddr) -> Result<(), Failure> {
        let refused = match reach(address) {
            Reach::Public => return Ok(()),
            Reach::Private if self.allow_private => return Ok(()),
            Reach::Loopback if self.allow_loopback => return Ok(()),
            Reach::Private => "a private address (git.allow_private)",
            Reach::Loopback => "a loopback address (git.allow_loopback)",
            Reach::Never(what) => what,
        };
        Err(Failure::forbidden(format!("the host {host} is at {address}, {refused}; it is not connected to")))
    }

    /// Judges a name that somebody else resolves: a proxy's answer is never seen here, so only what the name itself says
    /// can be held against it. Literal addresses are judged by [`Policy::allow`].
    ///
    /// # Errors
    /// `forbidden` for names of this machine and of metadata services.
    pub fn allow_unresolved(&self, host: &str) -> Result<(), Failure> {
        let refuse = |what: &str| Err(Failure::forbidden(format!("the host {host} {what}; it is not asked for")));
        if !self.allow_loopback && (fits(host, "localhost") || fits(host, "*.localhost")) {
            return refuse("is a name of this machine (git.allow_loopback)");
        }
        if METADATA.iter().any(|name| fits(host, name)) {
            return refuse("is a metadata service");
        }
        Ok(())
    }

    /// Whether a credential may travel to `address` without encryption: only inside this machine.
    #[must_use]
    pub fn is_loopback(address: IpAddr) -> bool {
        reach(address) == Reach::Loopback
    }
}

/// Whether `host` is what `pattern` names: itself, for `*.rest` anything below `rest`, for `*` anything.
pub(super) fn fits(host: &str, pattern: &str) -> bool {
    let host = host.trim_end_matches('.').to_ascii_lowercase();
    let pattern = pattern.trim_end_matches('.').to_ascii_lowercase();
    if pattern == "*" {
        return true;
    }
    match pattern.strip_prefix("*.") {
        Some(rest) => host.strip_suffix(rest).is_some_and(|front| front.len() > 1 && front.ends_with('.')),
        None => host == pattern,
    }
}

fn reach(address: IpAddr) -> Reach {
    match address {
        IpAddr::V4(v4) => reach_v4(v4),
        IpAddr::V6(v6) => reach_v6(v6),
    }
}

fn reach_v4(address: Ipv4Addr) -> Reach {
    match address.octets() {
        [0, ..] => Reach::Never("an unspecified address"),
        [127, ..] => Reach::Loopback,
        // Clouds answer for their machines' identities here, and at the single addresses below.
        [169, 254, ..] => Reach::Never("a link-local address"),
        [100, 100, 100, 200] | [168, 63, 129, 16] => Reach::Never("a metadata service"),
        [192, 0, 0 | 2, _] | [198, 51, 100, _] | [203, 0, 113, _] | [192, 88, 99, _] => {
            Reach::Never("an address reserved for documentation or protocols")
        }
        [224..=239, ..] => Reach::Never("a multicast address"),
        [240..=255, ..] => Reach::Never("a reserved or broadcast address"),
        [10, ..] | [172, 16..=31, ..] | [192, 168, ..] | [100, 64..=127, ..] | [198, 18 | 19, ..] => Reach::Private,
        _ => Reach::Public,
    }
}

fn reach_v6(address: Ipv6Addr) -> Reach {
    let own = match address.segments() {
        [0, 0, 0, 0, 0, 0, 0, 0] => Reach::Never("an unspecified address"),
        [0, 0, 0, 0, 0, 0, 0, 1] => Reach::Loopback,
        [0xfe80..=0xfebf, ..] => Reach::Never("a link-local address"),
        [0xfd00, 0x0ec2, ..] | [0xfd20, 0x00ce, ..] => Reach::Never("a metadata service"),
        [0xff00..=0xffff, ..] => Reach::Never("a multicast address"),
        [0x2001, 0x0db8, ..] | [0x3fff, 0x0000..=0x0fff, ..] | [0x0100, 0, 0, 0, ..] => {
            Reach::Never("an address reserved for documentation or protocols")
        }
        // Unique local, and site-local of old; a translator of one's own network.
        [0xfc00..=0xfdff | 0xfec0..=0xfeff, ..] | [0x64, 0xff9b, 1, ..] => Reach::Private,
        _ => Reach::Public,
    };
    embedded(address).into_iter().map(reach_v4).fold(own, Ord::max)
}

/// The IPv4 addresses that an IPv6 address leads to or through.
fn embedded(address: Ipv6Addr) -> Vec<Ipv4Addr> {
    let s = address.segments();
    let at = |high: u16, low: u16| Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low));
    match s {
        // Unspecified and loopback are nobody's wrapping.
        [0, 0, 0, 0, 0, 0, 0, 0 | 1] => Vec::new(),
        // Mapped, compatible, translated, NAT64 (well known and local), 6to4; ISATAP below any prefix.
        [0, 0, 0, 0, 0, 0xffff | 0, high, low]
        | [0, 0, 0, 0, 0xffff, 0, high, low]
        | [0x64, 0xff9b, 0, 0, 0, 0, high, low]
        | [0x64, 0xff9b, 1, _, _, _, high, low]
        | [0x2002, high, low, ..]
        | [_, _, _, _, 0 | 0x200, 0x5efe, high, low] => vec![at(high, low)],
        // Teredo: the server, and the client with its bits flipped.
        [0x2001, 0, high, low, _, _, client_high, client_low] => vec![at(high, low), at(!client_high, !client_low)],
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::ErrorClass;

    fn open() -> Policy {
        Policy { allow_http: true, allow_file: true, allow_loopback: true, allow_private: true, ..Policy::default() }
    }

    fn shut() -> Policy {
        Policy::default()
    }

    fn allowed(policy: &Policy, address: &str) -> bool {
        policy.allow_address("host", address.parse().unwrap()).is_ok()
    }

    #[test]
    fn addresses_that_are_never_an_upstream_are_refused_whatever_the_settings() {
        for address in [
            "0.0.0.0",
            "0.1.2.3",
            "169.254.169.254",
            "169.254.0.1",
            "100.100.100.200",
            "168.63.129.16",
            "192.0.0.192",
            "192.0.2.1",
            "198.51.100.1",
            "203.0.113.1",
            "192.88.99.1",
            "224.0.0.1",
            "239.255.255.255",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "fe80::1",
            "febf::1",
            "ff02::1",
            "fd00:ec2::254",
            "fd20:ce::254",
            "2001:db8::1",
            "3fff::1",
            "100::1",
            "::ffff:169.254.169.254",
            "::169.254.169.254",
            "::ffff:0:169.254.169.254",
            "64:ff9b::169.254.169.254",
            "64:ff9b:1::a9fe:a9fe",
            "2002:a9fe:a9fe::1",
            "2001:0:a9fe:a9fe::1",
            "2001:0:808:808:0:0:5601:5601",
            "fe80::5efe:10.0.0.1",
            "2a00::5efe:169.254.169.254",
            "2a00::200:5efe:a9fe:a9fe",
        ] {
            assert!(!allowed(&open(), address), "{address}");
        }
    }

    #[test]
    fn loopback_in_any_form_needs_its_setting() {
        for address in [
            "127.0.0.1",
            "127.255.0.1",
            "::1",
            "::ffff:127.0.0.1",
            "::7f00:1",
            "64:ff9b::7f00:1",
            "2002:7f00:1::",
            "2001:0:7f00:1::f7f7:f7f7",
        ] {
            assert!(!allowed(&Policy { allow_loopback: false, ..open() }, address), "{address}");
            assert!(allowed(&open(), address), "{address}");
        }
    }

    #[test]
    fn private_ranges_need_their_setting() {
        for address in [
            "10.0.0.1",
            "172.16.0.1",
            "172.31.255.255",
            "192.168.1.1",
            "100.64.0.1",
            "198.18.0.1",
            "fc00::1",
            "fd12::1",
            "fec0::1",
            "::ffff:10.0.0.1",
            "64:ff9b::10.0.0.1",
            "64:ff9b:1::808:808",
        ] {
            assert!(!allowed(&Policy { allow_private: false, ..open() }, address), "{address}");
            assert!(allowed(&open(), address), "{address}");
        }
    }

    #[test]
    fn public_addresses_need_no_setting() {
        for address in [
            "8.8.8.8",
            "172.15.0.1",
            "172.32.0.1",
            "100.128.0.1",
            "192.1.0.1",
            "2606:4700::1",
            "64:ff9b::808:808",
            "::ffff:8.8.8.8",
            "2002:808:808::1",
        ] {
            assert!(allowed(&shut(), address), "{address}");
        }
    }

    #[test]
    fn literal_addresses_in_any_notation_are_judged_before_anything_is_asked() {
        for host in [
            "127.0.0.1",
            "2130706433",
            "0x7f000001",
            "0x7f.1",
            "0177.0.0.1",
            "127.1",
            "[::1]",
            "[::ffff:127.0.0.1]",
            "[0:0:0:0:0:ffff:7f00:1]",
            "169.254.169.254",
            "0xa9fea9fe",
            "[::ffff:a9fe:a9fe]",
            "0",
            "[::]",
        ] {
            let url = GitUrl::parse(&format!("https://{host}/x.git")).unwrap();
            assert_eq!(shut().allow(&url).unwrap_err().class, ErrorClass::Forbidden, "{host}");
        }
    }

    #[test]
    fn schemes_need_their_setting() {
        let allow = |policy: &Policy, text| policy.allow(&GitUrl::parse(text).unwrap()).is_ok();
        for (text, without) in [
            ("https://git.example/x", true),
            ("ssh://git.example/x", true),
            ("http://git.example/x", false),
            ("file:///srv/x", false),
        ] {
            assert_eq!(allow(&shut(), text), without, "{text}");
            assert!(allow(&open(), text), "{text}");
        }
    }

    #[test]
    fn host_patterns_name_a_host_or_everything_below_one() {
        for (host, pattern, fits_it) in [
            ("git.example", "git.example", true),
            ("GIT.example.", "git.example", true),
            ("a.git.example", "*.git.example", true),
            ("a.b.git.example", "*.git.example", true),
            ("git.example", "*.git.example", false),
            ("evilgit.example", "*.git.example", false),
            (".git.example", "*.git.example", false),
            ("git.example.evil", "git.example", false),
            ("git.example", "*", true),
            ("git.example", "*example", false),
        ] {
            assert_eq!(fits(host, pattern), fits_it, "{host} {pattern}");
        }
        let policy = Policy { hosts: vec!["*.git.example".to_owned()], ..open() };
        assert!(policy.allow(&GitUrl::parse("https://a.git.example/x").unwrap()).is_ok());
        assert!(policy.allow(&GitUrl::parse("https://other.example/x").unwrap()).is_err());
        assert!(policy.allow(&GitUrl::parse("https://8.8.8.8/x").unwrap()).is_err());
    }

    #[test]
    fn ports_may_be_limited() {
        let policy = Policy { ports: vec![443, 22], ..open() };
        let allow = |text| policy.allow(&GitUrl::parse(text).unwrap()).is_ok();
        for (text, allowed) in [
            ("https://git.example/x", true),
            ("ssh://git.example/x", true),
            ("https://git.example:6379/x", false),
            ("http://git.example/x", false),
            ("file:///srv/x", true),
        ] {
            assert_eq!(allow(text), allowed, "{text}");
        }
    }

    #[test]
    fn names_that_a_proxy_would_resolve_are_judged_as_names() {
        for (host, shut_allows, open_allows) in [
            ("git.example", true, true),
            ("localhost", false, true),
            ("LOCALHOST.", false, true),
            ("a.localhost", false, true),
            ("metadata.google.internal", false, false),
        ] {
            assert_eq!(shut().allow_unresolved(host).is_ok(), shut_allows, "{host}");
            assert_eq!(open().allow_unresolved(host).is_ok(), open_allows, "{host}");
        }
    }
}
