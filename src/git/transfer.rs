//! The transfer role: the network, one credential, one mirror.
//!
//! Every transfer lists the upstream's refs first, with the task's own credential: that is the authorisation to use
//! what the mirror already has. Only what is missing is asked for.

mod address;
mod bare;
mod bring;
mod budget;
mod command;
mod early;
mod gitoxide;
mod http;
mod journey;
mod lfs;
mod meter;
mod milestones;
mod negotiation;
mod pieces;
mod process;
mod status;
mod verdict;

use std::{
    collections::BTreeSet,
    num::NonZeroU32,
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use futures_util::future::BoxFuture;
use gix_transport::{Protocol, client::blocking_io::http::connect_http};
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub(super) use self::lfs::{LfsAnswer, LfsRequest};
use self::{
    address::Route,
    bare::Bare,
    bring::{mirrored, tipped},
    budget::Budget,
    command::GitCommand,
    gitoxide::{Bounds, Gitoxide},
    journey::Journey,
    meter::Meter,
    process::Program,
    verdict::Verdict,
};
use super::{
    Run,
    child::{Access, Children, Confined, Reporter, Role, serve},
    credential::CredentialFile,
    mirror::{Listing, Source, Want},
    policy::Policy,
    room::blamed,
    settings::{Engine, Proxy},
};
use crate::{
    failure::{ErrorClass, Failure},
    protocol::{GitUrl, Scheme},
};

/// How often progress is reported.
const TICK: Duration = Duration::from_millis(250);

/// What a transfer child is told.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Request {
    /// The upstream.
    pub(super) url: String,
    /// The directory that the mirror is in or shall be in; nothing outside it is written.
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
    /// The proxy that leads to the upstream.
    #[serde(default)]
    pub(super) proxy: Option<Proxy>,
    /// Known hosts for ssh.
    pub(super) known_hosts: Option<PathBuf>,
    /// The most bytes it may receive.
    pub(super) max_bytes: u64,
    /// How many bytes of the disk are to stay free.
    #[serde(default)]
    pub(super) reserve: u64,
    /// What speaks with the upstream.
    #[serde(default)]
    pub(super) engine: Engine,
    /// How long until the deadline.
    #[serde(default)]
    pub(super) time_left: Duration,
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

/// What a transfer child asks the agent.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Question {
    /// Something has to be written; may I, as the only one? The answer comes when that is so.
    Turn,
    /// The upstream is to be spoken to again after a wait for the turn, during which others had our place at it. The
    /// answer says nothing.
    Place,
    /// This is about to be received. The answer says nothing.
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

/// The answer to [`Question::Turn`]; the right lasts as long as the child.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Granted {
    /// Whether somebody else was writing, so that what was seen before may be different now.
    pub(super) waited: bool,
}

/// What became of a transfer.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
pub(super) enum Landed {
    /// The mirror has what was asked for.
    Brought(Answer),
    /// The mirror cannot be used and is to be put aside.
    Damaged {
        /// What is wrong with it.
        damaged: String,
    },
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
            programs: self.engine == Engine::Git || matches!(scheme, Some((Scheme::Ssh | Scheme::File, _))),
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

    /// Receives a pack with the commits and trees of `wants`, without what their files contain, into `place`, less what
    /// the refs of `mirror` lead to. `None` where the upstream cannot leave files out.
    fn outline(
        &mut self,
        _mirror: &Bare,
        _wants: &BTreeSet<String>,
        _place: &Bare,
    ) -> Result<Option<Received>, Failure> {
        Ok(None)
    }

    /// Where the upstream would cut the history of `tip` so that it is `depth` commits deep: the last commits that would
    /// still be sent, none if that is all of it. `None` where it cannot be asked. The conversation is over after this.
    fn boundary(&mut self, _tip: &str, _depth: u32) -> Result<Option<BTreeSet<String>>, Failure> {
        Ok(None)
    }
}

/// What a transfer child may be told; the fields of the two have different names.
#[derive(Deserialize)]
#[serde(untagged)]
enum Order {
    Lfs(Box<LfsRequest>),
    Fetch(Box<Request>),
}

impl Confined for Order {
    fn access(&self) -> Access {
        match self {
            Self::Lfs(request) => request.access(),
            Self::Fetch(request) => request.access(),
        }
    }
}

