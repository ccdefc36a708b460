//! Owns every instrument of `/metrics` and its name. Counts nothing itself: the figures are those of one moment,
//! which the daemon hands in. No series per peer or pair: `loden status` has those.

use std::collections::BTreeMap;
use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, NoLabelSet, text::encode};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;
use serde::Serialize;

use super::histogram::Distribution;
use crate::datapath::Status;
use crate::datapath::status::Counters;
use crate::wire::probe::Reach;

/// What OpenMetrics text is called in HTTP.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The daemon's figures of one moment.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// Nothing is missing.
    pub ready: bool,
    /// Seconds since the start.
    pub uptime_seconds: u64,
    /// Seconds until the lease ends; none for a reservation.
    pub lease_expires_seconds: Option<u64>,
    /// The lease was deleted and is not registered again yet.
    pub lease_lost: bool,
    /// Renewals that succeeded.
    pub lease_renewals: u64,
    /// Renewals that failed.
    pub lease_renewal_failures: u64,
    /// Times the lease was registered again after it was deleted.
    pub lease_reacquired: u64,
    /// Seconds since the store last said anything.
    pub store_silence_seconds: u64,
    /// Events from the store.
    pub store_events: u64,
    /// Problems that the store has reported.
    pub store_problems: u64,
    /// Peers whose leases are admitted.
    pub peers: u64,
    /// Leases that are refused.
    pub leases_refused: u64,
    /// Deleted leases whose routes are still held.
    pub leases_held: u64,
    /// How far the store's news has come.
    pub watch: Watch,
    /// Times the data plane was opened again.
    pub reopened: u64,
    /// Looks at the device, and how many led to a repair.
    pub device_looks: u64,
    /// Likewise.
    pub device_repairs: u64,
    /// Looks at the traffic rules, and how many led to a repair.
    pub rules_looks: u64,
    /// Likewise.
    pub rules_repairs: u64,
    /// What background probes found.
    pub probes: Probes,
    /// The data plane.
    pub datapath: Status,
}

/// What background probes found.
#[derive(Debug, Default)]
pub struct Probes {
    /// Visits of peers that are over.
    pub visits: u64,
    /// Visits that were answered.
    pub answered: u64,
    /// Round-trip times of those.
    pub rtt: Distribution,
    /// Peers by how they are reached.
    pub reach: BTreeMap<&'static str, u64>,
    /// Peers that are not reached as they should be.
    pub degraded: u64,
}

/// How far the store's news has come.
#[derive(Debug, Default, Serialize)]
pub struct Watch {
    /// Revisions of the store that are not in effect, as far as is known.
    pub revisions_behind: u64,
    /// How long the oldest news that is not in effect has been waiting.
    pub oldest_seconds: f64,
    /// From the arrival of news until it is in effect.
    pub lag: Distribution,
    /// Making a table for the workers, from the leases on.
    pub publications: Distribution,
}

/// The figures as OpenMetrics text.
///
/// # Errors
///
/// None that can happen; the format's own.
pub fn text(snapshot: Snapshot) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("loden");
    registry.register_collector(Box::new(snapshot));
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

/// One direction's counter: name, help, value.
type Instrument = (&'static str, &'static str, fn(&Counters) -> u64);

