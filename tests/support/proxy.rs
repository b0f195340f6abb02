//! Between a client and the broker: passes AMQP frames on, and does to connections what networks and brokers do.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{
        mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
        watch,
    },
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::rabbit::Rabbit;

/// Into how many pieces a second a trickle is cut.
const PIECES: usize = 20;

/// The proxy; it ends with its runtime.
pub(crate) struct Proxy {
    /// The address to connect to instead of the broker's.
    pub(crate) url: String,
    links: Arc<Mutex<Vec<Arc<Link>>>>,
    opened: Arc<AtomicUsize>,
    weather: watch::Sender<Weather>,
}

/// What every byte meets on its way, in both directions.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Weather {
    /// How long each is under way.
    pub(crate) latency: Duration,
    /// How many pass in a second; any number if nothing is said.
    pub(crate) bytes_a_second: Option<usize>,
}

/// One connection through it.
struct Link {
    to_broker: Way,
    to_client: Way,
    reset: CancellationToken,
    consumers: Mutex<Vec<Consuming>>,
}

/// One direction of a connection.
struct Way {
    frames: UnboundedSender<(Instant, Vec<u8>)>,
    held: watch::Sender<bool>,
}

/// A consumer that was opened through a link.
#[derive(Clone)]
struct Consuming {
    channel: u16,
    queue: String,
    tag: String,
}

impl Proxy {
    /// A proxy to a node on a free port.
    pub(crate) async fn start(rabbit: &Rabbit) -> Self {
        let broker = rabbit.address();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = rabbit.url.replace(&broker, &listener.local_addr().unwrap().to_string());
        let proxy = Self { url, links: Arc::default(), opened: Arc::default(), weather: watch::Sender::default() };
        let (links, opened, weather) = (proxy.links.clone(), proxy.opened.clone(), proxy.weather.subscribe());
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let Ok(far) = TcpStream::connect(&broker).await else { continue };
                opened.fetch_add(1, Ordering::SeqCst);
                links.lock().unwrap().push(Link::start(near, far, &weather));
            }
        });
        proxy
    }

    /// How many connections were made through it so far.
    pub(crate) fn opened(&self) -> usize {
        self.opened.load(Ordering::SeqCst)
    }

    /// From now on bytes meet this.
    pub(crate) fn set(&self, weather: Weather) {
        self.weather.send_replace(weather);
    }

    /// Resets every connection that stands, on both sides; new ones are passed on.
    pub(crate) fn reset(&self) {
        for link in self.links.lock().unwrap().drain(..) {
            link.reset.cancel();
        }
    }

    /// Keeps every byte of the connections that stand, until [`Proxy::resume`]; new ones are passed on.
    pub(crate) fn stall(&self) {
        self.stall_towards_the_broker();
        self.stall_towards_the_client();
    }

    /// The same for what goes to the broker; the other direction is passed on.
    pub(crate) fn stall_towards_the_broker(&self) {
        for link in self.links.lock().unwrap().iter() {
            link.to_broker.held.send_replace(true);
        }
    }

    /// The same for what comes from the broker.
    pub(crate) fn stall_towards_the_client(&self) {
        for link in self.links.lock().unwrap().iter() {
            link.to_client.held.send_replace(true);
        }
    }

    /// Passes on what was kept, and goes on.
    pub(crate) fn resume(&self) {
        for link in self.links.lock().unwrap().iter() {
            link.to_broker.held.send_replace(false);
            link.to_client.held.send_replace(false);
        }
    }

    /// Acknowledges, on the channel that consumes `queue`, what was never delivered: the broker closes the channel.
    pub(crate) fn forge_ack(&self, queue: &str) {
        let (link, consuming) = self.consuming(queue);
        let ack = [&[0, 60, 0, 80][..], &u64::from(u32::MAX).to_be_bytes(), &[0]].concat();
        link.to_broker.send(frame(consuming.channel, &ack));
    }

    /// Takes the consumer of `queue` away, as a broker does by itself: it has none any more, and its notice asks for no
    /// answer.
    pub(crate) fn drop_consumer(&self, queue: &str) {
        let (link, consuming) = self.consuming(queue);
        let cancel = [&[0, 60, 0, 30][..], &short(&consuming.tag), &[1]].concat();
        let cancel = frame(consuming.channel, &cancel);
        link.to_broker.send(cancel.clone());
        link.to_client.send(cancel);
    }

    /// Whether a consumer of this queue was opened through a connection that was not reset since.
    pub(crate) fn consumes(&self, queue: &str) -> bool {
        let links = self.links.lock().unwrap();
        links.iter().any(|link| link.consumers.lock().unwrap().iter().any(|consuming| consuming.queue == queue))
    }

    /// The newest consumer of a queue.
    fn consuming(&self, queue: &str) -> (Arc<Link>, Consuming) {
        let links = self.links.lock().unwrap();
        let mut consumers = links.iter().flat_map(|link| {
            let consumers = link.consumers.lock().unwrap().clone();
            consumers.into_iter().map(|consuming| (Arc::clone(link), consuming))
        });
        consumers.rfind(|(_, consuming)| consuming.queue == queue).expect("somebody consumes the queue")
    }
}

