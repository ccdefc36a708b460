//! Owns answering another machine's benchmark: one client at a time, only one that may, only what receives and answers
//! traffic, and never longer than a run takes. Never sends anything to anybody who did not begin.

use std::collections::BTreeMap;
use std::io::{self, BufReader};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use ring::rand::{SecureRandom as _, SystemRandom};
use socket2::{SockRef, TcpKeepalive};

use super::{
    Answer, CHALLENGE_LEN, Greeting, MAX_REQUEST, PROTOCOL, Proof, Request, Token, hex, read, write,
};
use crate::bench::Error;
use crate::bench::meter::Machine;
use crate::bench::report;
use crate::bench::service::{MAX_TIME, Order};
use crate::bench::stage;
use crate::lab::process::Tracked;
use crate::lab::{Interrupt, NetNs, wait};

/// How soon a client must prove itself, and take an answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long it may then be silent: it is, while a run goes on.
const SILENCE: Duration = MAX_TIME;
/// How often a new client, or a signal, is looked for.
const LOOK: Duration = Duration::from_millis(50);
/// A machine that is gone is noticed after three of these.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// Programs at a time: a run needs two.
const MAX_PROGRAMS: usize = 4;

/// Who may ask, and what answers.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The secret that a client must have.
    pub token: Token,
    /// Where it must come from; anywhere if empty.
    pub allow: Vec<IpNet>,
    /// This program, which is also the traffic's other end.
    pub program: PathBuf,
    /// An empty directory for the programs' output.
    pub dir: PathBuf,
}

/// Answers on `listener` until `interrupt` is set. `says` is told who comes and goes.
///
/// # Errors
/// [`Error::Io`] if the listener cannot be used. Whatever a client does is no error.
pub fn run(
    listener: &TcpListener,
    settings: &Settings,
    interrupt: &Interrupt,
    says: &mut dyn FnMut(&str),
) -> Result<(), Error> {
    listener
        .set_nonblocking(true)
        .map_err(Error::io("prepare the server's socket"))?;
    let mut current: Option<(SocketAddr, JoinHandle<String>)> = None;
    loop {
        let stopped = interrupt.check().is_err();
        if let Some((peer, session)) = current.take() {
            if session.is_finished() || stopped {
                says(&left(peer, session));
            } else {
                current = Some((peer, session));
            }
        }
        if stopped {
            return Ok(());
        }
        match listener.accept() {
            Ok((stream, peer)) => {
                let busy = current
                    .as_ref()
                    .is_some_and(|(_, session)| is_busy(session));
                if let Err(why) = admit(peer.ip(), settings, busy) {
                    says(&format!("{peer} is refused: {why}"));
                    refuse(&stream, why);
                    continue;
                }
                if let Some((before, session)) = current.take() {
                    says(&left(before, session));
                }
                says(&format!("{peer} came"));
                let (settings, interrupt) = (settings.clone(), interrupt.clone());
                let session = thread::Builder::new()
                    .name("session".to_owned())
                    .spawn(move || end_of(session(&stream, &settings, &interrupt)))
                    .map_err(Error::io("start a thread"))?;
                current = Some((peer, session));
            }
            // Also a connection that was given up before it was taken.
            Err(error) => {
                if error.kind() != io::ErrorKind::WouldBlock {
                    says(&format!("a connection was not accepted: {error}"));
                }
                wait::pause(LOOK);
            }
        }
    }
}

fn left(peer: SocketAddr, session: JoinHandle<String>) -> String {
    let end = session.join();
    let why = end.unwrap_or_else(|_panic| "the session panicked".to_owned());
    format!("{peer} left: {why}")
}

/// A client that comes right after another has left waits for the other's programs to end.
fn is_busy(session: &JoinHandle<String>) -> bool {
    let ended = wait::until("its end", PATIENCE / 10, &Interrupt::default(), || {
        Ok(session.is_finished().then_some(()))
    });
    ended.is_err()
}

fn admit(peer: IpAddr, settings: &Settings, busy: bool) -> Result<(), &'static str> {
    // An IPv4 client of a socket of both families.
    let peer = peer.to_canonical();
    if !settings.allow.is_empty() && !settings.allow.iter().any(|net| net.contains(&peer)) {
        return Err("its address is not among those that --allow names");
    }
    if busy {
        return Err("another benchmark is running here");
    }
    Ok(())
}

/// Says why, if the client still listens; it may not keep others waiting.
fn refuse(mut stream: &TcpStream, why: &str) {
    let said = stream
        .set_write_timeout(Some(LOOK))
        .and_then(|()| write(&mut stream, &Greeting::Refused(why.to_owned())));
    if let Err(error) = said {
        tracing::debug!(%error, "a refusal was not taken");
    }
}

