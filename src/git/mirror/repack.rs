//! Making one pack of many.
//!
//! The packs that a mirror has at the beginning are written into one by `git pack-objects` into a directory of its own,
//! while tasks go on reading and fetching; packs that arrive meanwhile are left alone. The result holds every object of
//! those packs, whether a ref leads to it or not, so it can take their place whatever happened since. That is a few
//! renames under the exclusive lock, now or at any later time when nobody uses the mirror. Without git on the node the
//! mirror is fetched anew beside the old one, and swapped.

use std::{
    collections::BTreeSet,
    fs::{self, DirBuilder, File},
    io::{self, Write},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    time::Duration,
};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Mirrors, Want, lock, packs};
use crate::{
    failure::{ErrorClass, Failure},
    git::{
        Fence, Run,
        child::{Access, Confined, Reporter, Role, serve},
        program::git,
        settings::Repack,
        transfer,
    },
};

/// More packs than this make every lookup of an object slow.
const MOST_PACKS: usize = 20;
/// Growth below this is not worth a process.
const LEAST_GROWTH: u64 = 1 << 20;
/// How long an exclusive lock is tried for before the result is left for the next upkeep.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often a repacking child says that it lives.
const TICK: Duration = Duration::from_secs(1);
/// Where in a mirror the new pack is made.
const PLACE: &str = "repack";
/// There: the packs that the new one replaces, written last.
const REPLACES: &str = "replaces";
/// In a mirror: how many bytes its packs had after they were repacked.
const BASELINE: &str = "repacked";

/// What a repacking child is told.
#[derive(Serialize, Deserialize)]
pub(in crate::git) struct Request {
    /// The mirror.
    pub(in crate::git) mirror: PathBuf,
}

impl Confined for Request {
    fn access(&self) -> Access {
        Access { writes: vec![self.mirror.clone()], programs: true, ..Access::default() }
    }
}

/// What it answers.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Repacked {
    /// There is a new pack to be taken in.
    Ready,
    /// There is no git that can do it.
    NoGit,
}

/// Upkeep belongs to no task.
struct Always;

#[async_trait]
impl Fence for Always {
    async fn check(&self) -> Result<(), Failure> {
        Ok(())
    }
}

impl Mirrors {
    /// Repacks a mirror that needs it.
    pub(super) async fn repack(&self, key: &str, request: &transfer::Request) -> Result<(), Failure> {
        if self.settings.repack == Repack::Off || !self.blocking(key, is_worn).await? {
            return Ok(());
        }
        let run = Run {
            deadline: Instant::now() + self.settings.max_timeout,
            stall: self.settings.stall,
            cancel: CancellationToken::new(),
            progress: &|_| (),
            fence: &Always,
        };
        if self.settings.repack == Repack::Git {
            let order = Request { mirror: self.path(key) };
            // Nobody removes the mirror meanwhile.
            let shared = lock::shared(self.lock_path(key), &run).await?;
            let repacked: Repacked = self.children.run(Role::Upkeep, &order, Vec::new(), &run).await?;
            drop(shared);
            if repacked == Repacked::Ready {
                return self.blocking(key, |directory, key| patiently(directory, key, settle)).await;
            }
        }
        self.fetch_beside(key, request, &run).await
    }

    /// Fetches the upstream of `request` anew and puts that in the mirror's place.
    async fn fetch_beside(&self, key: &str, request: &transfer::Request, run: &Run<'_>) -> Result<(), Failure> {
        let beside = format!("{key}.git.new-{:032x}", rand::random::<u128>());
        let path = self.directory.join(&beside);
        let request = transfer::Request { mirror: path.clone(), want: Want::All, ..request.clone() };
        let fetched = match self.transfer(&beside, &request, None, run).await.0 {
            Ok(transfer::Landed::Brought(_)) => Ok(()),
            Ok(transfer::Landed::Damaged { damaged }) => Err(Failure::new(ErrorClass::Corrupt, damaged)),
            Err(failure) => Err(failure),
        };
        self.blocking(key, move |directory, key| {
            if fetched.is_ok() {
                note_baseline(&path)?;
                patiently(directory, key, |mirror| {
                    let old = mirror.with_extension(format!("git.old-{:032x}", rand::random::<u128>()));
                    fs::rename(mirror, &old)?;
                    fs::rename(&path, mirror)?;
                    fs::remove_dir_all(old)
                })?;
            }
            match fs::remove_dir_all(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(fetched),
            }
        })
        .await?
    }
}

