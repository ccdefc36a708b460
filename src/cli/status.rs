//! Owns `loden status`: asks the daemon and prints the answer. Never interprets it: the daemon gives the reasons.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::Value;

use super::daemon::{SUBNET_FILE, socket_path};
use super::page::{Page, list, plain, print};
use crate::debug::socket::{self, Request, clean};

/// Flags of `loden status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Print the daemon's answer as it is, with every counter
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    at: SocketArgs,
}

/// Which daemon is asked.
#[derive(Debug, Args)]
pub(super) struct SocketArgs {
    /// The daemon's status socket [default: the one beside the subnet file]
    #[arg(long, value_name = "PATH", value_parser = socket_path, conflicts_with = "subnet_file")]
    socket: Option<PathBuf>,

    /// The daemon's subnet file
    #[arg(long, value_name = "FILE", default_value = SUBNET_FILE)]
    subnet_file: PathBuf,
}

impl SocketArgs {
    /// Its subnet file, as far as that is known.
    pub(super) fn subnet_file(&self) -> &Path {
        &self.subnet_file
    }

    /// Its socket.
    pub(super) fn path(&self) -> PathBuf {
        match &self.socket {
            Some(path) => path.clone(),
            None => socket::beside(&self.subnet_file),
        }
    }
}

pub(super) fn run(args: &StatusArgs) -> anyhow::Result<()> {
    let answer = socket::ask(&args.at.path(), &Request::Status)?;
    let text = if args.json {
        format!("{}\n", serde_json::to_string_pretty(&answer)?)
    } else {
        render(&answer)
    };
    Ok(print(&text)?)
}

/// The human form of the daemon's answer.
fn render(answer: &Value) -> String {
    let mut page = Page::default();
    let at = |path: &str| answer.pointer(path).unwrap_or(&Value::Null);
    let text = |path: &str| plain(at(path));

    let state = match at("/down").as_str() {
        Some(why) => format!("DOWN: {}", clean(why)),
        None => "ready".to_owned(),
    };
    page.section(
        "loden",
        &format!(
            "{}, pid {}, up {}, data plane reopened {} times: {state}",
            text("/version"),
            text("/pid"),
            duration(count(at("/uptime_seconds"))),
            text("/reopened"),
        ),
    );
    page.section(
        "interface",
        &format!(
            "{} with {}, MTU {}: {}",
            text("/interface/name"),
            text("/interface/addr"),
            text("/interface/mtu"),
            text("/interface/reason"),
        ),
    );
    for candidate in list(at("/candidates")).filter(|one| one["chosen"] != true) {
        let (name, why) = (plain(&candidate["name"]), plain(&candidate["why"]));
        page.section("", &format!("not {name}: {why}"));
    }
    let expires = match at("/lease/expires_in_seconds").as_u64() {
        Some(left) => format!("for another {} unless renewed", duration(left)),
        None => "for ever".to_owned(),
    };
    page.section(
        "lease",
        &format!(
            "{} of {}, {expires}; public IP {}; written to {}",
            text("/lease/subnets"),
            text("/lease/networks"),
            text("/lease/public"),
            text("/subnet_file"),
        ),
    );
    for device in list(at("/devices")) {
        let text = format!(
            "{} {}, MTU {}, queue {} packets, {} dropped by the kernel on the way out",
            plain(&device["name"]),
            if device["up"] == true { "up" } else { "DOWN" },
            plain(&device["mtu"]),
            plain(&device["tx_queue_len"]),
            plain(&device["tx_dropped"]),
        );
        page.section("device", &text);
    }
    watch(&mut page, answer);
    // Our own data plane carries what the udp backend sends, and VXLAN where the kernel does not.
    let own = at("/backend") == "udp" || list(at("/datapath/workers")).next().is_some();
    if own {
        data_plane(&mut page, answer);
        page.blank();
        traffic(&mut page, answer);
    } else {
        page.section("backend", &format!("{}, by the kernel", text("/backend")));
        senders(&mut page, at("/source_check"));
        for device in list(at("/checksums")).filter(|one| one["finding"] == "spoiled") {
            let (name, text) = (plain(&device["device"]), plain(&device["text"]));
            page.section("checksums", &format!("{name}: {text}"));
        }
        page.blank();
    }
    peers(&mut page, at("/peers"), own);
    probes(&mut page, at("/peers"));
    if own || at("/source_check").is_object() {
        drops(&mut page, at("/drops"));
    }
    for (title, entries) in [("refused", at("/refused")), ("conflicts", at("/conflicts"))] {
        if list(entries).next().is_some() {
            page.blank();
        }
        for (nth, entry) in list(entries).enumerate() {
            let line = match entry.as_str() {
                Some(line) => clean(line),
                None => format!("{}: {}", plain(&entry["what"]), plain(&entry["why"])),
            };
            page.section(if nth == 0 { title } else { "" }, &line);
        }
    }
    page.text
}

