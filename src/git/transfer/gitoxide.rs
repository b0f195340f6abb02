//! The transport whose engine is gitoxide, over any of its own ways to carry the protocol.

use std::{
    collections::BTreeSet, fs::File, io::ErrorKind, num::NonZeroU32, os::unix::fs::FileExt, sync::atomic::AtomicBool,
};

use gix::{
    bstr::ByteSlice,
    error::Error,
    odb::pack,
    protocol::{
        self, Command, Handshake, LsRefsCommand,
        fetch::{Arguments, Context, Options, Response, Shallow, Tags, response::ShallowUpdate},
        handshake::Ref,
        ls_refs::RefPrefixes,
    },
};
use gix_transport::{Protocol, Service, client::blocking_io::Transport as Carrier};

use super::{
    Received, Transport,
    bare::Bare,
    budget::Budget,
    early,
    meter::Meter,
    negotiation::{Content, Negotiation},
    verdict::Verdict,
};
use crate::{
    failure::{ErrorClass, Failure},
    git::{mirror::Listing, room::refused},
    protocol::printable,
};

/// The most refs taken from an upstream.
const MOST_REFS: usize = 100_000;
/// The most bytes that a listing may have.
pub(super) const LONGEST_LISTING: u64 = 64 << 20;

/// What bounds a conversation.
pub(super) struct Bounds {
    /// Where a cause is left that the engine would not tell.
    pub(super) verdict: Verdict,
    /// What may still be received.
    pub(super) budget: Budget,
    /// The most bytes of one pack.
    pub(super) max_bytes: u64,
}

/// A conversation with an upstream over `C`.
pub(super) struct Gitoxide<'a, C> {
    carrier: C,
    handshake: Option<Handshake>,
    bounds: Bounds,
    meter: &'a Meter,
}

/// What the engine was doing when it failed.
#[derive(Clone, Copy)]
enum Stage {
    Listing,
    Receiving,
}

impl<'a, C: Carrier> Gitoxide<'a, C> {
    pub(super) fn new(carrier: C, bounds: Bounds, meter: &'a Meter) -> Self {
        Self { carrier, handshake: None, bounds, meter }
    }

    fn shake_hands(&mut self) -> gix::Result<Handshake> {
        let nobody = |_| Ok(None);
        protocol::handshake(&mut self.carrier, Service::UploadPack, nobody, Vec::new(), &mut self.meter.hand())
    }

    fn refs(&mut self) -> gix::Result<Vec<Ref>> {
        let mut progress = self.meter.hand();
        let mut handshake = self.shake_hands()?;
        // Protocol version 2 is asked for; older servers list at once.
        let refs = if let Some(refs) = handshake.refs.take() {
            refs
        } else {
            let mut prefixes = RefPrefixes::new();
            prefixes.extend(["HEAD", "refs/heads/", "refs/tags/"].map(Into::into));
            LsRefsCommand::new(Some(prefixes), &handshake.capabilities, agent()).invoke_blocking(
                &mut self.carrier,
                &mut progress,
                false,
            )?
        };
        self.handshake = Some(handshake);
        Ok(refs)
    }

    /// What an error of the engine stands for: the cause that was left, else what its kind tells.
    fn judge(&self, error: &Error, stage: Stage) -> Failure {
        if let Some(failure) = self.bounds.verdict.take() {
            return failure;
        }
        let mut text = String::new();
        for part in error.iter_errors().map(ToString::to_string) {
            if !text.contains(&part) {
                text.push_str(if text.is_empty() { "" } else { ": " });
                text.push_str(&part);
            }
        }
        let text = printable(&text);
        let io = error.iter_errors().find_map(|error| error.downcast_ref::<std::io::Error>());
        if let (Stage::Receiving, Some(failure)) = (stage, io.and_then(of_the_disk)) {
            return failure;
        }
        let broken = io.is_some_and(|error| {
            matches!(
                error.kind(),
                ErrorKind::UnexpectedEof
                    | ErrorKind::BrokenPipe
                    | ErrorKind::ConnectionReset
                    | ErrorKind::ConnectionAborted
                    | ErrorKind::TimedOut
            )
        });
        let class = match stage {
            Stage::Listing if !broken && (error.is_unsupported() || error.is_validation()) => ErrorClass::NotFound,
            // It refuses in its own words: mostly since the refs have changed since they were listed.
            Stage::Receiving if text.contains("ERR ") => ErrorClass::Network,
            // An object that is larger than everything together may be.
            Stage::Receiving if text.contains("too large to fit in memory") => ErrorClass::Quota,
            Stage::Receiving if !broken && error.is_corrupted() => ErrorClass::Corrupt,
            Stage::Listing | Stage::Receiving => ErrorClass::Network,
        };
        let doing = match stage {
            Stage::Listing => "the upstream's refs cannot be listed",
            Stage::Receiving => "the pack cannot be received",
        };
        Failure::new(class, format!("{doing}: {text}"))
    }
}

