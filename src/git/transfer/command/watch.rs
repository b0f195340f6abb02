//! Bounds on what git writes while it writes: how much, and how much of the disk stays free.

use std::{
    collections::BTreeSet, ffi::OsString, fs, path::Path, process::Child, sync::atomic::Ordering, time::Duration,
};

use gix::progress::StepShared;
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, setrlimit};

use super::said::Listening;
use crate::{
    failure::{ErrorClass, Failure},
    git::room,
};

/// How often is looked.
const TICK: Duration = Duration::from_millis(50);
/// How long git may take to end when it was asked to.
const GRACE: Duration = Duration::from_secs(2);

/// What is watched.
pub(super) struct Watch<'a> {
    /// Where packs arrive.
    pub(super) packs: &'a Path,
    /// What was there before.
    pub(super) before: &'a BTreeSet<OsString>,
    /// The most bytes of one pack.
    pub(super) most: u64,
    /// How many bytes of the disk are to stay free.
    pub(super) reserve: u64,
    /// Where the bytes that have arrived are counted.
    pub(super) seen: &'a StepShared,
}

impl Watch<'_> {
    /// Looks until git and all that it started have fallen silent; ends it and says why where a bound is passed.
    pub(super) fn until_silent(&self, child: &Child, listening: &Listening) -> Option<Failure> {
        while !listening.over_within(TICK) {
            if let Err(failure) = self.look() {
                // It lets go of its helpers and its temporary files.
                signal(child, Signal::TERM);
                if !listening.over_within(GRACE) {
                    signal(child, Signal::KILL);
                }
                return Some(failure);
            }
        }
        None
    }

    fn look(&self) -> Result<(), Failure> {
        let mut bytes = 0;
        for entry in fs::read_dir(self.packs)?.flatten() {
            let name = entry.file_name();
            if name.as_encoded_bytes().starts_with(b"tmp_pack_") && !self.before.contains(&name) {
                // Renamed in between, perhaps.
                bytes += entry.metadata().map_or(0, |metadata| metadata.len());
            }
        }
        self.seen.fetch_max(usize::try_from(bytes).unwrap_or(usize::MAX), Ordering::Relaxed);
        if bytes > self.most {
            return Err(too_large());
        }
        room(self.packs, "mirrors", 0, self.reserve)
    }
}

/// The failure for a pack beyond the bound.
pub(super) fn too_large() -> Failure {
    Failure::new(ErrorClass::Quota, "the upstream sends more than this node takes (git.max_bytes for a pack)")
}

/// Does `start`, and no file that what it starts writes may grow beyond `most`, however fast it does.
pub(super) fn limiting_files<T>(most: u64, start: impl FnOnce() -> T) -> T {
    // What is started inherits the limit of this process, which takes it back: another's cannot be set from here.
    let now = getrlimit(Resource::Fsize);
    let most = now.current.map_or(most, |current| current.min(most));
    let limited = setrlimit(Resource::Fsize, Rlimit { current: Some(most), ..now }).is_ok();
    let started = start();
    if limited {
        let _ = setrlimit(Resource::Fsize, now);
    }
    started
}

fn signal(child: &Child, signal: Signal) {
    if let Some(pid) = pid(child) {
        // Not yet waited for: the number is still its own.
        let _ = kill_process(pid, signal);
    }
}

fn pid(child: &Child) -> Option<Pid> {
    i32::try_from(child.id()).ok().and_then(Pid::from_raw)
}
