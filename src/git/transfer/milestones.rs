//! How a history too large for its link is cut into units that are each kept.
//!
//! The first try is one fetch. What it measured is written down beside the mirror as it goes, so that the next one
//! knows when that died with much received. Then the history is fetched from its oldest end: a unit is everything
//! below a certain depth under the tip, complete in itself, so what one brings stays whatever becomes of the next.
//! Where to cut is asked of the upstream itself, which tells the commits at a depth in a few bytes. An upstream that
//! cannot be asked, or that hands out only what it lists, is cut at its tags, in the order of their versions.

use std::{
    cmp::Ordering,
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};

/// Beside the objects of a mirror while something is being received into it.
const FILE: &str = "transfer.json";
/// A transfer that died earlier has lost nothing worth keeping.
const MUCH: u64 = 64 << 10;
/// The same, in time.
const LONG: Duration = Duration::from_secs(1);
/// How long a unit shall take.
const UNIT: Duration = Duration::from_mins(1);
/// The shortest that is aimed at, however soon transfers die.
const SHORTEST: Duration = Duration::from_millis(300);
/// The depth that is asked for first when a history is measured.
const SHALLOW: u32 = 64;
/// No history is deeper.
const DEEPEST: u32 = 1 << 30;
/// How long a rate is measured before it is believed.
const MEASURED: Duration = Duration::from_secs(5);

/// What is remembered of transfers into one mirror until all is there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Record {
    /// Tries so far.
    pub(super) attempts: u32,
    /// What was received last, as it went.
    pub(super) measure: Measure,
    /// The history whose length is being searched for.
    pub(super) search: Option<Search>,
    /// The history that is being fetched in units.
    pub(super) plan: Option<Plan>,
    /// Whether everything beside that history was tried in one go, and died.
    pub(super) rest_died: bool,
    /// Whether the upstream hands out only what it lists.
    pub(super) only_listed: bool,
    /// Whether it hands out no files by their ids.
    pub(super) no_files: bool,
}

/// How fast something was received.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Measure {
    /// Bytes of packs.
    pub(super) bytes: u64,
    /// How long that took.
    pub(super) millis: u64,
    /// How long the transfer had lived by then, with all that it received before.
    pub(super) lived: u64,
    /// Objects of packs.
    pub(super) objects: u64,
    /// How many had been announced.
    pub(super) expected: u64,
}

/// How deep a history is: deeper than `low`, and not deeper than `high` once that was asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Search {
    /// The object whose history it is.
    pub(super) target: String,
    low: u32,
    high: u32,
    bounded: bool,
}

/// One history in units. Positions are depths below the tip, or, counted from the newest, tags.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Plan {
    /// The object whose history it is.
    pub(super) target: String,
    /// From this position on everything older is here.
    pub(super) reach: u32,
    /// How far the next unit goes.
    pub(super) step: u32,
    /// How long it shall take, in milliseconds.
    pub(super) aim: u64,
    /// Whether one was being received; still set after that died.
    pub(super) under_way: bool,
    /// How many died since the last that came.
    #[serde(default)]
    pub(super) deaths: u32,
    /// How many files of the next unit come at a time, once it is as short as one can be and still too much.
    #[serde(default)]
    pub(super) files: Option<u32>,
}

impl Record {
    /// What is remembered beside the mirror at `path`; nothing where that cannot be read.
    pub(super) fn read(path: &Path) -> Self {
        let text = fs::read(path.join(FILE)).unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    }

    /// Writes it down. It survives the process; losing it with the machine costs one try.
    pub(super) fn write(&self, path: &Path) -> io::Result<()> {
        let new: PathBuf = path.join("transfer.lock");
        fs::write(&new, serde_json::to_vec(self).map_err(io::Error::other)?)?;
        fs::rename(new, path.join(FILE))
    }

