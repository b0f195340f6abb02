//! Upstreams behind a program: the OpenSSH client, or `git upload-pack` for a path on this machine.

use std::{
    ffi::OsString,
    io::{self, Read},
    net::IpAddr,
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread::JoinHandle,
};

use gix_transport::{
    Protocol,
    client::git::{ConnectMode, blocking_io::Connection},
};

use super::{address, budget::Budget, verdict::Verdict};
use crate::{
    failure::{ErrorClass, Failure},
    protocol::GitUrl,
};

/// How much of what a program writes to its standard error is looked at, in bytes.
const TAIL: u64 = 4096;

/// A program that speaks git's protocol on its standard streams.
#[derive(Debug)]
pub(super) struct Program {
    name: &'static str,
    arguments: Vec<OsString>,
    path: String,
}

impl Program {
    /// The OpenSSH client: nothing but our options, only keys, only known hosts, only the checked address.
    ///
    /// # Errors
    /// `forbidden` without known hosts.
    pub(super) fn ssh(
        url: &GitUrl,
        address: IpAddr,
        key: Option<&Path>,
        known_hosts: Option<&Path>,
    ) -> Result<Self, Failure> {
        let Some(known_hosts) = known_hosts else {
            return Err(Failure::forbidden("ssh upstreams need git.known_hosts: a file with the keys of their hosts"));
        };
        // Known hosts are looked up by the name in the address, not by where it resolved to.
        let alias = match url.port() {
            22 => url.host().to_owned(),
            port => format!("[{}]:{port}", url.host()),
        };
        let mut arguments: Vec<OsString> = ["-F", "/dev/null", "-T"].map(OsString::from).into();
        let mut option = |text: String| arguments.extend([OsString::from("-o"), OsString::from(text)]);
        for fixed in [
            "BatchMode=yes",
            "StrictHostKeyChecking=yes",
            "GlobalKnownHostsFile=/dev/null",
            "CheckHostIP=no",
            "UpdateHostKeys=no",
            "VerifyHostKeyDNS=no",
            "CanonicalizeHostname=no",
            "IdentitiesOnly=yes",
            "IdentityAgent=none",
            "PreferredAuthentications=publickey",
            "PasswordAuthentication=no",
            "KbdInteractiveAuthentication=no",
            "GSSAPIAuthentication=no",
            "ForwardAgent=no",
            "ForwardX11=no",
            "ClearAllForwardings=yes",
            "PermitLocalCommand=no",
            "ProxyCommand=none",
            "ProxyJump=none",
            "ControlMaster=no",
            "ControlPath=none",
            "SendEnv=GIT_PROTOCOL",
            "ServerAliveInterval=15",
            "ServerAliveCountMax=4",
        ] {
            option(fixed.to_owned());
        }
        option(format!("ConnectTimeout={}", address::CONNECT.as_secs()));
        option(format!("HostKeyAlias={alias}"));
        option(format!("UserKnownHostsFile={}", option_path(known_hosts)?));
        option(match key {
            Some(key) => format!("IdentityFile={}", option_path(key)?),
            None => "IdentityFile=none".to_owned(),
        });
        let command = format!("git-upload-pack {}", quoted(&url.path()));
        let rest = ["-p", &url.port().to_string(), "-l", url.user(), "--", &address.to_string(), &command];
        arguments.extend(rest.map(OsString::from));
        Ok(Self { name: "ssh", arguments, path: url.path() })
    }

    /// The options alone, without host and command.
    pub(super) fn options(&self) -> &[OsString] {
        let end = self.arguments.iter().position(|argument| argument == "--").unwrap_or(self.arguments.len());
        &self.arguments[..end]
    }

