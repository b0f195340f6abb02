//! Tip stores: what was fetched to a limited depth, apart from the mirrors, which are never shallow.
//!
//! One lives as long as whoever asked for it uses it. What a crash leaves is swept at the next start.

use std::{
    num::NonZeroU32,
    path::{Path, PathBuf},
};

use tokio::sync::OwnedMutexGuard;

use super::{Fetched, Flight, Hold, Listing, Mirrors, Want, key, make_directory};
use crate::{
    failure::Failure,
    git::{
        Run,
        child::{self, Role},
        transfer::{self, Apart},
    },
    protocol::{CredentialName, GitUrl},
};

/// What tells the names of tip stores from those of mirrors.
const MARK: &str = ".tip-";

/// Whether an entry of the directory of mirrors is a tip store, or what is left of one.
pub(super) fn is_store(name: &str) -> bool {
    name.contains(MARK)
}

/// The directory of one, removed with this value.
#[derive(Debug)]
pub(super) struct Store {
    path: PathBuf,
    /// Nobody else fills the store of this name meanwhile.
    _turn: OwnedMutexGuard<()>,
}

impl Drop for Store {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

fn remove(path: &Path) {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!(%error, mirror.path = %path.display(), "a tip store cannot be removed; the next start tries again");
        }
        _ => {}
    }
}

impl Mirrors {
    /// Lists the upstream's refs and fetches nothing.
    ///
    /// # Errors
    /// A failure that carries its decision.
    pub(crate) async fn list(
        &self,
        url: &GitUrl,
        credential: Option<&CredentialName>,
        run: &Run<'_>,
    ) -> Result<Listing, Failure> {
        let mut request = self.request(url, credential, &Want::All)?;
        request.apart = Some(Apart::List);
        let answer: transfer::Answer = self.children.run(Role::Transfer, &request, Vec::new(), run).await?;
        Ok(answer.listing)
    }

    /// Fetches `depth` commits of the history of `oid`, or of it and of `all` that was listed, into a store of its own.
    ///
    /// `listing` is what the upstream said to this task; what comes back names those refs of it whose objects are there.
    /// It is listed with the task's own credential here too.
    ///
    /// # Errors
    /// A failure that carries its decision.
    pub(crate) async fn tip(
        &self,
        url: &GitUrl,
        credential: Option<&CredentialName>,
        listing: &Listing,
        (oid, all): (&str, bool),
        depth: NonZeroU32,
        run: &Run<'_>,
    ) -> Result<Fetched, Failure> {
        let mut request = self.request(url, credential, &Want::All)?;
        let others = listing.refs.values().filter(|_| all).cloned();
        let wants = others.chain([oid.to_owned()]).collect();
        request.apart = Some(Apart::Tip { listing: listing.clone(), wants, depth: depth.get() });
        let name = format!("{}{MARK}{oid}", key(url.as_str(), credential.map(CredentialName::as_str)));
        let path = self.directory.join(format!("{name}.git"));
        request.mirror.clone_from(&path);
        let flight: std::sync::Arc<Flight> = self.flight(&name);
        let turn = child::within(run, None, flight.lock_owned()).await?;
        // From here on whatever the child leaves goes, also when nobody waits for it any more.
        let store = Store { path: path.clone(), _turn: turn };
        remove(&path);
        make_directory(&path)?;
        let answer: transfer::Answer = self.children.run(Role::Transfer, &request, Vec::new(), run).await?;
        Ok(Fetched {
            path,
            listing: answer.listing,
            objects: answer.objects,
            received_bytes: answer.received_bytes,
            source: answer.source,
            shallow: answer.shallow,
            _hold: Hold::Tip { _store: store },
        })
    }
}
