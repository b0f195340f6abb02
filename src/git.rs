//! Git work: transfers, mirrors, working trees. Git libraries are written only below this module.
//!
//! The agent itself never opens a repository: the work is done in short-lived children of this same binary.

pub mod child;
pub mod credential;
pub mod mirror;
pub mod pack;
pub mod policy;
pub mod run;
pub mod settings;
mod transfer;
mod workspace;

pub use run::{Fence, Run};
