//! One confirm-mode channel with many publishes in flight, and a true answer for each.
//!
//! A message that no queue takes is returned, then confirmed like any other. lapin hands a returned message out with
//! whichever confirm it handles next, so the carrier proves nothing: returns are matched by what they say. It pops
//! them in the order they came, and the broker confirms returned messages in the order of their publishing, so once
//! a confirm came without a return, or no confirm is outstanding, every return up to then has been handed out.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    future::poll_fn,
    pin::Pin,
    sync::{Arc, Weak},
    task::{Context, Poll, Waker},
    time::Duration,
};

use lapin::{Channel, Confirmation, ErrorKind, options::BasicPublishOptions};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};

use super::{
    convert,
    dial::words,
    link::{self, Line, State},
    news::{News, Number},
    request::Request,
    waits::Waits,
};
use crate::broker::{Outgoing, PublishError};

/// Publishes in flight on one channel.
const WINDOW: usize = 512;
/// How often it is looked whether anybody still waits for what flies: nobody gives up sooner than in seconds.
const SHED_INTERVAL: Duration = Duration::from_millis(250);
/// A confirm that carried another's return waits this long for its own, which is in the same bytes from the broker.
const GRACE: Duration = Duration::from_millis(50);
/// For the broker's answer to a new channel.
const OPENING: Duration = Duration::from_secs(10);

type Confirm = Pin<Box<dyn Future<Output = lapin::Result<Confirmation>> + Send>>;

/// A publish in flight.
struct Sent {
    request: Request,
    face: u64,
    confirm: Option<Confirm>,
    bell: Waker,
    outcome: Option<Outcome>,
    returned: bool,
}

/// What the broker said to it.
enum Outcome {
    Confirmed,
    /// Confirmed, but its confirm carried the return of another at that moment.
    Doubtful(Instant),
    Nacked,
    Broken(lapin::Error),
}

/// Works until its requests end or the connection is closed for good.
pub(super) struct Lane {
    requests: mpsc::Receiver<Request>,
    link: watch::Receiver<State>,
    /// Weak, since the pool makes no other connection while this one is in use.
    channel: Option<(Channel, Weak<Line>)>,
    backlog: VecDeque<Request>,
    flight: BTreeMap<Number, Sent>,
    /// The faces of what flies, with how many have each.
    faces: HashMap<u64, usize>,
    /// Publishes of which the broker has said something that was not answered yet.
    heard: Vec<Number>,
    news: Arc<News>,
    next: Number,
    window: usize,
    waits: Waits,
    /// A queue was full. The broker may have told the channel once and for all: a quorum queue that is given room by a
    /// policy, and not by a consumer, never takes that back.
    refused: bool,
    /// When it was last looked whether anybody still waits for what flies.
    shed_at: Instant,
}

impl Lane {
    /// A lane on the connection behind `link`.
    pub(super) fn new(requests: mpsc::Receiver<Request>, link: watch::Receiver<State>) -> Self {
        Self {
            requests,
            link,
            channel: None,
            backlog: VecDeque::new(),
            flight: BTreeMap::new(),
            faces: HashMap::new(),
            heard: Vec::new(),
            news: Arc::default(),
            next: 0,
            window: WINDOW,
            waits: Waits::new(),
            refused: false,
            shed_at: Instant::now(),
        }
    }

    /// Publishes what comes.
    pub(super) async fn run(mut self) {
        loop {
            self.backlog.retain(|request| !request.abandoned());
            if self.backlog.is_empty() && self.flight.is_empty() {
                self.window = WINDOW;
                let Some(request) = self.requests.recv().await else { return };
                self.backlog.push_back(request);
            }
            if self.channel.is_none() && !self.open().await {
                return;
            }
            if !self.refused {
                self.send();
            }
            self.wait().await;
            self.judge();
            if self.refused && self.flight.is_empty() {
                (self.channel, self.refused) = (None, false);
            }
        }
    }

    /// Opens a channel, however long it takes; `false` if there will be none.
    async fn open(&mut self) -> bool {
        loop {
            let Some(line) = link::up(&mut self.link).await else { return false };
            let opened = async {
                let channel = line.channel().await?;
                channel.confirm_select(lapin::options::ConfirmSelectOptions::default()).await?;
                Ok::<_, lapin::Error>(channel)
            };
            match tokio::time::timeout(OPENING, opened).await {
                Ok(Ok(channel)) => {
                    self.waits.reset();
                    self.channel = Some((channel, Arc::downgrade(&line)));
                    return true;
                }
                Ok(Err(error)) => tracing::debug!(error = words(&error), "no channel to publish on yet"),
                Err(_) => tracing::debug!("no answer to a channel to publish on"),
            }
            // The line is not held while waiting: the pool makes no other.
            drop(line);
            tokio::time::sleep(self.waits.next()).await;
        }
    }

