//! Names to addresses, each judged; nothing else is ever connected to.
//!
//! A name is resolved once for a transfer, and what was judged then is what every request of it is sent to: an answer
//! that changes afterwards is never seen.

use std::{
    io,
    net::{IpAddr, SocketAddr, ToSocketAddrs},
    time::Duration,
};

use ureq::{
    Error,
    config::Config,
    http::Uri,
    unversioned::{
        resolver::{ResolvedSocketAddrs, Resolver},
        transport::NextTimeout,
    },
};

use super::Request;
use crate::{
    failure::{ErrorClass, Failure},
    git::{policy::Policy, settings::Proxy},
    protocol::{GitUrl, Scheme},
};

/// How long one address may take to answer a connection attempt.
pub(super) const CONNECT: Duration = Duration::from_secs(10);
/// The most addresses tried.
const TRIED: usize = 8;

/// Asks somebody for the addresses of a host.
pub(super) type Resolve = dyn Fn(&str, u16) -> io::Result<Vec<SocketAddr>>;

/// Asks the system.
pub(super) fn system(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    (host, port).to_socket_addrs().map(Iterator::collect)
}

/// The addresses of `host`, all of them allowed. A host with any address that is not, is refused as a whole: such an
/// answer is no accident.
///
/// # Errors
/// `network` where it does not resolve, `forbidden` by the policy.
pub(super) fn lookup(host: &str, port: u16, policy: &Policy, resolve: &Resolve) -> Result<Vec<SocketAddr>, Failure> {
    let unresolved =
        |why: &str| Failure::new(ErrorClass::Network, format!("the host {host} cannot be resolved: {why}"));
    let addresses = resolve(host, port).map_err(|error| unresolved(&error.to_string()))?;
    for address in &addresses {
        policy.allow_address(host, address.ip())?;
    }
    if addresses.is_empty() {
        return Err(unresolved("it has no address"));
    }
    Ok(addresses.into_iter().take(TRIED).collect())
}

/// How an upstream is reached.
#[derive(Debug)]
pub(super) enum Route<'a> {
    /// At these addresses, all of them judged.
    Direct(Vec<SocketAddr>),
    /// Through the proxy at this address, which resolves names itself.
    Proxy(&'a str),
}

impl<'a> Route<'a> {
    /// The one that `request` takes to `url`.
    ///
    /// # Errors
    /// As [`lookup`].
    pub(super) fn of(request: &'a Request, url: &GitUrl, resolve: &Resolve) -> Result<Self, Failure> {
        Self::to(url, &request.policy, request.proxy.as_ref(), resolve)
    }

    /// The one to `url`, through `proxy` where there is one.
    ///
    /// # Errors
    /// As [`lookup`].
    pub(super) fn to(
        url: &GitUrl,
        policy: &Policy,
        proxy: Option<&'a Proxy>,
        resolve: &Resolve,
    ) -> Result<Self, Failure> {
        match proxy.and_then(Proxy::address) {
            Some(proxy) => policy.allow_unresolved(url.host()).map(|()| Self::Proxy(proxy)),
            None => lookup(url.host(), url.port(), policy, resolve).map(Self::Direct),
        }
    }

    /// The one address that an ssh client is given.
    ///
    /// # Errors
    /// `forbidden` where the host has a proxy.
    pub(super) fn for_ssh(self, url: &GitUrl) -> Result<IpAddr, Failure> {
        match self {
            // A lookup without an address is a failure.
            Self::Direct(addresses) => Ok(addresses[0].ip()),
            Self::Proxy(_) => Err(Failure::forbidden(format!(
                "the host {} is reached through a proxy, which takes no ssh; use https",
                url.host()
            ))),
        }
    }

    /// Refuses to send a login in the clear to anybody but this machine itself.
    ///
    /// # Errors
    /// `forbidden`.
    pub(super) fn takes_login(&self, url: &GitUrl) -> Result<(), Failure> {
        let stays_here = match self {
            Self::Direct(addresses) => addresses.iter().all(|address| Policy::is_loopback(address.ip())),
            Self::Proxy(_) => false,
        };
        if url.scheme() != Scheme::Http || stays_here {
            return Ok(());
        }
        let message = format!("a credential is not sent to {} without encryption; use https", url.host());
        Err(Failure::forbidden(message))
    }
}

/// Where our HTTP client connects to.
#[derive(Debug)]
pub(super) enum Addresses {
    /// These, whatever the name resolves to by now.
    Pinned(Vec<SocketAddr>),
    /// A proxy that the operator has set, wherever it is; it is the only name that is asked for.
    Proxy,
}

impl Resolver for Addresses {
    fn resolve(&self, uri: &Uri, _: &Config, _: NextTimeout) -> Result<ResolvedSocketAddrs, Error> {
        let addresses = match self {
            Self::Pinned(addresses) => addresses.clone(),
            Self::Proxy => {
                let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
                system(host, uri.port_u16().unwrap_or(80)).map_err(|_| Error::HostNotFound)?
            }
        };
        let mut resolved = self.empty();
        for address in addresses.into_iter().take(TRIED) {
            resolved.push(address);
        }
        Ok(resolved)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_judged_by_what_it_resolves_to() {
        assert_eq!(lookup("localhost", 80, &Policy::default(), &system).unwrap_err().class, ErrorClass::Forbidden);
    }

    #[test]
    fn a_name_that_does_not_resolve_is_a_matter_of_the_network() {
        assert_eq!(lookup("nowhere.invalid", 80, &Policy::default(), &system).unwrap_err().class, ErrorClass::Network);
    }

    #[test]
    fn one_address_that_is_not_allowed_is_enough_to_refuse() {
        let resolve = |addresses: &'static [&'static str]| {
            move |_: &str, port| Ok(addresses.iter().map(|text| SocketAddr::new(text.parse().unwrap(), port)).collect())
        };
        let class =
            |addresses| lookup("h", 1, &Policy::default(), &resolve(addresses)).map_err(|failure| failure.class);
        assert!(class(&["8.8.8.8", "2606:4700::1"]).is_ok());
        for mixed in [&["8.8.8.8", "127.0.0.1"][..], &["8.8.8.8", "169.254.169.254"], &["::1", "8.8.8.8"]] {
            assert_eq!(class(mixed), Err(ErrorClass::Forbidden), "{mixed:?}");
        }
        assert_eq!(class(&[]), Err(ErrorClass::Network));
    }
}