    /// `git upload-pack` for a repository on this machine.
    ///
    /// # Errors
    /// `not_found` where there is no directory.
    pub(super) fn local(path: &str) -> Result<Self, Failure> {
        if !Path::new(path).is_dir() {
            return Err(Failure::new(ErrorClass::NotFound, format!("there is no repository at {path}")));
        }
        let arguments = ["upload-pack", "--", path].map(OsString::from).into();
        Ok(Self { name: "git", arguments, path: path.to_owned() })
    }

    /// Starts it.
    ///
    /// # Errors
    /// `internal` where the program is not on the node.
    pub(super) fn start(self, verdict: Verdict, budget: Budget) -> Result<Connection<Output, Input>, Failure> {
        let mut child = Command::new(self.name)
            .args(&self.arguments)
            .env("GIT_PROTOCOL", "version=2")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| Failure::internal(format!("the program {} cannot be started: {error}", self.name)))?;
        let missing = || Failure::internal("a program has no pipes");
        let input = child.stdin.take().ok_or_else(missing)?;
        let output = child.stdout.take().ok_or_else(missing)?;
        let errors = child.stderr.take().ok_or_else(missing)?;
        let said = std::thread::spawn(move || {
            let mut text = Vec::new();
            let _ = errors.take(TAIL).read_to_end(&mut text);
            String::from_utf8_lossy(&text).trim().to_owned()
        });
        let running = Arc::new(Mutex::new(Running { child, said: Some(said), name: self.name }));
        let output = Output { inner: output, running: running.clone(), verdict, budget };
        let input = Input { inner: input, running, verdict: output.verdict.clone() };
        let host = None::<(String, Option<u16>)>;
        Ok(Connection::new(output, input, Protocol::V2, self.path, host, ConnectMode::Process, false))
    }
}

/// A path as the value of an ssh option: quoted, and without meaning for its expansion.
fn option_path(path: &Path) -> Result<String, Failure> {
    match path.to_str() {
        Some(text) if !text.contains(['"', '\n']) => Ok(format!("\"{}\"", text.replace('%', "%%"))),
        _ => Err(Failure::internal(format!("the path {} cannot be given to ssh", path.display()))),
    }
}

/// A path as one word of the remote shell.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// The program while it runs; killed when nobody talks to it any more.
struct Running {
    child: Child,
    said: Option<JoinHandle<String>>,
    name: &'static str,
}

impl Running {
    /// Why it ended before its time.
    fn why(&mut self) -> Failure {
        let status = self.child.wait().ok();
        let said = self.said.take().and_then(|said| said.join().ok()).unwrap_or_default();
        judge(self.name, status.and_then(|status| status.code()), &said)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a program's end stands for. OpenSSH says only in words what went wrong.
fn judge(name: &str, code: Option<i32>, said: &str) -> Failure {
    let has = |words: &[&str]| words.iter().any(|word| said.contains(word));
    let class = if name == "ssh" && code == Some(255) {
        if has(&["Permission denied", "Too many authentication failures", "Load key"]) {
            ErrorClass::Auth
        } else if has(&["Host key verification failed"]) {
            ErrorClass::Forbidden
        } else {
            ErrorClass::Network
        }
    } else if has(&["not found", "does not exist", "does not appear to be a git repository", "not a git repository"]) {
        ErrorClass::NotFound
    } else if has(&["ermission denied", "ccess denied", "not authorized"]) {
        ErrorClass::Forbidden
    } else {
        ErrorClass::Network
    };
    let shown = code.map_or_else(|| "a signal".to_owned(), |code| format!("code {code}"));
    let mut failure = Failure::new(class, format!("{name} ended with {shown}: {}", crate::protocol::printable(said)));
    failure.unreachable = name == "ssh" && code == Some(255) && class == ErrorClass::Network;
    failure
}

/// What the program writes.
pub(super) struct Output {
    inner: ChildStdout,
    running: Arc<Mutex<Running>>,
    verdict: Verdict,
    budget: Budget,
}

impl Read for Output {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(into)?;
        if count == 0 && !into.is_empty() {
            // We end the conversation; a program that does is in trouble.
            self.verdict.give(self.running.lock().unwrap_or_else(PoisonError::into_inner).why());
        }
        self.budget.spend(count)?;
        Ok(count)
    }
}

/// What the program reads.
pub(super) struct Input {
    inner: ChildStdin,
    running: Arc<Mutex<Running>>,
    verdict: Verdict,
}

impl Input {
    /// A program that does not listen any more has said why.
    fn heard<T>(&self, written: io::Result<T>) -> io::Result<T> {
        if written.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::BrokenPipe) {
            self.verdict.give(self.running.lock().unwrap_or_else(PoisonError::into_inner).why());
        }
        written
    }
}

