//! Owns receiving numbered datagrams and accounting for each. Never sends.

use std::io::IoSliceMut;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use nix::errno::Errno;
use nix::sys::socket::sockopt::{RcvBufForce, UdpGroSegment};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, setsockopt};

use super::probe::Probe;
use super::sender::monotonic_ns;
use super::{Processor, Received};
use crate::bench::Error;

/// Room for a second of the fastest run: what is lost is then lost by the system under test.
const RECEIVE_BUFFER: usize = 64 << 20;
/// The largest buffer that UDP_GRO may fill.
const MESSAGE: usize = 65_535;
/// How often the deadline is looked at when nothing comes.
const LOOK: Duration = Duration::from_millis(100);
/// Numbers beyond this are strays: no run is that long.
const MAX_NUMBER: u64 = 1 << 28;
/// A minute: longer latencies count as this one.
const MAX_LATENCY_NS: u64 = 60_000_000_000;

/// Receives on `listen` until an end mark, or until `limit` has passed.
///
/// # Errors
/// [`Error::Io`] if the socket cannot be made or read.
pub fn run(listen: SocketAddr, gro: bool, limit: Duration) -> Result<Received, Error> {
    Processor::Last.stay()?;
    let socket = UdpSocket::bind(listen).map_err(Error::io("bind the sink's socket"))?;
    setsockopt(&socket, RcvBufForce, &RECEIVE_BUFFER)
        .map_err(Error::io("enlarge the receive buffer"))?;
    setsockopt(&socket, UdpGroSegment, &gro).map_err(Error::io("switch UDP_GRO"))?;
    socket
        .set_read_timeout(Some(LOOK))
        .map_err(Error::io("set the receive timeout"))?;

    let mut tally = Tally::new()?;
    let mut buffer = vec![0; MESSAGE];
    let mut control = nix::cmsg_space!(i32);
    let deadline = Instant::now() + limit;
    while !tally.ended && Instant::now() < deadline {
        let (len, stride) = match receive(&socket, &mut buffer, &mut control) {
            Ok(message) => message,
            Err(Errno::EAGAIN | Errno::EINTR) => continue,
            Err(errno) => return Err(Error::io("receive a datagram")(errno)),
        };
        let now_ns = monotonic_ns()?;
        for payload in buffer[..len].chunks(stride.unwrap_or(len).max(1)) {
            tally.count(payload, now_ns);
        }
    }
    Ok(tally.report())
}

/// The length of a message and, if it holds several datagrams, the length of each but the last.
fn receive(
    socket: &UdpSocket,
    buffer: &mut [u8],
    control: &mut [u8],
) -> nix::Result<(usize, Option<usize>)> {
    let mut iov = [IoSliceMut::new(buffer)];
    let message = recvmsg::<()>(
        socket.as_raw_fd(),
        &mut iov,
        Some(control),
        MsgFlags::empty(),
    )?;
    let stride = message.cmsgs()?.find_map(|cmsg| {
        let ControlMessageOwned::UdpGroSegments(stride) = cmsg else {
            return None;
        };
        usize::try_from(stride).ok()
    });
    Ok((message.bytes, stride))
}

/// What has arrived so far.
struct Tally {
    /// One bit per number.
    seen: Vec<u64>,
    highest: Option<u64>,
    received: u64,
    duplicates: u64,
    reordered: u64,
    latency: Histogram<u64>,
    ended: bool,
}

impl Tally {
    fn new() -> Result<Self, Error> {
        let latency =
            Histogram::new_with_bounds(1, MAX_LATENCY_NS, 3).map_err(|error| Error::Report {
                program: "the packet sink",
                reason: error.to_string(),
            })?;
        Ok(Self {
            seen: Vec::new(),
            highest: None,
            received: 0,
            duplicates: 0,
            reordered: 0,
            latency,
            ended: false,
        })
    }

    fn count(&mut self, payload: &[u8], now_ns: u64) {
        let (number, stamp_ns) = match Probe::parse(payload) {
            Some(Probe::Packet { number, stamp_ns }) if number < MAX_NUMBER => (number, stamp_ns),
            Some(Probe::End) => {
                self.ended = true;
                return;
            }
            _ => return,
        };
        if !self.mark(number) {
            self.duplicates += 1;
            return;
        }
        self.received += 1;
        if self.highest.is_some_and(|highest| number < highest) {
            self.reordered += 1;
        }
        self.highest = self.highest.max(Some(number));
        self.latency
            .saturating_record(now_ns.saturating_sub(stamp_ns));
    }

    /// Notes a number; false if it was there already.
    fn mark(&mut self, number: u64) -> bool {
        let Ok(word) = usize::try_from(number / 64) else {
            return false;
        };
        if word >= self.seen.len() {
            self.seen.resize(word + 1, 0);
        }
        let bit = 1 << (number % 64);
        let fresh = self.seen[word] & bit == 0;
        self.seen[word] |= bit;
        fresh
    }

    fn report(&self) -> Received {
        Received {
            received: self.received,
            duplicates: self.duplicates,
            reordered: self.reordered,
            p50_ns: self.latency.value_at_quantile(0.5),
            p99_ns: self.latency.value_at_quantile(0.99),
            p999_ns: self.latency.value_at_quantile(0.999),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(numbers: &[u64]) -> Received {
        let mut tally = Tally::new().unwrap();
        for &number in numbers {
            let mut payload = [0; 64];
            Probe::Packet {
                number,
                stamp_ns: 1_000_000,
            }
            .write(&mut payload);
            tally.count(&payload, 1_048_000);
        }
        tally.report()
    }

    #[test]
    fn an_overtaken_packet_is_reordered_and_a_second_copy_is_a_duplicate() {
        let report = tally(&[0, 2, 1, 3, 3, 200]);
        assert_eq!(
            (report.received, report.reordered, report.duplicates),
            (5, 1, 1)
        );
    }

    #[test]
    fn latency_is_the_time_between_the_two_stamps() {
        let report = tally(&[0, 1, 2]);
        // Three digits from a nanosecond on: 48 us fall into a bucket 32 ns wide.
        assert!(report.p50_ns.abs_diff(48_000) < 32, "{}", report.p50_ns);
        assert_eq!(report.p50_ns, report.p99_ns);
    }
}
