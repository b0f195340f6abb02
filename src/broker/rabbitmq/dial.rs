//! How a connection is made: addresses in turn, TLS with the operator's certificates, a deadline for every step.
//!
//! lapin asks its runtime for a stream; ours hands it one that is dialled, encrypted and filtered here. So the pool
//! of publishers and the consumers share one way to connect. It is dialled before lapin is asked for a connection: a task
//! of lapin's (4.12) outlives each attempt that gets no stream (amqp-rs/lapin issue 368), which adds up while a broker is away.

use std::{
    fmt, io,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use async_rs::{Runtime, Tokio, traits::Reactor, util::RuntimeParts};
use futures_io::{AsyncRead, AsyncWrite};
use futures_util::Stream;
use lapin::{
    AsyncTcpStream, Connection, ConnectionProperties, ErrorKind,
    protocol::{AMQPErrorKind, AMQPHardError, AMQPSoftError},
    tcp::RustlsConnector,
};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};

use super::{
    address::Address,
    inbound::{Inbound, ServerProperties},
    silence::Silence,
};
use crate::broker::{BrokerError, settings::BrokerSettings};

/// For name resolution, TCP and TLS together, for each address.
const DIAL_TIMEOUT: Duration = Duration::from_secs(5);
/// For the whole of a connection's set-up, AMQP's part included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// What lapin takes for its runtime: tokio, with our way to connect.
pub(super) type Kit = RuntimeParts<Tokio, Wire>;
type Plain = <Tokio as Reactor>::TcpStream;
type Dialled = Inbound<AsyncTcpStream<Plain>>;

/// Why no connection came about.
#[derive(Clone, Debug)]
pub(super) struct DialError {
    /// The address, without user and password.
    pub(super) address: String,
    /// In words.
    pub(super) reason: String,
    /// Whether waiting will not mend it: wrong password, no such virtual host.
    pub(super) refused: bool,
}

impl From<DialError> for BrokerError {
    fn from(error: DialError) -> Self {
        if error.refused {
            Self::Refused { what: format!("the connection to {}", error.address), reason: error.reason }
        } else {
            Self::Unreachable { address: error.address, reason: error.reason }
        }
    }
}

/// One address, ready to connect to.
pub(super) struct Target {
    pub(super) address: Address,
    host: Arc<Host>,
    properties: ConnectionProperties,
}

impl Target {
    /// The targets that the settings name; reads the certificate files.
    pub(super) fn all(settings: &BrokerSettings, app: &str) -> Result<Vec<Self>, BrokerError> {
        settings.check().map_err(BrokerError::Settings)?;
        let heartbeat = u16::try_from(settings.heartbeat.as_secs()).unwrap_or(u16::MAX);
        let addresses: Vec<_> =
            settings.urls.iter().map(|url| Address::parse(url, heartbeat)).collect::<Result<_, _>>()?;
        let tls = if addresses.iter().any(|address| address.broker.tls) { Some(connector(settings)?) } else { None };
        let properties = ConnectionProperties::default()
            .with_connection_name(app.into())
            .with_client_property("product".into(), "haul".into())
            .with_client_property("version".into(), env!("CARGO_PKG_VERSION").into());
        Ok(addresses
            .into_iter()
            .map(|address| Self {
                host: Arc::new(Host {
                    name: address.broker.host.clone(),
                    port: address.broker.port,
                    patience: address.patience(),
                    tls: tls.clone().filter(|_| address.broker.tls),
                    tokio: Tokio::current(),
                    seen: ServerProperties::default(),
                }),
                address,
                properties: properties.clone(),
            })
            .collect())
    }

    /// A way to this address for one connection at a time.
    pub(super) fn wire(&self) -> Wire {
        Wire { host: Arc::clone(&self.host), ready: Arc::default() }
    }

    /// What we tell the broker of ourselves.
    pub(super) fn properties(&self) -> ConnectionProperties {
        self.properties.clone()
    }

    /// What the broker told of itself when it was last connected to.
    pub(super) fn server(&self) -> &ServerProperties {
        &self.host.seen
    }

