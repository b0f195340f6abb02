//! A full fetch that can go on when whoever began it has what it needs.
//!
//! It belongs to the mirror: it runs in a task of its own, holds the mirror's turn, and whoever comes next waits for it as
//! for any other fetch.

use std::{sync::PoisonError, time::Duration};

use async_trait::async_trait;
use tokio::{
    sync::{oneshot, watch},
    time::Instant,
};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{Fetched, Mirrors, Want, errand::Ahead, key};
use crate::{
    failure::Failure,
    git::{Fence, Run, child, transfer::Heard},
    protocol::{CredentialName, GitUrl, Progress},
};

/// How long a fetch stands still at most: servers give up clients that take nothing, after a minute or more.
const LONGEST_HOLD: Duration = Duration::from_secs(10);

/// More objects than are received in a second anywhere (about 85,000 on two cores that are also the server's). What
/// announces more than this allows for need not be waited for.
const MOST_OBJECTS_A_SECOND: u64 = 250_000;

/// A full fetch under way. Dropping it stops the fetch, unless it was let go.
pub(crate) struct Underway {
    done: oneshot::Receiver<Result<Fetched, Failure>>,
    heard: watch::Receiver<Option<Heard>>,
    progress: watch::Receiver<Progress>,
    pause: watch::Sender<bool>,
    stop: Option<DropGuard>,
    mirrors: Mirrors,
    key: String,
    cancel: CancellationToken,
}

/// A fetch that stands still.
pub(crate) struct Hold(watch::Sender<bool>);

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.send_replace(false);
    }
}

/// What came of waiting for a fetch.
pub(crate) enum Came {
    /// It is over.
    Whole(Fetched),
    /// It still runs: this is what it is receiving.
    Slow(Heard),
}

/// A fetch changes nothing that its user sees.
struct Nothing;

#[async_trait]
impl Fence for Nothing {
    async fn check(&self) -> Result<(), Failure> {
        Ok(())
    }
}

impl Mirrors {
    /// Begins a [`fetch`](Self::fetch) that does not end with the task that asks for it.
    pub(crate) fn begin(
        &self,
        url: &GitUrl,
        credential: Option<&CredentialName>,
        want: &Want,
        stall: Duration,
    ) -> Underway {
        let (tell_done, done) = oneshot::channel();
        let (tell_heard, heard) = watch::channel(None);
        let (pause, paused) = watch::channel(false);
        let (tell_progress, progress) = watch::channel(Progress::default());
        let stop = self.closed.child_token();
        let (mirrors, url, credential, want) = (self.clone(), url.clone(), credential.cloned(), want.clone());
        let key = key(url.as_str(), credential.as_ref().map(CredentialName::as_str));
        let underway = (self.clone(), key.clone());
        let cancel = stop.clone();
        tokio::spawn(async move {
            let run = Run {
                deadline: Instant::now() + mirrors.settings.max_timeout,
                stall,
                cancel: cancel.clone(),
                progress: &|progress| drop(tell_progress.send(progress)),
                fence: &Nothing,
            };
            let heard = |what| drop(tell_heard.send(Some(what)));
            let ahead = Ahead { heard: &heard, pause: paused };
            let fetched = mirrors.fetch_telling(&url, credential.as_ref(), &want, Some(ahead), &run).await;
            mirrors.ahead.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
            // Nobody may wait for it any more: the mirror has what came.
            if let Err(Err(failure)) = tell_done.send(fetched) {
                tracing::info!(error = %failure, "a fetch that went on for a project's history failed; it is tried again");
            }
        });
        let (mirrors, key) = underway;
        Underway { done, heard, progress, pause, cancel: stop.clone(), stop: Some(stop.drop_guard()), mirrors, key }
    }

    /// What stops, when it is dropped, every fetch that goes on by itself.
    pub(crate) fn closing(&self) -> DropGuard {
        self.closed.clone().drop_guard()
    }

    /// Stops the fetch that goes on into the mirror `key`, if one does.
    pub(super) fn stop_ahead(&self, key: &str) -> bool {
        let stop = self.ahead.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
        stop.is_some_and(|stop| {
            stop.cancel();
            true
        })
    }
}

