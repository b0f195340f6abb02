//! The workspace role: one project, nothing else.

use std::process::ExitCode;

use super::child::serve;
use crate::failure::Failure;

/// `haul child workspace`.
pub(super) fn main() -> ExitCode {
    serve(|(): (), _| -> Result<(), Failure> { Err(Failure::internal("this build has no workspace role")) })
}