/// A failure for an error that the disk gave. Where the engine adds a path to it only the kind and the words are left.
fn of_the_disk(error: &std::io::Error) -> Option<Failure> {
    let text = printable(&error.to_string());
    let disk = refused(&text) || Failure::from(std::io::Error::from(error.kind())).class == ErrorClass::Disk;
    disk.then(|| Failure::new(ErrorClass::Disk, format!("the pack cannot be written: {text}")))
}

impl<C: Carrier> Transport for Gitoxide<'_, C> {
    fn list(&mut self) -> Result<Listing, Failure> {
        self.bounds.budget.grant(LONGEST_LISTING);
        let refs = self.refs().map_err(|error| self.judge(&error, Stage::Listing))?;
        let format = self.handshake.as_ref().and_then(|handshake| handshake.capabilities.capability("object-format"));
        if format.and_then(|format| format.value()).is_some_and(|format| format != "sha1") {
            return Err(Failure::invalid("the upstream names its objects by sha256, which is not supported"));
        }
        listing(refs)
    }

    fn receive(
        &mut self,
        mirror: &Bare,
        wants: &BTreeSet<String>,
        depth: Option<NonZeroU32>,
    ) -> Result<Received, Failure> {
        self.bounds.budget.grant(self.bounds.max_bytes);
        let before = self.meter.pack_bytes();
        let fetched = self.fetch(mirror, wants, depth, Content::Everything, mirror);
        let objects = fetched.map_err(|error| self.judge(&error, Stage::Receiving))?.unwrap_or_default();
        Ok(Received { objects, bytes: self.meter.pack_bytes() - before })
    }

    fn outline(&mut self, mirror: &Bare, wants: &BTreeSet<String>, place: &Bare) -> Result<Option<Received>, Failure> {
        self.bounds.budget.grant(self.bounds.max_bytes);
        let before = self.meter.pack_bytes();
        let fetched = self.fetch(mirror, wants, None, Content::Trees, place);
        let objects = fetched.map_err(|error| self.judge(&error, Stage::Receiving))?;
        Ok(objects.map(|objects| Received { objects, bytes: self.meter.pack_bytes() - before }))
    }

    fn boundary(&mut self, tip: &str, depth: u32) -> Result<Option<BTreeSet<String>>, Failure> {
        self.bounds.budget.grant(LONGEST_LISTING);
        self.probe(tip, depth).map_err(|error| self.judge(&error, Stage::Receiving))
    }
}