const INSTRUMENTS: [Instrument; 12] = [
    ("packets_read", "Inner packets read", |c| c.read),
    ("packets_sent", "Inner packets handed to the kernel", |c| {
        c.sent
    }),
    (
        "packets_answered",
        "Inner packets answered with an ICMP error",
        |c| c.answered,
    ),
    ("bytes_read", "Bytes of inner packets read", |c| {
        c.read_bytes
    }),
    ("bytes_sent", "Bytes of inner packets sent", |c| {
        c.sent_bytes
    }),
    (
        "superpackets_read",
        "Reads that held more than one segment",
        |c| c.read_superpackets,
    ),
    (
        "superpackets_sent",
        "Sends that held more than one segment",
        |c| c.sent_superpackets,
    ),
    ("read_calls", "System calls that read", |c| c.read_calls),
    ("send_calls", "System calls that sent", |c| c.send_calls),
    ("fragments", "Fragments made", |c| c.fragments),
    (
        "replays",
        "Runs or superpackets sent again without an offload",
        |c| c.replays,
    ),
    ("wakeups", "Wake-ups with something to do", |c| c.wakeups),
];

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let status = &self.datapath;
        let directions = [
            ("encap", &status.total.encap),
            ("decap", &status.total.decap),
        ];

        let info = [
            ("version", env!("CARGO_PKG_VERSION").to_owned()),
            ("engine", status.engine.clone()),
            ("device", status.device.clone()),
        ];
        let metric = encoder.encode_descriptor("daemon", "What runs", None, MetricType::Info)?;
        Info::new(info).encode(metric)?;

        let gauges: [(&str, &str, u64); 12] = [
            (
                "ready",
                "1 if nothing is missing, as /readyz says",
                self.ready.into(),
            ),
            (
                "uptime_seconds",
                "Time since the start",
                self.uptime_seconds,
            ),
            (
                "lease_lost",
                "1 while the lease is deleted and not registered again",
                self.lease_lost.into(),
            ),
            (
                "store_silence_seconds",
                "Time since the store last said anything",
                self.store_silence_seconds,
            ),
            ("peers", "Peers whose leases are admitted", self.peers),
            (
                "leases_refused",
                "Leases that are refused",
                self.leases_refused,
            ),
            (
                "leases_held",
                "Deleted leases whose routes are still held",
                self.leases_held,
            ),
            (
                "watch_revisions_behind",
                "Revisions of the store that are not in effect, as far as is known",
                self.watch.revisions_behind,
            ),
            (
                "probe_degraded_peers",
                "Peers that background probes lose, or whose long packets get lost",
                self.probes.degraded,
            ),
            ("workers", "Workers that run", status.workers.len() as u64),
            (
                "device_mtu_bytes",
                "MTU of the tunnel device",
                status.mtu.into(),
            ),
            (
                "lease_is_reservation",
                "1 if the lease never ends",
                self.lease_expires_seconds.is_none().into(),
            ),
        ];
        for (name, help, value) in gauges {
            gauge(&mut encoder, name, help, value)?;
        }
        if let Some(seconds) = self.lease_expires_seconds {
            gauge(
                &mut encoder,
                "lease_expires_seconds",
                "Time until the lease ends",
                seconds,
            )?;
        }

        let help = "How long the oldest news from the store that is not in effect has been waiting";
        let metric =
            encoder.encode_descriptor("watch_oldest_seconds", help, None, MetricType::Gauge)?;
        ConstGauge::new(self.watch.oldest_seconds).encode(metric)?;
        for (name, help, distribution) in [
            (
                "watch_lag_seconds",
                "Time from the arrival of the store's news until it is in effect",
                &self.watch.lag,
            ),
            (
                "publication_seconds",
                "Time to make a forwarding table and hand it to the workers",
                &self.watch.publications,
            ),
            (
                "probe_rtt_seconds",
                "Round-trip time of background probes that were answered",
                &self.probes.rtt,
            ),
            (
                "table_take_seconds",
                "Time a worker stood still to take a new forwarding table",
                &status.table_takes,
            ),
        ] {
            histogram(&mut encoder, name, help, distribution)?;
        }

        let counters: [(&str, &str, u64); 12] = [
            (
                "lease_renewals",
                "Renewals of the lease",
                self.lease_renewals,
            ),
            (
                "lease_renewal_failures",
                "Renewals that failed",
                self.lease_renewal_failures,
            ),
            (
                "lease_reacquired",
                "Times the lease was deleted and registered again",
                self.lease_reacquired,
            ),
            ("store_events", "Events from the store", self.store_events),
            (
                "store_problems",
                "Problems that the store reported",
                self.store_problems,
            ),
            (
                "datapath_reopened",
                "Times the data plane was opened again",
                self.reopened,
            ),
            (
                "probe_visits",
                "Visits of peers by background probes",
                self.probes.visits,
            ),
            (
                "probe_visits_answered",
                "Visits of peers by background probes that were answered",
                self.probes.answered,
            ),
            ("device_looks", "Looks at the device", self.device_looks),
            (
                "device_repairs",
                "Looks at the device that led to a repair",
                self.device_repairs,
            ),
            (
                "traffic_rules_looks",
                "Looks at the traffic rules",
                self.rules_looks,
            ),
            (
                "traffic_rules_repairs",
                "Looks at the traffic rules that led to a repair",
                self.rules_repairs,
            ),
        ];
        for (name, help, value) in counters {
            let value = ConstCounter::new(value);
            value.encode(encoder.encode_descriptor(name, help, None, MetricType::Counter)?)?;
        }

        let help = "Peers by how background probes reach them";
        let mut family = encoder.encode_descriptor("probe_peers", help, None, MetricType::Gauge)?;
        for reach in Reach::ALL {
            let labels = [("reach", reach.name())];
            let count = self.probes.reach.get(reach.name()).copied();
            number(count.unwrap_or(0)).encode(family.encode_family(&labels)?)?;
        }

        for (name, help, value) in INSTRUMENTS {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (direction, counters) in directions {
                let labels = [("direction", direction)];
                ConstCounter::new(value(counters)).encode(family.encode_family(&labels)?)?;
            }
        }
        let help = "Inner packets in hand";
        let mut family =
            encoder.encode_descriptor("packets_queued", help, None, MetricType::Gauge)?;
        for (direction, counters) in directions {
            let labels = [("direction", direction)];
            number(counters.queued).encode(family.encode_family(&labels)?)?;
        }
        let help = "Inner packets dropped, by reason";
        let mut family =
            encoder.encode_descriptor("packets_dropped", help, None, MetricType::Counter)?;
        for (direction, counters) in directions {
            for (&reason, &count) in &counters.drops {
                let labels = [("direction", direction), ("reason", reason)];
                ConstCounter::new(count).encode(family.encode_family(&labels)?)?;
            }
        }
        let help = "1 for a kernel feature in use, 0 for one that is not";
        let mut family = encoder.encode_descriptor("capability", help, None, MetricType::Gauge)?;
        for capability in &status.capabilities {
            let labels = [("name", capability.name.as_str())];
            number(capability.used.into()).encode(family.encode_family(&labels)?)?;
        }
        let help = "Times a kernel feature was given up";
        let mut family =
            encoder.encode_descriptor("capability_withdrawals", help, None, MetricType::Counter)?;
        for capability in &status.capabilities {
            let labels = [("name", capability.name.as_str())];
            ConstCounter::new(capability.withdrawals).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

fn gauge(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: u64) -> fmt::Result {
    let descriptor = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    number(value).encode(descriptor)
}

fn histogram(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    distribution: &Distribution,
) -> fmt::Result {
    let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
    let buckets = distribution
        .buckets
        .iter()
        .map(|bucket| (bucket.up_to_seconds.unwrap_or(f64::INFINITY), bucket.count));
    let buckets: Vec<(f64, u64)> = buckets.collect();
    let (sum, count) = (distribution.sum_seconds, distribution.count);
    metric.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)
}

