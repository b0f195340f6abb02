//! The transport whose engine is the `git` command: listing by `git ls-remote`, packs by `git fetch`.
//!
//! It is slower than the other and needs a program on the node, and shares no code with it below the lines of the
//! protocol: what one of them cannot read, the other mostly can.
//!
//! What the program needs besides the mirror: itself with its helpers (`git --exec-path`: `git-remote-https`,
//! `git-index-pack`, `git-rev-list`, `git-upload-pack`) and their libraries, `/proc/self/fd`, `/dev/null`, the files of
//! certificate authorities, and for ssh `sh` and `ssh` with the key and the known hosts. It is not asked for a working
//! tree, hooks, submodules, filters or helpers for credentials.

mod program;
mod said;
mod settings;
mod version;
mod watch;

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs::{self, File},
    io::{Read, Write},
    num::NonZeroU32,
    path::{Path, PathBuf},
    process::{ChildStdout, Stdio},
    sync::atomic::Ordering,
};

use gix::{
    NestedProgress,
    bstr::BString,
    progress::{Count, StepShared},
    protocol::handshake::Ref,
};

use self::{
    program::Program,
    said::{Ear, Heard},
    settings::Settings,
    watch::Watch,
};
use super::{
    Received, Request, Transport,
    bare::Bare,
    gitoxide,
    meter::{INDEXED_OBJECTS, Meter, PACK_BYTES, RESOLVED_OBJECTS},
};
use crate::{
    failure::{ErrorClass, Failure},
    git::mirror::Listing,
    protocol::GitUrl,
};

/// A conversation with an upstream, each part of it by a process of its own.
pub(super) struct GitCommand<'a> {
    program: Program,
    upstream: Upstream,
    max_bytes: u64,
    reserve: u64,
    meter: &'a Meter,
}

/// Whom it talks to, as far as words about it need to know.
#[derive(Clone, Debug)]
struct Upstream {
    address: String,
    host: String,
    /// Whether a credential is sent.
    authorised: bool,
}

impl<'a> GitCommand<'a> {
    /// Finds the program, looks at its version and writes its settings.
    ///
    /// # Errors
    /// `internal` where there is no git that can be used, and what the policy and the credential say.
    pub(super) fn new(request: &Request, url: &GitUrl, meter: &'a Meter) -> Result<Self, Failure> {
        let program = Program::find(url.scheme())?;
        let settings = Settings::for_upstream(request, url)?;
        let upstream = Upstream {
            address: url.as_str().to_owned(),
            host: url.host().to_owned(),
            authorised: request.credential.is_some(),
        };
        let program = program.with(settings.into_file()?);
        Ok(Self { program, upstream, max_bytes: request.max_bytes, reserve: request.reserve, meter })
    }

    /// Brings `wants` into the repository `git_dir`.
    fn fetch(&self, git_dir: &Path, wants: &BTreeSet<String>, depth: Option<NonZeroU32>) -> Result<Received, Failure> {
        let packs = git_dir.join("objects/pack");
        let before = names(&packs)?;
        let mut command = self.program.command("fetch", git_dir);
        command.args(["--progress", "--no-tags", "--no-write-fetch-head", "--no-auto-maintenance"]);
        command.args(["--no-recurse-submodules", "--no-prune", "--stdin"]);
        if let Some(depth) = depth {
            command.arg(format!("--depth={depth}"));
        }
        command.args(["--end-of-options", &self.upstream.address]);
        command.stdin(Stdio::piped()).stdout(Stdio::null());
        let mut child = watch::limiting_files(self.max_bytes, || program::start(&mut command))?;
        let mut hand = self.meter.hand();
        let bytes = hand.add_child_with_id("", PACK_BYTES).counter();
        let ear = Ear {
            sent: self.meter.received(),
            moved: self.meter.moved(),
            received: hand.add_child_with_id("", INDEXED_OBJECTS),
            resolved: hand.add_child_with_id("", RESOLVED_OBJECTS),
        };
        let listening = ear.listen(child.stderr.take());
        if let Some(mut input) = child.stdin.take() {
            let lines: String = wants.iter().flat_map(|oid| [oid, "\n"]).collect();
            // One that ended early says why.
            let _ = input.write_all(lines.as_bytes());
        }
        let watch = Watch { packs: &packs, before: &before, most: self.max_bytes, reserve: self.reserve, seen: &bytes };
        if let Some(breach) = watch.until_silent(&child, &listening) {
            // A helper of git's that goes on is not waited for: it ends with this process and its group.
            sweep(&packs, &before)?;
            return Err(breach);
        }
        let (status, heard) = program::end(child, listening)?;
        if !status.success() {
            // The kernel stopped what would have grown too large, and git does not say so.
            let too_large = sweep(&packs, &before)? >= self.max_bytes;
            return Err(if too_large { watch::too_large() } else { self.judge(&heard, "receive a pack from") });
        }
        let new: Vec<OsString> = names(&packs)?.difference(&before).cloned().collect();
        let received = Received { objects: heard.objects, bytes: heard.bytes.map_or_else(|| sizes(&packs, &new), Ok)? };
        bytes.store(usize::try_from(received.bytes).unwrap_or(usize::MAX), Ordering::Relaxed);
        // The program has synced its files; the names are ours to keep.
        File::open(&packs)?.sync_all()?;
        Ok(received)
    }

