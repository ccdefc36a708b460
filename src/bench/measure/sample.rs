//! Owns the numbers of one run: what the ends and the meters report, as figures. Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::bench::Error;
use crate::bench::iperf::TcpResult;
use crate::bench::meter::Spent;
use crate::bench::scenario::{Load, Metric};
use crate::bench::tcp::{Answered, Ask};
use crate::bench::udp::{Received, UdpResult};

/// What one run of one scenario yielded. Numbers that do not apply (processor time where there is no
/// process) are not there.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// The numbers.
    #[serde(flatten)]
    pub figures: BTreeMap<Metric, f64>,
    /// The offloads that took part, where a daemon tells.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub engaged: Vec<String>,
    /// Why they do not count, or why there are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
}

impl Sample {
    /// A run that yielded nothing.
    #[must_use]
    pub fn failure(why: &Error) -> Self {
        Self {
            failed: Some(why.to_string()),
            ..Self::default()
        }
    }

    fn set(&mut self, metric: Metric, value: f64) {
        // A division by nothing is no figure.
        if value.is_finite() {
            self.figures.insert(metric, value);
        }
    }

    /// Notes context switches, and what the data planes have to say. `superpackets`: whether the traffic was made of
    /// them.
    fn note(&mut self, load: Load, superpackets: bool, spent: &Spent, daemon: bool) {
        if daemon {
            self.set(Metric::ContextSwitches, per_second(spent.switches, spent));
        }
        let switches = per_second(spent.machine_switches, spent);
        self.set(Metric::MachineSwitches, switches);
        let Some(work) = &spent.work else {
            return;
        };
        if let Some(calls) = work.calls_per_packet() {
            self.set(Metric::CallsPerPacket, calls);
        }
        if let Some(packets) = work.packets_per_call() {
            self.set(Metric::PacketsPerCall, packets);
        }
        self.engaged = work.engaged(load);
        let faults = work.faults(load, superpackets);
        if !faults.is_empty() {
            self.failed = Some(faults.join("; "));
        }
    }

    /// Notes how busy processors were, where there is no unit of work to divide by.
    fn note_load(&mut self, spent: &Spent, daemon: bool) {
        let percent = |time: Duration| time.as_secs_f64() / spent.elapsed.as_secs_f64() * 100.0;
        self.set(Metric::MachineLoad, percent(spent.machine));
        if daemon {
            self.set(Metric::DaemonLoad, percent(spent.cpu));
        }
    }

    pub(super) fn of_tcp(
        load: Load,
        result: &TcpResult,
        reordered: u64,
        spent: &Spent,
        daemon: bool,
    ) -> Self {
        let per_gigabyte = |time: Duration| time.as_secs_f64() / (result.bytes / 1e9);
        let mut sample = Self::default();
        sample.set(Metric::Throughput, result.bits_per_second / 1e9);
        sample.set(Metric::Retransmits, result.retransmits);
        sample.set(Metric::Reordered, as_f64(reordered));
        sample.set(Metric::MachinePerGigabyte, per_gigabyte(spent.machine));
        if daemon {
            sample.set(Metric::CpuPerGigabyte, per_gigabyte(spent.cpu));
        }
        sample.note(load, true, spent, daemon);
        sample
    }

    pub(super) fn of_packets(load: Load, result: &UdpResult, daemon: bool) -> Self {
        let received = as_f64(result.at_sink.received);
        let per_packet = |time: Duration| time.as_secs_f64() * 1e6 / received;
        let spent = &result.spent;
        let mut sample = Self::default();
        sample.set(Metric::MachinePerPacket, per_packet(spent.machine));
        if daemon {
            sample.set(Metric::CpuPerPacket, per_packet(spent.cpu));
        }
        let seconds = as_f64(result.sent.elapsed_ns) / 1e9;
        sample.set(Metric::PacketRate, received / 1e3 / seconds);
        sample.set(Metric::Loss, loss(result));
        sample.set(Metric::Reordered, as_f64(result.at_sink.reordered));
        sample.note(load, result.sent.segmented, spent, daemon);
        sample
    }

    /// With the rate that was offered in place of the one that arrived.
    pub(super) fn at_rate(mut self, rate: u32) -> Self {
        self.set(Metric::PacketRate, f64::from(rate) / 1e3);
        self
    }

    pub(super) fn of_one_way(load: Load, result: &UdpResult, daemon: bool) -> Self {
        let Received {
            p50_ns,
            p99_ns,
            p999_ns,
            ..
        } = result.at_sink;
        let mut sample = Self::default();
        sample.set_latencies([p50_ns, p99_ns, p999_ns]);
        sample.set(Metric::Loss, loss(result));
        sample.note_load(&result.spent, daemon);
        sample.note(load, false, &result.spent, daemon);
        sample
    }

    pub(super) fn of_answers(
        load: Load,
        ask: Ask,
        answered: &Answered,
        spent: &Spent,
        daemon: bool,
    ) -> Self {
        let mut sample = Self::default();
        sample.set_latencies([answered.p50_ns, answered.p99_ns, answered.p999_ns]);
        let metric = match ask {
            Ask::Requests => Metric::RequestRate,
            Ask::Connections => Metric::ConnectRate,
        };
        let seconds = as_f64(answered.elapsed_ns) / 1e9;
        sample.set(metric, as_f64(answered.count) / seconds);
        sample.note_load(spent, daemon);
        sample.note(load, false, spent, daemon);
        sample
    }

    fn set_latencies(&mut self, nanoseconds: [u64; 3]) {
        let metrics = [Metric::LatencyP50, Metric::LatencyP99, Metric::LatencyP999];
        for (metric, value) in metrics.into_iter().zip(nanoseconds) {
            self.set(metric, as_f64(value) / 1e3);
        }
    }
}

fn loss(result: &UdpResult) -> f64 {
    as_f64(result.lost()) / as_f64(result.sent.sent.max(1)) * 100.0
}

fn per_second(count: u64, spent: &Spent) -> f64 {
    as_f64(count) / spent.elapsed.as_secs_f64()
}

#[expect(
    clippy::cast_precision_loss,
    reason = "counts of one run are far below 2^52"
)]
const fn as_f64(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_survives_the_way_through_json_with_its_failure() {
        let mut sample = Sample::default();
        sample.set(Metric::Throughput, 6.25);
        sample.set(Metric::CpuPerGigabyte, f64::NAN);
        sample.failed = Some("udp-gso was given up: EIO".to_owned());
        let text = serde_json::to_string(&sample).unwrap();
        assert_eq!(
            text,
            r#"{"throughput":6.25,"failed":"udp-gso was given up: EIO"}"#
        );
        assert_eq!(serde_json::from_str::<Sample>(&text).unwrap(), sample);
    }
}
