//! Submodules as the committed `.gitmodules` has them: names, paths and addresses, each judged before it is used.

use std::collections::{BTreeMap, HashSet};

use gix::bstr::{BStr, ByteSlice};
use gix::objs::tree::EntryKind;
use serde::{Deserialize, Serialize};

use super::workspace::check_name;
use crate::{
    failure::{ErrorClass, Failure},
    protocol::{GitUrl, Scheme, printable},
};

/// The most submodules of one project, those of submodules included.
pub(crate) const MOST: usize = 100;
/// How deep submodules of submodules are followed.
pub(crate) const DEEPEST: usize = 3;
/// The longest `.gitmodules`, in bytes.
pub(super) const LONGEST_FILE: u64 = 256 << 10;
/// The longest name or path of a submodule, in bytes.
const LONGEST_NAME: usize = 1000;

/// One repository of a project: the project itself or a submodule of it, by paths relative to the project.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Place {
    /// Its working tree; empty for the project itself.
    pub(crate) tree: String,
    /// Its git directory.
    pub(crate) git: String,
}

/// A submodule of one repository.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Module {
    /// Its name: where its git directory is, below `modules`.
    pub(crate) name: String,
    /// Where it stands in the working tree.
    pub(crate) path: String,
    /// Its address, as `.gitmodules` has it.
    pub(crate) url: String,
    /// The commit that the tree records.
    pub(crate) commit: String,
}

impl Place {
    /// The project itself.
    pub(crate) fn project() -> Self {
        Self { tree: String::new(), git: ".git".to_owned() }
    }

    /// Where a submodule of this repository is.
    pub(crate) fn inner(&self, module: &Module) -> Self {
        let tree = if self.tree.is_empty() { module.path.clone() } else { format!("{}/{}", self.tree, module.path) };
        Self { tree, git: format!("{}/modules/{}", self.git, module.name) }
    }

    /// The way from the working tree to the git directory.
    pub(super) fn to_git(&self) -> String {
        format!("{}{}", climb(&self.tree), self.git)
    }

    /// The way from the git directory to the working tree.
    pub(super) fn to_tree(&self) -> String {
        format!("{}{}", climb(&self.git), self.tree)
    }
}

fn climb(path: &str) -> String {
    "../".repeat(path.split('/').count())
}

impl Module {
    /// Judges name, path and commit: paths are made of them.
    ///
    /// # Errors
    /// `forbidden` for a name or path that leads anywhere else.
    pub(crate) fn check(&self) -> Result<(), Failure> {
        check_path(&self.name).map_err(|why| refused("name", &self.name, why))?;
        check_path(&self.path).map_err(|why| refused("path", &self.path, why))?;
        if self.commit.len() != 40 || !self.commit.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(Failure::internal("a submodule's commit is not an object id"));
        }
        Ok(())
    }

    /// Its address, judged as text: one that begins with dots is relative to that of the repository it is in, whose host
    /// it never leaves.
    ///
    /// # Errors
    /// `invalid` for what is no address, `forbidden` for one that climbs too far or leads to a file of this machine.
    pub(crate) fn address(&self, parent: &GitUrl) -> Result<GitUrl, Failure> {
        let relative = self.url.split('/').next().is_some_and(|head| head == "." || head == "..");
        let url = if relative { GitUrl::parse(&climbed(parent, &self.url)?)? } else { GitUrl::parse(&self.url)? };
        if url.scheme() == Scheme::File && parent.scheme() != Scheme::File {
            return Err(Failure::forbidden("it leads from the network to a file of this machine"));
        }
        Ok(url)
    }
}

