//! A node that is watched from all sides while hostile tasks come: what it writes, runs, connects to and says.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::TcpListener,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use haul::{
    broker::Broker as _,
    failure::ErrorClass,
    protocol::{
        Event, Status,
        wire::{Message, header},
    },
};
use serde_json::{Value, json};

use crate::support::{agent::Agent, rabbit::Rabbit, repository::Repository};

/// The directory of the one project that is there.
pub(crate) const GOOD: &str = "good";
/// Its project.
pub(crate) const GOOD_PROJECT: i64 = 1;

/// Connections to it are counted.
pub(crate) struct Trap {
    pub(crate) port: u16,
    connections: Arc<AtomicUsize>,
}

/// The node, and everything that must stay untouched.
pub(crate) struct World {
    pub(crate) agent: Agent,
    pub(crate) upstream: Repository,
    pub(crate) trap: Trap,
    tripwires: tempfile::TempDir,
    tasks: AtomicUsize,
    letters: AtomicUsize,
}

/// A dead letter, as an operator sees it.
pub(crate) struct Letter {
    pub(crate) class: String,
    pub(crate) reason: String,
    pub(crate) message: Message,
}

impl Trap {
    fn set() -> Self {
        let v4 = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = v4.local_addr().unwrap().port();
        let connections = Arc::new(AtomicUsize::new(0));
        // The same port in the other family, where there is one.
        for listener in [Some(v4), TcpListener::bind(("::1", port)).ok()].into_iter().flatten() {
            let connections = connections.clone();
            std::thread::spawn(move || {
                for _ in listener.incoming() {
                    connections.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        Self { port, connections }
    }
}

impl World {
    /// A node with one project; its programs are tripwires, and neither files nor loopback addresses are allowed any more.
    pub(crate) async fn strict() -> Self {
        let mut world = Self::open().await;
        world.agent.signal(rustix::process::Signal::TERM);
        assert!(world.agent.ended().await.success());
        world.agent.set("AGENT_GIT__ALLOW_FILE", "false");
        world.agent.set("AGENT_GIT__ALLOW_LOOPBACK", "false");
        world.agent.start(&[]);
        world.agent.ready().await;
        world
    }

    /// A node with one project that may clone from files.
    pub(crate) async fn open() -> Self {
        let upstream = Repository::new();
        let mut agent = Agent::new(Rabbit::shared()).await;
        let tripwires = tempfile::tempdir().unwrap();
        for program in ["git", "ssh", "sh", "bash", "env", "touch", "git-remote-ext", "git-upload-pack", "haul"] {
            let path = tripwires.path().join(program);
            fs::write(&path, format!("#!/bin/sh\n: > {}/tripped-{program}\n", tripwires.path().display())).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        agent.set("PATH", tripwires.path().to_str().unwrap());
        agent.set("AGENT_RETRY__MAX_ATTEMPTS", "1");
        agent.start(&[]);
        agent.publish(&Agent::clone_task("good", GOOD_PROJECT, &upstream, GOOD)).await;
        assert_eq!(agent.end("good", 0).await.status, Status::Succeeded, "{}", agent.log());
        agent.ready().await;
        let (tasks, letters) = Default::default();
        Self { agent, upstream, trap: Trap::set(), tripwires, tasks, letters }
    }

    /// Where a payload that was executed would leave its mark.
    pub(crate) fn mark(&self) -> String {
        self.tripwires.path().join("tripped-payload").display().to_string()
    }

    /// An id that no other task has.
    pub(crate) fn id(&self) -> String {
        format!("task-{}", self.tasks.fetch_add(1, Ordering::SeqCst))
    }

    /// A clone with these fields in place of plain ones.
    pub(crate) fn clone_with(&self, fields: &Value) -> Value {
        let mut task = json!({"v": 1, "task_id": self.id(), "kind": "clone", "project_id": 99,
            "git_url": "https://upstream.invalid/app.git", "target_path": "99_app"});
        for (name, value) in fields.as_object().unwrap() {
            task[name] = value.clone();
        }
        task
    }

    /// Each of these tasks is refused with one of `classes` and a dead letter that says why, and nothing else happens.
    ///
    /// `quietly`: not even a child of the agent's own was started for them.
    pub(crate) async fn refuses(&self, tasks: &[Value], classes: &[ErrorClass], quietly: bool) -> Vec<Event> {
        let (before, children) = (self.files(), self.children_so_far());
        for task in tasks {
            self.agent.publish(task).await;
        }
        let mut ends = Vec::new();
        for task in tasks {
            let end = self.agent.end(task["task_id"].as_str().unwrap(), 0).await;
            let error = end.error.clone().unwrap_or_else(|| panic!("{task} ended as {end:?}"));
            assert!(matches!(end.status, Status::Rejected | Status::Failed), "{task} ended as {end:?}");
            assert!(classes.contains(&error.class), "{task} ended as {end:?}");
            assert_is_a_sentence(&error.message);
            ends.push(end);
        }
        let letters = self.new_letters(tasks.len()).await;
        for task in tasks {
            let id = task["task_id"].as_str();
            let letter = letters.iter().find(|letter| letter.message.message_id.as_deref() == id);
            let letter = letter.unwrap_or_else(|| panic!("no dead letter of {task}"));
            assert!(classes.iter().any(|class| class.as_str() == letter.class), "{task}: {}", letter.class);
            assert_is_a_sentence(&letter.reason);
        }
        if quietly {
            assert_eq!(self.children_so_far(), children, "a child was started");
        }
        self.untouched(&before);
        self.unharmed().await;
        ends
    }

    /// Nothing was written, executed or connected to.
    pub(crate) fn untouched(&self, before: &BTreeMap<PathBuf, String>) {
        assert_eq!(&self.files(), before, "something was written");
        let tripped: BTreeSet<_> = fs::read_dir(self.tripwires.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .filter(|name| name.starts_with("tripped"))
            .collect();
        assert!(tripped.is_empty(), "executed: {tripped:?}");
        assert_eq!(self.trap.connections.load(Ordering::SeqCst), 0, "the trap was connected to");
    }

    /// The same agent goes on with its work.
    pub(crate) async fn unharmed(&self) {
        let id = self.id();
        self.agent.publish(&Agent::task(&id, "status", GOOD_PROJECT)).await;
        assert_eq!(self.agent.end(&id, 0).await.status, Status::Succeeded);
        let log = self.agent.log();
        assert!(!log.contains("panicked") && !log.contains(r#""message":"reconnecting"#), "{log}");
    }

    /// Every file of the node with what tells whether it changed, but for the journal and the log.
    pub(crate) fn files(&self) -> BTreeMap<PathBuf, String> {
        let mut files = BTreeMap::new();
        collect(self.agent.storage.path(), &mut files);
        files
    }

    /// What the agent's children of all time have cost, which changes with each.
    fn children_so_far(&self) -> String {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.agent.pid())).unwrap();
        // After the name: state, parent, group, session, terminal, its group, flags, faults, faults of children.
        let after = stat.rsplit_once(") ").unwrap().1;
        after.split(' ').nth(8).unwrap().to_owned()
    }

    /// Waits for so many more dead letters and reads them all.
    pub(crate) async fn new_letters(&self, count: usize) -> Vec<Letter> {
        let all = self.letters.fetch_add(count, Ordering::SeqCst) + count;
        self.agent.dead_letters(u32::try_from(all).unwrap()).await;
        self.letters().await
    }

    /// All dead letters, read and given back.
    pub(crate) async fn letters(&self) -> Vec<Letter> {
        let mut browse = self.agent.master.browse(&self.agent.names.dead()).await.unwrap();
        let mut letters = Vec::new();
        while let Some(letter) = browse.next().await.unwrap() {
            let text =
                |name: &str| letter.message.headers.get(name).and_then(|value| value.as_text()).map(str::to_owned);
            letters.push(Letter {
                class: text(header::ERROR_CLASS).expect("a dead letter has a class"),
                reason: text(header::ERROR).expect("a dead letter has a reason"),
                message: letter.message.clone(),
            });
            letter.abandon();
        }
        browse.give_back().await.unwrap();
        letters
    }
}

fn collect(directory: &Path, files: &mut BTreeMap<PathBuf, String>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        if name.starts_with("journal") || name == "agent.log" {
            continue;
        }
        let Ok(metadata) = entry.metadata() else { continue };
        if metadata.is_dir() {
            files.insert(path.clone(), "directory".to_owned());
            collect(&path, files);
        } else {
            files.insert(path, format!("{} bytes, {:?}", metadata.len(), metadata.modified().unwrap()));
        }
    }
}

/// One sentence for people: short, on one line, nothing that a terminal obeys.
pub(crate) fn assert_is_a_sentence(text: &str) {
    assert!((10..=400).contains(&text.len()), "{text:?}");
    let hidden = |c: char| {
        c.is_control()
            || ('\u{200b}'..='\u{202e}').contains(&c) && c != '\u{2026}' && !('\u{2010}'..='\u{2027}').contains(&c)
    };
    assert!(!text.chars().any(hidden), "{text:?}");
}
