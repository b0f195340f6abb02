//! Mirrors: the agent's own bare copies of upstreams, and the only place the network writes to.

mod errand;
mod flight;
mod lfs;
mod lock;
mod packs;
mod repack;
mod repair;
mod seat;
mod send;
mod tip;
mod underway;
mod upkeep;

use std::{
    collections::{BTreeMap, HashMap},
    fmt::{self, Write as _},
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::SystemTime,
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;

use self::{errand::Ahead, flight::Flights, upkeep::Upkeep};
use super::{
    Run,
    child::Children,
    hosts::Hosts,
    policy::Policy,
    room::blamed,
    settings::GitSettings,
    transfer::{self},
};
use crate::{
    failure::{ErrorClass, Failure},
    protocol::{CredentialName, GitUrl, HostState},
};

pub(super) use self::{
    packs::{damage, names as packs, record},
    repack::main,
    send::read_head,
    upkeep::sweep,
};

pub(crate) use self::{
    send::send as send_objects,
    tip::Tip,
    underway::{Came, Hold as Held, Underway},
};

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
    /// The commits at which the history ends; none in a mirror.
    pub shallow: Vec<String>,
    hold: Hold,
}

impl Fetched {
    /// Whether nobody else reads it, now or later: its packs may be taken instead of copied.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        matches!(self.hold, Hold::Tip { .. })
    }
}

/// What keeps the objects where they are.
#[derive(Debug)]
enum Hold {
    /// A use of a mirror.
    Mirror { _lease: Box<Lease> },
    /// A tip store, which goes with this.
    Tip { _store: tip::Store },
}

/// The mirrors of one storage directory. Cheap to clone.
#[derive(Clone)]
pub struct Mirrors {
    directory: PathBuf,
    settings: GitSettings,
    policy: Policy,
    children: Children,
    hosts: Arc<Hosts>,
    /// How many bytes of the disk are to stay free.
    reserve: u64,
    /// One writer at a time into each mirror.
    flights: Arc<Flights>,
    /// What is done for the mirrors beside the tasks.
    upkeep: Arc<Upkeep>,
    /// Fetches that whoever began them left to go on; a mirror that is removed stops its own.
    ahead: Arc<Mutex<HashMap<String, CancellationToken>>>,
    /// Stops all of them.
    closed: CancellationToken,
}

/// Keeps a mirror as it is. With its end begins the upkeep that its use gave cause for.
struct Lease {
    /// The shared lock; whoever takes something out of the mirror needs the exclusive one.
    lock: Option<File>,
    mirrors: Mirrors,
    request: transfer::Request,
    /// Whether something was received, or may have been left by what died.
    changed: bool,
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.lock = None;
        if self.changed {
            self.mirrors.tend(&self.request);
        }
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease").field("changed", &self.changed).finish_non_exhaustive()
    }
}

impl Mirrors {
    /// Opens `<storage>/.haul/mirrors`, sweeps what killed transfers left, and heeds the budget.
    ///
    /// # Errors
    /// When the directory cannot be made or read.
    pub async fn open(storage: &Path, settings: &GitSettings, children: Children) -> Result<Self, Failure> {
        let directory = storage.join(".haul").join("mirrors");
        let (swept, budget) = (directory.clone(), settings.mirror_budget.as_u64());
        tokio::task::spawn_blocking(move || {
            upkeep::sweep_all(&swept)?;
            upkeep::evict(&swept, budget)
        })
        .await
        .map_err(|error| Failure::internal(format!("sweeping the mirrors failed: {error}")))??;
        Ok(Self {
            directory,
            settings: settings.clone(),
            policy: Policy::from(settings),
            children,
            hosts: Arc::new(Hosts::new(settings)),
            reserve: 0,
            flights: Arc::default(),
            upkeep: Arc::default(),
            ahead: Arc::default(),
            closed: CancellationToken::new(),
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
    /// the mirror lacks something. Of several fetches into one mirror all list at once and one receives; the others
    /// wait for it, and receive only what is still missing then
    /// (`fifty_fetches_of_a_cold_upstream_are_fifty_listings_and_one_pack`).
    ///
    /// A mirror that turns out to be damaged is put aside and fetched anew, once.
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
        self.fetch_telling(url, credential, want, None, run).await
    }

    /// The same as [`fetch`](Self::fetch); whoever goes `ahead` hears what will be received, before it is.
    async fn fetch_telling(
        &self,
        url: &GitUrl,
        credential: Option<&CredentialName>,
        want: &Want,
        ahead: Option<Ahead<'_>>,
        run: &Run<'_>,
    ) -> Result<Fetched, Failure> {
        let ahead = ahead.as_ref();
        let key = key(url.as_str(), credential.map(CredentialName::as_str));
        let begun = SystemTime::now();
        let request = self.request(url, credential, want, &key, run)?;
        let lock = lock::shared(self.lock_path(&key), run).await;
        let lock = lock.map_err(|failure| blamed(failure, &[&self.directory]))?;
        // A transfer that is dropped or fails may leave something to sweep.
        let mut lease = Lease { lock: Some(lock), mirrors: self.clone(), request, changed: true };
        let landed = match self.transfer(&key, &lease.request, ahead, run).await {
            (Ok(transfer::Landed::Damaged { damaged }), turn) => {
                self.replace(&key, &damaged, None, turn, run).await?;
                self.transfer(&key, &lease.request, ahead, run).await.0
            }
            (Err(failure), turn) if failure.class == ErrorClass::Corrupt => {
                if self.replace(&key, &failure.message, Some(begun), turn, run).await? {
                    self.transfer(&key, &lease.request, ahead, run).await.0
                } else {
                    Err(failure)
                }
            }
            (landed, _) => landed,
        };
        let answer = match landed {
            Ok(transfer::Landed::Brought(answer)) => answer,
            Ok(transfer::Landed::Damaged { damaged }) => {
                return Err(Failure::new(ErrorClass::Corrupt, format!("a mirror of this node is damaged: {damaged}")));
            }
            Err(failure) => {
                lease.changed = !self.forget_empty(&key, &mut lease.lock);
                return Err(failure);
            }
        };
        lease.changed = answer.source == Source::Upstream;
        Ok(Fetched {
            path: lease.request.mirror.clone(),
            listing: answer.listing,
            objects: answer.objects,
            received_bytes: answer.received_bytes,
            source: answer.source,
            shallow: answer.shallow,
            hold: Hold::Mirror { _lease: Box::new(lease) },
        })
    }

    /// How the hosts are that have transfers or are left alone.
    #[must_use]
    pub fn hosts(&self) -> Vec<HostState> {
        self.hosts.states()
    }

    /// Removes the directory of a transfer that came to nothing, and its lock, if nobody else uses them: a thousand
    /// refused addresses leave nothing behind. Whether it did.
    fn forget_empty(&self, key: &str, lock: &mut Option<File>) -> bool {
        let Some(_alone) = lock.take().and_then(lock::alone) else { return false };
        // Only an empty directory can be removed this way.
        match fs::remove_dir(self.path(key)) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(_) => return false,
        }
        fs::remove_file(self.lock_path(key)).is_ok()
    }

    /// Where a mirror is.
    fn path(&self, key: &str) -> PathBuf {
        self.directory.join(format!("{key}.git"))
    }

    /// Where its lock is.
    fn lock_path(&self, key: &str) -> PathBuf {
        self.directory.join(format!("{key}.lock"))
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