/// `text` taken relative to `parent`, as git does, but never past its host.
fn climbed(parent: &GitUrl, text: &str) -> Result<String, Failure> {
    let out = || Failure::forbidden("its relative address leads out of the upstream's host");
    let base = parent.as_str();
    let host = base.find("://").map_or(0, |at| at + 3);
    let (host, path) = base.split_at(base[host..].find('/').map_or(base.len(), |at| host + at));
    let mut parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    let mut climbing = true;
    for part in text.split('/') {
        match part {
            "" | "." => {}
            ".." if climbing => drop(parts.pop().ok_or_else(out)?),
            ".." => return Err(out()),
            part => {
                climbing = false;
                parts.push(part);
            }
        }
    }
    if climbing || parts.is_empty() {
        return Err(out());
    }
    Ok(format!("{host}/{}", parts.join("/")))
}

/// Whether two addresses are of one host, so that a credential for the one may be sent to the other.
pub(crate) fn same_host(a: &GitUrl, b: &GitUrl) -> bool {
    a.scheme() == b.scheme() && a.host() == b.host() && a.port() == b.port() && a.scheme() != Scheme::File
}

/// The submodules of a tree: what `.gitmodules` says about its `links`, which are paths and commits.
///
/// `other` tells whether something of the tree that is no directory stands at a path. Entries of paths that are not in
/// the tree are left alone, as git does.
///
/// # Errors
/// `forbidden` for a hostile name or path, `not_found` for a submodule without an address, `quota` for too many.
pub(super) fn wanted(
    text: &[u8],
    links: &BTreeMap<Vec<u8>, String>,
    other: impl Fn(&str) -> bool,
) -> Result<Vec<Module>, Failure> {
    if links.len() > MOST {
        return Err(too_many());
    }
    let entries = entries(text)?;
    if entries.len() > MOST {
        return Err(too_many());
    }
    let (mut modules, mut known) = (Vec::new(), HashSet::new());
    for (name, entry) in entries {
        check_path(&name).map_err(|why| refused("name", &name, why))?;
        let Some(path) = entry.path else { continue };
        check_path(&path).map_err(|why| refused("path", &path, why))?;
        let Some(commit) = links.get(path.as_bytes()) else {
            let ways = path.match_indices('/').map(|(at, _)| &path[..at]).chain([path.as_str()]);
            if ways.into_iter().any(|way| other(way) || links.contains_key(way.as_bytes())) {
                return Err(refused("path", &path, "is not that of a submodule in the tree"));
            }
            continue;
        };
        if !known.insert(path.clone()) {
            return Err(refused("path", &path, "is there twice"));
        }
        // `update = none` is how a project says that it does without.
        if entry.unwanted {
            continue;
        }
        let url = entry.url.ok_or_else(|| nameless(path.as_bytes()))?;
        modules.push(Module { name, path, url, commit: commit.clone() });
    }
    if let Some(path) = links.keys().find(|path| !known.contains(path.to_str_lossy().as_ref())) {
        return Err(nameless(path));
    }
    let within = |a: &Module, b: &Module| b.name.strip_prefix(&a.name).is_some_and(|rest| rest.starts_with('/'));
    for module in &modules {
        if modules.iter().any(|other| within(other, module)) {
            return Err(refused("name", &module.name, "lies within that of another"));
        }
    }
    Ok(modules)
}

/// What `.gitmodules` says of one submodule.
#[derive(Default)]
struct Entry {
    path: Option<String>,
    url: Option<String>,
    unwanted: bool,
}

fn entries(text: &[u8]) -> Result<BTreeMap<String, Entry>, Failure> {
    let unreadable = |why: &str| Failure::invalid(format!("the project's .gitmodules cannot be read: {why}"));
    let file = gix::config::File::try_from(BStr::new(text)).map_err(|_| unreadable("it is no configuration"))?;
    let plain = |value: gix::bstr::BString| String::from_utf8(value.into()).map_err(|_| unreadable("it is not text"));
    let mut entries = BTreeMap::<String, Entry>::new();
    for section in file.sections_by_name("submodule").into_iter().flatten() {
        let Some(name) = section.header().subsection_name().map(|name| plain(name.to_owned())).transpose()? else {
            continue;
        };
        let entry = entries.entry(name).or_default();
        if let Some(path) = section.value("path").map(plain).transpose()? {
            entry.path = Some(path);
        }
        if let Some(url) = section.value("url").map(plain).transpose()? {
            entry.url = Some(url);
        }
        if let Some(update) = section.value("update") {
            entry.unwanted = update == "none";
        }
    }
    Ok(entries)
}

