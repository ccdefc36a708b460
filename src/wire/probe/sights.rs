//! Owns the bodies by which a node is asked to look out for the probes of a trace, and tells what it saw of them. What it
//! tells is its own words, of which nothing is read but what can be shown.
//!
//! Who asks says [`Order`] in byte 88, and whose nonce the header has: that of the trace's probes. The answer:
//!
//! | bytes | what |
//! |---|---|
//! | 88 | [`Standing`] |
//! | 89 | bits: 1, everything that passed its links was seen; 2, there are more lines than fit |
//! | 90..92 | lines |
//! | 92..94 | probes that came by its links |
//! | 94..96 | probes that reached its daemon |
//! | 96..98 | answers that left it |
//! | 98..100 | reserved |
//! | 100.. | lines: what each is about ([`About`]), its length (1 byte each), and so many bytes of ASCII |

use super::super::field::Field;
use super::ProbeError;

const ORDER: Field<1> = Field::at(88);
const STANDING: Field<1> = Field::at(88);
const BITS: Field<1> = Field::at(89);
const LINES: Field<2> = Field::at(90);
const CAME: Field<2> = Field::at(92);
const TAKEN: Field<2> = Field::at(94);
const LEFT: Field<2> = Field::at(96);
const RESERVED: Field<2> = Field::at(98);
const LINES_OFF: usize = 100;

const WHOLE: u8 = 1;
const MORE: u8 = 2;

/// What a node is asked to do for a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Order {
    /// Look out for its probes from now on.
    Begin = 1,
    /// Tell what was seen, and look out no longer.
    Tell = 2,
}

impl Order {
    /// What a request orders, if that is known.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Option<Self> {
        let order = ORDER.get(bytes);
        [Self::Begin, Self::Tell]
            .into_iter()
            .find(|&one| one as u8 == order)
    }

    /// Writes it behind the fixed part.
    pub fn write(self, bytes: &mut [u8]) {
        ORDER.set(bytes, self as u8);
    }
}

/// What became of an order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Standing {
    /// Nobody looks out for this trace.
    #[default]
    Unwatched = 0,
    /// The node looks out.
    Watches = 1,
    /// It did, and this is what was seen.
    Told = 2,
    /// It looks out for as many traces as it may.
    Busy = 3,
}

impl Standing {
    const ALL: [Self; 4] = [Self::Unwatched, Self::Watches, Self::Told, Self::Busy];
}

/// What a line is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum About {
    /// The probes, on their way to the node's daemon.
    Probes = 0,
    /// Its answers.
    Answers = 1,
}

/// What a node tells of a trace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sights {
    /// What became of the order.
    pub standing: Standing,
    /// Whatever passed the node's links was seen.
    pub whole: bool,
    /// There were more lines than are here.
    pub more: bool,
    /// Probes that came by its links.
    pub came: u16,
    /// Probes that reached its daemon.
    pub taken: u16,
    /// Answers that left it.
    pub left: u16,
    /// What was seen, in the order of the packets' way. In words of its own.
    pub lines: Vec<(About, String)>,
}

impl Sights {
    /// Bytes of a datagram that tells of nothing.
    pub const MIN_LEN: usize = LINES_OFF;

    /// That an order has come to this.
    #[must_use]
    pub fn of(standing: Standing) -> Self {
        Self {
            standing,
            ..Self::default()
        }
    }

    /// Reads the body of a datagram whose fixed part says that it tells this. What cannot be shown on a terminal is
    /// replaced.
    ///
    /// # Errors
    /// [`ProbeError::TooShort`], where there is less than it says.
    pub fn parse(bytes: &[u8]) -> Result<Self, ProbeError> {
        let short = || ProbeError::TooShort(bytes.len());
        let mut rest = bytes.get(LINES_OFF..).ok_or_else(short)?;
        let standing = STANDING.get(bytes);
        let standing = Standing::ALL.into_iter().find(|&one| one as u8 == standing);
        let mut lines = Vec::new();
        for _ in 0..LINES.get(bytes) {
            let (&[about, len], behind) = rest.split_first_chunk().ok_or_else(short)?;
            let (text, behind) = behind.split_at_checked(len.into()).ok_or_else(short)?;
            let about = match about {
                0 => About::Probes,
                _ => About::Answers,
            };
            lines.push((about, shown(text)));
            rest = behind;
        }
        let bits = BITS.get(bytes);
        Ok(Self {
            standing: standing.unwrap_or_default(),
            whole: bits & WHOLE != 0,
            more: bits & MORE != 0,
            came: CAME.get(bytes),
            taken: TAKEN.get(bytes),
            left: LEFT.get(bytes),
            lines,
        })
    }

    /// Writes the body behind the fixed part, with as many lines as fit; how many bytes the datagram has then. `bytes`
    /// holds at least [`MIN_LEN`](Self::MIN_LEN).
    #[must_use]
    pub fn write(&self, bytes: &mut [u8]) -> usize {
        let mut end = LINES_OFF;
        let mut count = 0_u16;
        for (about, text) in &self.lines {
            let text = text.as_bytes();
            let text = text.get(..u8::MAX.into()).unwrap_or(text);
            let line = bytes.get_mut(end..end + 2 + text.len());
            let Some((head, body)) = line.and_then(<[u8]>::split_first_chunk_mut) else {
                break;
            };
            *head = [*about as u8, u8::try_from(text.len()).unwrap_or(u8::MAX)];
            body.copy_from_slice(text);
            end += 2 + text.len();
            count += 1;
        }
        let more = self.more || usize::from(count) < self.lines.len();
        let whole = if self.whole { WHOLE } else { 0 };
        STANDING.set(bytes, self.standing as u8);
        BITS.set(bytes, whole | if more { MORE } else { 0 });
        LINES.set(bytes, count);
        CAME.set(bytes, self.came);
        TAKEN.set(bytes, self.taken);
        LEFT.set(bytes, self.left);
        RESERVED.set(bytes, 0);
        end
    }
}

/// Text without what a terminal would obey, or show in another place.
fn shown(text: &[u8]) -> String {
    let show = |&byte: &u8| match byte {
        b' '..=b'~' => char::from(byte),
        _ => '?',
    };
    text.iter().map(show).collect()
}
