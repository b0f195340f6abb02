//! What git says on its standard error: how far it is, and why it failed.

use std::{
    io::Read,
    process::ChildStderr,
    sync::{
        atomic::Ordering,
        mpsc::{Receiver, RecvTimeoutError, channel},
    },
    thread::JoinHandle,
    time::Duration,
};

use gix::progress::{Count, Progress as _, StepShared};

use super::super::{meter::Hand, status};
use crate::{
    failure::{ErrorClass, Failure},
    git::room::refused,
    protocol::printable,
};

/// The longest line that is looked at, in bytes.
const LONGEST_LINE: usize = 4096;
/// How much of the last words is kept, in bytes.
const TAIL: usize = 2048;

/// Where what is heard is counted.
pub(super) struct Ear {
    /// Bytes that the upstream had git say.
    pub(super) sent: StepShared,
    /// Steps of git's own.
    pub(super) moved: StepShared,
    /// Objects received.
    pub(super) received: Hand,
    /// Deltas resolved.
    pub(super) resolved: Hand,
}

/// All that was heard.
#[derive(Debug, Default)]
pub(super) struct Heard {
    /// The last words, without those of the upstream.
    pub(super) words: String,
    /// Whether the upstream spoke git's protocol.
    pub(super) spoke: bool,
    /// Objects of the pack.
    pub(super) objects: u64,
    /// Bytes of the pack, where it was large enough to be told.
    pub(super) bytes: Option<u64>,
}

/// The thread that listens.
pub(super) struct Listening {
    thread: JoinHandle<Heard>,
    over: Receiver<()>,
}

impl Listening {
    /// Whether all fell silent within `wait`.
    pub(super) fn over_within(&self, wait: Duration) -> bool {
        self.over.recv_timeout(wait) == Err(RecvTimeoutError::Disconnected)
    }

    /// What was heard to the end.
    pub(super) fn heard(self) -> Heard {
        self.thread.join().unwrap_or_default()
    }
}

impl Ear {
    /// Listens until nobody holds the other end any more.
    pub(super) fn listen(mut self, from: Option<ChildStderr>) -> Listening {
        let (tell, over) = channel();
        let thread = std::thread::spawn(move || {
            let _over = tell;
            let mut heard = Heard::default();
            let mut line = Vec::new();
            let mut chunk = [0; 8192];
            let Some(mut from) = from else { return heard };
            while let Ok(count @ 1..) = from.read(&mut chunk) {
                for &byte in &chunk[..count] {
                    if byte == b'\n' || byte == b'\r' {
                        self.hear(&String::from_utf8_lossy(&line), &mut heard);
                        line.clear();
                    } else if line.len() < LONGEST_LINE {
                        line.push(byte);
                    }
                }
            }
            self.hear(&String::from_utf8_lossy(&line), &mut heard);
            heard
        });
        Listening { thread, over }
    }

    fn hear(&mut self, line: &str, heard: &mut Heard) {
        if line.starts_with("{\"event\":") {
            heard.spoke |= line.contains("\"key\":\"negotiated-version\"");
            if line.contains("\"key\":\"total_bytes\"") {
                heard.bytes = number_after(line, "\"value\":").or(heard.bytes);
            }
        } else if let Some((done, total)) = fraction(line, "Receiving objects:") {
            heard.objects = total;
            count(&mut self.received, done, total);
        } else if let Some((done, total)) = fraction(line, "Resolving deltas:") {
            count(&mut self.resolved, done, total);
        } else if line.starts_with("remote: ") {
            self.sent.fetch_add(line.len(), Ordering::Relaxed);
        } else if line.starts_with("Checking connectivity:") {
            self.moved.fetch_add(1, Ordering::Relaxed);
        } else if !line.trim().is_empty() {
            heard.words.push_str(line.trim());
            heard.words.push('\n');
            if heard.words.len() > TAIL {
                let cut = heard.words.ceil_char_boundary(heard.words.len() - TAIL);
                heard.words.drain(..cut);
            }
        }
    }
}

fn count(hand: &mut Hand, done: u64, total: u64) {
    hand.set_max(usize::try_from(total).ok());
    hand.set(usize::try_from(done).unwrap_or(usize::MAX));
}

