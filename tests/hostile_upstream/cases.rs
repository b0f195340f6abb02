//! The table of what is served, and how tasks must end on it.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use bytesize::ByteSize;
use git2::{ObjectType, Oid};
use haul::{
    execute::GitExecutor,
    failure::{ErrorClass, Failure},
    protocol::TaskResult,
};
use serde_json::{Value, json};

use crate::{
    forge::{Forge, number, sealed, stored, zeros},
    scene::{assert_untouched, execute, git, job, open_with, program, snapshot},
    server::{Served, Server},
};

/// Few enough that what is too many costs nothing.
const MOST_FILES: u64 = 20_000;
const MOST_BYTES: u64 = 64 << 20;

/// How a clone or a pull may end.
#[derive(Clone, Copy, Debug)]
pub(crate) enum End {
    Refused(&'static [ErrorClass]),
    Works,
    /// Works, and what it made is what the tree says; or refused as any of these.
    Either(&'static [ErrorClass]),
}

use ErrorClass::{Corrupt, Forbidden, Invalid, Network, NotFound, Quota};

const FORBIDDEN: End = End::Refused(&[Forbidden]);
/// One that announces more than there can be is too much before it is anything else.
const DAMAGED: End = End::Refused(&[Corrupt, Network, Quota]);

/// One hostile commit on top of the good one, and where the branch is.
struct Case {
    name: String,
    forge: Forge,
    tip: Oid,
    /// Changes to the pack after it was made.
    spoil: Option<fn(Vec<u8>) -> Vec<u8>>,
    ends: (End, End),
    more_refs: Vec<String>,
}

/// What everybody starts from.
struct Good {
    forge: Forge,
    commit: Oid,
    blob: Oid,
    tree: Oid,
}

fn good() -> Good {
    let mut forge = Forge::default();
    let blob = forge.blob("good\n");
    let inner = forge.tree(&[("100644", b"b.txt", blob)]);
    let tree = forge.tree(&[("100644", b"a.txt", blob), ("40000", b"dir", inner)]);
    let commit = forge.commit(tree, &[]);
    Good { forge, commit, blob, tree }
}

struct Table<'a> {
    good: &'a Good,
    cases: Vec<Case>,
}

impl Table<'_> {
    /// A tree made by `make`, with blob and tree to point to.
    fn tree(&mut self, name: impl Into<String>, end: End, make: impl FnOnce(&mut Forge, Oid, Oid) -> Oid) {
        self.both(name, (end, end), make);
    }

    fn both(&mut self, name: impl Into<String>, ends: (End, End), make: impl FnOnce(&mut Forge, Oid, Oid) -> Oid) {
        self.tip(name, ends, |forge, good| {
            let tree = make(forge, good.blob, good.tree);
            forge.commit(tree, &[good.commit])
        });
    }

    fn tip(&mut self, name: impl Into<String>, ends: (End, End), make: impl FnOnce(&mut Forge, &Good) -> Oid) {
        let mut forge = self.good.forge.clone();
        let tip = make(&mut forge, self.good);
        let (spoil, more_refs) = (None, Vec::new());
        self.cases.push(Case { name: name.into(), forge, tip, spoil, ends, more_refs });
    }

    /// Files and links in the tree itself, directories and submodules two directories down.
    fn names(&mut self, what: &str, mode: &'static str, name: &[u8], end: End) {
        let shown = format!("{what} {:?}", String::from_utf8_lossy(name));
        let id = |blob, tree| if mode == "40000" { tree } else { blob };
        if mode.starts_with("10") {
            return self.tree(shown, end, |forge, blob, tree| forge.tree(&[(mode, name, id(blob, tree))]));
        }
        self.tree(format!("{shown}, deeper"), end, |forge, blob, tree| {
            let inner = forge.tree(&[(mode, name, id(blob, tree))]);
            let middle = forge.tree(&[("40000", b"sub", inner)]);
            forge.tree(&[("100644", b"a.txt", blob), ("40000", b"top", middle)])
        });
    }
}

