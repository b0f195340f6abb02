//! The door of a storage directory: where another process asks its holder to hand it over.
//!
//! A socket beside the lock, and not a signal to the process that the lock file names: who listens there is the holder
//! and nobody to whom its number was given meanwhile; it may be in another container with the same volume; it says who it
//! is before anything is asked of it; and when one of the two dies the other notices.

use std::{
    fs::{self, File, Permissions},
    io::{self, Error, ErrorKind},
    os::{fd::AsRawFd as _, unix::fs::PermissionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{UnixListener, UnixStream},
};

use super::StorageLock;

/// The socket in the agent's own directory.
const NAME: &str = "agent.sock";
/// The longest message; what is longer is none of ours.
const LONGEST: u64 = 4096;
/// The longest path that fits into the address of a socket.
const LONGEST_PATH: usize = 100;
/// How long the other side may take to say what it has to say at once.
const ANSWER: Duration = Duration::from_secs(5);
/// How long whoever was told who we are may take to prepare.
const PREPARING: Duration = Duration::from_mins(2);

/// Who holds the storage directory; said to everybody who comes to the door.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// The node.
    pub node: String,
    /// Beginning of every name on the broker.
    pub prefix: String,
    /// The process, as it sees itself.
    pub pid: u32,
    /// Its version.
    pub version: String,
    /// Identity of its start.
    pub boot: String,
    /// How long it lets what runs go on, unless told otherwise.
    pub grace_ms: u64,
    /// Whether it takes no tasks.
    pub paused: bool,
}

/// What a visitor asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ask {
    /// The process that asks, as it sees itself.
    pub pid: u32,
    /// Its version.
    pub version: String,
    /// How long what runs may go on; as the holder has it unless said.
    #[serde(default)]
    pub grace_ms: Option<u64>,
}

/// What the holder answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// It leaves, and gives up the lock as its process ends, after this time and a little more at most.
    Leaving {
        /// The time.
        grace_ms: u64,
    },
    /// It stays.
    Refused {
        /// Why.
        reason: String,
    },
}

/// The holder's side of the door.
pub struct Door {
    listener: UnixListener,
    own: u32,
}

impl Door {
    /// Opens the door of the directory whose lock one holds; what an earlier holder left of its door is removed.
    ///
    /// # Errors
    /// When the file system takes no sockets.
    pub fn open(storage: &Path, _lock: &StorageLock) -> io::Result<Self> {
        let (directory, address) = address(storage)?;
        match fs::remove_file(&address) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&address)?;
        fs::set_permissions(&address, Permissions::from_mode(0o600))?;
        drop(directory);
        Ok(Self { listener, own: rustix::process::geteuid().as_raw() })
    }

    /// The next visitor of our own user, or of root.
    ///
    /// # Errors
    /// When nobody can come any more.
    pub async fn next(&self) -> io::Result<Visitor> {
        loop {
            let (stream, _) = self.listener.accept().await?;
            let peer = stream.peer_cred()?;
            if peer.uid() == self.own || peer.uid() == 0 {
                return Ok(Visitor { stream: BufReader::new(stream) });
            }
        }
    }
}

/// Somebody at the door.
pub struct Visitor {
    stream: BufReader<UnixStream>,
}

impl Visitor {
    /// Says who we are and hears what is asked for; nothing where the visitor leaves again.
    ///
    /// # Errors
    /// When the visitor is no process of ours.
    pub async fn ask(&mut self, holder: &Holder) -> io::Result<Option<Ask>> {
        send(&mut self.stream, holder).await?;
        within(PREPARING, receive(&mut self.stream)).await
    }

    /// Answers.
    ///
    /// # Errors
    /// When the visitor is gone.
    pub async fn answer(&mut self, answer: &Answer) -> io::Result<()> {
        send(&mut self.stream, answer).await
    }

    /// Returns when the visitor is gone.
    pub async fn gone(&mut self) {
        let mut rest = [0; 64];
        while matches!(self.stream.read(&mut rest).await, Ok(read) if read > 0) {}
    }
}

/// The visitor's side of the door.
pub struct Visit {
    stream: BufReader<UnixStream>,
    /// Who holds the storage directory.
    pub holder: Holder,
}