impl Way {
    fn new() -> (Self, UnboundedReceiver<(Instant, Vec<u8>)>) {
        let (frames, queue) = unbounded_channel();
        (Self { frames, held: watch::Sender::new(false) }, queue)
    }

    /// A frame sets out; whether there is anybody to take it is seen where it would arrive.
    fn send(&self, frame: Vec<u8>) {
        let _ = self.frames.send((Instant::now(), frame));
    }

    /// Waits while nothing passes; a stalled way does not even pass on that one side is gone.
    async fn open(&self) {
        let _ = self.held.subscribe().wait_for(|held| !held).await;
    }

    /// Lets frames arrive, as the weather has it.
    async fn write(
        &self,
        mut to: OwnedWriteHalf,
        mut frames: UnboundedReceiver<(Instant, Vec<u8>)>,
        weather: watch::Receiver<Weather>,
    ) {
        while let Some((begun, frame)) = frames.recv().await {
            let Weather { latency, bytes_a_second } = *weather.borrow();
            tokio::time::sleep_until(begun + latency).await;
            let pieces = bytes_a_second.map_or(frame.len(), |rate| (rate / PIECES).max(1));
            for piece in frame.chunks(pieces) {
                self.open().await;
                if to.write_all(piece).await.is_err() {
                    return;
                }
                if bytes_a_second.is_some() {
                    tokio::time::sleep(Duration::from_secs(1) / u32::try_from(PIECES).unwrap()).await;
                }
            }
        }
    }
}

impl Link {
    fn start(near: TcpStream, far: TcpStream, weather: &watch::Receiver<Weather>) -> Arc<Self> {
        for socket in [&near, &far] {
            // Closing is then a reset; in order, peers say goodbye before they close.
            socket.set_zero_linger().unwrap();
            socket.set_nodelay(true).unwrap();
        }
        let ((to_broker, for_broker), (to_client, for_client)) = (Way::new(), Way::new());
        let reset = CancellationToken::new();
        let link = Arc::new(Self { to_broker, to_client, reset, consumers: Mutex::default() });
        let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
        let (passing, passed) = (Arc::clone(&link), link.reset.clone());
        let (there, back) = (weather.clone(), weather.clone());
        tokio::spawn(async move {
            let both = async {
                tokio::select! {
                    () = passing.read_client(near_in) => {}
                    () = passing.read_broker(far_in) => {}
                    () = passing.to_broker.write(far_out, for_broker, there) => {}
                    () = passing.to_client.write(near_out, for_client, back) => {}
                }
            };
            passed.run_until_cancelled(both).await;
        });
        link
    }

    async fn read_client(&self, mut from: OwnedReadHalf) {
        let mut greeting = vec![0; 8];
        if from.read_exact(&mut greeting).await.is_err() {
            return;
        }
        self.to_broker.send(greeting);
        while let Some(frame) = read_frame(&mut from).await {
            self.consumers.lock().unwrap().extend(consuming(&frame));
            self.to_broker.send(frame);
        }
        self.to_broker.open().await;
    }

    async fn read_broker(&self, mut from: OwnedReadHalf) {
        while let Some(frame) = read_frame(&mut from).await {
            self.to_client.send(frame);
        }
        self.to_client.open().await;
    }
}

async fn read_frame(from: &mut OwnedReadHalf) -> Option<Vec<u8>> {
    let mut bytes = vec![0; 7];
    from.read_exact(&mut bytes).await.ok()?;
    let size = u32::from_be_bytes([bytes[3], bytes[4], bytes[5], bytes[6]]);
    bytes.resize(bytes.len() + usize::try_from(size).unwrap() + 1, 0);
    from.read_exact(&mut bytes[7..]).await.ok()?;
    Some(bytes)
}

/// The consumer that a frame opens, if it is a `basic.consume`.
fn consuming(frame: &[u8]) -> Option<Consuming> {
    let (head, payload) = frame.split_at_checked(7)?;
    let rest = payload.strip_prefix(&[0, 60, 0, 20, 0, 0]).filter(|_| head[0] == 1)?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (length, rest) = rest.split_first()?;
    let (queue, rest) = rest.split_at_checked(usize::from(*length))?;
    let (length, rest) = rest.split_first()?;
    let (tag, _) = rest.split_at_checked(usize::from(*length))?;
    Some(Consuming { channel: u16::from_be_bytes([head[1], head[2]]), queue: text(queue), tag: text(tag) })
}

fn frame(channel: u16, method: &[u8]) -> Vec<u8> {
    let size = u32::try_from(method.len()).unwrap().to_be_bytes();
    [&[1][..], &channel.to_be_bytes(), &size, method, &[0xce]].concat()
}

fn short(text: &str) -> Vec<u8> {
    [&[u8::try_from(text.len()).unwrap()][..], text.as_bytes()].concat()
}
