//! Row 19: what blocks whoever reads it, is too much, cannot be read, or is held by somebody.

use std::{
    fs,
    os::unix::{fs::PermissionsExt, net::UnixListener},
    path::Path,
};

use rustix::fs::{FileType, IFlags, Mode, OFlags};

use crate::{
    scene::{git, privileged, write},
    table::{End, Payload, Shown, Where},
    unguarded::{Call, Harm},
};

const CONFLICT: (End, End) = (End::Conflict, End::Conflict);
const WORKS: (End, End) = (End::Works, End::Works);

pub(crate) fn pipe(path: &Path) {
    clear(path);
    rustix::fs::mknodat(rustix::fs::CWD, path, FileType::Fifo, Mode::from_raw_mode(0o644), 0).unwrap();
}

fn clear(path: &Path) {
    if path.is_dir() && !path.is_symlink() {
        fs::remove_dir_all(path).unwrap();
    } else {
        let _ = fs::remove_file(path);
    }
    fs::create_dir_all(path.parent().unwrap()).unwrap();
}

fn socket(path: &Path) {
    clear(path);
    // By a short name: an address of a socket holds no long path.
    let short = std::env::temp_dir().join(format!("s{:x}", rand::random::<u32>()));
    drop(UnixListener::bind(&short).unwrap());
    fs::rename(&short, path).unwrap();
}

/// A device without an end for root, a socket for everybody else, who can make none.
fn device(path: &Path) {
    if !privileged() {
        return socket(path);
    }
    clear(path);
    let zero = rustix::fs::makedev(1, 5);
    rustix::fs::mknodat(rustix::fs::CWD, path, FileType::CharacterDevice, Mode::from_raw_mode(0o644), zero).unwrap();
}

/// A file of so many bytes that takes no place.
fn sparse(path: &Path, length: u64) {
    clear(path);
    fs::File::create(path).unwrap().set_len(length).unwrap();
}

fn lock(w: &Where, mode: u32, name: &str) {
    fs::set_permissions(w.project.join(name), fs::Permissions::from_mode(mode)).unwrap();
}