#[expect(clippy::too_many_lines, reason = "a table")]
fn table(good: &Good) -> Vec<Case> {
    let mut table = Table { good, cases: Vec::new() };
    let disguises: [&[u8]; 17] = [
        b".git",
        b".GIT",
        b".Git",
        b".giT",
        ".g\u{200c}it".as_bytes(),
        ".gi\u{200d}t".as_bytes(),
        "\u{feff}.git".as_bytes(),
        ".git\u{202e}".as_bytes(),
        b"git~1",
        b"GIT~1",
        b"Git~1",
        b".git ",
        b".git.",
        b".git . .",
        b".git::$INDEX_ALLOCATION",
        b".GIT:x",
        b".git\\config",
    ];
    for name in disguises {
        table.names("a file", "100644", name, FORBIDDEN);
        table.names("a directory", "40000", name, FORBIDDEN);
    }
    for name in [&b".."[..], b".", b"a/b", b"../x", b"/x", b"dir/"] {
        table.names("a file", "100644", name, FORBIDDEN);
        table.names("a directory", "40000", name, FORBIDDEN);
        table.names("a link", "120000", name, FORBIDDEN);
    }
    table.names("a file", "100644", b"", End::Refused(&[Forbidden, Corrupt]));
    table.names("a file", "100644", &[b'x'; 256], FORBIDDEN);
    for name in [&b".gitmodules"[..], b".GITMODULES", b".gitmodules ", b"gitmod~1", ".gitm\u{200c}odules".as_bytes()] {
        table.names("a link", "120000", name, FORBIDDEN);
    }
    table.names("a submodule", "160000", b".git", FORBIDDEN);

    table.tree("a name twice", FORBIDDEN, |forge, blob, _| {
        forge.tree(&[("100644", b"x", blob), ("100644", b"x", blob)])
    });
    table.tree("a file and a directory of one name", FORBIDDEN, |forge, blob, tree| {
        forge.tree(&[("100644", b"x", blob), ("40000", b"x", tree)])
    });
    table.tree("a link and a directory of one name", FORBIDDEN, |forge, _, tree| {
        let away = forge.blob("../../../outside");
        forge.tree(&[("120000", b"dir", away), ("40000", b"dir", tree)])
    });
    table.tree("a link and a directory of one name, far apart", FORBIDDEN, |forge, blob, tree| {
        let away = forge.blob("../../../outside");
        forge.tree(&[("120000", b"dir", away), ("100644", b"dir-", blob), ("40000", b"dir", tree)])
    });
    table.tree("a wrong order", End::Either(&[Corrupt, Forbidden]), |forge, blob, tree| {
        forge.tree(&[("100644", b"z", blob), ("40000", b"dir", tree), ("100644", b"a.txt", blob)])
    });

    for (mode, works) in [
        ("100777", true),
        ("100600", true),
        ("100664", true),
        ("100000", true),
        ("0100644", true),
        ("0", false),
        ("170000", false),
        ("140644", false),
        ("777777777777777777", false),
        ("-100644", false),
        ("", false),
        ("1x0644", false),
    ] {
        let end = if works { End::Either(&[Corrupt]) } else { End::Either(&[Corrupt, Forbidden]) };
        table.tree(format!("the mode {mode:?}"), end, |forge, blob, _| forge.tree(&[(mode, b"a.txt", blob)]));
    }
    table.tree("a submodule without settings", End::Works, |forge, blob, _| {
        let nowhere = Oid::from_str(&"1".repeat(40)).unwrap();
        forge.tree(&[("100644", b"a.txt", blob), ("160000", b"sub", nowhere)])
    });
    table.tree("a directory that is a file's object", DAMAGED, |forge, blob, _| forge.tree(&[("40000", b"x", blob)]));
    table.tree("a file that is a directory's object", DAMAGED, |forge, _, tree| forge.tree(&[("100644", b"x", tree)]));
    table.tree("a link that is a directory's object", DAMAGED, |forge, _, tree| forge.tree(&[("120000", b"x", tree)]));
    table.tree(
        "a link to a place with a zero in it",
        End::Either(&[Corrupt, Forbidden, Invalid, ErrorClass::Internal]),
        |forge, _, _| {
            let odd = forge.blob("a\0b");
            forge.tree(&[("120000", b"x", odd)])
        },
    );
    table.tree("a link longer than any path", End::Either(&[Corrupt, Forbidden, Quota]), |forge, _, _| {
        let long = forge.blob(&"x".repeat(10_000));
        forge.tree(&[("120000", b"x", long)])
    });
    table.tree("a link to nowhere at all", End::Either(&[Corrupt, Forbidden]), |forge, _, _| {
        let empty = forge.blob("");
        forge.tree(&[("120000", b"x", empty)])
    });
    table.tree("half an entry", DAMAGED, |forge, _, _| forge.add(ObjectType::Tree, &b"100644 x\0short"[..]));
    table.tree("noise for a tree", DAMAGED, |forge, _, _| forge.add(ObjectType::Tree, &b"\xff\xfe\xfd"[..]));

    table.tree("five thousand directories deep", FORBIDDEN, |forge, blob, _| {
        let bottom = forge.tree(&[("100644", b"f", blob)]);
        (0..5000).fold(bottom, |inner, _| forge.tree(&[("40000", b"d", inner)]))
    });
    table.tree("ten thousand million files from eleven objects", End::Refused(&[Quota]), |forge, blob, _| {
        bomb(forge, "100644", blob)
    });
    table.tree("ten thousand million directories without a file", End::Refused(&[Quota]), |forge, _, _| {
        let empty = forge.tree(&[]);
        bomb(forge, "40000", empty)
    });
    table.tree("a directory of too many files", End::Refused(&[Quota]), |forge, blob, _| {
        let names: Vec<_> = (0..=MOST_FILES).map(|file| format!("{file:08}")).collect();
        let entries: Vec<_> = names.iter().map(|name| ("100644", name.as_bytes(), blob)).collect();
        forge.tree(&entries)
    });
    table.tree("one large file a hundred times", End::Refused(&[Quota]), |forge, _, _| {
        let large = forge.blob(&"x".repeat(1 << 20));
        let names: Vec<_> = (0..100).map(|file| format!("{file:08}")).collect();
        let entries: Vec<_> = names.iter().map(|name| ("100644", name.as_bytes(), large)).collect();
        forge.tree(&entries)
    });
    table.tree("a gigabyte of zeros", End::Refused(&[Quota, Corrupt]), |forge, _, _| {
        let runs = 4_161_790;
        forge.raw(3, 1 + 258 * runs, zeros(runs));
        // Its own id would have to be reckoned; the tree names the good file, and the pack is what is too much.
        let blob = forge.blob("beside it\n");
        forge.tree(&[("100644", b"x", blob)])
    });
    table.tree("a gigabyte of zeros in a kilobyte", End::Refused(&[Quota, Corrupt]), |forge, _, _| {
        let base = vec![0_u8; 1 << 20];
        let id = Oid::hash_object(ObjectType::Blob, &base).unwrap();
        let runs = ((1 << 20) - 1) / 258;
        // As many zeros as runs make, and the base is that.
        let length = 1 + 258 * runs;
        let _ = id;
        let short = vec![0_u8; usize::try_from(length).unwrap()];
        let base = Oid::hash_object(ObjectType::Blob, &short).unwrap();
        forge.raw(3, length, zeros(runs));
        let copies = 1100_u64;
        let mut delta = number(length);
        delta.extend(number(copies * length));
        for _ in 0..copies {
            let size = u32::try_from(length).unwrap().to_le_bytes();
            delta.extend([0xf0, size[0], size[1], size[2]]);
        }
        let mut rest = base.as_bytes().to_vec();
        let size = delta.len() as u64;
        rest.extend(stored(&delta));
        forge.raw(7, size, rest);
        let blob = forge.blob("beside it\n");
        forge.tree(&[("100644", b"x", blob)])
    });

    table.tree("a file that is not there", DAMAGED, |forge, _, _| {
        let missing = forge.blob("never sent\n");
        forge.forget(missing);
        forge.tree(&[("100644", b"x", missing)])
    });
    table.tree("a directory that is not there", DAMAGED, |forge, blob, _| {
        let missing = forge.tree(&[("100644", b"never-sent", blob)]);
        forge.forget(missing);
        forge.tree(&[("40000", b"x", missing)])
    });
    table.tip("a commit whose tree is not there", (DAMAGED, DAMAGED), |forge, good| {
        let missing = forge.tree(&[("100644", b"never-sent-either", good.blob)]);
        forge.forget(missing);
        forge.commit(missing, &[good.commit])
    });
    table.tip("a commit that is not there", (DAMAGED, DAMAGED), |forge, good| {
        let tip = forge.commit(good.tree, &[good.commit, good.commit]);
        forge.forget(tip);
        tip
    });
    table.tip("a commit whose parent is not there", (End::Either(&[Corrupt, Network]), DAMAGED), |forge, good| {
        let parent = forge.commit(good.tree, &[good.commit, good.commit]);
        forge.forget(parent);
        forge.commit(good.tree, &[good.commit, parent])
    });
    for (name, text) in [
        ("a commit without a tree", "author A <a@example.org> 1 +0000\n\nx\n".to_owned()),
        ("a commit whose tree is no id", "tree main\nauthor A <a@example.org> 1 +0000\n\nx\n".to_owned()),
        ("an empty commit object", String::new()),
    ] {
        table.tip(
            name,
            (End::Refused(&[Corrupt, Invalid, Network]), End::Refused(&[Corrupt, Invalid, Network, NotFound])),
            |forge, _| forge.add(ObjectType::Commit, text),
        );
    }
    let no_commit = End::Refused(&[Invalid, Corrupt, NotFound]);
    table.tip("a branch that is a file", (no_commit, no_commit), |_, good| good.blob);
    table.tip("a branch that is a tree", (no_commit, no_commit), |_, good| good.tree);
    table.tip("a branch that is a tag of a file", (no_commit, no_commit), |forge, good| {
        forge.tag(good.blob, "blob", "t")
    });
    table.tip("a branch that is a tag that lies", (no_commit, no_commit), |forge, good| {
        forge.tag(good.blob, "commit", "t")
    });
    table.tip(
        "a branch that is a tag of ten thousand tags",
        (End::Either(&[Invalid, Corrupt]), End::Either(&[Invalid, Corrupt])),
        |forge, good| (0..10_000).fold(forge.tag(good.commit, "commit", "t"), |inner, _| forge.tag(inner, "tag", "t")),
    );
    table.tip("a branch that is a tag of nothing", (no_commit, no_commit), |forge, _| {
        forge.tag(Oid::from_str(&"1".repeat(40)).unwrap(), "commit", "t")
    });

    for (name, spoil) in [
        (
            "a pack with a wrong sum",
            (|mut pack| {
                let last = pack.len() - 1;
                pack[last] ^= 1;
                pack
            }) as fn(Vec<u8>) -> Vec<u8>,
        ),
        ("a pack cut short", |mut pack| {
            pack.truncate(pack.len() / 2);
            pack
        }),
        ("a pack with bad compression", |mut pack| {
            pack.truncate(pack.len() - 20);
            let middle = 14 + (pack.len() - 14) / 2;
            pack[middle] ^= 0xff;
            sealed(pack)
        }),
        ("a pack that announces more", |mut pack| {
            pack.truncate(pack.len() - 20);
            pack[11] += 1;
            sealed(pack)
        }),
        ("a pack that announces less", |mut pack| {
            pack.truncate(pack.len() - 20);
            pack[11] -= 1;
            sealed(pack)
        }),
        ("a pack that announces four thousand million", |mut pack| {
            pack.truncate(pack.len() - 20);
            pack[8..12].fill(0xff);
            sealed(pack)
        }),
        ("a pack of another version", |mut pack| {
            pack.truncate(pack.len() - 20);
            pack[7] = 9;
            sealed(pack)
        }),
        ("no pack at all", |_| Vec::new()),
        ("noise for a pack", |_| b"noise".repeat(100)),
    ] {
        table.tip(name, (DAMAGED, DAMAGED), |forge, good| {
            let blob = forge.blob(name);
            let tree = forge.tree(&[("100644", b"x", blob)]);
            forge.commit(tree, &[good.commit])
        });
        table.cases.last_mut().unwrap().spoil = Some(spoil);
    }
    for (name, kind) in [("an object of type zero", 0), ("an object of type five", 5)] {
        table.tree(name, DAMAGED, |forge, _, _| {
            forge.raw(kind, 1, stored(b"x"));
            let blob = forge.blob(name);
            forge.tree(&[("100644", b"x", blob)])
        });
    }
    table.tree("a delta against what nobody has", DAMAGED, |forge, _, _| {
        let mut rest = vec![0x11; 20];
        rest.extend(stored(&[1, 1, 1, b'x']));
        forge.raw(7, 4, rest);
        let blob = forge.blob("by delta");
        forge.tree(&[("100644", b"x", blob)])
    });
    table.tree("a delta against itself", DAMAGED, |forge, _, _| {
        // An offset of none.
        let mut rest = vec![0];
        rest.extend(stored(&[1, 1, 1, b'x']));
        forge.raw(6, 4, rest);
        let blob = forge.blob("by itself");
        forge.tree(&[("100644", b"x", blob)])
    });
    table.tree("an object longer than it says", DAMAGED, |forge, _, _| {
        forge.raw(3, 2, stored(b"longer than two"));
        let blob = forge.blob("a liar");
        forge.tree(&[("100644", b"x", blob)])
    });
    table.tree("an object that says it is a terabyte", End::Refused(&[Quota, Corrupt, Network]), |forge, _, _| {
        forge.raw(3, 1 << 40, stored(b"two"));
        let blob = forge.blob("a boaster");
        forge.tree(&[("100644", b"x", blob)])
    });
    table.cases
}

