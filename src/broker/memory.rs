//! A broker in memory: exchanges, queues, dead-lettering and redelivery as RabbitMQ has them, in no time.
//!
//! It keeps tokio's time, so a test that pauses the clock lets an hour of retries pass at once. Clones share one
//! broker. What goes wrong with a real broker can be made to go wrong here: [`Memory::cut`],
//! [`Memory::delete_queue`], [`Memory::set_limit`], [`Memory::refuse_publishes`], [`Memory::lose_confirm_once`],
//! [`Memory::drop_consumers`], [`Memory::serve_consumers`].

mod faults;
mod queue;
mod session;
mod state;

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use async_trait::async_trait;
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

use self::{
    queue::Attached,
    session::{Hold, Tag},
    state::{Alarm, State},
};
use super::{
    Broker, BrokerError, Browse, Consume, Consumer, Delivery, Depth, Health, Inbox, Outgoing, Presence, PublishError,
    Settlement, StaleDelivery, Stop, Topology, View, inbox::stopped,
};
use crate::protocol::wire::Message;

/// How long a consumer takes to come back after its session was lost.
const RECONNECT: Duration = Duration::from_millis(100);

/// An in-memory broker.
#[derive(Clone)]
pub struct Memory(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    /// Sessions look whether they still live.
    ended: Notify,
    health: watch::Sender<Health>,
    me: Weak<Shared>,
}

impl Default for Memory {
    fn default() -> Self {
        Self::new()
    }
}

impl Memory {
    /// An empty broker.
    #[must_use]
    pub fn new() -> Self {
        Self(Arc::new_cyclic(|me| Shared {
            state: Mutex::default(),
            ended: Notify::new(),
            health: watch::Sender::new(Health::Up),
            me: me.clone(),
        }))
    }

    /// What is ready in a queue, in its order.
    #[must_use]
    pub fn messages(&self, queue: &str) -> Vec<Message> {
        let state = self.0.lock();
        let ready = state.queues.get(queue).map(|queue| &queue.ready);
        ready.into_iter().flat_map(|ready| ready.values()).map(|entry| entry.message.clone()).collect()
    }

