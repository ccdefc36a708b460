//! Owns putting a capture's records in order of time: they come from independent rings, and whoever reads them is told
//! up to when all have come. Never holds more than 32 MiB, and never drops a record.

use crate::datapath::tap::{Record, RecordError};

/// Bytes that are held back at most. Beyond, order yields: a worker that is stuck must not fill the memory.
const MAX_HELD: usize = 32 << 20;

/// Records that may not be the oldest yet.
#[derive(Debug, Default)]
pub struct Held {
    /// Records as they came.
    bytes: Vec<u8>,
    /// When each was seen, and where it begins.
    records: Vec<(u64, usize)>,
}

impl Held {
    /// Takes in whole records.
    ///
    /// # Errors
    /// [`RecordError`]; the records before are held.
    pub fn add(&mut self, frame: &[u8]) -> Result<(), RecordError> {
        let base = self.bytes.len();
        self.bytes.extend_from_slice(frame);
        let mut rest = frame;
        while !rest.is_empty() {
            let at = base + frame.len() - rest.len();
            let (record, _, after) = Record::decode(rest)?;
            self.records.push((record.time_ns, at));
            rest = after;
        }
        Ok(())
    }

    /// Hands on, oldest first, what is not newer than `settled`, until `each` breaks off with an error. Records of one
    /// time keep the order in which they came.
    ///
    /// # Errors
    /// Those of `each`; what was not handed on by then is gone.
    pub fn release<E>(
        &mut self,
        settled: u64,
        mut each: impl FnMut(&Record, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let settled = if self.bytes.len() > MAX_HELD {
            u64::MAX
        } else {
            settled
        };
        let (bytes, mut records) = (
            std::mem::take(&mut self.bytes),
            std::mem::take(&mut self.records),
        );
        records.sort_by_key(|&(time, _)| time);
        let due = records.partition_point(|&(time, _)| time <= settled);
        let (due, later) = records.split_at(due);
        for &(_, at) in due {
            if let Ok((record, copied, _)) = Record::decode(bytes.get(at..).unwrap_or_default()) {
                each(&record, copied)?;
            }
        }
        for &(time, at) in later {
            let from = bytes.get(at..).unwrap_or_default();
            if let Ok((_, _, after)) = Record::decode(from) {
                self.records.push((time, self.bytes.len()));
                let len = from.len() - after.len();
                self.bytes
                    .extend_from_slice(from.get(..len).unwrap_or_default());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;
    use crate::datapath::tap::{Direction, Transport, Verdict};

    fn record(time_ns: u64, name: &[u8]) -> Vec<u8> {
        let record = Record {
            time_ns,
            direction: Direction::Encap,
            verdict: Verdict::Sent,
            outer: None,
            local_port: 0,
            tos: 0,
            worker: 0,
            transport: Transport::Udp,
            inner_at: 0,
            packets: 1,
            len: 1,
        };
        [&record.encode(name.len()), name].concat()
    }

    fn released(held: &mut Held, settled: u64) -> Vec<(u64, String)> {
        let mut out = Vec::new();
        held.release(settled, |record, bytes| {
            out.push((record.time_ns, String::from_utf8(bytes.to_vec()).unwrap()));
            Ok::<_, Infallible>(())
        })
        .unwrap();
        out
    }

    fn list(list: &[(u64, &str)]) -> Vec<(u64, String)> {
        list.iter().map(|&(t, name)| (t, name.to_owned())).collect()
    }

    #[test]
    fn records_come_out_by_time_and_not_before_all_older_ones_have_come() {
        let mut held = Held::default();
        // Two rings, drained one after the other: the second has older ones.
        let frame = [record(5, b"e"), record(9, b"i"), record(3, b"c")].concat();
        held.add(&frame).unwrap();
        assert_eq!(released(&mut held, 2), list(&[]));
        held.add(&[record(2, b"b"), record(5, b"later e")].concat())
            .unwrap();
        assert_eq!(
            released(&mut held, 5),
            list(&[(2, "b"), (3, "c"), (5, "e"), (5, "later e")])
        );
        assert_eq!(released(&mut held, 8), list(&[]));
        assert_eq!(released(&mut held, u64::MAX), list(&[(9, "i")]));
        assert_eq!(released(&mut held, u64::MAX), list(&[]));
    }

    #[test]
    fn what_is_held_is_bounded_and_nothing_is_dropped() {
        let mut held = Held::default();
        let big = vec![b'x'; 1 << 20];
        for time in 0..33 {
            held.add(&record(time, &big)).unwrap();
        }
        assert_eq!(released(&mut held, 0).len(), 33);
    }
}
