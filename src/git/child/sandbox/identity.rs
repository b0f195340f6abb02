//! As whom a child works, and with which powers: none but those of a plain user.

use std::io;

use rustix::{
    io::Errno,
    process::{DumpableBehavior, set_dumpable_behavior},
    thread::{
        CapabilitySet, CapabilitySets, capabilities, capability_is_in_bounding_set, clear_ambient_capability_set,
        remove_capability_from_bounding_set, set_capabilities, set_no_new_privs, set_thread_groups, set_thread_res_gid,
        set_thread_res_uid,
    },
};

use crate::protocol::Owner;

/// Becomes `owner`, if one is given, and gives up every capability.
///
/// A child on the network keeps the right to read files of others that the agent has: keys and certificates may be
/// somebody else's.
pub(super) fn assume(owner: Option<Owner>, reads_credentials: bool) -> io::Result<()> {
    let had = capabilities(None)?;
    let kept = if reads_credentials { had.permitted & CapabilitySet::DAC_READ_SEARCH } else { CapabilitySet::empty() };
    if had.effective.contains(CapabilitySet::SETPCAP) {
        narrow_bounding_set(kept)?;
    }
    if had.effective.contains(CapabilitySet::SETGID) {
        match set_thread_groups(&[]) {
            // In a user name space made without a list of groups nobody can leave theirs: the child keeps the agent's, as
            // it keeps its user. As another user it must not.
            Err(Errno::PERM) if owner.is_none() && groups_are_frozen() => {}
            left => left?,
        }
    }
    if let Some(Owner { uid, gid }) = owner {
        let (uid, gid) = (rustix::process::Uid::from_raw(uid), rustix::process::Gid::from_raw(gid));
        set_thread_res_gid(gid, gid, gid)?;
        set_thread_res_uid(uid, uid, uid)?;
    }
    match clear_ambient_capability_set() {
        // Kernels before 4.3 have none.
        Ok(()) | Err(Errno::INVAL) => {}
        Err(error) => return Err(error.into()),
    }
    let kept = if owner.is_some() { CapabilitySet::empty() } else { kept };
    set_capabilities(None, CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() })?;
    set_no_new_privs(true)?;
    // No other process of the same user traces this one, reads its memory or takes its descriptors.
    Ok(set_dumpable_behavior(DumpableBehavior::NotDumpable)?)
}

/// Whether the user name space that this process is in forbids to change groups.
fn groups_are_frozen() -> bool {
    std::fs::read_to_string("/proc/self/setgroups").is_ok_and(|word| word.trim() == "deny")
}

/// Whatever is executed later never has more than `kept`.
fn narrow_bounding_set(kept: CapabilitySet) -> io::Result<()> {
    for number in 0..u64::BITS {
        let one = CapabilitySet::from_bits_retain(1 << number);
        match capability_is_in_bounding_set(one) {
            Ok(true) if !kept.contains(one) => remove_capability_from_bounding_set(one)?,
            Ok(_) => {}
            // Beyond the last one that the kernel knows.
            Err(Errno::INVAL) => break,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
