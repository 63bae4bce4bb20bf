//! Which open chunks are looked at, and when; what is to do with each is [`verdict`]'s to say.
//!
//! Guarantees: every open chunk is looked at once a look interval, however often the thread wakes (one that waits for
//! a place to be written less often); between two looks
//! only what may have changed is (what got batches, what was held up, what gives way), so that a wake-up costs the same
//! with ten topics and with a thousand. What has nothing open is left alone: a thousand topics are not in the caches. A topic whose end has come is left alone: its last chunk is with its end.

use crate::ingest::admit::Room;
use crate::ingest::gather::{CROWD_FLOOR_BYTES, TailRate, Verdict, Why, verdict};
use crate::ingest::topic::Topic;
use crate::ingest::writer::Writer;
use crate::limits;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::{Duration, Instant};
use storage::disk::Disk;

/// How often lane and open chunks are looked at, at most, while batches wait there to become durable: small ones do
/// not wake the thread.
const LOOK_INTERVAL_MAX: Duration = Duration::from_millis(10);
/// Looks in a commit interval at least: what is due before the next one is due now, so fewer would close chunks early.
const LOOKS_PER_INTERVAL: u32 = 5;
/// The looks of a short commit interval are this far apart.
const LOOK_INTERVAL_MIN: Duration = Duration::from_millis(1);
/// The same while all batches are safe and only their age is waited for; memory may become short meanwhile. And of
/// chunks that are to close and wait for a place.
const SAFE_LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// Largest chunks kept from one look to the next: more than can be flushed meanwhile.
const LARGEST_MAX: usize = 8 * limits::FLUSHES_IN_FLIGHT_MAX;
/// The wait of a writer that has nothing open.
const IDLE_WAIT: Duration = Duration::from_secs(3600);

/// How soon the open chunks want to be looked at, the soonest last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Pace {
    /// Nothing is open.
    Idle,
    /// Their age is waited for.
    Safe,
    /// Something waits to become durable.
    Unsafe,
}

/// What a writer knows from its last look at all open chunks.
pub(super) struct Looks<D: Disk> {
    /// When it was.
    looked: Cell<Option<Instant>>,
    /// Topics that got batches since the last decision; all others are as that found them.
    touched: RefCell<Vec<Rc<Topic<D>>>>,
    /// Topics that had something open and were not held up when they were looked at last: what every look looks at.
    /// Each has [`Topic::is_watched`] set.
    watched: RefCell<Vec<Rc<Topic<D>>>>,
    sizes: RefCell<Sizes<Topic<D>>>,
    /// Topics whose chunk was to close and found as many flushes under way as there may be, the longest waiting first.
    /// Each has [`Topic::is_held_up`] set.
    held_up: RefCell<VecDeque<Rc<Topic<D>>>>,
    /// When all of them were looked at.
    held_up_looked: Cell<Instant>,
    /// The largest open chunks at the last look that found memory short, the largest last.
    largest: RefCell<Vec<Rc<Topic<D>>>>,
    /// How soon the open chunks want to be looked at, by what is known of them.
    pace: Cell<Pace>,
    /// What may go to the tail now.
    tail_rate: Cell<TailRate>,
    tail_refilled: Cell<Instant>,
}

impl<D: Disk> Looks<D> {
    pub(super) fn new(tail_rate: TailRate) -> Self {
        Self {
            looked: Cell::new(None),
            touched: RefCell::default(),
            watched: RefCell::default(),
            sizes: RefCell::new(Sizes::new()),
            held_up: RefCell::default(),
            held_up_looked: Cell::new(Instant::now()),
            largest: RefCell::default(),
            pace: Cell::new(Pace::Idle),
            tail_rate: Cell::new(tail_rate),
            tail_refilled: Cell::new(Instant::now()),
        }
    }

    /// What may go to the tail at a time.
    pub(super) fn tail_rate(&self, now: Instant) -> TailRate {
        let mut tail = self.tail_rate.get();
        tail.refill(now.saturating_duration_since(self.tail_refilled.replace(now)));
        // Kept at once: who asks does not always take.
        self.tail_rate.set(tail);
        tail
    }

