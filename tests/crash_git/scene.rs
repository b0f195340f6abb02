//! One project on disk, seen from outside: where a task is in it, and what must hold there.

use std::{
    cell::Cell,
    collections::BTreeMap,
    fs,
    os::unix::fs::{MetadataExt, symlink},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

use crate::world::{World, git, git_raw, listing, read, write};

/// Files that every change rewrites.
const FILES: usize = 400;

/// A tree: path to kind and content.
pub(crate) type Tree = BTreeMap<Vec<u8>, (String, Vec<u8>)>;

/// A point of a task, as it shows on disk or among processes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Point {
    /// A child of this role runs.
    Child(&'static str),
    /// A pull keeps something beside its place.
    Waiting,
    /// It noted what it is about to write.
    Noted,
    /// It wrote the file of this number.
    Written(usize),
    /// It wrote the index.
    Indexed,
    /// It moved the branch.
    Moved,
    /// A mirror is there.
    Mirrored,
    /// A project in the making is there.
    Staged,
    /// A file of it is checked out.
    CheckedOut,
    /// It is bound.
    Bound,
    /// It is in view.
    There,
    /// It is out of view.
    Gone,
    /// Its tombstone is there.
    Buried,
    /// Its binding is gone.
    Unbound,
    /// It is partly removed.
    Removing,
    /// Its mirror is gone.
    MirrorGone,
}

/// What the kills met.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    /// Pulls that left old and new files side by side.
    pub(crate) mixed: Cell<usize>,
    /// Pulls whose first attempt failed.
    pub(crate) pull_failed: Cell<usize>,
    /// Clones that were not there after the kill.
    pub(crate) clone_failed: Cell<usize>,
    /// Deletes that were done at the kill.
    pub(crate) delete_done: Cell<usize>,
}

/// Counts one more if `met`.
pub(crate) fn count(counter: &Cell<usize>, met: bool) {
    counter.set(counter.get() + usize::from(met));
}

/// Numbers that look random and are the same each time.
pub(crate) struct Chance(u64);

impl Chance {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    /// Up to two milliseconds.
    pub(crate) fn delay(&mut self) -> Duration {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        Duration::from_micros(self.0 % 2000)
    }
}

/// A kill that is waiting for its point.
pub(crate) struct Strike {
    over: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Strike {
    /// Ends the wait, whether the point was reached or not.
    pub(crate) fn over(self) {
        self.over.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
    }
}

pub(crate) struct Scene {
    pub(crate) project: i64,
    pub(crate) target: String,
    storage: PathBuf,
    seed: PathBuf,
}

impl Scene {
    pub(crate) fn new(world: &World, storage: PathBuf, project: i64) -> Self {
        let target = if project == 1 { "p".to_owned() } else { format!("p{project}") };
        Self { project, target, storage, seed: world.seed() }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.storage.join("projects").join(&self.target)
    }

    fn ours(&self) -> PathBuf {
        self.storage.join("projects/.haul")
    }

    fn mirrors(&self) -> PathBuf {
        self.storage.join(".haul/mirrors")
    }

    /// The file that says whose the project is.
    pub(crate) fn owner(&self) -> PathBuf {
        self.ours().join("owners").join(&self.target)
    }

    /// Changes the upstream in every way that a tree can change; returns its tree before and after.
    pub(crate) fn change(&self, world: &World, round: u32) -> (Tree, Tree) {
        let old = tree(&self.seed);
        for number in 0..FILES {
            write(&self.seed, &format!("many/f{number:03}"), &format!("{number} in round {round}\n"));
        }
        write(&self.seed, "user.txt", "the upstream's\n");
        write(&self.seed, ".gitignore", "*.log\n");
        let _ = fs::remove_file(self.seed.join("link"));
        symlink(format!("many/f{round:03}"), self.seed.join("link")).unwrap();
        // What one round adds the next removes, and a directory takes the place of a file.
        let _ = fs::remove_file(self.seed.join(format!("only/{}", round.wrapping_sub(1))));
        write(&self.seed, &format!("only/{round}"), "x");
        let swap = self.seed.join("swap");
        let _ = fs::remove_file(&swap).or_else(|_| fs::remove_dir_all(&swap));
        write(&self.seed, if round.is_multiple_of(2) { "swap" } else { "swap/inner" }, "swapped");
        world.push(&format!("round {round}"));
        (old, tree(&self.seed))
    }

    /// What must survive every pull.
    pub(crate) fn user_works(&self) {
        write(&self.path(), "mine", "untracked");
        write(&self.path(), "many/mine.log", "ignored");
        write(&self.path(), "user.txt", "the user's\n");
    }

    fn the_users_is_there(&self) {
        assert_eq!(read(&self.path(), "mine"), "untracked");
        assert_eq!(read(&self.path(), "many/mine.log"), "ignored");
        assert_eq!(read(&self.path(), "user.txt"), "the user's\n");
    }

