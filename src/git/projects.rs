//! The projects directory: whose directory is whose, and every step that makes one appear or go.
//!
//! ```text
//! <projects>/<target_path>                 a project, its owner's
//! <projects>/.haul/                        the agent's (0711)
//!     <task>-<random>/                     a project in the making
//!     owners/<target_path>                 its binding
//!     gone/<project_id>                    what is kept of a deleted project
//!     pulls/<target_path>                  a pull that writes into the working tree just now
//!     trash/                               what is being removed
//! ```
//!
//! Everything here blocks for as long as a disk does; it is called from a thread that may.

mod binding;
mod dir;
mod objects;
mod remove;

use std::{
    collections::HashMap,
    ffi::OsStr,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use rustix::fs::FileType;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

pub(crate) use self::binding::{Applied, Binding, Follows, Stamp, Tombstone};
pub(crate) use self::dir::{Dir, Identity};
use crate::{
    failure::Failure,
    protocol::{ProjectId, TargetPath, TaskId},
};

/// The name of the agent's own directory; no `target_path` begins with a dot.
const OURS: &str = ".haul";
/// The directories in it that are not projects in the making.
const FIXED: [&str; 4] = ["owners", "gone", "pulls", "trash"];
/// The longest file of ours, in bytes; it only guards against a mistake.
const LONGEST: u64 = 1 << 20;

/// The projects of this agent.
#[derive(Debug)]
pub(crate) struct Projects {
    path: PathBuf,
    root: Dir,
    ours: Dir,
    owners: Dir,
    gone: Dir,
    pulls: Dir,
    trash: Dir,
    /// Held while a directory is placed or taken away, so that two projects never write one binding.
    known: Mutex<Known>,
}

/// What the files say, read once at start.
#[derive(Debug, Default)]
struct Known {
    bindings: HashMap<ProjectId, Binding>,
    targets: HashMap<String, ProjectId>,
    tombstones: HashMap<ProjectId, Tombstone>,
}

/// A project in the making. Dropping it leaves the directory to [`Projects::discard`] or the next start.
#[derive(Debug)]
pub(crate) struct Staging {
    name: String,
    dir: Dir,
}

/// What a pull was about to write when it was interrupted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PullNote {
    /// The project.
    pub(crate) project: ProjectId,
    /// The commit that was checked out; `None` where there was none yet.
    pub(crate) old: Option<String>,
    /// The commit that was being checked out.
    pub(crate) new: String,
}

/// What a clone finds at its target.
#[derive(Debug)]
pub(crate) enum Site {
    /// The very project, usable.
    There(Box<Binding>, Dir),
    /// Nothing in the way.
    Free,
}

impl Projects {
    /// Opens the directory, makes what is missing in it, reads what is known and sweeps what a crash left.
    ///
    /// # Errors
    /// When the directory is a link or cannot be made, read or written.
    pub(crate) fn open(path: &Path) -> Result<Self, Failure> {
        std::fs::create_dir_all(path).map_err(|error| at(path, error))?;
        let root = Dir::open(path).map_err(|error| at(path, error))?;
        let ours = root.ensure(OURS, 0o711).map_err(|error| at(path, error))?;
        let [owners, gone, pulls, trash] = FIXED.map(|name| ours.ensure(name, 0o700));
        let projects = Self {
            path: path.to_owned(),
            owners: owners?,
            gone: gone?,
            pulls: pulls?,
            trash: trash?,
            root,
            ours,
            known: Mutex::default(),
        };
        projects.read()?;
        projects.sweep()?;
        Ok(projects)
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        // Every change of the map is one insertion: a panic leaves nothing half-done in it.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self) -> Result<(), Failure> {
        let mut known = self.known();
        for tombstone in read_all::<Tombstone>(&self.gone)? {
            known.tombstones.insert(tombstone.project, tombstone);
        }
        for binding in read_all::<Binding>(&self.owners)? {
            // Of a crash between two steps: the side that was written later counts.
            let later = known.tombstones.get(&binding.project).map(|tombstone| tombstone.applied.seq);
            let other = known.bindings.get(&binding.project).map(|other| other.applied.seq);
            if later.max(other).is_some_and(|seq| seq > binding.applied.seq) {
                self.owners.unlink_durably(&binding.target)?;
                continue;
            }
            if let Some(stale) = known.bindings.remove(&binding.project) {
                self.owners.unlink_durably(&stale.target)?;
                known.targets.remove(&stale.target);
            }
            known.targets.insert(binding.target.clone(), binding.project);
            known.bindings.insert(binding.project, binding);
        }
        Ok(())
    }

