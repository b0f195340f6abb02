//! A slow way between an agent and its broker: bytes pass late, drop by drop, or not for a while.

use std::{sync::Arc, time::Duration};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{mpsc, watch},
    time::Instant,
};

/// How bytes pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pace {
    /// At once.
    Free,
    /// This much later.
    Late(Duration),
    /// So many a second.
    Drops(usize),
    /// Not until the pace is another.
    Held,
}

/// A listener that passes everything on to one address; it ends with its runtime.
pub(crate) struct Wire {
    /// The address to connect to instead.
    pub(crate) url: String,
    pace: Arc<watch::Sender<Pace>>,
}

/// Drops fall so often.
const DROP: Duration = Duration::from_millis(50);

impl Wire {
    /// A way to the broker at `url`.
    pub(crate) async fn start(url: &str) -> std::io::Result<Self> {
        let broker = url.rsplit(['@', '/']).nth(1).unwrap_or_default().to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let own = url.replace(&broker, &listener.local_addr()?.to_string());
        let pace = Arc::new(watch::Sender::new(Pace::Free));
        let given = pace.clone();
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let (broker, pace) = (broker.clone(), given.clone());
                tokio::spawn(async move {
                    if let Ok(far) = TcpStream::connect(&broker).await {
                        pass(near, far, &pace).await;
                    }
                });
            }
        });
        Ok(Self { url: own, pace })
    }

    /// Bytes pass like this from now on.
    pub(crate) fn pace(&self, pace: Pace) {
        self.pace.send_replace(pace);
    }
}

/// Passes bytes both ways until one side is gone.
async fn pass(near: TcpStream, far: TcpStream, pace: &watch::Sender<Pace>) {
    for socket in [&near, &far] {
        let _ = socket.set_nodelay(true);
        // What ends one side ends the other at once.
        let _ = socket.set_zero_linger();
    }
    let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
    tokio::select! {
        () = one_way(near_in, far_out, pace.subscribe()) => {}
        () = one_way(far_in, near_out, pace.subscribe()) => {}
    }
}

async fn one_way(from: OwnedReadHalf, to: OwnedWriteHalf, pace: watch::Receiver<Pace>) {
    let (chunks_in, chunks) = mpsc::channel(64);
    tokio::join!(read(from, chunks_in), write(to, chunks, pace));
}

async fn read(mut from: OwnedReadHalf, chunks: mpsc::Sender<(Instant, Vec<u8>)>) {
    let mut buffer = vec![0; 16 * 1024];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        if chunks.send((Instant::now(), buffer[..length].to_vec())).await.is_err() {
            return;
        }
    }
}

async fn write(
    mut to: OwnedWriteHalf,
    mut chunks: mpsc::Receiver<(Instant, Vec<u8>)>,
    mut pace: watch::Receiver<Pace>,
) {
    while let Some((came, chunk)) = chunks.recv().await {
        let mut rest = &chunk[..];
        while !rest.is_empty() {
            let now = *pace.borrow_and_update();
            let length = match now {
                Pace::Free => rest.len(),
                Pace::Late(by) => {
                    tokio::time::sleep_until(came + by).await;
                    rest.len()
                }
                Pace::Drops(a_second) => {
                    tokio::time::sleep(DROP).await;
                    (a_second * usize::try_from(DROP.as_millis()).unwrap_or(1) / 1000).clamp(1, rest.len())
                }
                Pace::Held => {
                    if pace.changed().await.is_err() {
                        return;
                    }
                    continue;
                }
            };
            if to.write_all(&rest[..length]).await.is_err() {
                return;
            }
            rest = &rest[length..];
        }
    }
}
