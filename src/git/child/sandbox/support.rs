//! What the kernel of this node can do for a child, and what the agent is allowed to.

use std::path::Path;

use landlock::{ABI, Access as _, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, Scope};
use rustix::{
    process::{getgid, getuid},
    thread::{CapabilitySet, capabilities},
};

use super::Sandbox;
use crate::{failure::Failure, git::settings::GitSettings, protocol::Owner};

/// The least version of Landlock: before, nothing could be renamed between directories.
const LEAST_ABI: u8 = 2;
/// What the agent needs for projects of other users, and what for.
const NEEDED: [(CapabilitySet, &str); 5] = [
    (CapabilitySet::SETUID, "CAP_SETUID"),
    (CapabilitySet::SETGID, "CAP_SETGID"),
    (CapabilitySet::CHOWN, "CAP_CHOWN"),
    (CapabilitySet::DAC_OVERRIDE, "CAP_DAC_OVERRIDE"),
    (CapabilitySet::KILL, "CAP_KILL"),
];

/// What there is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Support {
    /// The version of Landlock, as far as this program knows them; 0 for none.
    pub landlock: u8,
    /// Whether the kernel filters system calls.
    pub seccomp: bool,
    /// The capabilities that projects of other users need and the agent lacks.
    pub missing: Vec<&'static str>,
    /// The agent's own user and group.
    pub own: Owner,
}

impl Support {
    /// Asks the kernel.
    #[must_use]
    pub fn of_this_node() -> Self {
        let effective = capabilities(None).map_or(CapabilitySet::empty(), |sets| sets.effective);
        Self {
            landlock: landlock_version(),
            seccomp: seccomp(),
            missing: NEEDED.iter().filter(|(one, _)| !effective.contains(*one)).map(|&(_, name)| name).collect(),
            own: Owner { uid: getuid().as_raw(), gid: getgid().as_raw() },
        }
    }

    /// What the sandbox lacks, in words; `None` where it can be built.
    #[must_use]
    pub fn lacks(&self) -> Option<String> {
        let landlock = match self.landlock {
            LEAST_ABI.. => None,
            0 => Some("Landlock is not available (kernel 5.19 or later with landlock among its lsm= is needed)".into()),
            old => Some(format!("Landlock has version {old}, and {LEAST_ABI} is needed (kernel 5.19 or later)")),
        };
        let seccomp = (!self.seccomp).then(|| "the kernel has no seccomp filters".to_owned());
        landlock.into_iter().chain(seccomp).reduce(|all, one| format!("{all}, and {one}"))
    }

    /// Says at start what is weaker than it could be.
    pub fn warn(&self, settings: &GitSettings) {
        if let Some(lacks) = self.lacks().filter(|_| settings.sandbox == Sandbox::Prefer) {
            tracing::warn!(reason = lacks, "children are not shut in as they should be");
        }
        if settings.sandbox == Sandbox::Off {
            tracing::warn!("children are not shut in: git.sandbox is off");
        }
        if self.own.uid == 0 && settings.run_as.is_none() {
            tracing::warn!(
                "the agent runs as root, and so does its work in projects whose task names no owner: set git.run_as"
            );
        }
    }

    /// Refuses settings that cannot be kept on this node.
    ///
    /// # Errors
    /// `forbidden`, with what is missing.
    pub fn allow(&self, settings: &GitSettings) -> Result<(), Failure> {
        if settings.sandbox == Sandbox::Require
            && let Some(lacks) = self.lacks()
        {
            return Err(Failure::forbidden(format!(
                "children cannot be shut in: {lacks}; set git.sandbox = \"prefer\" to work without"
            )));
        }
        if settings.has_other_owners(self.own) && !self.missing.is_empty() {
            return Err(Failure::forbidden(format!(
                "git.run_as and git.owners need capabilities that the agent lacks: {}",
                self.missing.join(", ")
            )));
        }
        Ok(())
    }
}

fn landlock_version() -> u8 {
    let strict = || Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
    let files = |abi| strict().handle_access(AccessFs::from_all(abi)).and_then(Ruleset::create).is_ok();
    let network = || strict().handle_access(AccessNet::BindTcp).and_then(Ruleset::create).is_ok();
    let scope = || strict().scope(Scope::Signal).and_then(Ruleset::create).is_ok();
    let steps: [&dyn Fn() -> bool; 6] =
        [&|| files(ABI::V1), &|| files(ABI::V2), &|| files(ABI::V3), &network, &|| files(ABI::V5), &scope];
    u8::try_from(steps.iter().take_while(|step| step()).count()).unwrap_or(0)
}

fn seccomp() -> bool {
    // It came with the filters' actions, and is not there without filters.
    Path::new("/proc/sys/kernel/seccomp/actions_avail").exists()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::ErrorClass;

    fn support() -> Support {
        Support { landlock: 2, seccomp: true, missing: Vec::new(), own: Owner { uid: 1, gid: 1 } }
    }

    #[test]
    fn a_kernel_without_the_means_is_refused_only_where_they_are_required() {
        let old = Support { landlock: 1, seccomp: false, ..support() };
        let failure = old.allow(&GitSettings::default()).unwrap_err();
        assert_eq!(failure.class, ErrorClass::Forbidden);
        for word in ["version 1", "seccomp", "git.sandbox"] {
            assert!(failure.message.contains(word), "{failure}");
        }
        for sandbox in [Sandbox::Prefer, Sandbox::Off] {
            old.allow(&GitSettings { sandbox, ..GitSettings::default() }).unwrap();
        }
        support().allow(&GitSettings::default()).unwrap();
    }

    #[test]
    fn other_owners_without_the_capabilities_are_refused_by_name() {
        let poor = Support { missing: vec!["CAP_CHOWN", "CAP_KILL"], ..support() };
        let settings = GitSettings { run_as: Some(Owner { uid: 2, gid: 2 }), ..GitSettings::default() };
        let failure = poor.allow(&settings).unwrap_err();
        assert!(failure.message.contains("CAP_CHOWN, CAP_KILL"), "{failure}");
        support().allow(&settings).unwrap();
        // Its own user is no other.
        poor.allow(&GitSettings { run_as: Some(poor.own), ..GitSettings::default() }).unwrap();
        poor.allow(&GitSettings::default()).unwrap();
    }
}
