//! The transfer role: the network, one credential, one mirror.
//!
//! Every transfer lists the upstream's refs first, with the task's own credential: that is the authorisation to use
//! what the mirror already has. Only what is missing is asked for.

mod address;
mod bare;
mod budget;
mod gitoxide;
mod http;
mod meter;
mod process;
mod status;
mod verdict;

use std::{
    collections::BTreeSet,
    num::NonZeroU32,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use gix_transport::{Protocol, client::blocking_io::http::connect_http};
use serde::{Deserialize, Serialize};

use self::{
    bare::Bare,
    budget::Budget,
    gitoxide::{Bounds, Gitoxide},
    meter::Meter,
    process::Program,
    verdict::Verdict,
};
use super::{
    child::{Access, Confined, Reporter, serve},
    credential::CredentialFile,
    mirror::{Listing, Source, Want},
    policy::Policy,
};
use crate::{
    failure::{ErrorClass, Failure},
    protocol::{GitUrl, Scheme},
};

/// How often progress is reported.
const TICK: Duration = Duration::from_millis(250);

/// What a transfer child is told.
#[derive(Serialize, Deserialize)]
pub(super) struct Request {
    /// The upstream.
    pub(super) url: String,
    /// Where the mirror is or shall be.
    pub(super) mirror: PathBuf,
    /// What for.
    pub(super) want: Want,
    /// What it is instead of a full fetch, if it is.
    #[serde(default)]
    pub(super) apart: Option<Apart>,
    /// Whether the agent hears of the listing, and of what is lacking, before anything is received.
    #[serde(default)]
    pub(super) tell: bool,
    /// What to send, if anything.
    pub(super) credential: Option<CredentialFile>,
    /// Whom it may talk to.
    pub(super) policy: Policy,
    /// Trusted certificate authorities, instead of the system's.
    pub(super) ca_file: Option<PathBuf>,
    /// Known hosts for ssh.
    pub(super) known_hosts: Option<PathBuf>,
    /// The most bytes it may receive.
    pub(super) max_bytes: u64,
}

/// A transfer that leaves the mirror alone.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Apart {
    /// Only the refs are listed.
    List,
    /// A tip store is filled.
    Tip {
        /// What the task's own listing said.
        listing: Listing,
        /// What of it is wanted.
        wants: Vec<String>,
        /// How many commits of each history.
        depth: u32,
    },
}

/// What a transfer child asks the agent; it is told nothing.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Question {
    /// The upstream listed its refs, and something has to be received.
    Heard(Heard),
}

/// What the agent hears before a pack comes.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Heard {
    /// What the upstream listed.
    pub(crate) listing: Listing,
    /// What of it the mirror lacks.
    pub(crate) lacking: BTreeSet<String>,
}

impl Confined for Request {
    fn access(&self) -> Access {
        let scheme = GitUrl::parse(&self.url).map(|url| (url.scheme(), url.path())).ok();
        // A path on this machine, which git reads.
        let upstream = scheme.as_ref().filter(|(scheme, _)| *scheme == Scheme::File).map(|(_, path)| path.into());
        let credential = self.credential.as_ref().map(|file| file.path.clone());
        let files = [credential, self.ca_file.clone(), self.known_hosts.clone(), upstream];
        Access {
            reads: files.into_iter().flatten().collect(),
            // A listing alone writes nothing.
            writes: if matches!(self.apart, Some(Apart::List)) { Vec::new() } else { vec![self.mirror.clone()] },
            network: true,
            programs: matches!(scheme, Some((Scheme::Ssh | Scheme::File, _))),
            ..Access::default()
        }
    }
}

/// What a transfer child answers.
#[derive(Serialize, Deserialize)]
pub(super) struct Answer {
    /// What the upstream listed, as far as the mirror now has it.
    pub(super) listing: Listing,
    /// Objects received.
    pub(super) objects: u64,
    /// Bytes of pack received.
    pub(super) received_bytes: u64,
    /// Whether a pack was received.
    pub(super) source: Source,
    /// The commits at which a tip store's history ends.
    #[serde(default)]
    pub(super) shallow: Vec<String>,
}

/// What a pack brought.
#[derive(Clone, Copy, Debug, Default)]
struct Received {
    objects: u64,
    bytes: u64,
}

/// A way to talk to an upstream.
trait Transport {
    /// Lists the upstream's branches and tags.
    fn list(&mut self) -> Result<Listing, Failure>;

    /// Receives a pack with `wants` and all that they need, less what the refs of `mirror` lead to, into `mirror`.
    ///
    /// With a `depth`, only so many commits of each history, and the tags that point to them; where they end is then in
    /// the `shallow` file of `mirror`.
    fn receive(
        &mut self,
        mirror: &Bare,
        wants: &BTreeSet<String>,
        depth: Option<NonZeroU32>,
    ) -> Result<Received, Failure>;
}

/// `haul child transfer`.
pub(super) fn main() -> ExitCode {
    serve(|request: Request, reporter| transfer(&request, reporter))
}

fn transfer(request: &Request, reporter: &Reporter) -> Result<Answer, Failure> {
    let url = GitUrl::parse(&request.url)?;
    request.policy.allow(&url)?;
    let meter = Meter::default();
    meter.reporting(TICK, reporter, || {
        let mut transport = connect(request, &url, &meter)?;
        match &request.apart {
            None => {
                let tell = |heard| if request.tell { reporter.ask(&Question::Heard(heard)) } else { Ok(()) };
                mirrored(&request.mirror, &request.want, transport.as_mut(), tell)
            }
            Some(Apart::List) => {
                let listing = transport.list()?;
                Ok(Answer { listing, objects: 0, received_bytes: 0, source: Source::Mirror, shallow: Vec::new() })
            }
            Some(Apart::Tip { listing, wants, depth }) => {
                tipped(&request.mirror, listing, wants, *depth, transport.as_mut())
            }
        }
    })
}

