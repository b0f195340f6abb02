//! Attaching a history, while the project's user works in it.
//!
//! | step | if it ends here |
//! |---|---|
//! | each pack gets a `.keep`, then comes the pack, then its index | more objects than before, which a `gc` of the user's leaves alone |
//! | the refs of a whole clone that are missing | they lead to what is there |
//! | under the lock that git takes for it, `shallow` goes, if it says what was written there first | the history is whole |
//! | the `.keep` files go | |
//!
//! Each can be done again. A ref that is there is never touched, and a lock of somebody else's never removed.

use std::{
    collections::{BTreeMap, HashSet},
    io::{self, BufReader, Read, Write},
    time::{Duration, Instant},
};

use git2::{ObjectType, Oid, Repository};
use rustix::{
    fs::{AtFlags, Mode, OFlags, RenameFlags, fchmod, renameat_with, unlinkat},
    io::Errno,
};
use serde::{Deserialize, Serialize};

use super::{
    guard::{altered, among},
    look::boundary,
    open::{fault, open},
    pulse,
    receive::Chunks,
    waiting::{self, Waiting},
};
use crate::{
    failure::{ErrorClass, Failure},
    git::{child::Reporter, mirror::read_head, projects::Dir},
};

/// How often a sign of life is given.
const TICK: Duration = Duration::from_millis(250);
/// What tells a `.keep` of ours from one of the user's.
const KEEP: &[u8] = b"haul is attaching the history of this project\n";

/// What to attach.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Attach {
    /// The descriptor of the pipe the objects come through; filled in when it is handed over.
    pub(crate) objects: Option<i32>,
    /// Where the history ended when the project was made.
    pub(crate) shallow: Vec<String>,
    /// The remote-tracking refs and tags of a whole clone, by their names in the project.
    pub(crate) refs: BTreeMap<String, String>,
    /// What annotated tags point to in the end.
    pub(crate) peeled: BTreeMap<String, String>,
    /// What the upstream's `HEAD` points to.
    pub(crate) head: Option<String>,
    /// Whether only tags that point into the history are wanted, and no branches.
    pub(crate) tags_within: bool,
}

pub(super) fn run(directory: &Dir, order: &Attach, reporter: &Reporter) -> Result<(), Failure> {
    let repo = open(directory, reporter)?;
    waiting::sweep(&repo)?;
    let git = directory.child(".git").map_err(among)?;
    let attached = attach(directory, &repo, order, reporter);
    match &attached {
        // Tried again: until then a `gc` shall leave alone what is there.
        Err(failure) if failure.class != ErrorClass::Conflict => {}
        _ => release_packs(&git)?,
    }
    attached
}

fn attach(directory: &Dir, repo: &Repository, order: &Attach, reporter: &Reporter) -> Result<(), Failure> {
    // None at all: its user made it whole already.
    let as_written = || boundary(directory).map(|now| now.is_empty() || now == order.shallow);
    if !as_written()? {
        return Err(changed());
    }
    let waiting = Waiting::new(repo)?;
    if let Some(objects) = order.objects {
        take_in(&waiting, Chunks::new(objects, reporter)?, reporter)?;
    }
    let odb = repo.odb().map_err(|error| fault("its objects cannot be opened", &error))?;
    odb.refresh().map_err(|error| fault("its objects cannot be read", &error))?;
    for oid in &order.shallow {
        parents_are_here(&odb, oid)?;
    }
    // Nothing that leads to an object is to outlive it.
    pulse::flush(directory)?;
    reporter.step();
    write_refs(repo, &waiting, order, reporter)?;
    if !order.shallow.is_empty() && !waiting.remove_shallow(as_written)? {
        return Err(changed());
    }
    Ok(())
}

fn changed() -> Failure {
    Failure::conflict(
        "the history of the project was cut or deepened by its user (.git/shallow changed); `git fetch --unshallow` \
         in the project brings the rest",
    )
}

/// Takes the files that come into their places.
fn take_in(waiting: &Waiting, from: Chunks<'_>, reporter: &Reporter) -> Result<(), Failure> {
    let mut from = BufReader::new(from);
    let objects = waiting.git.child("objects").map_err(among)?;
    let (mut told, mut number) = (Instant::now(), 0_u64);
    while let Some((length, name)) = read_head(&mut from)? {
        let (place, file) = name.split_once('/').ok_or_else(|| Failure::internal("a file without a place"))?;
        number += 1;
        let beside = format!("object-{number}");
        let mut written =
            waiting.dir.open_file(&beside, OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL, 0o444).map_err(among)?;
        let mut left = length;
        while left > 0 {
            let copied = io::copy(&mut (&mut from).take(left.min(1 << 20)), &mut written)?;
            if copied == 0 {
                return Err(Failure::internal("what comes from the mirror ended early"));
            }
            left -= copied;
            if told.elapsed() >= TICK {
                told = Instant::now();
                reporter.step();
            }
        }
        fchmod(&written, Mode::from_raw_mode(0o444)).map_err(io::Error::from)?;
        let into = match objects.child(place) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => objects.ensure(place, 0o755),
            other => other,
        };
        let into = into.map_err(among)?;
        if let Some(stem) = file.strip_suffix(".pack") {
            keep(waiting, &into, stem)?;
        }
        match renameat_with(&waiting.dir, &beside, &into, file, RenameFlags::NOREPLACE) {
            Ok(()) => {}
            // The same objects, of an earlier try or of the user's own.
            Err(Errno::EXIST) => {
                unlinkat(&waiting.dir, &beside, AtFlags::empty()).map_err(|error| among(error.into()))?;
            }
            Err(error) => return Err(among(error.into())),
        }
    }
    Ok(())
}

