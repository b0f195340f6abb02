//! Receiving: at first in one go, later in units, and what is worth remembering written down on the way.

use std::{
    collections::BTreeSet,
    sync::{
        atomic::Ordering,
        mpsc::{RecvTimeoutError, channel},
    },
    time::{Duration, Instant},
};

use super::{
    Received, Transport,
    bare::Bare,
    meter::Meter,
    milestones::{Measure, Plan, Record, Search, by_version, millis},
    pieces::Outline,
};
use crate::{
    failure::{ErrorClass, Failure},
    git::{child::Reporter, mirror::Listing},
};

/// How often what was received is written down.
const TICK: Duration = Duration::from_millis(200);

/// What a transfer has at hand.
pub(super) struct Journey<'a> {
    /// A new connection to the upstream.
    pub(super) connect: &'a dyn Fn() -> Result<Box<dyn Transport + 'a>, Failure>,
    /// Counts what moves.
    pub(super) meter: &'a Meter,
    /// The way to the agent.
    pub(super) reporter: &'a Reporter,
    /// When the transfer began.
    pub(super) begun: Instant,
}

/// The counters at one moment.
struct Mark {
    at: Instant,
    bytes: u64,
    objects: (u64, u64),
}

impl Mark {
    fn now(meter: &Meter) -> Self {
        Self { at: Instant::now(), bytes: meter.pack_bytes(), objects: meter.objects() }
    }

    /// What moved since, in a transfer that has lived since `begun`.
    fn measure(&self, meter: &Meter, begun: Instant) -> Measure {
        let (objects, expected) = meter.objects();
        Measure {
            bytes: meter.pack_bytes().saturating_sub(self.bytes),
            millis: millis(self.at.elapsed()),
            lived: millis(begun.elapsed()),
            objects: objects.saturating_sub(self.objects.0),
            expected: expected.saturating_sub(self.objects.1),
        }
    }
}

impl<'a> Journey<'a> {
    /// Receives `wants`, which `bare` lacks, and all that they need.
    pub(super) fn receive(
        &self,
        bare: &mut Bare,
        transport: &mut Box<dyn Transport + 'a>,
        wants: &BTreeSet<String>,
        listing: &Listing,
        time_left: Duration,
    ) -> Result<Received, Failure> {
        let mut record = Record::read(bare.path());
        let whole = listing.refs.values().all(|oid| wants.contains(oid) || bare.has(oid));
        // Another task's, for a history that this one does not need.
        let others = record.plan.take_if(|plan| !whole && !wants.contains(&plan.target));
        let units = record.in_units();
        record.attempts += 1;
        let mut packs = Packs { journey: self, bare, transport, listing, record, received: Received::default() };
        if units || !packs.in_one_go(wants, Some(time_left))? {
            packs.in_units(wants)?;
        }
        let Packs { record, received, .. } = packs;
        if others.is_some() {
            Record { plan: others, ..record }.write(bare.path())?;
        } else {
            forget(bare)?;
        }
        Ok(received)
    }
}

/// A transfer while it receives.
struct Packs<'j, 'a> {
    journey: &'j Journey<'a>,
    bare: &'j mut Bare,
    transport: &'j mut Box<dyn Transport + 'a>,
    listing: &'j Listing,
    record: Record,
    received: Received,
}

impl Packs<'_, '_> {
    /// Receives `wants` in one go; false if that was given up, since at its rate it would not be done in `time_left`.
    fn in_one_go(&mut self, wants: &BTreeSet<String>, time_left: Option<Duration>) -> Result<bool, Failure> {
        let Some(received) = self.watched(time_left, |transport, bare| transport.receive(bare, wants, None))? else {
            return Ok(false);
        };
        self.count(received);
        self.bare.take_in(wants, self.journey.reporter)?;
        Ok(true)
    }

    fn count(&mut self, received: Received) {
        self.received.objects += received.objects;
        self.received.bytes += received.bytes;
    }

