//! Owns the hand-over of an immutable table from one writer to many readers. Never blocks a reader, never
//! lets a reader free a table.
//!
//! A reader looks at one atomic number per burst; only when it changed does it take a new reference. The
//! last reference to an old table is always the writer's: it keeps retired tables until nobody else holds
//! them, because freeing 10 000 routes on the packet path would be a pause.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;

/// The table that is in force.
struct Current<T> {
    table: ArcSwap<T>,
    /// Counts the publications. It is raised after the table was swapped (release), so whoever sees a number
    /// (acquire) finds its table or a later one.
    number: AtomicU64,
}

/// The writing side; there is one.
pub struct Publisher<T> {
    current: Arc<Current<T>>,
    retired: Vec<Arc<T>>,
}

impl<T> Publisher<T> {
    /// Starts with `value`.
    pub fn new(value: T) -> Self {
        Self {
            current: Arc::new(Current {
                table: ArcSwap::from_pointee(value),
                number: AtomicU64::new(0),
            }),
            retired: Vec::new(),
        }
    }

    /// Makes `value` what readers see from their next [`Reader::load`] on, and frees what no reader holds
    /// any more. At most two retired tables per reader stay: one that it uses, or, while it takes the next, both.
    pub fn publish(&mut self, value: T) {
        self.retired.push(self.current.table.swap(Arc::new(value)));
        self.current.number.fetch_add(1, Ordering::Release);
        self.collect();
    }

    /// Frees retired tables that no reader holds.
    pub fn collect(&mut self) {
        // A reader that holds none of these can never get one again: `current` moved on before it was
        // retired. So a count of one stays one, and the drop below is the last.
        self.retired.retain(|table| Arc::strong_count(table) > 1);
    }

    /// How many retired tables are still held by readers.
    #[must_use]
    pub const fn retired_count(&self) -> usize {
        self.retired.len()
    }

    /// A new reader.
    #[must_use]
    pub fn reader(&self) -> Reader<T> {
        let number = self.current.number.load(Ordering::Acquire);
        Reader {
            current: Arc::clone(&self.current),
            number,
            table: self.current.table.load_full(),
        }
    }

    /// The current table, for the writing side.
    #[must_use]
    pub fn current(&self) -> Arc<T> {
        self.current.table.load_full()
    }
}

/// The reading side; one per worker.
pub struct Reader<T> {
    current: Arc<Current<T>>,
    /// The publication that `table` is of, or one before it.
    number: u64,
    table: Arc<T>,
}

impl<T> Reader<T> {
    /// Whether a table was published since the last [`Reader::take`]: one atomic load.
    #[inline]
    #[must_use]
    pub fn is_stale(&self) -> bool {
        self.current.number.load(Ordering::Acquire) != self.number
    }

    /// Takes the newest table, and gives the one before back to the writer. Wait-free.
    pub fn take(&mut self) {
        self.number = self.current.number.load(Ordering::Acquire);
        self.table = self.current.table.load_full();
    }

    /// The table that was taken last.
    #[inline]
    #[must_use]
    pub const fn held(&self) -> &Arc<T> {
        &self.table
    }

    /// The current table, to be used for one burst. Wait-free: one atomic load when nothing changed.
    #[inline]
    pub fn load(&mut self) -> &Arc<T> {
        if self.is_stale() {
            self.take();
        }
        self.held()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    /// Counts how many tables were freed, and on which thread.
    struct Table {
        number: u64,
        copies: Vec<u64>,
        freed_elsewhere: Arc<AtomicUsize>,
        home: thread::ThreadId,
    }

    impl Drop for Table {
        fn drop(&mut self) {
            if thread::current().id() != self.home {
                self.freed_elsewhere.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    #[test]
    fn readers_see_whole_tables_in_order_and_never_free_one() {
        let freed_elsewhere = Arc::new(AtomicUsize::new(0));
        let home = thread::current().id();
        let table = |number: u64| Table {
            number,
            copies: vec![number; 64],
            freed_elsewhere: Arc::clone(&freed_elsewhere),
            home,
        };
        let last = 20_000;
        let mut publisher = Publisher::new(table(0));
        thread::scope(|scope| {
            let readers: Vec<_> = (0..3)
                .map(|_| {
                    let mut reader = publisher.reader();
                    scope.spawn(move || {
                        let mut seen = 0;
                        while seen < last {
                            let table = reader.load();
                            assert!(table.number >= seen, "went back in time");
                            seen = table.number;
                            assert!(table.copies.iter().all(|&c| c == seen), "torn table");
                        }
                        reader
                    })
                })
                .collect();
            for number in 1..=last {
                publisher.publish(table(number));
                assert!(
                    publisher.retired_count() <= 2 * 3,
                    "two retired tables per reader at most"
                );
            }
            // Kept until after the writer's last reference, as a worker's is until it is joined.
            let readers: Vec<_> = readers.into_iter().map(|r| r.join().unwrap()).collect();
            drop(readers);
        });
        assert_eq!(freed_elsewhere.load(Ordering::Relaxed), 0);
        publisher.collect();
        assert_eq!(publisher.retired_count(), 0);
    }
}
