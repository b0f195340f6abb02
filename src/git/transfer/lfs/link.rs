//! The connections of an LFS transfer: to the upstream with the task's credential, and to wherever its links lead
//! without it.

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap},
    io::Read,
    path::PathBuf,
};

use jiff::Timestamp;
use secrecy::{ExposeSecret, SecretString};
use ureq::{
    Agent, Body,
    http::{HeaderName, HeaderValue, Request as HttpRequest, Response, header},
};
use url::Url;

use super::{
    super::{
        address::{self, Route},
        http, status,
    },
    LfsRequest,
    batch::Action,
};
use crate::{
    failure::{ErrorClass, Failure},
    git::{
        credential::Login,
        module::same_host,
        policy::Policy,
        settings::{HostSettings, of_tables},
    },
    protocol::{GitUrl, Scheme},
};

/// The media type of the API.
const JSON: &str = "application/vnd.git-lfs+json";
/// The longest link, in bytes.
const LONGEST_LINK: usize = 8192;
/// The most headers that a link may bring, and their bytes in all.
const MOST_HEADERS: (usize, usize) = (32, 16 << 10);
/// Headers that are ours to set.
const OURS: [&str; 9] = [
    "host",
    "connection",
    "content-length",
    "transfer-encoding",
    "te",
    "trailer",
    "upgrade",
    "expect",
    "accept-encoding",
];

/// What is sent and received for one task.
pub(super) struct Link {
    /// One for each scheme, host and port.
    agents: RefCell<HashMap<String, Agent>>,
    upstream: GitUrl,
    authorization: Option<SecretString>,
    policy: Policy,
    ca_file: Option<PathBuf>,
    hosts: BTreeMap<String, HostSettings>,
}

impl Link {
    /// Connections for the LFS objects of `url`.
    pub(super) fn new(request: &LfsRequest, url: &GitUrl) -> Result<Self, Failure> {
        if !matches!(url.scheme(), Scheme::Https | Scheme::Http) {
            return Err(Failure::invalid("LFS objects are fetched over https only"));
        }
        let login = request.credential.as_ref().map(|file| file.login(url.host())).transpose()?;
        Ok(Self {
            agents: RefCell::default(),
            upstream: url.clone(),
            authorization: login.as_ref().map(Login::basic),
            policy: request.policy.clone(),
            ca_file: request.ca_file.clone(),
            hosts: request.hosts.clone(),
        })
    }

    /// The client for one scheme, host and port: no redirects, checked addresses, the proxy and the authorities that are
    /// set for the host.
    fn agent(&self, place: &GitUrl) -> Result<Agent, Failure> {
        let name = format!("{:?} {} {}", place.scheme(), place.host(), place.port());
        if let Some(agent) = self.agents.borrow().get(&name) {
            return Ok(agent.clone());
        }
        let set = of_tables(&self.hosts, place.host());
        let ca_file = set.ca_file.or_else(|| self.ca_file.clone());
        let route = Route::to(place, &self.policy, set.proxy.as_ref(), &address::system)?;
        if self.is_authorised() && same_host(place, &self.upstream) {
            route.takes_login(place)?;
        }
        let agent = http::agent(place, route, ca_file.as_deref())?;
        self.agents.borrow_mut().insert(name, agent.clone());
        Ok(agent)
    }

    /// The upstream's host.
    pub(super) fn host(&self) -> &str {
        self.upstream.host()
    }

    /// Whether the upstream is asked with a credential.
    pub(super) fn is_authorised(&self) -> bool {
        self.authorization.is_some()
    }