impl<C: Carrier> Gitoxide<'_, C> {
    /// Asks for a shallow history and reads only where the upstream would cut it, not the pack that follows.
    fn probe(&mut self, tip: &str, depth: u32) -> gix::Result<Option<BTreeSet<String>>> {
        let handshake = match self.handshake.take() {
            Some(handshake) => handshake,
            None => self.shake_hands()?,
        };
        let version = handshake.server_protocol_version;
        let mut features = Command::Fetch.default_features(version, &handshake.capabilities);
        features.push(agent());
        let mut arguments = Arguments::new(version, features, false);
        let Ok(tip) = gix::ObjectId::from_hex(tip.as_bytes()) else { return Ok(None) };
        if version != Protocol::V2 || !arguments.can_use_deepen() {
            return Ok(None);
        }
        arguments.deepen(usize::try_from(depth).unwrap_or(usize::MAX));
        arguments.want(tip);
        let mut reader = arguments.send(&mut self.carrier, true).map_err(Error::from_error)?;
        let response = Response::from_line_reader(version, &mut reader, true, false)?;
        let cut = response.shallow_updates().iter().filter_map(|update| match update {
            ShallowUpdate::Shallow(id) => Some(id.to_string()),
            ShallowUpdate::Unshallow(_) => None,
        });
        Ok(Some(cut.collect()))
    }

    /// Fetches `what` of `wants`, less what `mirror` has, into `place` and returns how many objects came; `None` if
    /// nothing was asked for.
    fn fetch(
        &mut self,
        mirror: &Bare,
        wants: &BTreeSet<String>,
        depth: Option<NonZeroU32>,
        what: Content,
        place: &Bare,
    ) -> gix::Result<Option<u64>> {
        let repository = &mirror.repository;
        if self.handshake.is_none() {
            self.handshake = Some(self.shake_hands()?);
        }
        let Some(handshake) = self.handshake.as_mut() else { return Ok(None) };
        let shallow = depth.map_or(Shallow::NoChange, Shallow::DepthAtRemote);
        // Of one branch, or of a history that is cut, it is not known beforehand which tags point into it.
        let include =
            handshake.server_protocol_version == Protocol::V2 || handshake.capabilities.contains("include-tag");
        let mut known = repository.clone();
        known.objects.refresh_never();
        let mut negotiate = Negotiation::new(&known, wants, shallow.clone(), what);
        let (mut objects, lasting) = (None, place.lasting);
        let directory = place.packs_at();
        let limit = usize::try_from(self.bounds.max_bytes).unwrap_or(usize::MAX);
        let context =
            Context { handshake, transport: &mut self.carrier, user_agent: agent(), trace_packetlines: false };
        let options = Options {
            shallow_file: repository.shallow_file()?,
            shallow: &shallow,
            tags: if include { Tags::Included } else { Tags::None },
            reject_shallow_remote: true,
        };
        // Without a pack there is nothing that a delta could lean on outside of its own, and what comes is written as it
        // comes; else it is taken apart and put together again, with the bases it lacks.
        let bases = holds_packs(&mirror.packs_at()).then(|| repository.objects.clone());
        let consume = |reader: &mut dyn std::io::BufRead,
                       progress: &mut dyn gix::DynNestedProgress,
                       interrupt: &AtomicBool|
         -> gix::Result<bool> {
            let options = pack::bundle::write::Options { alloc_limit_bytes: Some(limit), ..Default::default() };
            let hash = gix::hash::Kind::Sha1;
            let write = || {
                pack::Bundle::write_to_directory(reader, Some(&directory), progress, interrupt, bases, hash, options)
            };
            let written =
                if lasting { early::written(&directory, write).map_err(Error::from_error)? } else { write() }?;
            objects = Some(u64::from(written.index.num_objects));
            keep(&written, lasting).map_err(|error| {
                // What may not be on the disk is not to be found there later.
                for path in written.index_path.iter().chain(&written.data_path).chain(&written.keep_path) {
                    let _ = std::fs::remove_file(path);
                }
                Error::from_error(error)
            })?;
            Ok(true)
        };
        protocol::fetch(&mut negotiate, consume, self.meter.hand(), &mirror.stop, context, options)?;
        Ok(objects)
    }
}

/// Whether there is a pack already.
fn holds_packs(directory: &std::path::Path) -> bool {
    let Ok(mut entries) = std::fs::read_dir(directory) else { return true };
    entries.any(|entry| entry.map_or(true, |entry| entry.path().extension().is_some_and(|end| end == "pack")))
}

