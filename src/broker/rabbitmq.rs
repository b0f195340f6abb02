//! RabbitMQ through lapin.
//!
//! Two connections: one publishes (it comes from a pool), one consumes and acks, since a broker in a memory alarm stops
//! reading from connections that publish, acks included. Both are kept by a [`link::Link`]; lanes and sessions live
//! on their channels.

mod acks;
mod address;
mod admin;
mod browse;
mod convert;
mod declare;
mod dial;
mod inbound;
mod lane;
mod link;
mod looks;
mod news;
mod request;
mod session;
mod silence;
mod waits;

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    sync::{Arc, OnceLock, atomic::AtomicUsize},
    time::Duration,
};

use async_trait::async_trait;
use tokio::sync::{mpsc, oneshot, watch};

pub use self::admin::{Admin, Poured, exists_otherwise};
use self::{
    dial::{Target, Wire},
    lane::Lane,
    link::{Line, Link, Source, State},
    looks::Looks,
    request::Request,
    session::Sessions,
};
use super::{
    Broker, BrokerError, Browse, Consume, Consumer, Depth, Health, Inbox, Outgoing, Presence, PublishError, Stop,
    Topology, View, management::Management, settings::BrokerSettings,
};
use crate::protocol::wire::{HeaderValue, Headers};

/// Channels to publish on. One confirms thousands of messages a second; more of them keep one slow queue, whose
/// confirms are late, from filling everybody's window.
const LANES: usize = 4;
/// Requests that wait for a lane's window.
const LANE_QUEUE: usize = 1024;
/// For the broker's answer to a question.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);
/// For the broker's answer to a look, which is repeated anyway.
const LOOK_TIMEOUT: Duration = Duration::from_secs(5);

/// A broker reached over AMQP 0-9-1. Connects when first used.
pub struct RabbitMq {
    targets: Arc<Vec<Target>>,
    /// The address that both connections begin with.
    first: Arc<AtomicUsize>,
    confirm_timeout: Duration,
    publisher: OnceLock<Publisher>,
    consuming: OnceLock<Link>,
    looks: Looks,
    health: watch::Sender<Health>,
}

/// What a broker says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct About {
    /// Its product name, `RabbitMQ`.
    pub product: Option<String>,
    /// Its version, e.g. `3.10.8`.
    pub version: Option<String>,
    /// The name of its cluster.
    pub cluster: Option<String>,
    /// Everything it said.
    pub properties: Headers,
    /// The address that answered, without user and password.
    pub address: String,
}

struct Publisher {
    link: Link,
    lanes: Vec<mpsc::Sender<Request>>,
    /// For copies to dead-letter and retry exchanges: a publish to a missing exchange closes its channel.
    copies: mpsc::Sender<Request>,
}

impl RabbitMq {
    /// Checks the settings and reads the certificates; `app` names the connections in the broker's console.
    ///
    /// Nothing is connected yet, so a broker that is down is no error here: consumers and publishes wait for it.
    /// [`RabbitMq::about`] tells at once whether it can be reached.
    ///
    /// # Errors
    /// When the settings cannot be used.
    #[expect(clippy::unused_async, reason = "it needs a running runtime, which a caller's await proves")]
    pub async fn connect(settings: &BrokerSettings, app: &str) -> Result<Self, BrokerError> {
        let management = settings.management_url.is_some().then(|| Management::new(settings)).transpose()?;
        Ok(Self {
            looks: Looks::new(management),
            targets: Arc::new(Target::all(settings, app)?),
            first: Arc::default(),
            confirm_timeout: settings.confirm_timeout,
            publisher: OnceLock::new(),
            consuming: OnceLock::new(),
            health: watch::Sender::new(Health::Down),
        })
    }

    /// What the broker says of itself, asked on a connection of its own.
    ///
    /// # Errors
    /// When no address can be reached, or the broker refuses us.
    pub async fn about(&self) -> Result<About, BrokerError> {
        let (target, connection) = self.connection().await?;
        let _ = connection.close(200, "asked".into()).await;
        let properties = target.server().get();
        let text = |name: &str| properties.get(name).and_then(HeaderValue::as_text).map(str::to_owned);
        Ok(About {
            product: text("product"),
            version: text("version"),
            cluster: text("cluster_name"),
            address: target.address.to_string(),
            properties,
        })
    }

