//! LFS objects: the batch API and its basic transfer, by our own client.
//!
//! The address is that of the upstream and nothing else (`.lfsconfig` is not read): `<url>.git/info/lfs`. Every object
//! that a task wants is asked for, also what is here already: an object is used only where the upstream offers its
//! download to the task's own credential. Links lead where the policy allows, redirects are not followed, and what comes
//! is taken only if size and SHA-256 are those of the pointer.

mod batch;
mod link;
mod store;

use std::{collections::BTreeMap, path::PathBuf, sync::atomic::Ordering};

use gix::progress::{Count, NestedProgress, Progress as _, StepShared};
use serde::{Deserialize, Serialize};

use self::{link::Link, store::Store};
use super::{TICK, meter::Meter};
use crate::{
    failure::Failure,
    git::{
        child::{Access, Confined, Reporter},
        credential::CredentialFile,
        pointer::Pointer,
        policy::Policy,
        settings::HostSettings,
    },
    protocol::GitUrl,
};

/// How many objects are asked for at once; services refuse many more.
const BATCH: usize = 100;

/// What a transfer child is told that fetches LFS objects.
#[derive(Serialize, Deserialize)]
pub(in crate::git) struct LfsRequest {
    /// The upstream.
    pub(in crate::git) url: String,
    /// The directory that they are kept in.
    pub(in crate::git) store: PathBuf,
    /// What is wanted.
    pub(in crate::git) objects: Vec<Pointer>,
    /// What to send to the upstream's host, if anything.
    pub(in crate::git) credential: Option<CredentialFile>,
    /// Whom it may talk to.
    pub(in crate::git) policy: Policy,
    /// Trusted certificate authorities, instead of the system's.
    pub(in crate::git) ca_file: Option<PathBuf>,
    /// What is set for some hosts only: a link may lead to any of them.
    pub(in crate::git) hosts: BTreeMap<String, HostSettings>,
}

impl Confined for LfsRequest {
    fn access(&self) -> Access {
        let credential = self.credential.as_ref().map(|file| file.path.clone());
        let authorities = self.hosts.values().filter_map(|host| host.ca_file.clone());
        Access {
            reads: credential.into_iter().chain(self.ca_file.clone()).chain(authorities).collect(),
            writes: vec![self.store.clone()],
            network: true,
            ..Access::default()
        }
    }
}

/// What it answers.
#[derive(Serialize, Deserialize)]
pub(in crate::git) struct LfsAnswer {
    /// Objects received.
    pub(in crate::git) received: u64,
    /// Bytes received.
    pub(in crate::git) received_bytes: u64,
}

/// What moves, as the meter counts it.
struct Moved {
    bytes: StepShared,
    objects: StepShared,
    /// Small objects are movement, too.
    steps: StepShared,
}

/// Brings every object of `request` into the store.
///
/// # Errors
/// `not_found` where the upstream lacks one, `corrupt` where what it sends is not what the pointer says.
pub(super) fn fetch(request: &LfsRequest, reporter: &Reporter) -> Result<LfsAnswer, Failure> {
    let url = GitUrl::parse(&request.url)?;
    request.policy.allow(&url)?;
    let meter = Meter::default();
    let mut hand = meter.hand();
    let mut objects = hand.add_child_with_id("objects", super::meter::INDEXED_OBJECTS);
    objects.init(Some(request.objects.len()), None);
    let bytes = hand.add_child_with_id("bytes", super::meter::PACK_BYTES);
    let moved = Moved { bytes: bytes.counter(), objects: objects.counter(), steps: meter.moved() };
    meter.reporting(TICK, reporter, || run(request, &url, &moved))
}

fn run(request: &LfsRequest, url: &GitUrl, moved: &Moved) -> Result<LfsAnswer, Failure> {
    let store = Store::open(&request.store, &moved.steps)?;
    let link = Link::new(request, url)?;
    let mut answer = LfsAnswer { received: 0, received_bytes: 0 };
    for wanted in request.objects.chunks(BATCH) {
        for (pointer, action) in batch::ask(&link, wanted)? {
            if !store.has(&pointer) {
                store.take(&pointer, link.download(&action)?, &moved.bytes, link.host())?;
                answer.received += 1;
                answer.received_bytes += pointer.size();
            }
            moved.objects.fetch_add(1, Ordering::Relaxed);
            moved.steps.fetch_add(1, Ordering::Relaxed);
        }
    }
    Ok(answer)
}
