//! Sending a transfer child: what it is told, its place at the host, and the answers to what it asks.

use std::{fs::DirBuilder, os::unix::fs::DirBuilderExt, path::Path, sync::Arc};

use futures_util::future::BoxFuture;
use serde_json::Value;
use tokio::sync::watch;

use super::{
    Mirrors, Want,
    flight::{Desk, Turn},
    seat::Seat,
};
use crate::{
    failure::Failure,
    git::{
        Run,
        credential::CredentialFile,
        transfer::{self, Heard},
    },
    protocol::{CredentialName, GitUrl, Progress, Scheme},
};

/// Who wants something of a fetch before it is over.
pub(super) struct Ahead<'a> {
    /// Is told what will be received.
    pub(super) heard: &'a (dyn Fn(Heard) + Send + Sync),
    /// Whether to stand still.
    pub(super) pause: watch::Receiver<bool>,
}

impl Mirrors {
    /// What a transfer child is told.
    pub(super) fn request(
        &self,
        url: &GitUrl,
        credential: Option<&CredentialName>,
        want: &Want,
        key: &str,
        run: &Run<'_>,
    ) -> Result<transfer::Request, Failure> {
        self.allow(url)?;
        let credential = match credential.filter(|_| url.scheme() != Scheme::File) {
            Some(name) => Some(CredentialFile::find(self.settings.credentials_path.as_deref(), name, url)?),
            None => None,
        };
        let of_host = self.settings.of_host(url.host());
        Ok(transfer::Request {
            url: url.as_str().to_owned(),
            mirror: self.path(key),
            want: want.clone(),
            apart: None,
            tell: false,
            credential,
            policy: self.policy.clone(),
            ca_file: of_host.ca_file,
            proxy: of_host.proxy,
            reserve: self.reserve,
            engine: self.settings.transport,
            known_hosts: self.settings.known_hosts.clone(),
            max_bytes: self.settings.max_bytes.as_u64(),
            time_left: run.deadline.saturating_duration_since(tokio::time::Instant::now()),
        })
    }

    /// Runs one transfer child; with its answer comes the right to write, if it needed that.
    pub(super) async fn transfer(
        &self,
        key: &str,
        request: &transfer::Request,
        ahead: Option<&Ahead<'_>>,
        run: &Run<'_>,
    ) -> (Result<transfer::Landed, Failure>, Option<Turn>) {
        if let Err(error) = make_directory(&request.mirror) {
            return (Err(error), None);
        }
        let seat = match self.seat(request, run).await {
            Ok(seat) => seat,
            Err(failure) => return (Err(failure), None),
        };
        let mut request = request.clone();
        request.tell = ahead.is_some();
        let paused = ahead.map(|ahead| self.children.pausing(ahead.pause.clone()));
        let children = paused.as_ref().unwrap_or(&self.children);
        let progress = |progress: Progress| {
            seat.watch(&progress);
            (run.progress)(progress);
        };
        let watched = Run { cancel: run.cancel.clone(), progress: &progress, ..*run };
        let desk = Desk::new(self.flights.of(key), &seat, ahead.map(|ahead| ahead.heard), run);
        let answer = |question| desk.answer(question);
        let fallback = self.settings.transport_fallback;
        let landed = transfer::run(children, request, fallback, &watched, answer).await;
        let turn = desk.into_turn();
        (seat.settle(landed), turn)
    }

    /// Runs a transfer child that leaves the mirror alone. One that is `lent` the place of a fetch that stands still for
    /// it takes none of its own.
    pub(super) async fn apart(
        &self,
        request: &transfer::Request,
        lent: bool,
        run: &Run<'_>,
    ) -> Result<transfer::Answer, Failure> {
        let seat = if lent { None } else { Some(self.seat(request, run).await?) };
        let progress = |progress: Progress| {
            if let Some(seat) = &seat {
                seat.watch(&progress);
            }
            (run.progress)(progress);
        };
        let watched = Run { cancel: run.cancel.clone(), progress: &progress, ..*run };
        let nothing = |_| -> BoxFuture<'_, Result<Value, Failure>> { Box::pin(async { Ok(Value::Null) }) };
        let fallback = self.settings.transport_fallback;
        let landed = transfer::run(&self.children, request.clone(), fallback, &watched, nothing).await;
        let landed = match seat {
            Some(seat) => seat.settle(landed),
            None => landed,
        };
        match landed? {
            transfer::Landed::Brought(answer) => Ok(answer),
            transfer::Landed::Damaged { damaged } => Err(Failure::internal(damaged)),
        }
    }

    /// Takes a place at the upstream's host.
    async fn seat(&self, request: &transfer::Request, run: &Run<'_>) -> Result<Seat, Failure> {
        Seat::take(Arc::clone(&self.hosts), GitUrl::parse(&request.url)?, run).await
    }
}

/// Makes the directory that a child fills, which can write nothing beside it.
pub(super) fn make_directory(path: &Path) -> Result<(), Failure> {
    Ok(DirBuilder::new().recursive(true).mode(0o700).create(path)?)
}
