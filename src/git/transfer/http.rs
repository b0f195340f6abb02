//! Smart HTTP over our own client: checked addresses, no redirects, no proxy but one that is set, real status codes.
//!
//! Longer than 400 lines because the engine wants a type of its own for each half of a request and of its answer.

use std::{
    any::Any,
    io::{self, BufRead, BufReader, Cursor, Read, Write},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use gix::error::Error;
use gix_transport::client::blocking_io::http::{GetResponse, Http, PostBodyDataKind, PostResponse};
use jiff::Timestamp;
use secrecy::{ExposeSecret, SecretString};
use ureq::{
    Agent, Body, Proxy,
    http::{HeaderMap, Request as HttpRequest, Response, Uri, header},
    tls::{Certificate, PemItem, RootCerts, TlsConfig, TlsProvider, parse_pem},
    unversioned::transport::DefaultConnector,
};

use super::{
    Request,
    address::{self, Addresses, Resolve, Route},
    budget::Budget,
    status,
    verdict::Verdict,
};
use crate::{
    failure::{ErrorClass, Failure},
    git::credential::Login,
    protocol::{GitUrl, Scheme},
};

/// Everything that one transfer sends and receives over HTTP.
pub(super) struct Client {
    link: Arc<Link>,
}

/// What requests share.
struct Link {
    agent: Agent,
    /// The one host that is ever asked.
    host: String,
    authorization: Option<SecretString>,
    verdict: Verdict,
    budget: Budget,
}

impl Client {
    /// A client for `url` and nothing else; the login goes only there.
    pub(super) fn new(
        request: &Request,
        url: &GitUrl,
        login: Option<&Login>,
        resolve: &Resolve,
        verdict: Verdict,
        budget: Budget,
    ) -> Result<Self, Failure> {
        let route = Route::of(request, url, resolve)?;
        if login.is_some() {
            route.takes_login(url)?;
        }
        let agent = agent(url, route, request.ca_file.as_deref())?;
        Ok(Self {
            link: Arc::new(Link {
                agent,
                host: url.host().to_owned(),
                authorization: login.map(Login::basic),
                verdict,
                budget,
            }),
        })
    }
}

/// A client for the scheme, host and port of `url`, which is reached by `route`.
pub(super) fn agent(url: &GitUrl, route: Route<'_>, ca_file: Option<&Path>) -> Result<Agent, Failure> {
    let (proxy, addresses) = match route {
        Route::Proxy(proxy) => {
            // Its own words would repeat the address, which may hold a password.
            let proxy = Proxy::new(proxy).map_err(|_| Failure::internal("the proxy's address cannot be read"))?;
            (Some(proxy), Addresses::Proxy)
        }
        Route::Direct(addresses) => (None, Addresses::Pinned(addresses)),
    };
    let mut tls = TlsConfig::builder()
        .provider(TlsProvider::Rustls)
        .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()));
    if url.scheme() == Scheme::Https {
        tls = tls.root_certs(authorities(ca_file)?);
    }
    let config = Agent::config_builder()
        .tls_config(tls.build())
        .proxy(proxy)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .http_status_as_error(false)
        .timeout_connect(Some(address::CONNECT))
        .build();
    Ok(Agent::with_parts(config, DefaultConnector::default(), addresses))
}

/// The certificate authorities to trust: those of `file`, else the system's.
fn authorities(file: Option<&Path>) -> Result<RootCerts, Failure> {
    let Some(file) = file else {
        let found = rustls_native_certs::load_native_certs();
        if found.certs.is_empty() {
            return Err(Failure::internal("the system has no certificate authorities to trust; set git.ca_file"));
        }
        return Ok(RootCerts::from(found.certs.iter().map(|der| Certificate::from_der(der).to_owned())));
    };
    let unusable = |why: String| Failure::internal(format!("git.ca_file {} {why}", file.display()));
    let text = std::fs::read(file).map_err(|error| unusable(format!("cannot be read: {error}")))?;
    let certificates: Vec<_> = parse_pem(&text)
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        })
        .collect();
    if certificates.is_empty() {
        return Err(unusable("holds no certificate".to_owned()));
    }
    Ok(RootCerts::from(certificates))
}

impl Link {
    /// Sends one request; an answer other than 200 is a failure.
    fn exchange(
        self: &Arc<Self>,
        url: &str,
        lines: impl IntoIterator<Item = impl AsRef<str>>,
        body: Option<Vec<u8>>,
    ) -> io::Result<(HeaderMap, Reply)> {
        self.attempt(url, lines, body).map_err(|failure| {
            let error = io::Error::other(failure.message.clone());
            self.verdict.give(failure);
            error
        })
    }

