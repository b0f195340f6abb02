//! The files of a new `.git`, as `git clone` would leave them.

use std::{collections::BTreeMap, fmt::Write as _, fs, io, path::Path};

use crate::{git::projects::Follows, protocol::printable};

/// The head of a sorted list of refs in which annotated tags carry what they point to.
const PACKED: &str = "# pack-refs with: peeled fully-peeled sorted \n";
/// The name that stands in logs of refs for what the agent did.
const WHO: &str = "haul <haul@localhost>";

/// One ref of the upstream.
pub(super) struct Upstream<'a> {
    /// Full names to ids.
    pub(super) refs: &'a BTreeMap<String, String>,
    /// What annotated tags point to in the end.
    pub(super) peeled: &'a BTreeMap<String, String>,
}

/// Makes the directories and the files that do not depend on what is checked out.
pub(super) fn lay_out(git: &Path, config: &str, packed: &str) -> io::Result<()> {
    for inner in ["info", "objects/info", "objects/pack", "refs/heads", "refs/tags", "logs/refs/heads", "hooks"] {
        fs::create_dir_all(git.join(inner))?;
    }
    fs::write(git.join("description"), "Unnamed repository; edit this file 'description' to name the repository.\n")?;
    fs::write(git.join("info/exclude"), "# Patterns in this file are ignored in this working tree only.\n")?;
    fs::write(git.join("config"), config)?;
    if !packed.is_empty() {
        fs::write(git.join("packed-refs"), packed)?;
    }
    // A repository is one only with a HEAD; the real one comes last.
    fs::write(git.join("HEAD"), "ref: refs/heads/main\n")
}

/// The configuration: the plain address, and a branch that follows the upstream's.
pub(super) fn config(url: &str, follows: &Follows, single_branch: bool) -> String {
    let mut text =
        "[core]\n\trepositoryformatversion = 0\n\tfilemode = true\n\tbare = false\n\tlogallrefupdates = true\n"
            .to_owned();
    let spec = match (single_branch, follows) {
        (true, Follows::Branch(name)) => format!("+refs/heads/{name}:refs/remotes/origin/{name}"),
        (true, Follows::Tag(name)) => format!("+refs/tags/{name}:refs/tags/{name}"),
        _ => "+refs/heads/*:refs/remotes/origin/*".to_owned(),
    };
    let _ = write!(text, "[remote \"origin\"]\n\turl = {}\n\tfetch = {}\n", value(url), value(&spec));
    if let Follows::Branch(name) = follows {
        let section = name.replace('\\', "\\\\").replace('"', "\\\"");
        let merge = value(&format!("refs/heads/{name}"));
        let _ = write!(text, "[branch \"{section}\"]\n\tremote = origin\n\tmerge = {merge}\n");
    }
    text
}

/// A value as it stands in a configuration file; quoted only where it must be.
pub(super) fn value(text: &str) -> String {
    let plain = text.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-*/:._@%~=,!$&'()[]{}|^?<>".contains(&b));
    if plain && !text.is_empty() {
        return text.to_owned();
    }
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

/// The remote-tracking refs and tags of a clone, by their names in the project.
pub(super) fn tracking(upstream: &Upstream<'_>, follows: &Follows, single_branch: bool) -> BTreeMap<String, String> {
    let wanted = |name: &str| match follows {
        Follows::Branch(branch) => !single_branch || name == branch,
        Follows::Tag(_) | Follows::Commit(_) => !single_branch,
    };
    let mut refs = BTreeMap::new();
    for (name, oid) in upstream.refs {
        if let Some(branch) = name.strip_prefix("refs/heads/") {
            if wanted(branch) {
                refs.insert(format!("refs/remotes/origin/{branch}"), oid.clone());
            }
        } else if name.starts_with("refs/tags/") {
            refs.insert(name.clone(), oid.clone());
        }
    }
    refs
}

/// `packed-refs` with `refs`.
pub(super) fn packed(refs: &BTreeMap<String, String>, peeled: &BTreeMap<String, String>) -> String {
    if refs.is_empty() {
        return String::new();
    }
    let mut text = PACKED.to_owned();
    for (name, oid) in refs {
        let _ = writeln!(text, "{oid} {name}");
        if let Some(target) = peeled.get(name).filter(|_| name.starts_with("refs/tags/")) {
            let _ = writeln!(text, "^{target}");
        }
    }
    text
}

/// The file that says where the history ends, as git writes it.
pub(super) fn shallow(boundary: &[String]) -> String {
    boundary.iter().fold(String::new(), |mut text, oid| {
        let _ = writeln!(text, "{oid}");
        text
    })
}

/// Lets `origin/HEAD` point to the upstream's default branch.
pub(super) fn write_origin_head(git: &Path, branch: &str) -> io::Result<()> {
    fs::create_dir_all(git.join("refs/remotes/origin"))?;
    fs::write(git.join("refs/remotes/origin/HEAD"), format!("ref: refs/remotes/origin/{branch}\n"))
}

/// Writes the branch, if one is followed, and HEAD with their logs.
pub(super) fn write_head(git: &Path, follows: &Follows, head: Option<&str>, url: &str, now: i64) -> io::Result<()> {
    if let Some(oid) = head {
        let line = format!("{:040} {oid} {WHO} {now} +0000\tclone: from {}\n", 0, printable(url));
        fs::write(git.join("logs/HEAD"), &line)?;
        if let Follows::Branch(name) = follows {
            write_beneath(&git.join("refs/heads"), name, &format!("{oid}\n"))?;
            write_beneath(&git.join("logs/refs/heads"), name, &line)?;
        }
    }
    let head = match (follows, head) {
        (Follows::Branch(name), _) => format!("ref: refs/heads/{name}\n"),
        (_, Some(oid)) => format!("{oid}\n"),
        (_, None) => return Err(io::Error::new(io::ErrorKind::InvalidInput, "a tag or commit without an object")),
    };
    fs::write(git.join("HEAD"), head)
}

fn write_beneath(root: &Path, name: &str, text: &str) -> io::Result<()> {
    let path = root.join(name);
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::write(path, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_that_would_be_read_differently_are_quoted() {
        assert_eq!(value("https://git.example/a.git"), "https://git.example/a.git");
        assert_eq!(value("a;b"), "\"a;b\"");
        assert_eq!(value("a \"b\""), "\"a \\\"b\\\"\"");
    }

    #[test]
    fn a_narrow_clone_tracks_its_branch_alone() {
        let refs = BTreeMap::from(
            ["refs/heads/main", "refs/heads/dev", "refs/tags/v1"].map(|name| (name.to_owned(), "1".repeat(40))),
        );
        let upstream = Upstream { refs: &refs, peeled: &BTreeMap::new() };
        let follows = Follows::Branch("dev".to_owned());
        let names = |single| tracking(&upstream, &follows, single).into_keys().collect::<Vec<_>>();
        assert_eq!(names(true), ["refs/remotes/origin/dev", "refs/tags/v1"]);
        assert_eq!(names(false), ["refs/remotes/origin/dev", "refs/remotes/origin/main", "refs/tags/v1"]);
        assert!(config("u", &follows, true).contains("fetch = +refs/heads/dev:refs/remotes/origin/dev"));
    }
}