    /// What may go there after something went.
    pub(super) fn keep_tail_rate(&self, tail: TailRate) {
        self.tail_rate.set(tail);
    }

    /// Whether all that are held up are to be looked at, and notes that they are. What each is to do does not change
    /// until there is a place for it, the tail takes again what was too much for it, or it is too old to wait for one.
    fn is_time_for_held_up(&self, now: Instant, tail: &TailRate) -> bool {
        let due = tail.has(CROWD_FLOOR_BYTES)
            || SAFE_LOOK_INTERVAL <= now.saturating_duration_since(self.held_up_looked.get());
        if due {
            self.held_up_looked.set(now);
        }
        due
    }

    /// Begins with a topic that may have batches from an earlier upload.
    pub(super) fn enter(&self, topic: Rc<Topic<D>>) {
        topic.slot.set(self.sizes.borrow_mut().enter(Rc::clone(&topic)));
        self.got_batches(topic);
    }

    /// Lets go of a topic at once: its segment is not to be kept open until the next look.
    pub(super) fn leave(&self, topic: &Topic<D>) {
        self.sizes.borrow_mut().leave(topic.slot.get(), topic);
        if topic.is_watched.replace(false) {
            self.watched.borrow_mut().retain(|watched| !std::ptr::eq(Rc::as_ptr(watched), topic));
        }
    }

    /// Notes that a topic got batches.
    pub(super) fn got_batches(&self, topic: Rc<Topic<D>>) {
        self.note_size(&topic);
        self.touched.borrow_mut().push(topic);
    }

    /// Notes how large a topic's open chunk is.
    pub(super) fn note_size(&self, topic: &Topic<D>) {
        self.sizes.borrow_mut().note(topic.slot.get(), topic.open.borrow().data_bytes);
    }

    /// Looks at a topic at every look, if there will be anything to see.
    fn watch(&self, topic: Rc<Topic<D>>) {
        if topic.is_open() && !topic.is_held_up.get() && !topic.is_watched.replace(true) {
            self.watched.borrow_mut().push(topic);
        }
    }
}

/// How large the open chunks of all topics are, in data bytes, side by side: a topic that is not in the caches need not be
/// asked. One that failed may have nothing any more.
struct Sizes<T> {
    all: Vec<(u64, Option<Rc<T>>)>,
    free: Vec<usize>,
}

impl<T> Sizes<T> {
    fn new() -> Self {
        Self { all: Vec::new(), free: Vec::new() }
    }

    /// Gives a topic its slot.
    fn enter(&mut self, topic: Rc<T>) -> usize {
        let slot = self.free.pop().unwrap_or(self.all.len());
        match self.all.get_mut(slot) {
            Some(entry) => *entry = (0, Some(topic)),
            None => self.all.push((0, Some(topic))),
        }
        slot
    }

    /// Frees a topic's slot, if it is still its own.
    fn leave(&mut self, slot: usize, topic: &T) {
        if let Some(entry) = self.all.get_mut(slot)
            && entry.1.as_deref().is_some_and(|own| std::ptr::eq(own, topic))
        {
            *entry = (0, None);
            self.free.push(slot);
        }
    }

    fn note(&mut self, slot: usize, bytes: u64) {
        if let Some((size, _)) = self.all.get_mut(slot) {
            *size = bytes;
        }
    }

    /// At most so many of those that have something open, the largest last.
    fn largest(&self, most: usize) -> Vec<Rc<T>> {
        let open = self.all.iter().filter(|(bytes, _)| *bytes > 0);
        let mut open: Vec<_> = open.filter_map(|(bytes, topic)| Some((*bytes, topic.as_ref()?))).collect();
        let smaller = open.len().saturating_sub(most);
        if smaller > 0 {
            open.select_nth_unstable_by_key(smaller, |(bytes, _)| *bytes);
        }
        let mut largest = open.split_off(smaller);
        largest.sort_by_key(|(bytes, _)| *bytes);
        largest.into_iter().map(|(_, topic)| Rc::clone(topic)).collect()
    }
}

