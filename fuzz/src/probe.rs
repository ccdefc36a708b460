//! Feeds arbitrary datagrams to the parser of probes, and reports to that of reports.

use loden::wire::probe::{HEADER_LEN, Kind, Probe, Report, asked_from};

/// Parses `data`, and writes what it says again.
///
/// # Panics
///
/// If what was written does not say the same, or a report holds more than its datagram has room for.
pub fn run(data: &[u8]) {
    let Ok(probe) = Probe::parse(data) else {
        return;
    };
    let mut again = [0xa5; HEADER_LEN];
    probe.write(&mut again);
    assert_eq!(Probe::parse(&again), Ok(probe));
    let _first = asked_from(data);
    if probe.kind != Kind::Report {
        return;
    }
    let Ok(report) = Report::parse(data) else {
        return;
    };
    assert!(report.entries.len() <= Report::room(data.len()));
    let mut again = vec![0; data.len()];
    probe.write(&mut again);
    let len = report.write(&mut again);
    assert!(len <= data.len());
    let second = Report::parse(&again[..len]).expect("its own bytes");
    assert_eq!(second.entries.len(), report.entries.len());
    assert_eq!(second.facts, report.facts);
}
