//! Children under `strace`: what they executed, connected to, wrote and read, as the kernel saw it.

#![allow(dead_code, reason = "each suite uses its own part")]

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    os::unix::fs::PermissionsExt,
    path::{Component, Path, PathBuf},
    time::{Duration, Instant},
};

/// What is traced: everything that executes, connects, opens, makes, renames, removes or changes.
pub(crate) const TRACED: &str = "fcntl,execve,execveat,socket,connect,bind,listen,open,openat,openat2,creat,unlink,unlinkat,\
    rename,renameat,renameat2,mkdir,mkdirat,rmdir,link,linkat,symlink,symlinkat,mknod,mknodat,chmod,fchmodat,?fchmodat2,\
    chown,lchown,fchownat,truncate,utime,utimes,futimesat,utimensat,setxattr,lsetxattr,removexattr,lremovexattr,mount,\
    umount2,pivot_root,chroot,ptrace,process_vm_writev";
/// What every process of this system reads.
const SYSTEM: [&str; 8] = ["/proc", "/sys", "/dev", "/etc", "/usr", "/lib", "/lib64", "/run"];

/// Starts every child under a tracer.
pub(crate) struct Tracer {
    directory: PathBuf,
}

/// What one child did.
#[derive(Debug, Default)]
pub(crate) struct Trace {
    /// The role, as on its command line.
    pub(crate) role: String,
    /// Programs that were executed, the child itself left out.
    pub(crate) executed: Vec<String>,
    /// Sockets that were made, connected or bound.
    pub(crate) sockets: Vec<String>,
    /// Paths that were written, made, renamed, removed or changed.
    pub(crate) written: Vec<PathBuf>,
    /// Paths that were only read.
    pub(crate) read: Vec<PathBuf>,
    /// The directories from which it named others, in that order.
    pub(crate) bases: Vec<PathBuf>,
    /// How many calls were looked at.
    pub(crate) calls: usize,
}

impl Tracer {
    /// Writes the traces of `program`'s children into `directory`.
    pub(crate) fn new(directory: &Path, program: &Path) -> Self {
        fs::create_dir(directory).unwrap();
        let script = directory.join("traced.sh");
        let traces = directory.display();
        let options = format!("-y --seccomp-bpf -o {traces}/$$.trace -e signal=none -e trace={TRACED}");
        under_strace(&script, &options, program);
        Self { directory: directory.to_owned() }
    }

    /// The program to start children with.
    pub(crate) fn program(&self) -> PathBuf {
        self.directory.join("traced.sh")
    }

    /// Every trace so far, once its tracer has ended; they are removed.
    pub(crate) fn take(&self) -> Vec<Trace> {
        let begun = Instant::now();
        let mut traces = Vec::new();
        for entry in fs::read_dir(&self.directory).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_none_or(|extension| extension != "trace") {
                continue;
            }
            while is_open(&path) {
                assert!(begun.elapsed() < Duration::from_secs(20), "a tracer does not end");
                std::thread::sleep(Duration::from_millis(5));
            }
            traces.push(parse(&fs::read_to_string(&path).unwrap()));
            fs::remove_file(&path).unwrap();
        }
        traces
    }
}

/// Writes a `script` that starts `program` under strace.
pub(crate) fn under_strace(script: &Path, options: &str, program: &Path) {
    // The tracer is nobody's parent: the child looks for the agent as its own.
    let text = format!("#!/bin/sh\nexec strace -DD -f -qq {options} {} \"$@\"\n", program.display());
    fs::write(script, text).unwrap();
    fs::set_permissions(script, fs::Permissions::from_mode(0o755)).unwrap();
}

/// Whether some process still has the file open.
fn is_open(path: &Path) -> bool {
    fs::read_dir("/proc").unwrap().flatten().any(|entry| {
        fs::read_dir(entry.path().join("fd"))
            .is_ok_and(|mut fds| fds.any(|fd| fd.is_ok_and(|fd| fs::read_link(fd.path()).is_ok_and(|to| to == path))))
    })
}

