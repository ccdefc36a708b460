//! Owns `loden doctor`: asks the daemon to examine its peers, and prints what it found. Never concludes anything.

mod bundle;
mod redact;

use std::ffi::OsString;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::bail;
use clap::Args;
use serde_json::Value;

use crate::cli::page::{Page, list, plain, print};
use crate::cli::status::SocketArgs;
use crate::daemon::preflight::{self, Grade};
use crate::debug::socket::{self, Request, clean};

/// Flags of `loden doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Examine only the peer that has this address: its public IP, or one in its subnet
    #[arg(long, value_name = "IP")]
    peer: Option<IpAddr>,

    /// Ask all nodes how they reach each other, and print the matrix
    #[arg(long)]
    mesh: bool,

    /// Look at this node before a daemon runs on it: everything that would stand in the way. Takes the daemon's flags
    /// behind `--`, and its variables; changes nothing
    #[arg(long, conflicts_with_all = ["peer", "mesh"])]
    preflight: bool,

    /// Write a tar archive of what somebody needs who is not there, without passwords and keys
    #[arg(long, value_name = "FILE", conflicts_with = "preflight")]
    support_bundle: Option<PathBuf>,

    /// The daemon's flags, for --preflight
    #[arg(last = true, value_name = "FLAG", requires = "preflight")]
    daemon: Vec<OsString>,

    /// Print the daemon's answer as it is
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    at: SocketArgs,
}

pub(super) fn run(args: DoctorArgs) -> anyhow::Result<()> {
    if args.preflight {
        return preflight(args.daemon, args.json);
    }
    let request = Request::Doctor {
        peer: args.peer,
        mesh: args.mesh,
    };
    let socket = args.at.path();
    let asked = socket::ask(&socket, &request);
    if let Some(path) = &args.support_bundle {
        let said = asked
            .as_ref()
            .map(Clone::clone)
            .map_err(ToString::to_string);
        bundle::write(path, &socket, args.at.subnet_file(), &said)?;
    }
    let answer = asked?;
    let text = if args.json {
        format!("{}\n", serde_json::to_string_pretty(&answer)?)
    } else {
        render(&answer)
    };
    print(&text)?;
    if answer["healthy"] != true {
        bail!("something is wrong: see above");
    }
    Ok(())
}

/// Looks at this node as a daemon with these flags would find it.
fn preflight(flags: Vec<OsString>, json: bool) -> anyhow::Result<()> {
    let program = [OsString::from("loden"), crate::cli::DAEMON.into()];
    let line = program.into_iter().chain(flags).collect();
    let invocation = crate::cli::parse_from(line, |name| std::env::var_os(name))?;
    let crate::cli::Command::Daemon(daemon) = invocation.command else {
        bail!("give the daemon's flags behind --, and nothing else");
    };
    let checks = preflight::preflight(&daemon.into_options(false)?);
    let text = if json {
        format!("{}\n", serde_json::to_string_pretty(&checks)?)
    } else {
        let mut page = Page::default();
        for grade in [Grade::Failure, Grade::Warning, Grade::Good] {
            let mut title = match grade {
                Grade::Failure => "FAILURE",
                Grade::Warning => "warning",
                Grade::Good => "good",
            };
            for check in checks.iter().filter(|check| check.grade == grade) {
                let found = clean(&check.found);
                page.section(
                    std::mem::take(&mut title),
                    &format!("{}: {found}", check.what),
                );
            }
        }
        page.text
    };
    print(&text)?;
    let failures = checks.iter().filter(|check| check.grade == Grade::Failure);
    match failures.count() {
        0 => Ok(()),
        count => bail!("{count} things stand in the way: see above"),
    }
}

/// The human form of the daemon's answer.
fn render(answer: &Value) -> String {
    let mut page = Page::default();
    let mut title = "node";
    for line in list(&answer["node"]) {
        page.section(std::mem::take(&mut title), &plain(line));
    }
    if !title.is_empty() {
        page.section(title, "nothing is wrong with it");
    }
    let peers: Vec<&Value> = list(&answer["peers"]).collect();
    let (well, ill): (Vec<&Value>, Vec<&Value>) = peers
        .iter()
        .copied()
        .partition(|peer| list(&peer["findings"]).next().is_none());
    let took = answer["took_ms"].as_f64().unwrap_or(0.0) / 1e3;
    page.section(
        "peers",
        &format!(
            "{} of {} examined in {took:.1} s: {} as they should be, {} not",
            peers.len(),
            plain(&answer["peers_in_all"]),
            well.len(),
            ill.len()
        ),
    );
    for peer in ill.into_iter().chain(well) {
        page.blank();
        let by = plain(&peer["transport"]);
        page.section(
            "peer",
            &format!(
                "{} at {} by {}: {}",
                plain(&peer["subnets"]),
                plain(&peer["public"]),
                if by.is_empty() { "nothing" } else { &by },
                reached(peer)
            ),
        );
        for finding in list(&peer["findings"]) {
            let (cause, detail) = (plain(&finding["cause"]), plain(&finding["detail"]));
            page.section("cause", &format!("{cause}: {detail}"));
            page.section("", &plain(&finding["remedy"]));
        }
        for note in list(&peer["notes"]) {
            page.section("note", &plain(note));
        }
    }
    if answer["mesh"].is_array() {
        page.blank();
        matrix(&mut page, &answer["mesh"]);
    }
    page.text
}