impl Visit {
    /// Comes to the door of a storage directory; nothing where nobody listens behind it.
    ///
    /// # Errors
    /// When somebody does, and does not say who they are.
    pub async fn begin(storage: &Path) -> io::Result<Option<Self>> {
        let (_directory, address) = match address(storage) {
            Ok(found) => found,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let stream = match within(ANSWER, UnixStream::connect(&address)).await {
            Ok(stream) => stream,
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let mut stream = BufReader::new(stream);
        match within(ANSWER, receive(&mut stream)).await? {
            Some(holder) => Ok(Some(Self { stream, holder })),
            // It ended in the moment in which we came.
            None => Ok(None),
        }
    }

    /// Asks for the storage directory. The holder lets go only as long as this visit lasts.
    ///
    /// # Errors
    /// When there is no answer.
    pub async fn ask(&mut self, ask: &Ask) -> io::Result<Answer> {
        send(&mut self.stream, ask).await?;
        let answer = within(ANSWER, receive(&mut self.stream)).await?;
        answer.ok_or_else(|| Error::new(ErrorKind::UnexpectedEof, "it went away"))
    }
}

/// The address of the socket, which may be valid only while the directory is kept.
fn address(storage: &Path) -> io::Result<(File, PathBuf)> {
    let path = StorageLock::directory(storage);
    let directory = File::open(&path)?;
    let plain = path.join(NAME);
    if plain.as_os_str().len() <= LONGEST_PATH {
        return Ok((directory, plain));
    }
    let short = PathBuf::from(format!("/proc/self/fd/{}/{NAME}", directory.as_raw_fd()));
    Ok((directory, short))
}

async fn send(stream: &mut BufReader<UnixStream>, message: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    within(ANSWER, stream.get_mut().write_all(&line)).await
}

async fn receive<T: DeserializeOwned>(stream: &mut BufReader<UnixStream>) -> io::Result<Option<T>> {
    let mut line = Vec::new();
    if stream.take(LONGEST).read_until(b'\n', &mut line).await? == 0 {
        return Ok(None);
    }
    Ok(Some(serde_json::from_slice(&line)?))
}

async fn within<T>(time: Duration, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(time, work).await.unwrap_or_else(|_| Err(Error::new(ErrorKind::TimedOut, "no answer in time")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holder() -> Holder {
        Holder {
            node: "n1".to_owned(),
            prefix: "haul".to_owned(),
            pid: 7,
            version: "0.1.0".to_owned(),
            boot: "b".to_owned(),
            grace_ms: 30_000,
            paused: false,
        }
    }

    #[tokio::test]
    async fn who_comes_to_the_door_is_told_who_holds_the_storage_and_asks_for_it() {
        // The path is longer than the address of a socket may be.
        let base = tempfile::tempdir().unwrap();
        let storage = base.path().join("a".repeat(90)).join("b".repeat(90));
        let lock = StorageLock::take(&storage).unwrap();
        assert!(Visit::begin(&storage).await.unwrap().is_none(), "nobody listens yet");
        let door = Door::open(&storage, &lock).unwrap();
        let serve = tokio::spawn(async move {
            let mut visitor = door.next().await.unwrap();
            let ask = visitor.ask(&holder()).await.unwrap().unwrap();
            visitor.answer(&Answer::Leaving { grace_ms: 5 }).await.unwrap();
            visitor.gone().await;
            ask
        });
        let mut visit = Visit::begin(&storage).await.unwrap().unwrap();
        assert_eq!(visit.holder, holder());
        let ask = Ask { pid: 9, version: "0.2.0".to_owned(), grace_ms: Some(5) };
        assert_eq!(visit.ask(&ask).await.unwrap(), Answer::Leaving { grace_ms: 5 });
        drop(visit);
        assert_eq!(serve.await.unwrap(), ask);
        assert!(Visit::begin(&storage).await.unwrap().is_none(), "what is left of a door is no door");
        Door::open(&storage, &lock).unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_holder_that_says_nothing_is_not_waited_for_for_long() {
        let storage = tempfile::tempdir().unwrap();
        let lock = StorageLock::take(storage.path()).unwrap();
        let _door = Door::open(storage.path(), &lock).unwrap();
        assert_eq!(Visit::begin(storage.path()).await.map(drop).unwrap_err().kind(), ErrorKind::TimedOut);
    }
}
