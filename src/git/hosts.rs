//! What the agent knows of the hosts it talks to: how many transfers each has, and which are better left alone.
//!
//! The limit is one host's, the breaker one port's: whoever fills in tasks can name a port where nobody listens, and must
//! not close the others with it. The rules are in [`host`] and [`breaker`]; here are the clock, the lock and the waiting.

mod breaker;
mod host;

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::sync::oneshot;

use self::{
    breaker::{Change, Refusal, Rules, Seen, Why},
    host::{Answer, Host, Number, PATIENCE},
};
use super::{Run, child, settings::GitSettings};
use crate::{
    failure::{ErrorClass, Failure},
    protocol::{GitUrl, HostState, Progress, Scheme},
};

/// Above so many hosts those that nothing needs to be known of are forgotten.
const KNOWN: usize = 256;
/// After so long without a task everything about a host is forgotten.
const LONG_AGO: Duration = Duration::from_hours(1);

/// The hosts of one agent.
pub(super) struct Hosts {
    settings: GitSettings,
    books: Arc<Mutex<HashMap<String, Book>>>,
}

/// One host, and who waits to be woken.
struct Book {
    host: Host,
    wake: BTreeMap<Number, oneshot::Sender<()>>,
}

/// A place at a host. One that is dropped without a word tells nothing of the host.
pub(super) struct Pass {
    /// Nothing is kept of a file.
    place: Option<Place>,
    answered: AtomicBool,
}

struct Place {
    books: Arc<Mutex<HashMap<String, Book>>>,
    host: String,
    port: u16,
    number: Number,
    probe: bool,
}

/// Leaves the line when its task does.
struct Waiting<'a> {
    hosts: &'a Hosts,
    host: &'a str,
    number: Number,
    over: bool,
}

impl Hosts {
    pub(super) fn new(settings: &GitSettings) -> Self {
        Self { settings: settings.clone(), books: Arc::default() }
    }

    /// A place at the host of `url`; waits for one, though not for long.
    ///
    /// # Errors
    /// Deferred where the host is down (`network`), wants to be left alone or is busy with others of ours (`throttled`),
    /// each with the time after which it is worth another try; the bounds of `run`.
    pub(super) async fn enter(&self, url: &GitUrl, run: &Run<'_>) -> Result<Pass, Failure> {
        if url.scheme() == Scheme::File {
            return Ok(Pass { place: None, answered: AtomicBool::new(true) });
        }
        let (host, port) = (url.host().trim_end_matches('.').to_ascii_lowercase(), url.port());
        let (number, woken) = {
            let mut books = lock(&self.books);
            let book = self.book(&mut books, &host);
            match book.host.ask(port, now()) {
                Answer::Go { number, probe } => return Ok(self.pass(host, port, number, probe)),
                Answer::Away(refusal) => return Err(sent_away(&host, refusal)),
                Answer::Wait(number) => {
                    let (wake, woken) = oneshot::channel();
                    book.wake.insert(number, wake);
                    (number, woken)
                }
            }
        };
        let mut waiting = Waiting { hosts: self, host: &host, number, over: false };
        (run.progress)(Progress { phase: "waiting".to_owned(), ..Progress::default() });
        let woken = child::within(run, None, tokio::time::timeout(PATIENCE, woken)).await?;
        let mut books = lock(&self.books);
        let book = self.book(&mut books, &host);
        let answer = match woken {
            Ok(_) => book.host.resume(number, port, now()),
            Err(_elapsed) => Answer::Away(book.host.busy(now())),
        };
        drop(books);
        match answer {
            Answer::Go { number, probe } => {
                waiting.over = true;
                drop(waiting);
                Ok(self.pass(host, port, number, probe))
            }
            Answer::Away(refusal) => {
                drop(waiting);
                Err(sent_away(&host, refusal))
            }
            Answer::Wait(_) => Err(Failure::internal("a task was woken to wait")),
        }
    }

    /// How the hosts are that have tasks or are left alone.
    pub(super) fn states(&self) -> Vec<HostState> {
        let now = now();
        let books = lock(&self.books);
        let mut states: Vec<_> = books
            .iter()
            .filter_map(|(name, book)| {
                let (running, waiting, closed) = book.host.counts(now);
                let worst = closed.iter().max_by_key(|(_, refusal)| refusal.wait);
                (running + waiting > 0 || worst.is_some()).then(|| HostState {
                    host: name.clone(),
                    running: running as u64,
                    waiting: waiting as u64,
                    paused: worst.map(|(_, refusal)| word(refusal.why).to_owned()),
                    paused_secs: worst.map(|(_, refusal)| refusal.wait.as_secs()),
                })
            })
            .collect();
        states.sort_by(|a, b| a.host.cmp(&b.host));
        states
    }