/// Does `work` on a mirror as soon as nobody uses it; not at all if that takes long.
fn patiently(directory: &Path, key: &str, work: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
    let begun = std::time::Instant::now();
    while begun.elapsed() < PATIENCE {
        if let Some(_lock) = lock::exclusive(&directory.join(format!("{key}.lock")))? {
            return work(&directory.join(format!("{key}.git")));
        }
        std::thread::sleep(lock::POLL);
    }
    Ok(())
}

/// Whether a mirror is to be repacked. The first look at one decides what it is compared with later.
fn is_worn(directory: &Path, key: &str) -> io::Result<bool> {
    let mirror = directory.join(format!("{key}.git"));
    let (count, bytes) = match packs::names(&mirror) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        names => (names?.len(), packs::weight(&mirror)?),
    };
    let baseline = fs::read_to_string(mirror.join(BASELINE)).ok().and_then(|text| text.trim().parse().ok());
    if baseline.is_none() {
        note_baseline(&mirror)?;
    }
    Ok(worn(count, bytes, baseline))
}

/// `baseline` is how many bytes the packs had when they were repacked last.
fn worn(packs: usize, bytes: u64, baseline: Option<u64>) -> bool {
    let grown = baseline.is_some_and(|baseline| {
        bytes > baseline.saturating_mul(13) / 10 && bytes.saturating_sub(baseline) >= LEAST_GROWTH
    });
    packs > MOST_PACKS || (packs > 1 && grown)
}

fn note_baseline(mirror: &Path) -> io::Result<()> {
    fs::write(mirror.join(BASELINE), format!("{}\n", packs::weight(mirror)?))
}

/// Takes in what was repacked, or removes what of it is not whole. Nobody else may be using the mirror.
///
/// Every step can be done again after a crash.
pub(super) fn settle(mirror: &Path) -> io::Result<()> {
    let place = mirror.join(PLACE);
    let replaced: BTreeSet<String> = match fs::read_to_string(place.join(REPLACES)) {
        Ok(text) => text.lines().map(str::to_owned).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return match fs::remove_dir_all(&place) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            };
        }
        Err(error) => return Err(error),
    };
    let packs = packs::directory(mirror);
    let mut arrived: Vec<PathBuf> =
        fs::read_dir(&place)?.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<_>>()?;
    // The index last: with it the pack is there.
    arrived.sort_by_key(|path| path.extension().is_some_and(|end| end == "idx"));
    for path in arrived {
        if let Some(name) = path.file_name().filter(|name| name.as_encoded_bytes().starts_with(b"pack-")) {
            fs::rename(&path, packs.join(name))?;
        }
    }
    File::open(&packs)?.sync_all()?;
    packs::record_these(mirror, &packs::names(mirror)?.difference(&replaced).cloned().collect())?;
    for name in &replaced {
        for end in ["idx", "rev", "pack"] {
            match fs::remove_file(packs.join(format!("{name}.{end}"))) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
    }
    note_baseline(mirror)?;
    fs::remove_dir_all(&place)
}

/// `haul child upkeep`.
pub(in crate::git) fn main() -> ExitCode {
    // It is nobody's task: everything else goes first. Shut in, it could not say so any more.
    let _ = rustix::process::nice(19);
    serve(|request: Request, reporter| repack(&request, reporter))
}

