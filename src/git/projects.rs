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
mod inner;
mod notes;
mod objects;
mod remove;
mod staging;
mod start;
mod survey;

use std::{
    collections::{HashMap, HashSet},
    ffi::OsStr,
    io,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use serde::Serialize;

pub(crate) use self::binding::{Applied, Binding, Follows, Stamp, Tombstone};
pub(crate) use self::objects::Packs;
pub use self::survey::{ProjectRecord, survey};
pub(crate) use self::{
    dir::{Dir, Identity},
    notes::PullNote,
    staging::Staging,
};
use crate::{
    failure::Failure,
    protocol::{ProjectId, TargetPath},
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
    /// Held by whoever changes a file of ours, so that two projects never write one binding.
    turn: Mutex<()>,
    /// Held for moments only: it is asked while a disk is slow.
    known: Mutex<Known>,
}

/// What the files say, read once at start.
#[derive(Debug, Default)]
struct Known {
    bindings: HashMap<ProjectId, Binding>,
    targets: HashMap<String, ProjectId>,
    tombstones: HashMap<ProjectId, Tombstone>,
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
            turn: Mutex::default(),
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

    fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
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
        if !self.stands(binding)? {
            return Ok(None);
        }
        let dir = self.root.child(&binding.target)?;
        Ok((dir.identity()? == binding.directory).then_some(dir))
    }

    /// Whether the directory of a bound project is where it should be.
    ///
    /// # Errors
    /// When it cannot be looked at, or the projects directory was replaced.
    pub(crate) fn stands(&self, binding: &Binding) -> Result<bool, Failure> {
        self.same_root()?;
        Ok(self.root.identify(&binding.target)? == Some(binding.directory))
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

    /// Lets a project in the making appear under its name: the binding first, durable, then one rename.
    ///
    /// # Errors
    /// `conflict` where something stands there by now; the former binding is then in force again.
    pub(crate) fn place(&self, staging: &Staging, mut binding: Binding, stamp: &Stamp) -> Result<Binding, Failure> {
        self.same_root()?;
        let _turn = self.turn();
        let target = binding.target.clone();
        let owner = self.known().targets.get(&target).copied();
        if let Some(other) = owner.filter(|&other| other != binding.project) {
            return Err(Failure::conflict(format!("{target} belongs to project {other} by now")));
        }
        if self.root.look(&target)?.is_some() {
            return Err(Failure::conflict(format!("{target} exists by now and is no project of this agent")));
        }
        let (former, tombstone) = self.of(binding.project);
        binding.applied =
            former.as_ref().map(|b| &b.applied).or(tombstone.as_ref().map(|t| &t.applied)).cloned().unwrap_or_default();
        binding.applied.advance(stamp);
        binding.placed = binding.applied.seq;
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
            self.known().targets.remove(&former.target);
        }
        if tombstone.is_some() {
            self.gone.unlink_durably(&binding.project.to_string())?;
        }
        self.pulls.unlink_durably(&target)?;
        let mut known = self.known();
        known.tombstones.remove(&binding.project);
        known.targets.insert(target, binding.project);
        known.bindings.insert(binding.project, binding.clone());
        Ok(binding)
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
        let _turn = self.turn();
        let missing = || Failure::internal(format!("project {project} lost its binding while a task worked on it"));
        let mut binding = self.of(project).0.ok_or_else(missing)?;
        binding.applied.advance(stamp);
        change(&mut binding);
        self.owners.write_durably(&binding.target, &text(&binding)?)?;
        self.known().bindings.insert(project, binding.clone());
        Ok(binding)
    }

    /// Notes that the whole history of a project is attached; counts nothing.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn note_whole(&self, project: ProjectId) -> Result<(), Failure> {
        let _turn = self.turn();
        let Some(mut binding) = self.of(project).0 else { return Ok(()) };
        binding.history = None;
        self.owners.write_durably(&binding.target, &text(&binding)?)?;
        self.known().bindings.insert(project, binding);
        Ok(())
    }

    /// Takes a project out of view, leaves its tombstone, and names what is left to remove in the trash.
    ///
    /// # Errors
    /// `conflict` where the directory was swapped for another.
    pub(crate) fn bury(&self, project: ProjectId, stamp: &Stamp) -> Result<Option<String>, Failure> {
        self.same_root()?;
        let _turn = self.turn();
        let (binding, former) = self.of(project);
        let mut buried = None;
        if let Some(binding) = &binding
            && self.stands(binding)?
        {
            let name = format!("{:032x}", rand::random::<u128>());
            self.root.rename_to(&binding.target, &self.trash, &name)?;
            // The name could have been given to another directory in between.
            if self.trash.identify(&name)? != Some(binding.directory) {
                self.trash.rename_to(&name, &self.root, &binding.target)?;
                return Err(Failure::conflict(format!("{} was swapped for another directory", binding.target)));
            }
            self.trash.sync()?;
            self.root.sync()?;
            buried = Some(name);
        }
        let applied = binding.as_ref().map(|binding| binding.applied.clone());
        let applied = applied.or(former.map(|former| former.applied));
        let mut tombstone = Tombstone { project, applied: applied.unwrap_or_default() };
        tombstone.applied.advance(stamp);
        let text = text(&tombstone)?;
        let mut noted = self.gone.write_durably(&project.to_string(), &text);
        if let (Err(error), Some(name), Some(binding)) = (&noted, &buried, &binding) {
            if error.kind() == io::ErrorKind::StorageFull {
                // Deleting is what makes room. The project is out of view, and a start sweeps what is left of it.
                remove::remove(&self.trash, OsStr::new(name), &mut || true)?;
                noted = self.gone.write_durably(&project.to_string(), &text);
            } else {
                self.trash.rename_to(name, &self.root, &binding.target)?;
            }
        }
        noted?;
        self.known().tombstones.insert(project, tombstone);
        if let Some(binding) = binding {
            self.owners.unlink_durably(&binding.target)?;
            self.pulls.unlink_durably(&binding.target)?;
            let mut known = self.known();
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
        let _turn = self.turn();
        let (binding, tombstone) = self.of(project);
        if let Some(mut binding) = binding {
            binding.applied.mark = None;
            self.owners.write_durably(&binding.target, &text(&binding)?)?;
            self.known().bindings.insert(project, binding);
        }
        if let Some(mut tombstone) = tombstone {
            tombstone.applied.mark = None;
            self.gone.write_durably(&project.to_string(), &text(&tombstone)?)?;
            self.known().tombstones.insert(project, tombstone);
        }
        Ok(())
    }

    /// The keys of the mirrors that projects are bound to.
    pub(crate) fn mirrored(&self) -> HashSet<String> {
        self.known().bindings.values().map(Binding::mirror).collect()
    }

    /// Whose project a directory is, by its name.
    pub(crate) fn owner(&self, target: &TargetPath) -> Option<ProjectId> {
        self.known().targets.get(target.as_str()).copied()
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

#[cfg(test)]
#[path = "projects/tests.rs"]
mod tests;