/// Which senders the kernel's tunnel device is kept from.
fn senders(page: &mut Page, check: &Value) {
    if !check.is_object() {
        return;
    }
    let checked: Vec<&str> = [("outer", "nodes"), ("inner", "inner sources")]
        .into_iter()
        .filter(|(key, _)| check[*key] == true)
        .map(|(_, what)| what)
        .collect();
    match checked.as_slice() {
        [] => {}
        checked => page.section("checks", &checked.join(" and ")),
    }
    if let Some(why) = check["why_not"].as_str() {
        page.section("", &format!("source check incomplete: {}", clean(why)));
    }
}

/// How far the daemon follows the store.
fn watch(page: &mut Page, answer: &Value) {
    let at = |path: &str| answer.pointer(path).unwrap_or(&Value::Null);
    let text = |path: &str| plain(at(path));
    if at("/watch").is_object() {
        let millis = |path: &str| format!("{:.1} ms", at(path).as_f64().unwrap_or(0.0) * 1e3);
        page.section(
            "watch",
            &format!(
                "{} revisions behind, oldest news {} old; {} events in effect, at most {} after they came; {} \
                 tables made, a worker stood still for one for at most {}",
                text("/watch/revisions_behind"),
                millis("/watch/oldest_seconds"),
                text("/watch/lag/count"),
                millis("/watch/lag/longest_seconds"),
                text("/watch/publications/count"),
                millis("/datapath/table_takes/longest_seconds"),
            ),
        );
    }
}

/// Our own data plane's engine, and what it uses.
fn data_plane(page: &mut Page, answer: &Value) {
    let at = |path: &str| answer.pointer(path).unwrap_or(&Value::Null);
    let text = |path: &str| plain(at(path));
    let workers = list(at("/datapath/workers")).count();
    page.section(
        "engine",
        &format!(
            "{}, {workers} workers, bound to {}",
            text("/datapath/engine"),
            text("/bind")
        ),
    );
    let (used, unused): (Vec<_>, Vec<_>) =
        list(at("/datapath/capabilities")).partition(|one| one["used"] == true);
    let used: Vec<String> = used.iter().map(|one| plain(&one["name"])).collect();
    page.section("uses", &used.join(", "));
    for one in unused {
        let (name, why) = (plain(&one["name"]), plain(&one["reason"]));
        page.section("", &format!("not {name}: {why}"));
    }
    let limits = at("/datapath/limits").as_object().into_iter().flatten();
    let limits: Vec<String> = limits
        .map(|(name, value)| format!("{} {}", clean(name), plain(value)))
        .collect();
    page.section("limits", &limits.join(", "));
}

fn traffic(page: &mut Page, answer: &Value) {
    page.row([
        "packets",
        "read",
        "sent",
        "answered",
        "dropped",
        "read bytes",
    ]);
    let mut lines = |name: &str, worker: &Value| {
        for direction in ["encap", "decap"] {
            let counters = &worker[direction];
            let drops = counters["drops"].as_object().into_iter().flatten();
            let dropped: u64 = drops.map(|(_, value)| count(value)).sum();
            page.row([
                &format!("{name} {direction}"),
                &plain(&counters["read"]),
                &plain(&counters["sent"]),
                &plain(&counters["answered"]),
                &dropped.to_string(),
                &plain(&counters["read_bytes"]),
            ]);
        }
    };
    lines("all", &answer["datapath"]["total"]);
    let workers: Vec<&Value> = list(&answer["datapath"]["workers"]).collect();
    if workers.len() > 1 {
        for (nth, worker) in workers.iter().enumerate() {
            lines(&format!("worker {nth}"), worker);
        }
    }
    page.blank();
}

/// Only our own data plane counts by peer.
fn peers(page: &mut Page, peers: &Value, counted: bool) {
    let or = |value: &Value, none: &str| match value.is_null() {
        true => none.to_owned(),
        false => plain(value),
    };
    page.row(match counted {
        true => [
            "peers", "endpoint", "sent", "received", "dropped", "path MTU",
        ],
        false => ["peers", "public IP", "by", "", "", ""],
    });
    for peer in list(peers) {
        let subnets = plain(&peer["subnets"]);
        if !counted {
            let (public, by) = (or(&peer["public"], "-"), or(&peer["transport"], "nothing"));
            page.row([&subnets, &public, &by, "", "", ""]);
            ways(page, peer);
            continue;
        }
        let path_mtu = or(&peer["path_mtu"], "-");
        let endpoint = or(&peer["endpoint"], "unreachable");
        page.row([
            &subnets,
            &endpoint,
            &plain(&peer["sent"]),
            &plain(&peer["received"]),
            &plain(&peer["dropped"]),
            &path_mtu,
        ]);
        if let Some(why) = peer["gso_withdrawn"].as_str() {
            page.section("", &format!("UDP GSO given up: {}", clean(why)));
        }
        ways(page, peer);
    }
}

