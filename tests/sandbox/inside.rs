//! A program that shuts itself in as a child of each role does, tries what it must not, and tells how that went.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Write as _,
    net::{TcpListener, TcpStream, UdpSocket},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{
            fs::{MetadataExt, PermissionsExt},
            net::{UnixDatagram, UnixListener, UnixStream},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use haul::{
    git::child::{Access, Confinement, Sandbox, confine, inherited},
    protocol::Owner,
};
use rustix::io::{FdFlags, fcntl_setfd};
use serde_json::{Value, json};

use super::{GID, UID, require_root};

/// The variable that makes the test below the program.
const ORDER: &str = "HAUL_TEST_SHUT_IN";
/// Before the line that tells how it went.
const TOLD: &str = "TOLD ";

/// What was tried, and the error that it gave; nothing for what went through.
type Told = BTreeMap<String, Option<String>>;

/// Where the program tries things.
struct Place {
    dir: tempfile::TempDir,
    tcp: TcpListener,
    _unix: UnixListener,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
        for inner in ["project", "mirror", "outside"] {
            fs::create_dir(path.join(inner)).unwrap();
            fs::write(path.join(inner).join("file"), inner).unwrap();
        }
        std::os::unix::fs::symlink(path.join("outside/file"), path.join("project/link")).unwrap();
        let unix = UnixListener::bind(path.join("outside/socket")).unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        Self { dir, tcp, _unix: unix }
    }

    /// Runs the program in `role`, with the project's directory and a stray descriptor.
    fn tell(&self, role: &str, confinement: &Confinement) -> Told {
        let path = self.dir.path();
        if let Some(Owner { uid, gid }) = confinement.owner {
            for name in ["project", "project/file"] {
                std::os::unix::fs::chown(path.join(name), Some(uid), Some(gid)).unwrap();
            }
        }
        let project = OwnedFd::from(File::open(path.join("project")).unwrap());
        let stray = OwnedFd::from(File::open(path.join("outside/file")).unwrap());
        for fd in [&project, &stray] {
            fcntl_setfd(fd, FdFlags::empty()).unwrap();
        }
        let order = json!({
            "role": role, "path": path, "directory": project.as_raw_fd(), "stray": stray.as_raw_fd(),
            "port": self.tcp.local_addr().unwrap().port(), "confinement": confinement,
        });
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "inside::the_program_that_shuts_itself_in", "--nocapture", "--test-threads=1"])
            .env(ORDER, order.to_string())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        for fd in [&project, &stray] {
            fcntl_setfd(fd, FdFlags::CLOEXEC).unwrap();
        }
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let told = said.lines().find_map(|line| line.split_once(TOLD)).unwrap_or_else(|| {
            panic!("{role}: {said}{}", String::from_utf8_lossy(&output.stderr));
        });
        serde_json::from_str(told.1).unwrap()
    }
}

fn own() -> Confinement {
    Confinement::default()
}

fn owners() -> Confinement {
    Confinement { owner: Some(Owner { uid: UID, gid: GID }), ..own() }
}

/// Asserts that exactly `wanted` went through.
fn assert_possible(told: &Told, wanted: &[&str]) {
    let possible: Vec<&str> = told.iter().filter(|(_, error)| error.is_none()).map(|(name, _)| name.as_str()).collect();
    let mut wanted = wanted.to_vec();
    wanted.sort_unstable();
    assert_eq!(possible, wanted, "{told:#?}");
}

#[test]
fn the_program_that_shuts_itself_in() {
    // Started by the others; by itself it has nothing to do.
    if let Ok(order) = std::env::var(ORDER) {
        println!("{TOLD}{}", serde_json::to_string(&program(&serde_json::from_str(&order).unwrap())).unwrap());
    }
}

fn program(order: &Value) -> Told {
    let path = PathBuf::from(order["path"].as_str().unwrap());
    let number = |name: &str| i32::try_from(order[name].as_i64().unwrap()).unwrap();
    let access = match order["role"].as_str().unwrap() {
        "workspace" => Access { directory: Some(number("directory")), as_owner: true, ..Access::default() },
        "pack" => Access { reads: vec![path.join("mirror")], ..Access::default() },
        role => Access {
            reads: vec![path.join("outside/file")],
            writes: vec![path.join("mirror")],
            network: true,
            programs: role == "transfer over ssh",
            ..Access::default()
        },
    };
    let confinement: Confinement = serde_json::from_value(order["confinement"].clone()).unwrap();
    let port = u16::try_from(order["port"].as_u64().unwrap()).unwrap();
    confine(&access, &confinement).unwrap();
    let directory = access.directory.map(|number| inherited(number).unwrap());
    let project = match &directory {
        Some(directory) => PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd())),
        None => path.join("project"),
    };
    try_all(&path, &project, port, number("stray"))
}