/// Writes all packs of a mirror into one, beside them.
fn repack(request: &Request, reporter: &Reporter) -> Result<Repacked, Failure> {
    let place = request.mirror.join(PLACE);
    if place.join(REPLACES).exists() {
        // Made before, and waiting for its moment.
        return Ok(Repacked::Ready);
    }
    let _ = fs::remove_dir_all(&place);
    DirBuilder::new().mode(0o700).create(&place)?;
    let names = packs::names(&request.mirror)?;
    let started = command(&request.mirror, &place).spawn();
    let mut child = match started {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Repacked::NoGit),
        other => other?,
    };
    let (mut input, list) = (child.stdin.take(), names.iter().flat_map(|name| [name, ".pack\n"]).collect::<String>());
    // A program that reads nothing says why by its end.
    let _ = input.as_mut().map(|input| input.write_all(list.as_bytes()));
    drop(input);
    let (over, ended) = std::sync::mpsc::channel::<()>();
    let output = std::thread::scope(|scope| {
        scope.spawn(move || {
            while ended.recv_timeout(TICK) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                reporter.step();
            }
        });
        let output = child.wait_with_output();
        drop(over);
        output
    })?;
    // It does not know what was asked of it: older than 2.32.
    if output.status.code() == Some(129) {
        fs::remove_dir_all(&place)?;
        return Ok(Repacked::NoGit);
    }
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(Failure::internal(format!("git pack-objects ended with {}: {}", output.status, said.trim())));
    }
    let mut replaces = names;
    for entry in fs::read_dir(&place)? {
        let path = entry?.path();
        File::open(&path)?.sync_all()?;
        // Out of one pack comes that same pack, which does not replace itself.
        replaces.retain(|name| path.file_stem().is_none_or(|stem| stem != name.as_str()));
    }
    let replaces: String = replaces.iter().flat_map(|name| [name, "\n"]).collect();
    let new = place.join("replaces.lock");
    let mut file = File::create(&new)?;
    file.write_all(replaces.as_bytes())?;
    file.sync_all()?;
    fs::rename(new, place.join(REPLACES))?;
    File::open(&place)?.sync_all()?;
    Ok(Repacked::Ready)
}

/// Git with arguments of ours alone: no configuration but that of the mirror, which is ours, no hooks, no prompts.
fn command(mirror: &Path, place: &Path) -> Command {
    let mut command = git();
    command
        .args(["-c", "core.hooksPath=/dev/null", "-c", "gc.auto=0", "-c", "maintenance.auto=false"])
        .args(["-c", "pack.writeReverseIndex=false", "--git-dir"])
        .arg(mirror)
        .args(["pack-objects", "-q", "--stdin-packs", "--delta-base-offset", "--threads=1", "--end-of-options"])
        .arg(place.join("pack"))
        .env("GIT_OPTIONAL_LOCKS", "0")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mirror_is_repacked_for_many_packs_or_much_growth() {
        let mib = 1 << 20;
        for (packs, bytes, baseline, expected) in [
            (1, 10 * mib, None, false),
            (20, 10 * mib, None, false),
            (21, 10, None, true),
            (21, 10, Some(10), true),
            (2, 13 * mib, Some(10 * mib), false),
            (2, 13 * mib + 1, Some(10 * mib), true),
            // One pack cannot be made fewer, and little growth is not worth it.
            (1, 20 * mib, Some(10 * mib), false),
            (5, 3000, Some(1000), false),
            (2, u64::MAX, Some(u64::MAX), false),
        ] {
            assert_eq!(worn(packs, bytes, baseline), expected, "{packs} {bytes} {baseline:?}");
        }
    }

    #[test]
    fn what_was_repacked_takes_the_place_of_what_it_replaces_also_when_done_twice() {
        let place = tempfile::tempdir().unwrap();
        let mirror = place.path();
        let packs = packs::directory(mirror);
        fs::create_dir_all(&packs).unwrap();
        let write = |path: PathBuf| fs::write(path, "x").unwrap();
        for name in ["pack-1", "pack-2", "pack-later"] {
            write(packs.join(format!("{name}.pack")));
            write(packs.join(format!("{name}.idx")));
        }
        // Not whole: goes.
        fs::create_dir(mirror.join(PLACE)).unwrap();
        write(mirror.join(PLACE).join("pack-3.pack"));
        settle(mirror).unwrap();
        assert!(!mirror.join(PLACE).exists() && packs::names(mirror).unwrap().len() == 3);
        for _ in 0..2 {
            fs::create_dir(mirror.join(PLACE)).unwrap();
            for name in ["pack-3.pack", "pack-3.idx"] {
                write(mirror.join(PLACE).join(name));
            }
            fs::write(mirror.join(PLACE).join(REPLACES), "pack-1\npack-2\n").unwrap();
            settle(mirror).unwrap();
            let names: Vec<String> = packs::names(mirror).unwrap().into_iter().collect();
            assert_eq!(names, ["pack-3", "pack-later"]);
            assert!(!mirror.join(PLACE).exists());
        }
    }
}
