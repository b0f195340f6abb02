//! The one who never rests.

#![allow(dead_code, reason = "each suite uses its own part")]

use std::{
    collections::{BTreeMap, HashSet},
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{Child, Stdio},
    time::Duration,
};

use rand::{Rng, SeedableRng, rngs::StdRng};
use serde::{Deserialize, Serialize};

use crate::scene::{command, git};

/// What upstream changes again and again.
pub(crate) const TRACKED: [&str; 5] = ["a.txt", "dir/c.txt", "dir/e.txt", "new.txt", "deep/er/x.txt"];
/// What upstream never has: untracked, and ignored.
const OWN: [&str; 4] = ["mine.txt", "debug.log", "dir/own.log", "notes/today.txt"];

pub(crate) struct Writer {
    project: PathBuf,
    /// Where links lead to just now.
    outside: PathBuf,
    /// Where they may lead to.
    outsides: Vec<PathBuf>,
    aside: PathBuf,
    /// How long it rests at most between two bursts, in microseconds.
    lull: u64,
    chance: StdRng,
    config: String,
    gc: Option<Child>,
    /// What the user's own files hold, as last written.
    pub(crate) own: BTreeMap<String, String>,
    /// Everything ever written to a tracked file.
    pub(crate) written: HashSet<String>,
    pub(crate) steps: u64,
}

/// What is known of a writer that rests.
#[derive(Serialize, Deserialize)]
pub(crate) struct Report {
    config: String,
    own: BTreeMap<String, String>,
    written: HashSet<String>,
    steps: u64,
}

impl Writer {
    pub(crate) fn new(project: &Path, outside: &Path, aside: &Path, seed: u64) -> Self {
        fs::create_dir(aside).unwrap();
        let config = fs::read_to_string(project.join(".git/config")).unwrap();
        let begun = Report { config, own: BTreeMap::new(), written: HashSet::new(), steps: 0 };
        let mut writer = Self::rested(project, begun);
        writer.outsides = vec![outside.to_owned()];
        outside.clone_into(&mut writer.outside);
        aside.clone_into(&mut writer.aside);
        writer.chance = StdRng::seed_from_u64(seed);
        for name in OWN {
            writer.write_own(name);
        }
        writer
    }

    /// One that leads to another place outside as well.
    pub(crate) fn also(mut self, outside: &Path) -> Self {
        self.outsides.push(outside.to_owned());
        self
    }

    /// One that rests longer between its bursts: whom mode bits hold meets more that is in the way.
    pub(crate) fn calmer(mut self) -> Self {
        self.lull = 600_000;
        self
    }

    /// One that worked in another process, and rests.
    pub(crate) fn rested(project: &Path, report: Report) -> Self {
        Self {
            project: project.to_owned(),
            outside: PathBuf::new(),
            outsides: Vec::new(),
            aside: PathBuf::new(),
            lull: 200_000,
            chance: StdRng::seed_from_u64(0),
            config: report.config,
            gc: None,
            own: report.own,
            written: report.written,
            steps: report.steps,
        }
    }

    /// What another process has to know of it.
    pub(crate) fn report(self) -> Report {
        Report { config: self.config, own: self.own, written: self.written, steps: self.steps }
    }

    /// Does one thing. Whatever is altered is put right again after a moment, so that some pulls come through.
    pub(crate) fn step(&mut self) {
        self.steps += 1;
        let outside = self.chance.random_range(0..self.outsides.len());
        self.outsides[outside].clone_into(&mut self.outside);
        match self.chance.random_range(0..16) {
            0 => self.settings(),
            1 => self.swapped(".git/refs", ".git/refs.was", |w| w.outside.join("victim/.git/refs")),
            2 => self.swapped(".git/objects", ".git/objects.was", |w| w.outside.join("victim/.git/objects")),
            3 => self.swapped(".git", "dot-git", |w| w.outside.join("victim/.git")),
            4 => self.swapped("dir", "dir.was", |w| w.outside.join("dir")),
            5 => self.swapped(".git/index", ".git/index.was", |w| w.outside.join("victim/.git/index")),
            6 => self.swapped("a.txt", "a.was", |w| w.outside.join("precious")),
            7 => self.swapped(".git/logs", ".git/logs.was", |w| w.outside.join("empty")),
            8 => self.locked(),
            9 => self.moved_refs(),
            10 => self.prune(),
            11 | 12 => {
                let name = TRACKED[self.chance.random_range(0..TRACKED.len())];
                self.edit(name);
            }
            13 => {
                let name = OWN[self.chance.random_range(0..OWN.len())];
                self.write_own(name);
            }
            14 => self.unreadable(),
            _ => self.pipe(),
        }
        // In bursts, with time between them for a pull to come through.
        let most = if self.chance.random_bool(0.3) { self.lull } else { 3000 };
        self.pause(most);
    }

