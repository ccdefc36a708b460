//! Owns reading filter expressions. Bounded in length, terms and depth; never panics, never recurses beyond
//! [`MAX_DEPTH`].

use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;

use super::super::super::DropReason;
use super::super::record::Direction;
use super::{End, Filter, Primitive, Step};

/// The longest expression, in bytes.
const MAX_LEN: usize = 2048;
/// The most primitives and operators.
const MAX_STEPS: usize = 256;
/// The deepest nesting; with a value per level in hand, the matcher's stack of 128 bits suffices.
const MAX_DEPTH: usize = 32;
/// What ends a word without a blank.
const OPERATORS: [char; 5] = ['(', ')', '!', '&', '|'];

/// An expression that makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FilterError {
    /// Too much of it.
    #[error(
        "filter: at most {MAX_LEN} bytes, {MAX_STEPS} terms and {MAX_DEPTH} levels of parentheses: capture more and filter afterwards"
    )]
    TooLong,
    /// It ends where more is needed.
    #[error("filter: {expected} is missing at the end")]
    Ends {
        /// What should come.
        expected: &'static str,
    },
    /// A word in the wrong place.
    #[error("filter: {word:?} is not {expected}")]
    Unexpected {
        /// The word.
        word: String,
        /// What should be there.
        expected: &'static str,
    },
    /// A name that means nothing.
    #[error("filter: {0:?} is no drop reason: loden status lists them")]
    UnknownReason(String),
}

/// What a value alone repeats.
#[derive(Clone, Copy)]
enum Qualifier {
    Host(End),
    Net(End),
    Port(End, Option<u8>),
    PortRange(End, Option<u8>),
}

struct Parser<'a> {
    words: Vec<&'a str>,
    at: usize,
    steps: Vec<Step>,
    last: Option<Qualifier>,
}

impl FromStr for Filter {
    type Err = FilterError;

    fn from_str(text: &str) -> Result<Self, FilterError> {
        if text.len() > MAX_LEN {
            return Err(FilterError::TooLong);
        }
        let mut parser = Parser {
            words: words(text),
            at: 0,
            steps: Vec::new(),
            last: None,
        };
        if parser.words.is_empty() {
            return Ok(Self::default());
        }
        parser.expression(0)?;
        match parser.peek() {
            None => Ok(Self {
                steps: parser.steps,
            }),
            Some(word) => Err(unexpected(word, "`and` or `or`")),
        }
    }
}

/// The words, with operators and parentheses as words of their own.
fn words(text: &str) -> Vec<&str> {
    let mut words = Vec::new();
    for mut rest in text.split_whitespace() {
        while !rest.is_empty() {
            let double = rest.starts_with("&&") || rest.starts_with("||");
            let len = if double {
                2
            } else if rest.starts_with(OPERATORS) {
                // A lone `&` or `|` is a word too, and a wrong one.
                1
            } else {
                rest.find(OPERATORS).unwrap_or(rest.len())
            };
            let (word, after) = rest.split_at(len);
            words.push(word);
            rest = after;
        }
    }
    words
}

fn unexpected(word: &str, expected: &'static str) -> FilterError {
    FilterError::Unexpected {
        word: word.to_owned(),
        expected,
    }
}