    /// Removes projects in the making and trash, and notes of pulls whose project is gone.
    fn sweep(&self) -> Result<(), Failure> {
        for (name, _) in self.ours.entries()? {
            if !FIXED.iter().any(|fixed| OsStr::new(fixed) == name) {
                remove_loudly(&self.ours, &name);
            }
        }
        for (name, _) in self.trash.entries()? {
            remove_loudly(&self.trash, &name);
        }
        let known = self.known();
        for (name, _) in self.pulls.entries()? {
            if !name.to_str().is_some_and(|target| known.targets.contains_key(target)) {
                remove_loudly(&self.pulls, &name);
            }
        }
        Ok(())
    }

    /// Refuses to go on where the path no longer leads to the directory that was opened.
    fn same_root(&self) -> Result<(), Failure> {
        let same = Dir::open(&self.path).and_then(|now| Ok(now.identity()? == self.root.identity()?));
        if same.unwrap_or(false) {
            return Ok(());
        }
        Err(Failure::forbidden("the projects directory was replaced while the agent ran; restart it"))
    }

    /// The binding and the tombstone of a project.
    pub(crate) fn of(&self, project: ProjectId) -> (Option<Binding>, Option<Tombstone>) {
        let known = self.known();
        (known.bindings.get(&project).cloned(), known.tombstones.get(&project).cloned())
    }

    /// The directory of a bound project; `None` where it is gone or is another one by now.
    ///
    /// # Errors
    /// When it cannot be looked at, or the projects directory was replaced.
    pub(crate) fn directory(&self, binding: &Binding) -> Result<Option<Dir>, Failure> {
        self.same_root()?;
        let bound = |stat| Identity::of(&stat) == binding.directory;
        if !self.root.look(&binding.target)?.is_some_and(bound) {
            return Ok(None);
        }
        let dir = self.root.child(&binding.target)?;
        Ok((dir.identity()? == binding.directory).then_some(dir))
    }

    /// What a clone of `project` from `url` finds at `target`.
    ///
    /// # Errors
    /// `conflict` where it is another's, foreign, a second upstream, or the project is elsewhere already.
    pub(crate) fn site(&self, project: ProjectId, url: &str, target: &TargetPath) -> Result<Site, Failure> {
        self.same_root()?;
        let target = target.as_str();
        if let Some(other) = self.known().targets.get(target).filter(|&&other| other != project) {
            return Err(Failure::conflict(format!("{target} belongs to project {other}; choose another target_path")));
        }
        if let (Some(binding), _) = self.of(project)
            && let Some(dir) = self.directory(&binding)?
        {
            if binding.target != target {
                let place = &binding.target;
                return Err(Failure::conflict(format!("project {project} is at {place} already; delete it first")));
            }
            if binding.url != url {
                return Err(Failure::conflict(format!(
                    "{target} holds project {project} from {}; delete it before cloning from another address",
                    binding.url
                )));
            }
            return Ok(Site::There(Box::new(binding), dir));
        }
        if self.root.look(target)?.is_some() {
            return Err(Failure::conflict(format!("{target} exists and is no project of this agent")));
        }
        Ok(Site::Free)
    }

    /// Makes a directory for a project in the making, entered by the agent alone.
    ///
    /// # Errors
    /// When it cannot be made.
    pub(crate) fn stage(&self, task: &TaskId) -> Result<Staging, Failure> {
        self.same_root()?;
        let name = format!("{task}-{:032x}", rand::random::<u128>());
        let dir = self.ours.make(&name, 0o700)?;
        Ok(Staging { name, dir })
    }

    /// Copies the objects of `mirror` into a project in the making.
    ///
    /// # Errors
    /// When that fails, or what `moved` said.
    pub(crate) fn copy_objects(
        &self,
        staging: &Staging,
        mirror: &Path,
        moved: &mut dyn FnMut(u64) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let git = staging.dir.ensure(".git", 0o755)?;
        objects::copy(mirror, &git.ensure("objects", 0o755)?, moved)
    }

