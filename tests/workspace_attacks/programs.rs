//! Row 17: everything in a workspace that makes git run a program or talk to somebody else.

use std::{
    collections::BTreeMap,
    fs,
    net::TcpListener,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use serde_json::json;

use crate::{
    scene::{self, Scene, USERS, assert_untouched, bounded, command, give, owner, privileged, snapshot, write},
    table::{Bites, told},
};

/// How a payload is shown to bite.
enum Shown {
    /// Plain git, run like this one after another in a copy of the project, runs the program.
    By(&'static [&'static str]),
    /// Plain git talks to the trap.
    Connects(&'static str),
    /// Plain git waits for ever.
    Hangs(&'static str),
    /// Git takes this from protected settings only, so a workspace cannot set it; planted all the same.
    Protected,
    /// A later git than the one of this machine knows it; planted all the same.
    Later,
}

/// Something to plant.
struct Payload {
    name: &'static str,
    /// What is added to `.git/config`; `@` stands for the program, `^` for the trap's port, `%` for a pipe.
    config: &'static str,
    /// Other files, relative to the project; one of `.git/hooks` is made executable and is the program itself.
    files: &'static [(&'static str, &'static str)],
    shown: Shown,
}

const fn config(name: &'static str, config: &'static str, by: &'static [&'static str]) -> Payload {
    Payload { name, config, files: &[], shown: Shown::By(by) }
}

const fn hook(
    name: &'static str,
    file: &'static [(&'static str, &'static str)],
    by: &'static [&'static str],
) -> Payload {
    Payload { name, config: "", files: file, shown: Shown::By(by) }
}

const ATTRIBUTES: &str = ".git/info/attributes";

