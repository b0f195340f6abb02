//! The pack role: reads one mirror and streams what is asked for into a pipe.

use std::{os::fd::OwnedFd, path::Path, process::ExitCode};

use serde::{Deserialize, Serialize};

use super::{
    Run,
    child::{Children, serve},
};
use crate::failure::Failure;

/// What was streamed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Packed {
    /// Objects in the pack.
    pub objects: u64,
    /// Bytes of the pack.
    pub bytes: u64,
}

/// Streams a pack of everything reachable from `wants` and not from `haves` out of `mirror` into `into`.
///
/// A have that the mirror does not know is ignored. The pack is self-contained but for objects of the haves.
///
/// # Errors
/// `not_found` for a want that the mirror lacks; otherwise as [`Children::run`].
pub async fn stream(
    children: &Children,
    mirror: &Path,
    wants: &[String],
    haves: &[String],
    into: OwnedFd,
    run: &Run<'_>,
) -> Result<Packed, Failure> {
    let _ = (children, mirror, wants, haves, into, run);
    Err(Failure::internal("packs are not built in yet"))
}

/// `haul child pack`.
pub(super) fn main() -> ExitCode {
    serve(|(): (), _| -> Result<(), Failure> { Err(Failure::internal("packs are not built in yet")) })
}
