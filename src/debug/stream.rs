//! Owns how records of a capture travel over the status socket. Never looks into a packet, and never makes a
//! worker wait: what a slow client does not fetch is lost and counted.
//!
//! After the answer's line of JSON come frames until either side hangs up. All numbers are little-endian:
//!
//! | bytes | what |
//! |---|---|
//! | 0..4 | length of the records in this frame |
//! | 4..12 | records lost since the beginning |
//! | 12..20 | inner packets that those stood for |
//! | 20..28 | nanoseconds since 1970: all records up to then are in this frame or were in earlier ones |
//! | 28.. | whole records ([`crate::datapath::tap::record`]) |

use std::io;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::time::{MissedTickBehavior, interval};

use crate::datapath::tap::{self, Capture, Lost, MAX_SNAP_LEN};

/// How often the rings are emptied.
const EVERY: Duration = Duration::from_millis(10);

/// Records of one frame, about.
const FRAME_LEN: usize = 1 << 20;

/// The longest frame a client reads: every worker may exceed its share by one record.
const MAX_FRAME_LEN: usize = 2 * FRAME_LEN + 64 * MAX_SNAP_LEN;

const PREFIX_LEN: usize = 28;

/// Sends what is captured until the client hangs up or the data plane is closed.
///
/// # Errors
/// The client went away in the middle of a frame.
pub(super) async fn serve(
    mut capture: Capture,
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
) -> io::Result<()> {
    let mut ticks = interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut frame = Vec::new();
    let mut told = Lost::default();
    // Up to when the client knows to have everything, and up to when it has something.
    let (mut settled, mut newest) = (0, 0);
    let mut ignored = [0; 64];
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            // Whatever a client says now is its goodbye.
            _ = from.read(&mut ignored) => return Ok(()),
        }
        loop {
            // Asked first: what the workers wrote before their end is still in the rings.
            let over = capture.is_over();
            let until = capture.settled();
            frame.clear();
            frame.resize(PREFIX_LEN, 0);
            let emptied = capture.take(&mut frame, FRAME_LEN);
            let lost = capture.lost();
            let records = frame.len() - PREFIX_LEN;
            if records > 0 {
                newest = tap::now_ns();
            }
            // What is held there waits for this.
            let awaited = settled < newest;
            if emptied {
                settled = until.max(settled);
            }
            if records == 0 && lost == told && !awaited {
                if over {
                    return Ok(());
                }
                break;
            }
            told = lost;
            let len = u32::try_from(records).unwrap_or(u32::MAX);
            frame[0..4].copy_from_slice(&len.to_le_bytes());
            frame[4..12].copy_from_slice(&lost.records.to_le_bytes());
            frame[12..20].copy_from_slice(&lost.packets.to_le_bytes());
            frame[20..28].copy_from_slice(&settled.to_le_bytes());
            to.write_all(&frame).await?;
            if records < FRAME_LEN / 2 {
                break;
            }
        }
    }
}

/// What a frame says beside its records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Told {
    /// What was lost since the beginning.
    pub lost: Lost,
    /// All records up to then, in nanoseconds since 1970, have come.
    pub settled: u64,
}

/// Reads the next frame's records into `records`; `None` when the daemon hung up between frames.
///
/// # Errors
/// The daemon hung up in the middle of a frame, or sends what is no frame.
pub async fn next_frame(
    from: &mut (impl AsyncRead + Unpin),
    records: &mut Vec<u8>,
) -> io::Result<Option<Told>> {
    let mut prefix = [0; PREFIX_LEN];
    let first = from.read(&mut prefix).await?;
    if first == 0 {
        return Ok(None);
    }
    let rest = prefix.get_mut(first..).unwrap_or_default();
    from.read_exact(rest).await?;
    let len = u32::from_le_bytes([prefix[0], prefix[1], prefix[2], prefix[3]]) as usize;
    if len > MAX_FRAME_LEN {
        return Err(io::Error::other(format!(
            "a frame of {len} bytes: daemon and client differ in version"
        )));
    }
    records.clear();
    records.resize(len, 0);
    from.read_exact(records).await?;
    let count = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| prefix[at + i]));
    Ok(Some(Told {
        lost: Lost {
            records: count(4),
            packets: count(12),
        },
        settled: count(20),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> io::Result<Option<(Told, Vec<u8>)>> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        let mut records = Vec::new();
        let told = runtime.block_on(next_frame(&mut &*bytes, &mut records))?;
        Ok(told.map(|told| (told, records)))
    }

    #[test]
    fn frames_are_read_whole_or_refused() {
        let mut frame = vec![3, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0];
        frame.extend(4_u64.to_le_bytes());
        frame.extend(b"abc");
        let told = Told {
            lost: Lost {
                records: 1,
                packets: 2,
            },
            settled: 4,
        };
        assert_eq!(read(&frame).unwrap(), Some((told, b"abc".to_vec())));
        assert_eq!(read(&[]).unwrap(), None);
        for len in 1..frame.len() {
            assert!(read(&frame[..len]).is_err(), "{len} bytes");
        }
        frame[3] = 0xff;
        assert!(read(&frame).unwrap_err().to_string().contains("version"));
    }
}
