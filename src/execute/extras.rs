//! What a clone brings beyond the objects of its own upstream: submodules and LFS files.
//!
//! All of it happens in the staging directory, before the one rename: a submodule or an LFS object that cannot be had
//! fails the clone, and nothing of it is in view.

use std::{collections::VecDeque, sync::Arc};

use super::executor::{GitExecutor, copied};
use crate::{
    failure::{ErrorClass, Failure},
    git::{
        Budget, Children, Fetched, Run, Staging, Want,
        module::{self, Module, Place},
        workspace::{self, Add, Pointers, Smudge, Survey, Surveyed},
    },
    protocol::{CloneTask, CredentialName, GitUrl},
};

/// Whether a clone of `work` needs more than its own upstream's tree: then the tree alone is no project yet.
pub(super) fn wanted(work: &CloneTask) -> bool {
    work.submodules || work.lfs
}

/// One repository whose tree is checked out.
struct Repository {
    place: Place,
    url: GitUrl,
    credential: Option<CredentialName>,
    depth: usize,
    /// What is still to be made in it.
    modules: Vec<Module>,
}

/// What one clone still may and still needs.
struct Extras<'a> {
    git: &'a GitExecutor,
    work: &'a CloneTask,
    staging: &'a Arc<Staging>,
    run: &'a Run<'a>,
    /// Those that work in the project, as its owner.
    children: Children,
    /// What is left for all trees and LFS files of the project together.
    budget: Budget,
    /// Submodules so far.
    count: usize,
    /// Their mirrors.
    mirrors: Vec<String>,
}

/// Brings what `work` asks for into the project that is checked out in `staging`.
pub(super) async fn add(
    git: &GitExecutor,
    work: &CloneTask,
    fetched: &Fetched,
    staging: &Arc<Staging>,
    run: &Run<'_>,
) -> Result<(), Failure> {
    if !wanted(work) {
        return Ok(());
    }
    let children = git.children.of(staging.owner);
    let mut extras = Extras {
        git,
        work,
        staging,
        run,
        children: children.clone(),
        budget: git.budget(),
        count: 0,
        mirrors: Vec::new(),
    };
    let order = Survey { place: Place::project(), budget: extras.budget, submodules: work.submodules };
    let surveyed = workspace::survey(&children, staging.handle()?, order, run).await?;
    extras.spend(&surveyed);
    let project = Repository {
        place: Place::project(),
        url: work.url.clone(),
        credential: work.credential.clone(),
        depth: 0,
        modules: surveyed.modules,
    };
    extras.lfs(&project, fetched).await?;
    let mut waiting = VecDeque::from([project]);
    while let Some(repository) = waiting.pop_front() {
        for module in &repository.modules {
            waiting.push_back(extras.submodule(&repository, module).await?);
        }
    }
    extras.leave().await;
    Ok(())
}

impl Extras<'_> {
    fn spend(&mut self, surveyed: &Surveyed) {
        self.budget.files = self.budget.files.saturating_sub(surveyed.files);
        self.budget.bytes = self.budget.bytes.saturating_sub(surveyed.bytes);
    }

    /// Makes one submodule; whatever goes wrong is said of its path.
    async fn submodule(&mut self, parent: &Repository, module: &Module) -> Result<Repository, Failure> {
        let place = parent.place.inner(module);
        self.count += 1;
        if self.count > module::MOST {
            return Err(module::too_many());
        }
        if parent.depth == module::DEEPEST {
            let message = format!("submodules are nested deeper than {} at {}", module::DEEPEST, place.tree);
            return Err(Failure::new(ErrorClass::Quota, message));
        }
        let path = place.tree.clone();
        let depth = parent.depth + 1;
        self.made(parent, module, place, depth).await.map_err(|mut failure| {
            failure.message = format!("the submodule at {path}: {}", failure.message);
            failure
        })
    }

    async fn made(
        &mut self,
        parent: &Repository,
        module: &Module,
        place: Place,
        depth: usize,
    ) -> Result<Repository, Failure> {
        let (git, staging, run) = (self.git, self.staging, self.run);
        let url = module.address(&parent.url)?;
        git.mirrors.allow(&url)?;
        // The credential was named for the project's own upstream; another host never sees it.
        let credential = self.work.credential.clone().filter(|_| module::same_host(&self.work.url, &url));
        git.reserve.check().await?;
        let want = Want::Commit(module.commit.clone());
        let fetched = git.mirrors.fetch(&url, credential.as_ref(), &want, run).await?;
        git.reserve.check_copy(&fetched.path).await?;
        let (mirror, at, staged) = (fetched.path.clone(), place.git.clone(), Arc::clone(staging));
        copied("checkout", run, move |moved| staged.copy_module(&mirror, &at, moved)).await?;
        let order = Add {
            parent: parent.place.clone(),
            module: module.clone(),
            url: url.as_str().to_owned(),
            listing: fetched.listing.clone(),
            budget: self.budget,
            reserve: git.reserve.bytes(),
        };
        let surveyed = workspace::add(&self.children, staging.handle()?, order, run).await?;
        self.spend(&surveyed);
        self.mirrors.push(fetched.key().to_owned());
        let repository = Repository { place, url, credential, depth, modules: surveyed.modules };
        self.lfs(&repository, &fetched).await?;
        Ok(repository)
    }

    /// Puts the LFS files of one repository into their places.
    async fn lfs(&mut self, repository: &Repository, fetched: &Fetched) -> Result<(), Failure> {
        if !self.work.lfs {
            return Ok(());
        }
        let (git, staging, run) = (self.git, self.staging, self.run);
        let place = &repository.place;
        let order = Pointers { place: place.clone(), budget: self.budget };
        let wanted = workspace::collect(&self.children, staging.handle()?, order, run).await?;
        if wanted.objects.is_empty() {
            return Ok(());
        }
        if wanted.bytes > self.budget.bytes {
            return Err(Failure::internal("a workspace child counted its LFS files wrongly"));
        }
        self.budget.bytes -= wanted.bytes;
        git.reserve.check_lfs(wanted.size(), wanted.bytes).await?;
        let objects: Vec<_> = wanted.objects.iter().cloned().collect();
        git.mirrors.fetch_lfs(fetched, &repository.url, repository.credential.as_ref(), &objects, run).await?;
        let (store, at, staged) = (fetched.lfs(), place.git.clone(), Arc::clone(staging));
        copied("checkout", run, move |moved| staged.copy_lfs(&store, &at, &wanted.objects, moved)).await?;
        workspace::smudge(&self.children, staging.handle()?, Smudge { place: place.clone() }, run).await
    }

    /// Lets go of the submodules' mirrors: no pull ever asks for them again, and no project is bound to them.
    async fn leave(&self) {
        for key in &self.mirrors {
            let (projects, searched) = (Arc::clone(&self.git.projects), key.clone());
            let removed = self.git.mirrors.remove(key, move || projects.mirrored().contains(&searched)).await;
            if let Err(error) = removed {
                tracing::warn!(%error, "the mirror of a submodule cannot be removed; a later start tries again");
            }
        }
    }
}