/// Whether every component may be written, and none leads back, in or out.
fn check_path(path: &str) -> Result<(), &'static str> {
    if path.is_empty() || path.len() > LONGEST_NAME {
        return Err("is empty or too long");
    }
    if path.starts_with('-') {
        return Err("begins with a dash");
    }
    if path.chars().any(|c| c.is_control() || matches!(c, '\\' | '"')) || printable(path) != path {
        return Err("has a backslash, a quote or a control character");
    }
    path.split('/').try_for_each(|part| {
        // Trailing dots and spaces are nothing to some file systems.
        let bare = part.trim_end_matches(['.', ' ']);
        if bare.is_empty() { Err("leads elsewhere") } else { check_name(part.as_bytes(), EntryKind::Tree) }
    })
}

fn refused(what: &str, text: &str, why: &str) -> Failure {
    Failure::forbidden(format!("the project's .gitmodules has a {what} that {why}: {}", printable(text)))
}

fn nameless(path: &[u8]) -> Failure {
    let path = printable(&path.to_str_lossy());
    Failure::new(ErrorClass::NotFound, format!("the submodule at {path} has no address in .gitmodules"))
}

pub(crate) fn too_many() -> Failure {
    Failure::new(ErrorClass::Quota, format!("the project has more than {MOST} submodules"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(url: &str) -> Module {
        Module { name: "m".to_owned(), path: "m".to_owned(), url: url.to_owned(), commit: "1".repeat(40) }
    }

    fn read(text: &str, links: &[&str]) -> Result<Vec<Module>, Failure> {
        let links = links.iter().map(|path| (path.as_bytes().to_vec(), "1".repeat(40))).collect();
        wanted(text.as_bytes(), &links, |path| path == "link" || path == "file")
    }

    #[test]
    fn relative_addresses_are_those_of_git_and_stay_on_the_host() {
        for (parent, text, wanted) in [
            ("https://h.example/a/b.git", "../c.git", Some("https://h.example/a/c.git")),
            ("https://h.example/a/b.git/", "../c.git", Some("https://h.example/a/c.git")),
            ("https://h.example/a/b.git", "./c", Some("https://h.example/a/b.git/c")),
            ("https://h.example/a/b.git", "../../x/y", Some("https://h.example/x/y")),
            ("ssh://git@h.example:2222/a/b", "../c", Some("ssh://git@h.example:2222/a/c")),
            ("file:///srv/a/b.git", "../c.git", Some("file:///srv/a/c.git")),
            ("https://h.example/a", "../../evil.example/x", None),
            ("https://h.example/a/b", "../../../evil.example/x", None),
            ("https://h.example/a/b", "../x/../../../y", None),
            ("https://h.example/a/b", "..", None),
            ("https://h.example/a/b", "../-x", None),
            ("https://h.example/a/b", "../x?y", None),
            ("https://h.example/a/b", "../..", None),
        ] {
            let found = module(text).address(&GitUrl::parse(parent).unwrap());
            assert_eq!(found.as_ref().ok().map(GitUrl::as_str), wanted, "{parent} {text}: {found:?}");
        }
    }

    #[test]
    fn addresses_that_are_none_for_a_task_are_none_for_a_submodule() {
        let parent = GitUrl::parse("https://h.example/a").unwrap();
        for bad in [
            "ext::sh -c id",
            "file:///etc",
            "/srv/x",
            "-u",
            "--upload-pack=id",
            "git@h.example:x",
            "https://u:canary@h.example/x",
            "",
        ] {
            let failure = module(bad).address(&parent).unwrap_err();
            assert!(matches!(failure.class, ErrorClass::Invalid | ErrorClass::Forbidden), "{bad}: {failure}");
            assert!(!failure.message.contains("canary"));
        }
    }

    #[test]
    fn a_credential_is_for_one_scheme_host_and_port() {
        let url = |text| GitUrl::parse(text).unwrap();
        let a = url("https://h.example/a");
        assert!(same_host(&a, &url("https://H.example:443/b")));
        for other in ["https://x.h.example/a", "http://h.example/a", "https://h.example:8443/a", "ssh://h.example/a"] {
            assert!(!same_host(&a, &url(other)), "{other}");
        }
    }

    #[test]
    fn hostile_names_and_paths_are_refused() {
        for name in [
            "../../x",
            "..",
            ".git",
            "a/.git/b",
            "a/.GIT",
            "a/git~1",
            "a/.g\u{200c}it",
            "/a",
            "a//b",
            "a/",
            "a/. .",
            "-a",
            "a\\\\..\\\\b",
            ". ",
            "...",
        ] {
            let text = format!("[submodule \"{name}\"]\n\tpath = m\n\turl = https://h/x\n");
            assert_eq!(read(&text, &["m"]).unwrap_err().class, ErrorClass::Forbidden, "{name}");
        }
        for path in ["../m", ".git/modules", "/etc", "a/../b", "link/m", "link", "file/m", "m/inner", "-x"] {
            let text = format!("[submodule \"m\"]\n\tpath = {path}\n\turl = https://h/x\n");
            assert_eq!(read(&text, &["m"]).unwrap_err().class, ErrorClass::Forbidden, "{path}");
        }
    }

    #[test]
    fn two_submodules_never_share_a_directory() {
        let entry = |name: &str, path: &str| format!("[submodule \"{name}\"]\n\tpath = {path}\n\turl = https://h/x\n");
        let text = entry("a", "one") + &entry("a/modules/b", "two");
        assert!(read(&text, &["one", "two"]).unwrap_err().message.contains("within"));
        let text = entry("a", "one") + &entry("b", "one");
        assert!(read(&text, &["one"]).unwrap_err().message.contains("twice"));
        assert_eq!(read(&(entry("a", "one") + &entry("b", "two")), &["one", "two"]).unwrap().len(), 2);
    }

    #[test]
    fn what_the_tree_does_not_have_is_left_alone_and_what_it_has_needs_an_address() {
        let text =
            "[submodule \"gone\"]\n\tpath = gone\n\turl = ext::x\n[submodule \"none\"]\n\tpath = n\n\tupdate = none\n";
        assert_eq!(read(text, &["n"]).unwrap(), []);
        assert_eq!(read(text, &["n", "m"]).unwrap_err().class, ErrorClass::NotFound);
        assert_eq!(read("[submodule \"m\"]\n\tpath = m\n", &["m"]).unwrap_err().class, ErrorClass::NotFound);
        assert!(read("[submodule \"m\n", &["m"]).is_err());
    }

    #[test]
    fn too_many_are_a_matter_of_quota() {
        let paths: Vec<String> = (0..=MOST).map(|number| format!("m{number}")).collect();
        let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
        assert_eq!(read("", &paths).unwrap_err().class, ErrorClass::Quota);
    }

    #[test]
    fn both_ways_between_a_tree_and_its_git_directory_are_relative() {
        let place = Place::project().inner(&Module { name: "x/a".to_owned(), path: "libs/a".to_owned(), ..module("") });
        assert_eq!((place.tree.as_str(), place.git.as_str()), ("libs/a", ".git/modules/x/a"));
        assert_eq!((place.to_git(), place.to_tree()), ("../../.git/modules/x/a".into(), "../../../../libs/a".into()));
        let inner = place.inner(&module(""));
        assert_eq!((inner.tree.as_str(), inner.git.as_str()), ("libs/a/m", ".git/modules/x/a/modules/m"));
    }
}
