//! The transfer role: the network, one credential, one mirror.

use std::process::ExitCode;

use super::child::serve;
use crate::failure::Failure;

/// `haul child transfer`.
pub(super) fn main() -> ExitCode {
    serve(|(): (), _| -> Result<(), Failure> { Err(Failure::internal("transfers are not built in yet")) })
}