/// Why a peer is reached by a way that had to be proven, and not by a better one.
fn ways(page: &mut Page, peer: &Value) {
    for (word, ways) in [("by", &peer["proven"]), ("not by", &peer["rejected"])] {
        for way in list(ways) {
            let (transport, why) = (plain(&way["transport"]), plain(&way["why"]));
            page.section("", &format!("{word} {transport}: {why}"));
        }
    }
}

/// What background probes found: how many are reached how, and each one that is not as it should be.
fn probes(page: &mut Page, peers: &Value) {
    let all: Vec<&Value> = list(peers)
        .filter(|peer| peer["probe"].is_object())
        .collect();
    if all.is_empty() {
        return;
    }
    let mut counts: BTreeMap<String, u32> = BTreeMap::new();
    let mut times = Vec::new();
    for peer in &all {
        let reach = peer["probe"]["reach"].as_str().unwrap_or("unknown");
        *counts.entry(clean(reach)).or_default() += 1;
        times.extend(peer["probe"]["rtt_us"].as_f64());
    }
    let counts = counts
        .iter()
        .map(|(reach, count)| format!("{count} {reach}"));
    let mut line = format!("of peers: {}", counts.collect::<Vec<_>>().join(", "));
    times.sort_unstable_by(f64::total_cmp);
    if let (Some(least), Some(most)) = (times.first(), times.last()) {
        let (least, most) = (least / 1e3, most / 1e3);
        // Writing to a string cannot fail.
        let _infallible = write!(line, "; round trips of {least:.2} to {most:.2} ms");
    }
    page.blank();
    page.section("probes", &line);
    for peer in all.iter().filter(|peer| peer["probe"]["degraded"] == true) {
        let line = format!(
            "{}: {}, for {}: loden doctor finds out why",
            plain(&peer["subnets"]),
            plain(&peer["probe"]["sentence"]),
            duration(count(&peer["probe"]["state_seconds"])),
        );
        page.section("", &line);
    }
}

fn drops(page: &mut Page, drops: &Value) {
    let (happened, not): (Vec<&Value>, Vec<&Value>) =
        list(drops).partition(|drop| count(&drop["encap"]) > 0 || count(&drop["decap"]) > 0);
    if happened.is_empty() && not.is_empty() {
        return;
    }
    page.blank();
    let mut title = "drops";
    let any = !happened.is_empty();
    for drop in happened {
        let line = format!(
            "{}: {} encap, {} decap: {}",
            plain(&drop["reason"]),
            plain(&drop["encap"]),
            plain(&drop["decap"]),
            plain(&drop["remedy"])
        );
        page.section(std::mem::take(&mut title), &line);
    }
    let not: Vec<String> = not.iter().map(|drop| plain(&drop["reason"])).collect();
    page.section(title, &format!("none by {}", not.join(", ")));
    if any {
        page.section("", "each is explained under its name in docs/debugging.md");
    }
}

fn count(value: &Value) -> u64 {
    value.as_u64().unwrap_or(0)
}