    /// Forgets everything: all is there.
    pub(super) fn remove(path: &Path) -> io::Result<()> {
        match fs::remove_file(path.join(FILE)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Whether the next try goes in units: the last one died with much received.
    pub(super) fn in_units(&self) -> bool {
        self.plan.is_some() || (self.attempts > 0 && self.measure.is_much())
    }
}

impl Measure {
    fn is_much(&self) -> bool {
        self.bytes >= MUCH && Duration::from_millis(self.millis) >= LONG
    }

    /// Whether, at this rate, what is being received cannot be there in `left` more time.
    pub(super) fn is_too_slow(&self, left: Duration) -> bool {
        let elapsed = Duration::from_millis(self.millis);
        if elapsed < MEASURED || !self.is_much() || self.objects == 0 || self.expected <= self.objects {
            return false;
        }
        let rest = u128::from(self.expected - self.objects) * elapsed.as_millis() / u128::from(self.objects);
        // Commits and trees come first and are small: the guess is a kind one, and is taken at its word.
        rest > left.as_millis()
    }

    /// The guess of how many bytes there are in all.
    fn total(&self) -> u64 {
        match self.objects {
            0 => self.bytes.saturating_mul(8),
            objects => scale(self.bytes, self.expected.max(objects), objects),
        }
    }

    /// How many bytes come in so many milliseconds.
    fn bytes_in(&self, millis: u64) -> u64 {
        scale(self.bytes, millis, self.millis.max(1))
    }

    /// How long a unit shall take where transfers live as long as this one: of three units two come.
    fn aim(&self) -> u64 {
        let third = Duration::from_millis(self.lived.max(self.millis) / 3);
        millis(third.clamp(SHORTEST, UNIT))
    }
}

impl Search {
    /// Nothing is known yet.
    pub(super) fn new(target: &str) -> Self {
        Self { target: target.to_owned(), low: 0, high: SHALLOW, bounded: false }
    }

    /// The depth to ask for next; `None` once the answer is known. It is worth its questions: a plan that begins beyond
    /// the end of the history asks in vain for one cut after another.
    pub(super) fn next(&self) -> Option<u32> {
        match self.bounded {
            false => Some(self.high),
            true if self.high - self.low > 1 => Some(self.low + (self.high - self.low) / 2),
            true => None,
        }
    }

    /// There is history at `depth`, or not.
    pub(super) fn told(&mut self, depth: u32, there: bool) {
        if there {
            self.low = depth;
            if !self.bounded {
                self.high = depth.saturating_mul(2).min(DEEPEST);
                self.bounded = depth == DEEPEST;
            }
        } else {
            (self.high, self.bounded) = (depth, true);
        }
    }

    /// The least depth at which there is no history any more.
    pub(super) fn length(&self) -> u32 {
        self.high
    }
}

impl Plan {
    /// The plan for a history of `length` positions, after a transfer that went like `last`.
    pub(super) fn new(target: &str, length: u32, last: &Measure) -> Self {
        let aim = last.aim();
        let step = scale(u64::from(length), last.bytes_in(aim), last.total().max(1));
        let step = u32::try_from(step).unwrap_or(u32::MAX).clamp(1, (length / 2).max(1));
        Self { target: target.to_owned(), reach: length, step, aim, ..Self::default() }
    }

    /// The position at which the next unit begins; `None` if it goes up to the tip.
    pub(super) fn next(&self) -> Option<u32> {
        self.reach.checked_sub(self.step).filter(|&position| position > 0)
    }

    /// The unit that begins at `position` is here; it went like `measure`.
    pub(super) fn reached(&mut self, position: u32, measure: &Measure) {
        let done = self.reach.saturating_sub(position);
        self.reach = position;
        if self.files.take().is_some() {
            return self.came();
        }
        let step = scale(u64::from(done), measure.bytes_in(self.aim), measure.bytes.max(1));
        let step = u32::try_from(step).unwrap_or(u32::MAX);
        // One unit says little about the next: no leaps.
        self.step = step.clamp((done / 4).max(1), done.saturating_mul(4).max(1));
        self.came();
    }

    /// So many files of the next unit came, and that went like `measure`.
    pub(super) fn brought(&mut self, files: u32, measure: &Measure) {
        let next = scale(u64::from(files), measure.bytes_in(self.aim), measure.bytes.max(1));
        let next = u32::try_from(next).unwrap_or(u32::MAX);
        self.files = Some(next.clamp((files / 4).max(1), files.saturating_mul(4).max(1)));
        self.came();
    }

    /// Something came: the next may take a little longer, since the last transfer may have died early by chance.
    fn came(&mut self) {
        (self.under_way, self.deaths, self.aim) = (false, 0, (self.aim + self.aim / 8).min(millis(UNIT)));
    }

    /// What was being received died: the next are a quarter as large, and take a third of the time that it lived; if
    /// they die too, a sixteenth of that, and so on. A unit that is as short as one can be is not received whole again.
    /// What died sooner than it should have taken was not too large: that is tried again, once.
    pub(super) fn died(&mut self, measure: &Measure) {
        let by_chance = self.deaths == 0 && measure.millis < self.aim;
        (self.under_way, self.deaths, self.aim) = (false, self.deaths.saturating_add(1), measure.aim());
        if by_chance {
            return;
        }
        let less = |most: u32| most.checked_shr(self.deaths.saturating_mul(2)).unwrap_or_default().max(1);
        match self.files {
            Some(files) => self.files = Some(less(files)),
            None if self.step <= 1 => {
                let files = scale(measure.objects, self.aim, measure.millis);
                self.files = Some(u32::try_from(files).unwrap_or(u32::MAX).max(1));
            }
            None => self.step = less(self.step),
        }
    }
}

/// So many whole milliseconds.
pub(super) fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// `number` times `by` through `of`, without overflow.
fn scale(number: u64, by: u64, of: u64) -> u64 {
    u64::try_from(u128::from(number) * u128::from(by) / u128::from(of.max(1))).unwrap_or(u64::MAX)
}

/// The order of two versions as people write them: numbers by value, and one that goes on with letters before the plain
/// one (`v1.2-rc1`, `v1.2`, `v1.10`).
pub(super) fn by_version(a: &str, b: &str) -> Ordering {
    let (mut left, mut right) = (pieces(a).into_iter(), pieces(b).into_iter());
    loop {
        let order = match (left.next(), right.next()) {
            (None, None) => return a.cmp(b),
            (Some(more), None) => {
                if more.is_final() {
                    Ordering::Greater
                } else {
                    Ordering::Less
                }
            }
            (None, Some(more)) => {
                if more.is_final() {
                    Ordering::Less
                } else {
                    Ordering::Greater
                }
            }
            (Some(left), Some(right)) => left.cmp(&right),
        };
        if order != Ordering::Equal {
            return order;
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Piece<'a> {
    Text(&'a str),
    Number(u64),
}

impl Piece<'_> {
    /// Whether a version that has this more is a later one.
    fn is_final(self) -> bool {
        match self {
            Self::Number(_) => true,
            Self::Text(text) => text.starts_with('.'),
        }
    }
}

fn pieces(name: &str) -> Vec<Piece<'_>> {
    let mut pieces = Vec::new();
    let mut rest = name;
    while let Some(first) = rest.chars().next() {
        let digits = first.is_ascii_digit();
        let end = rest.find(|c: char| c.is_ascii_digit() != digits).unwrap_or(rest.len());
        let (piece, more) = rest.split_at(end);
        pieces.push(if digits { Piece::Number(piece.parse().unwrap_or(u64::MAX)) } else { Piece::Text(piece) });
        rest = more;
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measure(bytes: u64, millis: u64, objects: u64, expected: u64) -> Measure {
        Measure { bytes, millis, lived: millis, objects, expected }
    }

    #[test]
    fn only_after_much_was_lost_a_history_is_fetched_in_units() {
        let record = |attempts, measure| Record { attempts, measure, ..Record::default() };
        assert!(!Record::default().in_units());
        assert!(!record(3, Measure::default()).in_units());
        assert!(!record(1, measure(1000, 60_000, 0, 0)).in_units());
        assert!(!record(1, measure(10 << 20, 500, 0, 0)).in_units());
        assert!(record(1, measure(10 << 20, 5000, 0, 0)).in_units());
        assert!(Record { plan: Some(Plan::default()), ..Record::default() }.in_units());
    }

    #[test]
    fn a_rate_that_cannot_meet_the_deadline_is_seen_in_time() {
        let left = Duration::from_mins(5);
        for (seen, slow) in [
            (measure(1 << 20, 4_000, 1, 1000), false),
            (measure(1 << 20, 20_000, 10, 1000), true),
            (measure(1 << 20, 20_000, 100, 1000), false),
            (measure(1 << 20, 20_000, 0, 0), false),
            (measure(1 << 20, 400_000, 1000, 1000), false),
            (measure(100, 20_000, 1, 1000), false),
        ] {
            assert_eq!(seen.is_too_slow(left), slow, "{seen:?}");
        }
    }

    #[test]
    fn the_length_of_a_history_is_found_in_few_questions() {
        for length in [0, 1, 63, 64, 65, 1000, 80_000, 5_000_000, u32::MAX] {
            let mut search = Search::new("t");
            let mut asked = 0;
            while let Some(depth) = search.next() {
                search.told(depth, depth < length);
                asked += 1;
            }
            let most = 2 * (u32::BITS - length.min(DEEPEST).leading_zeros()).max(4);
            assert!(asked <= most, "{length}: {asked}");
            assert_eq!(search.length(), length.clamp(1, DEEPEST), "{length}");
        }
    }

    #[test]
    fn units_are_as_long_as_a_minute_or_a_third_of_what_transfers_live() {
        // A tenth of everything in ten minutes: a minute is a hundredth.
        let plan = Plan::new("t", 5000, &measure(10 << 20, 600_000, 1000, 10_000));
        assert_eq!((plan.reach, plan.step, plan.aim), (5000, 50, 60_000));
        // Killed after six seconds: two seconds are aimed at, also where the last unit had just begun.
        let plan = Plan::new("t", 5000, &measure(400_000, 6000, 1000, 10_000));
        assert_eq!((plan.step, plan.aim), (166, 2000));
        assert_eq!(Measure { millis: 100, ..measure(0, 6000, 0, 0) }.aim(), 2000);
        // Nothing is known, or all came: never more than half, never nothing.
        assert_eq!(Plan::new("t", 5000, &measure(100, 0, 10, 10)).step, 2500);
        assert_eq!(Plan::new("t", 1, &Measure::default()).step, 1);
    }

    #[test]
    fn the_next_unit_follows_what_the_last_one_took() {
        let plan =
            || Plan { target: "t".into(), reach: 1000, step: 100, aim: 2000, under_way: true, ..Plan::default() };
        assert_eq!(plan().next(), Some(900));
        assert_eq!(Plan { step: 1000, ..plan() }.next(), None);
        assert_eq!(Plan { step: 2000, ..plan() }.next(), None);
        for (taken, step) in [(2000, 100), (1000, 200), (4000, 50), (100, 400), (60_000, 25)] {
            let mut plan = plan();
            plan.reached(900, &measure(100_000, taken, 0, 0));
            assert_eq!((plan.reach, plan.step, plan.under_way), (900, step, false), "{taken}");
        }
        // The aim grows while units come, and what died early is tried again as it was.
        let mut plan = plan();
        plan.reached(900, &measure(100_000, 2000, 0, 0));
        assert_eq!(plan.aim, 2250);
        plan.died(&measure(50_000, 900, 0, 0));
        assert_eq!((plan.reach, plan.step, plan.aim, plan.under_way), (900, 100, 300, false));
        for step in [6, 1] {
            plan.died(&measure(50_000, 6000, 0, 0));
            assert_eq!((plan.step, plan.aim, plan.files), (step, 2000, None));
        }
    }

    #[test]
    fn a_unit_that_can_be_no_shorter_comes_by_its_files() {
        let mut plan = Plan { target: "t".into(), reach: 9, step: 1, aim: 2000, under_way: true, ..Plan::default() };
        // Three quarters of a thousand objects in six seconds, and a third of that is aimed at.
        plan.died(&measure(1 << 20, 6000, 750, 5000));
        assert_eq!((plan.step, plan.aim, plan.files, plan.under_way), (1, 2000, Some(250), false));
        for (taken, files) in [(2000, 250), (1000, 500), (4000, 125), (100, 1000), (60_000, 62)] {
            let mut plan = plan.clone();
            plan.brought(250, &measure(100_000, taken, 0, 0));
            assert_eq!(plan.files, Some(files), "{taken}");
        }
        plan.brought(250, &measure(100_000, 2000, 0, 0));
        plan.died(&measure(1 << 20, 6000, 10, 500));
        assert_eq!((plan.aim, plan.files), (2000, Some(62)));
        for _ in 0..20 {
            plan.died(&measure(0, 0, 0, 0));
        }
        assert_eq!((plan.step, plan.files), (1, Some(1)));
        // What follows it is a unit like any other, short at first.
        plan.reached(8, &measure(1, 1, 1, 1));
        assert_eq!((plan.reach, plan.step, plan.files), (8, 1, None));
    }

    #[test]
    fn versions_are_ordered_as_people_read_them() {
        let mut names = ["v10.0", "v2.0", "v1.2", "v1.10", "v1.2-rc2", "v1.2.1", "v1.2-rc10", "2024-01-02", "v1.2-rc1"];
        names.sort_by(|a, b| by_version(a, b));
        let ordered = ["2024-01-02", "v1.2-rc1", "v1.2-rc2", "v1.2-rc10", "v1.2", "v1.2.1", "v1.10", "v2.0", "v10.0"];
        // A date is no version: only the order among its kind matters.
        let (dates, versions): (Vec<&str>, Vec<&str>) = names.into_iter().partition(|name| name.starts_with('2'));
        assert_eq!((&dates[..], &versions[..]), (&ordered[..1], &ordered[1..]));
    }
}