    fn judge(&self, heard: &Heard, doing: &str) -> Failure {
        said::judge(&self.upstream.host, self.upstream.authorised, doing, &heard.words)
    }
}

impl Transport for GitCommand<'_> {
    fn list(&mut self) -> Result<Listing, Failure> {
        let mut command = self.program.command("ls-remote", Path::new("/dev/null"));
        command.args(["--symref", "--end-of-options", &self.upstream.address]);
        let mut child = program::start(command.stdin(Stdio::null()).stdout(Stdio::piped()))?;
        let sent = self.meter.received();
        let ear = Ear {
            sent: sent.clone(),
            moved: self.meter.moved(),
            received: self.meter.hand(),
            resolved: self.meter.hand(),
        };
        let listening = ear.listen(child.stderr.take());
        let text = child.stdout.take().map(|output| read_listing(output, &sent)).transpose()?.unwrap_or_default();
        let too_long = text.len() as u64 > gitoxide::LONGEST_LISTING;
        if too_long {
            let _ = child.kill();
        }
        let (status, heard) = program::end(child, listening)?;
        if too_long {
            return Err(Failure::new(ErrorClass::Quota, "the upstream's list of refs is longer than this node takes"));
        }
        if !status.success() {
            return Err(self.judge(&heard, "list the refs of"));
        }
        if !heard.spoke {
            // The program would read plain files of a web server too, and takes an empty answer for a repository.
            let message = format!("{} does not speak git's protocol at this address", self.upstream.host);
            return Err(Failure::new(ErrorClass::NotFound, message));
        }
        gitoxide::listing(refs(&text)?)
    }

    fn receive(
        &mut self,
        mirror: &Bare,
        wants: &BTreeSet<String>,
        depth: Option<NonZeroU32>,
    ) -> Result<Received, Failure> {
        self.fetch(mirror.repository.git_dir(), wants, depth)
    }
}

/// Everything that `output` has, and one byte more than a listing may have where it has more.
fn read_listing(output: ChildStdout, sent: &StepShared) -> Result<Vec<u8>, Failure> {
    let (mut text, mut output) = (Vec::new(), output.take(gitoxide::LONGEST_LISTING + 1));
    let mut chunk = vec![0; 64 << 10];
    loop {
        let count = output.read(&mut chunk)?;
        if count == 0 {
            return Ok(text);
        }
        sent.fetch_add(count, Ordering::Relaxed);
        text.extend_from_slice(&chunk[..count]);
    }
}

