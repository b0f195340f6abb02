//! LFS files of a project: pointers listed from the committed tree, what they point to put into its places, and the
//! judgement of a pull about both.
//!
//! A pointer is a file of the tree whose text is one *and* whose committed attributes say `filter=lfs`. `.lfsconfig` is
//! not read. The index gets the size and times of the file that was put in place, as git-lfs leaves it: git finds the
//! project clean without asking a filter, whether its user has git-lfs installed or not.

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    io::{self, Read},
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    time::{Duration, SystemTime},
};

use git2::{ObjectType, Odb};
use gix::{
    Repository,
    attrs::StateRef,
    bstr::{BString, ByteSlice},
    index::{File as IndexFile, entry::Mode, entry::Stat, fs::Metadata},
    worktree::stack::state::attributes::Source,
};
use rustix::fs::{AtFlags, OFlags, Timespec, Timestamps, fchmod, futimens, ioctl_ficlone, renameat, unlinkat};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{
    Order, done,
    make::{damaged, write_fault},
    open::fault,
    plan::{self, Change, Found, Side},
    submodules::{beneath, checked_out, open},
    walk::Budget,
};
use crate::{
    failure::{ErrorClass, Failure},
    git::{
        Run,
        child::{Children, Reporter},
        module::Place,
        pointer::{self, Pointer},
        projects::Dir,
    },
    protocol::Progress,
};

/// The most objects of one repository; the list of them fits one line.
const MOST: usize = 10_000;
/// How much older than the index a file is made: git looks into files that are not older than that.
const OLDER: Duration = Duration::from_secs(2);
/// The name of a file that is about to be put in place, in the `lfs` directory.
const WAITING: &str = "incoming";

/// Which repository to read.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Pointers {
    /// The repository.
    pub(crate) place: Place,
    /// How many bytes its LFS files may have.
    pub(crate) budget: Budget,
}

/// In which repository to put LFS files into their places; their contents are below its `lfs/objects`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Smudge {
    /// The repository.
    pub(crate) place: Place,
}

/// The LFS objects of a tree.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Collected {
    /// Each once.
    pub(crate) objects: BTreeSet<Pointer>,
    /// The bytes of all the files.
    pub(crate) bytes: u64,
}

impl Collected {
    /// The bytes of all the objects.
    pub(crate) fn size(&self) -> u64 {
        self.objects.iter().fold(0, |sum, object| sum.saturating_add(object.size()))
    }
}

/// Lists the LFS objects of a repository of a new project.
///
/// # Errors
/// `quota` for too many or too much; otherwise as [`Children::run`].
pub(crate) async fn collect(
    children: &Children,
    directory: OwnedFd,
    order: Pointers,
    run: &Run<'_>,
) -> Result<Collected, Failure> {
    done(children, directory, Order::Collect(order), run).await
}

/// Puts LFS files into their places.
///
/// # Errors
/// `disk` where they cannot be written; otherwise as [`Children::run`].
pub(crate) async fn smudge(
    children: &Children,
    directory: OwnedFd,
    order: Smudge,
    run: &Run<'_>,
) -> Result<(), Failure> {
    done(children, directory, Order::Smudge(order), run).await
}

pub(super) fn run_collect(directory: &Dir, order: &Pointers, reporter: &Reporter) -> Result<Collected, Failure> {
    let repo = open(directory, &order.place)?;
    let mut collected = Collected::default();
    let Some(tree) = checked_out(&repo)? else { return Ok(collected) };
    let index = repo.index_from_tree(&tree).map_err(|error| damaged(&error))?;
    for file in files(&repo, &index, reporter)? {
        collected.bytes = collected.bytes.saturating_add(file.pointer.size());
        collected.objects.insert(file.pointer);
    }
    if collected.objects.len() > MOST {
        let message = format!("the tree has more than {MOST} LFS objects");
        return Err(Failure::new(ErrorClass::Quota, message));
    }
    if collected.bytes > order.budget.bytes {
        let message = "the tree and its LFS files have more bytes than git.max_bytes allows";
        return Err(Failure::new(ErrorClass::Quota, message));
    }
    Ok(collected)
}

/// One file that a pointer stands for.
struct Large {
    path: BString,
    executable: bool,
    pointer: Pointer,
}

/// The files of `index` that pointers stand for.
fn files(repo: &Repository, index: &IndexFile, reporter: &Reporter) -> Result<Vec<Large>, Failure> {
    let mut attributes = repo.attributes_only(index, Source::IdMapping).map_err(|error| damaged(&error))?;
    let mut filter = attributes.selected_attribute_matches(["filter"]);
    let mut found = Vec::new();
    for (number, entry) in index.entries().iter().enumerate() {
        if number.is_multiple_of(4096) {
            reporter.step();
        }
        if entry.mode != Mode::FILE && entry.mode != Mode::FILE_EXECUTABLE {
            continue;
        }
        if repo.find_header(entry.id).map_err(|error| damaged(&error))?.size() > pointer::LONGEST {
            continue;
        }
        let blob = repo.find_object(entry.id).map_err(|error| damaged(&error))?;
        let Some(pointer) = Pointer::parse(&blob.data) else { continue };
        let path = entry.path(index).to_owned();
        let at = attributes.at_entry(path.as_bstr(), Some(entry.mode)).map_err(|error| damaged(&error))?;
        filter.reset();
        at.matching_attributes(&mut filter);
        let lfs = filter
            .iter_selected()
            .any(|found| matches!(found.assignment.state, StateRef::Value(value) if value.as_bstr() == "lfs"));
        if lfs {
            found.push(Large { path, executable: entry.mode == Mode::FILE_EXECUTABLE, pointer });
        }
    }
    Ok(found)
}

