//! Names to addresses, each judged; nothing else is ever connected to.

use std::{
    net::{SocketAddr, ToSocketAddrs},
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

use super::verdict::Verdict;
use crate::{
    failure::{ErrorClass, Failure},
    git::policy::Policy,
};

/// How long one address may take to answer a connection attempt.
pub(super) const CONNECT: Duration = Duration::from_secs(10);
/// The most addresses tried.
const TRIED: usize = 8;

/// The addresses of `host`, all of them allowed. A host with any address that is not, is refused as a whole: such an
/// answer is no accident.
///
/// # Errors
/// `network` where it does not resolve, `forbidden` by the policy.
pub(super) fn lookup(host: &str, port: u16, policy: &Policy) -> Result<Vec<SocketAddr>, Failure> {
    let unresolved =
        |why: &str| Failure::new(ErrorClass::Network, format!("the host {host} cannot be resolved: {why}"));
    let addresses: Vec<SocketAddr> =
        (host, port).to_socket_addrs().map_err(|error| unresolved(&error.to_string()))?.collect();
    for address in &addresses {
        policy.allow_address(host, address.ip())?;
    }
    if addresses.is_empty() {
        return Err(unresolved("it has no address"));
    }
    Ok(addresses.into_iter().take(TRIED).collect())
}

/// The resolver of our HTTP client.
#[derive(Debug)]
pub(super) struct Checked {
    pub(super) policy: Policy,
    pub(super) verdict: Verdict,
}

impl Resolver for Checked {
    fn resolve(&self, uri: &Uri, _: &Config, _: NextTimeout) -> Result<ResolvedSocketAddrs, Error> {
        let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
        let port = uri.port_u16().unwrap_or(if uri.scheme_str() == Some("http") { 80 } else { 443 });
        match lookup(host, port, &self.policy) {
            Ok(addresses) => {
                let mut resolved = self.empty();
                for address in addresses {
                    resolved.push(address);
                }
                Ok(resolved)
            }
            Err(failure) => {
                self.verdict.give(failure);
                Err(Error::HostNotFound)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_judged_by_what_it_resolves_to() {
        assert_eq!(lookup("localhost", 80, &Policy::default()).unwrap_err().class, ErrorClass::Forbidden);
    }

    #[test]
    fn a_name_that_does_not_resolve_is_a_matter_of_the_network() {
        assert_eq!(lookup("nowhere.invalid", 80, &Policy::default()).unwrap_err().class, ErrorClass::Network);
    }
}