/// Has a child do `request`. With `fallback`, what the first engine could not do for a reason of its own is tried again
/// with the `git` command, in the same attempt.
///
/// # Errors
/// A failure that carries its decision: the second one's, unless it did no better.
pub(super) async fn run<'a>(
    children: &Children,
    mut request: Request,
    fallback: bool,
    run: &Run<'_>,
    answer: impl Fn(Value) -> BoxFuture<'a, Result<Value, Failure>> + Send + Sync,
) -> Result<Landed, Failure> {
    let first = children.run_asking(Role::Transfer, &request, Vec::new(), run, &answer).await;
    // One that was killed shows nothing about the engine, and what it had received helps only the same one.
    let own = |failure: &Failure| {
        matches!(failure.class, ErrorClass::Corrupt | ErrorClass::Internal) && !failure.deferred && !failure.killed
    };
    let failure = match first {
        Err(failure) if fallback && request.engine == Engine::Gix && own(&failure) && !run.cancel.is_cancelled() => {
            failure
        }
        other => return other,
    };
    tracing::warn!(error = %failure, "a transfer failed in a way that may be ours; the git command tries it again");
    request.engine = Engine::Git;
    match children.run_asking(Role::Transfer, &request, Vec::new(), run, &answer).await {
        Err(second) if run.cancel.is_cancelled() => Err(second),
        Err(second) if own(&second) => {
            let message = format!("{}; the git command did no better: {}", failure.message, second.message);
            Err(Failure { message, ..failure })
        }
        other => other,
    }
}

/// `haul child transfer`.
pub(super) fn main() -> ExitCode {
    serve(|order: Order, reporter| match order {
        Order::Lfs(request) => value(lfs::fetch(&request, reporter)?),
        Order::Fetch(request) => value(transfer(&request, reporter)?),
    })
}

fn value(answer: impl Serialize) -> Result<serde_json::Value, Failure> {
    serde_json::to_value(answer).map_err(|error| Failure::internal(error.to_string()))
}

fn transfer(request: &Request, reporter: &Reporter) -> Result<Landed, Failure> {
    let url = GitUrl::parse(&request.url)?;
    request.policy.allow(&url)?;
    let meter = Meter::default();
    let transferred = meter.reporting(TICK, reporter, || {
        let connect = || connect(request, &url, &meter);
        match &request.apart {
            None => mirrored(request, &Journey { connect: &connect, meter: &meter, reporter, begun: Instant::now() }),
            Some(Apart::List) => {
                let listing = connect()?.list()?;
                let source = Source::Mirror;
                let answer = Answer { listing, objects: 0, received_bytes: 0, source, shallow: Vec::new() };
                Ok(Landed::Brought(answer))
            }
            Some(Apart::Tip { listing, wants, depth }) => {
                tipped(&request.mirror, listing, wants, *depth, connect()?.as_mut())
            }
        }
    });
    let places = [Some(request.mirror.as_path()), request.mirror.parent()];
    transferred.map_err(|failure| blamed(failure, &places.into_iter().flatten().collect::<Vec<_>>()))
}

/// The transport that fits `url`.
fn connect<'a>(request: &Request, url: &GitUrl, meter: &'a Meter) -> Result<Box<dyn Transport + 'a>, Failure> {
    if request.engine == Engine::Git {
        return Ok(Box::new(GitCommand::new(request, url, meter)?));
    }
    let verdict = Verdict::default();
    let mut budget = Budget::new(verdict.clone(), meter.received());
    if let Some(place) = request.mirror.parent() {
        budget = budget.keeping_free(place, request.reserve);
    }
    let bounds = Bounds { verdict: verdict.clone(), budget: budget.clone(), max_bytes: request.max_bytes };
    let program = match url.scheme() {
        Scheme::Https | Scheme::Http => {
            let login = request.credential.as_ref().map(|file| file.login(url.host())).transpose()?;
            let http = http::Client::new(request, url, login.as_ref(), &address::system, verdict, budget)?;
            let address = gix::Url::try_from(url.as_str()).map_err(|error| Failure::invalid(error.to_string()))?;
            return Ok(Box::new(Gitoxide::new(connect_http(http, address, Protocol::V2, false), bounds, meter)));
        }
        Scheme::Ssh => {
            let address = Route::of(request, url, &address::system)?.for_ssh(url)?;
            let key = request.credential.as_ref().map(|file| file.path.as_path());
            Program::ssh(url, address, key, request.known_hosts.as_deref())?
        }
        Scheme::File => Program::local(&url.path())?,
    };
    Ok(Box::new(Gitoxide::new(program.start(verdict, budget)?, bounds, meter)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::git::GitSettings;

    #[test]
    fn a_transfer_child_writes_one_mirror_and_runs_programs_only_where_the_scheme_needs_them() {
        let access = |url: &str| {
            let request = Request {
                url: url.to_owned(),
                mirror: "/m.git".into(),
                want: Want::All,
                apart: None,
                tell: false,
                credential: None,
                policy: Policy::from(&GitSettings::default()),
                ca_file: Some("/ca.pem".into()),
                proxy: None,
                known_hosts: None,
                max_bytes: 1,
                reserve: 0,
                engine: Engine::Gix,
                time_left: Duration::ZERO,
            };
            request.access()
        };
        let https = access("https://git.example/x.git");
        let wanted =
            Access { reads: vec!["/ca.pem".into()], writes: vec!["/m.git".into()], network: true, ..Access::default() };
        assert_eq!(https, wanted);
        assert!(access("ssh://git@git.example/x.git").programs);
        let file = access("file:///srv/x.git");
        assert!(file.programs && file.reads.contains(&PathBuf::from("/srv/x.git")));
        assert!(!access("no address at all").programs);
    }
}