    /// Writes everything of a project in the making to the disk, once for all its files.
    ///
    /// # Errors
    /// `disk` where the disk refuses.
    pub(crate) fn flush(&self, staging: &Staging) -> Result<(), Failure> {
        staging.dir.set_mode(0o755)?;
        // A file system whose device failed keeps the error for this call.
        rustix::fs::syncfs(&staging.dir).map_err(io::Error::from)?;
        Ok(())
    }

    /// Lets a project in the making appear under its name: the binding first, durable, then one rename.
    ///
    /// # Errors
    /// `conflict` where something stands there by now; the former binding is then in force again.
    pub(crate) fn place(&self, staging: &Staging, mut binding: Binding, stamp: &Stamp) -> Result<Binding, Failure> {
        self.same_root()?;
        let mut known = self.known();
        let target = binding.target.clone();
        if let Some(other) = known.targets.get(&target).filter(|&&other| other != binding.project) {
            return Err(Failure::conflict(format!("{target} belongs to project {other} by now")));
        }
        if self.root.look(&target)?.is_some() {
            return Err(Failure::conflict(format!("{target} exists by now and is no project of this agent")));
        }
        let former = known.bindings.get(&binding.project).cloned();
        let tombstone = known.tombstones.get(&binding.project);
        binding.applied = former.as_ref().map(|b| &b.applied).or(tombstone.map(|t| &t.applied)).cloned().unwrap_or_default();
        binding.applied.advance(stamp);
        binding.directory = staging.dir.identity()?;
        self.owners.write_durably(&target, &text(&binding)?)?;
        if let Err(error) = self.ours.rename_to(&staging.name, &self.root, &target) {
            match former.as_ref().filter(|former| former.target == target) {
                Some(former) => self.owners.write_durably(&target, &text(former)?)?,
                None => self.owners.unlink_durably(&target)?,
            }
            return Err(if error.kind() == io::ErrorKind::AlreadyExists {
                Failure::conflict(format!("{target} exists by now and is no project of this agent"))
            } else {
                error.into()
            });
        }
        self.root.sync()?;
        self.ours.sync()?;
        if let Some(former) = former.filter(|former| former.target != target) {
            self.owners.unlink_durably(&former.target)?;
            known.targets.remove(&former.target);
        }
        if known.tombstones.remove(&binding.project).is_some() {
            self.gone.unlink_durably(&binding.project.to_string())?;
        }
        self.pulls.unlink_durably(&target)?;
        known.targets.insert(target, binding.project);
        known.bindings.insert(binding.project, binding.clone());
        Ok(binding)
    }

    /// Removes a project in the making.
    pub(crate) fn discard(&self, staging: &Staging) {
        remove_loudly(&self.ours, OsStr::new(&staging.name));
    }

