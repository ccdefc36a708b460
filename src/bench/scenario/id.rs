//! Owns the text ids of scenarios: one way to write each, and the way back. Pure.

use std::fmt;
use std::str::FromStr;

use super::{Ends, Load, MAX_LEN, MAX_STREAMS, Scenario};

/// What a scenario is called on the command line, in reports, and for people.
impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let jumbo = if self.jumbo { "jumbo-" } else { "" };
        let ends = match self.ends {
            Ends::Pods => "",
            Ends::Hosts => "host-",
        };
        let load = |half| if half { "half" } else { "idle" };
        let text = match self.load {
            Load::Tcp { streams, both } => {
                format!("tcp-{streams}{}", if both { "-both" } else { "" })
            }
            Load::Udp { len, burst } => format!("udp-{len}{}", if burst { "-burst" } else { "" }),
            Load::OneWay { half } => format!("latency-{}", load(half)),
            Load::Request { half } => format!("request-{}", load(half)),
            Load::Connect => "connect-rate".to_owned(),
            Load::Lossless { len } => format!("lossless-{len}"),
        };
        f.pad(&format!("{jumbo}{ends}{text}"))
    }
}

impl FromStr for Scenario {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (jumbo, rest) = stripped(text, "jumbo-");
        let (hosts, rest) = stripped(rest, "host-");
        let ends = if hosts { Ends::Hosts } else { Ends::Pods };
        Load::parse(rest)
            .map(|load| Self { jumbo, ends, load })
            // There is one way to write each, so that ids and scenarios map one to one.
            .filter(|scenario| scenario.id() == text)
            .ok_or_else(|| {
                format!(
                    "there is no scenario {text:?}; there are tcp-N, tcp-N-both (1 to {MAX_STREAMS} streams), \
                     udp-LEN, udp-LEN-burst, lossless-LEN (20 to {MAX_LEN} bytes), latency-idle, latency-half, \
                     request-idle, request-half and connect-rate, each also after host- and, before that, jumbo-"
                )
            })
    }
}

impl Load {
    fn parse(text: &str) -> Option<Self> {
        match text {
            "latency-idle" => return Some(Self::OneWay { half: false }),
            "latency-half" => return Some(Self::OneWay { half: true }),
            "request-idle" => return Some(Self::Request { half: false }),
            "request-half" => return Some(Self::Request { half: true }),
            "connect-rate" => return Some(Self::Connect),
            _ => {}
        }
        let (kind, rest) = text.split_once('-')?;
        let (number, suffix) = rest.split_once('-').unwrap_or((rest, ""));
        let value: u16 = number.parse().ok()?;
        let len = || (20..=MAX_LEN).contains(&value).then_some(value);
        match (kind, suffix) {
            ("tcp", "" | "both") => {
                let streams = u8::try_from(value).ok();
                Some(Self::Tcp {
                    streams: streams.filter(|n| (1..=MAX_STREAMS).contains(n))?,
                    both: suffix == "both",
                })
            }
            ("udp", "" | "burst") => Some(Self::Udp {
                len: len()?,
                burst: suffix == "burst",
            }),
            ("lossless", "") => Some(Self::Lossless { len: len()? }),
            _ => None,
        }
    }
}

fn stripped<'a>(text: &'a str, prefix: &str) -> (bool, &'a str) {
    text.strip_prefix(prefix)
        .map_or((false, text), |rest| (true, rest))
}

impl TryFrom<String> for Scenario {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Scenario> for String {
    fn from(scenario: Scenario) -> Self {
        scenario.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_gives_back_its_scenario_and_the_scenario_its_id() {
        for id in [
            "tcp-1",
            "tcp-64",
            "tcp-8-both",
            "udp-64",
            "udp-1472",
            "udp-64-burst",
            "lossless-512",
            "latency-idle",
            "latency-half",
            "request-half",
            "connect-rate",
            "host-tcp-1",
            "jumbo-tcp-1",
            "jumbo-host-latency-idle",
        ] {
            assert_eq!(id.parse::<Scenario>().unwrap().id(), id);
        }
        assert_eq!("tcp-8".parse(), Ok(Scenario::tcp(8)));
        let hosts = "jumbo-host-tcp-1".parse::<Scenario>().unwrap();
        assert_eq!((hosts.jumbo, hosts.ends), (true, Ends::Hosts));
    }

    #[test]
    fn what_no_generator_could_send_is_refused_by_name() {
        for id in [
            "",
            "tcp",
            "tcp-0",
            "tcp-129",
            "tcp-01",
            "tcp-1-",
            "udp-19",
            "udp-2001",
            "udp-64-both",
            "host-jumbo-tcp-1",
            "latency",
            "lossless-64-burst",
            "tcp-one",
        ] {
            let error = id.parse::<Scenario>().unwrap_err();
            assert!(error.contains(&format!("{id:?}")), "{error}");
        }
    }
}
