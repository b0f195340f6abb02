//! A mirror's directory, as the transfer child sees it: made, judged, asked and brought up to date.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet, VecDeque},
    fmt::Write as _,
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicBool},
};

use gix::ObjectId;

use crate::{
    failure::{ErrorClass, Failure},
    git::{
        child::Reporter,
        mirror::{self, Listing, Want},
    },
};

const CONFIG: &str = "[core]\n\trepositoryformatversion = 0\n\tfilemode = true\n\tbare = true\n";
/// Where refs are that keep what was fetched of a history that is not whole yet.
const MILESTONES: &str = "refs/haul/milestone";
/// How many commits are proven between two signs of life.
const STRIDE: usize = 1024;
/// How many new commits are proven to connect, the newest first: all of any later fetch, and of a first one as many as
/// cost a fraction of a second.
const MOST_PROVEN: usize = 20_000;

/// An open mirror.
pub(super) struct Bare {
    path: PathBuf,
    pub(super) repository: gix::Repository,
    /// The packs that were there when it was opened.
    packs: BTreeSet<String>,
    /// Set when what is being received shall be given up.
    pub(super) stop: Arc<AtomicBool>,
    /// Whether it outlives the process that fills it: only then is it written down to the disk.
    pub(super) lasting: bool,
}

/// What was found where a mirror should be.
#[expect(clippy::large_enum_variant, reason = "there is one at a time, taken apart at once")]
pub(super) enum Found {
    /// One that can be used.
    Whole(Bare),
    /// Nothing yet.
    Nothing,
    /// One that cannot be used, and why.
    Damaged(String),
}

