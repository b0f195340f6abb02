//! Small file systems that fill up, refuse writes or fail, for tests. They need root.

#![expect(clippy::unwrap_used, reason = "a test that cannot be set up shall fail loudly")]

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

/// An ext4 file system in a file, mounted on a directory until this is dropped.
pub(crate) struct Disk {
    at: PathBuf,
    image: PathBuf,
    /// A file system around the image that is smaller than it: then the device fails instead of being full.
    thin: Option<PathBuf>,
    kind: Kind,
    _place: tempfile::TempDir,
}

/// What can be done to a disk.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// It fills up, or is told to refuse writes.
    Whole,
    /// Its device can be made to fail where files grow.
    Thin,
    /// The same also where its own journal is written.
    Brittle,
    /// It takes an error as most systems are set up to: by turning read-only.
    Guarded,
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("these tests need {program}: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {said} (these tests mount file systems: run as root)");
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

impl Disk {
    /// One of so many MiB and inodes.
    pub(crate) fn new(at: &Path, mib: u64, inodes: u64) -> Self {
        Self::make(at, mib, inodes, Kind::Whole)
    }

    /// One whose device can be made to fail where files grow.
    pub(crate) fn thin(at: &Path, mib: u64) -> Self {
        Self::make(at, mib, 2048, Kind::Thin)
    }

    /// One whose device can be made to fail wherever it has not been written to yet, the file system's journal included.
    pub(crate) fn brittle(at: &Path, mib: u64) -> Self {
        Self::make(at, mib, 2048, Kind::Brittle)
    }

    /// One that turns read-only at an error, see [`Disk::error`].
    pub(crate) fn guarded(at: &Path, mib: u64) -> Self {
        Self::make(at, mib, 4096, Kind::Guarded)
    }

    fn make(at: &Path, mib: u64, inodes: u64, kind: Kind) -> Self {
        let place = tempfile::tempdir().unwrap();
        let thin = matches!(kind, Kind::Thin | Kind::Brittle).then(|| {
            let thin = place.path().join("thin");
            fs::create_dir(&thin).unwrap();
            run("mount", &["-t", "tmpfs", "-o", "size=1g", "none", text(&thin)]);
            thin
        });
        let image = thin.as_deref().unwrap_or(place.path()).join("image");
        let disk = Self { at: at.to_owned(), image, thin, kind, _place: place };
        File::create(&disk.image).unwrap().set_len(mib << 20).unwrap();
        // Nothing kept for root, who runs the tests; tables and journal written at once, so that a device that fails later
        // has them, as a real one would.
        let journal = u8::from(kind == Kind::Brittle);
        let plain = format!("lazy_itable_init=0,lazy_journal_init={journal},nodiscard");
        let inodes = inodes.to_string();
        let made = ["-q", "-F", "-m", "0", "-N", &inodes, "-O", "^resize_inode", "-E", &plain, text(&disk.image)];
        run("mkfs.ext4", &made);
        disk.mount();
        disk
    }

    fn mount(&self) {
        fs::create_dir_all(&self.at).unwrap();
        let errors = if self.kind == Kind::Guarded { "remount-ro" } else { "continue" };
        let options = format!("loop,noatime,noinit_itable,errors={errors}");
        run("mount", &["-o", &options, text(&self.image), text(&self.at)]);
    }

    /// Writes down everything that was written so far.
    pub(crate) fn sync(&self) {
        rustix::fs::syncfs(File::open(&self.at).unwrap()).unwrap();
    }

    /// The file to write to for an error that the kernel finds in this file system; it holds until it is mounted anew.
    pub(crate) fn error(&self) -> PathBuf {
        let output = Command::new("findmnt").args(["-no", "SOURCE", text(&self.at)]).output().unwrap();
        let device = String::from_utf8(output.stdout).unwrap();
        let name = device.trim().strip_prefix("/dev/").expect("a device").to_owned();
        Path::new("/sys/fs/ext4").join(name).join("trigger_fs_error")
    }