#[rustfmt::skip]
const PAYLOADS: &[Payload] = &[
    config("core.fsmonitor", "[core]\n\tfsmonitor = @", &["status"]),
    hook("hook post-checkout", &[(".git/hooks/post-checkout", "@")], &["checkout -q -b x"]),
    hook("hook post-merge", &[(".git/hooks/post-merge", "@")], &["stash -q", "merge -q origin/newer"]),
    hook("hook reference-transaction", &[(".git/hooks/reference-transaction", "@")], &["update-ref refs/heads/x HEAD"]),
    hook("hook post-index-change", &[(".git/hooks/post-index-change", "@")], &["add mine.txt"]),
    hook("hook pre-commit", &[(".git/hooks/pre-commit", "@")], &["commit -q --allow-empty -m x"]),
    hook("hook prepare-commit-msg", &[(".git/hooks/prepare-commit-msg", "@")], &["commit -q --allow-empty -m x"]),
    hook("hook commit-msg", &[(".git/hooks/commit-msg", "@")], &["commit -q --allow-empty -m x"]),
    hook("hook post-commit", &[(".git/hooks/post-commit", "@")], &["commit -q --allow-empty -m x"]),
    hook("hook pre-merge-commit", &[(".git/hooks/pre-merge-commit", "@")], &["stash -q", "merge -q --no-ff -m x origin/newer"]),
    hook("hook pre-rebase", &[(".git/hooks/pre-rebase", "@")], &["stash -q", "rebase -q origin/newer"]),
    hook("hook post-rewrite", &[(".git/hooks/post-rewrite", "@")], &["commit -q --amend --allow-empty -m x"]),
    hook("hook pre-auto-gc", &[(".git/hooks/pre-auto-gc", "@")], &["commit -q --allow-empty -m x", "repack -q -d", "-c gc.autoPackLimit=1 gc --auto -q"]),
    hook("hook pre-push", &[(".git/hooks/pre-push", "@")], &["push -q . HEAD:refs/heads/x"]),
    hook("hook pre-receive", &[(".git/hooks/pre-receive", "@")], &["push -q . HEAD:refs/heads/x"]),
    hook("hook update", &[(".git/hooks/update", "@")], &["push -q . HEAD:refs/heads/x"]),
    hook("hook post-receive", &[(".git/hooks/post-receive", "@")], &["push -q . HEAD:refs/heads/x"]),
    hook("hook post-update", &[(".git/hooks/post-update", "@")], &["push -q . HEAD:refs/heads/x"]),
    hook("hook applypatch-msg", &[(".git/hooks/applypatch-msg", "@"), (".git/x.patch", "From 1111111111111111111111111111111111111111 Mon Sep 17 00:00:00 2001\nFrom: A <a@example.org>\nDate: Sat, 1 Jan 2026 00:00:00 +0000\nSubject: x\n\n---\ndiff --git a/applied b/applied\nnew file mode 100644\n--- /dev/null\n+++ b/applied\n@@ -0,0 +1 @@\n+x\n-- \n2\n")], &["am -q .git/x.patch"]),
    Payload { name: "core.hooksPath", config: "[core]\n\thooksPath = .git/elsewhere", files: &[(".git/elsewhere/post-checkout", "@")], shown: Shown::By(&["checkout -q -b x"]) },
    Payload { name: "hook.*.command", config: "[hook \"h\"]\n\tcommand = @\n\tevent = post-checkout\n\tevent = reference-transaction\n\tevent = post-index-change", files: &[], shown: Shown::Later },
    Payload { name: "filter.*.clean by info/attributes", config: "[filter \"e1\"]\n\tclean = @", files: &[(ATTRIBUTES, "*.txt filter=e1\n")], shown: Shown::By(&["add mine.txt"]) },
    Payload { name: "filter.*.smudge by info/attributes", config: "[filter \"e2\"]\n\tsmudge = @", files: &[(ATTRIBUTES, "*.txt filter=e2\n")], shown: Shown::By(&["checkout -q -f HEAD -- b.txt"]) },
    Payload { name: "filter.*.process by info/attributes", config: "[filter \"e3\"]\n\tprocess = @", files: &[(ATTRIBUTES, "*.txt filter=e3\n")], shown: Shown::By(&["add mine.txt"]) },
    Payload { name: "filter.*.clean by .gitattributes of a directory", config: "[filter \"e4\"]\n\tclean = @", files: &[("dir/.gitattributes", "* filter=e4\n")], shown: Shown::By(&["add -f dir/inner.log"]) },
    Payload { name: "filter.*.smudge, required", config: "[filter \"e5\"]\n\tsmudge = @\n\trequired = true", files: &[(ATTRIBUTES, "* filter=e5\n")], shown: Shown::By(&["checkout -q -f HEAD -- b.txt"]) },
    Payload { name: "filter.lfs", config: "[filter \"lfs\"]\n\tprocess = @\n\tclean = @\n\tsmudge = @", files: &[(ATTRIBUTES, "* filter=lfs diff=lfs merge=lfs -text\n")], shown: Shown::By(&["add mine.txt"]) },
    config("core.sshCommand", "[core]\n\tsshCommand = @", &["ls-remote ssh://localhost/x"]),
    config("ssh.variant with core.sshCommand", "[ssh]\n\tvariant = simple\n[core]\n\tsshCommand = @", &["fetch -q ssh://localhost/x"]),
    config("credential.helper", "[credential]\n\thelper = \"!@\"", &["ls-remote http://localhost:^/x", "credential fill"]),
    config("credential.<url>.helper", "[credential \"http://localhost\"]\n\thelper = \"!@\"", &["credential fill"]),
    config("core.askPass", "[core]\n\taskPass = @", &["credential fill"]),
    config("core.editor", "[core]\n\teditor = @", &["commit -q --allow-empty"]),
    config("sequence.editor", "[sequence]\n\teditor = @", &["stash -q", "rebase -q -i --root"]),
    config("core.pager", "[core]\n\tpager = @", &["!pty log"]),
    config("pager.*", "[pager]\n\tlog = @", &["!pty log"]),
    config("interactive.diffFilter", "[interactive]\n\tdiffFilter = @", &["-c color.ui=always add -p"]),
    config("diff.external", "[diff]\n\texternal = @", &["diff"]),
    Payload { name: "diff.*.command", config: "[diff \"e\"]\n\tcommand = @", files: &[(ATTRIBUTES, "*.txt diff=e\n")], shown: Shown::By(&["diff"]) },
    Payload { name: "diff.*.textconv", config: "[diff \"f\"]\n\ttextconv = @", files: &[(ATTRIBUTES, "*.txt diff=f\n")], shown: Shown::By(&["diff"]) },
    Payload { name: "merge.*.driver", config: "[merge \"e\"]\n\tdriver = @", files: &[(ATTRIBUTES, "*.txt merge=e\n")], shown: Shown::By(&["stash -q", "!edit commit -q -a -m x", "merge -q -m x origin/newer"]) },
    config("difftool", "[diff]\n\ttool = e\n[difftool \"e\"]\n\tcmd = @", &["difftool -y"]),
    config("gpg.program", "[gpg]\n\tprogram = @\n[commit]\n\tgpgSign = true\n[user]\n\tsigningKey = x", &["commit -q --allow-empty -m x"]),
    config("gpg.ssh.program", "[gpg]\n\tformat = ssh\n[gpg \"ssh\"]\n\tprogram = @\n[commit]\n\tgpgSign = true\n[user]\n\tsigningKey = x", &["commit -q --allow-empty -m x"]),
    config("gpg.ssh.defaultKeyCommand", "[gpg]\n\tformat = ssh\n[gpg \"ssh\"]\n\tdefaultKeyCommand = @\n[commit]\n\tgpgSign = true", &["commit -q --allow-empty -m x"]),
    config("remote.*.uploadpack", "[remote \"here\"]\n\turl = .\n\tuploadpack = @", &["fetch -q here"]),
    config("remote.*.receivepack", "[remote \"there\"]\n\turl = .\n\treceivepack = @", &["push -q there HEAD:refs/heads/x"]),
    config("remote.*.vcs", "[remote \"v\"]\n\turl = x\n\tvcs = \"ext\"\n[protocol]\n\tallow = always\n[url \"ext::@ \"]\n\tinsteadOf = x", &["fetch -q ext::@"]),
    config("url.*.insteadOf", "[protocol \"ext\"]\n\tallow = always\n[url \"ext::@ \"]\n\tinsteadOf = http", &["fetch -q origin"]),
    config("core.gitProxy", "[core]\n\tgitProxy = @", &["ls-remote git://localhost/x"]),
    config("alias", "[alias]\n\tst = \"!@\"", &["st"]),
    config("trailer.*.cmd", "[trailer \"t\"]\n\tkey = T\n\tcmd = @", &["interpret-trailers --trailer T=x .gitignore"]),
    config("tar.*.command", "[tar \"e\"]\n\tcommand = @", &["archive --format=e HEAD"]),
    config("core.alternateRefsCommand", "[core]\n\talternateRefsCommand = @", &["!alternate fetch -q origin"]),
    config("gc.recentObjectsHook", "[gc]\n\trecentObjectsHook = @", &["!loose gc -q --prune=now"]),
    config("man.*.cmd", "[man]\n\tviewer = e\n[man \"e\"]\n\tcmd = @", &["help -m status"]),
    config("browser.*.cmd", "[web]\n\tbrowser = e\n[browser \"e\"]\n\tcmd = @", &["web--browse x"]),
    config("guitool", "[mergetool \"e\"]\n\tcmd = @\n[merge]\n\ttool = e\n[difftool]\n\tprompt = false\n[diff]\n\tguitool = e\n[difftool \"e\"]\n\tcmd = @", &["difftool -g -y"]),
    Payload { name: "include.path", config: "[x]", files: &[], shown: Shown::Protected },
    Payload { name: "uploadpack.packObjectsHook", config: "[uploadpack]\n\tpackObjectsHook = @", files: &[], shown: Shown::Protected },
    Payload { name: "trace2.*Target", config: "[trace2]\n\teventTarget = @.trace\n\tnormalTarget = @.trace\n\tperfTarget = @.trace", files: &[], shown: Shown::Protected },
    Payload { name: "init.templateDir", config: "[init]\n\ttemplateDir = .git/elsewhere", files: &[], shown: Shown::Protected },
    Payload { name: "http.proxy", config: "[http]\n\tproxy = http://127.0.0.1:^", files: &[], shown: Shown::Connects("ls-remote origin") },
    Payload { name: "remote.*.proxy", config: "[remote \"origin\"]\n\tproxy = http://127.0.0.1:^", files: &[], shown: Shown::Connects("ls-remote origin") },
    Payload { name: "remote.*.url", config: "[remote \"origin\"]\n\turl = http://127.0.0.1:^/x", files: &[], shown: Shown::Connects("ls-remote http://127.0.0.1:^/x") },
    Payload { name: "url.*.insteadOf another host", config: "[url \"http://127.0.0.1:^/\"]\n\tinsteadOf = http://localhost", files: &[], shown: Shown::Connects("ls-remote origin") },
    Payload { name: "remote.*.pushurl and promisor", config: "[remote \"p\"]\n\turl = http://127.0.0.1:^/x\n\tpromisor = true\n\tpartialclonefilter = blob:none", files: &[], shown: Shown::Connects("cat-file -p 1111111111111111111111111111111111111111") },
    Payload { name: "core.excludesFile that blocks", config: "[core]\n\texcludesFile = %", files: &[], shown: Shown::Hangs("status") },
    Payload { name: "core.attributesFile that blocks", config: "[core]\n\tattributesFile = %", files: &[], shown: Shown::Hangs("add mine.txt") },
];

