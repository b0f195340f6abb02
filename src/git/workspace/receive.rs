//! Taking a pack into a project, and proving that what it brought is whole.

use std::{
    collections::HashSet,
    io::{self, Read, Write},
    sync::mpsc::{Receiver, RecvTimeoutError, sync_channel},
    time::Duration,
};

use git2::{Indexer, ObjectType, Oid, Repository, Sort};
use rustix::fs::{AtFlags, renameat, unlinkat};

use super::{
    guard::{altered, among},
    open::fault,
    waiting::Waiting,
};
use crate::{
    failure::{ErrorClass, Failure},
    git::{
        child::{Reporter, inherited},
        projects::Dir,
        room,
    },
    protocol::Progress,
};

/// How much is read at once.
const CHUNK: usize = 128 << 10;
/// How long nothing may come before the agent is told that it is not our fault: whoever sends has a limit of its own.
const QUIET: Duration = Duration::from_secs(1);

/// Indexes the pack that comes through descriptor `number`; the objects of `repo` complete it. Of the disk `reserve`
/// bytes stay free.
///
/// # Errors
/// `corrupt` where it is cut or wrong.
pub(super) fn receive(
    repo: &Repository,
    waiting: &Waiting,
    number: i32,
    reserve: u64,
    reporter: &Reporter,
) -> Result<(), Failure> {
    let mut chunks = Chunks::new(number, reporter)?;
    let mut next = || chunks.next().map_err(Failure::from);
    let mut head = Vec::new();
    while head.len() < 12 {
        let chunk = next()?;
        if chunk.is_empty() {
            // Nothing at all means that nothing was missing.
            return if head.is_empty() { Ok(()) } else { Err(cut()) };
        }
        head.extend_from_slice(&chunk);
    }
    if head[8..12] == [0; 4] {
        return Ok(());
    }
    let odb = repo.odb().map_err(|error| fault("its objects cannot be opened", &error))?;
    // A name of the library's own in the project would be left there by a kill, as nobody's.
    let place = waiting.directory()?;
    let mut writer =
        Indexer::new(Some(&odb), &place, 0, false).map_err(|error| fault("a pack cannot be written", &error))?;
    writer.progress(|progress| {
        reporter.progress(Progress {
            phase: "resolving".to_owned(),
            done: progress.indexed_objects() as u64,
            total: Some(progress.total_objects() as u64),
            bytes: progress.received_bytes() as u64,
            ..Progress::default()
        });
        true
    });
    let mut chunk = head;
    while !chunk.is_empty() {
        room::room_within(&waiting.dir, "projects", chunk.len() as u64, reserve)?;
        if writer.write_all(&chunk).is_err() {
            return Err(write_fault());
        }
        chunk = next()?;
    }
    let name = writer.commit().map_err(|error| match error.message() {
        message if message.contains("unexpected end") || message.contains("incomplete") => cut(),
        _ => fault("a pack cannot be indexed", &error),
    })?;
    // By descriptors, so that both go to one place whatever is swapped meanwhile.
    let packs = match waiting.git.child("objects/pack") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            waiting.git.child("objects").and_then(|objects| objects.make("pack", 0o755))
        }
        found => found,
    };
    let (packs, place) = (packs.map_err(among)?, Dir::open(&place).map_err(among)?);
    let put = |kind: &str| {
        let file = format!("pack-{name}.{kind}");
        renameat(&place, file.as_str(), &packs, file.as_str()).map_err(|error| among(error.into()))
    };
    // The same pack may be there from an earlier pull.
    if packs.look(format!("pack-{name}.idx")).map_err(among)?.is_none() {
        // It is looked for once its index is there, and is nothing without it.
        put("pack")?;
        put("idx").inspect_err(|_| {
            let _ = unlinkat(&packs, format!("pack-{name}.pack"), AtFlags::empty());
        })?;
    }
    odb.refresh().map_err(|error| fault("its objects cannot be read", &error))
}