    /// Ends what runs beside.
    pub(crate) fn rest(&mut self) {
        let Some(mut gc) = self.gc.take() else { return };
        // Git itself waits for ever for a pipe that was there for a moment.
        for _ in 0..300 {
            if gc.try_wait().is_ok_and(|ended| ended.is_some()) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let group = rustix::process::Pid::from_child(&gc);
        let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        let _ = gc.wait();
    }

    /// Repairs what the project needs to be one, as its user would.
    pub(crate) fn mend(&self, url: &str) {
        let git_dir = self.project.join(".git");
        assert!(git_dir.is_dir() && !git_dir.is_symlink());
        fs::write(git_dir.join("config"), &self.config).unwrap();
        unlock(&git_dir);
        // A gc that was killed has taken the index away, or left half of one, and nobody can read the pack any more.
        for entry in fs::read_dir(git_dir.join("objects/pack")).unwrap() {
            let path = entry.unwrap().path();
            let index = path.with_extension("idx");
            if path.extension().is_some_and(|kind| kind == "pack")
                && !command(&git_dir).arg("verify-pack").arg(&index).output().unwrap().status.success()
            {
                fs::remove_file(&path).unwrap();
                let _ = fs::remove_file(index);
            }
        }
        // What prune took is fetched again; a ref of the writer's own may point to it.
        // Nothing that goes on after it.
        git(
            &self.project,
            &["fetch", "-q", "--no-auto-maintenance", "--refetch", url, "+refs/heads/main:refs/remotes/origin/main"],
        );
    }

    fn pause(&mut self, most: u64) {
        let pause = self.chance.random_range(0..most);
        std::thread::sleep(Duration::from_micros(pause));
    }

    fn settings(&mut self) {
        let evil = [
            format!("[core]\n\tworktree = {}\n", self.outside.display()),
            "[include]\n\tpath = /dev/zero\n".to_owned(),
            "[core]\n\tfsmonitor = /bin/false\n\thooksPath = /\n".to_owned(),
            format!("[core]\n\texcludesFile = {}\n", self.outside.join("precious").display()),
            "noise".to_owned(),
        ];
        let chosen = &evil[self.chance.random_range(0..evil.len())];
        let _ = fs::write(self.project.join(".git/config"), format!("{}{chosen}", self.config));
        self.pause(3000);
        let _ = fs::write(self.project.join(".git/config"), &self.config);
    }

    /// Puts a link in place of something, many times, and the thing back.
    fn swapped(&mut self, name: &str, away: &str, target: impl Fn(&Self) -> PathBuf) {
        let (path, away) = (self.project.join(name), self.project.join(away));
        let target = target(self);
        // Plain git would follow the links of whoever started it.
        self.rest();
        for _ in 0..self.chance.random_range(1..20) {
            if fs::rename(&path, &away).is_err() {
                return;
            }
            let linked = symlink(&target, &path).is_ok();
            self.pause(400);
            if linked && path.is_symlink() {
                let _ = fs::remove_file(&path);
            }
            // Somebody may have made another there meanwhile.
            if rustix::fs::renameat_with(
                rustix::fs::CWD,
                &away,
                rustix::fs::CWD,
                &path,
                rustix::fs::RenameFlags::NOREPLACE,
            )
            .is_err()
            {
                let other = self.aside.join(format!("{:x}", self.chance.random::<u64>()));
                let _ = fs::rename(&path, other);
                let _ = fs::rename(&away, &path);
            }
            self.pause(400);
        }
    }

    fn locked(&mut self) {
        let locks = ["index.lock", "HEAD.lock", "packed-refs.lock", "refs/heads/main.lock", "config.lock"];
        let lock = self.project.join(".git").join(locks[self.chance.random_range(0..locks.len())]);
        if fs::File::options().write(true).create_new(true).open(&lock).is_ok() {
            fs::write(&lock, "the writer's").unwrap_or_default();
            self.pause(6000);
            let ours = fs::read_to_string(&lock);
            assert_eq!(ours.ok().as_deref(), Some("the writer's"), "a live lock was removed: {}", lock.display());
            let _ = fs::remove_file(&lock);
        }
    }

    fn moved_refs(&mut self) {
        let refs = self.project.join(".git/refs/heads");
        let Ok(before) = fs::read_to_string(refs.join("main")) else { return };
        let other = ["0".repeat(40), "noise".to_owned(), "ref: refs/heads/main".to_owned()];
        let _ = fs::write(refs.join(format!("w{}", self.chance.random_range(0..5))), &before);
        let _ = fs::write(refs.join("odd"), &other[self.chance.random_range(0..other.len())]);
        self.pause(2000);
        let _ = fs::remove_file(refs.join("odd"));
    }

    fn prune(&mut self) {
        if self.gc.as_mut().is_some_and(|gc| gc.try_wait().is_ok_and(|ended| ended.is_none())) {
            return;
        }
        let mut gc = command(&self.project);
        std::os::unix::process::CommandExt::process_group(&mut gc, 0);
        gc.args(["-c", "gc.reflogExpire=now", "gc", "-q", "--prune=now"]);
        self.gc = gc.stdout(Stdio::null()).stderr(Stdio::null()).spawn().ok();
    }

    /// Saves a file as an editor does: beside its place, then by a rename.
    fn edit(&mut self, name: &str) {
        let content = format!("the writer's {:016x}\n", self.chance.random::<u64>());
        let beside = self.aside.join("beside");
        let path = self.project.join(name);
        if path.parent().is_some_and(|parent| parent.is_dir() && !parent.is_symlink()) {
            self.written.insert(content.clone());
            fs::write(&beside, content).unwrap();
            let _ = fs::rename(&beside, &path);
        }
        self.pause(8000);
        // Sometimes it is thrown away, so that a pull comes through.
        if self.chance.random_bool(0.95) {
            let _ = fs::remove_file(&path);
        }
    }

    fn write_own(&mut self, name: &str) {
        let content = format!("only the user's {:016x}\n", self.chance.random::<u64>());
        // A pull may remove an empty directory in this moment.
        let path = self.project.join(name);
        while fs::create_dir_all(path.parent().unwrap()).and_then(|()| fs::write(&path, &content)).is_err() {}
        self.own.insert(name.to_owned(), content);
    }

    fn unreadable(&mut self) {
        let names = [".git/config", ".git/HEAD", ".git/refs", "dir", "a.txt"];
        let path = self.project.join(names[self.chance.random_range(0..names.len())]);
        let Ok(stat) = path.symlink_metadata() else { return };
        if stat.is_symlink() || fs::set_permissions(&path, fs::Permissions::from_mode(0o000)).is_err() {
            return;
        }
        self.pause(3000);
        let _ = fs::set_permissions(&path, stat.permissions());
    }

    fn pipe(&mut self) {
        let names = [".git/FETCH_HEAD", ".git/shallow", ".git/info/grafts", "new.txt"];
        let path = self.project.join(names[self.chance.random_range(0..names.len())]);
        let mode = rustix::fs::Mode::from_raw_mode(0o644);
        if rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).is_ok() {
            self.pause(3000);
            let _ = fs::remove_file(&path);
        }
    }
}

/// Removes what programs that were killed hold for ever.
fn unlock(directory: &Path) {
    for entry in fs::read_dir(directory).unwrap().flatten() {
        let (path, kind) = (entry.path(), entry.file_type().unwrap());
        if kind.is_dir() {
            unlock(&path);
        } else if path.extension().is_some_and(|end| end == "lock")
            || path.file_name().is_some_and(|name| name == "gc.pid")
        {
            let _ = fs::remove_file(path);
        }
    }
}