    /// Asks the upstream's batch API; an answer has at most `longest` bytes.
    pub(super) fn ask(&self, question: Vec<u8>, longest: u64) -> Result<Vec<u8>, Failure> {
        let request = HttpRequest::post(batch_address(&self.upstream))
            .header(header::ACCEPT, JSON)
            .header(header::CONTENT_TYPE, JSON);
        let request = self.authorise(request)?.body(question).map_err(|_| unfit())?;
        let response = self.agent(&self.upstream)?.run(request).map_err(|error| Self::broken(self.host(), &error))?;
        let response = Self::judge(response, self.host(), self.is_authorised())?;
        let mut text = Vec::new();
        let read = response.into_body().into_reader().take(longest + 1).read_to_end(&mut text);
        read.map_err(|error| {
            Failure::new(ErrorClass::Network, format!("{}: the connection broke: {}", self.host(), error.kind()))
        })?;
        if text.len() as u64 > longest {
            return Err(Failure::new(
                ErrorClass::Quota,
                format!("{} answers the LFS request at too great length", self.host()),
            ));
        }
        Ok(text)
    }

    /// Begins to download what a link leads to.
    ///
    /// The headers of the link go where it leads; the task's credential goes along only to the upstream's own scheme,
    /// host and port, and only where the link brings no authorisation of its own.
    pub(super) fn download(&self, action: &Action) -> Result<impl Read + use<>, Failure> {
        let place = destination(&action.href, &self.policy)?;
        let mut request = HttpRequest::get(&action.href).header(header::ACCEPT_ENCODING, "identity");
        let mut own = false;
        for (name, value) in headers(action)? {
            own |= name == header::AUTHORIZATION;
            request = request.header(name, value);
        }
        let ours = !own && same_host(&place, &self.upstream);
        if ours {
            request = self.authorise(request)?;
        }
        let request = request.body(()).map_err(|_| unfit())?;
        let response = self.agent(&place)?.run(request).map_err(|error| Self::broken(place.host(), &error))?;
        let response = Self::judge(response, place.host(), ours && self.is_authorised())?;
        Ok(response.into_body().into_reader())
    }

    fn authorise(&self, request: ureq::http::request::Builder) -> Result<ureq::http::request::Builder, Failure> {
        let Some(authorization) = &self.authorization else { return Ok(request) };
        let mut value = HeaderValue::from_str(authorization.expose_secret())
            .map_err(|_| Failure::new(ErrorClass::Auth, "the credential holds characters that cannot be sent"))?;
        value.set_sensitive(true);
        Ok(request.header(header::AUTHORIZATION, value))
    }

    fn judge(response: Response<Body>, host: &str, authorised: bool) -> Result<Response<Body>, Failure> {
        let wish = response.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok());
        let wish = wish.and_then(|value| status::retry_after(value, Timestamp::now()));
        let redirected = response.headers().contains_key(header::LOCATION);
        match status::failure(host, response.status().as_u16(), authorised, wish, redirected) {
            Some(mut failure) => {
                failure.message.push_str(" (LFS)");
                Err(failure)
            }
            None => Ok(response),
        }
    }

    /// What an error of the client stands for. Links hold secrets, so a text with one in it is not repeated.
    fn broken(host: &str, error: &ureq::Error) -> Failure {
        let text = error.to_string();
        let text = if text.contains('/') { "it cannot be asked" } else { &text };
        Failure::new(ErrorClass::Network, format!("{host}: the connection failed: {text}"))
    }
}

/// The address of the batch API of an upstream.
fn batch_address(upstream: &GitUrl) -> String {
    let base = upstream.as_str().trim_end_matches('/');
    let base = base.strip_suffix(".git").unwrap_or(base);
    format!("{base}.git/info/lfs/objects/batch")
}

/// Where a link leads, judged like the address of an upstream; what it says beyond the host is not looked at.
fn destination(href: &str, policy: &Policy) -> Result<GitUrl, Failure> {
    let refused = |why: &str| Failure::forbidden(format!("the upstream's LFS link {why}; it is not followed"));
    if href.len() > LONGEST_LINK || href.bytes().any(|byte| byte <= b' ' || byte >= 0x7f || byte == b'\\') {
        return Err(refused("is too long or has odd characters"));
    }
    let link = Url::parse(href).map_err(|_| refused("is no address"))?;
    if !matches!(link.scheme(), "https" | "http") || !href.starts_with(&format!("{}://", link.scheme())) {
        return Err(refused("has another scheme than https or http"));
    }
    if !link.username().is_empty() || link.password().is_some() || link.fragment().is_some() {
        return Err(refused("has a user, a password or a fragment"));
    }
    let host = link.host_str().ok_or_else(|| refused("has no host"))?;
    let port = link.port().map(|port| format!(":{port}")).unwrap_or_default();
    let place = GitUrl::parse(&format!("{}://{host}{port}/lfs", link.scheme()))?;
    policy.allow(&place)?;
    Ok(place)
}