impl<'a> Parser<'a> {
    fn peek(&self) -> Option<&'a str> {
        self.words.get(self.at).copied()
    }

    fn next(&mut self, expected: &'static str) -> Result<&'a str, FilterError> {
        let word = self.peek().ok_or(FilterError::Ends { expected })?;
        self.at += 1;
        Ok(word)
    }

    /// Takes the next word if it is one of `wanted`.
    fn take(&mut self, wanted: &[&str]) -> bool {
        let found = self.peek().is_some_and(|word| wanted.contains(&word));
        self.at += usize::from(found);
        found
    }

    fn push(&mut self, step: Step) -> Result<(), FilterError> {
        if self.steps.len() == MAX_STEPS {
            return Err(FilterError::TooLong);
        }
        self.steps.push(step);
        Ok(())
    }

    fn is(&mut self, primitive: Primitive) -> Result<(), FilterError> {
        self.push(Step::Is(primitive))
    }

    fn expression(&mut self, depth: usize) -> Result<(), FilterError> {
        self.factor(depth)?;
        loop {
            let step = if self.take(&["and", "&&"]) {
                Step::And
            } else if self.take(&["or", "||"]) {
                Step::Or
            } else {
                return Ok(());
            };
            self.factor(depth)?;
            self.push(step)?;
        }
    }

    fn factor(&mut self, depth: usize) -> Result<(), FilterError> {
        if depth == MAX_DEPTH {
            return Err(FilterError::TooLong);
        }
        if self.take(&["not", "!"]) {
            self.factor(depth + 1)?;
            return self.push(Step::Not);
        }
        if self.take(&["("]) {
            self.expression(depth + 1)?;
            let close = self.next("`)`")?;
            return if close == ")" {
                Ok(())
            } else {
                Err(unexpected(close, "`)`, `and` or `or`"))
            };
        }
        self.primitive()
    }

    fn primitive(&mut self) -> Result<(), FilterError> {
        let word = self.next("a primitive")?;
        let protocol = match word {
            "tcp" => Some(6),
            "udp" => Some(17),
            _ => None,
        };
        if protocol.is_some() && self.qualifies_ports() {
            let end = self.end();
            let ranged = match self.next("`port` or `portrange`")? {
                "port" => false,
                "portrange" => true,
                other => return Err(unexpected(other, "`port` or `portrange`")),
            };
            return self.value(if ranged {
                Qualifier::PortRange(end, protocol)
            } else {
                Qualifier::Port(end, protocol)
            });
        }
        let simple = match word {
            "ip" => Primitive::V4,
            "ip6" => Primitive::V6,
            "tcp" => Primitive::Protocol(6),
            "udp" => Primitive::Protocol(17),
            "icmp" => Primitive::Protocol(1),
            "icmp6" => Primitive::Protocol(58),
            "encap" => Primitive::Direction(Direction::Encap),
            "decap" => Primitive::Direction(Direction::Decap),
            "sent" => Primitive::Sent,
            "delivered" => Primitive::Delivered,
            "answered" => Primitive::Answered,
            "handed" => Primitive::Handed,
            "arrived" => Primitive::Arrived,
            "dropped" => Primitive::Dropped,
            "proto" => Primitive::Protocol(self.number("a protocol's number")?),
            "less" => Primitive::Less(self.number("a length in bytes")?),
            "greater" => Primitive::Greater(self.number("a length in bytes")?),
            "peer" => Primitive::Peer(self.parsed("an underlay address")?),
            "reason" => Primitive::Reason(self.reason()?),
            "src" | "dst" => {
                self.at -= 1;
                let end = self.end();
                return self.qualified(end);
            }
            _ => {
                self.at -= 1;
                return self.qualified(End::Either);
            }
        };
        self.is(simple)
    }

    /// Whether what follows a protocol is about its ports.
    fn qualifies_ports(&self) -> bool {
        matches!(self.peek(), Some("src" | "dst" | "port" | "portrange"))
    }

    fn end(&mut self) -> End {
        if self.take(&["src"]) {
            End::Src
        } else if self.take(&["dst"]) {
            End::Dst
        } else {
            End::Either
        }
    }

    fn qualified(&mut self, end: End) -> Result<(), FilterError> {
        let qualifier = match self.peek() {
            Some("host") => Qualifier::Host(end),
            Some("net") => Qualifier::Net(end),
            Some("port") => Qualifier::Port(end, None),
            Some("portrange") => Qualifier::PortRange(end, None),
            // A value: as `host` after `src` or `dst`, else as the one before.
            _ => {
                let repeated = self.last.filter(|_| end == End::Either);
                return self.value(repeated.unwrap_or(Qualifier::Host(end)));
            }
        };
        self.at += 1;
        self.value(qualifier)
    }

    fn value(&mut self, qualifier: Qualifier) -> Result<(), FilterError> {
        self.last = Some(qualifier);
        match qualifier {
            Qualifier::Host(end) => {
                let addr: IpAddr = self.parsed("an address or a primitive")?;
                self.is(Primitive::Net(end, addr.into()))
            }
            Qualifier::Net(end) => {
                let net: IpNet = self.parsed("a prefix such as 198.18.0.0/16")?;
                self.is(Primitive::Net(end, net.trunc()))
            }
            Qualifier::Port(end, protocol) => {
                let port = self.number("a port's number")?;
                self.ports(end, protocol, port, port)
            }
            Qualifier::PortRange(end, protocol) => {
                let expected = "a range of ports such as 8000-8010";
                let word = self.next(expected)?;
                let wrong = || unexpected(word, expected);
                let (low, high) = word.split_once('-').ok_or_else(wrong)?;
                let number = |text| decimal::<u16>(text).ok_or_else(wrong);
                let (low, high) = (number(low)?, number(high)?);
                self.ports(end, protocol, low.min(high), low.max(high))
            }
        }
    }

    fn ports(
        &mut self,
        end: End,
        protocol: Option<u8>,
        low: u16,
        high: u16,
    ) -> Result<(), FilterError> {
        self.is(Primitive::Port(end, low, high))?;
        if let Some(protocol) = protocol {
            self.is(Primitive::Protocol(protocol))?;
            self.push(Step::And)?;
        }
        Ok(())
    }

    fn parsed<T: FromStr>(&mut self, expected: &'static str) -> Result<T, FilterError> {
        let word = self.next(expected)?;
        word.parse().map_err(|_not| unexpected(word, expected))
    }

    fn number<T: FromStr>(&mut self, expected: &'static str) -> Result<T, FilterError> {
        let word = self.next(expected)?;
        decimal(word).ok_or_else(|| unexpected(word, expected))
    }

    fn reason(&mut self) -> Result<DropReason, FilterError> {
        let word = self.next("a drop reason")?;
        let found = DropReason::ALL.iter().find(|reason| reason.name() == word);
        found
            .copied()
            .ok_or_else(|| FilterError::UnknownReason(word.to_owned()))
    }
}

/// A number without a sign, which `parse` would take.
fn decimal<T: FromStr>(text: &str) -> Option<T> {
    text.bytes()
        .all(|byte| byte.is_ascii_digit())
        .then(|| text.parse().ok())
        .flatten()
}
