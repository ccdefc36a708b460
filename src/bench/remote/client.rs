//! Owns asking another machine for the far end of the traffic: one connection for a whole run, and the programs that
//! run there.

use std::io::{BufReader, ErrorKind};
use std::net::{IpAddr, TcpStream, ToSocketAddrs as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;
use std::sync::Mutex;
use std::time::Duration;

use super::{Answer, Greeting, MAX_ANSWER, PORT, PROTOCOL, Proof, Request, Token, read, write};
use crate::bench::Error;
use crate::bench::meter::Machine;
use crate::bench::report;
use crate::bench::service::Order;
use crate::bench::stage::{Served, Stage};
use crate::bench::system::Path as Route;
use crate::lab::process::Tracked;
use crate::lab::{Interrupt, Member, NetNs};

/// How soon the server must answer, on top of what it was asked to wait for: it may have to start a program first.
const PATIENCE: Duration = Duration::from_secs(20);

/// A server that answers us.
#[derive(Debug)]
pub struct Server {
    connection: Mutex<BufReader<TcpStream>>,
    addr: IpAddr,
    /// The machine that it runs on.
    pub machine: report::Machine,
}

fn failed(why: impl ToString) -> Error {
    Error::Remote(why.to_string())
}

impl Server {
    /// Connects to `host`, a name or an address with or without a port, and proves to have the token.
    ///
    /// # Errors
    /// [`Error::Remote`] says why the server is not there, or does not want us.
    pub fn connect(host: &str, token: &Token) -> Result<Self, Error> {
        let with_port = format!("{host}:{PORT}");
        let bare: Option<IpAddr> = host.parse().ok();
        let resolved = match bare {
            Some(addr) => Ok(vec![(addr, PORT).into()]),
            None => (host.to_socket_addrs())
                .or_else(|_no_port| with_port.to_socket_addrs())
                .map(Iterator::collect::<Vec<_>>),
        };
        let found = resolved.map_err(|error| failed(format!("{host}: {error}")))?;
        let mut last = failed(format!("{host} has no address"));
        for addr in found {
            match TcpStream::connect_timeout(&addr, PATIENCE) {
                Ok(stream) => return Self::greet(stream, token),
                Err(error) => {
                    last = failed(format!(
                        "{addr}: {error}; does `loden bench serve` run there?"
                    ));
                }
            }
        }
        Err(last)
    }

    fn greet(stream: TcpStream, token: &Token) -> Result<Self, Error> {
        stream.set_nodelay(true).map_err(failed)?;
        stream.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
        stream.set_write_timeout(Some(PATIENCE)).map_err(failed)?;
        let addr = stream.peer_addr().map_err(failed)?.ip();
        let mut connection = BufReader::new(stream);
        match read(&mut connection, MAX_ANSWER).map_err(failed)? {
            Some(Greeting::Challenge {
                protocol,
                challenge,
            }) if protocol == PROTOCOL => {
                let answer = token.answer(&challenge);
                write(connection.get_mut(), &Proof { answer }).map_err(failed)?;
            }
            Some(Greeting::Challenge { protocol, .. }) => {
                return Err(failed(format!(
                    "it speaks form {protocol}, and this program {PROTOCOL}: run the same version on both machines"
                )));
            }
            Some(Greeting::Refused(why)) => return Err(failed(why)),
            None => return Err(failed("it hung up")),
        }
        match read(&mut connection, MAX_ANSWER).map_err(failed)? {
            Some(Answer::Done) => {}
            Some(Answer::Failed(why)) => return Err(failed(why)),
            _ => return Err(failed("it answered with something else")),
        }
        let mut server = Self {
            connection: Mutex::new(connection),
            addr,
            machine: report::Machine::here(),
        };
        let Answer::Machine(machine) = server.ask(&Request::Describe, Duration::ZERO)? else {
            return Err(unexpected());
        };
        server.machine = machine;
        Ok(server)
    }

    /// Where it is.
    #[must_use]
    pub const fn addr(&self) -> IpAddr {
        self.addr
    }

    /// `wait`: how long the server is asked to wait before it answers.
    fn ask(&self, request: &Request, wait: Duration) -> Result<Answer, Error> {
        let mut connection = self
            .connection
            .lock()
            .map_err(|_poisoned| failed("an earlier request panicked"))?;
        let limit = Some(wait + PATIENCE);
        let stream = connection.get_mut();
        stream.set_read_timeout(limit).map_err(Error::Lost)?;
        write(stream, request).map_err(Error::Lost)?;
        match read(&mut *connection, MAX_ANSWER).map_err(Error::Lost)? {
            Some(Answer::Failed(why)) => Err(failed(why)),
            Some(answer) => Ok(answer),
            None => Err(Error::Lost(ErrorKind::UnexpectedEof.into())),
        }
    }
}

fn unexpected() -> Error {
    failed("it answered with something else")
}

/// A program on the other machine; it ends when dropped.
#[derive(Debug)]
pub struct There {
    server: Rc<Server>,
    id: Option<u64>,
}

impl There {
    /// Waits for its own end and returns what it printed.
    ///
    /// # Errors
    /// [`Error::Remote`] if it failed, or does not end within `limit`.
    pub fn finish(mut self, limit: Duration) -> Result<String, Error> {
        let Some(id) = self.id.take() else {
            return Err(failed("it has ended already"));
        };
        let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        let request = Request::Finish { id, limit_ms };
        let Answer::Printed(text) = self.server.ask(&request, limit)? else {
            return Err(unexpected());
        };
        Ok(text)
    }
}

impl Drop for There {
    fn drop(&mut self) {
        if let Some(id) = self.id.take()
            && let Err(error) = self.server.ask(&Request::Stop { id }, Duration::ZERO)
        {
            tracing::debug!(%error, "a program of the other machine was not ended");
        }
    }
}

/// Traffic from this machine to an address of the other.
#[derive(Debug)]
pub struct Pair {
    server: Rc<Server>,
    addr: IpAddr,
    dir: PathBuf,
    interrupt: Interrupt,
}

impl Pair {
    /// To `addr`, which is the machine's on which `server` runs. `dir` is for the output of programs that run here.
    #[must_use]
    pub const fn new(server: Rc<Server>, addr: IpAddr, dir: PathBuf, interrupt: Interrupt) -> Self {
        Self {
            server,
            addr,
            dir,
            interrupt,
        }
    }

    /// From here to there.
    #[must_use]
    pub const fn route(&self) -> Route {
        Route {
            from: Member::Node(1),
            to: Member::Node(2),
            addr: self.addr,
        }
    }
}

impl Stage for Pair {
    fn spawn(&self, _route: &Route, label: &str, command: &mut Command) -> Result<Tracked, Error> {
        Ok(Tracked::spawn(&NetNs::here(), &self.dir, label, command)?)
    }

    fn serve(&self, _route: &Route, _program: &Path, order: Order) -> Result<Served, Error> {
        let request = Request::Start(order);
        let Answer::Started { id } = self.server.ask(&request, Duration::ZERO)? else {
            return Err(unexpected());
        };
        Ok(Served::There(There {
            server: Rc::clone(&self.server),
            id: Some(id),
        }))
    }

    fn near(&self, _route: &Route) -> NetNs {
        NetNs::here()
    }

    fn machine(&self) -> Result<Machine, Error> {
        let Answer::Processors(there) = self.server.ask(&Request::Read, Duration::ZERO)? else {
            return Err(unexpected());
        };
        Ok(Machine::read()?.and(there))
    }

    fn daemon_pids(&self) -> Vec<i32> {
        Vec::new()
    }

    fn status_sockets(&self) -> Vec<PathBuf> {
        Vec::new()
    }

    fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }
}