    /// Sends as much of the backlog as the window takes.
    fn send(&mut self) {
        let Some((channel, _)) = &self.channel else { return };
        let mut later = VecDeque::new();
        while self.flight.len() < self.window
            && let Some(request) = self.backlog.pop_front()
        {
            // Its asker was told that it was not sent.
            if request.abandoned() {
                continue;
            }
            let face = request.face();
            if request.outgoing.mandatory && self.faces.contains_key(&face) {
                later.push_back(request);
                continue;
            }
            let (Some(exchange), Some(routing_key)) =
                (convert::short(&request.outgoing.exchange), convert::short(&request.outgoing.routing_key))
            else {
                request.forbidden("a name or routing key is longer than 255 bytes");
                continue;
            };
            let (channel, outgoing) = (channel.clone(), &request.outgoing);
            let options = BasicPublishOptions { mandatory: outgoing.mandatory, immediate: false };
            let (body, properties) = (outgoing.message.body.clone(), convert::properties(&outgoing.message));
            let confirm: Confirm = Box::pin(async move {
                channel.basic_publish(exchange, routing_key, options, &body, properties).await?.await
            });
            let number = self.next;
            self.next += 1;
            let bell = self.news.bell(number);
            // Its first look is what sends it.
            bell.wake_by_ref();
            *self.faces.entry(face).or_default() += 1;
            let sent = Sent { request, face, confirm: Some(confirm), bell, outcome: None, returned: false };
            self.flight.insert(number, sent);
        }
        later.append(&mut self.backlog);
        self.backlog = later;
    }

    /// Waits for a confirm or a request.
    async fn wait(&mut self) {
        let doubt = self.heard.iter().filter_map(|number| match self.flight.get(number)?.outcome {
            Some(Outcome::Doubtful(since)) => Some(since + GRACE),
            _ => None,
        });
        let doubt = doubt.min();
        let (flight, heard, news, requests) = (&mut self.flight, &mut self.heard, &*self.news, &mut self.requests);
        let room = self.backlog.is_empty() && flight.len() < self.window;
        tokio::select! {
            biased;
            () = poll_fn(|cx| listen(flight, heard, news, cx)) => {}
            () = tokio::time::sleep_until(doubt.unwrap_or_else(Instant::now)), if doubt.is_some() => {}
            // Before more is taken, what was taken is sent; a closed queue of requests is no news while some fly.
            Some(request) = requests.recv(), if room => {
                self.backlog.push_back(request);
                while self.backlog.len() < WINDOW && let Ok(request) = requests.try_recv() {
                    self.backlog.push_back(request);
                }
            }
            // Requests ended with publishes in flight whose askers may have gone: do not spin, look again soon.
            () = tokio::time::sleep(Duration::from_secs(1)) => {}
        }
    }

    /// Answers whom it can.
    fn judge(&mut self) {
        let heard = std::mem::take(&mut self.heard);
        let broken = heard.iter().find_map(|number| match &self.flight.get(number)?.outcome {
            Some(Outcome::Broken(error)) => Some(error.clone()),
            _ => None,
        });
        let outstanding = broken.is_none() && self.flight.len() > heard.len();
        let now = Instant::now();
        self.note_confirms(&heard);
        let mut unanswered = Vec::new();
        for number in heard {
            let Some(sent) = self.land(number) else { continue };
            let Outgoing { exchange, routing_key, mandatory, .. } = &sent.request.outgoing;
            match sent.outcome {
                _ if sent.returned => {
                    let (exchange, routing_key) = (exchange.clone(), routing_key.clone());
                    sent.request.answer(Err(PublishError::Unroutable { exchange, routing_key }));
                }
                Some(Outcome::Nacked) => {
                    self.refused = true;
                    let exchange = exchange.clone();
                    sent.request.answer(Err(PublishError::Refused { exchange }));
                }
                Some(Outcome::Doubtful(since)) if *mandatory && outstanding && now < since + GRACE => {
                    self.heard.push(number);
                    *self.faces.entry(sent.face).or_default() += 1;
                    self.flight.insert(number, sent);
                }
                Some(Outcome::Confirmed | Outcome::Doubtful(_)) => sent.request.answer(Ok(())),
                Some(Outcome::Broken(_)) | None => unanswered.push((number, sent.request)),
            }
        }
        if let Some(error) = broken {
            self.channel = None;
            unanswered.extend(self.ground());
            unanswered.sort_unstable_by_key(|(number, _)| *number);
            self.again(unanswered.into_iter().map(|(_, request)| request).collect(), &error);
        }
        self.shed();
    }

    /// Lets the connection know that the broker takes messages on it; a refusal says nothing, since a node that is cut
    /// off from the others refuses what it cannot pass on.
    fn note_confirms(&self, heard: &[Number]) {
        let confirmed = |sent: &Sent| matches!(sent.outcome, Some(Outcome::Confirmed | Outcome::Doubtful(_)));
        if heard.iter().filter_map(|number| self.flight.get(number)).any(confirmed)
            && let Some(line) = self.channel.as_ref().and_then(|(_, line)| line.upgrade())
        {
            line.confirmed();
        }
    }