    /// All that was published and taken, in order.
    #[must_use]
    pub fn published(&self) -> Vec<Outgoing> {
        self.0.lock().published.clone()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands ready messages to consumers with room.
    fn pump(state: &mut State, queues: impl IntoIterator<Item = String>) {
        for name in queues {
            loop {
                let number = state.number();
                let Some(queue) = state.queues.get_mut(&name).filter(|queue| !queue.ready.is_empty()) else { break };
                let Some((hold, inbox)) =
                    queue.next_consumer().map(|next| (Arc::clone(&next.hold), Arc::clone(&next.inbox)))
                else {
                    break;
                };
                if let Some(entry) = queue.take(number, hold.id()) {
                    hold.counts().arrived();
                    inbox.put(deliver(entry, number, hold));
                }
            }
        }
    }

    /// Looks at each queue when its time has come.
    fn set(&self, alarms: Vec<Alarm>) {
        for (queue, at) in alarms {
            let me = self.me.clone();
            tokio::spawn(async move {
                tokio::time::sleep_until(at).await;
                let Some(shared) = me.upgrade() else { return };
                let mut state = shared.lock();
                let (touched, alarms) = state.expire(&queue, Instant::now());
                Self::pump(&mut state, touched);
                drop(state);
                shared.set(alarms);
            });
        }
    }

    fn settle(&self, queue: &str, number: u64, settlement: Settlement) -> Result<(), StaleDelivery> {
        let mut state = self.lock();
        let home = state.queues.get_mut(queue).ok_or(StaleDelivery)?;
        let mut touched = BTreeSet::from([queue.to_owned()]);
        let mut alarms = Vec::new();
        match settlement {
            Settlement::Requeue if home.out.contains_key(&number) => home.give_back(number),
            Settlement::Requeue => return Err(StaleDelivery),
            Settlement::Ack => drop(home.out.remove(&number).ok_or(StaleDelivery)?),
            Settlement::Reject => {
                let entry = home.out.remove(&number).ok_or(StaleDelivery)?.entry;
                let (queues, more) = state.bury(queue, entry, "rejected", Instant::now());
                touched.extend(queues);
                alarms = more;
            }
        }
        Self::pump(&mut state, touched);
        drop(state);
        self.set(alarms);
        Ok(())
    }

    fn give_back(&self, queue: &str, session: u64) {
        let mut state = self.lock();
        if let Some(queue) = state.queues.get_mut(queue) {
            queue.give_back_all(session);
        }
        Self::pump(&mut state, [queue.to_owned()]);
    }

    fn attach(&self, consume: &Consume, inbox: &Arc<Inbox>, presence: &Presence) -> Result<Arc<Hold>, BrokerError> {
        let me = self.me.upgrade().ok_or_else(|| no_queue(&consume.queue))?;
        let mut state = self.lock();
        state.declare(&consume.declare)?;
        let hold = Hold::new(state.number(), &consume.queue, &me);
        let Some(queue) = state.queues.get_mut(&consume.queue) else {
            drop(state);
            return Err(no_queue(&consume.queue));
        };
        let attached = Attached {
            hold: Arc::clone(&hold),
            inbox: Arc::clone(inbox),
            prefetch: consume.prefetch,
            tag: format!("{}-{}", consume.tag, hold.id()),
            deaf: false,
        };
        presence.begin(&attached.tag, queue.counted(), hold.counts());
        queue.consumers.push(attached);
        state.tally.entry(consume.queue.clone()).or_default().sessions += 1;
        Self::pump(&mut state, [consume.queue.clone()]);
        Ok(hold)
    }

    /// Takes a consumer off its queue, which has back what it holds before the next one is served if `give_back`; what is
    /// left of it is returned to be let go outside of the lock.
    fn detach(&self, hold: &Hold, give_back: bool) -> Vec<Attached> {
        let mut state = self.lock();
        let mut gone = Vec::new();
        for queue in state.queues.values_mut() {
            let (out, rest) = queue.consumers.drain(..).partition(|consumer| consumer.hold.id() == hold.id());
            gone.extend::<Vec<_>>(out);
            queue.consumers = rest;
            if give_back {
                queue.give_back_all(hold.id());
            }
        }
        state.end_sessions();
        let queues: Vec<_> = state.queues.keys().cloned().collect();
        Self::pump(&mut state, queues);
        gone
    }
}

fn no_queue(queue: &str) -> BrokerError {
    BrokerError::Refused {
        what: format!("queue {queue:?}"),
        reason: format!("NOT_FOUND - no queue '{queue}' in vhost '/'"),
    }
}

fn deliver(entry: queue::Entry, number: u64, hold: Arc<Hold>) -> Delivery {
    let settle = Arc::new(Tag { number, hold });
    Delivery::new(entry.message, entry.exchange, entry.routing_key, entry.redelivered, settle)
}

/// The loop behind one consumer.
async fn sessions(
    broker: Weak<Shared>,
    consume: Consume,
    inbox: Arc<Inbox>,
    presence: Arc<Presence>,
    mut stop: watch::Receiver<Stop>,
    health: watch::Sender<Health>,
    mut hold: Arc<Hold>,
) {
    loop {
        let mut rebuilds = presence.rebuilds();
        // Who follows takes a change to what was before for a loss and a return.
        health.send_if_modified(|old| std::mem::replace(old, Health::Up) != Health::Up);
        loop {
            let Some(shared) = broker.upgrade() else { return inbox.close() };
            let ended = shared.ended.notified();
            tokio::pin!(ended);
            ended.as_mut().enable();
            if !hold.is_alive() {
                break;
            }
            tokio::select! {
                () = stopped(&mut stop) => {
                    let how = *stop.borrow();
                    drop(shared.detach(&hold, how == Stop::LetGo));
                    presence.end();
                    match how {
                        Stop::No | Stop::GiveBack => for delivery in inbox.drain() {
                            // It was taken back from under us: then it is in its queue already.
                            let _ = delivery.requeue().await;
                        },
                        Stop::KeepOrder => inbox.close(),
                        Stop::LetGo => {
                            hold.end();
                            inbox.close();
                        }
                    }
                    health.send_replace(Health::Down);
                    return;
                }
                () = rebuilds.asked() => {
                    let gone = shared.detach(&hold, false);
                    hold.end();
                    inbox.forget_stale();
                    drop(gone);
                    break;
                }
                () = ended => {}
            }
        }
        presence.end();
        health.send_replace(Health::Down);
        hold = loop {
            tokio::select! {
                () = stopped(&mut stop) => return inbox.close(),
                () = tokio::time::sleep(RECONNECT) => {}
            }
            let Some(shared) = broker.upgrade() else { return inbox.close() };
            if let Ok(hold) = shared.attach(&consume, &inbox, &presence) {
                break hold;
            }
        };
    }
}

#[async_trait]
impl Broker for Memory {
    async fn publish(&self, outgoing: Outgoing) -> Result<(), PublishError> {
        let mut state = self.0.lock();
        let (verdict, alarms) = state.publish(outgoing, Instant::now());
        let queues: Vec<_> = state.queues.keys().cloned().collect();
        Shared::pump(&mut state, queues);
        drop(state);
        self.0.set(alarms);
        verdict
    }

