//! Names of headers.

/// W3C trace context, carried from master to agent to event.
pub const TRACEPARENT: &str = "traceparent";
/// Replays so far.
pub const ROUND: &str = "x-haul-round";
/// The attempt that this copy asks for, from 1.
pub const ATTEMPT: &str = "x-haul-attempt";
/// Order of first arrival, in microseconds; fixed at first admission.
pub const ARRIVED: &str = "x-haul-arrived";
/// Milliseconds since the epoch before which a copy hops again.
pub const NOT_BEFORE: &str = "x-haul-not-before";
/// Milliseconds that a copy still has to wait when it comes back: it is held no longer than that, wherever the clock that
/// [`NOT_BEFORE`] was told by is by then.
pub const LEFT: &str = "x-haul-left";
/// Milliseconds since the epoch when the task was first deferred.
pub const DEFERRED: &str = "x-haul-deferred";
/// The node whose task it is.
pub const NODE: &str = "x-haul-node";
/// Class of the failure, on dead letters.
pub const ERROR_CLASS: &str = "x-haul-error-class";
/// Sentence of the failure, on dead letters.
pub const ERROR: &str = "x-haul-error";
/// Attempts charged, on dead letters.
pub const ATTEMPTS: &str = "x-haul-attempts";
/// The last failures, one a line, on dead letters and retries.
pub const HISTORY: &str = "x-haul-history";
/// When it was dead-lettered, on dead letters.
pub const DEAD_AT: &str = "x-haul-dead-at";
/// The task's kind, on dead letters: for filters and for the console.
pub const KIND: &str = "x-haul-kind";
/// The task's project, on dead letters: for filters and for the console.
pub const PROJECT: &str = "x-haul-project";
/// Written by the broker when it dead-letters by itself.
pub const DEATH: &str = "x-death";
/// Prefix of all of ours.
pub const OURS: &str = "x-haul-";
