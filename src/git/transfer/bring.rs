//! Bringing a mirror up to date, and filling a tip store.

use std::{collections::BTreeSet, num::NonZeroU32, path::Path};

use super::{
    Answer, Granted, Heard, Landed, Question, Received, Request, Transport,
    bare::{Bare, Found},
    journey::{self, Journey},
};
use crate::{
    failure::{ErrorClass, Failure},
    git::mirror::{Listing, Source, Want},
};

/// Brings the mirror up to what `request` wants.
///
/// Whoever finds everything there only reads. Whoever does not asks for the right to write, looks again, since others
/// may have brought it meanwhile, and lists again if something is still missing then.
pub(super) fn mirrored(request: &Request, journey: &Journey<'_>) -> Result<Landed, Failure> {
    let (path, want) = (&request.mirror, &request.want);
    let mut transport = (journey.connect)()?;
    let mut listing = transport.list()?;
    let mut wants = wanted(want, &listing)?;
    if let Found::Whole(bare) = Bare::find(path)?
        && bare.lacks(&wants, want).is_empty()
        && let Some(listing) = bare.serves(&listing, want)?
    {
        return brought(&bare, listing, want, Received::default());
    }
    let granted: Granted = journey.reporter.ask(&Question::Turn)?;
    let mut bare = match Bare::find(path)? {
        Found::Whole(bare) => bare,
        // An upstream that refuses the listing leaves no trace on the disk.
        Found::Nothing => Bare::create(path)?,
        Found::Damaged(damaged) => return Ok(Landed::Damaged { damaged }),
    };
    bare.sweep()?;
    if granted.waited && !bare.lacks(&wants, want).is_empty() {
        // What was listed before the wait may be gone by now, and the upstream may have hung up.
        journey.reporter.ask::<_, ()>(&Question::Place)?;
        transport = (journey.connect)()?;
        listing = transport.list()?;
        wants = wanted(want, &listing)?;
    }
    let lacking = bare.lacks(&wants, want);
    if request.tell && !lacking.is_empty() {
        journey.reporter.ask::<_, ()>(&Question::Heard(Heard { listing: listing.clone(), lacking }))?;
    }
    bare.retain_missing(&mut wants);
    let mut received = Received::default();
    if !wants.is_empty() {
        received = journey.receive(&mut bare, &mut transport, &wants, &listing, request.time_left)?;
        bare.retain_missing(&mut wants);
        if let Some(oid) = wants.first() {
            let message = format!("the upstream listed {oid} but did not send it");
            return Err(Failure::new(ErrorClass::Network, message));
        }
    } else if *want == Want::All {
        // The last transfer was killed when it had brought everything.
        journey::forget(&bare)?;
    }
    let listing = bare.adopt(&listing, want)?;
    if let Want::Commit(oid) = want
        && !bare.has(oid)
    {
        // Not below any ref: most servers hand it out all the same if they have it.
        let wants = BTreeSet::from([oid.clone()]);
        let more = transport.receive(&bare, &wants, None).map_err(|failure| unless_absent(failure, oid))?;
        received = Received { objects: received.objects + more.objects, bytes: received.bytes + more.bytes };
        bare.take_in(&wants, journey.reporter)?;
    }
    brought(&bare, listing, want, received)
}

/// Fills the tip store at `path`, anew, with `depth` commits of the history of each of `wants`.
pub(super) fn tipped(
    path: &Path,
    listing: &Listing,
    wants: &[String],
    depth: u32,
    transport: &mut dyn Transport,
) -> Result<Landed, Failure> {
    // Listed as for every transfer: that is the authorisation. What it says by now is the next task's matter.
    transport.list()?;
    let listed: BTreeSet<&String> = listing.refs.values().chain(listing.peeled.values()).collect();
    let unlisted: Vec<&String> = wants.iter().filter(|oid| !listed.contains(oid)).collect();
    let wants: BTreeSet<String> = wants.iter().cloned().collect();
    let depth = NonZeroU32::new(depth).ok_or_else(|| Failure::invalid("a depth must be at least 1"))?;
    let mut bare = Bare::anew(path)?;
    let mut received = transport.receive(&bare, &wants, Some(depth)).map_err(|failure| match unlisted.first() {
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
    let mut adopted = bare.adopt(listing, &Want::All)?;
    // Not every engine has the tags sent along that point to what it receives.
    let pointing =
        listing.peeled.iter().filter(|(_, target)| bare.has(target)).filter_map(|(name, _)| listing.refs.get(name));
    let tags: BTreeSet<String> = pointing.filter(|oid| !bare.has(oid)).cloned().collect();
    if !tags.is_empty() {
        let more = transport.receive(&bare, &tags, None)?;
        received = Received { objects: received.objects + more.objects, bytes: received.bytes + more.bytes };
        bare.refresh()?;
        adopted = bare.adopt(listing, &Want::All)?;
    }
    let (Received { objects, bytes: received_bytes }, listing, source) = (received, adopted, Source::Upstream);
    Ok(Landed::Brought(Answer { listing, objects, received_bytes, source, shallow }))
}

/// The objects that `want` needs of `listing`.
fn wanted(want: &Want, listing: &Listing) -> Result<BTreeSet<String>, Failure> {
    match want {
        Want::All | Want::Commit(_) => Ok(listing.refs.values().cloned().collect()),
        Want::Branch(branch) => {
            let oid = listing.refs.get(&format!("refs/heads/{branch}")).ok_or_else(|| {
                Failure::new(ErrorClass::NotFound, format!("the upstream has no branch \"{branch}\""))
            })?;
            Ok(BTreeSet::from([oid.clone()]))
        }
    }
}

fn brought(bare: &Bare, listing: Listing, want: &Want, received: Received) -> Result<Landed, Failure> {
    if let Want::Commit(oid) = want {
        bare.require_commit(oid)?;
    }
    let source = if received.bytes > 0 { Source::Upstream } else { Source::Mirror };
    let Received { objects, bytes: received_bytes } = received;
    Ok(Landed::Brought(Answer { listing, objects, received_bytes, source, shallow: Vec::new() }))
}

/// `not_found` where the upstream says that it has no such object.
fn unless_absent(failure: Failure, oid: &str) -> Failure {
    if failure.message.contains("not our ref") {
        return Failure::new(ErrorClass::NotFound, format!("the upstream has no commit {oid}"));
    }
    failure
}