    /// Takes one out of the flight.
    fn land(&mut self, number: Number) -> Option<Sent> {
        let sent = self.flight.remove(&number)?;
        if let Some(count) = self.faces.get_mut(&sent.face) {
            *count -= 1;
            if *count == 0 {
                self.faces.remove(&sent.face);
            }
        }
        Some(sent)
    }

    /// Takes all out of the flight, the oldest first.
    fn ground(&mut self) -> Vec<(Number, Request)> {
        self.faces.clear();
        self.heard.clear();
        drop(self.news.take());
        std::mem::take(&mut self.flight).into_iter().map(|(number, sent)| (number, sent.request)).collect()
    }

    /// Sorts out who broke the channel; everybody else is sent again.
    fn again(&mut self, unanswered: Vec<Request>, error: &lapin::Error) {
        let alone = self.window == 1;
        let mut found = alone;
        for request in unanswered.into_iter().rev() {
            let exchange = match request.outgoing.exchange.as_str() {
                "" => "'amq.default'".to_owned(),
                name => format!("'{name}'"),
            };
            // Only a channel error is somebody's fault, and it names the exchange where it was one's.
            let reason = words(error);
            if is_fault(error) && (alone || reason.contains(&exchange)) {
                found = true;
                request.forbidden(&reason);
            } else {
                self.backlog.push_front(request);
            }
        }
        // It was somebody's fault and nobody knows whose: one at a time until all of them are through.
        if is_fault(error) && !found {
            self.window = 1;
        }
    }

    /// Gives up a channel whose connection is gone, since a publish that was made in its last moment may never hear of
    /// that; and one half of whose window is taken by confirms that nobody waits for any more.
    fn shed(&mut self) {
        let Some((_, line)) = &self.channel else { return };
        let line = line.upgrade().filter(|line| line.connected());
        if line.as_ref().is_none_or(|line| !line.blocked() && self.confirms_nothing()) {
            if line.is_some() {
                tracing::warn!("the broker confirms nothing; opening another channel");
            }
            self.channel = None;
            for (_, request) in self.ground().into_iter().rev() {
                self.backlog.push_front(request);
            }
        }
    }

    /// Whether half of the window is taken by publishes that nobody waits for any more.
    fn confirms_nothing(&mut self) -> bool {
        if self.shed_at.elapsed() < SHED_INTERVAL {
            return false;
        }
        self.shed_at = Instant::now();
        let abandoned = self.flight.values().filter(|sent| sent.request.abandoned()).count();
        abandoned > 0 && abandoned * 2 >= self.window
    }
}

/// Whether the broker closed the channel for something that was sent on it.
fn is_fault(error: &lapin::Error) -> bool {
    matches!(error.kind(), ErrorKind::ProtocolError(error)
        if matches!(error.kind(), lapin::protocol::AMQPErrorKind::Soft(_)))
}

/// Looks at every confirm that there is news of, until there is none: what was confirmed before the last that was seen
/// rang before it and has then been seen too, with the returns it carried.
fn listen(flight: &mut BTreeMap<Number, Sent>, heard: &mut Vec<Number>, news: &News, cx: &mut Context<'_>) -> Poll<()> {
    news.wake(cx.waker());
    let mut carried = Vec::new();
    let before = heard.len();
    loop {
        let numbers = news.take();
        if numbers.is_empty() {
            break;
        }
        for number in numbers {
            let Some(sent) = flight.get_mut(&number) else { continue };
            let Some(confirm) = &mut sent.confirm else { continue };
            let Poll::Ready(confirmed) = confirm.as_mut().poll(&mut Context::from_waker(&sent.bell)) else { continue };
            sent.confirm = None;
            heard.push(number);
            sent.outcome = Some(match confirmed {
                Ok(Confirmation::Ack(None)) => Outcome::Confirmed,
                Ok(Confirmation::Ack(Some(returned))) => {
                    let own = sent.request.is(&returned);
                    carried.push(returned);
                    if own { Outcome::Confirmed } else { Outcome::Doubtful(Instant::now()) }
                }
                Ok(Confirmation::Nack(returned)) => {
                    carried.extend(returned);
                    Outcome::Nacked
                }
                Ok(Confirmation::NotRequested) => {
                    Outcome::Broken(ErrorKind::InvalidChannelState(lapin::ChannelState::Error, "no confirms").into())
                }
                Err(error) => Outcome::Broken(error),
            });
        }
    }
    for returned in carried {
        if let Some(sent) = flight.values_mut().find(|sent| sent.request.is(&returned)) {
            sent.returned = true;
        }
    }
    if heard.len() > before { Poll::Ready(()) } else { Poll::Pending }
}
