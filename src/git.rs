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
pub(crate) mod program;
mod projects;
mod room;
pub mod run;
pub mod settings;
mod transfer;
pub(crate) mod workspace;

pub(crate) use child::{Children, Confinement, Support};
pub(crate) use mirror::{Came, Fetched, Held, Listing, Mirrors, Tip, Underway, Want, send_objects};
pub(crate) use projects::{Applied, Binding, Dir, Follows, Identity, Packs, Projects, PullNote, Site, Staging, Stamp};
pub use projects::{ProjectRecord, survey};
pub(crate) use room::{blamed, room};
pub use run::{Fence, Run};
pub use settings::GitSettings;
pub(crate) use workspace::{Attach, Budget, Look, Looked, Make, Pull, Pulled};
