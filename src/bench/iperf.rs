//! Owns one iperf3 run between two pods: server, client, and reading the client's report. Never decides
//! how long or how often.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde::Deserialize;

use super::Error;
use super::service::{Kind, Order};
use super::stage::Stage;
use super::system::Path as Route;

const PROGRAM: &str = "iperf3";
/// Connecting, slow start and the exchange of results come on top of the measured time.
const EXTRA: Duration = Duration::from_secs(20);

/// What one run achieved, counted at the receiver.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TcpResult {
    /// Payload bits per second.
    pub bits_per_second: f64,
    /// Payload bytes.
    pub bytes: f64,
    /// Retransmitted segments.
    pub retransmits: f64,
}

/// Sends over `streams` connections along `route` for `seconds`; with `both`, over as many the other way at the same
/// time.
///
/// # Errors
/// [`Error::Lab`] or [`Error::Remote`] if a program fails, [`Error::Report`] if the client's report is not understood.
pub fn run(
    stage: &dyn Stage,
    route: &Route,
    streams: u8,
    both: bool,
    seconds: u32,
) -> Result<TcpResult, Error> {
    let time = Duration::from_secs(u64::from(seconds));
    let order = Order::new(Kind::Iperf, route.addr, time + EXTRA);
    let _server = stage.serve(route, Path::new(PROGRAM), order)?;
    let (addr, port) = (route.addr.to_string(), order.socket().port().to_string());
    let mut client = Command::new(PROGRAM);
    client.args(["-c", &addr, "-p", &port, "-J", "-i", "0"]);
    client.args(["--connect-timeout", "3000"]);
    client.args(["-t", &seconds.to_string(), "-P", &streams.to_string()]);
    if both {
        client.arg("--bidir");
    }
    let client = stage.spawn(route, "iperf3-client", &mut client)?;
    parse(&client.finish(order.limit(), stage.interrupt())?)
}

#[derive(Deserialize)]
struct Report {
    end: End,
}

#[derive(Deserialize)]
struct End {
    sum_sent: Sent,
    sum_received: Received,
    sum_sent_bidir_reverse: Option<Sent>,
    sum_received_bidir_reverse: Option<Received>,
}

#[derive(Deserialize)]
struct Sent {
    #[serde(default)]
    retransmits: f64,
}

#[derive(Default, Deserialize)]
struct Received {
    bytes: f64,
    bits_per_second: f64,
}

fn parse(text: &str) -> Result<TcpResult, Error> {
    let report: Report = serde_json::from_str(text).map_err(|error| Error::Report {
        program: "iperf3",
        reason: error.to_string(),
    })?;
    let end = report.end;
    let back = end.sum_received_bidir_reverse.unwrap_or_default();
    let bytes = end.sum_received.bytes + back.bytes;
    if bytes <= 0.0 {
        return Err(Error::Report {
            program: "iperf3",
            reason: "no byte arrived".to_owned(),
        });
    }
    Ok(TcpResult {
        bits_per_second: end.sum_received.bits_per_second + back.bits_per_second,
        bytes,
        retransmits: end.sum_sent.retransmits
            + end
                .sum_sent_bidir_reverse
                .map_or(0.0, |sent| sent.retransmits),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_receivers_figures_are_taken_and_the_senders_retransmissions() {
        let text = r#"{"start":{},"intervals":[],"end":{
            "sum_sent":{"bytes":200,"bits_per_second":1600.0,"retransmits":3},
            "sum_received":{"bytes":100,"bits_per_second":800.0}}}"#;
        let result = parse(text).unwrap();
        assert_eq!(
            result,
            TcpResult {
                bits_per_second: 800.0,
                bytes: 100.0,
                retransmits: 3.0
            }
        );
    }

    #[test]
    fn both_directions_of_a_run_both_ways_count() {
        let text = r#"{"end":{
            "sum_sent":{"retransmits":3},"sum_received":{"bytes":100,"bits_per_second":800.0},
            "sum_sent_bidir_reverse":{"retransmits":4},
            "sum_received_bidir_reverse":{"bytes":10,"bits_per_second":80.0}}}"#;
        assert_eq!(
            parse(text).unwrap(),
            TcpResult {
                bits_per_second: 880.0,
                bytes: 110.0,
                retransmits: 7.0
            }
        );
    }

    #[test]
    fn a_run_without_a_byte_is_no_measurement() {
        let text = r#"{"end":{"sum_sent":{},"sum_received":{"bytes":0,"bits_per_second":0}}}"#;
        assert!(matches!(parse(text), Err(Error::Report { .. })));
        assert!(matches!(
            parse(r#"{"error":"refused"}"#),
            Err(Error::Report { .. })
        ));
    }
}