    /// The broker's version; `None` if it does not say.
    ///
    /// # Errors
    /// See [`RabbitMq::about`].
    pub async fn server_version(&self) -> Result<Option<String>, BrokerError> {
        Ok(self.about().await?.version)
    }

    /// A connection of one's own to the first address that answers.
    async fn connection(&self) -> Result<(&Target, lapin::Connection), BrokerError> {
        let mut failure = None;
        for target in self.targets.iter() {
            match target.connect().await {
                Ok(connection) => return Ok((target, connection)),
                Err(error) if failure.is_none() || error.refused => failure = Some(error),
                Err(_) => {}
            }
        }
        Err(failure.map_or_else(|| BrokerError::Settings("broker.urls is empty".to_owned()), BrokerError::from))
    }

    /// A connection of its own for changes of the topology.
    ///
    /// # Errors
    /// See [`RabbitMq::about`].
    pub async fn admin(&self) -> Result<Admin, BrokerError> {
        Ok(Admin::new(self.connection().await?.1))
    }

    fn publisher(&self) -> &Publisher {
        self.publisher.get_or_init(|| {
            let pools = self.targets.iter().map(pool).collect();
            let link = self.link(Source::Pools(pools), self.health.clone());
            let lane = || {
                let (requests, queue) = mpsc::channel(LANE_QUEUE);
                tokio::spawn(Lane::new(queue, link.state()).run());
                requests
            };
            let lanes = (0..LANES).map(|_| lane()).collect();
            let copies = lane();
            Publisher { link, lanes, copies }
        })
    }

    fn consuming(&self) -> &Link {
        self.consuming.get_or_init(|| {
            let health = watch::Sender::new(Health::Down);
            self.link(Source::Own, health)
        })
    }

    fn link(&self, source: Source, health: watch::Sender<Health>) -> Link {
        Link::start(Arc::clone(&self.targets), Arc::clone(&self.first), source, health)
    }

    /// Gives up a publishing connection on which nothing at all was confirmed for as long as a publish may take.
    fn doubt(&self, state: &State) {
        if let State::Up(line) = state
            && line.unconfirming() >= self.confirm_timeout
        {
            line.give_up(&format!("it confirmed nothing for {:?}", self.confirm_timeout));
        }
    }

    /// Asks the broker something on the publishing connection, within a time.
    async fn ask<T>(&self, asking: impl AsyncFnOnce(&Line) -> Result<T, BrokerError>) -> Result<T, BrokerError> {
        let line = self.publisher().link.now().await?;
        tokio::time::timeout(ANSWER_TIMEOUT, asking(&line)).await.unwrap_or_else(|_| {
            // In an alarm it does not even read the question.
            if !line.blocked() {
                line.give_up(&format!("it answered no question for {ANSWER_TIMEOUT:?}"));
            }
            Err(self.silent())
        })
    }

    fn silent(&self) -> BrokerError {
        let address = self.targets[0].address.to_string();
        BrokerError::Unreachable { address, reason: "no answer in time".to_owned() }
    }
}

/// A pool of one publishing connection to an address.
fn pool(target: &Target) -> (deadpool_lapin::Pool, Wire) {
    let (uri, properties, wire) = (target.address.for_lapin(), target.properties(), target.wire());
    let manager = deadpool_lapin::Manager::new(uri, move || properties.clone(), wire.runtime());
    let pool = deadpool_lapin::Pool::builder(manager)
        // One more than is used: the last one may still be held for the moment in which it is found broken.
        .max_size(2)
        .build()
        .expect("a pool without timeouts of its own needs no runtime");
    (pool, wire)
}

impl Publisher {
    fn lane(&self, outgoing: &Outgoing) -> &mpsc::Sender<Request> {
        let mut words = outgoing.exchange.rsplit('.');
        if words.next() == Some("dlx") || words.next() == Some("retry") {
            return &self.copies;
        }
        let mut hasher = DefaultHasher::new();
        (&outgoing.message.message_id, &outgoing.routing_key).hash(&mut hasher);
        let lane = usize::try_from(hasher.finish() % LANES as u64).unwrap_or(0);
        &self.lanes[lane]
    }
}

