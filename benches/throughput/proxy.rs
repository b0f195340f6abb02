//! Between an agent and the broker, so that its connections can be lost or go silent while others stand.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicU64, Ordering},
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
};

/// What happens to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Passing,
    /// Nothing passes any more, and nobody is told.
    Silent,
    /// Both sides are reset.
    Reset,
}

/// The proxy; it ends with its runtime.
pub(crate) struct Proxy {
    /// The address to connect to instead of the broker's.
    pub(crate) url: String,
    links: Arc<Mutex<Vec<watch::Sender<Fate>>>>,
    accepted: Arc<AtomicU64>,
}

impl Proxy {
    pub(crate) async fn start(url: &str) -> Self {
        let broker = url.rsplit(['@', '/']).nth(1).expect("the address has a host").to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let near = listener.local_addr().expect("it is bound").to_string();
        let proxy = Self { url: url.replace(&broker, &near), links: Arc::default(), accepted: Arc::default() };
        let (links, accepted) = (proxy.links.clone(), proxy.accepted.clone());
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let Ok(far) = TcpStream::connect(&broker).await else { continue };
                accepted.fetch_add(1, Ordering::Relaxed);
                links.lock().expect("nobody panicked").push(link(near, far));
            }
        });
        proxy
    }

    /// Connections made through it so far.
    pub(crate) fn accepted(&self) -> u64 {
        self.accepted.load(Ordering::Relaxed)
    }

    /// Resets every connection that stands.
    pub(crate) fn reset(&self) {
        self.fate(Fate::Reset);
    }

    /// Lets nothing pass any more on those that stand.
    pub(crate) fn silence(&self) {
        self.fate(Fate::Silent);
    }

    fn fate(&self, fate: Fate) {
        for link in self.links.lock().expect("nobody panicked").drain(..) {
            if fate == Fate::Silent {
                link.send_replace(fate);
                // It must not end with its sender.
                std::mem::forget(link);
            } else {
                link.send_replace(fate);
            }
        }
    }
}

fn link(near: TcpStream, far: TcpStream) -> watch::Sender<Fate> {
    for socket in [&near, &far] {
        let _ = socket.set_nodelay(true);
        // Closing is then a reset; in order, peers say goodbye before they close.
        let _ = socket.set_zero_linger();
    }
    let (tell, fate) = watch::channel(Fate::Passing);
    let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
    tokio::spawn(async move {
        tokio::select! {
            () = pass(near_in, far_out, fate.clone()) => {}
            () = pass(far_in, near_out, fate) => {}
        }
    });
    tell
}

async fn pass(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut fate: watch::Receiver<Fate>) {
    let mut bytes = vec![0; 64 * 1024];
    loop {
        let count = tokio::select! {
            read = from.read(&mut bytes) => match read {
                Ok(count) if count > 0 => count,
                _ => return,
            },
            changed = fate.changed() => match changed.map(|()| *fate.borrow_and_update()) {
                Ok(Fate::Passing) => continue,
                Ok(Fate::Silent) => return std::future::pending().await,
                Ok(Fate::Reset) | Err(_) => return,
            },
        };
        if to.write_all(&bytes[..count]).await.is_err() {
            return;
        }
    }
}
