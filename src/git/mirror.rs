//! Mirrors: the agent's own bare copies of upstreams, and the only place the network writes to.

mod lfs;
mod upkeep;

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Write as _,
    fs::{File, OpenOptions},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, Weak},
    time::{Duration, SystemTime},
};

use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{
    Run,
    child::{self, Children},
    credential::CredentialFile,
    hosts::Hosts,
    policy::Policy,
    room::blamed,
    settings::GitSettings,
    transfer,
};
use crate::{
    failure::Failure,
    protocol::{CredentialName, GitUrl, HostState, Progress, Scheme},
};

/// How often a lock that somebody holds is tried again.
const LOCK_POLL: Duration = Duration::from_millis(50);

pub(super) use self::upkeep::sweep;

/// What a fetch is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Want {
    /// Every branch and tag, as `git clone` has them.
    All,
    /// One branch, by its short name, and the tags that point into it.
    Branch(String),
    /// Every branch and tag, and this object must be there.
    Commit(String),
}

/// Where the objects came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// A pack was received.
    Upstream,
    /// Nothing had to be fetched.
    Mirror,
}

impl Source {
    /// The word of the wire contract.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Upstream => "upstream",
            Self::Mirror => "mirror",
        }
    }
}

/// The refs of an upstream, as it listed them to this task's own credential.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listing {
    /// What its `HEAD` points to: the full name of a ref, also of one that does not exist yet.
    pub head: Option<String>,
    /// `refs/heads/*` and `refs/tags/*` to object ids in hex; for an annotated tag that of the tag.
    pub refs: BTreeMap<String, String>,
    /// For annotated tags: what they point to in the end.
    pub peeled: BTreeMap<String, String>,
}

/// A mirror that holds what was asked for; nothing is taken out of it while this value lives.
#[derive(Debug)]
pub struct Fetched {
    /// The bare repository.
    pub path: PathBuf,
    /// What the upstream listed; every object named in it is in the mirror.
    pub listing: Listing,
    /// Objects received.
    pub objects: u64,
    /// Bytes of pack received.
    pub received_bytes: u64,
    /// Whether anything had to be received.
    pub source: Source,
    /// The shared lock; whoever removes packs takes the exclusive one.
    _lock: File,
}

/// The mirrors of one storage directory.
pub struct Mirrors {
    directory: PathBuf,
    settings: GitSettings,
    policy: Policy,
    children: Children,
    hosts: Hosts,
    /// How many bytes of the disk are to stay free.
    reserve: u64,
    /// One transfer at a time into each mirror.
    flights: Mutex<HashMap<String, Weak<Flight>>>,
}

type Flight = tokio::sync::Mutex<()>;

impl Mirrors {
    /// Opens `<storage>/.haul/mirrors` and sweeps what killed transfers left.
    ///
    /// # Errors
    /// When the directory cannot be made or read.
    pub async fn open(storage: &Path, settings: &GitSettings, children: Children) -> Result<Self, Failure> {
        let directory = storage.join(".haul").join("mirrors");
        let swept = directory.clone();
        tokio::task::spawn_blocking(move || upkeep::sweep_all(&swept))
            .await
            .map_err(|error| Failure::internal(format!("sweeping the mirrors failed: {error}")))??;
        Ok(Self {
            directory,
            settings: settings.clone(),
            policy: Policy::from(settings),
            children,
            hosts: Hosts::new(settings),
            reserve: 0,
            flights: Mutex::default(),
        })
    }

    /// The same, and no transfer goes on where fewer bytes than `reserve` are free.
    #[must_use]
    pub fn keeping_free(mut self, reserve: u64) -> Self {
        self.reserve = reserve;
        self
    }

    /// What can be said about an address without asking anybody: scheme, host patterns, literal addresses.
    ///
    /// # Errors
    /// `forbidden`, with the setting that would allow it.
    pub fn allow(&self, url: &GitUrl) -> Result<(), Failure> {
        self.policy.allow(url)
    }

