//! Owns `loden capture`: asks the daemon for packets and writes them as text or pcapng. Never decides what
//! became of a packet: the daemon's workers say so.

mod sink;

use std::collections::HashMap;
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep_until};

use serde_json::Value;

use super::status::SocketArgs;
use crate::addr::Mac;
use crate::datapath::tap::filter::Filter;
use crate::datapath::tap::{Lost, MAX_SNAP_LEN};
use crate::debug::order::Held;
use crate::debug::pcapng::Origin;
use crate::debug::socket::{self, Request};
use crate::debug::stream;
use crate::debug::watch::scene::{Place, reading};
use crate::shutdown::Shutdown;
use sink::Sink;

/// Flags of `loden capture`.
#[derive(Debug, Args)]
#[command(after_help = "\
EXPRESSION is a subset of tcpdump's, over inner packets, and words of its own:
  [src|dst] host A | [src|dst] net P | [tcp|udp] [src|dst] port N | portrange A-B
  ip ip6 tcp udp icmp icmp6 | proto N | less N | greater N
  peer A | encap | decap | reason NAME
  sent | delivered | answered | dropped, and where the kernel carries packets handed | arrived
joined with and, or, not and parentheses.

Examples:
  loden capture --dropped-only
  loden capture host 198.18.3.7 and tcp port 443 -w pod.pcapng
  loden capture -w - | tshark -r -")]
pub struct CaptureArgs {
    /// Which packets; all of them by default
    #[arg(value_name = "EXPRESSION")]
    expression: Vec<String>,

    /// Write pcapng to FILE, `-` for standard output, instead of text
    #[arg(short, long, value_name = "FILE")]
    write: Option<PathBuf>,

    /// End after so many packets (superpackets count as one)
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,

    /// End after so many seconds
    #[arg(short, long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    duration: Option<u64>,

    /// Bytes kept of each packet
    #[arg(short, long, value_name = "BYTES", default_value_t = MAX_SNAP_LEN,
          value_parser = snap_len)]
    snaplen: usize,

    /// Begin a new file after so many MiB
    #[arg(short = 'C', long, value_name = "MIB", requires = "write",
          value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    file_size: Option<u64>,

    /// Keep so many files, overwriting the oldest
    #[arg(short = 'W', long, value_name = "N", requires = "file_size",
          value_parser = clap::value_parser!(u32).range(1..))]
    files: Option<u32>,

    /// Only what is exchanged with this peer, by its underlay address
    #[arg(long, value_name = "ADDRESS")]
    peer: Option<IpAddr>,

    /// Only one direction: `encap` is from this node's pods to peers, `decap` the reverse
    #[arg(long, value_name = "DIRECTION", value_parser = ["encap", "decap"])]
    direction: Option<String>,

    /// Only what was dropped
    #[arg(long)]
    dropped_only: bool,

    /// Superpackets as the segments on the wire, not whole
    #[arg(long)]
    segments: bool,

    /// Packets as the datagrams that carry them, outer headers in front; implies --segments
    #[arg(long, requires = "write")]
    outer: bool,

    #[command(flatten)]
    at: SocketArgs,
}

fn snap_len(text: &str) -> Result<usize, String> {
    let wrong = || format!("give a number from 1 to {MAX_SNAP_LEN}");
    let number: usize = text.parse().map_err(|_not| wrong())?;
    (1..=MAX_SNAP_LEN)
        .contains(&number)
        .then_some(number)
        .ok_or_else(wrong)
}

impl CaptureArgs {
    /// The expression and the flags that say the same, as one.
    fn filter(&self) -> anyhow::Result<Filter> {
        let given: Filter = self.expression.join(" ").parse()?;
        let mut words = Vec::new();
        words.extend(self.peer.map(|peer| format!("peer {peer}")));
        words.extend(self.direction.clone());
        words.extend(self.dropped_only.then(|| "dropped".to_owned()));
        Ok(given.and(words.join(" and ").parse()?))
    }
}

pub(super) fn run(args: &CaptureArgs) -> anyhow::Result<()> {
    let filter = args.filter()?.to_string();
    let mut shutdown = Shutdown::install().context("cannot wait for signals")?;
    let path = args.at.path();
    let request = Request::Capture {
        filter: filter.clone(),
        snap_len: args.snaplen,
        segments: args.segments || args.outer,
        outer: args.outer,
    };
    let (answer, stream) = socket::open(&path, &request)?;
    let differ = "the daemon's answer names no address: daemon and client differ in version";
    let origin = Origin {
        ends: serde_json::from_value(answer["ends"].clone()).context(differ)?,
        watched: serde_json::from_value(answer["watched"].clone()).context(differ)?,
        macs: macs(&answer["macs"]),
        filter,
    };
    if let Some(sight) = sight(&origin.watched, &answer["unwatched"]) {
        // A closed standard error leaves nowhere to say so.
        let _said = writeln!(io::stderr(), "{sight}");
    }
    let mut sink = Sink::open(args, origin)?;
    stream.set_nonblocking(true)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let end = runtime.block_on(read(args, &mut shutdown, stream, &mut sink))?;
    let written = sink.written;
    sink.end(end.lost)?;
    let lost = match end.lost.records {
        0 => String::new(),
        records => format!(
            ", {records} more ({} inner packets) lost because they were not fetched in time",
            end.lost.packets
        ),
    };
    // A closed standard error leaves nowhere to say so.
    let _said = writeln!(io::stderr(), "{written} packets captured{lost}");
    if end.hung_up {
        bail!("the daemon ended the capture: it stopped, or opened its data plane again");
    }
    Ok(())
}

