//! Owns the small hash table from a flow or a next hop to its most recent item in the burst. Never owns keys:
//! the caller compares what the index points at.
//!
//! Forgetting an entry is always safe (its item merely stops growing), which buys three things: a lookup
//! probes at most [`PROBES`] slots whatever an adversary sends, a crowded neighbourhood evicts instead of
//! growing, and clearing is one increment.

/// Slots looked at per lookup: one 64-byte cache line of them.
const PROBES: usize = 8;

/// More slots than this cost cache misses without lowering evictions noticeably.
const MAX_SLOTS: usize = 4096;

#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    hash: u32,
    index: u16,
    /// The slot is empty unless this is the table's epoch.
    epoch: u16,
}

/// Open addressing with bounded probing; entries live until [`Table::clear`].
#[derive(Debug)]
pub(super) struct Table {
    slots: Box<[Slot]>,
    epoch: u16,
}

impl Table {
    /// A table for bursts of up to `capacity` items.
    pub(super) fn new(capacity: usize) -> Self {
        let slots = capacity
            .saturating_mul(2)
            .clamp(PROBES, MAX_SLOTS)
            .next_power_of_two();
        Self {
            slots: vec![Slot::default(); slots].into_boxed_slice(),
            epoch: 1,
        }
    }

    /// What `accept` makes of the first item of this hash that it accepts.
    #[inline]
    pub(super) fn find<T>(&self, hash: u32, mut accept: impl FnMut(u16) -> Option<T>) -> Option<T> {
        for at in self.probe(hash) {
            let slot = self.slots.get(at).filter(|slot| slot.epoch == self.epoch)?;
            if slot.hash == hash
                && let Some(accepted) = accept(slot.index)
            {
                return Some(accepted);
            }
        }
        None
    }

    /// Enters an item in the first slot that is empty or whose item `is_closed`; where there is none, takes
    /// the home slot and returns the item that lost it.
    #[inline]
    pub(super) fn insert(
        &mut self,
        hash: u32,
        index: u16,
        mut is_closed: impl FnMut(u16) -> bool,
    ) -> Option<u16> {
        let entry = Slot {
            hash,
            index,
            epoch: self.epoch,
        };
        for at in self.probe(hash) {
            if let Some(slot) = self.slots.get_mut(at)
                && (slot.epoch != entry.epoch || is_closed(slot.index))
            {
                *slot = entry;
                return None;
            }
        }
        let home = self.probe(hash).start_at;
        let slot = self.slots.get_mut(home)?;
        Some(std::mem::replace(slot, entry).index)
    }

    /// Forgets every entry.
    #[inline]
    pub(super) fn clear(&mut self) {
        self.epoch = self.epoch.wrapping_add(1);
        if self.epoch == 0 {
            self.slots.fill(Slot::default());
            self.epoch = 1;
        }
    }

    fn probe(&self, hash: u32) -> Probe {
        let mask = self.slots.len() - 1;
        let start_at = hash as usize & mask;
        Probe {
            start_at,
            step: 0,
            mask,
        }
    }
}

/// The slots of one hash, home first.
struct Probe {
    start_at: usize,
    step: usize,
    mask: usize,
}

impl Iterator for Probe {
    type Item = usize;

    #[inline]
    fn next(&mut self) -> Option<usize> {
        if self.step == PROBES {
            return None;
        }
        let at = (self.start_at + self.step) & self.mask;
        self.step += 1;
        Some(at)
    }
}

/// Stirs one more word into a hash (the multiplier is 2^64 divided by the golden ratio).
#[inline]
pub(super) const fn mix(hash: u64, word: u64) -> u64 {
    let product = (hash ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    product ^ (product >> 32)
}

/// The better half of a hash.
#[inline]
pub(super) const fn finish(hash: u64) -> u32 {
    let [a, b, c, d, ..] = hash.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes();
    u32::from_be_bytes([a, b, c, d])
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPEN: fn(u16) -> bool = |_| false;
    const CLOSED: fn(u16) -> bool = |_| true;

    fn only(wanted: u16) -> impl Fn(u16) -> Option<u16> {
        move |index| (index == wanted).then_some(index)
    }

    #[test]
    fn entries_are_found_by_hash_and_match_until_cleared() {
        let mut table = Table::new(16);
        assert_eq!(table.insert(5, 1, OPEN), None);
        assert_eq!(table.insert(5, 2, OPEN), None);
        assert_eq!(table.find(5, only(2)), Some(2));
        assert_eq!(table.find(5, only(3)), None);
        assert_eq!(table.find(5 + 32, Some), None);
        table.clear();
        assert_eq!(table.find(5, Some), None);
    }

    #[test]
    fn a_crowded_neighbourhood_gives_up_its_home_slot() {
        let mut table = Table::new(16);
        for index in 0..8 {
            assert_eq!(table.insert(3, index, OPEN), None);
        }
        assert_eq!(table.insert(3, 8, OPEN), Some(0));
        assert_eq!(table.find(3, only(0)), None);
        assert_eq!(table.find(3, only(8)), Some(8));
    }

    #[test]
    fn a_closed_item_gives_way_before_a_free_slot_is_taken() {
        let mut table = Table::new(16);
        table.insert(3, 0, OPEN);
        assert_eq!(table.insert(3, 1, CLOSED), None);
        assert_eq!(table.find(3, Some), Some(1));
        assert_eq!(table.find(3, only(0)), None);
    }

    #[test]
    fn the_probes_wrap_around_the_end_of_the_slots() {
        let mut table = Table::new(16);
        table.insert(31, 0, OPEN);
        table.insert(31, 1, OPEN);
        assert_eq!(table.find(31, only(1)), Some(1));
    }

    #[test]
    fn an_entry_does_not_come_back_when_the_epoch_wraps() {
        let mut table = Table::new(16);
        table.insert(5, 1, OPEN);
        for _ in 0..=u16::MAX {
            table.clear();
            assert_eq!(table.find(5, Some), None);
        }
    }
}
