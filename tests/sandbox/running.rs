//! The real children while they work: as whom, with what, and who may look at them.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::Path,
    process::Command,
    time::Duration,
};

use haul::{
    git::{
        Run,
        child::{Children, Confinement, Role},
        pack,
    },
    protocol::Owner,
};
use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    GID, UID,
    githttp::{Behaviour, Server, Upstream},
    require_root,
    world::Open,
};

/// What the kernel says of a running child.
struct Seen {
    pid: i32,
    status: BTreeMap<String, String>,
    limits: String,
}

impl Seen {
    /// The child of `role` that this process started, once it has shut itself in.
    async fn of(role: Role) -> Self {
        let look = async {
            loop {
                if let Some(seen) = Self::look(role).filter(|seen| seen.status["Seccomp"] == "2") {
                    return seen;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), look).await.expect("no such child shuts itself in")
    }

    fn look(role: Role) -> Option<Self> {
        let own = std::process::id().to_string();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
            let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            if !command.ends_with(format!("child\0{}\0", role.as_str()).as_bytes()) {
                continue;
            }
            let Ok(status) = fs::read_to_string(entry.path().join("status")) else { continue };
            let status: BTreeMap<String, String> = status
                .lines()
                .filter_map(|line| line.split_once(':'))
                .map(|(name, value)| (name.to_owned(), value.split_whitespace().collect::<Vec<_>>().join(" ")))
                .collect();
            if status.get("PPid") == Some(&own) {
                let limits = fs::read_to_string(entry.path().join("limits")).unwrap_or_default();
                return Some(Self { pid, status, limits });
            }
        }
        None
    }

    fn assert_shut_in(&self, uid: u32, gid: u32, capabilities: &str) {
        let is = |name: &str, value: &str| assert_eq!(self.status[name], value, "{name}: {:#?}", self.status);
        is("Uid", &[uid; 4].map(|id| id.to_string()).join(" "));
        is("Gid", &[gid; 4].map(|id| id.to_string()).join(" "));
        is("Groups", "");
        is("NoNewPrivs", "1");
        for set in ["CapInh", "CapAmb"] {
            is(set, "0000000000000000");
        }
        for set in ["CapPrm", "CapEff", "CapBnd"] {
            is(set, capabilities);
        }
        let limit = |name: &str| {
            let line = self.limits.lines().find(|line| line.starts_with(name)).unwrap();
            line[name.len()..].split_whitespace().nth(1).unwrap().to_owned()
        };
        let wanted = Confinement::default();
        assert_eq!(limit("Max core file size"), "0");
        assert_eq!(limit("Max data size"), wanted.memory.to_string());
        assert_eq!(limit("Max file size"), wanted.longest_file.to_string());
        assert!(limit("Max open files").parse::<u64>().unwrap() <= 4096);
    }

    /// Whether a process of the same user and group can read its memory, files and environment.
    fn is_open_to(&self, uid: u32, gid: u32) -> bool {
        ["environ", "maps", "fd/0"].iter().any(|file| {
            let path = format!("/proc/{}/{file}", self.pid);
            Command::new("head").args(["-c", "1", &path]).uid(uid).gid(gid).output().unwrap().status.success()
        })
    }
}

fn children() -> Children {
    Children::new(env!("CARGO_BIN_EXE_haul").into(), Duration::from_secs(2)).unwrap()
}

fn run(progress: &(dyn Fn(haul::protocol::Progress) + Send + Sync)) -> Run<'_> {
    Run {
        deadline: Instant::now() + Duration::from_mins(1),
        stall: Duration::from_secs(30),
        cancel: CancellationToken::new(),
        progress,
        fence: &Open,
    }
}

