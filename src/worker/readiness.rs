//! Whether the agent can do its job, and in words why not.

use super::{Worker, watch::Verdict};
use crate::broker::{Health, Ours};

/// Whether the worker can do its job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Readiness {
    /// The queue of tasks is consumed, and the broker sees it so, too.
    pub consuming: bool,
    /// Events and copies can be published.
    pub publishing: bool,
    /// Control messages can be received.
    pub control: bool,
    /// The journal can be written.
    pub journal: bool,
}

impl Readiness {
    /// Whether all of it works.
    #[must_use]
    pub fn is_ready(self) -> bool {
        self.consuming && self.publishing && self.control && self.journal
    }
}

impl Worker {
    /// Notes how consuming and publishing are now.
    pub(super) fn note_readiness(&self, consuming: Health, publishing: Health, ours: &Ours) {
        let served = !ours.stands_in_line() && *self.verdict.borrow() == Verdict::Well;
        self.readiness.send_if_modified(|readiness| {
            let before = *readiness;
            readiness.consuming = consuming == Health::Up && served;
            readiness.publishing = publishing == Health::Up;
            before != *readiness
        });
    }

    /// Why it is not ready, in sentences; empty where it is.
    pub(super) fn not_ready(&self) -> Vec<String> {
        let readiness = *self.readiness.borrow();
        let mut reasons = Vec::new();
        let mut say = |reason: &str| reasons.push(reason.to_owned());
        if *self.leaving.borrow() {
            say("it hands its storage over to another process");
        } else if self.soft.is_cancelled() {
            say("it finishes what runs, and ends");
        } else if *self.paused.borrow() {
            say("it is paused and takes no tasks until it is resumed");
        } else if !readiness.journal {
            say("its journal cannot be written");
        } else if *self.verdict.borrow() != Verdict::Well {
            say(&self.verdict.borrow().to_string());
        } else if !readiness.consuming {
            say("its queue is not consumed: the way to the broker is being made");
        }
        if !readiness.publishing {
            say("nothing can be published: the broker is away, or has an alarm");
        }
        if !readiness.control {
            say("control messages are received late: their consumer is being made anew");
        }
        reasons
    }
}