/// Makes a new pack durable before any ref leads to it, if it shall last, and lets go of the engine's mark on it.
fn keep(written: &pack::bundle::write::Outcome, lasting: bool) -> std::io::Result<()> {
    if let Some(pack) = &written.data_path {
        ends_with(&File::open(pack)?, written.index.data_hash.as_slice())?;
    }
    if lasting {
        for path in written.data_path.iter().chain(&written.index_path) {
            File::open(path)?.sync_all()?;
        }
        if let Some(directory) = written.data_path.as_deref().and_then(std::path::Path::parent) {
            File::open(directory)?.sync_all()?;
        }
    }
    match written.keep_path.as_deref().map(std::fs::remove_file) {
        Some(Err(error)) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Refuses a pack with something behind its end, which no reader would take for whole.
fn ends_with(pack: &File, checksum: &[u8]) -> std::io::Result<()> {
    let mut end = vec![0; checksum.len()];
    let length = pack.metadata()?.len();
    pack.read_exact_at(&mut end, length.saturating_sub(checksum.len() as u64))?;
    if end == checksum {
        return Ok(());
    }
    Err(std::io::Error::new(ErrorKind::InvalidData, "the pack goes on behind its end"))
}

fn agent() -> protocol::command::Feature {
    ("agent", Some(concat!("haul/", env!("CARGO_PKG_VERSION")).to_owned()))
}

/// What the upstream's refs are, less what is no branch or tag or has a name that git itself would refuse.
pub(super) fn listing(refs: Vec<Ref>) -> Result<Listing, Failure> {
    let mut listing = Listing::default();
    for reference in refs {
        let (name, target, oid, peeled) = match reference {
            Ref::Peeled { full_ref_name, tag, object } => (full_ref_name, None, Some(tag), Some(object)),
            Ref::Direct { full_ref_name, object } => (full_ref_name, None, Some(object), None),
            Ref::Symbolic { full_ref_name, target, tag: Some(tag), object } => {
                (full_ref_name, Some(target), Some(tag), Some(object))
            }
            Ref::Symbolic { full_ref_name, target, tag: None, object } => {
                (full_ref_name, Some(target), Some(object), None)
            }
            Ref::Unborn { full_ref_name, target } => (full_ref_name, Some(target), None, None),
        };
        let fits = |name: &[u8]| gix::validate::reference::name(name.as_bstr()).is_ok();
        if name == "HEAD" {
            let target = target.filter(|target| fits(target)).and_then(|target| String::from_utf8(target.into()).ok());
            listing.head = target.filter(|target| target.starts_with("refs/heads/"));
        } else if let (Some(oid), true) = (oid, fits(&name))
            && let Ok(name) = String::from_utf8(name.into())
            && (name.starts_with("refs/heads/") || name.starts_with("refs/tags/"))
        {
            if let Some(peeled) = peeled {
                listing.peeled.insert(name.clone(), peeled.to_string());
            }
            listing.refs.insert(name, oid.to_string());
        }
    }
    if listing.refs.len() > MOST_REFS {
        let message =
            format!("the upstream has {} branches and tags; at most {MOST_REFS} are taken", listing.refs.len());
        return Err(Failure::new(ErrorClass::Quota, message));
    }
    Ok(listing)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn direct(name: &[u8]) -> Ref {
        Ref::Direct { full_ref_name: name.into(), object: gix::ObjectId::null(gix::hash::Kind::Sha1) }
    }

    #[test]
    fn only_branches_and_tags_with_proper_names_are_listed() {
        let refs = [
            &b"refs/heads/main"[..],
            b"refs/pull/1/head",
            b"refs/heads/a\x1b[31m",
            b"refs/heads/..",
            b"refs/tags/\xff",
        ];
        let listing = listing(refs.map(direct).into()).unwrap();
        assert_eq!(listing.refs.keys().collect::<Vec<_>>(), ["refs/heads/main"]);
    }

    #[test]
    fn a_head_leads_to_a_branch_or_nowhere() {
        let unborn = |target: &str| Ref::Unborn { full_ref_name: "HEAD".into(), target: target.into() };
        assert_eq!(listing(vec![unborn("refs/heads/x")]).unwrap().head.as_deref(), Some("refs/heads/x"));
        assert_eq!(listing(vec![unborn("refs/x\n")]).unwrap().head, None);
        assert_eq!(listing(vec![direct(b"HEAD")]).unwrap().head, None);
    }

    #[test]
    fn millions_of_refs_are_refused() {
        let refs = (0..=MOST_REFS).map(|n| direct(format!("refs/heads/{n}").as_bytes())).collect();
        assert_eq!(listing(refs).unwrap_err().class, ErrorClass::Quota);
    }
}