impl Bare {
    /// Looks at the mirror at `path` and changes nothing.
    ///
    /// What is looked at are sizes, ends, and what is text; damage within packs is found by whoever reads them.
    pub(super) fn find(path: &Path) -> Result<Found, Failure> {
        let damaged = |what: String| Ok(Found::Damaged(what));
        let head = match fs::read(path.join("HEAD")) {
            Ok(head) => head,
            // The last thing that is made of one.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return if fs::read_dir(path.join("objects/pack")).is_ok_and(|mut packs| packs.next().is_some()) {
                    damaged("its HEAD is gone".to_owned())
                } else {
                    Ok(Found::Nothing)
                };
            }
            Err(error) => return Err(error.into()),
        };
        if !head.starts_with(b"ref: refs/heads/") || !head.ends_with(b"\n") || head.contains(&0) {
            return damaged("its HEAD is garbage".to_owned());
        }
        if path.join("shallow").exists() {
            return damaged("it lacks history (shallow)".to_owned());
        }
        match fs::read_to_string(path.join("packed-refs")) {
            Ok(text) if text.lines().all(is_ref_line) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Ok(_) => return damaged("its refs are garbage".to_owned()),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                return damaged("its refs are garbage".to_owned());
            }
            Err(error) => return Err(error.into()),
        }
        if let Some(what) = mirror::damage(path)? {
            return damaged(what);
        }
        Ok(match open(path) {
            Ok(repository) => Found::Whole(Self::new(path, repository)?),
            Err(failure) => Found::Damaged(failure.message),
        })
    }

    /// Makes an empty mirror in the directory `path`, at once or not at all: its `HEAD` comes last.
    pub(super) fn create(path: &Path) -> Result<Self, Failure> {
        for directory in ["objects/pack", "objects/info", "refs/heads", "refs/tags"] {
            fs::create_dir_all(path.join(directory))?;
        }
        replace(&path.join("config"), CONFIG)?;
        replace(&path.join("HEAD"), "ref: refs/heads/main\n")?;
        Self::new(path, open(path)?)
    }

    fn new(path: &Path, repository: gix::Repository) -> Result<Self, Failure> {
        Ok(Self { path: path.to_owned(), repository, packs: mirror::packs(path)?, stop: Arc::default(), lasting: true })
    }

    /// Removes what a killed transfer left; with the right to write.
    pub(super) fn sweep(&self) -> Result<(), Failure> {
        Ok(mirror::sweep(&self.path)?)
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Where its packs are.
    pub(super) fn packs_at(&self) -> PathBuf {
        self.path.join("objects/pack")
    }

    /// Makes an empty tip store in the directory `path`, in place of whatever another engine left there.
    pub(super) fn anew(path: &Path) -> Result<Self, Failure> {
        for gone in [fs::remove_dir_all(path.join("objects")), fs::remove_file(path.join("shallow"))] {
            match gone {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
                _ => {}
            }
        }
        Ok(Self { lasting: false, ..Self::create(path)? })
    }

    /// The commits at which its history ends; none for a mirror.
    pub(super) fn shallow(&self) -> Result<Vec<String>, Failure> {
        match fs::read_to_string(self.path.join("shallow")) {
            Ok(text) => Ok(text.lines().map(str::to_owned).collect()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error.into()),
        }
    }

    /// Looks again, after a pack arrived.
    pub(super) fn refresh(&mut self) -> Result<(), Failure> {
        self.repository = open(&self.path)?;
        self.packs = mirror::packs(&self.path)?;
        Ok(())
    }

    /// Leaves in `oids` only those that are not here.
    pub(super) fn retain_missing(&self, oids: &mut BTreeSet<String>) {
        oids.retain(|oid| !self.has(oid));
    }

    /// What is not here of `wants`, and of the commit that `want` names.
    pub(super) fn lacks(&self, wants: &BTreeSet<String>, want: &Want) -> BTreeSet<String> {
        let mut lacking = wants.clone();
        if let Want::Commit(oid) = want {
            lacking.insert(oid.clone());
        }
        self.retain_missing(&mut lacking);
        lacking
    }

    /// Requires that `oid` is a commit.
    pub(super) fn require_commit(&self, oid: &str) -> Result<(), Failure> {
        let kind = id(oid).and_then(|id| self.repository.find_header(id).ok()).map(|header| header.kind());
        match kind {
            Some(gix::objs::Kind::Commit) => Ok(()),
            Some(other) => Err(Failure::invalid(format!("{oid} is a {other} and not a commit"))),
            None => Err(Failure::new(ErrorClass::NotFound, format!("the upstream has no commit {oid}"))),
        }
    }

    /// Takes in what was received for `wants`: looks again, proves that it connects to what was here before, and
    /// writes down which packs there are. What does not connect is removed again.
    ///
    /// Proven are the commits and that each has its tree; the trees of what is checked out are walked by whoever
    /// checks it out. A commit that was here before is whole, since it came this way too. Of a first fetch of a very long
    /// history the newest [`MOST_PROVEN`] are: the rest is what the upstream sent, every object checked by its hash.
    pub(super) fn take_in(&mut self, wants: &BTreeSet<String>, reporter: &Reporter) -> Result<(), Failure> {
        let (before, packs) = (self.repository.clone(), self.packs.clone());
        self.refresh()?;
        if let Err(failure) = connects(&before, &self.repository, wants, || reporter.step()) {
            for name in self.packs.difference(&packs) {
                for end in ["idx", "rev", "pack"] {
                    let _ = fs::remove_file(self.packs_at().join(format!("{name}.{end}")));
                }
            }
            return Err(failure);
        }
        Ok(mirror::record(&self.path)?)
    }

    /// Keeps `oids` and all that they lead to, in place of what `before` kept: an unfinished transfer goes on from
    /// here.
    pub(super) fn anchor(&self, oids: &BTreeSet<String>, before: &BTreeSet<String>) -> Result<(), Failure> {
        let directory = self.path.join(MILESTONES);
        fs::create_dir_all(&directory)?;
        for oid in oids {
            replace(&directory.join(oid), &format!("{oid}\n"))?;
        }
        for oid in before.difference(oids) {
            fs::remove_file(directory.join(oid))?;
        }
        Ok(())
    }

    /// Lets go of what was kept for an unfinished transfer.
    pub(super) fn let_go(&self) -> Result<(), Failure> {
        match fs::remove_dir_all(self.path.join("refs/haul")) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// What `want` sees of `listing`, if the mirror's refs are those already; `None` if they would have to be written.
    pub(super) fn serves(&self, listing: &Listing, want: &Want) -> Result<Option<Listing>, Failure> {
        let (kept, refs, head) = self.refs_for(listing);
        let same = |name: &str, text: &str| fs::read(self.path.join(name)).is_ok_and(|old| old == text.as_bytes());
        if !same("packed-refs", &refs) || !same("HEAD", &head) {
            return Ok(None);
        }
        self.seen(kept, want).map(Some)
    }

    /// Makes the mirror's refs those of `listing`, as far as their objects are here, and returns what `want` sees.
    pub(super) fn adopt(&self, listing: &Listing, want: &Want) -> Result<Listing, Failure> {
        let (kept, refs, head) = self.refs_for(listing);
        replace(&self.path.join("packed-refs"), &refs)?;
        replace(&self.path.join("HEAD"), &head)?;
        self.seen(kept, want)
    }

    /// The part of `listing` whose objects are here, and the texts of the two files that hold it.
    fn refs_for(&self, listing: &Listing) -> (Listing, String, String) {
        let mut kept = listing.clone();
        kept.refs.retain(|_, oid| self.has(oid));
        kept.peeled.retain(|name, _| kept.refs.contains_key(name));
        let mut text = "# pack-refs with: peeled fully-peeled sorted \n".to_owned();
        for (name, oid) in &kept.refs {
            let _ = writeln!(text, "{oid} {name}");
            if let Some(peeled) = kept.peeled.get(name) {
                let _ = writeln!(text, "^{peeled}");
            }
        }
        let head = format!("ref: {}\n", kept.head.as_deref().unwrap_or("refs/heads/main"));
        (kept, text, head)
    }

    fn seen(&self, listing: Listing, want: &Want) -> Result<Listing, Failure> {
        let Listing { head, mut refs, mut peeled } = listing;
        if let Want::Branch(branch) = want {
            let name = format!("refs/heads/{branch}");
            let below = self.tags_below(&name, &refs, &peeled)?;
            refs.retain(|other, _| *other == name || below.contains(other));
            peeled.retain(|other, _| refs.contains_key(other));
        }
        Ok(Listing { head, refs, peeled })
    }

    /// The tags that point to something in the history of `branch`.
    fn tags_below(
        &self,
        branch: &str,
        refs: &BTreeMap<String, String>,
        peeled: &BTreeMap<String, String>,
    ) -> Result<HashSet<String>, Failure> {
        let tags = || refs.iter().filter(|(name, _)| name.starts_with("refs/tags/"));
        if tags().next().is_none() {
            return Ok(HashSet::new());
        }
        let unreadable =
            |error: gix::Error| Failure::new(ErrorClass::Corrupt, format!("a mirror of this node is damaged: {error}"));
        let tip = refs.get(branch).and_then(|oid| id(oid));
        let mut history = HashSet::new();
        for commit in self.repository.rev_walk(tip).all().map_err(unreadable)? {
            history.insert(commit.map_err(unreadable)?.id);
        }
        let in_history = |oid: &String| id(oid).is_some_and(|id| history.contains(&id));
        Ok(tags()
            .filter(|(name, oid)| in_history(peeled.get(*name).unwrap_or(oid)))
            .map(|(name, _)| name.clone())
            .collect())
    }

    /// Whether an object is here.
    pub(super) fn has(&self, oid: &str) -> bool {
        id(oid).is_some_and(|id| self.repository.has_object(id))
    }
}

/// Walks every commit that `wants` lead to and that `before` did not have.
fn connects(
    before: &gix::Repository,
    now: &gix::Repository,
    wants: &BTreeSet<String>,
    step: impl Fn(),
) -> Result<(), Failure> {
    let mut waiting: VecDeque<ObjectId> =
        wants.iter().filter_map(|oid| id(oid)).filter(|id| now.has_object(*id)).collect();
    let mut seen: HashSet<ObjectId> = waiting.iter().copied().collect();
    let mut count = 0_usize;
    while let Some(id) = waiting.pop_front().filter(|_| count < MOST_PROVEN) {
        if before.has_object(id) {
            continue;
        }
        count += 1;
        if count.is_multiple_of(STRIDE) {
            step();
        }
        let object = now.find_object(id).map_err(|error| hole(id, &error))?;
        match object.kind {
            gix::objs::Kind::Commit => {
                let mut commit = gix::objs::CommitRefIter::from_bytes(&object.data, object.id.kind());
                let tree = commit.tree_id().map_err(|error| hole(id, &error))?;
                if !now.has_object(tree) {
                    return Err(hole(tree, &"it is the tree of a commit"));
                }
                waiting.extend(commit.parent_ids().filter(|parent| seen.insert(*parent)));
            }
            gix::objs::Kind::Tag => {
                let target = gix::objs::TagRefIter::from_bytes(&object.data, object.id.kind()).target_id();
                let target = target.map_err(|error| hole(id, &error))?;
                waiting.extend(seen.insert(target).then_some(target));
            }
            gix::objs::Kind::Tree | gix::objs::Kind::Blob => {}
        }
    }
    Ok(())
}

/// History in which `id` is missing, or is not what it should be.
pub(super) fn hole(id: ObjectId, error: &dyn std::fmt::Display) -> Failure {
    let message = format!("the upstream sent history with a hole in it: {id} cannot be read ({error})");
    Failure::new(ErrorClass::Corrupt, message)
}

/// Whether a line of `packed-refs` is one.
fn is_ref_line(line: &str) -> bool {
    let (oid, name) = match (line.strip_prefix('^'), line.split_once(' ')) {
        _ if line.starts_with('#') => return true,
        (Some(peeled), None) => (peeled, "refs/peeled"),
        (None, Some(pair)) => pair,
        _ => return false,
    };
    name.starts_with("refs/") && id(oid).is_some()
}

/// The id that `oid` writes in hexadecimal.
pub(super) fn id(oid: &str) -> Option<ObjectId> {
    ObjectId::from_hex(oid.as_bytes()).ok()
}

fn open(path: &Path) -> Result<gix::Repository, Failure> {
    let options = gix::open::Options::isolated().with(gix::sec::Trust::Full).open_path_as_is(true);
    let mut repository = gix::open_opts(path, options).map_err(|error| {
        Failure::new(ErrorClass::Corrupt, format!("a mirror of this node cannot be opened: {error}"))
    })?;
    repository.objects.refresh_never();
    Ok(repository)
}

/// Writes `text` to `path`, whole or not at all.
fn replace(path: &Path, text: &str) -> Result<(), Failure> {
    if fs::read(path).is_ok_and(|old| old == text.as_bytes()) {
        return Ok(());
    }
    let new = path.with_extension("lock");
    let mut file = File::create(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    Ok(fs::rename(&new, path)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_packed_refs_is_told_from_garbage() {
        let oid = "1".repeat(40);
        for line in [format!("{oid} refs/heads/a b"), format!("^{oid}"), "# pack-refs with: peeled".to_owned()] {
            assert!(is_ref_line(&line), "{line}");
        }
        for line in ["", "x", "\0", &oid, &format!("{oid} HEAD"), &format!("{} refs/heads/a", &oid[..39])] {
            assert!(!is_ref_line(line), "{line}");
        }
    }
}