/// A listener that counts who comes.
struct Trap {
    port: u16,
    met: Arc<AtomicUsize>,
}

impl Trap {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (port, met) = (listener.local_addr().unwrap().port(), Arc::new(AtomicUsize::new(0)));
        let counting = met.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                counting.fetch_add(1, Ordering::SeqCst);
                drop(stream);
            }
        });
        Self { port, met }
    }
}

impl Payload {
    /// Plants it so that it leaves `mark` when it runs.
    fn plant(&self, project: &Path, mark: &Path, trap: u16) {
        let script = mark.with_extension("sh");
        fs::write(&script, format!("#!/bin/sh\n: >'{}'\nexit 1\n", mark.display())).unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        let config = fs::read_to_string(project.join(".git/config")).unwrap();
        let added = self.fill(self.config, mark, trap);
        fs::write(project.join(".git/config"), format!("{config}{added}\n")).unwrap();
        for (name, content) in self.files {
            let path = project.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            if *content == "@" {
                fs::copy(&script, &path).unwrap();
            } else {
                let before = fs::read_to_string(&path).unwrap_or_default();
                fs::write(&path, before + content).unwrap();
            }
        }
        if self.config.contains('%') {
            make_pipe(&mark.with_extension("pipe"));
        }
    }

    /// Whom it bites. Libgit2 runs no program of a repository's settings, so plain git is asked alone.
    fn bites(&self) -> Bites {
        match self.shown {
            Shown::By(_) | Shown::Connects(_) | Shown::Hangs(_) => Bites::Git,
            Shown::Protected | Shown::Later => Bites::Nobody,
        }
    }

