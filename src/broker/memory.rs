//! An in-memory broker.
