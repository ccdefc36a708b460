//! Owns what two machines say to each other so that one can measure the network between them: who may ask, the
//! messages, and their bounds. [`client`] asks, [`server`] answers.
//!
//! One JSON document a line, over TCP. The server begins with a challenge; the client answers with its HMAC-SHA256 under
//! the token that both were given, and then sends requests, each of which has one answer. The token itself never
//! crosses the network. What is said is not encrypted, and holds nothing that needs to be.

pub mod client;
pub mod server;

use std::fmt;
use std::fs;
use std::io::{self, BufRead, Read as _, Write};
use std::path::Path;

use ring::hmac;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::Error;
use super::meter::Machine;
use super::report;
use super::service::Order;

/// Where the server listens by default.
pub const PORT: u16 = 5300;
/// The form of the messages.
const PROTOCOL: u32 = 1;
/// The longest line of a client: a request is a tenth of it.
const MAX_REQUEST: u64 = 4 << 10;
/// The longest line of a server: what a traffic program printed, which is a few hundred bytes.
const MAX_ANSWER: u64 = 64 << 10;
/// Bytes of a challenge.
const CHALLENGE_LEN: usize = 32;
/// A shorter token could be guessed.
const MIN_TOKEN: usize = 16;
/// No token is longer.
const MAX_TOKEN: u64 = 4096;

/// The secret that both ends were given.
#[derive(Clone)]
pub struct Token(hmac::Key);

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token")
    }
}

impl Token {
    /// Reads it from a file, without white space around it.
    ///
    /// # Errors
    /// [`Error::Token`] if the file cannot be read, or holds less than 16 bytes.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let failed = |reason: String| Error::Token {
            path: path.to_owned(),
            reason,
        };
        let mut text = Vec::new();
        fs::File::open(path)
            .and_then(|file| file.take(MAX_TOKEN).read_to_end(&mut text))
            .map_err(|error| failed(error.to_string()))?;
        Self::new(text.trim_ascii()).ok_or_else(|| {
            failed(format!(
                "a token has {MIN_TOKEN} bytes or more: head -c 32 /dev/urandom | base64 > FILE"
            ))
        })
    }

    fn new(secret: &[u8]) -> Option<Self> {
        (secret.len() >= MIN_TOKEN).then(|| Self(hmac::Key::new(hmac::HMAC_SHA256, secret)))
    }

    fn answer(&self, challenge: &str) -> String {
        hex(hmac::sign(&self.0, challenge.as_bytes()).as_ref())
    }

    /// Takes as long whatever the answer is.
    fn accepts(&self, challenge: &str, answer: &str) -> bool {
        unhex(answer)
            .is_some_and(|answer| hmac::verify(&self.0, challenge.as_bytes(), &answer).is_ok())
    }
}

/// What the server says first.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Greeting {
    /// Prove that you may.
    Challenge {
        /// [`PROTOCOL`].
        protocol: u32,
        /// Never the same twice.
        challenge: String,
    },
    /// Go away.
    Refused(String),
}

/// What the client says to that.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Proof {
    answer: String,
}

/// What a client may ask for.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
enum Request {
    /// What kind of machine are you?
    Describe,
    /// Your processors, now.
    Read,
    /// Start this, and say when it listens.
    Start(Order),
    /// Wait for its end, so many milliseconds at most, and say what it printed.
    Finish {
        /// Which, as [`Answer::Started`] called it.
        id: u64,
        /// How long to wait.
        limit_ms: u64,
    },
    /// End it.
    Stop {
        /// Which.
        id: u64,
    },
}

/// What it gets.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Answer {
    /// The proof is accepted, or the program is ended.
    Done,
    /// The machine.
    Machine(report::Machine),
    /// Its processors.
    Processors(Machine),
    /// It listens, and is called so.
    Started {
        /// For later requests.
        id: u64,
    },
    /// What it printed.
    Printed(String),
    /// It did not work.
    Failed(String),
}

/// Writes one message.
fn write(to: &mut impl Write, message: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    to.write_all(&line)
}

/// Reads one message of at most `limit` bytes; `None` at the end.
fn read<T: DeserializeOwned>(from: &mut impl BufRead, limit: u64) -> io::Result<Option<T>> {
    let mut line = Vec::new();
    from.take(limit).read_until(b'\n', &mut line)?;
    if line.is_empty() {
        return Ok(None);
    }
    if line.last() != Some(&b'\n') {
        let reason = format!("a message is cut off, or longer than {limit} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
    }
    Ok(Some(serde_json::from_slice(&line)?))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    if !digits.len().is_multiple_of(2) {
        return None;
    }
    digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(str::from_utf8(pair).ok()?, 16).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_token_answers_a_challenge() {
        let token = |text: &str| Token::new(text.as_bytes()).unwrap();
        let (ours, other) = (token("0123456789abcdef"), token("0123456789abcdeF"));
        let answer = ours.answer("a challenge");
        assert!(ours.accepts("a challenge", &answer));
        assert!(!ours.accepts("another", &answer));
        assert!(!other.accepts("a challenge", &answer));
        for wrong in ["", "0", "zz", &answer[2..], &format!("{answer}00"), "é"] {
            assert!(!ours.accepts("a challenge", wrong), "{wrong}");
        }
        assert!(Token::new(b"too short").is_none());
        assert_eq!(format!("{ours:?}"), "Token");
    }

    // RFC 4231, test case 2.
    #[test]
    fn the_proof_is_hmac_sha256() {
        let token = Token(hmac::Key::new(hmac::HMAC_SHA256, b"Jefe"));
        assert_eq!(
            token.answer("what do ya want for nothing?"),
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
        );
    }

    #[test]
    fn a_message_is_one_bounded_line() {
        let mut written = Vec::new();
        write(&mut written, &Request::Read).unwrap();
        let message: Option<Request> = read(&mut written.as_slice(), 64).unwrap();
        assert!(matches!(message, Some(Request::Read)), "{message:?}");
        let nothing: Option<Request> = read(&mut &b""[..], 64).unwrap();
        assert!(nothing.is_none());
        let long = format!("\"{}\"\n", "x".repeat(64));
        for bad in [&b"\"read\""[..], b"{\n", b"\"erase\"\n", long.as_bytes()] {
            assert!(read::<Request>(&mut &bad[..], 64).is_err(), "{bad:?}");
        }
    }
}