/// Ten directories in each, ten times over.
fn bomb(forge: &mut Forge, mode: &'static str, bottom: Oid) -> Oid {
    let names: Vec<_> = (0..10).map(|name| format!("n{name}")).collect();
    (0..10)
        .fold((mode, bottom), |(mode, inner), _| {
            let entries: Vec<_> = names.iter().map(|name| (mode, name.as_bytes(), inner)).collect();
            ("40000", forge.tree(&entries))
        })
        .1
}

pub(crate) fn listing(tip: Oid, more: &[String]) -> Vec<String> {
    let mut refs = vec![format!("{tip} HEAD symref-target:refs/heads/main"), format!("{tip} refs/heads/main")];
    refs.extend_from_slice(more);
    refs
}

pub(crate) async fn run() {
    let dir = tempfile::tempdir().unwrap();
    let outside = dir.path().join("outside");
    fs::create_dir_all(outside.join("dir")).unwrap();
    fs::write(outside.join("precious"), "precious").unwrap();
    let before = snapshot(&outside);
    let storage = dir.path().join("storage");
    let server = Server::start();
    let executor = open_with(&storage, program(), |settings| {
        (settings.max_files, settings.max_bytes) = (MOST_FILES, ByteSize::b(MOST_BYTES));
    })
    .await;
    let good = good();
    let serve_good = || Served { refs: listing(good.commit, &[]), pack: good.forge.pack() };
    let table = table(&good);
    let mut wrong = Vec::new();
    let mut pulled = Pulled { executor: &executor, server: &server, storage: &storage, project: 0 };
    server.serve(serve_good());
    pulled.renew().await;
    for (number, case) in table.iter().enumerate() {
        let number = i64::try_from(number).unwrap();
        let pack = case.forge.pack();
        let pack = case.spoil.map_or(pack.clone(), |spoil| spoil(pack));
        server.serve(Served { refs: listing(case.tip, &case.more_refs), pack });
        let begun = Instant::now();
        let target = format!("clone-{number}");
        let fields = json!({"git_url": server.url("clone.git"), "target_path": target});
        let (project, clone_job) =
            (storage.join("projects").join(&target), job(number, "clone", 100_000 + number, &fields));
        let pulled_before = contents(&pulled.directory());
        let pull_job = job(10_000 + number, "pull", pulled.project, &json!({}));
        let (clone, pull) = tokio::join!(execute(&executor, &clone_job), execute(&executor, &pull_job));
        let took = begun.elapsed();
        for (what, end, result) in [("clone", case.ends.0, &clone), ("pull", case.ends.1, &pull)] {
            if !allowed(end, result) {
                wrong.push(format!("{}: its {what} should have ended as {end:?}, not {result:?}", case.name));
            }
            if let Err(failure) = result
                && failure.message.chars().any(char::is_control)
            {
                wrong.push(format!("{}: its {what} says {:?}", case.name, failure.message));
            }
        }
        println!("{:<60} clone {}; pull {}", case.name.chars().take(60).collect::<String>(), told(&clone), told(&pull));
        if took > Duration::from_secs(25) {
            wrong.push(format!("{} took {took:?}", case.name));
        }
        if clone.is_err() && project.symlink_metadata().is_ok() {
            wrong.push(format!("{}: a refused clone stands", case.name));
        }
        if pull.is_err() && contents(&pulled.directory()) != pulled_before {
            wrong.push(format!("{}: a refused pull changed files", case.name));
        }
        if clone.is_ok() {
            execute(&executor, &job(20_000 + number, "delete", 100_000 + number, &json!({}))).await.unwrap();
        }
        server.serve(serve_good());
        if pull.is_ok() {
            pulled.renew().await;
        }
    }
    assert_untouched(&before, &snapshot(&outside), "a hostile upstream");
    assert!(wrong.is_empty(), "{} of {}: {wrong:#?}", wrong.len(), table.len());
    // What was refused left nothing that hinders.
    let last = pulled.directory();
    execute(&executor, &job(99_999, "pull", pulled.project, &json!({}))).await.unwrap();
    git(&last, &["fsck", "--connectivity-only"]);
    assert_eq!(git(&last, &["status", "--porcelain"]), "");
    println!("{} hostile trees, objects and packs, each cloned and pulled", table.len());
}