    /// Counts a task that succeeded on a bound project, and notes when its upstream was listed.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn advance(
        &self,
        project: ProjectId,
        stamp: &Stamp,
        change: impl FnOnce(&mut Binding),
    ) -> Result<Binding, Failure> {
        let mut known = self.known();
        let missing = || Failure::internal(format!("project {project} lost its binding while a task worked on it"));
        let binding = known.bindings.get_mut(&project).ok_or_else(missing)?;
        let mut next = binding.clone();
        next.applied.advance(stamp);
        change(&mut next);
        self.owners.write_durably(&next.target, &text(&next)?)?;
        *binding = next.clone();
        Ok(next)
    }

    /// Takes a project out of view, leaves its tombstone, and names what is left to remove in the trash.
    ///
    /// # Errors
    /// `conflict` where the directory was swapped for another.
    pub(crate) fn bury(&self, project: ProjectId, stamp: &Stamp) -> Result<Option<String>, Failure> {
        self.same_root()?;
        let mut known = self.known();
        let binding = known.bindings.get(&project).cloned();
        let mut buried = None;
        if let Some(binding) = &binding
            && self.directory(binding)?.is_some()
        {
            let name = format!("{:032x}", rand::random::<u128>());
            self.root.rename_to(&binding.target, &self.trash, &name)?;
            // The name could have been given to another directory in between.
            if self.trash.look(&name)?.map(|stat| Identity::of(&stat)) != Some(binding.directory) {
                self.trash.rename_to(&name, &self.root, &binding.target)?;
                return Err(Failure::conflict(format!("{} was swapped for another directory", binding.target)));
            }
            self.trash.sync()?;
            self.root.sync()?;
            buried = Some(name);
        }
        let applied = binding.as_ref().map(|binding| binding.applied.clone());
        let applied = applied.or_else(|| known.tombstones.get(&project).map(|t| t.applied.clone()));
        let mut tombstone = Tombstone { project, applied: applied.unwrap_or_default() };
        tombstone.applied.advance(stamp);
        self.gone.write_durably(&project.to_string(), &text(&tombstone)?)?;
        known.tombstones.insert(project, tombstone);
        if let Some(binding) = binding {
            self.owners.unlink_durably(&binding.target)?;
            self.pulls.unlink_durably(&binding.target)?;
            known.targets.remove(&binding.target);
            known.bindings.remove(&project);
        }
        Ok(buried)
    }

    /// Removes what [`bury`](Self::bury) named, for as long as `go_on` says so; the rest goes at the next start.
    ///
    /// # Errors
    /// The first thing that could not be removed.
    pub(crate) fn remove(&self, buried: &str, go_on: &mut dyn FnMut() -> bool) -> io::Result<()> {
        remove::remove(&self.trash, OsStr::new(buried), go_on)
    }

    /// Clears a project's mark; its count stays.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn forget(&self, project: ProjectId) -> Result<(), Failure> {
        let mut known = self.known();
        if let Some(binding) = known.bindings.get_mut(&project) {
            binding.applied.mark = None;
            self.owners.write_durably(&binding.target, &text(binding)?)?;
        }
        if let Some(tombstone) = known.tombstones.get_mut(&project) {
            tombstone.applied.mark = None;
            self.gone.write_durably(&project.to_string(), &text(tombstone)?)?;
        }
        Ok(())
    }

    /// Whose project a directory is, by its name.
    pub(crate) fn owner(&self, target: &TargetPath) -> Option<ProjectId> {
        self.known().targets.get(target.as_str()).copied()
    }

    /// Notes what a pull is about to write, durably.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn note_pull(&self, target: &str, note: &PullNote) -> Result<(), Failure> {
        Ok(self.pulls.write_durably(target, &text(note)?)?)
    }

    /// What an interrupted pull of a project noted.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(crate) fn noted_pull(&self, binding: &Binding) -> Result<Option<PullNote>, Failure> {
        let note = self.pulls.read(&binding.target, LONGEST)?;
        let note = note.and_then(|bytes| serde_json::from_slice::<PullNote>(&bytes).ok());
        Ok(note.filter(|note| note.project == binding.project))
    }

    /// Strikes the note off.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub(crate) fn strike_pull(&self, target: &str) -> Result<(), Failure> {
        Ok(self.pulls.unlink_durably(target)?)
    }
}

impl Staging {
    /// A descriptor of it, for a child.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub(crate) fn handle(&self) -> Result<OwnedFd, Failure> {
        Ok(self.dir.handle()?)
    }
}

fn at(path: &Path, error: io::Error) -> Failure {
    let mut failure = Failure::from(error);
    failure.message = format!("the projects directory {}: {}", path.display(), failure.message);
    failure
}

fn text(value: &impl Serialize) -> Result<Vec<u8>, Failure> {
    let mut text = serde_json::to_vec_pretty(value).map_err(|error| Failure::internal(error.to_string()))?;
    text.push(b'\n');
    Ok(text)
}

/// Every file of `dir` that can be read as `T`; half-written ones are removed, unreadable ones left and reported.
fn read_all<T: DeserializeOwned>(dir: &Dir) -> Result<Vec<T>, Failure> {
    let mut all = Vec::new();
    for (name, kind) in dir.entries()? {
        if name.as_encoded_bytes().starts_with(b".") {
            remove_loudly(dir, &name);
        } else if kind == FileType::RegularFile {
            let read = dir.read(&name, LONGEST)?;
            match read.map(|bytes| serde_json::from_slice(&bytes)) {
                Some(Ok(value)) => all.push(value),
                Some(Err(error)) => {
                    tracing::warn!(file.name = %name.display(), %error, "a file of the projects directory is damaged");
                }
                None => {}
            }
        }
    }
    Ok(all)
}

/// Removes what is left over; what cannot be removed is tried again at the next start.
fn remove_loudly(dir: &Dir, name: &OsStr) {
    if let Err(error) = remove::remove(dir, name, &mut || true) {
        tracing::warn!(file.name = %name.display(), %error, "a leftover of the projects directory cannot be removed");
    }
}

#[cfg(test)]
#[path = "projects/tests.rs"]
mod tests;
