//! Tip stores: what was fetched to a limited depth, apart from the mirrors, which are never shallow.
//!
//! One lives as long as whoever asked for it uses it. What a crash leaves is swept at the next start.

use std::{
    num::NonZeroU32,
    path::{Path, PathBuf},
};

use super::{Fetched, Hold, Listing, Mirrors, Want, errand::make_directory, flight::Turn, key};
use crate::{
    failure::Failure,
    git::{Run, transfer::Apart},
    protocol::{CredentialName, GitUrl},
};

/// What tells the names of tip stores from those of mirrors.
const MARK: &str = ".tip-";

/// What a tip store is filled with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tip<'a> {
    /// The object whose history it is.
    pub(crate) oid: &'a str,
    /// Whether all that was listed comes as well.
    pub(crate) all: bool,
    /// How many commits of each history.
    pub(crate) depth: NonZeroU32,
    /// Whether another fetch stands still for it and has lent it its place at the host.
    pub(crate) lent: bool,
}

/// The directory of one, removed with this value.
#[derive(Debug)]
pub(super) struct Store {
    path: PathBuf,
    /// Nobody else fills the store of this name meanwhile.
    _turn: Turn,
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
        let key = key(url.as_str(), credential.map(CredentialName::as_str));
        let mut request = self.request(url, credential, &Want::All, &key, run)?;
        request.apart = Some(Apart::List);
        Ok(self.apart(&request, false, run).await?.listing)
    }

    /// Fetches the last commits of a history, or of all that was listed, into a store of its own.
    ///
    /// `listing` is what the upstream said to this task; what comes back names those refs of it whose objects are there.
    /// It is listed with the task's own credential here too. A fetch that stands still meanwhile has `lent` its place at
    /// the host.
    ///
    /// # Errors
    /// A failure that carries its decision.
    pub(crate) async fn tip(
        &self,
        url: &GitUrl,
        credential: Option<&CredentialName>,
        listing: &Listing,
        what: Tip<'_>,
        run: &Run<'_>,
    ) -> Result<Fetched, Failure> {
        let name = format!("{}{MARK}{}", key(url.as_str(), credential.map(CredentialName::as_str)), what.oid);
        let mut request = self.request(url, credential, &Want::All, &name, run)?;
        let others = listing.refs.values().filter(|_| what.all).cloned();
        let wants = others.chain([what.oid.to_owned()]).collect();
        request.apart = Some(Apart::Tip { listing: listing.clone(), wants, depth: what.depth.get() });
        let path = request.mirror.clone();
        let (turn, _) = self.flights.of(&name).turn(run).await?;
        // From here on whatever the child leaves goes, also when nobody waits for it any more.
        let store = Store { path: path.clone(), _turn: turn };
        remove(&path);
        make_directory(&path)?;
        let answer = self.apart(&request, what.lent, run).await?;
        Ok(Fetched {
            path,
            listing: answer.listing,
            objects: answer.objects,
            received_bytes: answer.received_bytes,
            source: answer.source,
            shallow: answer.shallow,
            hold: Hold::Tip { _store: store },
        })
    }
}