/// A good project whose upstream turns hostile.
struct Pulled<'a> {
    executor: &'a GitExecutor,
    server: &'a Server,
    storage: &'a Path,
    project: i64,
}

impl Pulled<'_> {
    /// A fresh one.
    async fn renew(&mut self) {
        self.project += 1;
        let fields: Value =
            json!({"git_url": self.server.url("pull.git"), "target_path": format!("p{}", self.project)});
        execute(self.executor, &job(50_000 + self.project, "clone", self.project, &fields)).await.unwrap();
    }

    fn directory(&self) -> std::path::PathBuf {
        self.storage.join("projects").join(format!("p{}", self.project))
    }
}

/// What git sees of a project: its commit, and whether anything differs.
fn contents(project: &Path) -> String {
    format!("{} {}", git(project, &["rev-parse", "HEAD"]), git(project, &["status", "--porcelain", "--ignored"]))
}

fn allowed(end: End, result: &Result<TaskResult, Failure>) -> bool {
    match (end, result) {
        (End::Refused(classes) | End::Either(classes), Err(failure)) => classes.contains(&failure.class),
        (End::Works | End::Either(_), Ok(_)) => true,
        _ => false,
    }
}

fn told(result: &Result<TaskResult, Failure>) -> String {
    match result {
        Ok(_) => "works".to_owned(),
        Err(failure) => failure.to_string().chars().take(160).collect(),
    }
}