    /// A connection of one's own.
    pub(super) async fn connect(&self) -> Result<Connection, DialError> {
        let (uri, wire) = (self.address.for_lapin(), self.wire());
        self.over(&wire, Connection::connect_with_runtime(&uri, self.properties(), wire.runtime())).await
    }

    /// Dials, then lets `connecting` go on over that; puts a deadline on both and words on their failure.
    pub(super) async fn over<C, E: Into<ConnectError>>(
        &self,
        wire: &Wire,
        connecting: impl Future<Output = Result<C, E>>,
    ) -> Result<C, DialError> {
        let dialled = async {
            wire.dial().await.map_err(|error| ConnectError::Other(error.to_string()))?;
            connecting.await.map_err(Into::into)
        };
        let connected = tokio::time::timeout(CONNECT_TIMEOUT, dialled).await;
        // Nobody took it where the pool had a connection.
        drop(wire.take());
        let (reason, refused) = match connected {
            Ok(Ok(connection)) => return Ok(connection),
            Ok(Err(ConnectError::Lapin(error))) => (words(&error), is_refusal(&error)),
            Ok(Err(ConnectError::Other(reason))) => (reason, false),
            Err(_) => ("no answer in time".to_owned(), false),
        };
        Err(DialError { address: self.address.to_string(), reason, refused })
    }
}

/// What may go wrong with a connection, from lapin or from the pool.
pub(super) enum ConnectError {
    Lapin(lapin::Error),
    Other(String),
}

impl From<lapin::Error> for ConnectError {
    fn from(error: lapin::Error) -> Self {
        Self::Lapin(error)
    }
}

impl From<deadpool_lapin::PoolError> for ConnectError {
    fn from(error: deadpool_lapin::PoolError) -> Self {
        match error {
            deadpool_lapin::PoolError::Backend(error) => Self::Lapin(error),
            other => Self::Other(other.to_string()),
        }
    }
}

/// lapin's error in the broker's own words where it has some.
pub(super) fn words(error: &lapin::Error) -> String {
    match error.kind() {
        ErrorKind::ProtocolError(error) => error.get_message().to_string(),
        ErrorKind::IOError(error) => error.to_string(),
        _ => error.to_string(),
    }
}

/// Whether the broker understood and said no, so that asking again is no use.
pub(super) fn is_refusal(error: &lapin::Error) -> bool {
    let ErrorKind::ProtocolError(error) = error.kind() else { return false };
    match error.kind() {
        AMQPErrorKind::Soft(soft) => {
            matches!(soft, AMQPSoftError::ACCESSREFUSED | AMQPSoftError::NOTFOUND | AMQPSoftError::PRECONDITIONFAILED)
        }
        AMQPErrorKind::Hard(hard) => matches!(hard, AMQPHardError::NOTALLOWED | AMQPHardError::NOTIMPLEMENTED),
    }
}

fn connector(settings: &BrokerSettings) -> Result<RustlsConnector, BrokerError> {
    let unreadable = |name: &str, reason: &dyn fmt::Display| {
        BrokerError::Settings(format!("broker.{name} cannot be used: {reason}"))
    };
    let mut roots = RootCertStore::empty();
    if let Some(path) = &settings.ca_file {
        let certificates = CertificateDer::pem_file_iter(path).map_err(|error| unreadable("ca_file", &error))?;
        for certificate in certificates {
            let certificate = certificate.map_err(|error| unreadable("ca_file", &error))?;
            roots.add(certificate).map_err(|error| unreadable("ca_file", &error))?;
        }
        if roots.is_empty() {
            return Err(unreadable("ca_file", &"it has no certificate"));
        }
    } else {
        let found = rustls_native_certs::load_native_certs();
        roots.add_parsable_certificates(found.certs);
        if roots.is_empty() {
            return Err(BrokerError::Settings(
                "this system has no certificate authorities to trust: set broker.ca_file".to_owned(),
            ));
        }
    }
    // The provider is named, not taken from the process: another part may not have installed one yet.
    let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| BrokerError::Settings(error.to_string()))?
        .with_root_certificates(roots);
    let config = match (&settings.cert_file, &settings.key_file) {
        (Some(cert), Some(key)) => {
            let chain: Vec<_> = CertificateDer::pem_file_iter(cert)
                .and_then(Iterator::collect)
                .map_err(|error| unreadable("cert_file", &error))?;
            let key = PrivateKeyDer::from_pem_file(key).map_err(|error| unreadable("key_file", &error))?;
            builder.with_client_auth_cert(chain, key).map_err(|error| unreadable("cert_file", &error))?
        }
        _ => builder.with_no_client_auth(),
    };
    Ok(RustlsConnector::from(config))
}

