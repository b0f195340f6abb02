//! Row 18: what leads git out of a project.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use crate::{
    scene::{git, write},
    table::{End, Payload, Shown, Where},
    unguarded::{Call, FAN, Harm},
};

/// Puts a link to `target` in place of a file or directory of the project.
fn swap(project: &Path, name: &str, target: &Path) {
    let path = project.join(name);
    if path.symlink_metadata().is_ok() {
        fs::rename(&path, project.join(".git").join(name.replace('/', "-") + ".was")).unwrap();
    }
    symlink(target, &path).unwrap();
}

/// The stranger's repository.
fn victim(w: &Where) -> PathBuf {
    w.outside.join("victim/.git")
}

/// A file outside that says something as settings of ignored files and as attributes.
fn planted(w: &Where) -> PathBuf {
    write(&w.outside, "planted", "planted\n*.txt planted\n");
    w.outside.join("planted")
}

fn append(project: &Path, name: &str, more: &str) {
    let path = project.join(name);
    let before = fs::read_to_string(&path).unwrap_or_default();
    write(project, name, &(before + more));
}

const CONFLICT: (End, End) = (End::Conflict, End::Conflict);
const WORKS: (End, End) = (End::Works, End::Works);

macro_rules! payload {
    ($name:literal, $shown:expr, $ends:expr, $plant:expr) => {
        Payload { name: $name, shown: $shown, ends: $ends, plant: $plant, stays: &[] }
    };
}

