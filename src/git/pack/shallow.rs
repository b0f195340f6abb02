//! What a project lacks whose own history ends at a boundary.
//!
//! A walk with hidden commits, as for whole projects, hides what lies behind them as well, and the project does not have
//! that. So what the project has is walked first, no further than its boundary, and then everything else that the wants
//! lead to is packed: a merge that brings older commits brings their history, as with git.

use std::collections::HashSet;

use git2::{ObjectType, Oid, PackBuilder, Repository};

use super::{Request, damaged};
use crate::{
    failure::{ErrorClass, Failure},
    git::child::Reporter,
};

/// How many objects are looked at between two signs of life.
const STRIDE: u64 = 4096;

/// A builder with everything that `request` asks for.
pub(super) fn builder<'r>(
    repository: &'r Repository,
    request: &Request,
    reporter: &Reporter,
) -> Result<PackBuilder<'r>, Failure> {
    let mut walk = Walk { repository, reporter, steps: 0, sent: HashSet::new() };
    let boundary: HashSet<Oid> = request.boundary.iter().filter_map(|oid| Oid::from_str(oid).ok()).collect();
    // A tip of the user's own that the upstream never had: no help, no harm.
    let known =
        |have: &String| Some(repository.find_object(Oid::from_str(have).ok()?, None).ok()?.peel_to_commit().ok()?.id());
    let has = walk.commits(request.haves.iter().filter_map(known), &boundary, &HashSet::new())?.into_iter().collect();
    let mut builder = repository.packbuilder().map_err(damaged)?;
    let mut tips = Vec::new();
    for want in &request.wants {
        let missing = || Failure::new(ErrorClass::NotFound, format!("the mirror has no object {want}"));
        let mut object =
            Oid::from_str(want).ok().and_then(|oid| repository.find_object(oid, None).ok()).ok_or_else(missing)?;
        while let Some(tag) = object.as_tag() {
            builder.insert_object(tag.id(), None).map_err(damaged)?;
            let target = tag.target().map_err(damaged)?;
            object = target;
        }
        match object.kind() {
            Some(ObjectType::Commit) => tips.push(object.id()),
            _ => builder.insert_recursive(object.id(), None).map_err(damaged)?,
        }
    }
    let lacking = walk.commits(tips.into_iter(), &HashSet::new(), &has)?;
    // What the project's commits next to the new ones hold need not be sent again.
    for commit in &lacking {
        let commit = repository.find_commit(*commit).map_err(damaged)?;
        for parent in commit.parent_ids().filter(|parent| has.contains(parent)) {
            let tree = repository.find_commit(parent).map_err(damaged)?.tree_id();
            walk.tree(tree, None)?;
        }
    }
    for commit in lacking {
        builder.insert_object(commit, None).map_err(damaged)?;
        let tree = repository.find_commit(commit).map_err(damaged)?.tree_id();
        walk.tree(tree, Some(&mut builder))?;
    }
    Ok(builder)
}

struct Walk<'a> {
    repository: &'a Repository,
    reporter: &'a Reporter,
    steps: u64,
    /// Trees and files that the project has, or gets.
    sent: HashSet<Oid>,
}

impl Walk<'_> {
    fn step(&mut self) {
        self.steps += 1;
        if self.steps.is_multiple_of(STRIDE) {
            self.reporter.step();
        }
    }

    /// The commits that `from` lead to, up to `last`, without what is `known`; newest first.
    fn commits(
        &mut self,
        from: impl Iterator<Item = Oid>,
        last: &HashSet<Oid>,
        known: &HashSet<Oid>,
    ) -> Result<Vec<Oid>, Failure> {
        let (mut found, mut seen) = (Vec::new(), HashSet::new());
        let mut waiting: std::collections::VecDeque<Oid> = from.collect();
        while let Some(oid) = waiting.pop_front() {
            if known.contains(&oid) || !seen.insert(oid) {
                continue;
            }
            self.step();
            found.push(oid);
            if !last.contains(&oid) {
                waiting.extend(self.repository.find_commit(oid).map_err(damaged)?.parent_ids());
            }
        }
        Ok(found)
    }

    /// Has everything in a tree packed that was not seen before; without a builder it is only seen.
    fn tree(&mut self, tree: Oid, mut builder: Option<&mut PackBuilder<'_>>) -> Result<(), Failure> {
        let mut waiting = vec![tree];
        while let Some(id) = waiting.pop() {
            if !self.sent.insert(id) {
                continue;
            }
            if let Some(builder) = builder.as_deref_mut() {
                builder.insert_object(id, None).map_err(damaged)?;
            }
            let tree = self.repository.find_tree(id).map_err(damaged)?;
            for entry in &tree {
                self.step();
                match entry.kind() {
                    Some(ObjectType::Tree) => waiting.push(entry.id()),
                    Some(ObjectType::Blob) if self.sent.insert(entry.id()) => {
                        if let Some(builder) = builder.as_deref_mut() {
                            builder.insert_object(entry.id(), entry.name().ok()).map_err(damaged)?;
                        }
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }
}