    /// Whether old and new files stand side by side.
    pub(crate) fn every_file_is_old_new_or_the_users(&self, old: &Tree, new: &Tree) -> bool {
        self.the_users_is_there();
        let now = tree(&self.path());
        let (mut olds, mut news) = (0, 0);
        for (path, found) in &now {
            let shown = String::from_utf8_lossy(path);
            if ["mine", "many/mine.log", "user.txt"].contains(&&*shown) {
                continue;
            }
            let (is_old, is_new) = (old.get(path) == Some(found), new.get(path) == Some(found));
            // An empty directory is no file, and git keeps none.
            assert!(is_old || is_new || found.0 == "directory", "{shown} is neither old nor new: {found:?}");
            olds += usize::from(is_old && !is_new && found.0 == "file");
            news += usize::from(is_new && !is_old && found.0 == "file");
        }
        let stays =
            |path: &&Vec<u8>| new.get(*path).is_some_and(|(kind, _)| kind != "directory" && !path.starts_with(b"swap"));
        for path in old.keys().filter(stays) {
            assert!(now.contains_key(path), "{} is gone", String::from_utf8_lossy(path));
        }
        whole(&self.path());
        olds > 0 && news > 0
    }

    /// Nothing is left to be done.
    pub(crate) fn is_pulled(&self, new: &Tree) {
        self.the_users_is_there();
        let mut now = tree(&self.path());
        for mine in ["mine", "many/mine.log"] {
            now.remove(mine.as_bytes());
        }
        now.insert(b"user.txt".to_vec(), new[&b"user.txt"[..]].clone());
        assert!(&now == new, "the tree is not the upstream's");
        assert_eq!(git(&self.path(), &["rev-parse", "HEAD"]), git(&self.seed, &["rev-parse", "HEAD"]));
        assert_eq!(git(&self.path(), &["rev-parse", "origin/main"]), git(&self.seed, &["rev-parse", "HEAD"]));
        assert_eq!(git(&self.path(), &["status", "--porcelain"]), " M user.txt\n?? mine");
        whole(&self.path());
        self.nothing_strays();
    }

    /// Whether the project is there, and then whole.
    pub(crate) fn is_cloned_or_not(&self, new: &Tree) -> bool {
        if self.path().symlink_metadata().is_err() {
            return false;
        }
        assert!(&tree(&self.path()) == new, "the tree is not the upstream's");
        assert_eq!(git(&self.path(), &["rev-parse", "HEAD"]), git(&self.seed, &["rev-parse", "HEAD"]));
        assert_eq!(git(&self.path(), &["status", "--porcelain"]), "");
        whole(&self.path());
        self.nothing_strays();
        true
    }

    /// No helper file is left anywhere in the repository.
    fn nothing_strays(&self) {
        let stray = |name: &str| {
            name.starts_with("haul-waiting-")
                || name.contains("_git2_")
                || name.starts_with(".tmp")
                || name.starts_with("tmp_")
                || ends(name, "lock")
        };
        assert_eq!(names(&self.path().join(".git"), &stray), Vec::<PathBuf>::new());
    }

    /// Nothing is left of what was killed, in the agent's own directories.
    pub(crate) fn is_swept(&self) {
        let left = |name: &str| !["owners", "gone", "pulls", "trash"].contains(&name);
        assert_eq!(entries(&self.ours(), &left), Vec::<String>::new());
        for inner in ["pulls", "trash"] {
            assert_eq!(entries(&self.ours().join(inner), &|_| true), Vec::<String>::new());
        }
        assert_eq!(entries(&self.ours().join("owners"), &|name| name.starts_with('.')), Vec::<String>::new());
        assert_eq!(entries(&self.mirrors(), &|name| name.contains(".git.")), Vec::<String>::new());
        for mirror in entries(&self.mirrors(), &|name| ends(name, "git")) {
            let half = |name: &str| {
                name.starts_with(".tmp") || name.starts_with("tmp_") || ends(name, "lock") || ends(name, "keep")
            };
            assert_eq!(names(&self.mirrors().join(mirror), &half), Vec::<PathBuf>::new());
        }
    }

    /// Kills the child `role` of `parent` some time after `point` is reached.
    pub(crate) fn strike(&self, point: Point, role: &'static str, parent: u32, delay: Duration) -> Strike {
        self.at(point, parent, delay, move |parent| {
            for (pid, name) in children(parent) {
                if name == role {
                    kill(pid);
                }
            }
        })
    }

    /// Kills `agent` and all its children.
    pub(crate) fn strike_all(&self, point: Point, agent: u32, delay: Duration) -> Strike {
        self.at(point, agent, delay, |agent| {
            let children = children(agent);
            kill(agent);
            for (pid, _) in children {
                kill(pid);
            }
        })
    }