    async fn consume(&self, consume: Consume) -> Result<Consumer, BrokerError> {
        let (inbox, presence) = (Arc::new(Inbox::default()), Arc::new(Presence::default()));
        let hold = self.0.attach(&consume, &inbox, &presence)?;
        let (stop, stopped) = watch::channel(Stop::No);
        let (health_out, health) = watch::channel(Health::Up);
        let broker = Arc::downgrade(&self.0);
        tokio::spawn(sessions(broker, consume, inbox.clone(), presence.clone(), stopped, health_out, hold));
        Ok(Consumer::new(inbox, presence, stop, health))
    }

    async fn browse(&self, queue: &str) -> Result<Box<dyn Browse>, BrokerError> {
        let mut state = self.0.lock();
        if !state.queues.contains_key(queue) {
            return Err(no_queue(queue));
        }
        let hold = Hold::new(state.number(), queue, &self.0);
        Ok(Box::new(Reader { queue: queue.to_owned(), shared: Arc::clone(&self.0), hold }))
    }

    async fn declare(&self, topology: &Topology) -> Result<(), BrokerError> {
        self.0.lock().declare(topology)
    }

    async fn missing(&self, topology: &Topology) -> Result<Vec<String>, BrokerError> {
        let state = self.0.lock();
        let exchanges = topology.exchanges.iter().map(|exchange| &exchange.name);
        let queues = topology.queues.iter().map(|queue| &queue.name);
        let absent = exchanges
            .filter(|name| !state.exchanges.contains_key(*name))
            .chain(queues.filter(|name| !state.queues.contains_key(*name)));
        Ok(absent.cloned().collect())
    }

    async fn depth(&self, queue: &str) -> Result<Option<Depth>, BrokerError> {
        let state = self.0.lock();
        Ok(state.queues.get(queue).map(|queue| Depth {
            messages: u32::try_from(queue.ready.len()).unwrap_or(u32::MAX),
            consumers: queue.counted(),
        }))
    }

    async fn look(&self, queue: &str, closely: bool) -> Result<Option<View>, BrokerError> {
        let Some(depth) = self.depth(queue).await? else { return Ok(None) };
        let mut state = self.0.lock();
        state.tally.entry(queue.to_owned()).or_default().looks += 1;
        let consumers = state.queues.get(queue).filter(|_| closely && state.telling).map(|home| home.seen(queue));
        Ok(Some(View { depth, consumers }))
    }

    fn health(&self) -> watch::Receiver<Health> {
        self.0.health.subscribe()
    }

    async fn close(&self) {
        self.0.health.send_replace(Health::Down);
        self.cut();
    }
}

struct Reader {
    queue: String,
    shared: Arc<Shared>,
    hold: Arc<Hold>,
}

#[async_trait]
impl Browse for Reader {
    async fn next(&mut self) -> Result<Option<Delivery>, BrokerError> {
        let mut state = self.shared.lock();
        let number = state.number();
        let queue = state.queues.get_mut(&self.queue).ok_or_else(|| no_queue(&self.queue))?;
        let read = queue.take(number, self.hold.id());
        Ok(read.map(|entry| deliver(entry, number, Arc::clone(&self.hold))))
    }

