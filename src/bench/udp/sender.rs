//! Owns sending numbered datagrams at a steady rate. Never receives.

use std::io::IoSlice;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::prctl::set_timerslack;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::time::ClockId;

use super::probe::{HEAD_LEN, Probe};
use super::{Processor, Sent, Traffic};
use crate::bench::Error;
use crate::lab::wait::pause;

/// The last packets must be through before the end mark, even those that wait behind a full queue.
const QUIET: Duration = Duration::from_millis(20);
/// End marks may get lost as any datagram may.
const END_MARKS: u32 = 5;

/// Sends `traffic` to `dest`.
///
/// The pace is kept by sleeping, never by spinning, which would take a core from what is measured; after a
/// sleep that took too long, the sends that are due follow at once.
///
/// # Errors
/// [`Error::Io`] if the socket cannot be used. A full queue is no error: the datagram is not counted.
pub fn run(dest: SocketAddr, traffic: &Traffic) -> Result<Sent, Error> {
    Processor::First.stay()?;
    let local = if dest.is_ipv4() {
        "0.0.0.0:0"
    } else {
        "[::]:0"
    };
    let socket = UdpSocket::bind(local).map_err(Error::io("bind the sender's socket"))?;
    socket
        .connect(dest)
        .map_err(Error::io("connect the sender's socket"))?;
    // The default slack of 50 us would stretch every sleep by as much.
    set_timerslack(1).map_err(Error::io("set the timer slack"))?;

    let burst = traffic.burst.max(1);
    let interval = Duration::from_secs(1) * u32::from(burst) / traffic.rate.max(1);
    let len = usize::from(traffic.len).max(HEAD_LEN);
    let mut buffer = vec![0_u8; len * usize::from(burst)];
    let mut segment = (burst > 1).then_some(traffic.len);
    let (start, mut due) = (Instant::now(), Duration::ZERO);
    let (mut next, mut sent) = (0, 0);
    while due < traffic.time {
        let early = due.saturating_sub(start.elapsed());
        if !early.is_zero() {
            pause(early);
        }
        let stamp_ns = monotonic_ns()?;
        for (number, payload) in (next..).zip(buffer.chunks_mut(len)) {
            Probe::Packet { number, stamp_ns }.write(payload);
        }
        // Segments are not fragmented, so longer ones than the path takes are refused (udp(7)).
        if let Some(segment_len) = segment {
            match send(&socket, &buffer, Some(segment_len)) {
                Ok(taken) => sent += u64::from(taken) * u64::from(burst),
                Err(Errno::EINVAL | Errno::EMSGSIZE) if next == 0 => segment = None,
                Err(errno) => return Err(Error::io("send a burst of datagrams")(errno)),
            }
        }
        if segment.is_none() {
            for payload in buffer.chunks(len) {
                let taken = send(&socket, payload, None);
                sent += u64::from(taken.map_err(Error::io("send a datagram"))?);
            }
        }
        next += u64::from(burst);
        due += interval;
    }
    let elapsed_ns = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
    let mut mark = [0; HEAD_LEN];
    Probe::End.write(&mut mark);
    for _ in 0..END_MARKS {
        pause(QUIET);
        send(&socket, &mark, None).map_err(Error::io("send an end mark"))?;
    }
    Ok(Sent {
        sent,
        elapsed_ns,
        segmented: segment.is_some(),
    })
}

/// Whether the kernel took the datagrams, each `segment` bytes long.
fn send(socket: &UdpSocket, payload: &[u8], segment: Option<u16>) -> nix::Result<bool> {
    let control = segment.as_ref().map(ControlMessage::UdpGsoSegments);
    let iov = [IoSlice::new(payload)];
    match sendmsg::<()>(
        socket.as_raw_fd(),
        &iov,
        control.as_slice(),
        MsgFlags::empty(),
        None,
    ) {
        Ok(_) => Ok(true),
        // Refused: the sink has its reports and is gone before the last end mark.
        Err(Errno::ENOBUFS | Errno::EAGAIN | Errno::EINTR | Errno::ECONNREFUSED) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// The clock that both ends share: namespaces divide the network, not the time.
pub(super) fn monotonic_ns() -> Result<u64, Error> {
    let now = ClockId::CLOCK_MONOTONIC
        .now()
        .map_err(Error::io("read the monotonic clock"))?;
    Ok(u64::try_from(Duration::from(now).as_nanos()).unwrap_or(u64::MAX))
}
