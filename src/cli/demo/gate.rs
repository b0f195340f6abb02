//! A server before the upstream that is in trouble until it is mended.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};
use url::Url;

/// What a server in trouble says.
const UNAVAILABLE: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";

/// Answers every request with 503 until it is mended, and passes connections on from then on; ends when dropped.
pub(super) struct Gate {
    address: SocketAddr,
    mended: Arc<AtomicBool>,
    serving: JoinHandle<()>,
}

impl Gate {
    /// A gate on this machine before the server at `target`.
    pub(super) async fn open(target: String) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let mended = Arc::new(AtomicBool::new(false));
        let passing = mended.clone();
        let serving = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (passing, target) = (passing.load(Ordering::Relaxed), target.clone());
                // A broken connection is its client's to notice.
                tokio::spawn(async move { if passing { pass(client, &target).await } else { refuse(client).await } });
            }
        });
        Ok(Self { address, mended, serving })
    }

    /// The same place on the server behind, by way of this gate.
    pub(super) fn before(&self, upstream: &Url) -> String {
        format!("http://{}{}", self.address, upstream.path())
    }

    /// Lets everything pass from now on.
    pub(super) fn mend(&self) {
        self.mended.store(true, Ordering::Relaxed);
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

async fn pass(mut client: TcpStream, target: &str) -> io::Result<()> {
    let mut server = TcpStream::connect(target).await?;
    copy_bidirectional(&mut client, &mut server).await.map(|_| ())
}

async fn refuse(mut client: TcpStream) -> io::Result<()> {
    // The request is read first: closing with unread data would reset the connection before the answer arrives.
    let mut request = [0; 8192];
    let _ = client.read(&mut request).await?;
    client.write_all(UNAVAILABLE).await?;
    client.shutdown().await
}