/// Lets nobody change a file, not even root, until [`thaw`].
fn freeze(path: &Path) {
    if privileged() {
        let file = fs::File::open(path).unwrap();
        let flags = rustix::fs::ioctl_getflags(&file).unwrap();
        rustix::fs::ioctl_setflags(&file, flags | IFlags::IMMUTABLE).unwrap();
    } else {
        let mode = if path.is_dir() { 0o555 } else { 0o444 };
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
}

/// Makes everything in `dir` changeable and removable again.
pub(crate) fn thaw(dir: &Path) {
    let mut waiting = vec![dir.to_owned()];
    while let Some(path) = waiting.pop() {
        let Ok(stat) = path.symlink_metadata() else { continue };
        if !(stat.is_dir() || stat.is_file()) {
            continue;
        }
        let open = || rustix::fs::open(&path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW, Mode::empty());
        if privileged()
            && let Ok(file) = open()
            && let Ok(flags) = rustix::fs::ioctl_getflags(&file)
            && flags.contains(IFlags::IMMUTABLE)
        {
            rustix::fs::ioctl_setflags(&file, flags - IFlags::IMMUTABLE).unwrap();
        }
        if stat.is_dir() {
            let _ = fs::set_permissions(&path, fs::Permissions::from_mode(0o755));
            waiting.extend(fs::read_dir(&path).into_iter().flatten().flatten().map(|entry| entry.path()));
        }
    }
}

/// A chain of directories deeper than any path can name.
fn chain(top: &Path, depth: usize) {
    fs::create_dir_all(top).unwrap();
    let mut at = rustix::fs::open(top, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
    for _ in 0..depth {
        rustix::fs::mkdirat(&at, "d", Mode::RWXU).unwrap();
        at = rustix::fs::openat(&at, "d", OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
    }
}

macro_rules! payload {
    ($name:literal, $shown:expr, $ends:expr, $plant:expr) => {
        Payload { name: $name, shown: $shown, ends: $ends, plant: $plant, stays: &[] }
    };
    ($name:literal, $shown:expr, $ends:expr, $plant:expr, stays $stays:expr) => {
        Payload { name: $name, shown: $shown, ends: $ends, plant: $plant, stays: &[$stays] }
    };
}

const TERABYTE: u64 = 1 << 40;

#[rustfmt::skip]
pub(crate) const PAYLOADS: &[Payload] = &[
    payload!("a pipe as HEAD", Shown::Fails("status"), CONFLICT, |w| pipe(&w.project.join(".git/HEAD"))),
    payload!("a pipe as config", Shown::Fails("status"), CONFLICT, |w| pipe(&w.project.join(".git/config"))),
    payload!("a pipe as config.worktree", Shown::Neither("of no meaning where no setting asks for it"), CONFLICT, |w| pipe(&w.project.join(".git/config.worktree"))),
    payload!("a pipe as index", Shown::Fails("status"), CONFLICT, |w| pipe(&w.project.join(".git/index"))),
    payload!("a pipe as packed-refs", Shown::Fails("for-each-ref"), CONFLICT, |w| pipe(&w.project.join(".git/packed-refs"))),
    payload!("a pipe as shallow", Shown::Fails("log"), CONFLICT, |w| pipe(&w.project.join(".git/shallow"))),
    payload!("a pipe as info/exclude", Shown::Fails("status"), CONFLICT, |w| pipe(&w.project.join(".git/info/exclude"))),
    payload!("a pipe as info/attributes", Shown::Fails("add -f debug.log"), CONFLICT, |w| pipe(&w.project.join(".git/info/attributes"))),
    payload!("a pipe as info/grafts", Shown::Fails("log"), CONFLICT, |w| pipe(&w.project.join(".git/info/grafts"))),
    payload!("a pipe as objects/info/alternates", Shown::Fails("cat-file -e 1111111111111111111111111111111111111111"), CONFLICT, |w| pipe(&w.project.join(".git/objects/info/alternates"))),
    payload!("a pipe as objects/info/commit-graph", Shown::Fails("log"), CONFLICT, |w| pipe(&w.project.join(".git/objects/info/commit-graph"))),
    payload!("a pipe as a pack's index", Shown::Fails("cat-file -e 1111111111111111111111111111111111111111"), CONFLICT, |w| pipe(&w.project.join(format!(".git/objects/pack/pack-{}.idx", "1".repeat(40))))),
    payload!("a pipe as a pack", Shown::Neither("nobody opens one that has no index"), CONFLICT, |w| pipe(&w.project.join(format!(".git/objects/pack/pack-{}.pack", "1".repeat(40))))),
    payload!("a pipe as an object", Shown::Fails("cat-file -p 1111111111111111111111111111111111111111"), CONFLICT, |w| pipe(&w.project.join(format!(".git/objects/11/{}", "1".repeat(38))))),
    payload!("a pipe as the branch", Shown::Fails("log"), CONFLICT, |w| pipe(&w.project.join(".git/refs/heads/main"))),
    payload!("a pipe as a tag", Shown::Fails("rev-parse --verify refs/tags/t"), CONFLICT, |w| pipe(&w.project.join(".git/refs/tags/t"))),
    payload!("a pipe as logs/HEAD", Shown::Fails("commit -q --allow-empty -m x"), CONFLICT, |w| pipe(&w.project.join(".git/logs/HEAD"))),
    payload!("a pipe as MERGE_HEAD", Shown::Fails("commit -q --allow-empty -m x"), CONFLICT, |w| pipe(&w.project.join(".git/MERGE_HEAD"))),
    payload!("a pipe as FETCH_HEAD", Shown::Fails("fetch -q origin"), CONFLICT, |w| pipe(&w.project.join(".git/FETCH_HEAD"))),
    payload!("a pipe as index.lock", Shown::Fails("add mine.txt"), CONFLICT, |w| pipe(&w.project.join(".git/index.lock")), stays ".git/index.lock"),
    payload!("a pipe as .gitignore", Shown::Fails("status"), CONFLICT, |w| pipe(&w.project.join(".gitignore"))),
    payload!("a pipe as .gitattributes", Shown::Fails("add -f debug.log"), CONFLICT, |w| pipe(&w.project.join(".gitattributes"))),
    payload!("a pipe as .gitignore of a directory", Shown::Fails("status -uall"), (End::Conflict, End::Works), |w| pipe(&w.project.join("dir/.gitignore"))),
    payload!("a pipe as .gitattributes of a directory", Shown::Fails("check-attr -a dir/c.txt"), (End::Any, End::Works), |w| pipe(&w.project.join("dir/.gitattributes"))),
    payload!("a pipe as .gitmodules", Shown::Unguarded(Call::Submodules, Harm::Hangs), (End::Any, End::Works), |w| pipe(&w.project.join(".gitmodules"))),
    payload!("a pipe as a tracked file", Shown::Fails("diff"), (End::Works, End::Conflict), |w| pipe(&w.project.join("a.txt"))),
    payload!("a pipe where a file is to come", Shown::Unguarded(Call::Reset, Harm::Hangs), (End::Works, End::Conflict), |w| pipe(&w.project.join("new.txt"))),
    payload!("a pipe where a directory was", Shown::Unguarded(Call::Reset, Harm::Fails), (End::Works, End::Conflict), |w| pipe(&w.project.join("dir"))),
    payload!("a socket as index", Shown::Fails("status"), CONFLICT, |w| socket(&w.project.join(".git/index"))),
    payload!("a socket as the branch", Shown::Fails("rev-parse --verify HEAD"), CONFLICT, |w| socket(&w.project.join(".git/refs/heads/main"))),
    payload!("a socket as a tracked file", Shown::Fails("diff"), (End::Works, End::Conflict), |w| socket(&w.project.join("a.txt"))),
    payload!("a device as config", Shown::Fails("status"), CONFLICT, |w| device(&w.project.join(".git/config"))),
    payload!("a device as HEAD", Shown::Fails("status"), CONFLICT, |w| device(&w.project.join(".git/HEAD"))),
    payload!("a device as index", Shown::Fails("status"), CONFLICT, |w| device(&w.project.join(".git/index"))),
    payload!("a device as packed-refs", Shown::Neither("what has no length is not read"), CONFLICT, |w| device(&w.project.join(".git/packed-refs"))),
    payload!("a device as a tracked file", Shown::Fails("diff"), (End::Works, End::Conflict), |w| device(&w.project.join("a.txt"))),
    payload!("a terabyte as HEAD", Shown::Fails("status"), CONFLICT, |w| sparse(&w.project.join(".git/HEAD"), TERABYTE)),
    payload!("a terabyte as config", Shown::Fails("status"), CONFLICT, |w| sparse(&w.project.join(".git/config"), TERABYTE)),
    payload!("a terabyte as index", Shown::Fails("status"), CONFLICT, |w| sparse(&w.project.join(".git/index"), TERABYTE)),
    payload!("a terabyte as packed-refs", Shown::Fails("for-each-ref"), CONFLICT, |w| sparse(&w.project.join(".git/packed-refs"), TERABYTE)),
    payload!("a terabyte as shallow", Shown::Fails("log"), CONFLICT, |w| sparse(&w.project.join(".git/shallow"), TERABYTE)),
    payload!("a terabyte as info/exclude", Shown::Fails("status"), CONFLICT, |w| sparse(&w.project.join(".git/info/exclude"), TERABYTE)),
    payload!("a terabyte as info/attributes", Shown::Neither("attributes of such a length are passed over"), CONFLICT, |w| sparse(&w.project.join(".git/info/attributes"), TERABYTE)),
    payload!("a terabyte as .gitignore", Shown::Fails("status"), CONFLICT, |w| sparse(&w.project.join(".gitignore"), TERABYTE)),
    payload!("a terabyte as the branch", Shown::Fails("rev-parse --verify HEAD"), CONFLICT, |w| sparse(&w.project.join(".git/refs/heads/main"), TERABYTE)),
    payload!("a terabyte as an object", Shown::Fails("cat-file -p 1111111111111111111111111111111111111111"), WORKS, |w| sparse(&w.project.join(format!(".git/objects/11/{}", "1".repeat(38))), TERABYTE)),
    payload!("a terabyte as a pack's index", Shown::Fails("cat-file -e 1111111111111111111111111111111111111111"), CONFLICT, |w| {
        sparse(&w.project.join(format!(".git/objects/pack/pack-{}.idx", "1".repeat(40))), TERABYTE);
        write(&w.project, &format!(".git/objects/pack/pack-{}.pack", "1".repeat(40)), "PACK");
    }),
    payload!("a terabyte as a tracked file that changes", Shown::Fails("add a.txt"), (End::Works, End::Conflict), |w| sparse(&w.project.join("a.txt"), TERABYTE)),
    payload!("a terabyte as another tracked file", Shown::Fails("add dir/deep/d.txt"), WORKS, |w| sparse(&w.project.join("dir/deep/d.txt"), TERABYTE)),
    payload!("a terabyte where a file is to come", Shown::Fails("add new.txt"), (End::Works, End::Conflict), |w| sparse(&w.project.join("new.txt"), TERABYTE)),
    payload!("sixty-four megabytes as index", Shown::Fails("status"), CONFLICT, |w| sparse(&w.project.join(".git/index"), 1 << 26)),
    payload!("nothing as config", Shown::Fails("fetch origin"), (End::Any, End::Any), |w| write(&w.project, ".git/config", "")),
    payload!("settings without values", Shown::Fails("status"), WORKS, |w| {
        let path = w.project.join(".git/config");
        let text = fs::read_to_string(&path).unwrap();
        fs::write(path, text + "[core]\n\tfilemode\n\texcludesFile\n[noise]\n\tnoise\n[user]\n\tname\n").unwrap();
    }),
    payload!("nothing as index", Shown::Fails("status"), (End::Any, End::Any), |w| write(&w.project, ".git/index", "")),
    payload!("noise as index", Shown::Fails("status"), CONFLICT, |w| write(&w.project, ".git/index", &"DIRC\0\0\0\u{2}\0\0\u{f}\u{f}noise".repeat(50))),
    payload!("noise as packed-refs", Shown::Fails("for-each-ref"), (End::Any, End::Any), |w| write(&w.project, ".git/packed-refs", "noise\n")),
    payload!("noise as the branch", Shown::Fails("rev-parse --verify HEAD"), CONFLICT, |w| write(&w.project, ".git/refs/heads/main", "noise\n")),
    payload!("noise as commit-graph and multi-pack-index", Shown::Fails("commit-graph verify"), (End::Any, End::Any), |w| {
        write(&w.project, ".git/objects/info/commit-graph", &"CGPH\u{1}\u{1}\u{4}\0noise".repeat(100));
        write(&w.project, ".git/objects/pack/multi-pack-index", &"MIDX\u{1}\u{1}\u{4}\0noise".repeat(100));
    }),
    payload!("a directory as HEAD", Shown::Fails("status"), CONFLICT, |w| { clear(&w.project.join(".git/HEAD")); fs::create_dir(w.project.join(".git/HEAD")).unwrap(); }),
    payload!("a directory as index", Shown::Fails("status"), CONFLICT, |w| { clear(&w.project.join(".git/index")); fs::create_dir(w.project.join(".git/index")).unwrap(); }),
    payload!("a directory as config", Shown::Fails("status"), CONFLICT, |w| { clear(&w.project.join(".git/config")); fs::create_dir(w.project.join(".git/config")).unwrap(); }),
    payload!("a file as objects", Shown::Fails("status"), CONFLICT, |w| { clear(&w.project.join(".git/objects")); write(&w.project, ".git/objects", ""); }),
    payload!("a file as refs", Shown::Fails("status"), CONFLICT, |w| { clear(&w.project.join(".git/refs")); write(&w.project, ".git/refs", ""); }),
    payload!("unreadable config", Shown::FailsUnlessRoot("status"), CONFLICT, |w| lock(w, 0o000, ".git/config")),
    payload!("unreadable index", Shown::FailsUnlessRoot("status"), CONFLICT, |w| lock(w, 0o000, ".git/index")),
    payload!("unreadable HEAD", Shown::FailsUnlessRoot("status"), CONFLICT, |w| lock(w, 0o000, ".git/HEAD")),
    payload!("unreadable branch", Shown::FailsUnlessRoot("rev-parse --verify HEAD"), CONFLICT, |w| lock(w, 0o000, ".git/refs/heads/main")),
    payload!("unreadable objects", Shown::FailsUnlessRoot("status"), CONFLICT, |w| lock(w, 0o000, ".git/objects")),
    payload!("unreadable refs", Shown::FailsUnlessRoot("for-each-ref"), CONFLICT, |w| lock(w, 0o000, ".git/refs")),
    payload!("refs that can be listed and not entered", Shown::FailsUnlessRoot("for-each-ref"), CONFLICT, |w| lock(w, 0o444, ".git/refs")),
    payload!("unreadable .git", Shown::FailsUnlessRoot("status"), CONFLICT, |w| lock(w, 0o000, ".git")),
    payload!("unreadable tracked file", Shown::FailsUnlessRoot("hash-object a.txt"), (End::Any, End::Conflict), |w| lock(w, 0o000, "a.txt")),
    payload!("unreadable tracked directory", Shown::FailsUnlessRoot("reset -q --hard ^2"), (End::Any, End::Conflict), |w| lock(w, 0o000, "dir")),
    payload!("an unreadable directory of its user", Shown::FailsUnlessRoot("add private/x"), (End::Any, End::Works), |w| { write(&w.project, "private/x", "x"); lock(w, 0o000, "private"); }),
    payload!("a .git that nobody may write", Shown::Fails("update-ref refs/heads/x HEAD"), (End::Works, End::Conflict), |w| { freeze(&w.project.join(".git/refs/heads")); freeze(&w.project.join(".git")); }),
    payload!("an immutable tracked file", Shown::FailsIfRoot("reset -q --hard ^2"), (End::Works, End::IfRoot), |w| freeze(&w.project.join("a.txt"))),
    payload!("an immutable tracked directory", Shown::Fails("reset -q --hard ^2"), (End::Works, End::Conflict), |w| freeze(&w.project.join("dir"))),
    payload!("an immutable index", Shown::FailsIfRoot("add mine.txt"), (End::Works, End::IfRoot), |w| freeze(&w.project.join(".git/index"))),
    payload!("an immutable branch", Shown::FailsIfRoot("update-ref refs/heads/main ^2"), (End::Works, End::IfRoot), |w| freeze(&w.project.join(".git/refs/heads/main"))),
    payload!("a held index.lock", Shown::Fails("add mine.txt"), (End::Works, End::Conflict), |w| write(&w.project, ".git/index.lock", ""), stays ".git/index.lock"),
    payload!("a held HEAD.lock", Shown::Fails("symbolic-ref HEAD refs/heads/x"), (End::Works, End::Any), |w| write(&w.project, ".git/HEAD.lock", ""), stays ".git/HEAD.lock"),
    payload!("a held lock of the branch", Shown::Fails("update-ref refs/heads/main HEAD~0 --no-deref"), (End::Works, End::Conflict), |w| write(&w.project, ".git/refs/heads/main.lock", ""), stays ".git/refs/heads/main.lock"),
    payload!("a held lock of the tracking ref", Shown::Fails("update-ref refs/remotes/origin/main ^2"), (End::Works, End::Any), |w| write(&w.project, ".git/refs/remotes/origin/main.lock", ""), stays ".git/refs/remotes/origin/main.lock"),
    payload!("a held packed-refs.lock", Shown::Fails("pack-refs --all"), WORKS, |w| write(&w.project, ".git/packed-refs.lock", ""), stays ".git/packed-refs.lock"),
    payload!("a held shallow.lock", Shown::Fails("fetch -q --depth=1 origin"), WORKS, |w| write(&w.project, ".git/shallow.lock", ""), stays ".git/shallow.lock"),
    payload!("a held config.lock", Shown::Fails("config x.y z"), WORKS, |w| write(&w.project, ".git/config.lock", ""), stays ".git/config.lock"),
    payload!("a lock that the agent's own would be, forged", Shown::Fails("add mine.txt"), (End::Works, End::Conflict), |w| {
        write(&w.project, ".git/haul-waiting-00000000000000000000000000000000/index", "mine");
        write(&w.project, ".git/index.lock", "mine");
    }, stays ".git/index.lock"),
    payload!("directories in .git without an end", Shown::Neither("only who walks through all of .git meets them"), CONFLICT, |w| chain(&w.project.join(".git/deep"), 300)),
    payload!("directories in .git's objects without an end", Shown::Neither("only who walks through all of .git meets them"), CONFLICT, |w| chain(&w.project.join(".git/objects/deep"), 300)),
    payload!("directories of its user without an end", Shown::Unguarded(Call::Status, Harm::Fails), (End::Any, End::Works), |w| chain(&w.project.join("deep"), 3000)),
    payload!("directories without an end where a file is to come", Shown::Fails("reset -q --hard ^2"), (End::Any, End::Conflict), |w| chain(&w.project.join("new.txt"), 3000)),
    payload!("a wide directory", Shown::Neither("it is more work and nothing else"), WORKS, |w| (0..20_000).for_each(|file| fs::write(w.project.join(format!("wide-{file}")), "").unwrap())),
    payload!("a merge under way", Shown::Fails("merge -q ^2"), (End::Works, End::Conflict), |w| write(&w.project, ".git/MERGE_HEAD", &format!("{}\n", w.second))),
    payload!("unmerged paths", Shown::Fails("commit -q -m x"), (End::Works, End::Conflict), |w| {
        let blob = git(&w.project, &["rev-parse", "HEAD:a.txt"]);
        let lines: String = (1..4).map(|stage| format!("100644 {blob} {stage}\tunmerged\n")).collect();
        crate::scene::feed(&w.project, &["update-index", "--index-info"], lines.as_bytes());
    }),
    payload!("a split index", Shown::Unguarded(Call::Status, Harm::Fails), (End::Conflict, End::Conflict), |w| drop(git(&w.project, &["-c", "core.splitIndex=true", "update-index", "--split-index"]))),
    payload!("a sparse checkout", Shown::Neither("its user may have one"), CONFLICT, |w| drop(git(&w.project, &["sparse-checkout", "set", "--no-cone", "a.txt"]))),
];
