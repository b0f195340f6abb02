//! What an upstream is told before it sends a pack: what is wanted of it, and what is here.

use std::collections::BTreeSet;

use gix::{
    negotiate::Algorithm,
    protocol::fetch::{
        Arguments, Negotiate, RefMap, Response, Shallow,
        negotiate::{self, Action, Round, one_round},
        refmap::{Mapping, Source, SpecIndex},
    },
};

/// What of the history is to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// All of it.
    Everything,
    /// Commits and trees, without what the files contain. An upstream that cannot leave that out is not asked for anything.
    Trees,
}

/// What we tell the upstream that we want and have.
pub(super) struct Negotiation<'a> {
    repository: &'a gix::Repository,
    graph: gix::negotiate::Graph<'a, 'a>,
    negotiator: Box<dyn gix::negotiate::Negotiator>,
    wanted: RefMap,
    shallow: Shallow,
    content: Content,
}

impl<'a> Negotiation<'a> {
    /// `repository` is what is here; exactly `wants` are asked for, whatever the refs point to by now.
    pub(super) fn new(
        repository: &'a gix::Repository,
        wants: &BTreeSet<String>,
        shallow: Shallow,
        content: Content,
    ) -> Self {
        let ids = wants.iter().filter_map(|oid| gix::ObjectId::from_hex(oid.as_bytes()).ok());
        let mappings = ids
            .map(|id| Mapping { remote: Source::ObjectId(id), local: None, spec_index: SpecIndex::ExplicitInRemote(0) })
            .collect();
        Self {
            repository,
            graph: repository.revision_graph(None),
            negotiator: Algorithm::Consecutive.into_negotiator(),
            wanted: RefMap { mappings, object_hash: gix::hash::Kind::Sha1, ..RefMap::default() },
            shallow,
            content,
        }
    }
}

impl Negotiate for Negotiation<'_> {
    fn mark_complete_and_common_ref(&mut self) -> gix::Result<Action> {
        negotiate::mark_complete_and_common_ref(
            &self.repository.objects,
            &self.repository.refs,
            || Ok(std::iter::empty::<(gix::refs::file::Store, gix::OdbHandle)>()),
            self.negotiator.as_mut(),
            &mut self.graph,
            &self.wanted,
            &self.shallow,
            |_| false,
        )
    }

    fn add_wants(&mut self, arguments: &mut Arguments, known: &[bool]) -> bool {
        if self.content == Content::Trees {
            if !arguments.can_use_filter() {
                return false;
            }
            arguments.filter("blob:none");
        }
        negotiate::add_wants(&self.repository.objects, arguments, &self.wanted, known, &self.shallow, |_| false)
    }

    fn one_round(
        &mut self,
        state: &mut one_round::State,
        arguments: &mut Arguments,
        previous: Option<&Response>,
    ) -> gix::Result<(Round, bool)> {
        negotiate::one_round(self.negotiator.as_mut(), &mut self.graph, state, arguments, previous)
    }
}