/// Lets no `gc` take a pack away that nothing leads to yet.
fn keep(waiting: &Waiting, packs: &Dir, stem: &str) -> Result<(), Failure> {
    let beside = format!("{stem}.keep");
    let mut file =
        waiting.dir.open_file(&beside, OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL, 0o444).map_err(among)?;
    file.write_all(KEEP)?;
    match renameat_with(&waiting.dir, &beside, packs, &beside, RenameFlags::NOREPLACE) {
        // Of an earlier try, or its user's.
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(among(error.into())),
    }
}

/// Lets go of the packs that were kept here.
fn release_packs(git: &Dir) -> Result<(), Failure> {
    let packs = git.child("objects/pack").map_err(among)?;
    for (name, _) in packs.entries().map_err(among)? {
        let is_keep = name.as_encoded_bytes().ends_with(b".keep");
        let is_ours = || packs.read(&name, 4096).is_ok_and(|text| text.as_deref() == Some(KEEP));
        if is_keep && is_ours() {
            unlinkat(&packs, &name, AtFlags::empty()).map_err(|error| among(error.into()))?;
        }
    }
    Ok(())
}

/// Requires that the parents of a commit, as it says itself, are readable.
fn parents_are_here(odb: &git2::Odb<'_>, oid: &str) -> Result<(), Failure> {
    let missing = |what: &str| {
        let message =
            format!("the history of the project cannot be attached: {what} is not in the upstream's any more");
        Failure::new(ErrorClass::NotFound, message)
    };
    let id = Oid::from_str(oid).map_err(|_| Failure::internal(format!("{oid:?} is not an object id")))?;
    // It came with the tree.
    let commit = odb.read(id).map_err(|_| altered(format!("{oid} is not among its objects any more")))?;
    // Not by way of the library's commits: it hides the parents of a boundary.
    for line in commit.data().split(|&byte| byte == b'\n').take_while(|line| !line.is_empty()) {
        if let Some(parent) = line.strip_prefix(b"parent ") {
            let parent = String::from_utf8_lossy(parent);
            let read = Oid::from_str(&parent).and_then(|parent| odb.read(parent));
            if !read.is_ok_and(|object| object.kind() == ObjectType::Commit) {
                return Err(missing(&parent));
            }
        }
    }
    Ok(())
}

/// Writes the refs that are missing; one that is there stays, whoever wrote it.
fn write_refs(repo: &Repository, waiting: &Waiting, order: &Attach, reporter: &Reporter) -> Result<(), Failure> {
    let reached = if order.tags_within { Some(reached(repo, order, reporter)?) } else { None };
    let wanted = |(name, oid): &(&String, &String)| match &reached {
        Some(reached) => name.starts_with("refs/tags/") && reached.contains(order.peeled.get(*name).unwrap_or(oid)),
        None => true,
    };
    let missing: Vec<_> =
        order.refs.iter().filter(wanted).filter(|(name, _)| repo.find_reference(name).is_err()).collect();
    // So that the next try knows the locks that a kill leaves.
    waiting.announce(missing.iter().map(|(name, oid)| (name.as_str(), oid.as_str())))?;
    for (number, (name, oid)) in missing.into_iter().enumerate() {
        if number.is_multiple_of(256) {
            reporter.step();
        }
        if let Some(id) = Oid::from_str(oid).ok().filter(|id| repo.find_object(*id, None).is_ok()) {
            // One that its user made a moment ago, or whose name is in another's way, is theirs.
            let _ = repo.reference(name, id, false, "clone: history");
        }
    }
    let default = order.head.as_deref().and_then(|head| head.strip_prefix("refs/heads/"));
    if let Some(default) = default.filter(|_| reached.is_none()) {
        let (name, target) = ("refs/remotes/origin/HEAD", format!("refs/remotes/origin/{default}"));
        if repo.find_reference(name).is_err() && repo.find_reference(&target).is_ok() {
            let _ = repo.reference_symbolic(name, &target, false, "clone: history");
        }
    }
    Ok(())
}

/// Every commit that what was checked out leads to, as the commits say themselves.
fn reached(repo: &Repository, order: &Attach, reporter: &Reporter) -> Result<HashSet<String>, Failure> {
    let broken = |error: git2::Error| fault("its history cannot be read", &error);
    let odb = repo.odb().map_err(broken)?;
    let mut waiting: Vec<Oid> = order.shallow.iter().filter_map(|oid| Oid::from_str(oid).ok()).collect();
    let mut seen = HashSet::new();
    while let Some(id) = waiting.pop() {
        if !seen.insert(id.to_string()) {
            continue;
        }
        if seen.len().is_multiple_of(4096) {
            reporter.step();
        }
        let commit = odb.read(id).map_err(broken)?;
        for line in commit.data().split(|&byte| byte == b'\n').take_while(|line| !line.is_empty()) {
            waiting.extend(
                line.strip_prefix(b"parent ").and_then(|oid| Oid::from_str(&String::from_utf8_lossy(oid)).ok()),
            );
        }
    }
    Ok(seen)
}
