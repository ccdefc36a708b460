//! Feeds arbitrary text to the parser of capture filters, and what it accepts to the matcher.

use loden::datapath::DropReason;
use loden::datapath::tap::filter::{Facts, Filter};
use loden::datapath::tap::{Direction, Record, Transport, Verdict};

/// Parses the first line of `data` as a filter and matches it against the rest as a packet.
///
/// # Panics
///
/// If an accepted filter is not the filter its own text says, or its negation matches the same packet.
pub fn run(data: &[u8]) {
    let end = data.iter().position(|&byte| byte == b'\n');
    let (text, packet) = data.split_at(end.unwrap_or(data.len()));
    let Ok(text) = std::str::from_utf8(text) else {
        return;
    };
    let Ok(filter) = text.parse::<Filter>() else {
        return;
    };
    let again: Filter = filter.to_string().parse().expect("its own text");
    assert_eq!(again, filter);
    let record = Record {
        time_ns: 0,
        direction: Direction::Decap,
        verdict: Verdict::Dropped(DropReason::UnknownPeer),
        outer: None,
        local_port: 0,
        tos: 0,
        worker: 0,
        transport: Transport::Udp,
        inner_at: 0,
        packets: 1,
        len: u32::try_from(packet.len()).unwrap_or(u32::MAX),
    };
    let facts = Facts::of(&record, packet);
    if let Ok(not) = format!("not ({filter})").parse::<Filter>() {
        assert_ne!(not.matches(&facts), filter.matches(&facts));
    }
}
