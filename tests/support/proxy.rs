//! Between a client and the broker: passes AMQP frames on, and does to connections what networks and brokers do.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, Ordering},
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
};
use tokio_util::sync::CancellationToken;

use super::rabbit::Rabbit;

/// The proxy; it ends with its runtime.
pub(crate) struct Proxy {
    /// The address to connect to instead of the broker's.
    pub(crate) url: String,
    links: Arc<Mutex<Vec<Arc<Link>>>>,
}

/// One connection through it.
struct Link {
    stalled: AtomicBool,
    reset: CancellationToken,
    to_broker: UnboundedSender<Vec<u8>>,
    to_client: UnboundedSender<Vec<u8>>,
    consumers: Mutex<Vec<Consuming>>,
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
        let broker = rabbit.url.rsplit(['@', '/']).nth(1).unwrap().to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = rabbit.url.replace(&broker, &listener.local_addr().unwrap().to_string());
        let links = Arc::new(Mutex::new(Vec::new()));
        let proxy = Self { url, links: Arc::clone(&links) };
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let Ok(far) = TcpStream::connect(&broker).await else { continue };
                links.lock().unwrap().push(Link::start(near, far));
            }
        });
        proxy
    }

    /// Resets every connection that stands, on both sides; new ones are passed on.
    pub(crate) fn reset(&self) {
        for link in self.links.lock().unwrap().drain(..) {
            link.reset.cancel();
        }
    }

    /// Keeps every byte of the connections that stand, for ever; new ones are passed on.
    pub(crate) fn stall(&self) {
        for link in self.links.lock().unwrap().iter() {
            link.stalled.store(true, Ordering::SeqCst);
        }
    }

    /// Acknowledges, on the channel that consumes `queue`, what was never delivered: the broker closes the channel.
    pub(crate) fn forge_ack(&self, queue: &str) {
        let (link, consuming) = self.consuming(queue);
        let ack = [&[0, 60, 0, 80][..], &u64::from(u32::MAX).to_be_bytes(), &[0]].concat();
        link.to_broker.send(frame(consuming.channel, &ack)).unwrap();
    }

    /// Takes the consumer of `queue` away, as a broker does by itself: it has none any more, and its notice asks for no
    /// answer.
    pub(crate) fn drop_consumer(&self, queue: &str) {
        let (link, consuming) = self.consuming(queue);
        let cancel = [&[0, 60, 0, 30][..], &short(&consuming.tag), &[1]].concat();
        let cancel = frame(consuming.channel, &cancel);
        link.to_broker.send(cancel.clone()).unwrap();
        link.to_client.send(cancel).unwrap();
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

impl Link {
    fn start(near: TcpStream, far: TcpStream) -> Arc<Self> {
        // Closing is then a reset; in order, peers say goodbye before they close.
        for socket in [&near, &far] {
            socket.set_zero_linger().unwrap();
        }
        let (to_broker, for_broker) = unbounded_channel();
        let (to_client, for_client) = unbounded_channel();
        let link = Arc::new(Self {
            stalled: AtomicBool::new(false),
            reset: CancellationToken::new(),
            to_broker,
            to_client,
            consumers: Mutex::default(),
        });
        let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
        let (passing, passed) = (Arc::clone(&link), link.reset.clone());
        tokio::spawn(async move {
            let both = async {
                tokio::select! {
                    () = passing.read_client(near_in) => {}
                    () = passing.read_broker(far_in) => {}
                    () = passing.write(far_out, for_broker) => {}
                    () = passing.write(near_out, for_client) => {}
                }
            };
            passed.run_until_cancelled(both).await;
        });
        link
    }

    async fn read_client(&self, mut from: OwnedReadHalf) {
        let mut greeting = vec![0; 8];
        if from.read_exact(&mut greeting).await.is_err() || self.to_broker.send(greeting).is_err() {
            return;
        }
        while let Some(frame) = read_frame(&mut from).await {
            self.consumers.lock().unwrap().extend(consuming(&frame));
            if self.to_broker.send(frame).is_err() {
                return;
            }
        }
        self.quiet_while_stalled().await;
    }

    async fn read_broker(&self, mut from: OwnedReadHalf) {
        while let Some(frame) = read_frame(&mut from).await {
            if self.to_client.send(frame).is_err() {
                return;
            }
        }
        self.quiet_while_stalled().await;
    }

    async fn write(&self, mut to: OwnedWriteHalf, mut frames: UnboundedReceiver<Vec<u8>>) {
        while let Some(frame) = frames.recv().await {
            self.quiet_while_stalled().await;
            if to.write_all(&frame).await.is_err() {
                return;
            }
        }
    }

    /// A stalled link does not even pass on that one side is gone.
    async fn quiet_while_stalled(&self) {
        if self.stalled.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
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
