//! A mirror's directory, as the transfer child sees it: made, swept, asked and brought up to date.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fmt::Write as _,
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use gix::ObjectId;

use crate::{
    failure::{ErrorClass, Failure},
    git::mirror::{Listing, Want, sweep},
};

const CONFIG: &str = "[core]\n\trepositoryformatversion = 0\n\tfilemode = true\n\tbare = true\n";

/// An open mirror.
pub(super) struct Bare {
    path: PathBuf,
    pub(super) repository: gix::Repository,
}

impl Bare {
    /// Opens the mirror in the directory `path`, which is made where there is none yet, and sweeps what a killed
    /// transfer left.
    pub(super) fn open_or_create(path: &Path) -> Result<Self, Failure> {
        // A mirror is only a copy: one that cannot be used is made anew. With a shallow file it lacks history.
        if path.join("HEAD").exists() && !path.join("shallow").exists() {
            sweep(path)?;
            if let Ok(repository) = open(path) {
                return Ok(Self { path: path.to_owned(), repository });
            }
        }
        create(path)?;
        Ok(Self { path: path.to_owned(), repository: open(path)? })
    }

    /// Looks again, after a pack arrived.
    pub(super) fn refresh(&mut self) -> Result<(), Failure> {
        self.repository = open(&self.path)?;
        Ok(())
    }

    /// Leaves in `oids` only those that are not here.
    pub(super) fn retain_missing(&self, oids: &mut BTreeSet<String>) {
        oids.retain(|oid| !self.has(oid));
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

    /// Makes the mirror's refs those of `listing`, as far as their objects are here, and returns what `want` sees.
    pub(super) fn adopt(&self, listing: Listing, want: &Want) -> Result<Listing, Failure> {
        let Listing { head, mut refs, mut peeled } = listing;
        refs.retain(|_, oid| self.has(oid));
        peeled.retain(|name, _| refs.contains_key(name));
        self.write_refs(head.as_deref(), &refs, &peeled)?;
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

    fn write_refs(
        &self,
        head: Option<&str>,
        refs: &BTreeMap<String, String>,
        peeled: &BTreeMap<String, String>,
    ) -> Result<(), Failure> {
        let mut text = "# pack-refs with: peeled fully-peeled sorted \n".to_owned();
        for (name, oid) in refs {
            let _ = writeln!(text, "{oid} {name}");
            if let Some(peeled) = peeled.get(name) {
                let _ = writeln!(text, "^{peeled}");
            }
        }
        replace(&self.path.join("packed-refs"), &text)?;
        replace(&self.path.join("HEAD"), &format!("ref: {}\n", head.unwrap_or("refs/heads/main")))
    }

    fn has(&self, oid: &str) -> bool {
        id(oid).is_some_and(|id| self.repository.has_object(id))
    }
}

fn id(oid: &str) -> Option<ObjectId> {
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

/// Makes an empty mirror in the directory `path`; it is one once its HEAD is there, which comes last.
///
/// What stood there goes: nothing outside the directory can be written, not even beside it.
fn create(path: &Path) -> Result<(), Failure> {
    match fs::remove_file(path.join("HEAD")) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    for directory in ["objects/pack", "objects/info", "refs/heads", "refs/tags"] {
        fs::create_dir_all(path.join(directory))?;
    }
    replace(&path.join("config"), CONFIG)?;
    replace(&path.join("HEAD"), "ref: refs/heads/main\n")
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