impl<D: Disk> Writer<D> {
    /// Closes what is due; returns when to look again. At every look interval, what would be due before the next
    /// one is due now, so that hundreds of slow topics share a look, and the commit behind it. Between them (large
    /// batches and ended flushes wake this thread) only what may have changed, and is due, full or in the way.
    pub(super) fn decide(self: &Rc<Self>) -> Duration {
        let now = Instant::now();
        let interval = self.look_interval();
        let is_look = self.looks.looked.get().is_none_or(|looked| interval <= now.duration_since(looked));
        if is_look {
            self.looks.looked.set(Some(now));
        }
        let horizon = if is_look { now + interval } else { now };
        let giving_way = self.giving_way(is_look);
        let touched = self.looks.touched.take();
        let watched = if is_look { self.looks.watched.take() } else { Vec::new() };
        watched.iter().for_each(|topic| topic.is_watched.set(false));
        let mut topics = giving_way.iter().cloned().chain(touched).chain(watched);
        // Those that wait longest come first. All of them are looked at again now and then, as what they hold grows old.
        let mut waiting = self.looks.held_up.take();
        let mut tail = self.looks.tail_rate(now);
        let waiting_too = is_look && self.looks.is_time_for_held_up(now, &tail);
        let mut pace = match is_look {
            true if waiting.is_empty() => Pace::Idle,
            true => Pace::Unsafe,
            false => self.looks.pace.get(),
        };
        let until_look = interval.saturating_sub(now.duration_since(self.looks.looked.get().unwrap_or(now)));
        let (mut packed, mut packed_bytes) = (Vec::new(), 0);
        while let Some(topic) = self.longest_waiting(&mut waiting, waiting_too).or_else(|| topics.next()) {
            // A topic may be here more than once: what was taken from it the first time is not there any more.
            if !topic.is_open() {
                continue;
            }
            let flushes = (self.flush_time.get().most(), self.flushing_bytes.get());
            let gives_way = giving_way.iter().any(|giving_way| Rc::ptr_eq(giving_way, &topic));
            let seen = topic.look(horizon, flushes, gives_way, &tail);
            pace = pace.max(if seen.oldest_unsafe.is_some() { Pace::Unsafe } else { Pace::Safe });
            match verdict(&self.context.rule, topic.record.format, &seen) {
                Verdict::Close(why) => {
                    // A full house: the chunk waits for a flush to end, which wakes this loop.
                    if self.has_place() || why == Why::Age {
                        if why == Why::Crowd {
                            tail.take(topic.unsafe_bytes());
                        }
                        self.flush(&topic, None);
                    } else if gives_way {
                        // Others waited longer; it is the largest still.
                        let mut largest = self.looks.largest.borrow_mut();
                        if !largest.iter().any(|known| Rc::ptr_eq(known, &topic)) {
                            largest.push(Rc::clone(&topic));
                        }
                    } else if !topic.is_held_up.replace(true) {
                        self.looks.held_up.borrow_mut().push_back(Rc::clone(&topic));
                    }
                }
                // Behind a chunk that is being written the tail would have to wait for it anyway.
                Verdict::Tail if topic.in_flight.get() == 0 && !topic.tail_in_flight.get() => {
                    let bytes = topic.unsafe_bytes();
                    tail.take(bytes);
                    if let Some(one) = self.pack_tail(&topic) {
                        packed_bytes += bytes.max(one.run.encoded_bytes());
                        packed.push(one);
                    }
                    if limits::TAILS_AT_ONCE_BYTES <= packed_bytes {
                        self.send_tails(std::mem::take(&mut packed));
                        packed_bytes = 0;
                    }
                }
                Verdict::Tail | Verdict::Wait => {}
            }
            self.looks.watch(topic);
        }
        self.send_tails(packed);
        waiting.append(&mut self.looks.held_up.borrow_mut());
        self.looks.held_up.replace(waiting);
        self.looks.keep_tail_rate(tail);
        self.looks.pace.set(pace);
        debug_assert!(self.none_is_forgotten(), "an open chunk that nobody will look at");
        match pace {
            Pace::Unsafe => until_look,
            Pace::Safe => SAFE_LOOK_INTERVAL,
            Pace::Idle => IDLE_WAIT,
        }
    }

