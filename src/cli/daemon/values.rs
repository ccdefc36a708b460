//! Owns how the text of a flag becomes a value, as Go's `flag` reads it (flannel specification section 1.1), and
//! refuses what makes no sense. Pure.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;
use std::time::Duration;

use crate::addr::UnderlayAddr;
use crate::firewall::ResyncInterval;
use crate::iface::Pattern;

/// An address, or nothing for the empty text that templates leave behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PublicIp<A>(pub(super) Option<A>);

pub(super) fn public_ip<A: FromStr<Err: fmt::Display> + Copy + Into<IpAddr>>(
    text: &str,
) -> Result<PublicIp<A>, String> {
    if text.is_empty() {
        return Ok(PublicIp(None));
    }
    let addr: A = text.parse().map_err(|e: A::Err| e.to_string())?;
    UnderlayAddr::new(addr.into())
        .ok_or("not an address other nodes can send to: give a unicast address")?;
    Ok(PublicIp(Some(addr)))
}

pub(super) fn pattern(text: &str) -> Result<Option<Pattern>, String> {
    if text.is_empty() {
        return Ok(None);
    }
    Pattern::new(text).map(Some).map_err(|e| e.to_string())
}

/// A text that is never shown.
#[derive(Clone, Default, PartialEq, Eq)]
pub(super) struct Secret(pub(super) String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "none" } else { "***" })
    }
}

pub(super) fn secret(text: &str) -> Result<Secret, std::convert::Infallible> {
    Ok(Secret(text.to_owned()))
}

/// The texts Go takes for a boolean.
pub(in crate::cli) fn go_bool(text: &str) -> Result<bool, &'static str> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err("use true or false"),
    }
}

/// The texts Go takes for an integer: `16`, `0x10`, `0o20`, `020`, `0b1_0000`, each with a sign or without.
pub(super) fn go_int(text: &str) -> Result<i64, &'static str> {
    const WRONG: &str = "not a number: write it like 16, 0x10, 020 or 0b10000";
    let (negative, digits) = match text.as_bytes().first() {
        Some(b'-') => (true, &text[1..]),
        Some(b'+') => (false, &text[1..]),
        _ => (false, text),
    };
    let lower = digits.to_ascii_lowercase();
    let (radix, digits, prefixed) = if let Some(rest) = lower.strip_prefix("0x") {
        (16, rest, true)
    } else if let Some(rest) = lower.strip_prefix("0b") {
        (2, rest, true)
    } else if let Some(rest) = lower.strip_prefix("0o") {
        (8, rest, true)
    } else if let Some(rest) = lower.strip_prefix('0').filter(|rest| !rest.is_empty()) {
        (8, rest, true)
    } else {
        (10, lower.as_str(), false)
    };
    // An underscore stands between two digits, or between the prefix and a digit, and only where a prefix says
    // that this is meant for programs.
    let grouped = digits.contains('_');
    let misplaced = digits.ends_with('_') || digits.contains("__") || !prefixed;
    if grouped && misplaced || digits.starts_with(['+', '-']) {
        return Err(WRONG);
    }
    let plain = digits.replace('_', "");
    let magnitude = i128::from_str_radix(&plain, radix).map_err(|_not_digits| WRONG)?;
    let value = if negative { -magnitude } else { magnitude };
    i64::try_from(value).map_err(|_too_large| "too large a number")
}

/// Minutes before the end of a lease of 24 hours.
pub(super) fn renew_margin(text: &str) -> Result<Duration, &'static str> {
    match go_int(text)? {
        minutes @ 1..=1439 => Ok(Duration::from_secs(minutes.unsigned_abs() * 60)),
        _ => Err("a lease lasts 1440 minutes: give a margin from 1 to 1439"),
    }
}

pub(super) fn resync(text: &str) -> Result<ResyncInterval, String> {
    let seconds = go_int(text)?;
    ResyncInterval::from_secs(seconds).map_err(|e| e.to_string())
}

/// A port to listen on; none for zero and less, as the original has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct HealthPort(pub(super) Option<u16>);

pub(super) fn health_port(text: &str) -> Result<HealthPort, &'static str> {
    match go_int(text)? {
        ..=0 => Ok(HealthPort(None)),
        port => u16::try_from(port)
            .map(|port| HealthPort(Some(port)))
            .map_err(|_too_large| "not a port: give one from 1 to 65535, or 0 for none"),
    }
}

pub(super) fn health_ip(text: &str) -> Result<IpAddr, &'static str> {
    if text.is_empty() {
        return Ok(Ipv4Addr::UNSPECIFIED.into());
    }
    text.parse()
        .map_err(|_no_address| "not an address: give one of this node, or 0.0.0.0 for all")
}

/// More than 255 says no more than 255.
pub(super) fn verbosity(text: &str) -> Result<u8, &'static str> {
    Ok(u8::try_from(go_int(text)?.max(0)).unwrap_or(u8::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_go() {
        // Judged by Go 1.24's strconv.ParseInt(text, 0, 64).
        for (text, expected) in [
            ("0", 0),
            ("-0", 0),
            ("+7", 7),
            ("60", 60),
            ("0x3C", 60),
            ("0X3c", 60),
            ("074", 60),
            ("0o74", 60),
            ("0O74", 60),
            ("0b111100", 60),
            ("0_74", 60),
            ("0x_3c", 60),
            ("0b11_11_00", 60),
            ("-0x3c", -60),
            ("9223372036854775807", i64::MAX),
            ("-9223372036854775808", i64::MIN),
        ] {
            assert_eq!(go_int(text), Ok(expected), "{text}");
        }
        for text in [
            "",
            "-",
            "+",
            "x",
            "0x",
            "08",
            "0b2",
            "1_000",
            "_1",
            "0x3c_",
            "0x__3",
            "--1",
            "0x-3",
            "1e3",
            " 1",
            "9223372036854775808",
            "6 0",
        ] {
            assert!(go_int(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn margins_that_a_lease_has_no_room_for_are_refused() {
        for bad in ["0", "-1", "1440", "0x5a0", "x"] {
            assert!(renew_margin(bad).is_err(), "{bad}");
        }
        for (text, minutes) in [("1", 1), ("1439", 1439), ("0x3c", 60)] {
            let expected = Duration::from_secs(minutes * 60);
            assert_eq!(renew_margin(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn port_zero_and_below_mean_no_server() {
        assert_eq!(health_port("0"), Ok(HealthPort(None)));
        assert_eq!(health_port("-1"), Ok(HealthPort(None)));
        assert_eq!(health_port("0x1f90"), Ok(HealthPort(Some(8080))));
        assert!(health_port("65536").is_err());
    }

    #[test]
    fn secret_is_not_shown() {
        let shown = format!("{:?}", secret("hunter2").unwrap());
        assert_eq!(shown, "***");
    }
}
