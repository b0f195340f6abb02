//! Landlock: the paths that a child may use, and nothing else of the file system.

use std::{io, os::fd::OwnedFd, path::Path, path::PathBuf};

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, PathFdError,
    Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope, make_bitflags,
};

use super::{Access, descriptors};

/// The newest version whose rights were looked at one by one; of older kernels as much is used as they have.
const NEWEST: ABI = ABI::V6;

/// What names, addresses and certificates are looked up in.
const NETWORK: &[&str] = &[
    "/etc/resolv.conf",
    "/etc/hosts",
    "/etc/host.conf",
    "/etc/nsswitch.conf",
    "/etc/gai.conf",
    "/etc/services",
    "/etc/protocols",
    "/etc/ld.so.cache",
    "/etc/localtime",
    // Certificates of the system, by the distributions' names for them.
    "/etc/ssl",
    "/etc/pki",
    "/etc/ca-certificates",
    "/etc/openssl",
    "/etc/certs",
    "/usr/lib/ssl",
    "/usr/share/ssl",
    "/usr/share/pki",
    "/usr/share/ca-certificates",
    "/usr/local/share/ca-certificates",
    // Modules that look names up.
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/dev/urandom",
    "/dev/random",
];
/// What programs of the system consist of.
const PROGRAMS: &[&str] = &["/bin", "/sbin", "/usr", "/lib", "/lib64", "/opt"];
/// What they read besides.
const PROGRAM_FILES: &[&str] = &[
    "/etc/passwd",
    "/etc/group",
    "/etc/gitconfig",
    "/etc/alternatives",
    "/etc/crypto-policies",
    "/etc/ld.so.cache",
    "/etc/ld.so.preload",
    "/etc/localtime",
    // Git names its temporary files by chance.
    "/dev/urandom",
    "/dev/random",
];
/// What everything may be written to and nothing read from.
const NOWHERE: &str = "/dev/null";
/// What tells how long this process has computed.
const SCHEDSTAT: &str = "/proc/self/schedstat";
/// In which control group this process is: on how many processors it may run.
const CGROUP: &str = "/proc/self/cgroup";

/// Rules that are made but not yet in force.
pub(super) struct Paths(RulesetCreated);

impl Paths {
    /// Opens everything that `access` names.
    pub(super) fn new(access: &Access, required: bool) -> io::Result<Self> {
        let mut rules = Ruleset::default();
        if required {
            // Renaming between directories came with the version that is needed.
            rules = rules
                .set_compatibility(CompatLevel::HardRequirement)
                .handle_access(AccessFs::from_all(ABI::V2))
                .map_err(error)?
                .set_compatibility(CompatLevel::BestEffort);
        }
        let rules = rules
            .handle_access(AccessFs::from_all(NEWEST))
            .and_then(|rules| rules.handle_access(network(access)))
            .and_then(|rules| rules.scope(Scope::from_all(NEWEST)))
            .and_then(Ruleset::create)
            .map_err(error)?;
        let mut paths = Self(rules);
        let (read, work) = (make_bitflags!(AccessFs::{ReadFile | ReadDir}), work());
        for path in &access.reads {
            paths = paths.with(path, read, true)?;
        }
        for path in &access.writes {
            // Nothing in a mirror is a link.
            paths = paths.with(path, work & !BitFlags::from(AccessFs::MakeSym), false)?;
        }
        if let Some(number) = access.directory {
            let own = descriptors::borrow(number, OwnedFd::try_clone);
            let own = own.ok_or_else(|| io::Error::other("the directory was not inherited"))??;
            paths.0 = paths.0.add_rule(PathBeneath::new(own, work)).map_err(error)?;
        }
        let mut system: Vec<PathBuf> = vec![SCHEDSTAT.into(), CGROUP.into()];
        system.extend(processor_limits());
        if access.network {
            system.extend(NETWORK.iter().map(PathBuf::from));
        }
        if access.programs {
            system.extend(PROGRAM_FILES.iter().map(PathBuf::from));
            for path in PROGRAMS {
                paths = paths.with(Path::new(path), read | AccessFs::Execute, true)?;
            }
        }
        for path in &system {
            paths = paths.with(path, read, true)?;
        }
        paths.with(Path::new(NOWHERE), read | AccessFs::WriteFile, true)
    }

    /// Lets `path` and what is beneath it be used.
    fn with(mut self, path: &Path, rights: BitFlags<AccessFs>, may_be_absent: bool) -> io::Result<Self> {
        let fd = match PathFd::new(path) {
            Ok(fd) => fd,
            // One that cannot be reached now cannot be reached later either.
            Err(PathFdError::OpenCall { .. }) if may_be_absent => return Ok(self),
            Err(PathFdError::OpenCall { source, .. }) => return Err(source),
            Err(other) => return Err(error(other)),
        };
        // A right to directories makes no sense on a file.
        let file = !rustix::fs::fstat(&fd)
            .is_ok_and(|stat| rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::Directory);
        let rights = if file { rights & AccessFs::from_file(NEWEST) } else { rights };
        self.0 = self.0.add_rule(PathBeneath::new(fd, rights)).map_err(error)?;
        Ok(self)
    }

    /// Puts the rules in force.
    pub(super) fn restrict(self, required: bool) -> io::Result<()> {
        let status = self.0.restrict_self().map_err(error)?;
        if required && status.ruleset == RulesetStatus::NotEnforced {
            return Err(io::Error::other("the kernel does not enforce it"));
        }
        Ok(())
    }
}

/// What may be done in a directory that is the child's to work in.
fn work() -> BitFlags<AccessFs> {
    make_bitflags!(AccessFs::{
        ReadFile | ReadDir | WriteFile | Truncate | RemoveFile | RemoveDir | MakeReg | MakeDir | MakeSym | Refer
    })
}

/// What of TCP is forbidden where the kernel can: seccomp forbids the rest of it.
fn network(access: &Access) -> BitFlags<AccessNet> {
    if access.network { AccessNet::BindTcp.into() } else { AccessNet::from_all(NEWEST) }
}

/// Where a container's share of the processors stands: the standard library asks for it before it starts threads.
fn processor_limits() -> Vec<PathBuf> {
    let own = std::fs::read_to_string(CGROUP).unwrap_or_default();
    let group = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    let group = Path::new("/sys/fs/cgroup").join(group);
    group
        .ancestors()
        .take_while(|group| group.starts_with("/sys/fs/cgroup"))
        .map(|group| group.join("cpu.max"))
        .collect()
}

fn error(error: impl Into<RulesetOrPath>) -> io::Error {
    io::Error::other(error.into().0)
}

/// Either of the library's errors, in words.
struct RulesetOrPath(String);

impl From<RulesetError> for RulesetOrPath {
    fn from(error: RulesetError) -> Self {
        Self(error.to_string())
    }
}

impl From<PathFdError> for RulesetOrPath {
    fn from(error: PathFdError) -> Self {
        Self(error.to_string())
    }
}
