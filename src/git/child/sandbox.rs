//! How a child shuts itself in, after it read its request and before it does anything about it.
//!
//! | what | against |
//! |---|---|
//! | descriptors | anything of the agent's that was left open |
//! | limits | memory, huge files, descriptors without end, core dumps |
//! | user, groups, capabilities | what the agent may and the owner of a project may not |
//! | not dumpable | being traced or read by other processes of the same user |
//! | Landlock | every path but those that the request names |
//! | seccomp | the network, other programs, other processes, and what only an attack calls |
//!
//! The first four hold always. The last two need a kernel that has them; `git.sandbox` says what becomes of a child on
//! one that has not. All of it is done on the first thread while there is no other: threads inherit it.

mod calls;
mod descriptors;
mod identity;
mod limits;
mod paths;
mod support;

use std::{os::fd::RawFd, path::PathBuf};

use serde::{Deserialize, Serialize};

pub use self::{descriptors::inherited, support::Support};
use crate::{failure::Failure, git::settings::GitSettings, protocol::Owner};

/// Whether children shut themselves in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sandbox {
    /// A child that cannot does nothing.
    #[default]
    Require,
    /// As far as the kernel can.
    Prefer,
    /// Neither Landlock nor seccomp.
    Off,
}

/// Everything that a child needs for its request; whatever is not named here is out of its reach.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// Files and directories that it reads; one that is not there is passed over.
    pub reads: Vec<PathBuf>,
    /// Directories in which it may read and write files.
    pub writes: Vec<PathBuf>,
    /// The inherited descriptor of a directory in which it may also make symbolic links.
    pub directory: Option<RawFd>,
    /// Other inherited descriptors.
    pub descriptors: Vec<RawFd>,
    /// Whether it may talk to the network, and read what names and certificates are looked up in.
    pub network: bool,
    /// Whether it may run the programs of the system.
    pub programs: bool,
    /// Whether it works as the owner of the project.
    pub as_owner: bool,
}

/// A request that says what its child needs.
pub trait Confined {
    /// What that is.
    fn access(&self) -> Access;
}

/// What the agent decides about the children of one project.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confinement {
    /// Whether they shut themselves in.
    pub sandbox: Sandbox,
    /// As whom workspace children work; the agent's own user if not set.
    pub owner: Option<Owner>,
    /// The most memory of its own that one may take, in bytes.
    pub memory: u64,
    /// The longest file that one may write, in bytes.
    pub longest_file: u64,
}

/// Room for what is written beside the content itself: indices, and a pack around objects that do not compress.
const FILE_SLACK: u64 = 1 << 30;

impl From<&GitSettings> for Confinement {
    fn from(settings: &GitSettings) -> Self {
        Self {
            sandbox: settings.sandbox,
            owner: None,
            memory: settings.child_memory.as_u64(),
            longest_file: settings.max_bytes.as_u64().saturating_add(FILE_SLACK),
        }
    }
}

impl Default for Confinement {
    fn default() -> Self {
        Self::from(&GitSettings::default())
    }
}

/// Shuts this process in, for good. To be called while it has one thread.
///
/// # Errors
/// `internal` where something could not be done that must be.
pub fn confine(access: &Access, confinement: &Confinement) -> Result<(), Failure> {
    let failed = |what: &str, error: &dyn std::fmt::Display| {
        Failure::internal(format!("a child cannot shut itself in: {what}: {error}"))
    };
    let named = access.directory.iter().chain(&access.descriptors).copied();
    descriptors::adopt(&named.collect::<Vec<_>>()).map_err(|error| failed("descriptors", &error))?;
    limits::set(confinement).map_err(|error| failed("limits", &error))?;
    let required = confinement.sandbox == Sandbox::Require;
    // While every path can still be opened: the owner of a project cannot enter the directories above a mirror.
    let paths = match confinement.sandbox {
        Sandbox::Off => None,
        Sandbox::Require | Sandbox::Prefer => {
            Some(paths::Paths::new(access, required).map_err(|error| failed("Landlock", &error))?)
        }
    };
    let owner = confinement.owner.filter(|_| access.as_owner);
    identity::assume(owner, access.network).map_err(|error| failed("user and capabilities", &error))?;
    if let Some(paths) = paths {
        paths.restrict(required).map_err(|error| failed("Landlock", &error))?;
        match calls::filter(access) {
            Err(error) if required => return Err(failed("seccomp", &error)),
            Err(_) | Ok(()) => {}
        }
    }
    Ok(())
}