    fn attempt(
        self: &Arc<Self>,
        url: &str,
        lines: impl IntoIterator<Item = impl AsRef<str>>,
        body: Option<Vec<u8>>,
    ) -> Result<(HeaderMap, Reply), Failure> {
        let uri: Uri =
            url.parse().map_err(|error| Failure::invalid(format!("the address cannot be asked for: {error}")))?;
        if uri.host().map(|host| host.trim_matches(['[', ']'])) != Some(&self.host) {
            return Err(Failure::internal("a request left the host of the upstream"));
        }
        let mut request = HttpRequest::builder().uri(uri).method(if body.is_some() { "POST" } else { "GET" });
        for line in lines {
            if let Some((name, value)) = line.as_ref().split_once(':') {
                request = request.header(name, value.trim());
            }
        }
        if let Some(authorization) = &self.authorization {
            let mut value = header::HeaderValue::from_str(authorization.expose_secret())
                .map_err(|_| Failure::new(ErrorClass::Auth, "the credential holds characters that cannot be sent"))?;
            value.set_sensitive(true);
            request = request.header(header::AUTHORIZATION, value);
        }
        let unfit = |error| Failure::invalid(format!("the address cannot be asked for: {error}"));
        let sent = match body {
            Some(body) => self.agent.run(request.body(body).map_err(unfit)?),
            None => self.agent.run(request.body(()).map_err(unfit)?),
        };
        let response = sent.map_err(|error| self.network(&error))?;
        self.judge(&response)?;
        let (head, body) = response.into_parts();
        Ok((head.headers, Reply { link: self.clone(), inner: BufReader::with_capacity(64 << 10, body.into_reader()) }))
    }

    fn judge(&self, response: &Response<Body>) -> Result<(), Failure> {
        let wish = response.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok());
        let wish = wish.and_then(|value| status::retry_after(value, Timestamp::now()));
        let redirected = response.headers().contains_key(header::LOCATION);
        let status = response.status().as_u16();
        status::failure(&self.host, status, self.authorization.is_some(), wish, redirected).map_or(Ok(()), Err)
    }

    fn network(&self, error: &ureq::Error) -> Failure {
        use io::ErrorKind::{InvalidData, UnexpectedEof};
        let failure = |what: &str| Failure::new(ErrorClass::Network, format!("{}: {what}: {error}", self.host));
        match error {
            ureq::Error::Tls(_) | ureq::Error::Rustls(_) | ureq::Error::Pem(_) => {
                failure("no trusted connection could be made")
            }
            ureq::Error::Io(error) if error.kind() == InvalidData => failure("no trusted connection could be made"),
            ureq::Error::ConnectProxyFailed(said) if said.contains(" 403/") => {
                Failure::forbidden(format!("{}: the proxy does not connect to it", self.host))
            }
            // It speaks, only not what we want to hear.
            ureq::Error::Protocol(_) | ureq::Error::Http(_) | ureq::Error::LargeResponseHeader(..) => {
                failure("it gave no proper answer")
            }
            ureq::Error::Io(error) if error.kind() == UnexpectedEof => failure("the connection failed"),
            _ => failure("the connection failed").unreachable(),
        }
    }
}

/// The body of an answer.
pub(super) struct Reply {
    link: Arc<Link>,
    inner: BufReader<ureq::BodyReader<'static>>,
}

impl Reply {
    fn broken(link: &Link, error: io::Error) -> io::Error {
        let message = format!("{}: the connection broke: {error}", link.host);
        link.verdict.give(Failure::new(ErrorClass::Network, message));
        error
    }
}

impl Read for Reply {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(into).map_err(|error| Self::broken(&self.link, error))?;
        self.link.budget.spend(count)?;
        Ok(count)
    }
}

impl BufRead for Reply {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        let Self { link, inner } = self;
        inner.fill_buf().map_err(|error| Self::broken(link, error))
    }

    fn consume(&mut self, count: usize) {
        // Too much is noticed at the next read: what was buffered is small.
        let _ = self.link.budget.spend(count);
        self.inner.consume(count);
    }
}

/// A POST whose body is still being written, until somebody reads its answer.
#[derive(Clone)]
pub(super) struct Post(Arc<Mutex<Stage>>);