    fn fill(&self, text: &str, mark: &Path, trap: u16) -> String {
        text.replace('@', &mark.with_extension("sh").display().to_string())
            .replace('%', &mark.with_extension("pipe").display().to_string())
            .replace('^', &trap.to_string())
    }

    /// Shows that it bites; says how, or why not.
    fn show(&self, project: &Path, mark: &Path, trap: &Trap) -> Result<&'static str, String> {
        let run = |line: &str| {
            let line = self.fill(line, mark, trap.port);
            let (how, line) = match line.split_once(' ') {
                Some((how, rest)) if how.starts_with('!') => (how.to_owned(), rest.to_owned()),
                _ => (String::new(), line.clone()),
            };
            let mut git = command(project);
            match how.as_str() {
                "!pty" => {
                    let mut pty = std::process::Command::new("script");
                    pty.args(["-qec", &format!("git {line}"), "/dev/null"]).current_dir(project);
                    pty.env("GIT_CONFIG_GLOBAL", scene::global())
                        .env("TERM", "dumb")
                        .env_remove("GIT_PAGER")
                        .env_remove("PAGER");
                    git = pty;
                }
                "!alternate" => {
                    let objects = project.join(".git/objects/info/alternates");
                    fs::write(objects, format!("{}\n", mark.parent().unwrap().join("other/.git/objects").display()))
                        .unwrap();
                }
                "!edit" => write(project, "a.txt", "another\n"),
                "!loose" => drop(scene::feed(project, &["hash-object", "-w", "--stdin"], b"nobody's")),
                _ => {}
            }
            if how != "!pty" {
                git.args(line.split(' ').filter(|word| !word.is_empty()));
            }
            if line == "credential fill" {
                use std::io::Write;
                let mut child = git
                    .stdin(std::process::Stdio::piped())
                    .stderr(std::process::Stdio::null())
                    .stdout(std::process::Stdio::null())
                    .spawn()
                    .unwrap();
                let _ = child.stdin.take().unwrap().write_all(b"protocol=http\nhost=localhost\n\n");
                child.wait().unwrap();
                return Some(Vec::new());
            }
            bounded(git, Duration::from_millis(1500)).map(|output| output.stderr)
        };
        match &self.shown {
            Shown::By(lines) => {
                let said: Vec<_> = lines.iter().map(|line| run(line)).collect();
                if mark.exists() {
                    Ok("runs")
                } else {
                    Err(said.into_iter().flatten().map(|said| scene::text(&said)).collect())
                }
            }
            Shown::Connects(line) => {
                let before = trap.met.load(Ordering::SeqCst);
                let said = run(line);
                if trap.met.load(Ordering::SeqCst) > before {
                    Ok("connects")
                } else {
                    Err(scene::text(&said.unwrap_or_default()))
                }
            }
            Shown::Hangs(line) => match run(line) {
                None => Ok("hangs"),
                Some(said) => Err(scene::text(&said)),
            },
            Shown::Protected => Ok("ignored by git in a workspace"),
            Shown::Later => Ok("known to a later git"),
        }
    }
}

