//! The workspace role: one project, nothing else.
//!
//! The agent hands the child a descriptor of the project's directory and says what to do in it. What the child answers
//! is read with limits: it works among files that a stranger may have written.

mod apply;
mod attach;
mod backup;
mod compare;
mod guard;
mod index;
mod lfs;
mod look;
mod make;
mod open;
mod plan;
mod pull;
mod pulse;
mod receive;
mod settings;
mod skeleton;
mod submodules;
mod waiting;
mod walk;

use std::{
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;

use self::pull::Question;
pub(crate) use self::{
    attach::Attach,
    lfs::{Pointers, Smudge, collect, smudge},
    look::{Look, Looked},
    make::{Made, Make},
    pull::{Pull, Pulled},
    submodules::{Add, Survey, Surveyed, add, survey},
    walk::Budget,
};
pub(super) use self::{open::forget_search_paths, walk::check_name};
use super::{
    Run,
    child::{Access, Children, Confined, Reporter, Role, TOO_MUCH_MEMORY, inherited, serve},
    projects::Dir,
    room,
};
use crate::failure::{ErrorClass, Failure};

/// How long a child in a project that its user can write to may take without a step: its files can block for ever.
const STEP: Duration = Duration::from_secs(10);

/// What the agent asks of the child.
#[derive(Serialize, Deserialize)]
struct Request {
    /// The descriptor of the project's directory.
    directory: i32,
    /// What to do there.
    order: Order,
}

/// The orders.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Order {
    /// Turn objects into a project.
    Make(Make),
    /// Report.
    Look(Look),
    /// Bring up to date.
    Pull(Pull),
    /// Attach the history that is lacking.
    Attach(Attach),
    /// Measure the tree of a repository of a project in the making, and list its submodules.
    Survey(Survey),
    /// Make one of them.
    Add(Add),
    /// List the LFS pointers of one of its repositories.
    Collect(Pointers),
    /// Put what they point to into their places.
    Smudge(Smudge),
}

impl Confined for Request {
    fn access(&self) -> Access {
        let pack = match &self.order {
            Order::Pull(order) => order.pack,
            Order::Attach(order) => order.objects,
            _ => None,
        };
        Access {
            directory: Some(self.directory),
            descriptors: pack.into_iter().collect(),
            as_owner: true,
            ..Access::default()
        }
    }
}

/// Lets a child do `order` in `directory`, which asks nothing and needs nothing else.
async fn done<A: DeserializeOwned>(
    children: &Children,
    directory: OwnedFd,
    order: Order,
    run: &Run<'_>,
) -> Result<A, Failure> {
    let request = Request { directory: directory.as_raw_fd(), order };
    children.run(Role::Workspace, &request, vec![directory], run).await
}

/// Makes the project whose objects are in `directory` already.
///
/// # Errors
/// `quota`, `forbidden` or `corrupt` for a tree that is not to be checked out; otherwise as [`Children::run`].
pub(crate) async fn make(children: &Children, directory: OwnedFd, order: Make, run: &Run<'_>) -> Result<Made, Failure> {
    done(children, directory, Order::Make(order), run).await
}

/// Looks at a project.
///
/// # Errors
/// `conflict` where it is not a project that can be worked in.
pub(crate) async fn look(
    children: &Children,
    directory: OwnedFd,
    order: Look,
    run: &Run<'_>,
) -> Result<Looked, Failure> {
    done(children, directory, Order::Look(order), &patient(run)).await.map_err(altered)
}

