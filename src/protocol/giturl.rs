//! The address of an upstream, checked before anything looks at it.
//!
//! Only syntax is decided here. Whether a scheme, host or address is allowed on this node is the git policy's
//! to say, and it says it about the parsed value, never about text.

use std::fmt;

use percent_encoding::percent_decode_str;
use url::{Host, Url};

use super::names::{is_unprintable, quoted};
use crate::failure::Failure;

/// How an upstream is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scheme {
    /// Smart HTTP over TLS.
    Https,
    /// Smart HTTP in the clear.
    Http,
    /// The OpenSSH client.
    Ssh,
    /// A path on this machine; for tests and the demo.
    File,
}

/// A checked upstream address, free of secrets.
///
/// Two addresses are equal if they are the same text after normalisation (case of host, default port).
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct GitUrl {
    url: Url,
    scheme: Scheme,
}

impl GitUrl {
    /// The longest address, in bytes.
    pub const LONGEST: usize = 2048;

    /// Parses and checks an address.
    ///
    /// # Errors
    /// `invalid` for another scheme, a user or password (but a plain user for ssh), control characters before or
    /// after decoding, a component that begins with a dash, a query or a fragment. A refused address with
    /// credentials in it is not repeated in the sentence.
    pub fn parse(text: &str) -> Result<Self, Failure> {
        if text.is_empty() || text.len() > Self::LONGEST {
            return Err(Failure::invalid("git_url is empty or longer than 2048 bytes"));
        }
        if text.chars().any(|c| is_unprintable(c) || c == ' ' || c == '\\') {
            return Err(Failure::invalid("git_url has a control character, a space or a backslash"));
        }
        let Some((scheme, rest)) = text.split_once("://") else {
            return Err(Failure::invalid(format!(
                "git_url {} has no scheme: write https://host/path or ssh://git@host/path",
                shown(text)
            )));
        };
        let scheme = match scheme {
            "https" => Scheme::Https,
            "http" => Scheme::Http,
            "ssh" => Scheme::Ssh,
            "file" => Scheme::File,
            _ => {
                return Err(Failure::invalid(format!(
                    "git_url has the scheme {}; supported are https, ssh and, where the node allows it, http",
                    quoted(scheme)
                )));
            }
        };
        if rest.contains("://") || rest.contains("::") && !rest.starts_with('[') && !rest.contains("@[") {
            return Err(Failure::invalid("git_url has a scheme inside it"));
        }
        if scheme != Scheme::File && rest.starts_with('/') {
            // A parser for browsers would take what follows for the host.
            return Err(Failure::invalid("git_url has no host"));
        }
        let url = Url::parse(text).map_err(|error| Failure::invalid(format!("git_url cannot be read: {error}")))?;
        let parsed = Self { url, scheme };
        parsed.check()?;
        Ok(parsed)
    }

    fn check(&self) -> Result<(), Failure> {
        let url = &self.url;
        if url.password().is_some() || (!url.username().is_empty() && self.scheme != Scheme::Ssh) {
            return Err(Failure::invalid(
                "git_url has a user, password or token in it; name a credential of the node instead",
            ));
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err(Failure::invalid("git_url has a query or a fragment"));
        }
        match self.scheme {
            Scheme::File if url.host().is_some() => {
                return Err(Failure::invalid("git_url names a file on another host"));
            }
            Scheme::File => {}
            _ if url.host_str().is_none_or(str::is_empty) => return Err(Failure::invalid("git_url has no host")),
            _ => {}
        }
        let user = decoded(url.username())?;
        let host = self.host();
        // A dash would be read as an option by a program that gets the part as an argument.
        if user.starts_with('-') || host.starts_with('-') {
            return Err(Failure::invalid("git_url has a user or host that begins with a dash"));
        }
        if !user.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-')) {
            return Err(Failure::invalid("git_url has a user with characters other than [A-Za-z0-9._-]"));
        }
        if self.scheme != Scheme::File
            && !matches!(url.host(), Some(Host::Ipv6(_)))
            && !host.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
        {
            return Err(Failure::invalid("git_url has a host that is not a host name or an address"));
        }
        let path = decoded(url.path())?;
        if path.trim_matches('/').is_empty() {
            return Err(Failure::invalid("git_url has no path to a repository"));
        }
        let odd = |part: &str| part.starts_with('-') || part == ".." || part == ".";
        if path.split('/').any(odd) || path.contains('\\') {
            return Err(Failure::invalid(
                "git_url has a path component that is a dot, two dots or begins with a dash, or a backslash",
            ));
        }
        Ok(())
    }

    /// How it is reached.
    #[must_use]
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// The host, without brackets; empty for a file.
    #[must_use]
    pub fn host(&self) -> &str {
        self.url.host_str().unwrap_or_default().trim_start_matches('[').trim_end_matches(']')
    }

    /// The port that is connected to; 0 for a file.
    #[must_use]
    pub fn port(&self) -> u16 {
        match self.scheme {
            Scheme::Https | Scheme::Http => self.url.port_or_known_default().unwrap_or_default(),
            Scheme::Ssh => self.url.port().unwrap_or(22),
            Scheme::File => 0,
        }
    }

    /// The user for ssh (`git` unless the address names one).
    #[must_use]
    pub fn user(&self) -> &str {
        if self.url.username().is_empty() { "git" } else { self.url.username() }
    }

    /// The path, decoded.
    #[must_use]
    pub fn path(&self) -> String {
        percent_decode_str(self.url.path()).decode_utf8_lossy().into_owned()
    }

    /// The address as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        self.url.as_str()
    }
}

