//! The lines that a child and the agent exchange, and how they are read with a limit.

use std::io;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::io::{AsyncBufRead, AsyncBufReadExt};

use super::sandbox::Confinement;
use crate::{
    failure::Failure,
    protocol::{Progress, printable},
};

/// The longest sentence taken from a child, in characters.
const LONGEST_MESSAGE: usize = 2000;
/// The longest name of a phase taken from a child, in characters.
const LONGEST_PHASE: usize = 32;

/// The first line to a child.
#[derive(Serialize, Deserialize)]
pub(super) struct Envelope<Q> {
    /// Process id of the agent; the child ends at once if that is no longer its parent.
    pub(super) parent: u32,
    /// How it shuts itself in; as by default where nothing is said.
    #[serde(default)]
    pub(super) confinement: Confinement,
    /// What it shall do.
    pub(super) request: Q,
}

/// One line from a child.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Line<A = Value> {
    /// How far it is.
    Progress(Progress),
    /// It is alive and working.
    Step,
    /// It waits for a line that is a `Result<Value, Failure>`.
    Ask(Value),
    /// The last line of one that succeeded.
    Done(A),
    /// The last line of one that failed.
    Failed(Failure),
}

/// `value` as one line.
pub(super) fn encode<T: Serialize>(value: &T) -> serde_json::Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec(value)?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// The next line of `from`, refused if longer than `longest` bytes; `None` at the end.
///
/// # Errors
/// When reading fails, or the line is too long or not one of the protocol.
pub(super) async fn read(from: &mut (impl AsyncBufRead + Unpin), longest: usize) -> io::Result<Option<Line>> {
    let mut line = Vec::new();
    loop {
        let chunk = from.fill_buf().await?;
        if chunk.is_empty() {
            return if line.is_empty() { Ok(None) } else { Err(invalid("its last line is not whole")) };
        }
        let (used, whole) = match chunk.iter().position(|&byte| byte == b'\n') {
            Some(end) => (end + 1, true),
            None => (chunk.len(), false),
        };
        if line.len() + used > longest {
            return Err(invalid("a line is too long"));
        }
        line.extend_from_slice(&chunk[..used]);
        from.consume(used);
        if whole {
            return serde_json::from_slice(&line).map(Some).map_err(|_| invalid("a line is not of the protocol"));
        }
    }
}

/// A child's failure as it may be shown: short, without control characters.
pub(super) fn cleaned(mut failure: Failure) -> Failure {
    failure.message = shortened(&failure.message, LONGEST_MESSAGE);
    failure
}

/// A child's progress as it may be shown.
pub(super) fn cleaned_progress(mut progress: Progress) -> Progress {
    progress.phase = shortened(&progress.phase, LONGEST_PHASE);
    // Measured by the agent, whatever a child says.
    (progress.rate, progress.eta_secs) = (None, None);
    progress
}

fn shortened(text: &str, longest: usize) -> String {
    let short: String = text.chars().take(longest).collect();
    printable(&short)
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::ErrorClass;

    #[tokio::test]
    async fn lines_come_back_as_they_were_written() {
        let mut bytes = encode(&Line::<Value>::Step).unwrap();
        bytes.extend(encode(&Line::<Value>::Failed(Failure::invalid("x"))).unwrap());
        let mut from = bytes.as_slice();
        assert!(matches!(read(&mut from, 1000).await.unwrap(), Some(Line::Step)));
        assert!(
            matches!(read(&mut from, 1000).await.unwrap(), Some(Line::Failed(f)) if f.class == ErrorClass::Invalid)
        );
        assert!(read(&mut from, 1000).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn long_cut_and_foreign_lines_are_errors() {
        for bad in [&b"\"step\""[..], b"hello\n", b"{\"done\":\"xxxxxxxxxxxxxxxxxxxxxxxxx\"}\n", b"\n"] {
            assert!(read(&mut &*bad, 20).await.is_err(), "{bad:?}");
        }
    }

    #[test]
    fn what_a_child_says_is_shown_short_and_without_controls() {
        let shown = cleaned(Failure::invalid(format!("\u{1b}[31m{}", "x".repeat(5000))));
        assert!(shown.message.len() <= LONGEST_MESSAGE && !shown.message.chars().any(char::is_control));
    }
}