/// Pulls in a project; a pack is read from `pack`. `note` is asked before the first file is written.
///
/// # Errors
/// `conflict` where something of the user is in the way.
pub(crate) async fn pull<'a>(
    children: &Children,
    directory: OwnedFd,
    pack: Option<OwnedFd>,
    mut order: Pull,
    run: &Run<'_>,
    mut note: impl FnMut(Option<String>, String) -> BoxFuture<'a, Result<(), Failure>> + Send,
) -> Result<Pulled, Failure> {
    order.pack = pack.as_ref().map(AsRawFd::as_raw_fd);
    let request = Request { directory: directory.as_raw_fd(), order: Order::Pull(order) };
    let inherit = std::iter::once(directory).chain(pack).collect();
    let answer = |question: Value| -> BoxFuture<'a, Result<Value, Failure>> {
        match serde_json::from_value(question) {
            Ok(Question::Note { old, new }) => {
                let noted = note(old, new);
                Box::pin(async move { noted.await.map(|()| Value::Null) })
            }
            Err(_) => Box::pin(async { Err(Failure::internal("a workspace child asked something unknown")) }),
        }
    };
    children.run_asking(Role::Workspace, &request, inherit, &patient(run), answer).await.map_err(altered)
}

/// Attaches the history that a project lacks; its objects are read from `objects`.
///
/// # Errors
/// `conflict` where the project's own history was cut elsewhere by its user; deferred where git holds a lock there.
pub(crate) async fn attach(
    children: &Children,
    directory: OwnedFd,
    objects: OwnedFd,
    mut order: Attach,
    run: &Run<'_>,
) -> Result<(), Failure> {
    order.objects = Some(objects.as_raw_fd());
    let request = Request { directory: directory.as_raw_fd(), order: Order::Attach(order) };
    children.run(Role::Workspace, &request, vec![directory, objects], &patient(run)).await.map_err(altered)
}

/// The bounds of `run` with the stall limit of work among a user's files.
fn patient<'a>(run: &Run<'a>) -> Run<'a> {
    Run {
        deadline: run.deadline,
        stall: run.stall.min(STEP),
        cancel: run.cancel.clone(),
        progress: run.progress,
        fence: run.fence,
    }
}

/// A child that got stuck met something that never ends, such as a pipe in place of a file.
fn altered(failure: Failure) -> Failure {
    match failure.class {
        ErrorClass::Stalled => Failure::conflict("the workspace was altered: a file in it cannot be read to its end"),
        // What grows without end in a project was put there.
        ErrorClass::Quota if failure.message.starts_with(TOO_MUCH_MEMORY) => guard::altered(failure.message),
        _ => failure,
    }
}

/// `haul child workspace`.
pub(super) fn main() -> ExitCode {
    serve(|request: Request, reporter| {
        let directory = directory(request.directory)?;
        let done = pulse::with(reporter, || match request.order {
            Order::Make(order) => value(make::run(&directory, &order, reporter)?),
            Order::Look(order) => value(look::run(&directory, &order, reporter)?),
            Order::Pull(order) => value(pull::run(&directory, &order, reporter)?),
            Order::Attach(order) => value(attach::run(&directory, &order, reporter)?),
            Order::Survey(order) => value(submodules::run_survey(&directory, &order, reporter)?),
            Order::Add(order) => value(submodules::run_add(&directory, &order, reporter)?),
            Order::Collect(order) => value(lfs::run_collect(&directory, &order, reporter)?),
            Order::Smudge(order) => value(lfs::run_smudge(&directory, &order, reporter)?),
        });
        let place = PathBuf::from(format!("/proc/self/fd/{}/.", directory.as_fd().as_raw_fd()));
        done.map_err(|failure| room::blamed(failure, &[&place]))
    })
}

fn directory(number: i32) -> Result<Dir, Failure> {
    let file = inherited(number)?;
    Ok(Dir::from(OwnedFd::from(file)))
}

fn value(answer: impl Serialize) -> Result<Value, Failure> {
    serde_json::to_value(answer).map_err(|error| Failure::internal(error.to_string()))
}

/// Asks the agent and waits.
fn ask<A: DeserializeOwned>(reporter: &Reporter, question: &Question) -> Result<A, Failure> {
    reporter.ask(question)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workspace_child_is_handed_its_directory_and_a_pack_and_names_no_path() {
        let order = Order::Look(Look { refs: false, status: false });
        let access = Request { directory: 7, order }.access();
        assert_eq!(access, Access { directory: Some(7), as_owner: true, ..Access::default() });
    }
}