    /// What `receive` received; nothing if that was given up, since at its rate it would not be done in `time_left`.
    ///
    /// What moves is written down as it does, so that whoever tries next knows what was lost if this dies.
    fn watched<T>(
        &mut self,
        time_left: Option<Duration>,
        receive: impl FnOnce(&mut dyn Transport, &Bare) -> Result<T, Failure>,
    ) -> Result<Option<T>, Failure> {
        let (meter, begun) = (self.journey.meter, self.journey.begun);
        let end = time_left.map(|left| begun + left);
        let mark = Mark::now(meter);
        let (over, ended) = channel::<()>();
        let (bare, transport) = (&*self.bare, self.transport.as_mut());
        let (path, stop, mut record) = (bare.path(), &*bare.stop, self.record.clone());
        stop.store(false, Ordering::Relaxed);
        let received = std::thread::scope(|scope| {
            let mark = &mark;
            scope.spawn(move || {
                while ended.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
                    let before = record.measure.bytes;
                    record.measure = mark.measure(meter, begun);
                    if record.measure.bytes != before {
                        // What cannot be written down is forgotten, no more.
                        let _ = record.write(path);
                    }
                    let left = end.map(|end| end.saturating_duration_since(Instant::now()));
                    if left.is_some_and(|left| record.measure.is_too_slow(left)) {
                        stop.store(true, Ordering::Relaxed);
                    }
                }
            });
            let received = receive(transport, bare);
            drop(over);
            received
        });
        self.record.measure = mark.measure(meter, begun);
        match received {
            Ok(received) => Ok(Some(received)),
            Err(failure) => {
                self.record.write(self.bare.path())?;
                if !self.bare.stop.load(Ordering::Relaxed) {
                    return Err(failure);
                }
                self.bare.sweep()?;
                self.reconnect()?;
                Ok(None)
            }
        }
    }

    /// Receives `wants` in units: first the history of the default branch, then what is left, in one go while that
    /// works and one by one after it did not.
    fn in_units(&mut self, wants: &BTreeSet<String>) -> Result<(), Failure> {
        let main = self.listing.head.as_ref().and_then(|head| self.listing.refs.get(head));
        loop {
            let mut missing = wants.clone();
            self.bare.retain_missing(&mut missing);
            let Some(first) = missing.first() else { return Ok(()) };
            let begun = self.record.plan.as_ref().map(|plan| &plan.target).filter(|target| !self.bare.has(target));
            let target = match begun.or_else(|| main.filter(|oid| missing.contains(*oid))) {
                Some(target) => target.clone(),
                None if self.record.rest_died => first.clone(),
                None => {
                    self.record.plan = None;
                    self.record.rest_died = true;
                    self.in_one_go(&missing, None)?;
                    continue;
                }
            };
            match self.history(&target) {
                Ok(()) => self.record.plan = None,
                Err(failure) if refused(&failure) && self.record.plan.is_some() => {
                    // Its branch has moved on and it is gone; or nothing is handed out that is not listed.
                    self.record.plan = None;
                    if self.listing.refs.values().any(|oid| *oid == target) {
                        if self.record.only_listed {
                            return Err(failure);
                        }
                        self.record.only_listed = true;
                    }
                    self.reconnect()?;
                }
                Err(failure) => return Err(failure),
            }
            self.record.write(self.bare.path())?;
        }
    }

    /// Receives the history of `target` from its oldest end, unit by unit, each kept.
    fn history(&mut self, target: &str) -> Result<(), Failure> {
        let mut plan = match self.record.plan.take().filter(|plan| plan.target == target) {
            Some(plan) => plan,
            None => Plan::new(target, self.length(target)?, &self.record.measure),
        };
        if plan.under_way {
            plan.died(&self.record.measure);
        }
        let mut anchored = BTreeSet::new();
        loop {
            let next = plan.next();
            let cut = match next {
                Some(position) => self.cut(target, position)?,
                None => BTreeSet::from([target.to_owned()]),
            };
            let mut missing = cut.clone();
            self.bare.retain_missing(&mut missing);
            if !missing.is_empty() {
                if plan.files.is_none() || !self.in_pieces(&missing, &mut plan)? {
                    self.begins(&mut plan)?;
                    self.in_one_go(&missing, None)?;
                }
                plan.reached(next.unwrap_or(0), &self.record.measure);
            }
            if !cut.is_empty() {
                self.bare.anchor(&cut, &anchored)?;
                anchored = if self.record.only_listed { BTreeSet::new() } else { cut };
            }
            plan.reach = next.unwrap_or(0);
            self.record.plan = Some(plan.clone());
            self.record.write(self.bare.path())?;
            if next.is_none() {
                return Ok(());
            }
        }
    }

    /// Receives `wants`, the commits of one unit, by its files; false where the upstream cannot send commits without
    /// their files.
    fn in_pieces(&mut self, wants: &BTreeSet<String>, plan: &mut Plan) -> Result<bool, Failure> {
        if self.record.only_listed || self.record.no_files {
            return Ok(false);
        }
        let outline = if let Some(outline) = Outline::find(self.bare, wants)? {
            outline
        } else {
            let mut outline = Outline::create(self.bare)?;
            self.begins(plan)?;
            let place = outline.bare();
            let received = self.watched(None, |transport, bare| transport.outline(bare, wants, place))?;
            let Some(received) = received.flatten() else {
                Outline::remove(self.bare)?;
                return Ok(false);
            };
            self.count(received);
            outline.refresh()?;
            outline
        };
        let lacking = outline.lacking(self.bare, wants)?;
        let mut rest = lacking.as_slice();
        while !rest.is_empty() {
            let most = usize::try_from(plan.files.unwrap_or(1)).unwrap_or(usize::MAX);
            let (now, later) = rest.split_at(most.min(rest.len()));
            self.begins(plan)?;
            self.reconnect()?;
            let mut files = now.iter().cloned().collect();
            match self.in_one_go(&files, None) {
                Err(failure) if refused(&failure) => {
                    self.record.no_files = true;
                    Outline::remove(self.bare)?;
                    self.reconnect()?;
                    return Ok(false);
                }
                other => other?,
            };
            self.bare.retain_missing(&mut files);
            if let Some(oid) = files.first() {
                return Err(Failure::new(ErrorClass::Network, format!("the upstream did not send {oid}")));
            }
            plan.brought(u32::try_from(now.len()).unwrap_or(u32::MAX), &self.record.measure);
            rest = later;
        }
        outline.settle(self.bare)?;
        self.bare.take_in(wants, self.journey.reporter)?;
        Ok(true)
    }

    /// Writes down that the next part of `plan` is being received: whoever finds that knows that it died.
    fn begins(&mut self, plan: &mut Plan) -> Result<(), Failure> {
        plan.under_way = true;
        self.record.plan = Some(plan.clone());
        self.record.measure = Measure { lived: millis(self.journey.begun.elapsed()), ..Measure::default() };
        Ok(self.record.write(self.bare.path())?)
    }

    /// How many positions the history of `target` has. Each answer is kept: the search may die as well.
    fn length(&mut self, target: &str) -> Result<u32, Failure> {
        let mut search = self.record.search.take().filter(|search| search.target == target);
        while !self.record.only_listed {
            let found = search.get_or_insert_with(|| Search::new(target));
            let Some(depth) = found.next() else { return Ok(found.length()) };
            let there = !self.cut(target, depth)?.is_empty();
            found.told(depth, there);
            self.record.search = Some(found.clone());
            self.record.write(self.bare.path())?;
        }
        Ok(u32::try_from(self.tags().len() + 1).unwrap_or(u32::MAX))
    }

    /// What the unit that begins at `position` needs to be whole; nothing if there is no such position.
    fn cut(&mut self, target: &str, position: u32) -> Result<BTreeSet<String>, Failure> {
        if !self.record.only_listed {
            let cut = self.transport.boundary(target, position)?;
            self.reconnect()?;
            match cut {
                Some(cut) => return Ok(cut),
                None => self.record.only_listed = true,
            }
        }
        let tags = self.tags();
        let at = usize::try_from(position).unwrap_or(usize::MAX);
        Ok(tags.get(at.wrapping_sub(1)).map(|oid| (*oid).clone()).into_iter().collect())
    }

    /// The objects of the tags, the newest version first.
    fn tags(&self) -> Vec<&String> {
        let mut tags: Vec<_> = self.listing.refs.iter().filter(|(name, _)| name.starts_with("refs/tags/")).collect();
        tags.sort_by(|(a, _), (b, _)| by_version(b, a));
        tags.into_iter().map(|(_, oid)| oid).collect()
    }

    fn reconnect(&mut self) -> Result<(), Failure> {
        *self.transport = (self.journey.connect)()?;
        Ok(())
    }
}

/// Forgets what was remembered for the next try: all is there.
pub(super) fn forget(bare: &Bare) -> Result<(), Failure> {
    bare.let_go()?;
    Outline::remove(bare)?;
    Ok(Record::remove(bare.path())?)
}

/// Whether the upstream has no such object, or does not hand it out: in the words of git, and of its Java sibling.
fn refused(failure: &Failure) -> bool {
    let says = |words: &str| failure.message.contains(words);
    failure.class == ErrorClass::Network && (says("not our ref") || (says("want ") && says(" not valid")))
}
