//! The child's side of the conversation.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    process::ExitCode,
};

use rustix::{
    fs::Mode,
    process::{Signal, getppid, set_parent_process_death_signal},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use super::{
    line::{self, Envelope, Line},
    sandbox::{Confined, confine},
};
use crate::{failure::Failure, protocol::Progress};

/// The longest line taken from the agent, in bytes; it only guards against a mistake.
const LONGEST_LINE: u64 = 64 << 20;

/// How a child speaks to the agent while it works.
pub struct Reporter(());

impl Reporter {
    /// Says how far the work is; the agent's stall clock starts anew.
    pub fn progress(&self, progress: Progress) {
        let _ = say(&Line::<Value>::Progress(progress));
    }

    /// Says only that something moved; the agent's stall clock starts anew.
    pub fn step(&self) {
        let _ = say(&Line::<Value>::Step);
    }

    /// Asks the agent and waits for its answer.
    ///
    /// # Errors
    /// The agent's refusal, or `internal` when it is gone.
    pub fn ask<Q: Serialize, A: DeserializeOwned>(&self, question: &Q) -> Result<A, Failure> {
        let wrong = |error: serde_json::Error| Failure::internal(format!("a question to the agent failed: {error}"));
        say(&Line::<Value>::Ask(serde_json::to_value(question).map_err(wrong)?))?;
        let answer: Result<Value, Failure> = hear()?;
        serde_json::from_value(answer?).map_err(wrong)
    }
}

/// Runs a child: reads its request, shuts itself in, does the work of `body`, answers.
///
/// The kernel ends the process when the agent dies, and it ends by itself if the agent died before that was set up.
pub fn serve<Q, A>(body: impl FnOnce(Q, &Reporter) -> Result<A, Failure>) -> ExitCode
where
    Q: DeserializeOwned + Confined,
    A: Serialize,
{
    if let Err(failure) = die_with_the_agent() {
        return last(&Line::<Value>::Failed(failure));
    }
    let envelope: Envelope<Q> = match hear() {
        Ok(envelope) => envelope,
        Err(failure) => return last(&Line::<Value>::Failed(failure)),
    };
    let agent = || getppid().map(|parent| parent.as_raw_nonzero().get().unsigned_abs());
    if agent() != Some(envelope.parent) {
        return ExitCode::FAILURE;
    }
    // Another user makes the kernel forget the signal.
    let shut_in = confine(&envelope.request.access(), &envelope.confinement).and_then(|()| die_with_the_agent());
    if let Err(failure) = shut_in {
        return last(&Line::<Value>::Failed(failure));
    }
    if agent() != Some(envelope.parent) {
        return ExitCode::FAILURE;
    }
    match body(envelope.request, &Reporter(())) {
        Ok(answer) => last(&Line::Done(answer)),
        Err(failure) => last(&Line::<Value>::Failed(failure)),
    }
}

/// Has the kernel end this process with the agent. What it started itself (ssh) sees its pipes close.
fn die_with_the_agent() -> Result<(), Failure> {
    set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(|error| Failure::internal(format!("no death signal can be set: {error}")))
}

/// What new files of this process shall not allow.
pub(super) fn set_umask(mask: u32) {
    rustix::process::umask(Mode::from_raw_mode(mask));
}

fn last<A: Serialize>(line: &Line<A>) -> ExitCode {
    match say(line) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn say<A: Serialize>(line: &Line<A>) -> Result<(), Failure> {
    let bytes = line::encode(line).map_err(|error| Failure::internal(error.to_string()))?;
    let mut out = io::stdout().lock();
    out.write_all(&bytes)?;
    Ok(out.flush()?)
}

fn hear<T: DeserializeOwned>() -> Result<T, Failure> {
    let mut line = Vec::new();
    // `Stdin` buffers for the whole process: nothing is lost between two lines.
    BufReader::with_capacity(1, io::stdin().lock().take(LONGEST_LINE)).read_until(b'\n', &mut line)?;
    serde_json::from_slice(&line)
        .map_err(|error| Failure::internal(format!("the agent's line cannot be read: {error}")))
}
