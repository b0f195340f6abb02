//! The pack role: reads one mirror and streams what is asked for into a pipe.

mod shallow;

use std::{
    io::{self, Write},
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use git2::{ErrorCode, Oid, PackBuilder, PackBuilderStage, Repository};
use serde::{Deserialize, Serialize};

use super::{
    Run,
    child::{Access, Children, Confined, Reporter, Role, inherited, serve},
    workspace::forget_search_paths,
};
use crate::failure::{ErrorClass, Failure};

/// How often a sign of life is given.
const TICK: Duration = Duration::from_millis(250);

/// What was streamed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Packed {
    /// Objects in the pack; 0 where the haves lead to everything, and then nothing was written.
    pub objects: u64,
    /// Bytes of the pack.
    pub bytes: u64,
}

#[derive(Serialize, Deserialize)]
struct Request {
    mirror: PathBuf,
    wants: Vec<String>,
    haves: Vec<String>,
    #[serde(default)]
    boundary: Vec<String>,
    into: i32,
}

impl Confined for Request {
    fn access(&self) -> Access {
        Access { reads: vec![self.mirror.clone()], descriptors: vec![self.into], ..Access::default() }
    }
}

/// Streams a pack of everything reachable from `wants` and not from `haves` out of `mirror` into `into`.
///
/// A have that the mirror does not know is ignored. Where a project's history ends at a `boundary`, its haves lead no
/// further than that: what lies behind is sent where something else of the wants leads to it. The pack needs no object from outside to be read. The other
/// end of `into` sees the end of the stream once the child has ended.
///
/// # Errors
/// `not_found` for a want that the mirror lacks; otherwise as [`Children::run`].
pub async fn stream(
    children: &Children,
    mirror: &Path,
    wants: &[String],
    haves: &[String],
    boundary: &[String],
    into: OwnedFd,
    run: &Run<'_>,
) -> Result<Packed, Failure> {
    let request = Request {
        mirror: mirror.to_owned(),
        wants: wants.to_vec(),
        haves: haves.to_vec(),
        boundary: boundary.to_vec(),
        into: into.as_raw_fd(),
    };
    children.run(Role::Pack, &request, vec![into], run).await
}

/// `haul child pack`.
pub(super) fn main() -> ExitCode {
    serve(|request: Request, reporter| pack(&request, reporter))
}

fn pack(request: &Request, reporter: &Reporter) -> Result<Packed, Failure> {
    let mut into = inherited(request.into)?;
    forget_search_paths();
    let repository = Repository::open_bare(&request.mirror).map_err(damaged)?;
    if !request.boundary.is_empty() {
        let builder = shallow::builder(&repository, request, reporter)?;
        return write(builder, &mut into, reporter);
    }
    let mut walk = repository.revwalk().map_err(damaged)?;
    let mut builder = repository.packbuilder().map_err(damaged)?;
    for want in &request.wants {
        let missing = || Failure::new(ErrorClass::NotFound, format!("the mirror has no object {want}"));
        let oid = Oid::from_str(want).map_err(|_| missing())?;
        let unreadable =
            |error: git2::Error| if error.code() == ErrorCode::NotFound { missing() } else { damaged(error) };
        let object = repository.find_object(oid, None).map_err(unreadable)?;
        insert(&object, &mut builder, &mut walk).map_err(damaged)?;
    }
    for have in &request.haves {
        // A tip of the user's own that the upstream never had: no help, no harm.
        let known = Oid::from_str(have).ok().and_then(|oid| repository.find_object(oid, None).ok());
        if let Some(commit) = known.and_then(|object| object.peel_to_commit().ok()) {
            walk.hide(commit.id()).map_err(damaged)?;
        }
    }
    builder.insert_walk(&mut walk).map_err(damaged)?;
    drop(walk);
    write(builder, &mut into, reporter)
}

/// Has `object` packed: commits and what they lead to by the walk, annotated tags and all else by themselves.
fn insert(
    object: &git2::Object<'_>,
    builder: &mut PackBuilder<'_>,
    walk: &mut git2::Revwalk<'_>,
) -> Result<(), git2::Error> {
    if let Some(tag) = object.as_tag() {
        builder.insert_object(tag.id(), None)?;
        return insert(&tag.target()?, builder, walk);
    }
    match object.as_commit() {
        Some(commit) => walk.push(commit.id()),
        None => builder.insert_recursive(object.id(), None),
    }
}

fn write<'a>(mut builder: PackBuilder<'a>, into: &mut impl Write, reporter: &'a Reporter) -> Result<Packed, Failure> {
    let objects = builder.object_count() as u64;
    if objects == 0 {
        return Ok(Packed { objects, bytes: 0 });
    }
    let mut told = Instant::now();
    let mut bytes = 0;
    let mut stopped: Option<io::Error> = None;
    // Making deltas happens before the first byte: a step then is a sign of life.
    builder
        .set_progress_callback(move |stage, _, _| {
            if matches!(stage, PackBuilderStage::Deltafication) && told.elapsed() >= TICK {
                told = Instant::now();
                reporter.step();
            }
            true
        })
        .map_err(damaged)?;
    let mut lately = Instant::now();
    let written = builder.foreach(|chunk| {
        if let Err(error) = into.write_all(chunk) {
            stopped = Some(error);
            return false;
        }
        bytes += chunk.len() as u64;
        if lately.elapsed() >= TICK {
            lately = Instant::now();
            reporter.step();
        }
        true
    });
    match (stopped, written) {
        (Some(error), _) => Err(Failure::internal(format!("the reader of a pack is gone: {error}"))),
        (None, Err(error)) => Err(damaged(error)),
        (None, Ok(())) => Ok(Packed { objects, bytes }),
    }
}

fn damaged(error: git2::Error) -> Failure {
    let class = if error.code() == ErrorCode::Owner { ErrorClass::Forbidden } else { ErrorClass::Corrupt };
    Failure::new(class, format!("a mirror of this node cannot be read: {}", error.message()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pack_child_reads_one_mirror_and_writes_to_one_pipe() {
        let request =
            Request { mirror: "/m.git".into(), wants: Vec::new(), haves: Vec::new(), boundary: Vec::new(), into: 5 };
        let wanted = Access { reads: vec!["/m.git".into()], descriptors: vec![5], ..Access::default() };
        assert_eq!(request.access(), wanted);
    }
}
