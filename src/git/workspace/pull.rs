//! Bringing a project up to date, so that a crash at any point leaves every file old, new or the user's.
//!
//! | the project | what a pull does |
//! |---|---|
//! | on its branch, behind | fast-forwards |
//! | on its branch, up to date or ahead | remote-tracking refs only |
//! | on its branch, diverged, or the upstream was force-pushed | `conflict`, remote-tracking refs all the same; with `reset`, keeps it and follows |
//! | something of the user is in the way | `conflict`, remote-tracking refs all the same; with `reset`, keeps it and writes |
//! | on another branch, or detached | remote-tracking refs only; the working tree is not touched |
//! | in the middle of a merge, rebase or the like | `conflict` |

use std::collections::BTreeMap;

use git2::{Index, ObjectType, Oid, Repository, RepositoryState};
use serde::{Deserialize, Serialize};

use super::{
    apply::{self, Stage},
    backup, compare,
    guard::among,
    index::Copied,
    lfs,
    look::{Head, head},
    open::{fault, open},
    plan::{self, Change, Side},
    pulse, receive,
    waiting::{self, Waiting},
    walk::Budget,
};
use crate::{
    failure::{ErrorClass, Failure},
    git::{child::Reporter, projects::Dir},
};

/// The most paths that a conflict names.
const MOST_NAMED: usize = 5;

/// What to bring.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Pull {
    /// The descriptor of the pipe a pack comes through, if any; filled in when it is handed over.
    pub(crate) pack: Option<i32>,
    /// The branch that the project follows, if it follows one.
    pub(crate) branch: Option<String>,
    /// Where that is on the upstream.
    pub(crate) tip: Option<String>,
    /// The remote-tracking refs and tags as they shall be, by their names in the project.
    pub(crate) refs: BTreeMap<String, String>,
    /// What an interrupted pull was bringing: the old and the new commit.
    pub(crate) interrupted: Option<(Option<String>, String)>,
    /// Whether what is in the way is kept under a ref and overwritten.
    pub(crate) reset: bool,
    /// How many bytes of the disk are to stay free.
    pub(crate) reserve: u64,
    /// For the name of that ref: a time and the task.
    pub(crate) backup: (String, String),
    /// How much may be written.
    pub(crate) budget: Budget,
}

/// What was brought.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Pulled {
    /// The branch that is checked out.
    pub(crate) branch: Option<String>,
    /// The commit that is checked out.
    pub(crate) head: Option<String>,
    /// Whether that is another one than before.
    pub(crate) updated: bool,
    /// The ref that keeps what was overwritten.
    pub(crate) backup_ref: Option<String>,
    /// Submodules whose recorded commit changed; they stay as they are.
    pub(crate) submodules: u64,
    /// LFS files that changed; their pointers were written.
    pub(crate) pointers: u64,
}

/// What the child asks the agent.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Question {
    /// Is the task still wanted? And note, durably, what is about to be written.
    Note {
        /// The commit that is checked out.
        old: Option<String>,
        /// The commit that shall be.
        new: String,
    },
}

pub(super) fn run(directory: &Dir, order: &Pull, reporter: &Reporter) -> Result<Pulled, Failure> {
    let repo = open(directory, reporter)?;
    waiting::sweep(&repo)?;
    let waiting = Waiting::new(&repo)?;
    if let Some(pack) = order.pack {
        receive::receive(&repo, &waiting, pack, order.reserve, reporter)?;
    }
    if repo.state() != RepositoryState::Clean {
        return Err(Failure::conflict("a merge, rebase or the like is under way in the project; finish or abort it"));
    }
    let mut work =
        Work { repo: &repo, root: directory, waiting: &waiting, order, reporter, backup_ref: None, left: (0, 0) };
    work.announce()?;
    let before = head(&repo)?;
    match work.advance(&before) {
        Err(failure) if failure.class == ErrorClass::Conflict => {
            // As `git pull` does: where the upstream is shall be seen by whoever resolves the conflict.
            let _ = work.track();
            return Err(failure);
        }
        other => other?,
    }
    work.track()?;
    let backup_ref = work.backup_ref.take();
    let after = head(&repo)?;
    // One that was killed after its last write, before the agent heard of it, is reported by the next.
    let finished = order.interrupted.as_ref().is_some_and(|(old, new)| {
        let now = before.commit.map(|commit| commit.to_string());
        now.as_ref() == Some(new) && now != *old
    });
    Ok(Pulled {
        updated: finished || after.commit != before.commit,
        branch: after.branch,
        head: after.commit.map(|commit| commit.to_string()),
        backup_ref,
        submodules: work.left.0,
        pointers: work.left.1,
    })
}