/// The transport that fits `url`.
fn connect<'a>(request: &Request, url: &GitUrl, meter: &'a Meter) -> Result<Box<dyn Transport + 'a>, Failure> {
    let verdict = Verdict::default();
    let budget = Budget::new(verdict.clone(), meter.moved());
    let bounds = Bounds { verdict: verdict.clone(), budget: budget.clone(), max_bytes: request.max_bytes };
    let program = match url.scheme() {
        Scheme::Https | Scheme::Http => {
            let login = request.credential.as_ref().map(|file| file.login(url.host())).transpose()?;
            let http = http::Client::new(request, url, login.as_ref(), verdict, budget)?;
            let address = gix::Url::try_from(url.as_str()).map_err(|error| Failure::invalid(error.to_string()))?;
            return Ok(Box::new(Gitoxide::new(connect_http(http, address, Protocol::V2, false), bounds, meter)));
        }
        Scheme::Ssh => {
            let address = address::lookup(url.host(), url.port(), &request.policy)?[0].ip();
            let key = request.credential.as_ref().map(|file| file.path.as_path());
            Program::ssh(url, address, key, request.known_hosts.as_deref())?
        }
        Scheme::File => Program::local(&url.path())?,
    };
    Ok(Box::new(Gitoxide::new(program.start(verdict, budget)?, bounds, meter)))
}

/// Brings the mirror at `path` up to what `want` needs.
///
/// `tell` hears of what has to be received, if anything has.
fn mirrored(
    path: &Path,
    want: &Want,
    transport: &mut dyn Transport,
    tell: impl FnOnce(Heard) -> Result<(), Failure>,
) -> Result<Answer, Failure> {
    let listing = transport.list()?;
    let mut wants: BTreeSet<String> = match want {
        Want::All | Want::Commit(_) => listing.refs.values().cloned().collect(),
        Want::Branch(branch) => {
            let oid = listing.refs.get(&format!("refs/heads/{branch}")).ok_or_else(|| {
                Failure::new(ErrorClass::NotFound, format!("the upstream has no branch \"{branch}\""))
            })?;
            BTreeSet::from([oid.clone()])
        }
    };
    // An upstream that refuses the listing leaves no trace on the disk.
    let mut bare = Bare::open_or_create(path)?;
    bare.retain_missing(&mut wants);
    let mut lacking = wants.clone();
    if let Want::Commit(oid) = want {
        lacking.insert(oid.clone());
        bare.retain_missing(&mut lacking);
    }
    if !lacking.is_empty() {
        tell(Heard { listing: listing.clone(), lacking })?;
    }
    let mut received = Received::default();
    let mut source = Source::Mirror;
    if !wants.is_empty() {
        received = transport.receive(&bare, &wants, None)?;
        source = Source::Upstream;
        bare.refresh()?;
        bare.retain_missing(&mut wants);
        if let Some(oid) = wants.first() {
            let message = format!("the upstream listed {oid} but did not send it");
            return Err(Failure::new(ErrorClass::Network, message));
        }
    }
    let listing = bare.adopt(listing, want)?;
    if let Want::Commit(oid) = want {
        let mut wants = BTreeSet::from([oid.clone()]);
        bare.retain_missing(&mut wants);
        if !wants.is_empty() {
            // Not below any ref: most servers hand it out all the same if they have it.
            let more = transport.receive(&bare, &wants, None).map_err(|failure| unless_absent(failure, oid))?;
            received = Received { objects: received.objects + more.objects, bytes: received.bytes + more.bytes };
            source = Source::Upstream;
            bare.refresh()?;
        }
        bare.require_commit(oid)?;
    }
    Ok(Answer { listing, objects: received.objects, received_bytes: received.bytes, source, shallow: Vec::new() })
}

/// Fills the tip store at `path`, anew, with `depth` commits of the history of each of `wants`.
fn tipped(
    path: &Path,
    listing: &Listing,
    wants: &[String],
    depth: u32,
    transport: &mut dyn Transport,
) -> Result<Answer, Failure> {
    // Listed as for every transfer: that is the authorisation. What it says by now is the next task's matter.
    transport.list()?;
    let listed: BTreeSet<&String> = listing.refs.values().chain(listing.peeled.values()).collect();
    let unlisted: Vec<&String> = wants.iter().filter(|oid| !listed.contains(oid)).collect();
    let wants: BTreeSet<String> = wants.iter().cloned().collect();
    let depth = NonZeroU32::new(depth).ok_or_else(|| Failure::invalid("a depth must be at least 1"))?;
    let mut bare = Bare::anew(path)?;
    let received = transport.receive(&bare, &wants, Some(depth)).map_err(|failure| match unlisted.first() {
        Some(oid) => unless_absent(failure, oid),
        None => failure,
    })?;
    bare.refresh()?;
    for oid in &unlisted {
        bare.require_commit(oid)?;
    }
    let mut missing = wants;
    bare.retain_missing(&mut missing);
    if let Some(oid) = missing.first() {
        return Err(Failure::new(ErrorClass::Network, format!("the upstream did not send {oid}")));
    }
    let shallow = bare.shallow()?;
    let listing = bare.adopt(listing.clone(), &Want::All)?;
    Ok(Answer { listing, objects: received.objects, received_bytes: received.bytes, source: Source::Upstream, shallow })
}

/// `not_found` where the upstream says that it has no such object.
fn unless_absent(failure: Failure, oid: &str) -> Failure {
    if failure.message.contains("not our ref") {
        return Failure::new(ErrorClass::NotFound, format!("the upstream has no commit {oid}"));
    }
    failure
}
