//! History: what a clone whose tree came first still lacks.

/// The word of the wire contract for history that is still to come.
pub const PENDING: &str = "pending";