impl Underway {
    /// Waits for its end, or until it has been receiving for `after`, or for as long as it takes to see that it will.
    ///
    /// # Errors
    /// Its own failure, or a bound of `run`.
    pub(crate) async fn come(&mut self, after: Duration, run: &Run<'_>) -> Result<Came, Failure> {
        let slow = is_slow(self.heard.clone(), self.progress.clone(), after);
        tokio::select! {
            biased;
            whole = self.whole(run) => whole.map(Came::Whole),
            () = slow => Ok(Came::Slow(self.heard.borrow().clone().unwrap_or_default())),
        }
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// Its own failure, or a bound of `run`.
    pub(crate) async fn whole(&mut self, run: &Run<'_>) -> Result<Fetched, Failure> {
        let (done, progress) = (&mut self.done, &mut self.progress);
        let end = async {
            loop {
                tokio::select! {
                    biased;
                    end = &mut *done => return end,
                    Ok(()) = progress.changed() => {
                        let now = progress.borrow_and_update().clone();
                        (run.progress)(now);
                    }
                }
            }
        };
        child::within(run, None, end).await?.map_err(|_| Failure::internal("a fetch was lost"))?
    }

    /// Lets it stand still, so that something smaller is quick: until the value is dropped, or for [`LONGEST_HOLD`].
    pub(crate) fn hold(&self) -> Hold {
        self.pause.send_replace(true);
        let pause = self.pause.clone();
        tokio::spawn(async move {
            tokio::time::sleep(LONGEST_HOLD).await;
            pause.send_replace(false);
        });
        Hold(self.pause.clone())
    }

    /// What it brought, if it is over and succeeded.
    pub(crate) fn already(&mut self) -> Option<Fetched> {
        self.done.try_recv().ok()?.ok()
    }

    /// Lets it go on by itself.
    pub(crate) fn let_go(mut self) {
        if let Some(guard) = self.stop.take() {
            guard.disarm();
            let mut ahead = self.mirrors.ahead.lock().unwrap_or_else(PoisonError::into_inner);
            ahead.insert(self.key, self.cancel);
        }
    }
}

/// Waits until a fetch has been receiving for `after`, or has announced so much that it certainly will.
async fn is_slow(mut heard: watch::Receiver<Option<Heard>>, mut progress: watch::Receiver<Progress>, after: Duration) {
    let most = u64::try_from(after.as_millis()).unwrap_or(u64::MAX).saturating_mul(MOST_OBJECTS_A_SECOND) / 1000;
    if heard.wait_for(Option::is_some).await.is_err() {
        std::future::pending::<()>().await;
    }
    let announced = progress.wait_for(|progress| progress.total.is_some_and(|total| total > most));
    tokio::select! {
        () = tokio::time::sleep(after) => {}
        Ok(_) = announced => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AFTER: Duration = Duration::from_millis(300);

    async fn waited(total: Option<u64>) -> Duration {
        let (_heard, heard) = watch::channel(Some(Heard::default()));
        let (tell, progress) = watch::channel(Progress::default());
        let begun = Instant::now();
        let slow = tokio::spawn(is_slow(heard, progress, AFTER));
        tokio::time::sleep(Duration::from_millis(10)).await;
        tell.send_modify(|progress| progress.total = total);
        slow.await.unwrap();
        begun.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn more_objects_than_can_come_in_time_are_not_waited_for() {
        assert!(waited(Some(500_000)).await < Duration::from_millis(20));
        assert!(waited(Some(1_000)).await >= AFTER);
        assert!(waited(None).await >= AFTER);
    }

    #[tokio::test(start_paused = true)]
    async fn who_said_nothing_of_what_it_receives_is_not_slow() {
        let (tell, heard) = watch::channel(None::<Heard>);
        let (_progress, progress) = watch::channel(Progress { total: Some(500_000), ..Progress::default() });
        let slow = is_slow(heard, progress, AFTER);
        assert!(tokio::time::timeout(AFTER * 100, slow).await.is_err());
        drop(tell);
    }
}