fn make_pipe(path: &Path) {
    assert!(std::process::Command::new("mkfifo").arg(path).status().unwrap().success());
}

pub(crate) async fn run() {
    let scene = Scene::new(true).await;
    let tracer = scene.tracer.as_ref().unwrap();
    let trap = Trap::new();
    scene.clone(1, "p").await.unwrap();
    let project = scene.behind("p");
    // For merges that plain git makes.
    scene::git(&project, &["update-ref", "refs/remotes/origin/newer", &scene.second]);
    let shown_in = scene.path("shown");
    fs::create_dir(&shown_in).unwrap();
    scene::git(&shown_in, &["init", "-q", "other"]);
    let (mut failed, mut bitten) = (Vec::new(), BTreeMap::<Bites, usize>::new());
    for (number, payload) in PAYLOADS.iter().enumerate() {
        let twin = copy(&project, &shown_in.join(format!("twin-{number}")));
        let mark = shown_in.join(format!("mark-{number}"));
        payload.plant(&twin, &mark, trap.port);
        match payload.show(&twin, &mark, &trap) {
            Ok(how) => {
                println!("{:<50} {how}", payload.name);
                *bitten.entry(payload.bites()).or_default() += 1;
            }
            Err(said) => failed.push(format!("{} does not bite plain git: {said}", payload.name)),
        }
    }
    assert!(failed.is_empty(), "{failed:#?}");
    // Together, since none of them keeps the agent from its work.
    for (number, payload) in PAYLOADS.iter().enumerate() {
        payload.plant(&project, &scene.marks().join(format!("mark-{number}")), trap.port);
    }
    give(&project);
    give(&scene.marks());
    let outside = snapshot(&scene.outside());
    let users = users(&project);
    let met = trap.met.load(Ordering::SeqCst);
    let _ = tracer.take();
    let looked = scene.run("status", 1, json!({})).await.unwrap();
    assert_eq!((looked.dirty, looked.behind), (Some(true), Some(0)));
    let pulled = scene.run("pull", 1, json!({})).await.unwrap();
    assert_eq!((pulled.updated, pulled.head.as_deref()), (Some(true), Some(scene.second.as_str())));
    assert_eq!(self::users(&project), users, "a file of the user was changed");
    // Again with everything in the way of a reset.
    let third =
        scene::commit(&scene.upstream.path(), &[("a.txt", "three\n"), ("mine.txt", "upstream's\n"), ("b.txt", "bb\n")]);
    let reset = scene.run("pull", 1, json!({"on_conflict": "reset"})).await.unwrap();
    assert_eq!(reset.head.as_deref(), Some(third.as_str()));
    scene.clone(2, "elsewhere").await.unwrap();
    scene.clone(1, "p").await.unwrap();
    scene.run("delete", 1, json!({})).await.unwrap();
    let traces = tracer.take();
    assert!(traces.iter().filter(|trace| trace.role == "workspace").count() >= 6, "{}", traces.len());
    for trace in &traces {
        trace.judge(&scene.storage(), "with every program planted");
    }
    assert_untouched(&outside, &snapshot(&scene.outside()), "working among planted programs");
    let fired: Vec<PathBuf> = fs::read_dir(scene.marks())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_none_or(|extension| extension == "trace"))
        .collect();
    assert!(fired.is_empty(), "these ran: {fired:?}");
    assert_eq!(trap.met.load(Ordering::SeqCst), met, "somebody connected to the trap");
    println!(
        "{} payloads that run programs or redirect connections ({}), {} traces of children, as {}",
        PAYLOADS.len(),
        told(&bitten),
        traces.len(),
        who()
    );
}

/// Who runs this.
pub(crate) fn who() -> &'static str {
    match (privileged(), owner()) {
        (true, None) => "root",
        (true, Some(_)) => "root for an owner without privileges",
        (false, _) => "a user without privileges",
    }
}

/// What the user's files hold.
pub(crate) fn users(project: &Path) -> Vec<Option<Vec<u8>>> {
    USERS.iter().map(|(name, _)| fs::read(project.join(name)).ok()).collect()
}

/// A copy of a project for plain git.
pub(crate) fn copy(project: &Path, twin: &Path) -> PathBuf {
    assert!(std::process::Command::new("cp").arg("-a").args([project, twin]).status().unwrap().success());
    write(twin, ".git/.is-a-copy", "");
    twin.to_owned()
}