/// Reads what `git ls-remote --symref` prints.
fn refs(text: &[u8]) -> Result<Vec<Ref>, Failure> {
    let mut refs: Vec<Ref> = Vec::new();
    let mut head = None;
    for line in text.split(|&byte| byte == b'\n') {
        let Some(tab) = line.iter().position(|&byte| byte == b'\t') else { continue };
        let (first, name) = (&line[..tab], BString::from(&line[tab + 1..]));
        if let Some(target) = first.strip_prefix(b"ref: ") {
            if name == "HEAD" {
                head = Some(BString::from(target));
            }
            continue;
        }
        if first.len() == 64 {
            return Err(Failure::invalid("the upstream names its objects by sha256, which is not supported"));
        }
        let Ok(object) = gix::ObjectId::from_hex(first) else { continue };
        if let Some(tag) = name.strip_suffix(b"^{}") {
            // Follows the line of its tag.
            if let Some(last) = refs.last_mut()
                && let Ref::Direct { full_ref_name, object: of_tag } = last
                && *full_ref_name == tag
            {
                *last = Ref::Peeled { full_ref_name: full_ref_name.clone(), tag: *of_tag, object };
            }
        } else if let Some(target) = head.take_if(|_| name == "HEAD") {
            refs.push(Ref::Symbolic { full_ref_name: name, target, tag: None, object });
        } else {
            refs.push(Ref::Direct { full_ref_name: name, object });
        }
    }
    Ok(refs)
}

/// The names of everything in a directory.
fn names(directory: &Path) -> Result<BTreeSet<OsString>, Failure> {
    Ok(fs::read_dir(directory)?.map(|entry| entry.map(|entry| entry.file_name())).collect::<Result<_, _>>()?)
}

/// Removes what a git that failed left beside what was there before: room is given back at once, not only when the
/// mirror is opened next. Returns the size of the largest.
fn sweep(packs: &Path, before: &BTreeSet<OsString>) -> Result<u64, Failure> {
    let mut largest = 0;
    for name in names(packs)?.difference(before) {
        let bytes = name.as_encoded_bytes();
        if bytes.starts_with(b"tmp_") || bytes.ends_with(b".keep") {
            let path = packs.join(name);
            largest = largest.max(path.symlink_metadata().map_or(0, |metadata| metadata.len()));
            let _ = fs::remove_file(path);
        }
    }
    Ok(largest)
}

/// How large the packs among `files` are.
fn sizes(directory: &Path, files: &[OsString]) -> Result<u64, Failure> {
    let packs = files.iter().map(|name| directory.join(name)).filter(|path| path.extension() == Some("pack".as_ref()));
    packs.map(|path: PathBuf| Ok(path.metadata()?.len())).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "1111111111111111111111111111111111111111";
    const B: &str = "2222222222222222222222222222222222222222";

    fn listing(text: &str) -> Result<Listing, Failure> {
        gitoxide::listing(refs(text.as_bytes())?)
    }

    #[test]
    fn what_git_lists_is_what_the_other_engine_lists() {
        let text = format!(
            "ref: refs/heads/main\tHEAD\n{A}\tHEAD\n{A}\trefs/heads/main\n{A}\trefs/pull/1/head\n\
             {B}\trefs/tags/v1\n{A}\trefs/tags/v1^{{}}\n"
        );
        let listing = listing(&text).unwrap();
        assert_eq!(listing.head.as_deref(), Some("refs/heads/main"));
        assert_eq!(listing.refs.keys().collect::<Vec<_>>(), ["refs/heads/main", "refs/tags/v1"]);
        assert_eq!((listing.refs["refs/tags/v1"].as_str(), listing.peeled["refs/tags/v1"].as_str()), (B, A));
    }

    #[test]
    fn lines_that_no_git_writes_are_passed_over() {
        let text = format!(
            "x\n{A} refs/heads/a\n{A}\trefs/heads/..\n{A}\trefs/heads/b\x1b[1m\nref: refs/x\nHEAD\n\t\n\
             {A}\trefs/tags/lost^{{}}\n11\trefs/heads/c\n{A}\trefs/heads/good\n"
        );
        let listing = listing(&text).unwrap();
        assert_eq!(listing.refs.keys().collect::<Vec<_>>(), ["refs/heads/good"]);
        assert!(listing.peeled.is_empty() && listing.head.is_none());
    }

    #[test]
    fn longer_names_of_objects_are_refused() {
        assert_eq!(listing(&format!("{}\tHEAD\n", "1".repeat(64))).unwrap_err().class, ErrorClass::Invalid);
    }
}
