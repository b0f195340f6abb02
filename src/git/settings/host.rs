//! `[git.host."PATTERN"]`: what holds for some upstreams only.

use std::{collections::BTreeMap, fmt, path::PathBuf};

use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize, Serializer};
use url::Url;

use crate::git::policy::fits;

/// The word that stands for "through no proxy", where a wider pattern has one.
const DIRECT: &str = "direct";

/// One table: each field holds for the hosts of its pattern unless a narrower pattern sets it too.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HostSettings {
    /// The proxy that leads to these hosts.
    pub proxy: Option<Proxy>,
    /// PEM file with the certificate authorities to trust for these hosts, instead of `git.ca_file`.
    pub ca_file: Option<PathBuf>,
    /// Transfers at a time with one of these hosts, instead of `git.host_limit`.
    pub limit: Option<u32>,
}

/// An HTTP proxy, or none. Prints neither user nor password.
#[derive(Clone, Deserialize)]
#[serde(try_from = "String")]
pub enum Proxy {
    /// No proxy.
    Direct,
    /// Its address: `http://[user:password@]host[:port]`.
    Through(SecretString),
}

impl Proxy {
    /// The address, if there is a proxy.
    #[must_use]
    pub fn address(&self) -> Option<&str> {
        match self {
            Self::Direct => None,
            Self::Through(address) => Some(address.expose_secret()),
        }
    }
}

impl TryFrom<String> for Proxy {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        if text == DIRECT {
            return Ok(Self::Direct);
        }
        // What is refused is not repeated: it may hold a password.
        let refused = "a proxy is written http://host:port, or \"direct\" for none";
        let url = Url::parse(&text).map_err(|_| refused)?;
        let bare = matches!(url.path(), "" | "/") && url.query().is_none() && url.fragment().is_none();
        if url.scheme() != "http" || url.host_str().is_none_or(str::is_empty) || !bare {
            return Err(refused);
        }
        Ok(Self::Through(text.into()))
    }
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address().map(Url::parse) {
            None => f.write_str(DIRECT),
            Some(Ok(url)) => {
                write!(f, "http://{}:{}", url.host_str().unwrap_or_default(), url.port_or_known_default().unwrap_or(80))
            }
            Some(Err(_)) => f.write_str("a proxy"),
        }
    }
}

/// Only for the pipe to the child that uses it.
impl Serialize for Proxy {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.address().unwrap_or(DIRECT))
    }
}

/// What the tables say of `host`, the narrowest pattern first for each field.
pub(in crate::git) fn of(tables: &BTreeMap<String, HostSettings>, host: &str) -> HostSettings {
    let mut fitting: Vec<_> = tables.iter().filter(|(pattern, _)| fits(host, pattern)).collect();
    // The host itself, then the longest tail, then everything.
    fitting.sort_by_key(|(pattern, _)| (pattern.starts_with('*'), std::cmp::Reverse(pattern.len())));
    let mut found = HostSettings::default();
    for (_, table) in fitting {
        found.proxy = found.proxy.or_else(|| table.proxy.clone());
        found.ca_file = found.ca_file.or_else(|| table.ca_file.clone());
        found.limit = found.limit.or(table.limit);
    }
    found
}

/// What is wrong with the tables, in a sentence.
pub(super) fn check(tables: &BTreeMap<String, HostSettings>, any_host: bool) -> Result<(), String> {
    for (pattern, table) in tables {
        let name = pattern.strip_prefix("*.").unwrap_or(pattern);
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':');
        if pattern != "*" && (name.is_empty() || !name.chars().all(plain)) {
            return Err(format!("git.host has the pattern {pattern:?}: write a host name, *.domain, or *"));
        }
        if table.limit == Some(0) {
            return Err(format!("git.host.{pattern:?}: limit must be at least 1"));
        }
        if pattern == "*" && any_host && table.proxy.as_ref().and_then(Proxy::address).is_some() {
            return Err(
                "git.host.\"*\" sends every host through a proxy, which finds the addresses itself, so that they \
                        cannot be judged here: set git.hosts to the hosts that are meant ([\"*\"] for all)"
                    .to_owned(),
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tables(text: &str) -> BTreeMap<String, HostSettings> {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn the_narrowest_pattern_that_sets_a_field_decides_it() {
        let tables = tables(
            "[\"*\"]\nproxy = \"http://all:1\"\nlimit = 3\n[\"*.example\"]\nca_file = \"/ca\"\n\
             [\"*.git.example\"]\nproxy = \"http://git:2\"\n[\"a.git.example\"]\nproxy = \"direct\"\nlimit = 1",
        );
        let proxy = |host| of(&tables, host).proxy.unwrap().address().map(str::to_owned);
        assert_eq!(proxy("other.org").as_deref(), Some("http://all:1"));
        assert_eq!(proxy("b.git.example").as_deref(), Some("http://git:2"));
        assert_eq!(proxy("A.git.example"), None);
        assert_eq!(of(&tables, "a.git.example").ca_file, Some("/ca".into()));
        assert_eq!([of(&tables, "a.git.example").limit, of(&tables, "x").limit], [Some(1), Some(3)]);
    }

    #[test]
    fn a_proxy_prints_and_is_refused_without_its_password() {
        let proxy = Proxy::try_from("http://user:canary@proxy.example:3128".to_owned()).unwrap();
        assert_eq!(format!("{proxy:?}"), "http://proxy.example:3128");
        for bad in ["socks5://canary@h", "http://", "canary", "http://h/canary", "https://u:canary@h", ""] {
            let refused = Proxy::try_from(bad.to_owned()).unwrap_err();
            assert!(!refused.contains("canary"), "{bad}");
        }
    }

    #[test]
    fn tables_that_cannot_be_meant_are_refused() {
        for (text, part) in [
            ("[\"\"]\nlimit = 1", "pattern"),
            ("[\"a b\"]\nlimit = 1", "pattern"),
            ("[\"https://h\"]\nlimit = 1", "pattern"),
            ("[\"a.*.b\"]\nlimit = 1", "pattern"),
            ("[\"h\"]\nlimit = 0", "at least 1"),
            ("[\"*\"]\nproxy = \"http://h:1\"", "git.hosts"),
        ] {
            let sentence = check(&tables(text), true).unwrap_err();
            assert!(sentence.contains(part) && sentence.contains("git.host"), "{sentence}");
        }
        assert_eq!(check(&tables("[\"*\"]\nproxy = \"http://h:1\""), false), Ok(()));
        assert_eq!(check(&tables("[\"*.h\"]\nproxy = \"http://h:1\"\nlimit = 2"), true), Ok(()));
    }
}