fn duration(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m{}s", seconds % 60),
        (0, _, _) => format!("{hours}h{minutes}m"),
        _ => format!("{days}d{hours}h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::page::WIDTH;
    use serde_json::json;

    fn answer() -> Value {
        json!({
            "version": "9.9.9", "pid": 42, "uptime_seconds": 3723, "down": null, "reopened": 0,
            "subnet_file": "/run/flannel/subnet.env",
            "interface": {"name": "eth0", "addr": "192.0.2.1", "mtu": 1500, "reason": "it was named"},
            "candidates": [
                {"name": "eth0", "chosen": true, "why": "it was named"},
                {"name": "lo", "chosen": false, "why": "no usable IPv4 address (127.0.0.1 is loopback)"},
            ],
            "backend": "udp",
            "bind": "192.0.2.1:8285",
            "lease": {"subnets": ["198.18.3.0/24"], "networks": ["198.18.0.0/16"],
                      "public": "192.0.2.1", "expires_in_seconds": 86_300},
            "devices": [{"name": "flannel0", "up": true, "mtu": 1472, "tx_queue_len": 1000, "tx_dropped": 7}],
            "peers": [{"subnets": ["198.18.4.0/24"], "endpoint": "192.0.2.2:8285", "sent": 18_446_744_073_u64,
                       "received": 2, "dropped": 0, "path_mtu": 1400, "gso_withdrawn": "EIO"}],
            "refused": [{"what": "lease \u{1b}[31m", "why": "it overlaps our own"}],
            "conflicts": ["route 198.18.9.0/24 on eth1 takes part of it elsewhere"],
            "watch": {"revisions_behind": 3, "oldest_seconds": 0.0125, "lag": {"count": 77, "longest_seconds": 0.25},
                      "publications": {"count": 5}},
            "drops": [
                {"reason": "no_route", "encap": 3, "decap": 0, "remedy": "check that a lease exists"},
                {"reason": "malformed", "encap": 0, "decap": 0, "remedy": "find the sender"},
            ],
            "datapath": {
                "engine": "mmsg", "table_takes": {"longest_seconds": 0.000_21}, "limits": {"rcvbuf": 4_194_304},
                "capabilities": [{"name": "udp-gso", "used": true},
                                 {"name": "tun-uso4", "used": false, "reason": "kernel too old"}],
                "workers": [{}, {}],
                "total": {"encap": {"read": 10, "sent": 7, "answered": 0, "drops": {"no_route": 3},
                                    "read_bytes": 640}, "decap": {}},
            },
        })
    }

    #[test]
    fn peers_are_counted_by_how_they_are_reached_and_the_bad_ones_are_named() {
        let peer = |subnet: &str, reach: &str, degraded: bool| {
            json!({"subnets": [subnet], "probe": {"reach": reach, "degraded": degraded, "rtt_us": 1500,
                   "sentence": "nothing comes\u{1b} back", "state_seconds": 62}})
        };
        let mut answer = answer();
        assert!(!render(&answer).contains("probes"));
        answer["peers"] = json!([
            peer("198.18.4.0/24", "answers", false),
            peer("198.18.5.0/24", "silent", true),
            peer("198.18.6.0/24", "answers", false),
        ]);
        let text = render(&answer);
        let expected = "\nprobes      of peers: 2 answers, 1 silent; round trips of 1.50 to 1.50 ms\n            \
             198.18.5.0/24: nothing comes\u{fffd} back, for 1m2s: loden doctor finds out why\n";
        assert!(text.contains(expected), "{text}");
    }

    #[test]
    fn every_fact_of_the_answer_is_printed_within_the_width() {
        let text = render(&answer());
        for fact in [
            "9.9.9, pid 42, up 1h2m",
            "eth0 with 192.0.2.1, MTU 1500: it was named",
            "not lo: no usable",
            "198.18.3.0/24 of 198.18.0.0/16, for another 23h58m",
            "7 dropped by the kernel",
            "3 revisions behind, oldest news 12.5 ms old; 77 events in effect, at most 250.0 ms",
            "stood still for one for at most 0.2 ms",
            "mmsg, 2 workers",
            "not tun-uso4: kernel too old",
            "rcvbuf 4194304",
            "192.0.2.2:8285",
            "18446744073",
            "UDP GSO given up: EIO",
            "no_route: 3 encap, 0 decap: check that a lease exists",
            "explained under its name in docs/debugging.md",
            "it overlaps our own",
            "route 198.18.9.0/24 on eth1",
        ] {
            assert!(text.contains(fact), "{fact:?} is missing in:\n{text}");
        }
        for line in text.lines() {
            assert!(line.chars().count() <= WIDTH, "too wide: {line}");
        }
    }

    #[test]
    fn kernels_backends_show_their_devices_and_how_each_peer_is_reached_and_no_counters() {
        let mut answer = answer();
        answer["backend"] = "vxlan".into();
        answer["datapath"]["workers"] = json!([]);
        answer["devices"] = json!([{"name": "flannel.1"}, {"name": "flannel-v6.1"}]);
        answer["peers"][0]["public"] = "192.0.2.2".into();
        answer["peers"][0]["transport"] = "route".into();
        let text = render(&answer);
        for fact in [
            "vxlan, by the kernel",
            "flannel.1",
            "flannel-v6.1",
            "192.0.2.2",
        ] {
            assert!(text.contains(fact), "{fact:?} is missing in:\n{text}");
        }
        assert!(
            text.lines()
                .any(|line| line.starts_with("198.18.4.0/24") && line.ends_with("route"))
        );
        assert!(
            !text.contains("read bytes") && !text.contains("workers"),
            "{text}"
        );
    }

    #[test]
    fn reasons_without_drops_are_named_without_remedy_and_control_characters_never_printed() {
        let text = render(&answer());
        assert!(text.contains("none by malformed"), "{text}");
        assert!(!text.contains("find the sender"), "{text}");
        assert!(!text.contains('\u{1b}'), "{text:?}");
    }

    #[test]
    fn data_plane_that_is_down_is_shown_with_its_reason_and_an_empty_answer_does_no_harm() {
        let mut down = answer();
        down["down"] = "device flannel0 was removed".into();
        assert!(render(&down).contains("DOWN: device flannel0 was removed"));
        assert!(render(&json!({})).contains("loden"));
    }
}