/// The numbers of `<title>  45% (9/20)…`.
fn fraction(line: &str, title: &str) -> Option<(u64, u64)> {
    let (_, rest) = line.strip_prefix(title)?.split_once('(')?;
    let (done, total) = rest.split_once(')')?.0.split_once('/')?;
    Some((done.parse().ok()?, total.parse().ok()?))
}

/// The number after `key`, in quotes or without.
fn number_after(line: &str, key: &str) -> Option<u64> {
    let rest = line.split_once(key)?.1.trim_start_matches('"');
    let end = rest.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(rest.len());
    rest[..end].parse().ok()
}

/// What the last words of a git that failed stand for.
///
/// They are the only thing it leaves; those that tell most are asked for first. A `Retry-After` is not among them.
pub(super) fn judge(host: &str, authorised: bool, doing: &str, words: &str) -> Failure {
    let has = |parts: &[&str]| parts.iter().any(|part| words.contains(part));
    let told = || {
        let lines: Vec<&str> = words.lines().filter(|line| !line.starts_with("From ")).collect();
        printable(&lines.join("; "))
    };
    let failure = |class, what: &str| Failure::new(class, format!("{host}: {what}: {}", told()));
    if refused(words) {
        return Failure::new(ErrorClass::Disk, format!("git could not write what it received: {}", told()));
    }
    let status = if has(&["could not read Username", "could not read Password", "Authentication failed"]) {
        Some(401)
    } else if words.contains("fatal: repository '") && words.contains("' not found") {
        Some(404)
    } else {
        number_after(words, "The requested URL returned error: ").and_then(|status| u16::try_from(status).ok())
    };
    let redirected = status.is_some_and(|status| (300..400).contains(&status));
    if let Some(failure) = status.and_then(|status| status::failure(host, status, authorised, None, redirected)) {
        return failure;
    }
    // Older and newer words of the same library.
    let by_proxy = ["CONNECT tunnel failed, response ", "Received HTTP code "];
    if let Some(status) = by_proxy.iter().find_map(|before| number_after(words, before)) {
        if status == 403 {
            return failure(ErrorClass::Forbidden, "the proxy does not connect to it");
        }
        return failure(ErrorClass::Network, "the connection failed").unreachable();
    }
    if has(&["Permission denied (", "Too many authentication failures", "Load key"]) {
        return failure(ErrorClass::Auth, "it refused the key");
    }
    if has(&["Host key verification failed"]) {
        return failure(ErrorClass::Forbidden, "its key is not the one in git.known_hosts");
    }
    if has(&["dubious ownership"]) {
        return failure(ErrorClass::Forbidden, "the repository belongs to somebody else");
    }
    // The upstream's own word in place of a pack, mostly since the refs have changed since they were listed.
    let refused = has(&["remote error: "]);
    if !refused && has(&["SSL", "TLS", "tls", "certificate"]) {
        return failure(ErrorClass::Network, "no trusted connection could be made");
    }
    let absent = ["does not appear to be a git repository", "Repository not found", "not valid: is this a git"];
    if has(&absent) {
        return failure(ErrorClass::NotFound, "there is no such repository");
    }
    // A connection that breaks looks like a damaged pack to what reads it.
    let broken = ["RPC failed", "early EOF", "unexpected disconnect", "hung up", "Connection reset", "timed out"];
    let damaged = [
        "index-pack",
        "bad object",
        "corrupt",
        "inflate",
        "unresolved delta",
        "pack signature",
        "bad pack",
        "did not send all necessary objects",
    ];
    let (class, what) = if !refused && !has(&broken) && has(&damaged) {
        (ErrorClass::Corrupt, "what it sent is damaged")
    } else {
        (ErrorClass::Network, "the connection failed")
    };
    let mut failure = failure(class, what);
    failure.message = format!("git could not {doing} {}", failure.message);
    // There was nobody to talk to, whom it is no use to ask again soon.
    let absent = ["Failed to connect to ", "Could not resolve ", "ssh: connect to host ", "ssh: Could not resolve "];
    failure.unreachable = class == ErrorClass::Network && !refused && has(&absent);
    failure
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::git::transfer::meter::Meter;

    fn heard(text: &str) -> Heard {
        let meter = Meter::default();
        let mut ear =
            Ear { sent: meter.received(), moved: meter.moved(), received: meter.hand(), resolved: meter.hand() };
        let mut heard = Heard::default();
        text.split(['\r', '\n']).for_each(|line| ear.hear(line, &mut heard));
        heard
    }

    #[test]
    fn progress_is_counted_and_words_are_kept() {
        let heard = heard(
            "{\"event\":\"data\",\"key\":\"negotiated-version\",\"value\":\"2\"}\nremote: Receiving objects: (9/9)\r\
             Receiving objects:  50% (2/4)\rReceiving objects: 100% (4/4), 1.2 KiB | 3 KiB/s, done.\n\
             {\"event\":\"data\",\"category\":\"progress\",\"key\":\"total_bytes\",\"value\":\"1234\"}\n\
             Resolving deltas: 100% (1/1), done.\nremote: fatal: lies\nfatal: early EOF\n",
        );
        assert!(heard.spoke);
        assert_eq!((heard.objects, heard.bytes, heard.words.as_str()), (4, Some(1234), "fatal: early EOF\n"));
    }

    #[test]
    fn only_the_end_of_many_words_is_kept() {
        let heard = heard(&"é a line that says little\n".repeat(1000));
        assert!(heard.words.len() <= TAIL && heard.words.ends_with("little\n"));
    }

    #[test]
    fn the_words_of_git_have_their_classes() {
        let status = |code: u16| format!("fatal: unable to access 'u': The requested URL returned error: {code}");
        for (words, class) in [
            (status(401), ErrorClass::Auth),
            (status(403), ErrorClass::Forbidden),
            (status(410), ErrorClass::NotFound),
            (status(429), ErrorClass::Throttled),
            (status(503), ErrorClass::Network),
            (status(302), ErrorClass::Invalid),
            ("fatal: repository 'http://h/x/' not found".to_owned(), ErrorClass::NotFound),
            ("fatal: could not read Username for 'http://h': terminal prompts disabled".to_owned(), ErrorClass::Auth),
            ("fatal: '/x' does not appear to be a git repository".to_owned(), ErrorClass::NotFound),
            ("git@h: Permission denied (publickey).\nfatal: Could not read from remote".to_owned(), ErrorClass::Auth),
            ("Host key verification failed.\nfatal: Could not read".to_owned(), ErrorClass::Forbidden),
            ("fatal: unable to access 'u': Could not resolve host: h".to_owned(), ErrorClass::Network),
            ("fatal: unable to access 'u': SSL certificate problem".to_owned(), ErrorClass::Network),
            ("fatal: write error: No space left on device".to_owned(), ErrorClass::Disk),
            ("fatal: early EOF\nfatal: fetch-pack: invalid index-pack output".to_owned(), ErrorClass::Network),
            ("fatal: pack is corrupted (SHA1 mismatch)".to_owned(), ErrorClass::Corrupt),
            ("fatal: remote error: upload-pack: not our ref 1; corrupt".to_owned(), ErrorClass::Network),
            ("fatal: unable to access 'u': CONNECT tunnel failed, response 403".to_owned(), ErrorClass::Forbidden),
            (String::new(), ErrorClass::Network),
        ] {
            assert_eq!(judge("h", true, "do", &words).class, class, "{words}");
        }
    }

    #[test]
    fn a_host_that_is_not_there_is_told_from_one_that_answers_badly() {
        for (words, unreachable) in [
            ("fatal: unable to access 'u': Failed to connect to h port 1 after 0 ms: Couldn't connect to server", true),
            ("fatal: unable to access 'u': Could not resolve host: h", true),
            ("fatal: unable to access 'u': CONNECT tunnel failed, response 502", true),
            ("fatal: unable to access 'u': Received HTTP code 407 from proxy after CONNECT", true),
            ("ssh: connect to host h port 22: Connection refused\nfatal: Could not read from remote repository.", true),
            ("fatal: unable to access 'u': The requested URL returned error: 503", true),
            ("fatal: unable to access 'u': The requested URL returned error: 500", false),
            ("fatal: unable to access 'u': SSL certificate problem", false),
            ("fatal: remote error: Failed to connect to the database", false),
            ("fatal: early EOF", false),
        ] {
            let failure = judge("h", true, "do", words);
            assert_eq!((failure.class, failure.unreachable), (ErrorClass::Network, unreachable), "{words}");
        }
    }
}
