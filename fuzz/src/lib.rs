//! Owns what each fuzz target asserts, one file per target with one `run`. Never needs libFuzzer, so that
//! `tests/fuzz_replay.rs` runs the committed corpora on every build.

pub mod annotations;
pub mod capture_filter;
pub mod capture_record;
pub mod checksum;
pub mod cni;
pub mod coalesce;
pub mod flags;
pub mod fragment;
pub mod gso_plan;
pub mod icmp_error;
pub mod ip_parse;
pub mod lease_value;
pub mod net_conf;
pub mod probe;
pub mod round_trip;
pub mod split;
pub mod status_request;
pub mod subnet_env;
pub mod subnet_key;
pub mod vnet_hdr;
pub mod vxlan;

/// The body of a target: takes any bytes, panics when a promise is broken.
pub type Target = fn(&[u8]);

/// Every target by the name it has in `fuzz_targets` and `corpus`.
pub const TARGETS: &[(&str, Target)] = &[
    ("annotations", annotations::run),
    ("capture_filter", capture_filter::run),
    ("capture_record", capture_record::run),
    ("checksum", checksum::run),
    ("cni", cni::run),
    ("coalesce", coalesce::run),
    ("flags", flags::run),
    ("fragment", fragment::run),
    ("gso_plan", gso_plan::run),
    ("icmp_error", icmp_error::run),
    ("ip_parse", ip_parse::run),
    ("lease_value", lease_value::run),
    ("net_conf", net_conf::run),
    ("probe", probe::run),
    ("round_trip", round_trip::run),
    ("split", split::run),
    ("status_request", status_request::run),
    ("subnet_env", subnet_env::run),
    ("subnet_key", subnet_key::run),
    ("vnet_hdr", vnet_hdr::run),
    ("vxlan", vxlan::run),
];
