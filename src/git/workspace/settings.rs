//! The few settings of a project that work in it needs, apart from the file that its user can change at any moment.
//!
//! The library asks for its settings again and again, and some lead it to other files (`core.attributesFile`,
//! `core.excludesFile`). What it is given instead is a copy in memory of those that say how files look.

use std::{
    fmt::Write as _,
    fs::File,
    io::Write as _,
    os::fd::{AsRawFd, IntoRawFd},
    path::PathBuf,
};

use git2::{Config, Repository};
use rustix::fs::{MemfdFlags, memfd_create};

use super::open::fault;
use crate::failure::Failure;

/// What counts, by section; the rest could only lead elsewhere, or is for programs that are not run.
const KNOWN: [(&str, &[&str]); 4] = [
    (
        "core",
        &[
            "repositoryformatversion",
            "filemode",
            "bare",
            "logallrefupdates",
            "ignorecase",
            "symlinks",
            "precomposeunicode",
            "autocrlf",
            "eol",
            "trustctime",
            "checkstat",
        ],
    ),
    ("branch", &["remote", "merge"]),
    ("remote", &["url", "fetch"]),
    ("user", &["name", "email"]),
];

/// Lets `repo` know nothing but the harmless settings of `config`.
///
/// # Errors
/// `conflict` where they cannot be read.
pub(super) fn narrow(repo: &Repository, config: &Config) -> Result<(), Failure> {
    let unreadable = |error: git2::Error| fault("its settings cannot be read", &error);
    let mut text = String::new();
    let mut entries = config.entries(None).map_err(unreadable)?;
    while let Some(entry) = entries.next() {
        let entry = entry.map_err(unreadable)?;
        // A name without a value means yes; the library panics when it is asked for one.
        let value = if entry.has_value() { entry.value() } else { Ok("true") };
        if let (Ok(name), Ok(value)) = (entry.name(), value) {
            add(&mut text, name, value);
        }
    }
    let memory = memfd_create("settings", MemfdFlags::CLOEXEC).map_err(std::io::Error::from)?;
    let mut memory = File::from(memory);
    memory.write_all(text.as_bytes())?;
    let path = PathBuf::from(format!("/proc/self/fd/{}", memory.as_raw_fd()));
    Config::open(&path).and_then(|narrow| repo.set_config(&narrow)).map_err(unreadable)?;
    // The library opens it again whenever it asks; the process is one task long.
    let _ = memory.into_raw_fd();
    Ok(())
}

/// Writes one setting, if it is a known one, as a configuration file has it.
fn add(text: &mut String, name: &str, value: &str) {
    let (Some((section, rest)), Some((_, key))) = (name.split_once('.'), name.rsplit_once('.')) else { return };
    let subsection = rest.strip_suffix(key).and_then(|rest| rest.strip_suffix('.'));
    let known = KNOWN.iter().any(|(name, keys)| *name == section && keys.contains(&key));
    if !known || name.chars().chain(value.chars()).any(char::is_control) {
        return;
    }
    let escaped = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"");
    let _ = match subsection {
        Some(subsection) => writeln!(text, "[{section} \"{}\"]", escaped(subsection)),
        None => writeln!(text, "[{section}]"),
    };
    let _ = writeln!(text, "\t{key} = \"{}\"", escaped(value));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_lead_elsewhere_are_left_out() {
        let place = tempfile::tempdir().unwrap();
        let repo = Repository::init(place.path()).unwrap();
        let git = place.path().join(".git/config");
        let more = "[core]\n\tattributesFile = /a\n\texcludesFile = /b\n\tfsmonitor = /c\n\tautocrlf = true\n\
                    logallrefupdates\n[filter \"x\"]\n\tclean = /d\n[branch \"a \\\"b\\\\\"]\n\tremote = origin\n\
                    [remote \"origin\"]\n\turl = \"u;\\\"v\"\n\tfetch = +a:b\n\tfetch = +c:d\n\tuploadpack = /e\n";
        std::fs::write(&git, std::fs::read_to_string(&git).unwrap() + more).unwrap();
        narrow(&repo, &repo.config().unwrap().snapshot().unwrap()).unwrap();
        // What is written there later counts no more.
        std::fs::write(&git, "[core]\n\tattributesFile = /late\n").unwrap();
        let config = repo.config().unwrap().snapshot().unwrap();
        for gone in ["core.attributesfile", "core.excludesfile", "core.fsmonitor", "filter.x.clean"] {
            assert!(config.get_string(gone).is_err(), "{gone}");
        }
        assert!(config.get_string("remote.origin.uploadpack").is_err());
        assert_eq!(config.get_string("branch.a \"b\\.remote").unwrap(), "origin");
        assert_eq!(config.get_string("remote.origin.url").unwrap(), "u;\"v");
        assert!(config.get_bool("core.autocrlf").unwrap() && config.get_bool("core.logallrefupdates").unwrap());
        let mut fetch = config.multivar("remote.origin.fetch", None).unwrap();
        let mut count = 0;
        while fetch.next().is_some() {
            count += 1;
        }
        assert_eq!(count, 2);
    }
}
