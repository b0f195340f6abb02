//! LFS objects of an upstream: fetched for each task that wants them, kept beside its mirror.
//!
//! They are in `lfs/objects` of the mirror's directory, so that they belong to the same upstream and credential, are
//! counted with it and go with it.

use std::{fs::DirBuilder, io::ErrorKind, os::unix::fs::DirBuilderExt, path::PathBuf};

use super::{Fetched, Mirrors};
use crate::{
    failure::Failure,
    git::{Run, child::Role, credential::CredentialFile, pointer::Pointer, transfer},
    protocol::{CredentialName, GitUrl},
};

impl Mirrors {
    /// Brings `objects` of `url` into the mirror that was fetched from it, and returns how many bytes came.
    ///
    /// The upstream is asked for every one of them, with this task's own credential, also for those that are here: its
    /// answer is the authorisation to use them.
    ///
    /// # Errors
    /// A failure that carries its decision.
    pub(crate) async fn fetch_lfs(
        &self,
        fetched: &Fetched,
        url: &GitUrl,
        credential: Option<&CredentialName>,
        objects: &[Pointer],
        run: &Run<'_>,
    ) -> Result<u64, Failure> {
        self.allow(url)?;
        let directory = self.settings.credentials_path.as_deref();
        let credential = credential.map(|name| CredentialFile::find(directory, name, url)).transpose()?;
        // The child can write nothing beside it.
        match DirBuilder::new().mode(0o700).create(fetched.lfs()) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error.into()),
            _ => {}
        }
        let request = transfer::LfsRequest {
            url: url.as_str().to_owned(),
            store: fetched.lfs(),
            objects: objects.to_vec(),
            credential,
            policy: self.policy.clone(),
            ca_file: self.settings.ca_file.clone(),
            hosts: self.settings.host.clone(),
        };
        let pass = self.hosts.enter(url, run).await?;
        // A failure may be that of another host, to which a link led: it says nothing of this one.
        let answer: transfer::LfsAnswer = self.children.run(Role::Transfer, &request, Vec::new(), run).await?;
        pass.settle(Ok(answer)).map(|answer| answer.received_bytes)
    }
}

impl Fetched {
    /// The name of the mirror.
    pub(crate) fn key(&self) -> &str {
        self.path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default()
    }

    /// Where its LFS objects are.
    pub(crate) fn lfs(&self) -> PathBuf {
        self.path.join("lfs")
    }
}
