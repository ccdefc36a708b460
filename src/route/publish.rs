//! Owns the hand-over of an immutable table from one writer to many readers. Never blocks a reader, never
//! lets a reader free a table.
//!
//! A reader looks at one atomic pointer per burst; only when it changed does it take a new reference. The
//! last reference to an old table is always the writer's: it keeps retired tables until nobody else holds
//! them, because freeing 10 000 routes on the packet path would be a pause.

use std::sync::Arc;

use arc_swap::{ArcSwap, Cache};

/// The writing side; there is one.
pub struct Publisher<T> {
    current: Arc<ArcSwap<T>>,
    retired: Vec<Arc<T>>,
}

impl<T> Publisher<T> {
    /// Starts with `value`.
    pub fn new(value: T) -> Self {
        Self {
            current: Arc::new(ArcSwap::from_pointee(value)),
            retired: Vec::new(),
        }
    }

    /// Makes `value` what readers see from their next [`Reader::load`] on, and frees what no reader holds
    /// any more. At most one retired table per reader stays.
    pub fn publish(&mut self, value: T) {
        self.retired.push(self.current.swap(Arc::new(value)));
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
        Reader(Cache::new(Arc::clone(&self.current)))
    }

    /// The current table, for the writing side.
    #[must_use]
    pub fn current(&self) -> Arc<T> {
        self.current.load_full()
    }
}

/// The reading side; one per worker.
pub struct Reader<T>(Cache<Arc<ArcSwap<T>>, Arc<T>>);

impl<T> Reader<T> {
    /// The current table, to be used for one burst. Wait-free: one atomic load when nothing changed.
    #[inline]
    pub fn load(&mut self) -> &Arc<T> {
        self.0.load()
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
                    publisher.retired_count() <= 4,
                    "one retired table per reader at most"
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
