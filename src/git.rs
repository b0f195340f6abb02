//! Git work: transfers, mirrors, working trees. Git libraries are written only below this module.
//!
//! The agent itself never opens a repository: the work is done in short-lived children of this same binary.

pub mod child;
pub mod credential;
mod hosts;
pub mod mirror;
pub(crate) mod module;
pub mod owner;
pub mod pack;
pub(crate) mod pointer;
pub mod policy;
mod projects;
mod room;
pub mod run;
pub mod settings;
mod transfer;
pub(crate) mod workspace;

pub(crate) use child::{Children, Confinement, Support};
pub(crate) use mirror::{Fetched, Listing, Mirrors, Want};
pub(crate) use projects::{Applied, Binding, Dir, Follows, Identity, Projects, PullNote, Site, Staging, Stamp};
pub use projects::{ProjectRecord, survey};
pub(crate) use room::room;
pub use run::{Fence, Run};
pub use settings::GitSettings;
pub(crate) use workspace::{Budget, Look, Looked, Make, Pull, Pulled};
