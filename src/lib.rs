//! Haul puts git projects on the nodes of a fleet and keeps them there.
//!
//! Layers, from words to assembly: `protocol` and `failure` and `retry`; `journal` and `schedule`; the adapters
//! `broker`, `git` and `store`; `execute`; the roles `worker`, `master`, `dead` and `doctor`; `cli`, which puts them
//! together. `docs/ARCHITECTURE.md` says more.

pub mod broker;
pub mod cli;
pub mod config;
pub mod dead;
pub mod doctor;
pub mod execute;
pub mod failure;
pub mod git;
pub mod journal;
pub mod lock;
pub mod master;
pub mod protocol;
pub mod retry;
pub mod schedule;
pub mod shutdown;
pub mod store;
pub mod telemetry;
pub mod worker;