impl fmt::Display for GitUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for GitUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// `part` after percent-decoding, refused if it hides a control character or is not UTF-8.
fn decoded(part: &str) -> Result<String, Failure> {
    let text = percent_decode_str(part)
        .decode_utf8()
        .map_err(|_| Failure::invalid("git_url is not UTF-8 after percent-decoding"))?;
    // Twice: a server or proxy may decode once more than we do.
    let again = percent_decode_str(&text).decode_utf8_lossy();
    if text.chars().chain(again.chars()).any(is_unprintable) {
        return Err(Failure::invalid("git_url hides a control character behind percent-encoding"));
    }
    Ok(text.into_owned())
}

/// `text` as it may stand in a sentence: nothing before an `@`, where a secret might be.
fn shown(text: &str) -> String {
    match text.rsplit_once('@') {
        Some((_, rest)) => quoted(&format!("…@{rest}")),
        None => quoted(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_schemes_and_spellings_are_refused() {
        for bad in [
            "",
            "ext::sh -c id",
            "ext::sh%20-c%20id",
            "fd::17",
            "git://host/x",
            "ftp://host/x",
            "/srv/x.git",
            "../x",
            "x.git",
            "C:\\repo",
            "C:/repo",
            "\\\\server\\share",
            "git@host:x.git",
            "HTTPS://host/x",
            "file:/x",
            "file::///x",
            "https://https://host/x",
            "https://host/ext::sh",
            "git+ssh://host/x",
            "ssh+git://host/x",
            "https:host/x",
            "https:/host/x",
            "https:///x",
            "https:///host/x",
            "http:////host/x",
            "ssh:///host/x",
            "git-remote-ext::x",
            "javascript://x/y",
            "transport::addr",
            "file://host/x",
            " https://host/x",
            "https://host/x ",
        ] {
            assert!(GitUrl::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn option_injection_is_refused() {
        for bad in [
            "ssh://-oProxyCommand=id/x",
            "ssh://-l@host/x",
            "https://-host/x",
            "https://host/-x",
            "https://host/a/-x",
            "ssh://%2doProxyCommand@host/x",
            "https://host/%2dx",
            "--upload-pack=id",
        ] {
            assert!(GitUrl::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn control_characters_are_refused_before_and_after_decoding() {
        for bad in [
            "https://host/x\n",
            "https://ho\0st/x",
            "https://host/x%0a",
            "https://host/x%00",
            "https://host/x%250a",
            "https://host/\u{202e}x",
            "https://host/%ff",
            "https://host/x%1b[0m",
            "https://ho%0ast/x",
        ] {
            assert!(GitUrl::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn secrets_in_an_address_are_refused_and_not_repeated() {
        for bad in [
            "https://canary@host/x",
            "https://user:canary@host/x",
            "https://:canary@host/x",
            "ssh://git:canary@host/x",
            "user:canary@host/x",
            "http://canary@host/x",
            "https://host/x?token=canary",
            "https://host/x#canary",
            "canary@host:x",
        ] {
            let failure = GitUrl::parse(bad).unwrap_err();
            assert!(!failure.message.contains("canary"), "{bad:?}: {}", failure.message);
        }
    }

    #[test]
    fn paths_that_climb_or_are_empty_are_refused() {
        for bad in ["https://host", "https://host/", "https://host/a%2f..%2fb", "https://host/a%5cb"] {
            assert!(GitUrl::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn plain_addresses_are_taken_apart() {
        let cases = [
            ("https://git.example/team/app.git", Scheme::Https, "git.example", 443),
            ("http://127.0.0.1:8080/a.git", Scheme::Http, "127.0.0.1", 8080),
            ("https://[::1]:8443/a", Scheme::Https, "::1", 8443),
            ("ssh://git@host.example:2222/a/b.git", Scheme::Ssh, "host.example", 2222),
            ("ssh://host.example/a/b.git", Scheme::Ssh, "host.example", 22),
            ("file:///srv/a.git", Scheme::File, "", 0),
        ];
        for (text, scheme, host, port) in cases {
            let url = GitUrl::parse(text).unwrap();
            assert_eq!((url.scheme(), url.host(), url.port()), (scheme, host, port), "{text}");
        }
    }

    #[test]
    fn odd_notations_of_an_address_become_the_address_itself() {
        for text in ["http://2130706433/x", "http://0x7f.1/x", "http://0177.0.0.1/x", "http://127.1/x"] {
            assert_eq!(GitUrl::parse(text).unwrap().host(), "127.0.0.1", "{text}");
        }
    }
}