impl io::Write for Input {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes);
        self.heard(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        let flushed = self.inner.flush();
        self.heard(flushed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ssh(url: &str, key: Option<&str>) -> Vec<String> {
        let url = GitUrl::parse(url).unwrap();
        let hosts = Path::new("/etc/haul/known hosts");
        let program = Program::ssh(&url, "192.0.2.7".parse().unwrap(), key.map(Path::new), Some(hosts)).unwrap();
        program.arguments.into_iter().map(|argument| argument.into_string().unwrap()).collect()
    }

    #[test]
    fn ssh_reads_no_configuration_and_connects_to_the_checked_address_only() {
        let arguments = ssh("ssh://me@git.example/team/app.git", Some("/etc/haul/team%.key"));
        assert_eq!(arguments[..3], ["-F", "/dev/null", "-T"]);
        assert_eq!(
            arguments[arguments.len() - 7..],
            ["-p", "22", "-l", "me", "--", "192.0.2.7", "git-upload-pack '/team/app.git'"]
        );
        for option in [
            "BatchMode=yes",
            "StrictHostKeyChecking=yes",
            "HostKeyAlias=git.example",
            "UserKnownHostsFile=\"/etc/haul/known hosts\"",
            "IdentityFile=\"/etc/haul/team%%.key\"",
            "IdentitiesOnly=yes",
            "IdentityAgent=none",
            "ForwardAgent=no",
            "ProxyCommand=none",
        ] {
            let at = arguments.iter().position(|argument| argument == option);
            assert_eq!(at.map(|at| arguments[at - 1].as_str()), Some("-o"), "{option}");
        }
    }

    #[test]
    fn another_port_is_part_of_the_known_name() {
        let arguments = ssh("ssh://git.example:2222/x", None);
        assert!(arguments.contains(&"HostKeyAlias=[git.example]:2222".to_owned()));
        assert!(arguments.contains(&"IdentityFile=none".to_owned()));
        assert!(arguments.windows(2).any(|pair| pair == ["-l", "git"]));
    }

    #[test]
    fn a_path_stays_one_word_of_the_remote_shell() {
        assert_eq!(quoted("/a'; id; '"), r"'/a'\''; id; '\'''");
    }

    #[test]
    fn ssh_needs_known_hosts() {
        let url = GitUrl::parse("ssh://git.example/x").unwrap();
        let failure = Program::ssh(&url, "192.0.2.7".parse().unwrap(), None, None).unwrap_err();
        assert!(failure.message.contains("git.known_hosts"));
    }

    #[test]
    fn the_words_of_ssh_have_their_classes() {
        for (code, said, class) in [
            (255, "git@h: Permission denied (publickey).", ErrorClass::Auth),
            (255, "Host key verification failed.", ErrorClass::Forbidden),
            (255, "ssh: connect to host h port 22: Connection refused", ErrorClass::Network),
            (1, "ERROR: Repository not found.", ErrorClass::NotFound),
            (128, "fatal: '/x' does not appear to be a git repository", ErrorClass::NotFound),
            (1, "", ErrorClass::Network),
        ] {
            assert_eq!(judge("ssh", Some(code), said).class, class, "{said}");
        }
    }
}