    /// Does something to `parent`, or to what is around it, some time after `point` is reached.
    pub(crate) fn at(&self, point: Point, parent: u32, delay: Duration, kill: impl Fn(u32) + Send + 'static) -> Strike {
        let over = Arc::new(AtomicBool::new(false));
        let (told, reached) = (Arc::clone(&over), self.reached(point, parent));
        let thread = std::thread::spawn(move || {
            let deadline = Instant::now() + Duration::from_secs(50);
            while !told.load(Ordering::Relaxed) {
                if reached() || Instant::now() > deadline {
                    let struck = Instant::now() + delay;
                    while Instant::now() < struck {
                        std::thread::yield_now();
                    }
                    return kill(parent);
                }
                std::thread::sleep(Duration::from_micros(50));
            }
        });
        Strike { over, thread }
    }

    /// Asks whether `point` is reached, compared to what is there now.
    fn reached(&self, point: Point, parent: u32) -> Box<dyn Fn() -> bool + Send> {
        let (path, ours, mirrors, owner) = (self.path(), self.ours(), self.mirrors(), self.owner());
        let another = |path: PathBuf| -> Box<dyn Fn() -> bool + Send> {
            let before = inode(&path);
            Box::new(move || inode(&path) != before)
        };
        let there =
            |path: PathBuf| -> Box<dyn Fn() -> bool + Send> { Box::new(move || path.symlink_metadata().is_ok()) };
        let gone =
            |path: PathBuf| -> Box<dyn Fn() -> bool + Send> { Box::new(move || path.symlink_metadata().is_err()) };
        let making = |name: &str| !["owners", "gone", "pulls", "trash"].contains(&name);
        match point {
            Point::Child(role) => Box::new(move || children(parent).iter().any(|(_, name)| name == role)),
            Point::Waiting => {
                Box::new(move || !entries(&path.join(".git"), &|name| name.starts_with("haul-waiting-")).is_empty())
            }
            Point::Noted => there(ours.join("pulls").join(&self.target)),
            Point::Written(number) => another(path.join(format!("many/f{number:03}"))),
            Point::Indexed => another(path.join(".git/index")),
            Point::Moved => another(path.join(".git/refs/heads/main")),
            Point::Mirrored => Box::new(move || !entries(&mirrors, &|name| name.contains(".git")).is_empty()),
            Point::Staged => Box::new(move || !entries(&ours, &making).is_empty()),
            Point::CheckedOut => Box::new(move || {
                entries(&ours, &making).iter().any(|name| ours.join(name).join("many").symlink_metadata().is_ok())
            }),
            Point::Bound => there(owner),
            Point::There => there(path),
            Point::Gone => gone(path),
            Point::Buried => there(ours.join("gone").join(self.project.to_string())),
            Point::Unbound => gone(owner),
            Point::Removing => {
                let trash = ours.join("trash");
                Box::new(move || {
                    let buried = entries(&trash, &|_| true);
                    buried.iter().any(|name| entries(&trash.join(name), &|_| true).len() < 6)
                })
            }
            Point::MirrorGone => Box::new(move || entries(&mirrors, &|name| ends(name, "git")).is_empty()),
        }
    }
}

fn tree(dir: &Path) -> Tree {
    listing(dir).into_iter().map(|(path, kind, content)| (path, (kind, content))).collect()
}

fn whole(repository: &Path) {
    let fsck = git_raw(repository, &["fsck", "--full", "--no-progress"]);
    assert!(fsck.status.success(), "{}", String::from_utf8_lossy(&fsck.stderr));
}

fn inode(path: &Path) -> Option<u64> {
    path.symlink_metadata().ok().map(|stat| stat.ino())
}

fn entries(dir: &Path, wanted: &dyn Fn(&str) -> bool) -> Vec<String> {
    let names = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.file_name());
    names.filter_map(|name| name.into_string().ok()).filter(|name| wanted(name)).collect()
}

fn ends(name: &str, extension: &str) -> bool {
    Path::new(name).extension().is_some_and(|end| end == extension)
}

/// Every path beneath `dir` whose name is wanted.
fn names(dir: &Path, wanted: &dyn Fn(&str) -> bool) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if wanted(&entry.file_name().to_string_lossy()) {
            found.push(entry.path());
        }
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(names(&entry.path(), wanted));
        }
    }
    found
}

/// The children of a process that were started as ours, with their roles.
fn children(parent: u32) -> Vec<(u32, String)> {
    let mut found = Vec::new();
    for thread in fs::read_dir(format!("/proc/{parent}/task")).into_iter().flatten().flatten() {
        let pids = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
        for pid in pids.split_whitespace().filter_map(|pid| pid.parse().ok()) {
            let command = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            if let [.., "child", role, ""] = command.split('\0').collect::<Vec<_>>()[..] {
                found.push((pid, role.to_owned()));
            }
        }
    }
    found
}

fn kill(pid: u32) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, Signal::KILL);
    }
}