fn try_all(path: &Path, project: &Path, port: u16, stray: i32) -> Told {
    let mut told = Told::new();
    let mut attempt = |name: &str, result: std::io::Result<()>| {
        told.insert(name.to_owned(), result.err().map(|error| error.to_string()));
    };
    attempt("read the project", fs::read(project.join("file")).map(drop));
    attempt("list the project", fs::read_dir(project).map(drop));
    attempt("write the project", fs::write(project.join("new"), "x"));
    attempt("make a link in the project", std::os::unix::fs::symlink("file", project.join("another")));
    attempt(
        "rename within the project",
        fs::create_dir(project.join("d")).and_then(|()| fs::rename(project.join("new"), project.join("d/new"))),
    );
    attempt("follow a link out of the project", fs::read(project.join("link")).map(drop));
    attempt("read the mirror", fs::read(path.join("mirror/file")).map(drop));
    attempt("write the mirror", fs::write(path.join("mirror/new"), "x"));
    attempt("make a link in the mirror", std::os::unix::fs::symlink("/etc", path.join("mirror/etc")));
    attempt("read a file that is named", fs::read(path.join("outside/file")).map(drop));
    attempt("write beside", fs::write(path.join("new"), "x"));
    attempt("write outside", fs::write(path.join("outside/new"), "x"));
    attempt("change outside", fs::write(path.join("outside/file"), "x"));
    attempt("list outside", fs::read_dir(path.join("outside")).map(drop));
    attempt("bring in by a hard link", fs::hard_link(path.join("outside/file"), project.join("hard")));
    attempt("take out by a rename", fs::rename(project.join("file"), path.join("outside/taken")));
    attempt("read the users", fs::read("/etc/shadow").map(drop));
    attempt("read the kernel's word on others", fs::read("/proc/1/status").map(drop));
    attempt("read its own environment", fs::read("/proc/self/environ").map(drop));
    attempt("write to the directory of temporary files", fs::write(std::env::temp_dir().join("haul-sandbox"), "x"));
    attempt("use what was left open", fs::read(format!("/proc/self/fd/{stray}")).map(drop));
    attempt("connect by TCP", TcpStream::connect(("127.0.0.1", port)).map(drop));
    attempt("open a UDP socket", UdpSocket::bind("127.0.0.1:0").map(drop));
    attempt("listen on TCP", TcpListener::bind("127.0.0.1:0").map(drop));
    attempt("connect to a local socket", UnixStream::connect(path.join("outside/socket")).map(drop));
    attempt("open a local socket", UnixDatagram::unbound().map(drop));
    attempt("talk to itself through a socket", UnixStream::pair().map(drop));
    attempt("run a program of the system", Command::new("/bin/true").status().map(drop));
    attempt("run this program", Command::new("/proc/self/exe").arg("--list").stdout(Stdio::null()).status().map(drop));
    attempt("replace itself", Err(Command::new("/nonexistent").exec()).or_else(only_if_looked_for));
    attempt("start a thread", std::thread::Builder::new().spawn(|| ()).map(|thread| thread.join().unwrap()));
    attempt("take more memory than it may", Vec::<u8>::new().try_reserve_exact(3 << 30).map_err(std::io::Error::other));
    attempt("open more files than it may", open_many(project));
    attempt("signal another process", signal_parent());
    attempt("change the limits of another process", limit_parent());
    for (name, call, arguments) in CALLS {
        attempt(name, raw(*call, arguments));
    }
    told
}

/// A program that is not there was looked for: the call itself is allowed.
fn only_if_looked_for(error: std::io::Error) -> std::io::Result<()> {
    if error.kind() == std::io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
}

fn open_many(project: &Path) -> std::io::Result<()> {
    (0..5000).map(|_| File::open(project)).collect::<Result<Vec<_>, _>>().map(drop)
}

fn signal_parent() -> std::io::Result<()> {
    Ok(rustix::process::test_kill_process(rustix::process::getppid().unwrap())?)
}

fn limit_parent() -> std::io::Result<()> {
    use rustix::process::{Resource, Rlimit, getrlimit, prlimit};
    let Rlimit { current, maximum } = getrlimit(Resource::Core);
    Ok(prlimit(rustix::process::getppid(), Resource::Core, Rlimit { current, maximum }).map(drop)?)
}