pub(super) fn run_smudge(directory: &Dir, order: &Smudge, reporter: &Reporter) -> Result<(), Failure> {
    let repo = open(directory, &order.place)?;
    let (git, tree) = (beneath(directory, &order.place.git)?, beneath(directory, &order.place.tree)?);
    let lfs = git.dir.child("lfs")?;
    let mut index = repo.open_index().map_err(|error| damaged(&error))?;
    let files = files(&repo, &index, reporter)?;
    let fault = |error: io::Error| write_fault(&tree.path, &error.to_string());
    let (total, mut bytes) = (files.len() as u64, 0);
    let time = SystemTime::now() - OLDER;
    for (done, file) in (1..).zip(files) {
        put(&lfs, &tree.dir, &file, time).map_err(fault)?;
        let at = index.entry_index_by_path(file.path.as_bstr());
        let at = at.map_err(|_| Failure::internal("a file that was listed is not in the index"))?;
        let path = tree.path.join(OsStr::from_bytes(&file.path));
        let seen = Metadata::from_path_no_follow(&path).map_err(fault)?;
        index.entries_mut()[at].stat = Stat::from_fs(&seen).map_err(|error| Failure::internal(error.to_string()))?;
        bytes += file.pointer.size();
        reporter.progress(Progress {
            phase: "checkout".to_owned(),
            done,
            total: Some(total),
            bytes,
            ..Progress::default()
        });
    }
    index.write(gix::index::write::Options::default()).map_err(|error| write_fault(&tree.path, &error.to_string()))
}

/// Writes one file beside the objects and renames it into its place.
fn put(lfs: &Dir, tree: &Dir, file: &Large, time: SystemTime) -> io::Result<()> {
    let [first, second, name] = file.pointer.place();
    let mut source = lfs.open_file(format!("objects/{first}/{second}/{name}"), OFlags::RDONLY, 0)?;
    match unlinkat(lfs, WAITING, AtFlags::empty()) {
        Ok(()) | Err(rustix::io::Errno::NOENT) => {}
        Err(error) => return Err(error.into()),
    }
    let mut target = lfs.open_file(WAITING, OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL, 0o644)?;
    if ioctl_ficlone(&target, &source).is_err() {
        io::copy(&mut source, &mut target)?;
    }
    if target.metadata()?.len() != file.pointer.size() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "an LFS object has another size than its pointer says"));
    }
    fchmod(&target, rustix::fs::Mode::from_raw_mode(if file.executable { 0o755 } else { 0o644 }))?;
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let time = Timespec { tv_sec: i64::try_from(since.as_secs()).unwrap_or(0), tv_nsec: since.subsec_nanos().into() };
    futimens(&target, &Timestamps { last_access: time, last_modification: time })?;
    let (parent, name) = plan::split(&file.path);
    let parent = parent.map(|parent| tree.child(OsStr::from_bytes(parent))).transpose()?;
    renameat(lfs, WAITING, parent.as_ref().unwrap_or(tree), OsStr::from_bytes(name))?;
    Ok(())
}

/// Lets what a pointer of either side points to pass as not the user's own.
///
/// # Errors
/// `conflict` where an object cannot be read.
pub(super) fn allow_fetched(
    repo: &git2::Repository,
    changes: &mut [Change],
    judged: impl Iterator<Item = usize>,
) -> Result<(), Failure> {
    let odb = repo.odb().map_err(|error| fault("its objects cannot be opened", &error))?;
    for at in judged {
        let change = &mut changes[at];
        for side in [change.old, change.new].into_iter().flatten() {
            change.lfs.extend(pointer(&odb, side)?.map(|pointer| (pointer, side.mode & 0o100 != 0)));
        }
    }
    Ok(())
}

/// How many of the `changes` bring a pointer, in a project whose LFS files were fetched once.
///
/// # Errors
/// `conflict` where an object cannot be read.
pub(super) fn brought(repo: &git2::Repository, git: &Dir, changes: &[Change]) -> Result<u64, Failure> {
    if git.child("lfs/objects").is_err() {
        return Ok(0);
    }
    let odb = repo.odb().map_err(|error| fault("its objects cannot be opened", &error))?;
    let mut count = 0;
    for side in changes.iter().filter_map(|change| change.new) {
        count += u64::from(pointer(&odb, side)?.is_some());
    }
    Ok(count)
}

/// The pointer that one side of a change is, if it is one.
fn pointer(odb: &Odb<'_>, side: Side) -> Result<Option<Pointer>, Failure> {
    let unreadable = |error: git2::Error| fault("its objects cannot be read", &error);
    if side.is_link() || side.is_submodule() {
        return Ok(None);
    }
    let (length, kind) = odb.read_header(side.id).map_err(unreadable)?;
    if kind != ObjectType::Blob || length as u64 > pointer::LONGEST {
        return Ok(None);
    }
    Ok(Pointer::parse(odb.read(side.id).map_err(unreadable)?.data()))
}

/// Whether what was found at `path` is what one of the pointers of a change points to.
pub(super) fn is_fetched(root: &Dir, path: &[u8], change: &Change, found: &Found) -> Result<bool, Failure> {
    let Found::File { length, executable } = found else { return Ok(false) };
    for (pointer, _) in change.lfs.iter().filter(|(pointer, mode)| pointer.size() == *length && mode == executable) {
        let Ok(file) = root.open_file(OsStr::from_bytes(path), OFlags::RDONLY, 0) else { return Ok(false) };
        // One that grows while it is read is another one.
        let mut file = file.take(length.saturating_add(1));
        let mut hash = Sha256::new();
        io::copy(&mut file, &mut hash)?;
        if hex(&hash.finalize()) == pointer.oid() {
            return Ok(true);
        }
    }
    Ok(false)
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(64), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