fn end_of(end: io::Result<&'static str>) -> String {
    match end {
        Ok(how) => how.to_owned(),
        Err(error) => error.to_string(),
    }
}

/// Reads with looks at the signal between.
struct Patient<'a> {
    stream: &'a TcpStream,
    interrupt: &'a Interrupt,
    /// When the client has been slow, or silent, for too long.
    deadline: Instant,
}

impl io::Read for Patient<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if self.interrupt.check().is_err() {
                return Err(io::Error::other("this server ends"));
            }
            if Instant::now() >= self.deadline {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "it was silent for too long",
                ));
            }
            match io::Read::read(&mut self.stream, buffer) {
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
                    ) => {}
                other => return other,
            }
        }
    }
}

fn session(
    mut stream: &TcpStream,
    settings: &Settings,
    interrupt: &Interrupt,
) -> io::Result<&'static str> {
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(LOOK))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE)
        .with_interval(KEEPALIVE)
        .with_retries(3);
    SockRef::from(stream).set_tcp_keepalive(&keepalive)?;
    let mut from = BufReader::new(Patient {
        stream,
        interrupt,
        deadline: Instant::now() + PATIENCE,
    });

    let challenge = challenge()?;
    let greeting = Greeting::Challenge {
        protocol: PROTOCOL,
        challenge: challenge.clone(),
    };
    write(&mut stream, &greeting)?;
    let proof: Option<Proof> = read(&mut from, MAX_REQUEST)?;
    if !proof.is_some_and(|proof| settings.token.accepts(&challenge, &proof.answer)) {
        let why = "it does not have the token of this server";
        write(&mut stream, &Answer::Failed(why.to_owned()))?;
        return Ok(why);
    }
    write(&mut stream, &Answer::Done)?;

    let mut programs = Programs {
        settings,
        interrupt,
        running: BTreeMap::new(),
        next: 0,
    };
    loop {
        from.get_mut().deadline = Instant::now() + SILENCE;
        let Some(request) = read(&mut from, MAX_REQUEST)? else {
            return Ok("it is done");
        };
        let answer = programs.answer(request);
        let answer = answer.unwrap_or_else(|error| Answer::Failed(error.to_string()));
        write(&mut stream, &answer)?;
    }
}

fn challenge() -> io::Result<String> {
    let mut bytes = [0; CHALLENGE_LEN];
    SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_unspecified| io::Error::other("no random numbers"))?;
    Ok(hex(&bytes))
}

/// What runs for a client; it ends with the client.
struct Programs<'a> {
    settings: &'a Settings,
    interrupt: &'a Interrupt,
    running: BTreeMap<u64, Tracked>,
    next: u64,
}

impl Programs<'_> {
    fn answer(&mut self, request: Request) -> Result<Answer, Error> {
        Ok(match request {
            Request::Describe => Answer::Machine(report::Machine::here()),
            Request::Read => Answer::Processors(Machine::read()?),
            Request::Start(order) => Answer::Started {
                id: self.start(order, &self.settings.program, &self.settings.dir)?,
            },
            Request::Finish { id, limit_ms } => {
                let limit = Duration::from_millis(limit_ms).min(MAX_TIME);
                Answer::Printed(self.take(id)?.finish(limit, self.interrupt)?)
            }
            Request::Stop { id } => {
                self.take(id)?.stop()?;
                Answer::Done
            }
        })
    }

    fn start(&mut self, order: Order, program: &Path, dir: &Path) -> Result<u64, Error> {
        if self.running.len() >= MAX_PROGRAMS {
            return Err(Error::Remote(format!(
                "{MAX_PROGRAMS} programs run already, and a benchmark needs no more"
            )));
        }
        let program = stage::start(&NetNs::here(), dir, program, order, self.interrupt)?;
        self.next += 1;
        self.running.insert(self.next, program);
        Ok(self.next)
    }

    fn take(&mut self, id: u64) -> Result<Tracked, Error> {
        self.running
            .remove(&id)
            .ok_or_else(|| Error::Remote(format!("no program is called {id}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_comes_from_elsewhere_or_second_is_refused() {
        let settings = Settings {
            token: Token::new(b"0123456789abcdef").unwrap(),
            allow: vec!["192.0.2.0/24".parse().unwrap()],
            program: PathBuf::new(),
            dir: PathBuf::new(),
        };
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        assert!(admit(ip("192.0.2.9"), &settings, false).is_ok());
        assert!(admit(ip("::ffff:192.0.2.9"), &settings, false).is_ok());
        assert!(admit(ip("198.51.100.1"), &settings, false).is_err());
        assert!(admit(ip("192.0.2.9"), &settings, true).is_err());
        let anyone = Settings {
            allow: Vec::new(),
            ..settings
        };
        assert!(admit(ip("2001:db8::1"), &anyone, false).is_ok());
    }
}
