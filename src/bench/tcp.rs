//! Owns TCP requests and connections from end to end: the asking and the answering program, which are this same
//! program started inside the ends' namespaces. Never moves bulk data; iperf3 does.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use socket2::SockRef;

use super::Error;
use super::service::{Kind, Order};
use super::stage::Stage;
use super::system::Path as Route;
use super::udp::Processor;
use crate::lab::wait;

/// Connections that are served at a time, and so the most that a client may open.
const CLIENTS: u8 = 8;
/// Bytes of a request and of its answer.
const REQUEST_LEN: usize = 64;
/// A peer that is silent for so long is gone. Less than [`EXTRA`], so that the client can say so.
const PATIENCE: Duration = Duration::from_secs(5);
/// Starting and ending come on top of the time of asking.
const EXTRA: Duration = Duration::from_secs(10);
/// A minute: longer latencies count as this one.
const MAX_LATENCY_NS: u64 = 60_000_000_000;

/// What the client does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// One connection, one request after the other.
    Requests,
    /// Eight at a time, a connection for each byte.
    Connections,
}

/// What the client prints. Latencies are nanoseconds from before the first system call to after the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answered {
    /// Requests, or connections, that were completed.
    pub count: u64,
    /// Those that failed.
    pub failed: u64,
    /// How long it took.
    pub elapsed_ns: u64,
    /// Median latency.
    pub p50_ns: u64,
    /// 99th percentile.
    pub p99_ns: u64,
    /// 99.9th percentile.
    pub p999_ns: u64,
}

/// Asks along `route` for `time`. `program` is this program.
///
/// # Errors
/// [`Error::Lab`] or [`Error::Remote`] if a program fails, [`Error::Report`] if its report is not understood or nothing
/// was answered.
pub fn run(
    stage: &dyn Stage,
    program: &Path,
    route: &Route,
    ask: Ask,
    time: Duration,
) -> Result<Answered, Error> {
    let order = Order::new(Kind::TcpServer, route.addr, time + EXTRA);
    let limit = order.limit();
    let _server = stage.serve(route, program, order)?;
    let mut client = Command::new(program);
    client.args(["bench", "tcp-ask", "--dest", &order.socket().to_string()]);
    client.args(["--time-ms", &time.as_millis().to_string()]);
    if ask == Ask::Connections {
        client.arg("--connect");
    }
    let client = stage.spawn(route, "tcp-ask", &mut client)?;
    let text = client.finish(limit, stage.interrupt())?;
    let unusable = |reason: String| Error::Report {
        program: "the TCP client",
        reason,
    };
    let answered: Answered =
        serde_json::from_str(&text).map_err(|error| unusable(error.to_string()))?;
    if answered.count == 0 {
        return Err(unusable(format!(
            "nothing was answered, {} failed",
            answered.failed
        )));
    }
    Ok(answered)
}

/// Answers on `listen` until `limit` has passed.
///
/// # Errors
/// [`Error::Io`] if the socket cannot be used.
pub fn serve(listen: SocketAddr, limit: Duration) -> Result<(), Error> {
    Processor::Last.stay()?;
    let listener = TcpListener::bind(listen).map_err(Error::io("bind the server's socket"))?;
    for number in 0..CLIENTS {
        let listener = listener
            .try_clone()
            .map_err(Error::io("share the server's socket"))?;
        // The threads end with the process.
        thread::Builder::new()
            .name(format!("serve-{number}"))
            .spawn(move || {
                for stream in listener.incoming().flatten() {
                    // A client that ends its connection, in whatever way, has its answer.
                    if let Err(error) = answer(stream) {
                        tracing::trace!(%error, "a connection ended");
                    }
                }
            })
            .map_err(Error::io("start a thread"))?;
    }
    wait::pause(limit);
    Ok(())
}

fn answer(mut stream: TcpStream) -> io::Result<()> {
    prepare(&stream)?;
    let mut buffer = [0; REQUEST_LEN];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(len) => stream.write_all(&buffer[..len])?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))
}