#[rustfmt::skip]
pub(crate) const PAYLOADS: &[Payload] = &[
    payload!("core.worktree outside", Shown::Changes(&["reset -q --hard"]), CONFLICT, |w| {
        append(&w.project, ".git/config", &format!("[core]\n\tworktree = {}\n", w.outside.display()));
    }),
    payload!("core.worktree in a worktree's settings", Shown::Changes(&["reset -q --hard"]), CONFLICT, |w| {
        append(&w.project, ".git/config", "[core]\n\trepositoryformatversion = 1\n[extensions]\n\tworktreeConfig = true\n");
        write(&w.project, ".git/config.worktree", &format!("[core]\n\tworktree = {}\n", w.outside.display()));
    }),
    payload!("core.bare", Shown::Fails("status"), CONFLICT, |w| append(&w.project, ".git/config", "[core]\n\tbare = true\n")),
    payload!("include.path", Shown::Runs("status"), CONFLICT, |w| {
        write(&w.project, ".git/more", &format!("[core]\n\tfsmonitor = {}\n", w.program()));
        append(&w.project, ".git/config", "[include]\n\tpath = more\n");
    }),
    payload!("includeIf", Shown::Runs("status"), CONFLICT, |w| {
        write(&w.project, ".git/more", &format!("[core]\n\tfsmonitor = {}\n", w.program()));
        append(&w.project, ".git/config", "[IncludeIf \"gitdir:/**\"]\n\tpath = more\n");
    }),
    payload!("include.path in a worktree's settings", Shown::Runs("status"), CONFLICT, |w| {
        write(&w.project, ".git/more", &format!("[core]\n\tfsmonitor = {}\n", w.program()));
        append(&w.project, ".git/config", "[core]\n\trepositoryformatversion = 1\n[extensions]\n\tworktreeConfig = true\n");
        write(&w.project, ".git/config.worktree", "[include]\n\tpath = more\n");
    }),
    payload!(".git is a link into another project", Shown::Changes(&["update-ref refs/heads/evil HEAD"]), CONFLICT, |w| {
        fs::rename(w.project.join(".git"), w.project.join("dot-git")).unwrap();
        symlink(victim(w), w.project.join(".git")).unwrap();
    }),
    payload!(".git is a link within the project", Shown::Neither("it leads back to the project"), CONFLICT, |w| {
        fs::rename(w.project.join(".git"), w.project.join("dot-git")).unwrap();
        symlink("dot-git", w.project.join(".git")).unwrap();
    }),
    payload!(".git is a file", Shown::Changes(&["update-ref refs/heads/evil HEAD"]), CONFLICT, |w| {
        fs::rename(w.project.join(".git"), w.project.join("dot-git")).unwrap();
        write(&w.project, ".git", &format!("gitdir: {}\n", victim(w).display()));
    }),
    payload!(".git is gone", Shown::Fails("rev-parse --git-dir"), CONFLICT, |w| {
        fs::rename(w.project.join(".git"), w.project.join("dot-git")).unwrap();
    }),
    payload!("commondir", Shown::Changes(&["update-ref refs/heads/evil HEAD"]), CONFLICT, |w| {
        write(&w.project, ".git/commondir", &format!("{}\n", victim(w).display()));
        fs::copy(victim(w).join("HEAD"), w.project.join(".git/HEAD")).unwrap();
    }),
    payload!("objects is a link", Shown::Changes(&["hash-object -w mine.txt"]), CONFLICT, |w| swap(&w.project, ".git/objects", &victim(w).join("objects"))),
    payload!("objects/pack is a link", Shown::Changes(&["-c fetch.unpackLimit=1 fetch -q origin +refs/heads/main:refs/x"]), CONFLICT, |w| {
        swap(&w.project, ".git/objects/pack", &victim(w).join("objects/pack"));
    }),
    payload!("a fan of objects is a link", Shown::Changes(&["hash-object -w fan.txt"]), CONFLICT, |w| {
        write(&w.project, "fan.txt", FAN);
        swap(&w.project, ".git/objects/aa", &w.outside.join("empty"));
    }),
    payload!("refs is a link", Shown::Changes(&["update-ref refs/heads/evil ^1"]), CONFLICT, |w| swap(&w.project, ".git/refs", &victim(w).join("refs"))),
    payload!("refs/heads is a link", Shown::Changes(&["update-ref refs/heads/evil ^1"]), CONFLICT, |w| swap(&w.project, ".git/refs/heads", &victim(w).join("refs/heads"))),
    payload!("refs/remotes is a link", Shown::Changes(&["update-ref refs/remotes/evil HEAD"]), CONFLICT, |w| swap(&w.project, ".git/refs/remotes", &w.outside.join("empty"))),
    payload!("a branch is a link to a file", Shown::Fails("rev-parse --verify HEAD"), CONFLICT, |w| swap(&w.project, ".git/refs/heads/main", &w.outside.join("precious"))),
    payload!("the index is a link", Shown::Changes(&["add mine.txt"]), CONFLICT, |w| swap(&w.project, ".git/index", &victim(w).join("index"))),
    payload!("logs is a link", Shown::Changes(&["commit -q --allow-empty -m x"]), CONFLICT, |w| swap(&w.project, ".git/logs", &w.outside.join("empty"))),
    payload!("logs/HEAD is a link", Shown::Changes(&["commit -q --allow-empty -m x"]), CONFLICT, |w| swap(&w.project, ".git/logs/HEAD", &w.outside.join("precious"))),
    payload!("logs of the tracking ref is a link", Shown::Changes(&["update-ref -m y --create-reflog refs/remotes/origin/main refs/newer"]), CONFLICT, |w| {
        git(&w.project, &["update-ref", "refs/newer", &w.second]);
        write(&w.project, ".git/logs/refs/remotes/origin/main", "");
        swap(&w.project, ".git/logs/refs/remotes/origin/main", &w.outside.join("precious"));
    }),
    payload!("FETCH_HEAD is a link", Shown::Changes(&["fetch -q origin"]), CONFLICT, |w| swap(&w.project, ".git/FETCH_HEAD", &w.outside.join("precious"))),
    payload!("ORIG_HEAD is a link", Shown::Unguarded(Call::Merge, Harm::Changes), CONFLICT, |w| swap(&w.project, ".git/ORIG_HEAD", &w.outside.join("precious"))),
    payload!("COMMIT_EDITMSG is a link", Shown::Changes(&["commit -q --allow-empty -m x"]), CONFLICT, |w| swap(&w.project, ".git/COMMIT_EDITMSG", &w.outside.join("precious"))),
    payload!("HEAD is a link", Shown::Fails("status"), CONFLICT, |w| swap(&w.project, ".git/HEAD", &victim(w).join("HEAD"))),
    payload!("config is a link", Shown::Changes(&["config x.y z"]), CONFLICT, |w| swap(&w.project, ".git/config", &victim(w).join("config"))),
    payload!("packed-refs is a link", Shown::Changes(&["pack-refs --all"]), CONFLICT, |w| swap(&w.project, ".git/packed-refs", &victim(w).join("packed-refs"))),
    payload!("shallow is a link", Shown::Changes(&["fetch -q --depth=1 origin"]), CONFLICT, |w| {
        write(&w.outside, "shallow", "");
        swap(&w.project, ".git/shallow", &w.outside.join("shallow"));
    }),
    payload!("info/exclude is a link", Shown::Obeys("check-ignore planted", "planted"), CONFLICT, |w| swap(&w.project, ".git/info/exclude", &planted(w))),
    payload!("info/attributes is a link", Shown::Obeys("check-attr planted a.txt", "planted: set"), CONFLICT, |w| swap(&w.project, ".git/info/attributes", &planted(w))),
    payload!("info is a link", Shown::Obeys("check-ignore planted", "planted"), CONFLICT, |w| {
        fs::rename(planted(w), w.outside.join("empty/exclude")).unwrap();
        swap(&w.project, ".git/info", &w.outside.join("empty"));
    }),
    payload!("alternates into another project", Shown::Reads, CONFLICT, |w| {
        write(&w.project, ".git/objects/info/alternates", &format!("{}\n", victim(w).join("objects").display()));
    }),
    payload!("alternates into the mirrors", Shown::Neither("there is no such mirror; another project's objects are shown above"), CONFLICT, |w| {
        write(&w.project, ".git/objects/info/alternates", "../../../../.haul/mirrors/x.git/objects\n");
    }),
    payload!("alternates by way of a link", Shown::Reads, CONFLICT, |w| {
        write(&w.outside, "list", &format!("{}\n", victim(w).join("objects").display()));
        swap(&w.project, ".git/objects/info/alternates", &w.outside.join("list"));
    }),
    payload!("http-alternates", Shown::Neither("only a client of the oldest protocol reads it"), CONFLICT, |w| write(&w.project, ".git/objects/info/http-alternates", "http://localhost/objects\n")),
    payload!("a linked worktree's gitdir", Shown::Neither("of no meaning where no setting asks for it"), CONFLICT, |w| write(&w.project, ".git/gitdir", &format!("{}\n", w.outside.display()))),
    payload!("worktrees of its user", Shown::Neither("its user may have them"), WORKS, |w| {
        write(&w.project, ".git/worktrees/x/gitdir", &format!("{}\n", w.outside.join("dir/.git").display()));
        write(&w.project, ".git/worktrees/x/HEAD", "ref: refs/heads/x\n");
        write(&w.project, ".git/worktrees/x/commondir", "../..\n");
    }),
    payload!("replace refs and grafts", Shown::Fails("rev-parse --verify ^2:new.txt"), WORKS, |w| {
        write(&w.project, &format!(".git/refs/replace/{}", w.second), &format!("{}\n", w.first));
        write(&w.project, ".git/info/grafts", &format!("{}\n", w.first));
    }),
    payload!("HEAD names a ref outside", Shown::Fails("rev-parse --verify HEAD"), CONFLICT, |w| write(&w.project, ".git/HEAD", "ref: ../../../outside/precious\n")),
    payload!("a branch that is a ref to a ref to itself", Shown::Fails("rev-parse --verify HEAD"), CONFLICT, |w| {
        write(&w.project, ".git/refs/heads/main", "ref: refs/heads/loop\n");
        write(&w.project, ".git/refs/heads/loop", "ref: refs/heads/main\n");
    }),
    payload!("another format of refs", Shown::Fails("log"), CONFLICT, |w| append(&w.project, ".git/config", "[core]\n\trepositoryformatversion = 1\n[extensions]\n\trefStorage = reftable\n")),
    payload!("another format of objects", Shown::Fails("status"), CONFLICT, |w| append(&w.project, ".git/config", "[core]\n\trepositoryformatversion = 1\n[extensions]\n\tobjectFormat = sha256\n")),
    payload!("a partial clone", Shown::Unguarded(Call::Status, Harm::Fails), CONFLICT, |w| append(&w.project, ".git/config", "[core]\n\trepositoryformatversion = 1\n[extensions]\n\tpartialClone = origin\n")),
    payload!("a tracked directory is a link", Shown::Unguarded(Call::Reset, Harm::Changes), (End::Works, End::Conflict), |w| swap(&w.project, "dir", &w.outside.join("dir"))),
    payload!("a tracked directory is a link within the project", Shown::Neither("it is refused as a change of the user's"), (End::Works, End::Conflict), |w| {
        fs::rename(w.project.join("dir"), w.project.join("other")).unwrap();
        symlink("other", w.project.join("dir")).unwrap();
    }),
    payload!("a tracked file is a link to one like it", Shown::Unguarded(Call::Reset, Harm::Changes), (End::Works, End::Conflict), |w| swap(&w.project, "a.txt", &w.outside.join("a.txt"))),
    payload!("a file that is to come is a link", Shown::Unguarded(Call::Reset, Harm::Changes), (End::Works, End::Conflict), |w| symlink(w.outside.join("precious"), w.project.join("new.txt")).unwrap()),
    payload!("a file that is to come is a link to nothing", Shown::Unguarded(Call::Reset, Harm::Changes), (End::Works, End::Conflict), |w| symlink(w.outside.join("made-by-a-pull"), w.project.join("dir/e.txt")).unwrap()),
    payload!("a tracked file has another name outside", Shown::Unguarded(Call::Checkout, Harm::Changes), WORKS, |w| {
        fs::remove_file(w.project.join("a.txt")).unwrap();
        fs::hard_link(w.outside.join("a.txt"), w.project.join("a.txt")).unwrap();
    }),
    payload!(".gitignore is a link", Shown::Unguarded(Call::Ignored, Harm::Obeys), CONFLICT, |w| swap(&w.project, ".gitignore", &planted(w))),
    payload!(".gitattributes is a link", Shown::Unguarded(Call::Reset, Harm::Changes), CONFLICT, |w| swap(&w.project, ".gitattributes", &planted(w))),
    payload!(".gitattributes of a directory is a link", Shown::Unguarded(Call::Attributes, Harm::Obeys), (End::Any, End::Any), |w| symlink(planted(w), w.project.join("dir/.gitattributes")).unwrap()),
    payload!("a gitlink in the way", Shown::Fails("add -A"), (End::Works, End::Conflict), |w| {
        git(&w.project, &["init", "-q", "new.txt"]);
        write(&w.project, "new.txt/inside", "of its user\n");
    }),
    payload!("a forged place of the agent's own", Shown::Neither("nobody but an agent looks there"), WORKS, |w| {
        write(&w.project, ".haul/owners/p", "{\"project\": 99}");
        write(&w.project, ".git/haul", "{\"project\": 99}");
        let forged = w.project.join(".git/haul-waiting-00000000000000000000000000000000");
        fs::create_dir(&forged).unwrap();
        symlink(&w.outside, forged.join("away")).unwrap();
        write(&forged, "refs", &format!("{} refs/../../../../../outside/precious\n{0} refs/heads/../../../../x\n", "1".repeat(40)));
        fs::hard_link(w.outside.join("precious"), forged.join("index")).unwrap();
    }),
    payload!("a forged place of the agent's own that is a link", Shown::Neither("nobody but an agent looks there"), CONFLICT, |w| {
        symlink(&w.outside, w.project.join(".git/haul-waiting-00000000000000000000000000000000")).unwrap();
    }),
    payload!("a forged place of the agent's own with a pipe", Shown::Neither("nobody but an agent looks there"), WORKS, |w| {
        let forged = w.project.join(".git/haul-waiting-00000000000000000000000000000000");
        fs::create_dir(&forged).unwrap();
        crate::blocking::pipe(&forged.join("refs"));
    }),
];