/// The headers that a link brings, those that are ours left out.
fn headers(action: &Action) -> Result<Vec<(HeaderName, HeaderValue)>, Failure> {
    let (most, longest) = MOST_HEADERS;
    let bytes: usize = action.header.iter().map(|(name, value)| name.len() + value.len()).sum();
    if action.header.len() > most || bytes > longest {
        return Err(Failure::invalid("the upstream's LFS link brings too many headers"));
    }
    let mut headers = Vec::new();
    for (name, value) in &action.header {
        let unfit = || Failure::invalid("the upstream's LFS link brings a header that cannot be sent");
        let name = HeaderName::from_bytes(name.as_bytes()).map_err(|_| unfit())?;
        let mut value = HeaderValue::from_str(value).map_err(|_| unfit())?;
        value.set_sensitive(true);
        if !OURS.contains(&name.as_str()) && !name.as_str().starts_with("proxy-") {
            headers.push((name, value));
        }
    }
    Ok(headers)
}

fn unfit() -> Failure {
    Failure::invalid("the upstream's LFS link cannot be asked for")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_batch_api_is_at_the_upstream_itself() {
        for (url, wanted) in [
            ("https://h.example/a/b.git", "https://h.example/a/b.git/info/lfs/objects/batch"),
            ("https://h.example/a/b", "https://h.example/a/b.git/info/lfs/objects/batch"),
            ("https://h.example/a/b/", "https://h.example/a/b.git/info/lfs/objects/batch"),
        ] {
            assert_eq!(batch_address(&GitUrl::parse(url).unwrap()), wanted);
        }
    }

    #[test]
    fn links_are_judged_like_upstreams() {
        let policy = Policy::default();
        for bad in [
            "",
            "/x",
            "file:///etc/passwd",
            "ftp://h.example/x",
            "http://h.example/x",
            "https:h.example/x",
            "https://user:canary@h.example/x",
            "https://h.example/x#y",
            "https://127.0.0.1/x",
            "https://169.254.169.254/latest",
            "https://[::ffff:169.254.169.254]/latest",
            "https://2852039166/latest",
            "https://h.example/\nx",
            "https://h.example\\@other/x",
            "gopher://h.example/x",
        ] {
            let failure = destination(bad, &policy).unwrap_err();
            assert!(matches!(failure.class, ErrorClass::Forbidden | ErrorClass::Invalid), "{bad}: {failure}");
            assert!(!failure.message.contains("canary"), "{failure}");
        }
        let place = destination("https://objects.example:8443/x?X-Amz-Signature=y%2F..%2F", &policy).unwrap();
        assert_eq!((place.host(), place.port()), ("objects.example", 8443));
    }

    #[test]
    fn a_link_sets_no_header_that_frames_the_request() {
        let header = |name: &str| [(name.to_owned(), "x".to_owned())].into();
        let action = |header| Action { href: String::new(), header };
        for ours in ["Host", "content-length", "Transfer-Encoding", "Proxy-Authorization"] {
            assert!(headers(&action(header(ours))).unwrap().is_empty(), "{ours}");
        }
        assert_eq!(headers(&action(header("Authorization"))).unwrap().len(), 1);
        assert!(headers(&action(header("a\r\nb"))).is_err());
        assert!(headers(&action((0..40).map(|n| (format!("x-{n}"), String::new())).collect())).is_err());
    }
}
