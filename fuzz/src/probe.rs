//! Feeds arbitrary datagrams to the parser of probes, and reports and what is told of traces to theirs.

use loden::wire::probe::{HEADER_LEN, Kind, Order, Probe, Report, Sights, asked_from};

/// Parses `data`, and writes what it says again.
///
/// # Panics
///
/// If what was written does not say the same, a report holds more than its datagram has room for, or something could be
/// told that a terminal would obey.
pub fn run(data: &[u8]) {
    let Ok(probe) = Probe::parse(data) else {
        return;
    };
    let mut again = [0xa5; HEADER_LEN];
    probe.write(&mut again);
    assert_eq!(Probe::parse(&again), Ok(probe));
    let (_first, _order) = (asked_from(data), Order::of(data));
    match probe.kind {
        Kind::Report => report(data),
        Kind::Sights => sights(data),
        Kind::Request | Kind::Answer | Kind::Ask | Kind::Watch => {}
    }
}

fn report(data: &[u8]) {
    let Ok(report) = Report::parse(data) else {
        return;
    };
    assert!(report.entries.len() <= Report::room(data.len()));
    let mut again = vec![0; data.len()];
    let len = report.write(&mut again);
    assert!(len <= data.len());
    let second = Report::parse(&again[..len]).expect("its own bytes");
    assert_eq!(second.entries.len(), report.entries.len());
    assert_eq!(second.facts, report.facts);
}

fn sights(data: &[u8]) {
    let Ok(sights) = Sights::parse(data) else {
        return;
    };
    let mut texts = sights.lines.iter().map(|(_, text)| text);
    assert!(texts.all(|text| text.bytes().all(|byte| (b' '..=b'~').contains(&byte))));
    let mut again = vec![0; data.len()];
    let len = sights.write(&mut again);
    let second = Sights::parse(&again[..len]).expect("its own bytes");
    assert_eq!(second, sights);
}
