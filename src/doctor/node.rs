//! The health of this node: what its kernel, its disk and the agent's rights can do for the work.

use std::{
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
};

use rustix::fs::{Mode, OFlags, ResolveFlags, ioctl_ficlone, openat2};
use serde::Serialize;

use super::{Finding, Severity};
use crate::git::{
    GitSettings,
    child::{Sandbox, Support},
    owner::barred,
};

/// What there is on this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NodeFacts {
    /// The version of Landlock; 0 for none.
    pub landlock: u8,
    /// Whether system calls can be filtered.
    pub seccomp: bool,
    /// The capabilities that projects of other users need and this user lacks.
    pub missing_capabilities: Vec<&'static str>,
    /// The user who asked.
    pub uid: u32,
    /// Whether names can be opened beneath a directory without following links.
    pub openat2: bool,
    /// Whether files of the projects directory can share their content; `None` where it could not be tried.
    pub clones_files: Option<bool>,
    /// The directory that keeps owners away from their projects.
    pub barred: Option<PathBuf>,
    /// What the sandbox lacks, in words.
    #[serde(skip)]
    support: Support,
}

impl NodeFacts {
    /// Asks the kernel, and tries the disk with two small files that are removed again.
    #[must_use]
    pub fn look(projects: &Path) -> Self {
        let support = Support::of_this_node();
        let beneath =
            openat2(rustix::fs::CWD, ".", OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::BENEATH);
        Self {
            landlock: support.landlock,
            seccomp: support.seccomp,
            missing_capabilities: support.missing.clone(),
            uid: support.own.uid,
            openat2: beneath.err() != Some(rustix::io::Errno::NOSYS),
            clones_files: clones_files(projects),
            barred: barred(projects),
            support,
        }
    }
}

/// What is not as it should be for `settings`.
#[must_use]
pub fn examine_node(facts: &NodeFacts, settings: &GitSettings) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut find = |severity, subject: &str, problem: String, mend: &str| {
        let (subject, mend) = (subject.to_owned(), mend.to_owned());
        findings.push(Finding { severity, subject, problem, mend, lagging: false });
    };
    if let Some(lacks) = facts.support.lacks() {
        let (severity, mend) = match settings.sandbox {
            Sandbox::Require => (Severity::Red, "boot a kernel that has it, or set git.sandbox = \"prefer\""),
            Sandbox::Prefer | Sandbox::Off => (Severity::Yellow, "boot a kernel that has it"),
        };
        find(severity, "sandbox", lacks, mend);
    }
    if settings.sandbox == Sandbox::Off {
        find(Severity::Yellow, "sandbox", "git.sandbox is off".to_owned(), "set git.sandbox = \"require\"");
    }
    if !facts.openat2 {
        find(Severity::Red, "kernel", "openat2 is missing".to_owned(), "boot kernel 5.6 or later, or allow the call");
    }
    let others = settings.has_other_owners(facts.support.own);
    if others && !facts.missing_capabilities.is_empty() {
        let missing = facts.missing_capabilities.join(", ");
        find(
            Severity::Red,
            "git.run_as",
            format!("the user {} lacks {missing}", facts.uid),
            "run the agent, and this command, with them: see deploy/haul-worker.service",
        );
    }
    if let Some(barred) = facts.barred.as_ref().filter(|_| others) {
        let problem = format!("owners cannot pass {} on the way to their projects", barred.display());
        find(Severity::Red, "git.run_as", problem, &format!("chmod o+x {}", barred.display()));
    }
    if facts.uid == 0 && settings.run_as.is_none() {
        find(
            Severity::Yellow,
            "git.run_as",
            "work in projects is done as root".to_owned(),
            "set git.run_as, or run the agent as a user of its own",
        );
    }
    if facts.clones_files == Some(false) {
        find(
            Severity::Info,
            "disk",
            "files of the projects directory cannot share their content: every clone is a copy".to_owned(),
            "use XFS or Btrfs, with mirrors and projects on one file system",
        );
    }
    findings
}

/// Tries it in the nearest directory that is there already.
fn clones_files(projects: &Path) -> Option<bool> {
    let place = projects.ancestors().find(|path| path.is_dir())?;
    let name = |end: &str| place.join(format!(".haul-doctor-{}-{end}", std::process::id()));
    let (from, to) = (name("a"), name("b"));
    let tried = (|| {
        let mut source = File::options().write(true).read(true).create_new(true).open(&from)?;
        source.write_all(&[0; 4096])?;
        let target = File::options().write(true).create_new(true).open(&to)?;
        std::io::Result::Ok(ioctl_ficlone(&target, &source).is_ok())
    })();
    let _ = fs::remove_file(from);
    let _ = fs::remove_file(to);
    tried.ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::Owner;

    fn facts(support: Support) -> NodeFacts {
        NodeFacts {
            landlock: support.landlock,
            seccomp: support.seccomp,
            missing_capabilities: support.missing.clone(),
            uid: support.own.uid,
            openat2: true,
            clones_files: Some(true),
            barred: None,
            support,
        }
    }

    fn good() -> Support {
        Support { landlock: 6, seccomp: true, missing: Vec::new(), own: Owner { uid: 1000, gid: 1000 } }
    }

    fn worst(facts: &NodeFacts, settings: &GitSettings) -> Option<Severity> {
        examine_node(facts, settings).into_iter().map(|finding| finding.severity).max()
    }

    #[test]
    fn a_node_that_can_everything_has_nothing_to_mend() {
        assert_eq!(worst(&facts(good()), &GitSettings::default()), None);
    }

    #[test]
    fn what_an_agent_would_not_start_with_is_red() {
        let settings = GitSettings::default();
        let no_landlock = facts(Support { landlock: 0, ..good() });
        assert_eq!(worst(&no_landlock, &settings), Some(Severity::Red));
        let prefer = GitSettings { sandbox: Sandbox::Prefer, ..GitSettings::default() };
        assert_eq!(worst(&no_landlock, &prefer), Some(Severity::Yellow));
        let run_as = GitSettings { run_as: Some(Owner { uid: 5, gid: 5 }), ..GitSettings::default() };
        let poor = facts(Support { missing: vec!["CAP_SETUID"], ..good() });
        assert_eq!(worst(&poor, &run_as), Some(Severity::Red));
        assert_eq!(worst(&poor, &settings), None);
        let barred = NodeFacts { barred: Some("/data".into()), ..facts(good()) };
        assert_eq!(worst(&barred, &run_as), Some(Severity::Red));
    }
}
