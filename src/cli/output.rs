//! Printing: data to the standard output, one line at a time; sentences for people to the standard error stream.

use std::io::{ErrorKind, Write};

use serde::Serialize;

use super::error::CliError;
use crate::protocol::printable;

/// Prints a line of data. Who reads it may have left: then the rest is not wanted, and the process ends well.
pub(super) fn line(text: &str) -> Result<(), CliError> {
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
        done => done.map_err(|source| CliError::Output { what: "to the standard output".to_owned(), source }),
    }
}

/// Prints a value as one line of JSON.
pub(super) fn json<T: Serialize>(value: &T) -> Result<(), CliError> {
    let text = serde_json::to_string(value)
        .map_err(|error| CliError::Output { what: "as JSON".to_owned(), source: std::io::Error::other(error) })?;
    line(&text)
}

/// Prints a sentence for people; controls that came from elsewhere are taken out.
pub(super) fn note(text: &str) {
    // Nobody can be told that the standard error stream is gone.
    let _ = writeln!(std::io::stderr(), "{}", printable(text));
}

/// Prints what went wrong.
pub(super) fn complain(text: &str) {
    note(&format!("haul: {text}"));
}