    fn book<'a>(&self, books: &'a mut HashMap<String, Book>, host: &str) -> &'a mut Book {
        if books.len() >= KNOWN && !books.contains_key(host) {
            let now = now();
            books.retain(|_, book| !book.host.is_idle(now, LONG_AGO));
        }
        books.entry(host.to_owned()).or_insert_with(|| {
            let limit = self.settings.of_host(host).limit.unwrap_or(self.settings.host_limit);
            let rules = Rules { after: self.settings.breaker_after, pause: self.settings.breaker_pause };
            Book { host: Host::new(limit as usize, rules), wake: BTreeMap::new() }
        })
    }

    fn pass(&self, host: String, port: u16, number: Number, probe: bool) -> Pass {
        if probe {
            tracing::info!(git.host = %host, git.port = port, "trying whether the host is back");
        }
        let place = Place { books: self.books.clone(), host, port, number, probe };
        Pass { place: Some(place), answered: AtomicBool::new(false) }
    }
}

impl Book {
    fn wake(&mut self, numbers: Vec<Number>) {
        for number in numbers {
            if let Some(wake) = self.wake.remove(&number) {
                let _ = wake.send(());
            }
        }
    }
}

impl Pass {
    /// Notes from a transfer's progress that the host has answered.
    pub(super) fn watch(&self, progress: &Progress) {
        if progress.phase != "connecting" {
            self.answered.store(true, Ordering::Relaxed);
        }
    }

    /// Gives the place back with what became of the transfer. A failure to reach a host that is known to be down does
    /// not count against the task.
    ///
    /// # Errors
    /// That of the transfer.
    pub(super) fn settle<T>(mut self, result: Result<T, Failure>) -> Result<T, Failure> {
        let seen = self.seen(result.as_ref().err());
        let closed = self.place.take().and_then(|place| place.end(seen));
        match (result, closed) {
            (Err(failure), Some(refusal)) if seen == Seen::Down => Err(failure.not_before(refusal.wait).deferred()),
            (result, _) => result,
        }
    }

    fn seen(&self, failure: Option<&Failure>) -> Seen {
        let Some(failure) = failure else { return Seen::Answered };
        let answered = self.answered.load(Ordering::Relaxed);
        match (failure.class, failure.retry_after) {
            (ErrorClass::Throttled, Some(wait)) => Seen::Throttled(wait),
            _ if answered => Seen::Answered,
            (ErrorClass::Network, _) if failure.unreachable => Seen::Down,
            (ErrorClass::Stalled | ErrorClass::Timeout, _) => Seen::Down,
            // Of our own making, or it may be: perhaps nobody was asked.
            (ErrorClass::Internal | ErrorClass::Disk | ErrorClass::Forbidden | ErrorClass::Auth, _) => Seen::Nothing,
            _ => Seen::Answered,
        }
    }
}

impl Place {
    /// Gives the place back; how long the endpoint is closed from now on, if it is.
    fn end(&self, seen: Seen) -> Option<Refusal> {
        let now = now();
        let mut books = lock(&self.books);
        let book = books.get_mut(&self.host)?;
        let (woken, change) = book.host.end(self.number, self.port, self.probe, seen, now);
        book.wake(woken);
        let closed = book.host.closed(self.port, now);
        drop(books);
        match change {
            Some(Change::Opened(pause)) => tracing::warn!(
                git.host = %self.host,
                git.port = self.port,
                git.paused = closed.map(|refusal| word(refusal.why)),
                wait_ms = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX),
                "the host is left alone"
            ),
            Some(Change::Closed) => tracing::info!(git.host = %self.host, git.port = self.port, "the host is back"),
            None => {}
        }
        closed
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        if let Some(place) = self.place.take() {
            place.end(Seen::Nothing);
        }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        if let Some(book) = lock(&self.hosts.books).get_mut(self.host) {
            book.wake.remove(&self.number);
            let woken = book.host.quit(self.number);
            book.wake(woken);
        }
    }
}

/// The failure of a task that is sent away: it waits, and none of its attempts is spent.
fn sent_away(host: &str, refusal: Refusal) -> Failure {
    let (class, message) = match refusal.why {
        Why::Down => {
            (ErrorClass::Network, format!("the host {host} could not be reached lately and is left alone for now"))
        }
        Why::Throttled => (ErrorClass::Throttled, format!("the host {host} asked this node to slow down")),
        Why::Busy => (
            ErrorClass::Throttled,
            format!("this node has as many transfers with the host {host} as it may at a time (git.host_limit)"),
        ),
    };
    Failure::new(class, message).not_before(refusal.wait).deferred()
}

fn word(why: Why) -> &'static str {
    match why {
        Why::Down => "down",
        Why::Throttled => "throttled",
        Why::Busy => "busy",
    }
}

/// The moment, by the clock that tests can stop.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