impl Trace {
    /// Asserts that this child did nothing but its work: no program, no connection but the transfer's, nothing written
    /// outside its own directory, and for a workspace nothing read outside it either.
    pub(crate) fn judge(&self, storage: &Path, what: &str) {
        assert!(self.calls > 0, "{what}: an empty trace proves nothing");
        assert!(self.executed.is_empty(), "{what}: a {} child executed {:?}", self.role, self.executed);
        let beneath = |path: &PathBuf, root: &Path| path.starts_with(root);
        let mirrors = storage.join(".haul/mirrors");
        match self.role.as_str() {
            "workspace" => {
                assert!(self.sockets.is_empty(), "{what}: a workspace child has {:?}", self.sockets);
                // The one that was handed to it comes first; one that ends before it was told has touched nothing.
                let handed = self.bases.iter().find(|path| path.starts_with(storage));
                let root = handed.cloned().unwrap_or_else(|| "/nonexistent".into());
                assert!(
                    root.starts_with(storage.join("projects")) || handed.is_none(),
                    "{what}: handed {}",
                    root.display()
                );
                let outside = self.written.iter().find(|path| !beneath(path, &root));
                assert!(outside.is_none(), "{what}: a workspace child in {} wrote {outside:?}", root.display());
                let system = |path: &PathBuf| SYSTEM.iter().any(|at| path.starts_with(at));
                let outside = self.read.iter().find(|path| !beneath(path, &root) && !system(path));
                assert!(outside.is_none(), "{what}: a workspace child in {} read {outside:?}", root.display());
            }
            "pack" => {
                assert!(self.sockets.is_empty(), "{what}: a pack child has {:?}", self.sockets);
                assert!(self.written.is_empty(), "{what}: a pack child wrote {:?}", self.written);
            }
            "transfer" => {
                let outside = self.written.iter().find(|path| !beneath(path, &mirrors));
                assert!(outside.is_none(), "{what}: a transfer child wrote {outside:?}");
            }
            other => panic!("{what}: a child of the role {other:?}"),
        }
    }
}

/// Reads a trace written with `-f -y`.
pub(crate) fn parse(text: &str) -> Trace {
    let mut trace = Trace::default();
    let mut unfinished: HashMap<&str, String> = HashMap::new();
    let mut descriptors: BTreeMap<String, PathBuf> = BTreeMap::new();
    let mut first = true;
    for line in text.lines() {
        let Some((pid, rest)) = line.split_once(' ') else { continue };
        let rest = rest.trim_start();
        let whole = if let Some(begun) = rest.strip_suffix("<unfinished ...>") {
            unfinished.insert(pid, begun.to_owned());
            continue;
        } else if rest.starts_with("<... ") {
            let Some((_, end)) = rest.split_once(" resumed>") else { continue };
            unfinished.remove(pid).unwrap_or_default() + end
        } else {
            rest.to_owned()
        };
        let Some((name, call)) = whole.split_once('(') else { continue };
        let Some((arguments, result)) = call.rsplit_once(" = ") else { continue };
        trace.calls += 1;
        note_descriptors(&whole, &mut descriptors);
        if arguments.starts_with(|c: char| c.is_ascii_digit())
            && let Some(base) = arguments.split_once('>').and_then(|(first, _)| annotated(&format!("{first}>")))
            && trace.bases.last() != Some(&base)
        {
            trace.bases.push(base);
        }
        let failed = result.trim_start().starts_with('-');
        match name {
            "execve" | "execveat" if first => {
                first = false;
                let role = arguments.split("\"child\", \"").nth(1).and_then(|rest| rest.split('"').next());
                role.unwrap_or("").clone_into(&mut trace.role);
            }
            // Attempts count, successful or not.
            "execve" | "execveat" | "ptrace" | "mount" | "umount2" | "pivot_root" | "chroot" | "process_vm_writev" => {
                trace.executed.push(whole.clone());
            }
            "socket" | "connect" | "bind" | "listen" => trace.sockets.push(whole.clone()),
            // Only for the paths of the descriptors that it names.
            "fcntl" => {}
            _ if failed => {}
            "open" | "openat" | "openat2" | "creat" => {
                let Some(path) = annotated(result) else { continue };
                if !path.is_absolute() {
                    // A pipe or memory.
                    continue;
                }
                let writes = ["O_WRONLY", "O_RDWR", "O_CREAT", "O_TRUNC", "O_TMPFILE"];
                if name == "creat" || writes.iter().any(|flag| arguments.contains(flag)) {
                    if path != Path::new("/dev/null") {
                        trace.written.push(path);
                    }
                } else {
                    trace.read.push(path);
                }
            }
            // Where a link leads is not a place that is touched.
            "symlink" | "symlinkat" => trace.written.extend(named(arguments, &descriptors).into_iter().skip(1)),
            _ => trace.written.extend(named(arguments, &descriptors)),
        }
    }
    trace
}