#[async_trait]
impl Broker for RabbitMq {
    async fn publish(&self, outgoing: Outgoing) -> Result<(), PublishError> {
        let publisher = self.publisher();
        let state = publisher.link.state();
        let (reply, answer) = oneshot::channel();
        let asking = async {
            publisher.lane(&outgoing).send(Request { outgoing, reply }).await.ok()?;
            answer.await.ok()
        };
        match tokio::time::timeout(self.confirm_timeout, asking).await {
            Ok(Some(answer)) => {
                if matches!(answer, Err(PublishError::Refused { .. })) {
                    self.doubt(&state.borrow());
                }
                answer
            }
            Ok(None) => Err(PublishError::Unconfirmed { reason: "the connection was closed".to_owned() }),
            Err(_) => {
                let reason = match &*state.borrow() {
                    State::Failed(error) => format!("cannot reach {}: {}", error.address, error.reason),
                    State::Up(line) if line.blocked() => "it has an alarm and takes no messages".to_owned(),
                    state => {
                        self.doubt(state);
                        format!("no answer within {:?}", self.confirm_timeout)
                    }
                };
                Err(PublishError::Unconfirmed { reason })
            }
        }
    }

    async fn consume(&self, consume: Consume) -> Result<Consumer, BrokerError> {
        let (inbox, presence) = (Arc::new(Inbox::default()), Arc::new(Presence::default()));
        let (stop, stopped) = watch::channel(Stop::No);
        let (health_out, health) = watch::channel(Health::Down);
        let (first, opened) = oneshot::channel();
        let sessions = Sessions {
            consume,
            link: self.consuming().state(),
            inbox: Arc::clone(&inbox),
            presence: Arc::clone(&presence),
            stop: stopped,
            health: health_out,
        };
        tokio::spawn(sessions.run(first));
        let consumer = Consumer::new(inbox, presence, stop, health);
        match opened.await {
            Ok(Ok(())) => Ok(consumer),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(BrokerError::Unreachable {
                address: self.targets[0].address.to_string(),
                reason: "the connection was closed".to_owned(),
            }),
        }
    }

    fn server_version(&self) -> Option<String> {
        let told =
            |target: &Target| target.server().get().get("version").and_then(HeaderValue::as_text).map(str::to_owned);
        self.targets.iter().find_map(told)
    }

    async fn browse(&self, queue: &str) -> Result<Box<dyn Browse>, BrokerError> {
        let (_, connection) = self.connection().await?;
        Ok(Box::new(browse::Reader::open(connection, queue).await?))
    }

    async fn declare(&self, topology: &Topology) -> Result<(), BrokerError> {
        self.ask(async |line| {
            let channel = line.channel().await.map_err(|error| declare::refused("a channel", &error))?;
            match declare::declare(&channel, topology).await {
                // A classic queue is on one node only. Whoever consumes it tries again; nobody else may wait for that.
                Err((what, error)) if declare::is_away(&what, &error) => {
                    tracing::warn!(error = dial::words(&error), "a queue cannot be used for now");
                    Ok(())
                }
                declared => declared.map_err(|(what, error)| declare::refused(&what, &error)),
            }
        })
        .await
    }

    async fn missing(&self, topology: &Topology) -> Result<Vec<String>, BrokerError> {
        self.ask(async |line| declare::missing(line, topology).await).await
    }

    async fn depth(&self, queue: &str) -> Result<Option<Depth>, BrokerError> {
        self.ask(async |line| declare::depth(line, queue).await).await
    }

    async fn look(&self, queue: &str, closely: bool) -> Result<Option<View>, BrokerError> {
        let looking = async {
            let line = self.consuming().now().await?;
            self.looks.depth(&line, queue).await
        };
        let seen = tokio::time::timeout(LOOK_TIMEOUT, looking).await.unwrap_or_else(|_| Err(self.silent()))?;
        let Some(depth) = seen else { return Ok(None) };
        let consumers = if closely { self.looks.consumers(queue).await } else { None };
        Ok(Some(View { depth, consumers }))
    }

    fn health(&self) -> watch::Receiver<Health> {
        self.publisher().link.health()
    }

    async fn close(&self) {
        let consuming = async {
            if let Some(link) = self.consuming.get() {
                link.close().await;
            }
        };
        let publishing = async {
            if let Some(publisher) = self.publisher.get() {
                publisher.link.close().await;
            }
        };
        tokio::join!(consuming, publishing);
    }
}