/// Calls with arguments that make them fail in another way, or do nothing, where they are let through.
const CALLS: &[(&str, libc::c_long, [libc::c_long; 4])] = &[
    ("call ptrace", libc::SYS_ptrace, [-1, 0, 0, 0]),
    ("call process_vm_readv", libc::SYS_process_vm_readv, [0, 0, 0, 0]),
    ("call mount", libc::SYS_mount, [0, 0, 0, 0]),
    ("call bpf", libc::SYS_bpf, [-1, 0, 0, 0]),
    ("call keyctl", libc::SYS_keyctl, [-1, 0, 0, 0]),
    ("call add_key", libc::SYS_add_key, [0, 0, 0, 0]),
    ("call userfaultfd", libc::SYS_userfaultfd, [-1, 0, 0, 0]),
    ("call io_uring_setup", libc::SYS_io_uring_setup, [0, 0, 0, 0]),
    ("call perf_event_open", libc::SYS_perf_event_open, [0, 0, 0, 0]),
    ("call kexec_load", libc::SYS_kexec_load, [0, 0, 0, -1]),
    ("call init_module", libc::SYS_init_module, [0, 0, 0, 0]),
    ("call unshare", libc::SYS_unshare, [0, 0, 0, 0]),
    ("call setns", libc::SYS_setns, [-1, 0, 0, 0]),
    ("call open_by_handle_at", libc::SYS_open_by_handle_at, [-1, 0, 0, 0]),
    ("call personality", libc::SYS_personality, [0xffff_ffff, 0, 0, 0]),
    ("call mknodat for a pipe", libc::SYS_mknodat, [-1, 0, 0, 0]),
    ("call execveat", libc::SYS_execveat, [-1, 0, 0, 0]),
    ("call clone3", libc::SYS_clone3, [0, 0, 0, 0]),
    ("call sendmsg", libc::SYS_sendmsg, [-1, 0, 0, 0]),
];

/// Only the filter says "not permitted" or "not implemented" to these arguments; any other answer means that it let the
/// call through.
fn raw(call: libc::c_long, arguments: &[libc::c_long; 4]) -> std::io::Result<()> {
    let [a, b, c, d] = *arguments;
    #[expect(unsafe_code, reason = "no library calls what must not be called")]
    // SAFETY: the arguments are wrong or harmless for every one of the calls, and no memory is passed.
    let result = unsafe { libc::syscall(call, a, b, c, d) };
    let error = std::io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EPERM | libc::ENOSYS) if result < 0 => Err(error),
        _ => Ok(()),
    }
}

const ALWAYS: [&str; 1] = ["start a thread"];
const AS_IT_WORKS_IN_A_PROJECT: [&str; 6] = [
    "read the project",
    "list the project",
    "write the project",
    "make a link in the project",
    "rename within the project",
    "start a thread",
];

#[test]
fn a_workspace_child_can_use_its_project_and_nothing_else() {
    assert_possible(&Place::new().tell("workspace", &own()), &AS_IT_WORKS_IN_A_PROJECT);
}

#[test]
fn a_workspace_child_of_an_owner_can_use_its_project_and_nothing_else() {
    require_root();
    let place = Place::new();
    assert_possible(&place.tell("workspace", &owners()), &AS_IT_WORKS_IN_A_PROJECT);
    let made = fs::metadata(place.dir.path().join("project/d")).unwrap();
    assert_eq!((made.uid(), made.gid()), (UID, GID));
}

#[test]
fn a_pack_child_can_read_its_mirror_and_nothing_else() {
    // Whose projects are does not concern it.
    for confinement in [own(), owners()] {
        assert_possible(&Place::new().tell("pack", &confinement), &["read the mirror", ALWAYS[0]]);
    }
}

#[test]
fn a_transfer_child_can_use_its_mirror_and_the_network_and_nothing_else() {
    let of_all = [
        // It leads to the file that is named.
        "follow a link out of the project",
        "read the mirror",
        "write the mirror",
        "read a file that is named",
        "connect by TCP",
        "open a UDP socket",
        "call sendmsg",
    ];
    let told = Place::new().tell("transfer", &own());
    assert_possible(&told, &[&of_all[..], &ALWAYS].concat());
    let told = Place::new().tell("transfer over ssh", &own());
    let programs = ["run a program of the system", "replace itself", "call execveat"];
    // Signals reach what it started itself, which is where Landlock ends them.
    assert_possible(&told, &[&of_all[..], &ALWAYS, &programs].concat());
}

#[test]
fn without_the_sandbox_only_limits_and_descriptors_are_left() {
    let told = Place::new().tell("workspace", &Confinement { sandbox: Sandbox::Off, ..own() });
    for name in ["read the mirror", "connect by TCP", "run a program of the system"] {
        assert_eq!(told[name], None, "{told:#?}");
    }
    for name in ["use what was left open", "take more memory than it may", "open more files than it may"] {
        assert!(told[name].is_some(), "{name}: {told:#?}");
    }
}

#[test]
fn a_descriptor_that_the_request_names_but_the_agent_did_not_pass_is_refused() {
    let place = Place::new();
    let order = json!({
        "role": "workspace", "path": place.dir.path(), "directory": 77, "stray": 78, "port": 1, "confinement": own(),
    });
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "inside::the_program_that_shuts_itself_in", "--nocapture", "--test-threads=1"])
        .env(ORDER, order.to_string())
        .output()
        .unwrap();
    assert!(!output.status.success());
    std::io::stderr().write_all(&output.stderr).unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("descriptor 77 was not inherited"));
}
