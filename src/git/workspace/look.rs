//! Looking at a project without changing anything.

use std::{collections::BTreeMap, ffi::OsStr, os::unix::ffi::OsStrExt};

use git2::{Oid, Repository, RepositoryState, StatusOptions};
use serde::{Deserialize, Serialize};

use super::{
    guard::altered,
    open::{fault, open},
};
use crate::{
    failure::Failure,
    git::{child::Reporter, projects::Dir},
};

/// The most refs that are reported.
const MOST_REFS: usize = 4000;
/// The most ends of its history that a project may have: they must fit one line together with the refs.
const MOST_BOUNDARY: u64 = 2000;
/// Files longer than this are not read only to find that they changed, in bytes.
const LONG: u64 = 64 << 20;

/// What to look at besides the head.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Look {
    /// Remote-tracking refs and tags.
    pub(crate) refs: bool,
    /// Whether anything differs from the head, and how far the branch is from its upstream.
    pub(crate) status: bool,
}

/// What was seen. A stranger's repository said it: nothing here is trusted beyond the project itself.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Looked {
    /// The branch that is checked out, also one without a commit yet.
    pub(crate) branch: Option<String>,
    /// The commit that is checked out.
    pub(crate) head: Option<String>,
    /// Whether a merge, rebase or the like is under way.
    pub(crate) busy: bool,
    /// `refs/remotes/origin/*` and `refs/tags/*`, capped.
    pub(crate) refs: BTreeMap<String, String>,
    /// Whether there were more.
    pub(crate) capped: bool,
    /// The commits at which its history ends; none where it is whole.
    #[serde(default)]
    pub(crate) shallow: Vec<String>,
    /// Commits that the upstream branch lacks.
    pub(crate) ahead: Option<u64>,
    /// Commits that the project lacks.
    pub(crate) behind: Option<u64>,
    /// Whether tracked files differ from the head, or untracked ones exist.
    pub(crate) dirty: Option<bool>,
}

/// Where HEAD is.
pub(super) struct Head {
    /// The branch, by its short name.
    pub(super) branch: Option<String>,
    /// The commit; `None` on a branch without one.
    pub(super) commit: Option<Oid>,
}

pub(super) fn run(directory: &Dir, order: &Look, reporter: &Reporter) -> Result<Looked, Failure> {
    let repo = open(directory, reporter)?;
    let Head { branch, commit } = head(&repo)?;
    let mut looked = Looked {
        branch,
        head: commit.map(|commit| commit.to_string()),
        busy: repo.state() != RepositoryState::Clean,
        ..Looked::default()
    };
    if order.refs {
        looked.shallow = boundary(directory)?;
        for pattern in ["refs/remotes/origin/*", "refs/tags/*"] {
            refs(&repo, pattern, &mut looked).map_err(|error| fault("its refs cannot be read", &error))?;
        }
    }
    if order.status {
        reporter.step();
        looked.dirty = Some(dirty(&repo, directory).map_err(|error| fault("its status cannot be read", &error))?);
        reporter.step();
        let upstream = looked.branch.as_deref().and_then(|branch| upstream(&repo, branch));
        if let (Some(commit), Some(upstream)) = (commit, upstream) {
            let (ahead, behind) = repo
                .graph_ahead_behind(commit, upstream)
                .map_err(|error| fault("its history cannot be read", &error))?;
            (looked.ahead, looked.behind) = (Some(ahead as u64), Some(behind as u64));
        }
    }
    Ok(looked)
}