/// What comes through a descriptor, piece by piece; the agent is told when it is not our fault that nothing comes.
pub(super) struct Chunks<'a> {
    pieces: Receiver<std::io::Result<Vec<u8>>>,
    reporter: &'a Reporter,
    /// What was taken and not read yet.
    left: std::io::Cursor<Vec<u8>>,
}

impl<'a> Chunks<'a> {
    /// Reads from descriptor `number`.
    pub(super) fn new(number: i32, reporter: &'a Reporter) -> Result<Self, Failure> {
        let mut pipe = inherited(number)?;
        let (sender, pieces) = sync_channel::<std::io::Result<Vec<u8>>>(4);
        std::thread::spawn(move || {
            loop {
                let mut chunk = vec![0; CHUNK];
                let read = pipe.read(&mut chunk);
                let last = !matches!(read, Ok(1..));
                let sent = sender.send(read.map(|count| {
                    chunk.truncate(count);
                    chunk
                }));
                if last || sent.is_err() {
                    return;
                }
            }
        });
        Ok(Self { pieces, reporter, left: std::io::Cursor::default() })
    }

    /// The next piece; an empty one at the end.
    fn next(&mut self) -> std::io::Result<Vec<u8>> {
        loop {
            match self.pieces.recv_timeout(QUIET) {
                Ok(chunk) => return chunk,
                Err(RecvTimeoutError::Timeout) => self.reporter.step(),
                Err(RecvTimeoutError::Disconnected) => return Ok(Vec::new()),
            }
        }
    }
}

impl Read for Chunks<'_> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let count = self.left.read(into)?;
        if count > 0 || into.is_empty() {
            return Ok(count);
        }
        self.left = std::io::Cursor::new(self.next()?);
        self.left.read(into)
    }
}

fn cut() -> Failure {
    Failure::new(ErrorClass::Internal, "the pack from the mirror ended early")
}

/// The writer of packs says nothing of its own errors but through the library's last one.
fn write_fault() -> Failure {
    match git2::Error::last_error(-1) {
        error if room::refused(error.message()) => {
            Failure::new(ErrorClass::Disk, format!("a pack cannot be written: {}", error.message()))
        }
        error => Failure::internal(format!("a pack cannot be written: {}", error.message())),
    }
}

/// Walks every commit of `tip` that is not reachable from `known`, with its trees, and asks for every file.
///
/// # Errors
/// `not_found` where something is missing: it was not sent, or was taken out of the project.
pub(super) fn prove(repo: &Repository, tip: Oid, known: &[Oid], reporter: &Reporter) -> Result<(), Failure> {
    let absent = |what: String| Failure::new(ErrorClass::NotFound, format!("the history is incomplete: {what}"));
    let broken = |error: git2::Error| absent(error.message().to_owned());
    let odb = repo.odb().map_err(|error| fault("its objects cannot be opened", &error))?;
    let mut walk = repo.revwalk().map_err(broken)?;
    walk.set_sorting(Sort::NONE).map_err(broken)?;
    walk.push(tip).map_err(broken)?;
    for oid in known {
        if repo.find_commit(*oid).is_ok() {
            walk.hide(*oid).map_err(|error| altered(format!("its history cannot be read: {error}")))?;
        }
    }
    let mut seen = HashSet::new();
    let mut steps = 0_u64;
    for commit in walk {
        let commit = repo.find_commit(commit.map_err(broken)?).map_err(broken)?;
        let mut waiting = vec![commit.tree_id()];
        while let Some(id) = waiting.pop() {
            if !seen.insert(id) {
                continue;
            }
            let tree = repo.find_tree(id).map_err(broken)?;
            for entry in &tree {
                steps += 1;
                if steps.is_multiple_of(8192) {
                    reporter.step();
                }
                match entry.kind() {
                    Some(ObjectType::Tree) => waiting.push(entry.id()),
                    Some(ObjectType::Blob) if seen.insert(entry.id()) && !odb.exists(entry.id()) => {
                        return Err(absent(format!("{} is missing", entry.id())));
                    }
                    _ => {}
                }
            }
        }
    }
    Ok(())
}