    /// Lets the device fail every write once it was given `kib` more in new places.
    pub(crate) fn fail_after(&self, kib: u64) {
        self.sync();
        let thin = self.thin.as_deref().expect("a disk that can fail");
        let around = rustix::fs::statvfs(thin).unwrap();
        let used = (around.f_blocks - around.f_bfree) * around.f_frsize / 1024;
        run("mount", &["-o", &format!("remount,size={}k", used + kib.max(4)), text(thin)]);
    }

    /// Takes it out of view; who still works on it holds it.
    pub(crate) fn detach(&self) {
        run("umount", &["-l", text(&self.at)]);
    }

    /// Once nobody holds it any more: lets the device take everything, repairs it as at a boot, and mounts it again.
    pub(crate) fn mend(&self) {
        let begun = Instant::now();
        while !Command::new("losetup").args(["-j", text(&self.image)]).output().unwrap().stdout.is_empty() {
            assert!(begun.elapsed() < Duration::from_secs(20), "somebody still holds the detached disk");
            std::thread::sleep(Duration::from_millis(20));
        }
        if let Some(thin) = &self.thin {
            run("mount", &["-o", "remount,size=1g", text(thin)]);
        }
        // It tells by its code that it mended something.
        let checked = Command::new("e2fsck").args(["-fy", text(&self.image)]).output().unwrap();
        assert!(checked.status.code().is_some_and(|code| code < 4), "{}", String::from_utf8_lossy(&checked.stdout));
        self.mount();
    }

    /// Leaves so many bytes free.
    pub(crate) fn leave(&self, bytes: u64) {
        self.clear();
        let disk = rustix::fs::statvfs(&self.at).unwrap();
        let free = disk.f_bavail * disk.f_frsize;
        let ballast = File::create(self.at.join("ballast")).unwrap();
        let flags = rustix::fs::FallocateFlags::empty();
        // What a file needs to say where its blocks are is not told beforehand.
        let filled = (0..64).any(|less| {
            let length = free.saturating_sub(bytes).saturating_sub(less * disk.f_frsize);
            length == 0 || rustix::fs::fallocate(&ballast, flags, 0, length).is_ok()
        });
        assert!(filled, "the disk cannot be filled");
    }

    /// Leaves so many inodes free.
    pub(crate) fn leave_inodes(&self, left: u64) {
        self.clear();
        let directory = self.at.join("ballast");
        fs::create_dir(&directory).unwrap();
        let free = rustix::fs::statvfs(&self.at).unwrap().f_favail;
        for number in left..free {
            File::create(directory.join(number.to_string())).unwrap();
        }
    }

    /// Gives back what was taken.
    pub(crate) fn clear(&self) {
        let ballast = self.at.join("ballast");
        if ballast.is_dir() {
            fs::remove_dir_all(ballast).unwrap();
        } else {
            let _ = fs::remove_file(ballast);
        }
        self.sync();
    }

    /// Refuses or allows writes.
    pub(crate) fn writable(&self, writable: bool) {
        run("mount", &["-o", if writable { "remount,rw" } else { "remount,ro" }, text(&self.at)]);
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        for at in [Some(&self.at), self.thin.as_ref()].into_iter().flatten() {
            let _ = Command::new("umount").arg("-l").arg(at).output();
        }
    }
}

/// A file or directory that nobody may change, until this is dropped.
pub(crate) struct Immutable(PathBuf);

impl Immutable {
    pub(crate) fn new(path: PathBuf) -> Self {
        run("chattr", &["+i", text(&path)]);
        Self(path)
    }

    /// Says that it stands elsewhere by now.
    pub(crate) fn moved(&mut self, path: PathBuf) {
        assert!(path.exists());
        self.0 = path;
    }
}

impl Drop for Immutable {
    fn drop(&mut self) {
        let _ = Command::new("chattr").arg("-i").arg(&self.0).output();
    }
}
