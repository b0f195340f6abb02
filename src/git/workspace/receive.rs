//! Taking a pack into a project, and proving that what it brought is whole.

use std::{
    collections::HashSet,
    fs,
    io::{Read, Write},
    sync::mpsc::{RecvTimeoutError, sync_channel},
    time::Duration,
};

use git2::{Indexer, ObjectType, Oid, Repository, Sort};

use super::{guard::altered, open::fault, waiting::Waiting};
use crate::{
    failure::{ErrorClass, Failure},
    git::{
        child::{Reporter, inherited},
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
    let mut pipe = inherited(number)?;
    let (sender, chunks) = sync_channel::<std::io::Result<Vec<u8>>>(4);
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
    let next = || loop {
        match chunks.recv_timeout(QUIET) {
            Ok(chunk) => return chunk.map_err(Failure::from),
            Err(RecvTimeoutError::Timeout) => reporter.step(),
            Err(RecvTimeoutError::Disconnected) => return Ok(Vec::new()),
        }
    };
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
        room::room(&place, "projects", chunk.len() as u64, reserve)?;
        if writer.write_all(&chunk).is_err() {
            return Err(write_fault());
        }
        chunk = next()?;
    }
    let name = writer.commit().map_err(|error| match error.message() {
        message if message.contains("unexpected end") || message.contains("incomplete") => cut(),
        _ => fault("a pack cannot be indexed", &error),
    })?;
    let packs = repo.path().join("objects/pack");
    fs::create_dir_all(&packs)?;
    // A pack is looked for once its index is there.
    for file in ["pack", "idx"].map(|kind| format!("pack-{name}.{kind}")) {
        fs::rename(place.join(&file), packs.join(&file))?;
    }
    odb.refresh().map_err(|error| fault("its objects cannot be read", &error))
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
/// `corrupt` where something is missing.
pub(super) fn prove(repo: &Repository, tip: Oid, known: &[Oid], reporter: &Reporter) -> Result<(), Failure> {
    let broken = |error: git2::Error| {
        Failure::new(ErrorClass::Corrupt, format!("the upstream's history is incomplete: {error}"))
    };
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
                        let message = format!("the upstream's history is incomplete: {} is missing", entry.id());
                        return Err(Failure::new(ErrorClass::Corrupt, message));
                    }
                    _ => {}
                }
            }
        }
    }
    Ok(())
}
