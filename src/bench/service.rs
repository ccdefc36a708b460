//! Owns the far end's programs: what answers or counts the traffic, how each is started, and by which socket one sees
//! that it is ready. Pure: [`super::stage`] and [`super::remote`] start them.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Where numbered datagrams arrive.
pub const UDP_PORT: u16 = 5301;
/// Where those arrive that cross beside what is measured.
pub const BACKGROUND_PORT: u16 = 5302;
/// Where requests are answered.
pub const TCP_PORT: u16 = 5401;
/// iperf3's own.
pub const IPERF_PORT: u16 = 5201;
/// The longest that any of them may run: the longest TCP run, and time to start and end.
pub const MAX_TIME: Duration = Duration::from_secs(660);

/// A program of the far end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Counts numbered datagrams.
    UdpSink {
        /// Of the traffic beside what is measured.
        background: bool,
        /// Takes them with `UDP_GRO`.
        gro: bool,
    },
    /// Answers TCP requests.
    TcpServer,
    /// iperf3, for one run.
    Iperf,
}

/// What to start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Order {
    /// Which program.
    pub kind: Kind,
    /// The address that it listens on.
    pub addr: IpAddr,
    /// When it ends by itself, in milliseconds.
    pub limit_ms: u64,
}

impl Order {
    /// `kind` on `addr`, for `limit` at most.
    #[must_use]
    pub fn new(kind: Kind, addr: IpAddr, limit: Duration) -> Self {
        let limit = limit.min(MAX_TIME);
        Self {
            kind,
            addr,
            limit_ms: u64::try_from(limit.as_millis()).unwrap_or(u64::MAX),
        }
    }

    /// How long it may run.
    #[must_use]
    pub fn limit(&self) -> Duration {
        Duration::from_millis(self.limit_ms).min(MAX_TIME)
    }

    /// Where it listens.
    #[must_use]
    pub const fn socket(&self) -> SocketAddr {
        let port = match self.kind {
            Kind::UdpSink {
                background: false, ..
            } => UDP_PORT,
            Kind::UdpSink {
                background: true, ..
            } => BACKGROUND_PORT,
            Kind::TcpServer => TCP_PORT,
            Kind::Iperf => IPERF_PORT,
        };
        SocketAddr::new(self.addr, port)
    }

    /// The protocol of its socket, as the kernel's tables are called.
    #[must_use]
    pub const fn protocol(&self) -> &'static str {
        match self.kind {
            Kind::UdpSink { .. } => "udp",
            Kind::TcpServer | Kind::Iperf => "tcp",
        }
    }

    /// The name of its files.
    #[must_use]
    pub fn label(&self) -> String {
        let kind = match self.kind {
            Kind::UdpSink { .. } => "udp-sink",
            Kind::TcpServer => "tcp-server",
            Kind::Iperf => "iperf3-server",
        };
        format!("{kind}-{}", self.socket().port())
    }

    /// The command; `program` is this program.
    #[must_use]
    pub fn command(&self, program: &Path) -> Command {
        let socket = self.socket();
        let own = |what: &str| {
            let mut command = Command::new(program);
            command.args(["bench", what, "--listen", &socket.to_string()]);
            command.args(["--limit-ms", &self.limit().as_millis().to_string()]);
            command
        };
        match self.kind {
            Kind::UdpSink { gro, .. } => {
                let mut command = own("udp-sink");
                if gro {
                    command.arg("--gro");
                }
                command
            }
            Kind::TcpServer => own("tcp-serve"),
            Kind::Iperf => {
                let mut command = Command::new("iperf3");
                command.args(["-s", "-1", "-B", &self.addr.to_string()]);
                command.args(["-p", &socket.port().to_string()]);
                command
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_runs_longer_than_the_longest_run() {
        let addr = IpAddr::from([192, 0, 2, 1]);
        let long = Order::new(Kind::TcpServer, addr, Duration::MAX);
        assert_eq!(long.limit(), MAX_TIME);
        // Nor if the number came over the network.
        let order = Order {
            limit_ms: u64::MAX,
            ..long
        };
        let command = order.command(Path::new("loden"));
        let args: Vec<_> = command.get_args().filter_map(|arg| arg.to_str()).collect();
        assert!(args.ends_with(&["--limit-ms", "660000"]), "{args:?}");
    }

    #[test]
    fn each_listens_on_a_port_of_its_own() {
        let sink = |background| Kind::UdpSink {
            background,
            gro: true,
        };
        let kinds = [sink(false), sink(true), Kind::TcpServer, Kind::Iperf];
        let mut sockets = kinds
            .map(|kind| Order::new(kind, IpAddr::from([192, 0, 2, 1]), Duration::ZERO).socket());
        sockets.sort();
        assert!(sockets.is_sorted_by(|a, b| a < b), "{sockets:?}");
    }
}