    /// Whether every open chunk is looked at again: what is to hold behind each decision.
    fn none_is_forgotten(&self) -> bool {
        let (watched, held_up) = (self.looks.watched.borrow(), self.looks.held_up.borrow());
        let topics = self.topics.borrow();
        let mut open = topics.values().filter(|topic| topic.is_open());
        open.all(|topic| {
            let is_known = |known: &Rc<Topic<D>>| Rc::ptr_eq(known, topic);
            let is_listed = watched.iter().any(is_known) || held_up.iter().any(is_known);
            is_listed && self.looks.pace.get() >= Pace::Safe
        })
    }

    /// The next of those that were held up, if it can be helped or is to be looked at.
    fn longest_waiting(&self, waiting: &mut VecDeque<Rc<Topic<D>>>, all: bool) -> Option<Rc<Topic<D>>> {
        let topic = if all || self.has_place() { waiting.pop_front()? } else { return None };
        topic.is_held_up.set(false);
        Some(topic)
    }

    /// Whether another flush may begin.
    pub(super) fn has_place(&self) -> bool {
        self.flushes.get() < limits::FLUSHES_IN_FLIGHT_MAX
    }

    /// How soon what waits to become durable is looked at again.
    pub(super) fn look_interval(&self) -> Duration {
        LOOK_INTERVAL_MAX.min(self.context.rule.commit_interval / LOOKS_PER_INTERVAL).max(LOOK_INTERVAL_MIN)
    }

    /// The largest open chunks, to be closed because memory is short: as many as make, with what is
    /// being written already, a quarter of the budget. More would only make smaller row groups.
    fn giving_way(&self, is_look: bool) -> Vec<Rc<Topic<D>>> {
        let mut largest = self.looks.largest.borrow_mut();
        if self.context.budget.room() != Room::Short {
            largest.clear();
            return Vec::new();
        }
        let enough = self.context.budget_bytes / 4;
        let places = limits::FLUSHES_IN_FLIGHT_MAX.saturating_sub(self.flushes.get());
        let mut freeing = self.flushing_bytes.get();
        let mut chosen = Vec::new();
        if is_look || largest.is_empty() && places > 0 && freeing < enough {
            *largest = self.looks.sizes.borrow().largest(LARGEST_MAX);
        }
        while chosen.len() < places
            && freeing < enough
            && let Some(topic) = largest.pop()
        {
            let bytes = topic.open.borrow().data_bytes;
            // It may have closed, failed or ended since the look.
            if bytes > 0 && !topic.ended.get() {
                freeing += bytes;
                chosen.push(topic);
            } else {
                self.looks.note_size(&topic);
            }
        }
        chosen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_are_found_wherever_they_are_and_slots_are_used_again() {
        let mut sizes = Sizes::new();
        let topics: Vec<Rc<u64>> = [5, 0, 9, 7, 2].map(Rc::new).into();
        let slots: Vec<usize> = topics.iter().map(|topic| sizes.enter(Rc::clone(topic))).collect();
        for (topic, slot) in topics.iter().zip(&slots) {
            sizes.note(*slot, **topic);
        }
        let largest = |sizes: &Sizes<u64>, most| sizes.largest(most).iter().map(|topic| **topic).collect::<Vec<_>>();
        assert_eq!(largest(&sizes, 9), [2, 5, 7, 9], "one has nothing open");
        assert_eq!(largest(&sizes, 2), [7, 9]);
        sizes.leave(slots[2], &topics[2]);
        assert_eq!(largest(&sizes, 2), [5, 7]);
        let other = Rc::new(6);
        let slot = sizes.enter(Rc::clone(&other));
        assert_eq!(slot, slots[2]);
        assert_eq!(largest(&sizes, 2), [5, 7], "nothing of it is open yet");
        sizes.note(slot, 6);
        // Whoever leaves twice takes nobody else's slot.
        sizes.leave(slots[2], &topics[2]);
        assert_eq!(largest(&sizes, 2), [6, 7]);
        assert!(sizes.free.is_empty());
    }
}