/// One pull at work.
struct Work<'a> {
    repo: &'a Repository,
    root: &'a Dir,
    waiting: &'a Waiting,
    order: &'a Pull,
    reporter: &'a Reporter,
    backup_ref: Option<String>,
    /// Submodules and LFS files that are left to the user.
    left: (u64, u64),
}

impl Work<'_> {
    /// Names every ref that may be written.
    fn announce(&self) -> Result<(), Failure> {
        let branch = self.order.branch.as_ref().map(|branch| format!("refs/heads/{branch}"));
        let interrupted = self.order.interrupted.as_ref().map(|(_, new)| new);
        let tips = self.order.tip.iter().chain(interrupted);
        let tips = tips.filter_map(|tip| branch.as_deref().map(|branch| (branch, tip.as_str())));
        let refs = self.order.refs.iter().map(|(name, id)| (name.as_str(), id.as_str()));
        self.waiting.announce(tips.chain(refs))
    }

    /// Brings the branch to the upstream's tip, where the project is on it.
    fn advance(&mut self, before: &Head) -> Result<(), Failure> {
        let order = self.order;
        let (Some(branch), Some(tip)) = (&order.branch, &order.tip) else { return Ok(()) };
        if before.branch.as_ref() != Some(branch) {
            return Ok(());
        }
        if let Some((old, new)) = &order.interrupted
            && *old == before.commit.map(|commit| commit.to_string())
        {
            // First to where the interrupted one was going: what it wrote is clean only on that way.
            self.go(branch, before.commit, oid(new)?)?;
        }
        let now = head(self.repo)?.commit;
        self.follow(branch, now, oid(tip)?)
    }

    /// Goes to `tip` where that is ahead of the project, or where the task said so.
    fn follow(&mut self, branch: &str, now: Option<Oid>, tip: Oid) -> Result<(), Failure> {
        if now == Some(tip) {
            return Ok(());
        }
        if self.repo.find_object(tip, None).is_ok_and(|object| object.kind() != Some(ObjectType::Commit)) {
            let message = format!("the upstream's branch {branch} is not a commit");
            return Err(Failure::new(ErrorClass::Corrupt, message));
        }
        // Reachable from what is being moved to, so nothing of the user's is left behind.
        let known: Vec<Oid> = now.into_iter().chain(self.tracked(branch)).collect();
        receive::prove(self.repo, tip, &known, self.reporter)?;
        if let Some(now) = now {
            let (ahead, behind) =
                self.repo.graph_ahead_behind(now, tip).map_err(|error| fault("its history cannot be read", &error))?;
            if behind == 0 {
                return Ok(());
            }
            if ahead > 0 && !self.order.reset {
                return Err(Failure::conflict(format!(
                    "the project and its upstream have diverged on {branch}: {ahead} commits here, {behind} there; \
                     merge or rebase in the project, or pull with on_conflict \"reset\""
                )));
            }
            if ahead > 0 {
                self.keep(Some(now), Vec::new(), &mut Copied::open(self.waiting)?.index)?;
            }
        }
        self.go(branch, now, tip)
    }

    /// Brings working tree, index and branch from `old` to `new`.
    fn go(&mut self, branch: &str, old: Option<Oid>, new: Oid) -> Result<(), Failure> {
        let unreadable = |error: git2::Error| fault("its history cannot be read", &error);
        let old_tree = match old {
            Some(old) => Some(self.repo.find_commit(old).and_then(|commit| commit.tree()).map_err(unreadable)?),
            None => None,
        };
        let new_tree = self.repo.find_commit(new).and_then(|commit| commit.tree()).map_err(unreadable)?;
        let mut changes = compare::changes(self.repo, old_tree.as_ref(), &new_tree, self.order.budget, self.reporter)?;
        changes.sort_by(|a, b| a.path.cmp(&b.path));
        let mut copied = Copied::open(self.waiting)?;
        if self.waiting.git.look("index.lock").map_err(among)?.is_some() {
            return Err(waiting::locked());
        }
        // Taken last of all: whoever holds it is not to find the files moved and the branch not.
        let lock = format!("refs/heads/{branch}.lock");
        if self.waiting.git.look(&lock).is_ok_and(|found| found.is_some()) {
            return Err(waiting::held(&lock));
        }
        let written = |change: &&Change| change.new.is_some_and(|side| !side.is_submodule());
        let paths: Vec<Vec<u8>> = changes.iter().filter(written).map(|change| change.path.clone()).collect();
        let paths: Vec<&[u8]> = paths.iter().map(Vec::as_slice).collect();
        let stage = Stage::new(self.repo, self.waiting, new_tree.id(), &paths)?;
        stage.check(&paths)?;
        // A device that fails is to fail before anything of the project is exchanged for what it may have lost.
        pulse::flush(self.root)?;
        self.reporter.step();
        let mut way = plan::in_the_way(self.root, &copied.index, &changes, self.reporter)?;
        if !way.is_empty() {
            self.allow_filtered(&stage, old_tree.as_ref().map(git2::Tree::id), &mut changes, way.keys())?;
            way = plan::in_the_way(self.root, &copied.index, &changes, self.reporter)?;
        }
        let saved = if way.is_empty() {
            Vec::new()
        } else if self.order.reset {
            backup::collect(
                self.repo,
                self.root,
                way.keys().map(Vec::as_slice),
                self.order.budget.bytes,
                self.reporter,
            )?
        } else {
            return Err(conflict(&way));
        };
        let () =
            super::ask(self.reporter, &Question::Note { old: old.map(|old| old.to_string()), new: new.to_string() })?;
        if !way.is_empty() {
            self.keep_files(old, saved, &mut copied.index, &mut changes)?;
        }
        let submodule = |side: Option<Side>| side.is_some_and(Side::is_submodule);
        let modules = changes.iter().filter(|change| submodule(change.old) || submodule(change.new)).count();
        let left = (modules as u64, lfs::brought(self.repo, &self.waiting.git, &changes)?);
        apply::apply(self.root, self.waiting, &stage, &changes, self.reporter)?;
        self.left = (self.left.0 + left.0, self.left.1 + left.1);
        copied.put(self.waiting, self.root, &changes)?;
        self.point(branch, old, new)
    }

    /// What a filter makes of either side, or what an LFS pointer points to, is not the user's own.
    fn allow_filtered<'p>(
        &self,
        stage: &Stage,
        old_tree: Option<Oid>,
        changes: &mut [Change],
        paths: impl Iterator<Item = &'p Vec<u8>>,
    ) -> Result<(), Failure> {
        let mut judged = Vec::new();
        for path in paths {
            if let Ok(at) = changes.binary_search_by(|change| change.path.cmp(path)) {
                judged.push(at);
            }
        }
        lfs::allow_fetched(self.repo, changes, judged.iter().copied())?;
        let before: Vec<Vec<u8>> =
            judged.iter().filter(|at| changes[**at].old.is_some()).map(|at| changes[*at].path.clone()).collect();
        let before: Vec<&[u8]> = before.iter().map(Vec::as_slice).collect();
        let old_stage = old_tree.map(|tree| Stage::new(self.repo, self.waiting, tree, &before)).transpose()?;
        for at in judged {
            let change = &mut changes[at];
            if let (Some(old), Some(stage)) = (change.old, &old_stage) {
                change.allow(stage.side(&change.path, old)?);
            }
            if let Some(new) = change.new {
                change.allow(stage.side(&change.path, new)?);
            }
        }
        Ok(())
    }

    /// Keeps what is in the way, and lets the pull write over it.
    fn keep_files(
        &mut self,
        head: Option<Oid>,
        saved: Vec<backup::Saved>,
        index: &mut Index,
        changes: &mut [Change],
    ) -> Result<(), Failure> {
        let saved = self.keep(head, saved, index)?;
        // What was staged is kept as well: the entries of these paths may go.
        backup::clear(self.root, changes, saved)
    }

    fn keep(
        &mut self,
        head: Option<Oid>,
        saved: Vec<backup::Saved>,
        index: &mut Index,
    ) -> Result<Vec<backup::Saved>, Failure> {
        let (time, task) = &self.order.backup;
        let mut name = backup::ref_name(time, task);
        if self.backup_ref.as_ref() == Some(&name) {
            // Commits of the user's were kept a moment ago; the files get a ref beside that.
            name.push_str("-files");
        }
        let commit = head.map(|head| self.repo.find_commit(head)).transpose();
        let commit = commit.map_err(|error| fault("its history cannot be read", &error))?;
        backup::commit(self.repo, index, commit.as_ref(), &saved, &name)?;
        self.backup_ref = Some(name);
        Ok(saved)
    }

    /// The last step: the branch itself.
    fn point(&self, branch: &str, old: Option<Oid>, new: Oid) -> Result<(), Failure> {
        let name = format!("refs/heads/{branch}");
        let pointed = match old {
            Some(old) => self.repo.reference_matching(&name, new, true, old, "pull: fast-forward"),
            None => self.repo.reference(&name, new, false, "pull: first commits"),
        };
        pointed.map(drop).map_err(|error| fault("the branch cannot be moved", &error))
    }

    /// The commit of the branch's remote-tracking ref, before this pull.
    fn tracked(&self, branch: &str) -> Option<Oid> {
        self.repo.find_reference(&format!("refs/remotes/origin/{branch}")).ok()?.target()
    }

    /// Remote-tracking refs follow the upstream; a tag of the user's is never moved.
    fn track(&self) -> Result<(), Failure> {
        if self.order.pack.is_some() {
            // No ref is to outlive what it points to.
            pulse::flush(self.root)?;
        }
        let main = self.order.branch.as_ref().map(|branch| format!("refs/remotes/origin/{branch}"));
        for (number, (name, id)) in self.order.refs.iter().enumerate() {
            if number.is_multiple_of(256) {
                self.reporter.step();
            }
            let id = oid(id)?;
            let tag = name.starts_with("refs/tags/");
            match self.repo.find_reference(name) {
                Ok(reference) if tag || reference.target() == Some(id) => continue,
                _ => {}
            }
            if self.repo.find_object(id, None).is_err() {
                continue;
            }
            let written = self.repo.reference(name, id, !tag, "pull: from upstream");
            if let Err(error) = written {
                let failure = fault("a remote-tracking ref cannot be written", &error);
                // A name that became the directory of another, or the reverse, waits for the user's own prune.
                if main.as_ref() == Some(name) || failure.class == ErrorClass::Disk {
                    return Err(failure);
                }
            }
        }
        Ok(())
    }
}

fn conflict(way: &BTreeMap<Vec<u8>, &'static str>) -> Failure {
    let named: Vec<String> =
        way.iter().take(MOST_NAMED).map(|(path, why)| format!("{} ({why})", String::from_utf8_lossy(path))).collect();
    let more = way.len().saturating_sub(MOST_NAMED);
    let rest = if more > 0 { format!(" and {more} more") } else { String::new() };
    Failure::conflict(format!("the pull would overwrite what is not committed: {}{rest}", named.join(", ")))
}

fn oid(hex: &str) -> Result<Oid, Failure> {
    Oid::from_str(hex).map_err(|_| Failure::internal(format!("{hex:?} is not an object id")))
}