struct Stage {
    link: Arc<Link>,
    url: String,
    lines: Vec<String>,
    body: Option<Vec<u8>>,
    headers: Option<Cursor<Vec<u8>>>,
    reply: Option<Reply>,
}

impl Stage {
    /// Sends the request, if that was not done yet.
    fn send(&mut self) -> io::Result<()> {
        if let Some(body) = self.body.take() {
            let (headers, reply) = self.link.exchange(&self.url, &self.lines, Some(body))?;
            self.headers = Some(Cursor::new(text(&headers)));
            self.reply = Some(reply);
        }
        Ok(())
    }
}

impl Post {
    fn with<T>(&self, work: impl FnOnce(&mut Stage) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Write for Post {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.with(|stage| match &mut stage.body {
            Some(body) => body.write(bytes),
            None => Err(io::Error::other("the request was sent already")),
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The headers of an answer, as lines.
pub(super) enum Headers {
    /// Of a GET.
    Here(Cursor<Vec<u8>>),
    /// Of a POST that may not have been sent.
    Later(Post, Option<Cursor<Vec<u8>>>),
}

impl Headers {
    fn lines_of(&mut self) -> io::Result<&mut Cursor<Vec<u8>>> {
        match self {
            Self::Here(lines) => Ok(lines),
            Self::Later(post, lines) => {
                if lines.is_none() {
                    *lines = post.with(|stage| stage.send().map(|()| stage.headers.take()))?;
                }
                Ok(lines.get_or_insert_default())
            }
        }
    }
}

impl Read for Headers {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.lines_of()?.read(into)
    }
}

impl BufRead for Headers {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.lines_of()?.fill_buf()
    }

    fn consume(&mut self, count: usize) {
        if let Ok(lines) = self.lines_of() {
            lines.consume(count);
        }
    }
}

/// The body of an answer that may still have to be asked for.
pub(super) enum Answer {
    /// It is being read.
    Here(Reply),
    /// Of a POST that may not have been sent.
    Later(Post),
}

impl Answer {
    fn reply(&mut self) -> io::Result<&mut Reply> {
        if let Self::Later(post) = self {
            let reply = post.with(|stage| stage.send().map(|()| stage.reply.take()))?;
            *self = Self::Here(reply.ok_or_else(|| io::Error::other("the answer was read already"))?);
        }
        match self {
            Self::Here(reply) => Ok(reply),
            Self::Later(_) => Err(io::Error::other("the request was not sent")),
        }
    }
}

impl Read for Answer {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.reply()?.read(into)
    }
}

impl BufRead for Answer {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.reply()?.fill_buf()
    }

    fn consume(&mut self, count: usize) {
        if let Ok(reply) = self.reply() {
            reply.consume(count);
        }
    }
}

impl Http for Client {
    type Headers = Headers;
    type ResponseBody = Answer;
    type PostBody = Post;

    fn get(
        &mut self,
        url: &str,
        _: &str,
        headers: impl IntoIterator<Item = impl AsRef<str>>,
    ) -> gix::Result<GetResponse<Headers, Answer>> {
        let (headers, reply) = self.link.exchange(url, headers, None).map_err(Error::from_error)?;
        Ok(GetResponse { headers: Headers::Here(Cursor::new(text(&headers))), body: Answer::Here(reply) })
    }

    fn post(
        &mut self,
        url: &str,
        _: &str,
        headers: impl IntoIterator<Item = impl AsRef<str>>,
        _: PostBodyDataKind,
    ) -> gix::Result<PostResponse<Headers, Answer, Post>> {
        let post = Post(Arc::new(Mutex::new(Stage {
            link: self.link.clone(),
            url: url.to_owned(),
            lines: headers.into_iter().map(|line| line.as_ref().to_owned()).collect(),
            body: Some(Vec::new()),
            headers: None,
            reply: None,
        })));
        Ok(PostResponse {
            headers: Headers::Later(post.clone(), None),
            body: Answer::Later(post.clone()),
            post_body: post,
        })
    }

    fn configure(&mut self, _: &dyn Any) -> gix::Result {
        Ok(())
    }
}

/// Headers as the lines that the engine looks through.
fn text(headers: &HeaderMap) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, value) in headers {
        out.extend_from_slice(name.as_str().as_bytes());
        out.extend_from_slice(b": ");
        out.extend_from_slice(value.as_bytes());
        out.push(b'\n');
    }
    out
}