/// What the probes brought, in one line.
fn reached(peer: &Value) -> String {
    let overlay = &peer["overlay"];
    let mut line = format!(
        "{} of {} probes answered",
        plain(&overlay["answered"]),
        plain(&overlay["sent"])
    );
    let rtt = &overlay["rtt_us"];
    if let (Some(min), Some(median), Some(max)) = (
        rtt["min"].as_f64(),
        rtt["median"].as_f64(),
        rtt["max"].as_f64(),
    ) {
        let [min, median, max] = [min, median, max].map(|micros| micros / 1e3);
        // Writing to a string cannot fail.
        let _infallible = write!(line, ", round trip {min:.2}/{median:.2}/{max:.2} ms");
    }
    if overlay["reordered"].as_u64() > Some(0) {
        let _infallible = write!(line, ", {} reordered", plain(&overlay["reordered"]));
    }
    let echo = &peer["overlay_echo"];
    if echo.is_object() {
        let (answered, sent) = (plain(&echo["answered"]), plain(&echo["sent"]));
        let _infallible = write!(line, ", {answered} of {sent} echoes");
    }
    let sizes = &peer["sizes"];
    if sizes.is_object() {
        let (up, down) = (plain(&sizes["up"]), plain(&sizes["down"]));
        let _infallible = write!(line, ", {up} bytes up, {down} down");
    }
    line
}

/// Nodes beyond this many are listed, and not drawn.
const MOST_COLUMNS: usize = 24;

/// One row for each node, one column for each peer, one letter for how it is reached.
fn matrix(page: &mut Page, mesh: &Value) {
    let rows: Vec<&Value> = list(mesh).collect();
    // A lease of both families is named by its first in others' reports.
    let name = |value: &Value| {
        plain(value)
            .replace('-', "/")
            .split('&')
            .next()
            .unwrap_or_default()
            .to_owned()
    };
    let names: Vec<String> = rows.iter().map(|row| name(&row["node"])).collect();
    page.section(
        "mesh",
        "rows ask, columns answer: + answers, e echoes only, % loses, X silent, ? not known, . itself",
    );
    let drawn = rows.len() <= MOST_COLUMNS;
    for (nth, row) in rows.iter().enumerate() {
        if let Some(why) = row["silent"].as_str() {
            page.section("", &format!("{}: {why}", names[nth]));
            continue;
        }
        let reach = |peer: &str| {
            let mut cells = list(&row["cells"]);
            let cell = cells.find(|cell| name(&cell["peer"]) == peer);
            cell.map_or("unknown", |cell| {
                cell["reach"].as_str().unwrap_or("unknown")
            })
        };
        if drawn {
            let letters = names
                .iter()
                .enumerate()
                .map(|(column, peer)| match reach(peer) {
                    _ if column == nth => '.',
                    "answers" => '+',
                    "echoes" => 'e',
                    "loses" => '%',
                    "silent" => 'X',
                    _ => '?',
                });
            let letters: String = letters.flat_map(|letter| [letter, ' ']).collect();
            page.line(&format!("            {:>22}  {letters}", names[nth]));
            continue;
        }
        for peer in names.iter().filter(|&peer| *peer != names[nth]) {
            let reach = reach(peer);
            if matches!(reach, "loses" | "silent") {
                page.section("", &format!("{} to {peer}: {reach}", names[nth]));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_is_wrong_comes_first_with_its_remedy_and_no_control_character_is_printed() {
        let figures = |answered: u32| json!({"sent": 10, "answered": answered});
        let answer = json!({
            "healthy": false, "peers_in_all": 9, "took_ms": 1234,
            "node": ["net.ipv4.ip_forward is 0"],
            "peers": [
                {"subnets": "198.18.2.0-24", "public": "192.0.2.2", "transport": "udp", "findings": [], "notes": [],
                 "overlay": {"sent": 10, "answered": 10, "rtt_us": {"min": 100, "median": 250, "max": 1000}},
                 "sizes": {"up": 1472, "down": 1400}},
                {"subnets": "198.18.3.0-24", "public": "192.0.2.3", "transport": "udp", "overlay": figures(0),
                 "findings": [{"cause": "port_filtered", "detail": "both \u{1b}[31m ways", "remedy": "accept it"}],
                 "notes": ["a remark"]},
            ],
        });
        let text = render(&answer);
        assert!(
            text.starts_with("node        net.ipv4.ip_forward is 0\n"),
            "{text}"
        );
        let bad = text.find("port_filtered: both").unwrap();
        let good = text.find("198.18.2.0-24").unwrap();
        assert!(bad < good && !text.contains('\u{1b}'), "{text}");
        for part in [
            "2 of 9 examined in 1.2 s: 1 as they should be, 1 not",
            "answered, round trip 0.10/0.25/1.00\n            ms, 1472 bytes up, 1400 down\n",
            "            accept it\n",
            "note        a remark\n",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn matrix_has_a_letter_for_every_pair() {
        let cell = |peer: &str, reach: &str| json!({"peer": peer, "reach": reach});
        let mesh = json!([
            {"node": "198.18.1.0-24", "cells": [cell("198.18.2.0-24", "answers"), cell("198.18.3.0-24", "silent")]},
            {"node": "198.18.2.0-24", "cells": [cell("198.18.1.0/24", "loses")]},
            {"node": "198.18.3.0-24", "silent": "it does not say", "cells": []},
        ]);
        let mut page = Page::default();
        matrix(&mut page, &mesh);
        for row in [
            "198.18.1.0/24  . + X\n",
            "198.18.2.0/24  % . ?\n",
            "198.18.3.0/24: it does not say\n",
        ] {
            assert!(page.text.contains(row), "{row}: {}", page.text);
        }
    }
}