/// What is seen otherwise than by workers, or not at all; none where workers see everything.
fn sight(watched: &[Place], unwatched: &Value) -> Option<String> {
    if let Some(why) = unwatched.as_str() {
        return Some(format!(
            "packets that the kernel carries are not shown: {why}"
        ));
    }
    reading(watched)
}

/// MAC addresses of peers; what is none is left out.
fn macs(answer: &Value) -> HashMap<IpAddr, Mac> {
    let all = answer.as_object().into_iter().flatten();
    let pairs =
        all.filter_map(|(addr, mac)| Some((addr.parse().ok()?, mac.as_str()?.parse().ok()?)));
    pairs.collect()
}

/// How a capture ended.
struct End {
    lost: Lost,
    hung_up: bool,
}

async fn read(
    args: &CaptureArgs,
    shutdown: &mut Shutdown,
    stream: std::os::unix::net::UnixStream,
    sink: &mut Sink,
) -> anyhow::Result<End> {
    let mut stream = UnixStream::from_std(stream)?;
    let limit = args.duration.map(Duration::from_secs);
    let limit = limit.and_then(|limit| Instant::now().checked_add(limit));
    let (mut bytes, mut held) = (Vec::new(), Held::default());
    let mut end = End {
        lost: Lost::default(),
        hung_up: false,
    };
    let mut over = false;
    while !over {
        let mut settled = u64::MAX;
        tokio::select! {
            frame = stream::next_frame(&mut stream, &mut bytes) => {
                match frame.context("reading from the daemon")? {
                    Some(told) => (end.lost, settled) = (told.lost, told.settled),
                    None => end.hung_up = true,
                }
            }
            () = sleep_until(limit.unwrap_or_else(Instant::now)), if limit.is_some() => over = true,
            _ = shutdown.requested() => over = true,
        }
        over |= end.hung_up;
        if !over {
            held.add(&bytes)?;
        }
        let is_full = |sink: &Sink| args.count.is_some_and(|count| sink.written >= count);
        let written = held
            .release(settled, |record, copied| {
                if is_full(sink) {
                    return Ok(());
                }
                sink.packet(record, copied)
            })
            .and_then(|()| sink.flush());
        match written {
            // Whoever reads has seen enough.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => over = true,
            written => written?,
        }
        over |= is_full(sink);
    }
    Ok(end)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::sink::line;
    use super::*;
    use crate::datapath::tap::{Direction, Record, Transport};

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: CaptureArgs,
    }

    fn filter(line: &str) -> String {
        let words = std::iter::once("x").chain(line.split_whitespace());
        Line::parse_from(words).args.filter().unwrap().to_string()
    }

    #[test]
    fn flags_narrow_the_expression() {
        assert_eq!(filter(""), "");
        assert_eq!(
            filter("tcp or udp --dropped-only --peer 192.0.2.1 --direction decap"),
            "proto 6 or proto 17 and (peer 192.0.2.1 and decap and dropped)"
        );
    }

    #[test]
    fn line_names_both_ends_and_the_outcome() {
        let mut packet = Vec::new();
        etherparse::PacketBuilder::ipv4([198, 18, 1, 2], [198, 18, 2, 3], 9)
            .udp(7, 53)
            .write(&mut packet, b"x")
            .unwrap();
        let record = Record {
            time_ns: 86_400_000_000_000 + 3_661_000_002_000,
            direction: Direction::Encap,
            verdict: crate::datapath::tap::Verdict::Sent,
            outer: Some("192.0.2.2:8285".parse().unwrap()),
            local_port: 1,
            tos: 0,
            worker: 1,
            transport: Transport::Udp,
            inner_at: 0,
            packets: 3,
            len: 29,
        };
        assert_eq!(
            line(&record, &packet),
            "01:01:01.000002 encap 198.18.1.2:7 > 198.18.2.3:53 udp 29 bytes: \
             sent, to 192.0.2.2:8285 over udp, 3 packets, worker 1"
        );
    }
}