/// The path that the tracer wrote behind a descriptor: `5</path>`.
fn annotated(text: &str) -> Option<PathBuf> {
    let (_, rest) = text.split_once('<')?;
    let path = rest.rsplit_once('>')?.0;
    let path = path.strip_suffix("(deleted)").unwrap_or(path).trim_end();
    if path.starts_with("/memfd:") {
        return None;
    }
    Some(PathBuf::from(path))
}

/// Remembers every descriptor that a line names.
fn note_descriptors(line: &str, descriptors: &mut BTreeMap<String, PathBuf>) {
    for (at, _) in line.match_indices('<') {
        let number: String =
            line[..at].chars().rev().take_while(char::is_ascii_digit).collect::<Vec<_>>().into_iter().rev().collect();
        if let Some(end) = line[at..].find('>').filter(|_| !number.is_empty()) {
            let path = &line[at + 1..at + end];
            if path.starts_with('/') {
                descriptors.insert(number, PathBuf::from(path.trim_end_matches("(deleted)").trim_end()));
            }
        }
    }
}

/// The paths that a call names, each beneath the directory before it.
fn named(arguments: &str, descriptors: &BTreeMap<String, PathBuf>) -> Vec<PathBuf> {
    let mut paths = Vec::new();
    let mut rest = arguments;
    let mut base = PathBuf::from("/");
    loop {
        let quote = rest.find('"');
        let angle = rest.find('<');
        match (quote, angle) {
            (Some(quote), angle) if angle.is_none_or(|angle| quote < angle) => {
                let Some(end) = rest[quote + 1..].find('"') else { break };
                let text = &rest[quote + 1..quote + 1 + end];
                paths.push(resolve(&base, text, descriptors));
                base = PathBuf::from("/");
                rest = &rest[quote + end + 2..];
            }
            (_, Some(angle)) => {
                let Some(end) = rest[angle..].find('>') else { break };
                base = PathBuf::from(rest[angle + 1..angle + end].trim_end_matches("(deleted)").trim_end());
                rest = &rest[angle + end + 1..];
            }
            _ => break,
        }
    }
    paths
}

/// A path as the kernel reads it, but for links on the way: what those lead to shows in the snapshots.
fn resolve(base: &Path, text: &str, descriptors: &BTreeMap<String, PathBuf>) -> PathBuf {
    let mut path = base.join(text);
    if let Ok(rest) = path.strip_prefix("/proc/self/fd") {
        let mut parts = rest.components();
        if let Some(number) = parts.next() {
            let number = number.as_os_str().to_string_lossy().into_owned();
            let root = descriptors.get(&number).cloned().unwrap_or_else(|| PathBuf::from("/unknown"));
            path = root.join(parts.as_path());
        }
    }
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => drop(plain.pop()),
            Component::CurDir => {}
            part => plain.push(part),
        }
    }
    plain
}
