//! What one child may use up.
//!
//! Not its address space, since packs are mapped whole, and not the number of processes, which counts those of the
//! project's owner.

use std::io;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::Confinement;

/// Enough for a mirror of many packs.
const DESCRIPTORS: u64 = 4096;

pub(super) fn set(confinement: &Confinement) -> io::Result<()> {
    for (resource, most) in [
        (Resource::Core, 0),
        (Resource::Data, confinement.memory),
        (Resource::Fsize, confinement.longest_file),
        (Resource::Nofile, DESCRIPTORS),
    ] {
        // Nobody raises what was set for the agent.
        let most = getrlimit(resource).maximum.map_or(most, |now| now.min(most));
        setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) })?;
    }
    Ok(())
}