    async fn give_back(self: Box<Self>) -> Result<(), BrokerError> {
        self.hold.end();
        Ok(())
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.hold.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::topology::{Binding, Exchange, ExchangeKind, Lifetime, Queue};

    fn topology() -> Topology {
        Topology {
            exchanges: vec![Exchange { name: "in".to_owned(), kind: ExchangeKind::Direct, alternate: None }],
            queues: vec![Queue {
                name: "queue".to_owned(),
                arguments: std::collections::BTreeMap::new(),
                lifetime: Lifetime::Durable,
            }],
            bindings: vec![Binding {
                exchange: "in".to_owned(),
                queue: "queue".to_owned(),
                routing_key: "key".to_owned(),
            }],
        }
    }

    async fn declared() -> Memory {
        let memory = Memory::new();
        memory.declare(&topology()).await.unwrap();
        memory
    }

    fn outgoing(id: &str, priority: Option<u8>) -> Outgoing {
        let message = Message { message_id: Some(id.to_owned()), priority, ..Message::default() };
        Outgoing { exchange: "in".to_owned(), routing_key: "key".to_owned(), message, mandatory: true }
    }

    async fn consumer(memory: &Memory) -> Consumer {
        let consume = Consume { queue: "queue".to_owned(), tag: "test".to_owned(), prefetch: 10, declare: topology() };
        memory.consume(consume).await.unwrap()
    }

    fn ids(memory: &Memory) -> Vec<String> {
        memory.messages("queue").into_iter().filter_map(|message| message.message_id).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn after_a_cut_old_deliveries_are_stale_and_come_again() {
        let memory = declared().await;
        memory.publish(outgoing("one", None)).await.unwrap();
        let mut consumer = consumer(&memory).await;
        let held = consumer.next().await.unwrap();
        memory.cut();
        assert_eq!(held.ack().await, Err(StaleDelivery));
        let again = consumer.next().await.unwrap();
        assert!(again.redelivered);
        again.ack().await.unwrap();
        assert!(ids(&memory).is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_deleted_queue_comes_back_with_its_consumer() {
        let memory = declared().await;
        let mut consumer = consumer(&memory).await;
        memory.delete_queue("queue");
        let mut health = consumer.health();
        health.wait_for(|health| *health == Health::Down).await.unwrap();
        health.wait_for(|health| *health == Health::Up).await.unwrap();
        memory.publish(outgoing("one", None)).await.unwrap();
        consumer.next().await.unwrap().ack().await.unwrap();
    }

    #[tokio::test]
    async fn a_full_queue_refuses_until_its_limit_is_lifted() {
        let memory = declared().await;
        memory.set_limit("queue", 1);
        memory.publish(outgoing("one", None)).await.unwrap();
        assert!(matches!(memory.publish(outgoing("two", None)).await, Err(PublishError::Refused { .. })));
        memory.set_limit("queue", None);
        memory.publish(outgoing("two", None)).await.unwrap();
        memory.refuse_publishes(true);
        assert!(matches!(memory.publish(outgoing("three", None)).await, Err(PublishError::Refused { .. })));
        assert_eq!(ids(&memory), ["one", "two"]);
    }

    #[tokio::test]
    async fn a_lost_confirm_leaves_the_message_there() {
        let memory = declared().await;
        memory.lose_confirm_once();
        assert!(matches!(memory.publish(outgoing("one", None)).await, Err(PublishError::Unconfirmed { .. })));
        assert_eq!(ids(&memory), ["one"]);
        memory.publish(outgoing("two", None)).await.unwrap();
        assert_eq!(memory.published().len(), 2);
    }

    #[tokio::test]
    async fn higher_priorities_come_first_and_a_requeued_message_keeps_its_place() {
        let memory = declared().await;
        for (id, priority) in [("low", Some(2)), ("first", None), ("second", Some(4)), ("high", Some(7))] {
            memory.publish(outgoing(id, priority)).await.unwrap();
        }
        let mut browse = memory.browse("queue").await.unwrap();
        for expected in ["high", "first"] {
            let delivery = browse.next().await.unwrap().unwrap();
            assert_eq!(delivery.message.message_id.as_deref(), Some(expected));
            delivery.requeue().await.unwrap();
            if expected == "high" {
                browse.next().await.unwrap().unwrap().ack().await.unwrap();
            }
        }
        assert_eq!(ids(&memory), ["first", "second", "low"]);
    }

    #[tokio::test(start_paused = true)]
    async fn an_hour_of_waiting_passes_at_once() {
        let memory = declared().await;
        let hold = Topology {
            queues: vec![Queue {
                name: "hold".to_owned(),
                arguments: [
                    ("x-message-ttl".to_owned(), 3_600_000.into()),
                    ("x-dead-letter-exchange".to_owned(), "in".into()),
                ]
                .into(),
                lifetime: Lifetime::Durable,
            }],
            ..Topology::default()
        };
        memory.declare(&hold).await.unwrap();
        let begun = Instant::now();
        let mut waiting = outgoing("one", None);
        (waiting.exchange, waiting.routing_key) = (String::new(), "hold".to_owned());
        memory.publish(waiting).await.unwrap();
        let mut consumer = consumer(&memory).await;
        // Its own routing key is not bound there, so nothing comes of the first; the second finds its way.
        assert!(memory.messages("hold").len() == 1 && ids(&memory).is_empty());
        tokio::time::sleep(Duration::from_hours(2)).await;
        assert!(memory.messages("hold").is_empty());
        memory
            .declare(&Topology {
                bindings: vec![Binding {
                    exchange: "in".to_owned(),
                    queue: "queue".to_owned(),
                    routing_key: "hold".to_owned(),
                }],
                ..Topology::default()
            })
            .await
            .unwrap();
        let mut waiting = outgoing("two", None);
        (waiting.exchange, waiting.routing_key) = (String::new(), "hold".to_owned());
        memory.publish(waiting).await.unwrap();
        let delivery = consumer.next().await.unwrap();
        assert!(begun.elapsed() >= Duration::from_hours(3));
        assert_eq!((delivery.message.message_id.as_deref(), delivery.routing_key.as_str()), (Some("two"), "hold"));
        delivery.ack().await.unwrap();
    }
}
