//! Owns the counters of the packet path. Never decides, never resets.
//!
//! A worker counts in plain integers ([`Counts`]) and publishes them at the end of each burst
//! ([`SharedCounts::publish`]); whoever asks gets the counters of one burst boundary, all of the same moment,
//! so `read = sent + answered + Σ drops` holds exactly in every snapshot.

use std::sync::atomic::{AtomicU64, Ordering, fence};

use super::drop::DropReason;
use super::status;

macro_rules! counters {
    ($($(#[$meta:meta])* $name:ident),* $(,)?) => {
        /// One direction of one worker. Packets are inner packets, that is segments.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Counts {
            $($(#[$meta])* pub $name: u64,)*
            /// Inner packets dropped, by reason.
            pub drops: [u64; DropReason::COUNT],
        }

        const SCALARS: usize = [$(stringify!($name)),*].len();
        const WORDS: usize = SCALARS + DropReason::COUNT;

        impl Counts {
            const fn words(&self) -> [u64; WORDS] {
                let mut words = [0; WORDS];
                let (scalars, drops) = words.split_at_mut(SCALARS);
                scalars.copy_from_slice(&[$(self.$name),*]);
                drops.copy_from_slice(&self.drops);
                words
            }

            fn from_words(words: [u64; WORDS]) -> Self {
                let (scalars, reasons) = words.split_at(SCALARS);
                let mut scalars = scalars.iter().copied();
                let mut drops = [0; DropReason::COUNT];
                drops.copy_from_slice(reasons);
                Self { $($name: scalars.next().unwrap_or(0),)* drops }
            }
        }
    };
}

counters! {
    /// Inner packets read.
    read,
    /// Inner packets handed to the kernel.
    sent,
    /// Inner packets answered with an ICMP error.
    answered,
    /// Bytes of inner packets read.
    read_bytes,
    /// Bytes of inner packets sent.
    sent_bytes,
    /// Reads that held more than one segment.
    read_superpackets,
    /// Sends that held more than one segment.
    sent_superpackets,
    /// System calls that read.
    read_calls,
    /// System calls that sent.
    send_calls,
    /// Fragments made.
    fragments,
    /// Runs or superpackets sent again without an offload.
    replays,
    /// Wake-ups with something to do.
    wakeups,
}

impl Counts {
    /// Counts `packets` inner packets as dropped.
    #[inline]
    pub const fn drop(&mut self, reason: DropReason, packets: u64) {
        self.drops[reason as usize] += packets;
    }

    /// Packets read and neither sent, answered nor dropped yet.
    #[must_use]
    pub fn queued(&self) -> u64 {
        let done = self.sent + self.answered + self.drops.iter().sum::<u64>();
        self.read.saturating_sub(done)
    }

    /// As `status` shows them.
    #[must_use]
    pub fn to_status(&self) -> status::Counters {
        let drops = DropReason::ALL
            .iter()
            .zip(self.drops)
            .map(|(r, n)| (r.name(), n))
            .collect();
        status::Counters {
            read: self.read,
            sent: self.sent,
            answered: self.answered,
            queued: self.queued(),
            drops,
            read_bytes: self.read_bytes,
            sent_bytes: self.sent_bytes,
            read_superpackets: self.read_superpackets,
            sent_superpackets: self.sent_superpackets,
            read_calls: self.read_calls,
            send_calls: self.send_calls,
            fragments: self.fragments,
            replays: self.replays,
            wakeups: self.wakeups,
        }
    }

    /// Adds another worker's counters.
    pub fn add(&mut self, other: &Self) {
        let mut words = self.words();
        for (word, more) in words.iter_mut().zip(other.words()) {
            *word += more;
        }
        *self = Self::from_words(words);
    }
}

/// Counters that one worker publishes and anybody reads: a sequence lock over atomics, so that a reader never
/// mixes two bursts and the writer never waits.
///
/// Interleaving: the writer makes `sequence` odd, then (release fence) stores the words, then makes it even
/// (release). A reader that saw an even `sequence` (acquire), then loaded the words, then (acquire fence) sees
/// the same `sequence`, cannot have loaded a word of a later publication: had it, the fence pair would make
/// the odd value visible to its second load.
pub struct SharedCounts {
    sequence: AtomicU64,
    words: [AtomicU64; WORDS],
}

impl Default for SharedCounts {
    fn default() -> Self {
        Self {
            sequence: AtomicU64::new(0),
            words: std::array::from_fn(|_| AtomicU64::new(0)),
        }
    }
}

impl SharedCounts {
    /// Makes `counts` visible. Called by the one worker that owns them.
    #[inline]
    pub fn publish(&self, counts: &Counts) {
        let sequence = self.sequence.load(Ordering::Relaxed);
        self.sequence.store(sequence + 1, Ordering::Relaxed);
        fence(Ordering::Release);
        for (shared, word) in self.words.iter().zip(counts.words()) {
            shared.store(word, Ordering::Relaxed);
        }
        self.sequence.store(sequence + 2, Ordering::Release);
    }

    /// The counters at the last burst boundary.
    #[must_use]
    pub fn read(&self) -> Counts {
        loop {
            let before = self.sequence.load(Ordering::Acquire);
            let words = std::array::from_fn(|i| self.words[i].load(Ordering::Relaxed));
            fence(Ordering::Acquire);
            if before.is_multiple_of(2) && before == self.sequence.load(Ordering::Relaxed) {
                return Counts::from_words(words);
            }
            std::hint::spin_loop();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;

    #[test]
    fn every_counter_survives_the_round_trip_through_words() {
        let mut counts = Counts::from_words(std::array::from_fn(|i| i as u64 + 1));
        assert_eq!(Counts::from_words(counts.words()), counts);
        let once = counts;
        counts.add(&once);
        assert_eq!(counts.words(), std::array::from_fn(|i| 2 * (i as u64 + 1)));
    }

    #[test]
    fn a_reader_never_sees_counters_that_do_not_add_up() {
        let shared = SharedCounts::default();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut counts = Counts::default();
                for round in 0..200_000_u64 {
                    counts.read += 3;
                    counts.sent += 1;
                    counts.answered += 1;
                    counts.drop(
                        DropReason::ALL[usize::try_from(round).unwrap() % DropReason::COUNT],
                        1,
                    );
                    shared.publish(&counts);
                }
                stop.store(true, Ordering::Relaxed);
            });
            let mut last = 0;
            while !stop.load(Ordering::Relaxed) {
                let counts = shared.read();
                assert_eq!(counts.queued(), 0);
                assert_eq!(counts.read, 3 * counts.sent);
                assert!(counts.read >= last);
                last = counts.read;
            }
        });
        assert_eq!(shared.read().read, 600_000);
    }
}