/// The commits at which the history of the project in `directory` ends.
///
/// # Errors
/// `conflict` where that is no list of commits, or too long a one.
pub(super) fn boundary(directory: &Dir) -> Result<Vec<String>, Failure> {
    let text = directory.child(".git").and_then(|git| git.read("shallow", MOST_BOUNDARY * 64));
    let text = text.map_err(|error| altered(format!(".git/shallow: {error}")))?.unwrap_or_default();
    let mut boundary = Vec::new();
    for line in text.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()) {
        let oid = std::str::from_utf8(line).ok().filter(|oid| oid.len() == 40 && Oid::from_str(oid).is_ok());
        boundary.push(oid.ok_or_else(|| altered(".git/shallow is no list of commits"))?.to_owned());
    }
    if boundary.len() as u64 > MOST_BOUNDARY {
        let message = format!("the project's history ends at more than {MOST_BOUNDARY} commits; unshallow it");
        return Err(Failure::conflict(message));
    }
    Ok(boundary)
}

/// Where HEAD of `repo` is.
///
/// # Errors
/// `conflict` where that cannot be read.
pub(super) fn head(repo: &Repository) -> Result<Head, Failure> {
    let unreadable = |error: git2::Error| fault("its HEAD cannot be read", &error);
    let head = repo.find_reference("HEAD").map_err(unreadable)?;
    let symbolic = head.symbolic_target_bytes().map(|name| String::from_utf8_lossy(name).into_owned());
    let Some(name) = symbolic else {
        return Ok(Head { branch: None, commit: head.target() });
    };
    let commit = match repo.find_reference(&name) {
        Ok(branch) => Some(branch.peel_to_commit().map_err(unreadable)?.id()),
        Err(error) if error.code() == git2::ErrorCode::NotFound => None,
        Err(error) => return Err(unreadable(error)),
    };
    Ok(Head { branch: name.strip_prefix("refs/heads/").map(str::to_owned), commit })
}

/// The commit of the remote-tracking ref that `branch` follows: by its own setting, else by its name.
fn upstream(repo: &Repository, branch: &str) -> Option<Oid> {
    let followed = repo.find_branch(branch, git2::BranchType::Local).and_then(|branch| branch.upstream());
    let reference = match followed {
        Ok(upstream) => upstream.into_reference(),
        Err(_) => repo.find_reference(&format!("refs/remotes/origin/{branch}")).ok()?,
    };
    reference.peel_to_commit().ok().map(|commit| commit.id())
}

fn refs(repo: &Repository, pattern: &str, looked: &mut Looked) -> Result<(), git2::Error> {
    for reference in repo.references_glob(pattern)? {
        let reference = reference?;
        let (Ok(name), Some(oid)) = (reference.name(), reference.target()) else { continue };
        // What is reported must fit one line, whatever the user makes of the names.
        if looked.refs.len() >= MOST_REFS || name.len() > 150 {
            looked.capped = true;
            continue;
        }
        looked.refs.insert(name.to_owned(), oid.to_string());
    }
    Ok(())
}

/// Whether a tracked file is so much longer than what was checked out that reading it would be all that is done: it costs
/// nothing to make one a terabyte long.
fn grown(repo: &Repository, root: &Dir) -> Result<bool, git2::Error> {
    let odb = repo.odb()?;
    for entry in repo.index()?.iter().filter(|entry| entry.mode & 0o170_000 == 0o100_000) {
        let Ok(Some(stat)) = root.look(OsStr::from_bytes(&entry.path)) else { continue };
        let length = u64::try_from(stat.st_size).unwrap_or(0);
        // The index has the lower half of the length.
        if length > LONG
            && (length > u64::from(u32::MAX) || length != u64::from(entry.file_size))
            && odb.read_header(entry.id).is_ok_and(|(stored, _)| stored as u64 != length)
        {
            return Ok(true);
        }
    }
    Ok(false)
}

fn dirty(repo: &Repository, root: &Dir) -> Result<bool, git2::Error> {
    if grown(repo, root)? {
        return Ok(true);
    }
    let mut options = StatusOptions::new();
    options.include_untracked(true).recurse_untracked_dirs(false).exclude_submodules(true).update_index(false);
    Ok(!repo.statuses(Some(&mut options))?.is_empty())
}