/// The format has signed gauges only.
fn number(value: u64) -> ConstGauge<i64> {
    ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::DropReason;
    use crate::datapath::stats::Counts;
    use crate::telemetry::histogram::Histogram;
    use std::time::Duration;

    #[test]
    fn every_instrument_is_documented_with_its_kind_and_no_other() {
        let snapshot = Snapshot {
            lease_expires_seconds: Some(1),
            ..Snapshot::default()
        };
        let text = text(snapshot).unwrap();
        let told = text.lines().filter_map(|line| {
            let (name, kind) = line.strip_prefix("# TYPE loden_")?.split_once(' ')?;
            Some((name, kind))
        });
        let documented = include_str!("../../docs/metrics.md").lines();
        let documented = documented.filter_map(|line| {
            let mut cells = line.strip_prefix("| `")?.split(" | ");
            Some((cells.next()?.trim_end_matches('`'), cells.next()?))
        });
        let told: std::collections::BTreeSet<_> = told.collect();
        let documented: std::collections::BTreeSet<_> = documented.collect();
        assert_eq!(told, documented);
    }

    #[test]
    fn histogram_is_told_in_cumulative_buckets_that_end_with_infinity() {
        const BOUNDS: &[Duration] = &[Duration::from_nanos(250), Duration::from_millis(1)];
        let histogram = Histogram::new(BOUNDS);
        for micros in [0, 5, 6, 2_000] {
            histogram.record(Duration::from_micros(micros));
        }
        let mut snapshot = Snapshot::default();
        snapshot.datapath.table_takes = histogram.read();
        let text = text(snapshot).unwrap();
        let expected = "# TYPE loden_table_take_seconds histogram\n\
            loden_table_take_seconds_sum 0.002011\n\
            loden_table_take_seconds_count 4\n\
            loden_table_take_seconds_bucket{le=\"2.5e-7\"} 1\n\
            loden_table_take_seconds_bucket{le=\"0.001\"} 3\n\
            loden_table_take_seconds_bucket{le=\"+Inf\"} 4\n# HELP";
        assert!(text.contains(expected), "{text}");
    }

    #[test]
    fn every_reason_for_a_drop_is_a_series_of_its_own_and_counters_end_in_total_once() {
        let mut counts = Counts::default();
        counts.drop(DropReason::NoRoute, 7);
        let mut snapshot = Snapshot::default();
        snapshot.datapath.total.encap = counts.to_status();
        let text = text(snapshot).unwrap();
        for reason in DropReason::ALL {
            let count = if *reason == DropReason::NoRoute { 7 } else { 0 };
            let line = format!(
                "loden_packets_dropped_total{{direction=\"encap\",reason=\"{}\"}} {count}\n",
                reason.name()
            );
            assert!(text.contains(&line), "{line}{text}");
        }
        assert!(!text.contains("_total_total"), "{text}");
        assert!(text.ends_with("# EOF\n"), "{text}");
    }
}