fn lock(books: &Mutex<HashMap<String, Book>>) -> MutexGuard<'_, HashMap<String, Book>> {
    books.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use async_trait::async_trait;
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::{git::Fence, protocol::GitUrl};

    struct Always;

    #[async_trait]
    impl Fence for Always {
        async fn check(&self) -> Result<(), Failure> {
            Ok(())
        }
    }

    fn hosts() -> Hosts {
        let settings = GitSettings {
            host_limit: 1,
            breaker_after: 2,
            breaker_pause: Duration::from_secs(30),
            ..GitSettings::default()
        };
        Hosts::new(&settings)
    }

    async fn enter(hosts: &Hosts, url: &str) -> Result<Pass, Failure> {
        let run = Run {
            deadline: tokio::time::Instant::now() + Duration::from_mins(10),
            stall: Duration::from_mins(1),
            cancel: CancellationToken::new(),
            progress: &|_| (),
            fence: &Always,
        };
        hosts.enter(&GitUrl::parse(url).unwrap(), &run).await
    }

    fn down() -> Result<(), Failure> {
        Err(Failure::new(ErrorClass::Network, "refused").unreachable())
    }

    const URL: &str = "https://git.example/x";

    #[tokio::test(start_paused = true)]
    async fn a_dead_host_costs_no_attempt_and_a_probe_finds_it_alive() {
        let hosts = hosts();
        let first = enter(&hosts, URL).await.unwrap().settle(down()).unwrap_err();
        assert!(!first.deferred);
        let second = enter(&hosts, URL).await.unwrap().settle(down()).unwrap_err();
        assert_eq!((second.deferred, second.retry_after), (true, Some(Duration::from_secs(30))));
        let third = enter(&hosts, URL).await.map(drop).unwrap_err();
        assert_eq!((third.class, third.deferred), (ErrorClass::Network, true));
        assert_eq!(hosts.states()[0].paused.as_deref(), Some("down"));
        // Other hosts and other ports go on.
        for other in ["https://other.example/x", "ssh://git.example/x"] {
            enter(&hosts, other).await.unwrap().settle(Ok(())).unwrap();
        }
        tokio::time::advance(Duration::from_secs(30)).await;
        let probe = enter(&hosts, URL).await.unwrap();
        assert!(enter(&hosts, URL).await.is_err());
        probe.settle(Ok(())).unwrap();
        assert!(enter(&hosts, URL).await.is_ok());
        assert!(hosts.states().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_host_that_answered_before_it_fell_silent_is_not_down() {
        let hosts = hosts();
        for _ in 0..5 {
            let pass = enter(&hosts, URL).await.unwrap();
            pass.watch(&Progress { phase: "receiving".to_owned(), ..Progress::default() });
            let stalled = Failure::new(ErrorClass::Stalled, "nothing moved");
            assert!(!pass.settle::<()>(Err(stalled)).unwrap_err().deferred);
        }
        for _ in 0..2 {
            let silent = enter(&hosts, URL).await.unwrap();
            let _ = silent.settle::<()>(Err(Failure::new(ErrorClass::Stalled, "nothing moved")));
        }
        assert!(enter(&hosts, URL).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_wish_to_slow_down_counts_for_all_tasks_of_the_host() {
        let hosts = hosts();
        let throttled = Failure::new(ErrorClass::Throttled, "429").not_before(Duration::from_secs(7));
        let failure = enter(&hosts, URL).await.unwrap().settle::<()>(Err(throttled.clone())).unwrap_err();
        assert_eq!(failure, throttled);
        let other = enter(&hosts, URL).await.map(drop).unwrap_err();
        assert_eq!(
            (other.class, other.deferred, other.retry_after),
            (ErrorClass::Throttled, true, Some(Duration::from_secs(7)))
        );
        tokio::time::advance(Duration::from_secs(7)).await;
        assert!(enter(&hosts, URL).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_is_told_so_goes_when_a_place_is_free_and_leaves_when_none_becomes_free() {
        let hosts = hosts();
        let running = enter(&hosts, URL).await.unwrap();
        let told = Mutex::new(Vec::new());
        let progress = |progress: Progress| told.lock().unwrap().push(progress.phase);
        let run = Run {
            deadline: tokio::time::Instant::now() + Duration::from_mins(10),
            stall: Duration::from_mins(1),
            cancel: CancellationToken::new(),
            progress: &progress,
            fence: &Always,
        };
        let url = GitUrl::parse(URL).unwrap();
        let failure = hosts.enter(&url, &run).await.map(drop).unwrap_err();
        assert_eq!((failure.class, failure.deferred), (ErrorClass::Throttled, true));
        assert!(failure.message.contains("git.host_limit"));
        let free = async {
            tokio::time::sleep(Duration::from_secs(2)).await;
            running.settle(Ok(())).unwrap();
        };
        let (pass, ()) = tokio::join!(hosts.enter(&url, &run), free);
        assert!(pass.is_ok());
        assert_eq!(*told.lock().unwrap(), ["waiting", "waiting"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_place_is_free_again_after_a_cancel_a_panic_or_a_drop() {
        let hosts = hosts();
        drop(enter(&hosts, URL).await.unwrap());
        let running = enter(&hosts, URL).await.unwrap();
        let waits = enter(&hosts, URL);
        assert!(tokio::time::timeout(Duration::from_secs(1), waits).await.is_err());
        drop(running);
        assert!(enter(&hosts, URL).await.is_ok());
        assert!(hosts.states().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_thousand_hosts_are_not_remembered_for_ever() {
        let hosts = hosts();
        for number in 0..1000 {
            let _ = enter(&hosts, &format!("https://h{number}.example/x")).await.unwrap().settle(Ok(()));
        }
        assert!(lock(&hosts.books).len() <= KNOWN);
    }
}
