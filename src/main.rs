//! The `haul` binary.

fn main() {}