    /// Brings the mirror of `url` up to what `want` needs.
    ///
    /// The upstream is asked for its refs each time, with this task's own credential; a pack is asked for only if
    /// the mirror lacks something. Of several fetches into one mirror one works, the others wait and then ask for
    /// themselves.
    ///
    /// # Errors
    /// A failure that carries its decision.
    pub async fn fetch(
        &self,
        url: &GitUrl,
        credential: Option<&CredentialName>,
        want: &Want,
        run: &Run<'_>,
    ) -> Result<Fetched, Failure> {
        self.allow(url)?;
        let file = match credential.filter(|_| url.scheme() != Scheme::File) {
            Some(name) => Some(CredentialFile::find(self.settings.credentials_path.as_deref(), name, url)?),
            None => None,
        };
        let key = key(url.as_str(), credential.map(CredentialName::as_str));
        let path = self.directory.join(format!("{key}.git"));
        let flight = self.flight(&key);
        let _turn = child::within(run, None, flight.lock()).await?;
        let lock_path = self.directory.join(format!("{key}.lock"));
        let lock = lock_shared(lock_path.clone(), run).await?;
        make_directory(&path)?;
        let of_host = self.settings.of_host(url.host());
        let request = transfer::Request {
            url: url.as_str().to_owned(),
            mirror: path.clone(),
            want: want.clone(),
            credential: file,
            policy: self.policy.clone(),
            ca_file: of_host.ca_file,
            proxy: of_host.proxy,
            known_hosts: self.settings.known_hosts.clone(),
            max_bytes: self.settings.max_bytes.as_u64(),
            reserve: self.reserve,
            engine: self.settings.transport,
        };
        let answer = self.transfer(url, request, run).await;
        // Goes only if it is empty.
        if answer.is_err() && std::fs::remove_dir(&path).is_ok() {
            // Nothing came of it, so there is nothing to lock, and we still have the turn: a thousand refused
            // addresses leave no thousand files.
            let _ = std::fs::remove_file(&lock_path);
        }
        let answer = answer?;
        Ok(Fetched {
            path,
            listing: answer.listing,
            objects: answer.objects,
            received_bytes: answer.received_bytes,
            source: answer.source,
            _lock: lock,
        })
    }

    /// How the hosts are that have transfers or are left alone.
    #[must_use]
    pub fn hosts(&self) -> Vec<HostState> {
        self.hosts.states()
    }

    /// One transfer, with a place at its host.
    async fn transfer(
        &self,
        url: &GitUrl,
        request: transfer::Request,
        run: &Run<'_>,
    ) -> Result<transfer::Answer, Failure> {
        let pass = self.hosts.enter(url, run).await?;
        let progress = |progress: Progress| {
            pass.watch(&progress);
            (run.progress)(progress);
        };
        let watched = Run { cancel: run.cancel.clone(), progress: &progress, ..*run };
        let answer = transfer::run(&self.children, request, self.settings.transport_fallback, &watched).await;
        pass.settle(answer)
    }

    /// The lock of one mirror within this process.
    fn flight(&self, key: &str) -> Arc<Flight> {
        let mut flights = self.flights.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(flight) = flights.get(key).and_then(Weak::upgrade) {
            return flight;
        }
        flights.retain(|_, flight| flight.strong_count() > 0);
        let flight = Arc::new(Flight::new(()));
        flights.insert(key.to_owned(), Arc::downgrade(&flight));
        flight
    }
}

/// The name of a mirror: its upstream and the credential it is read with. What one credential may see is never
/// served to another.
pub(super) fn key(url: &str, credential: Option<&str>) -> String {
    let mut hash = Sha256::new();
    hash.update(url);
    hash.update([0]);
    hash.update(credential.unwrap_or_default());
    hash.finalize().iter().fold(String::with_capacity(64), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Makes the directory of a mirror: the child that fills it can write nothing beside it.
fn make_directory(path: &Path) -> std::io::Result<()> {
    match std::fs::DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

/// Takes the shared lock at `path`, which waits only for the upkeep of the mirror.
async fn lock_shared(path: PathBuf, run: &Run<'_>) -> Result<File, Failure> {
    let place = path.parent().map(Path::to_owned).unwrap_or_default();
    let opened = tokio::task::spawn_blocking(move || -> std::io::Result<File> {
        let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path)?;
        // Tells when the mirror was last used.
        file.set_modified(SystemTime::now()).map(|()| file)
    })
    .await
    .map_err(|error| Failure::internal(error.to_string()))?;
    let file = opened.map_err(|error| blamed(error.into(), &[&place]))?;
    let taken = async {
        loop {
            match flock(&file, FlockOperation::NonBlockingLockShared) {
                Err(Errno::WOULDBLOCK | Errno::INTR) => tokio::time::sleep(LOCK_POLL).await,
                other => return other.map_err(std::io::Error::from),
            }
        }
    };
    child::within(run, None, taken).await??;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mirror_belongs_to_one_upstream_and_one_credential() {
        let key = |url, credential| key(GitUrl::parse(url).unwrap().as_str(), credential);
        let a = key("https://h.example/x", None);
        assert_eq!(a.len(), 64);
        assert_eq!(a, key("https://H.example/x", None));
        assert_ne!(a, key("https://h.example/y", None));
        assert_ne!(a, key("https://h.example/x", Some("team")));
        assert_ne!(key("https://h.example/x", Some("a")), key("https://h.example/x", Some("b")));
    }
}