#[tokio::test]
async fn a_workspace_child_runs_as_the_owner_who_cannot_look_into_it() {
    require_root();
    let place = tempfile::tempdir().unwrap();
    fs::set_permissions(place.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let project = place.path().join("p");
    let made = Command::new("git").args(["init", "-q"]).arg(&project).status().unwrap();
    assert!(made.success());
    let given = Command::new("chown").args(["-R", &format!("{UID}:{GID}")]).arg(&project).status().unwrap();
    assert!(given.success());
    let directory = OwnedFd::from(File::open(&project).unwrap());
    let (reader, _writer) = std::io::pipe().unwrap();
    let reader = OwnedFd::from(reader);
    // A pack that never comes.
    let request = json!({
        "directory": directory.as_raw_fd(),
        "order": { "pull": {
            "pack": reader.as_raw_fd(), "branch": "main", "tip": "1".repeat(40), "refs": {}, "interrupted": null,
            "reset": false, "backup": ["a", "b"], "reserve": 0, "budget": { "files": 10, "bytes": 10 },
        } },
    });
    let owner = Some(Owner { uid: UID, gid: GID });
    let (children, run) = (children().of(owner), run(&|_| ()));
    let pull = children.run::<_, Value>(Role::Workspace, &request, vec![directory, reader], &run);
    tokio::pin!(pull);
    // It goes on while it is looked at.
    let seen = tokio::select! {
        ended = &mut pull => panic!("{ended:?}"),
        seen = Seen::of(Role::Workspace) => seen,
    };
    seen.assert_shut_in(UID, GID, "0000000000000000");
    assert!(!seen.is_open_to(UID, GID));
}

#[tokio::test]
async fn a_pack_child_runs_without_any_power() {
    require_root();
    let upstream = Upstream::new();
    let tip = upstream.commit_noise("main", 4 << 20);
    let (_reader, writer) = std::io::pipe().unwrap();
    let (children, run) = (children(), run(&|_| ()));
    let (path, wants) = (upstream.path(), [tip]);
    // Nobody reads.
    let packed = pack::stream(&children, &path, &wants, &[], &[], OwnedFd::from(writer), &run);
    tokio::pin!(packed);
    // It goes on while it is looked at.
    let seen = tokio::select! {
        ended = &mut packed => panic!("{ended:?}"),
        seen = Seen::of(Role::Pack) => seen,
    };
    seen.assert_shut_in(0, 0, "0000000000000000");
    assert!(!seen.is_open_to(0, 0) || can_trace(), "only one who may trace everybody may");
}

/// Whether root here has the capability to look into every process.
fn can_trace() -> bool {
    fs::read_to_string("/proc/self/status").unwrap().lines().any(|line| {
        line.strip_prefix("CapEff:").is_some_and(|set| u64::from_str_radix(set.trim(), 16).unwrap() & (1 << 19) != 0)
    })
}

#[tokio::test]
async fn a_transfer_child_keeps_at_most_the_right_to_read_credentials() {
    require_root();
    let upstream = Upstream::new();
    upstream.commit("main", &[("a", "1")]);
    let server = Server::start(upstream.root());
    server.behave(Behaviour::Stall);
    let mirror = tempfile::tempdir().unwrap();
    let request = json!({
        "url": server.url("app.git"), "mirror": mirror.path(), "want": "all", "credential": null,
        "policy": { "allow_http": true, "allow_file": false, "allow_loopback": true, "allow_private": false, "hosts": [] },
        "ca_file": null, "known_hosts": null, "max_bytes": 1,
    });
    let (children, run) = (children(), run(&|_| ()));
    let fetched = children.run::<_, Value>(Role::Transfer, &request, Vec::new(), &run);
    tokio::pin!(fetched);
    // It goes on while it is looked at.
    let seen = tokio::select! {
        ended = &mut fetched => panic!("{ended:?}"),
        seen = Seen::of(Role::Transfer) => seen,
    };
    seen.assert_shut_in(0, 0, "0000000000000004");
    assert!(Path::new("/proc").join(seen.pid.to_string()).exists());
}