/// Connects to one host, whatever address lapin thinks it asks for.
#[derive(Clone)]
pub(super) struct Wire {
    host: Arc<Host>,
    /// What was dialled and not asked for yet.
    ready: Arc<Mutex<Option<Dialled>>>,
}

struct Host {
    name: String,
    port: u16,
    patience: Option<Duration>,
    tls: Option<RustlsConnector>,
    tokio: Tokio,
    seen: ServerProperties,
}

impl Wire {
    /// The runtime to give lapin.
    pub(super) fn runtime(&self) -> Runtime<Kit> {
        Runtime::new(RuntimeParts::new(self.host.tokio.clone(), self.clone()))
    }

    /// Has a stream ready for lapin to ask for.
    async fn dial(&self) -> io::Result<()> {
        let stream = self.host.dial_in_time().await?;
        *self.ready.lock().unwrap_or_else(PoisonError::into_inner) = Some(stream);
        Ok(())
    }

    fn take(&self) -> Option<Dialled> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Host {
    async fn dial_in_time(&self) -> io::Result<Dialled> {
        tokio::time::timeout(DIAL_TIMEOUT, self.dial())
            .await
            .unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, "no answer in time")))
    }

    async fn dial(&self) -> io::Result<Dialled> {
        let mut failure = io::Error::new(io::ErrorKind::NotFound, "the host name has no address");
        for address in tokio::net::lookup_host((self.name.as_str(), self.port)).await? {
            match self.tokio.tcp_connect_addr(address).await {
                Ok(stream) => {
                    let silence = Silence::start(CONNECT_TIMEOUT, self.patience);
                    let plain = AsyncTcpStream::Plain(stream);
                    let stream = match &self.tls {
                        Some(connector) => plain.into_rustls(connector, &self.name).await?,
                        None => plain,
                    };
                    return Ok(Inbound::new(stream, self.seen.clone(), silence));
                }
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }
}

impl fmt::Debug for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wire").field("host", &self.host.name).field("port", &self.host.port).finish_non_exhaustive()
    }
}

impl Reactor for Wire {
    type TcpStream = Dialled;
    type Sleep = <Tokio as Reactor>::Sleep;

    fn register<H: io::Read + io::Write + Send + 'static>(
        &self,
        _: H,
    ) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static> {
        Err::<Self::TcpStream, _>(io::Error::from(io::ErrorKind::Unsupported))
    }

    fn sleep(&self, duration: Duration) -> Self::Sleep {
        self.host.tokio.sleep(duration)
    }

    fn interval(&self, duration: Duration) -> impl Stream<Item = Instant> + Send + 'static {
        self.host.tokio.interval(duration)
    }

    fn tcp_connect_addr(&self, _: SocketAddr) -> impl Future<Output = io::Result<Self::TcpStream>> + Send + 'static {
        let wire = self.clone();
        async move {
            match wire.take() {
                Some(stream) => Ok(stream),
                None => wire.host.dial_in_time().await,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use secrecy::SecretString;

    use super::*;

    #[tokio::test]
    async fn attempts_at_a_broker_that_is_away_leave_nothing_behind() {
        // A port that nobody listens on.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let urls = vec![SecretString::from(format!("amqp://127.0.0.1:{port}/"))];
        let targets = Target::all(&BrokerSettings { urls, ..BrokerSettings::default() }, "test").unwrap();
        let alive = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
        let before = alive();
        for _ in 0..20 {
            let error = targets[0].connect().await.expect_err("nobody listens");
            assert!(!error.refused && error.reason.contains("refused"), "{error:?}");
        }
        assert_eq!(alive(), before, "tasks are left behind");
    }
}