/// Asks `dest` for `time`.
///
/// # Errors
/// [`Error::Io`] if a thread cannot be started, or the one connection of [`Ask::Requests`] not made.
pub fn ask(dest: SocketAddr, ask: Ask, time: Duration) -> Result<Answered, Error> {
    Processor::First.stay()?;
    let start = Instant::now();
    let tallies: Vec<Tally> = match ask {
        Ask::Requests => vec![requests(dest, start, time).map_err(Error::io("ask the server"))?],
        Ask::Connections => thread::scope(|scope| {
            let clients: Vec<_> = (0..CLIENTS)
                .map(|_| scope.spawn(|| connections(dest, start, time)))
                .collect();
            clients
                .into_iter()
                .filter_map(|client| client.join().ok())
                .collect()
        }),
    };
    let mut latency = histogram()?;
    for tally in &tallies {
        for value in tally.latencies.iter() {
            latency.saturating_record(*value);
        }
    }
    Ok(Answered {
        count: tallies
            .iter()
            .map(|tally| tally.latencies.len() as u64)
            .sum(),
        failed: tallies.iter().map(|tally| tally.failed).sum(),
        elapsed_ns: nanoseconds(start.elapsed()),
        p50_ns: latency.value_at_quantile(0.5),
        p99_ns: latency.value_at_quantile(0.99),
        p999_ns: latency.value_at_quantile(0.999),
    })
}

#[derive(Debug, Default)]
struct Tally {
    latencies: Vec<u64>,
    failed: u64,
}

fn requests(dest: SocketAddr, start: Instant, time: Duration) -> io::Result<Tally> {
    let mut stream = TcpStream::connect_timeout(&dest, PATIENCE)?;
    prepare(&stream)?;
    let mut buffer = [0; REQUEST_LEN];
    let mut tally = Tally::default();
    // Once at least, however long it took to get here.
    loop {
        let before = Instant::now();
        stream.write_all(&buffer)?;
        stream.read_exact(&mut buffer)?;
        tally.latencies.push(nanoseconds(before.elapsed()));
        if start.elapsed() >= time {
            return Ok(tally);
        }
    }
}

fn connections(dest: SocketAddr, start: Instant, time: Duration) -> Tally {
    let mut tally = Tally::default();
    loop {
        let before = Instant::now();
        match connection(dest) {
            Ok(()) => tally.latencies.push(nanoseconds(before.elapsed())),
            Err(error) => {
                tracing::trace!(%error, "a connection failed");
                tally.failed += 1;
            }
        }
        if start.elapsed() >= time {
            return tally;
        }
    }
}

fn connection(dest: SocketAddr) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&dest, PATIENCE)?;
    prepare(&stream)?;
    // Ended by a reset, so that no port waits out the minute of TIME-WAIT and the ports do not run out.
    SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
    stream.write_all(&[0])?;
    stream.read_exact(&mut [0])
}

fn histogram() -> Result<Histogram<u64>, Error> {
    Histogram::new_with_bounds(1, MAX_LATENCY_NS, 3).map_err(|error| Error::Report {
        program: "the TCP client",
        reason: error.to_string(),
    })
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_connections_are_answered_and_counted() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let dest = listener.local_addr().unwrap();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                thread::spawn(|| answer(stream));
            }
        });
        // No time at all is what a stop before the first question leaves.
        let cases = [Ask::Requests, Ask::Connections].map(|kind| [(kind, 100), (kind, 0)]);
        for (kind, milliseconds) in cases.into_iter().flatten() {
            let answered = ask(dest, kind, Duration::from_millis(milliseconds)).unwrap();
            assert!(answered.count > 0, "{kind:?}");
            assert_eq!(answered.failed, 0, "{kind:?}");
            assert!(answered.p50_ns > 0 && answered.p50_ns <= answered.p999_ns);
        }
    }

    #[test]
    fn a_server_that_is_not_there_is_an_error_and_not_a_result() {
        let dest = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        let asked = ask(dest, Ask::Requests, Duration::from_millis(10));
        assert!(matches!(asked, Err(Error::Io { .. })), "{asked:?}");
        let tried = ask(dest, Ask::Connections, Duration::from_millis(10)).unwrap();
        assert!(tried.count == 0 && tried.failed > 0, "{tried:?}");
    }
}
