//! The exit codes of every command; they are part of the interface and do not change.

/// All went well.
pub const OK: u8 = 0;
/// Something failed that has no code of its own.
pub const FAILED: u8 = 1;
/// The command line, the configuration or the input cannot be used.
pub const USAGE: u8 = 2;
/// The broker cannot be reached, refused us, or did not confirm.
pub const BROKER: u8 = 3;
/// The task that was waited for did not succeed, or no node takes it.
pub const TASK: u8 = 4;
/// Another agent holds the storage directory.
pub const LOCKED: u8 = 5;
/// The time given ran out.
pub const TIMED_OUT: u8 = 6;
/// A signal ended it before it was done.
pub const INTERRUPTED: u8 = 130;
