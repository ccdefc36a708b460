//! Owns `loden explain`: asks the daemon about one packet and prints its answer. Never interprets it.

use clap::Args;
use serde_json::Value;

use super::page::{Page, list, plain, print};
use super::status::SocketArgs;
use crate::debug::end::End;
use crate::debug::socket::{self, Request};
use crate::iface::Family;

/// Flags of `loden explain`.
#[derive(Debug, Args)]
pub struct ExplainArgs {
    /// The packet's source: an address of a pod or a node; or a pod by its name, NAMESPACE/NAME, or NAME in default
    #[arg(value_name = "SRC")]
    from: End,

    /// The packet's destination, likewise
    #[arg(value_name = "DST")]
    to: End,

    /// Of pods that have addresses of both families, take the IPv4 ones
    #[arg(short = '4', conflicts_with = "v6")]
    v4: bool,

    /// Likewise, the IPv6 ones
    #[arg(short = '6')]
    v6: bool,

    /// Bytes of the IP packet
    #[arg(long, value_name = "BYTES", default_value_t = 84, value_parser = clap::value_parser!(u16).range(48..))]
    len: u16,

    /// The packet must not be fragmented, as TCP's must not
    #[arg(long)]
    df: bool,

    /// Send marked probes to the other node, too, and follow them through both nodes' daemons
    #[arg(long)]
    trace: bool,

    /// Print the daemon's answer as it is
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    at: SocketArgs,
}

pub(super) fn run(args: &ExplainArgs) -> anyhow::Result<()> {
    let request = Request::Explain {
        from: args.from.clone(),
        to: args.to.clone(),
        family: match (args.v4, args.v6) {
            (true, _) => Some(Family::V4),
            (false, true) => Some(Family::V6),
            (false, false) => None,
        },
        len: args.len,
        whole: args.df,
        trace: args.trace,
    };
    let answer = socket::ask(&args.at.path(), &request)?;
    let text = if args.json {
        format!("{}\n", serde_json::to_string_pretty(&answer)?)
    } else {
        render(&answer)
    };
    Ok(print(&text)?)
}

fn render(answer: &Value) -> String {
    let mut page = Page::default();
    page.section("verdict", &plain(&answer["verdict"]));
    if !answer["remedy"].is_null() {
        page.section("", &plain(&answer["remedy"]));
    }
    page.blank();
    for step in list(&answer["steps"]) {
        page.section(&plain(&step["what"]), &plain(&step["found"]));
    }
    let mut title = "trace";
    for line in list(&answer["trace"]) {
        if !title.is_empty() {
            page.blank();
        }
        page.section(std::mem::take(&mut title), &plain(line));
    }
    page.blank();
    let mut title = "counters";
    for counter in list(&answer["counters"]) {
        page.section(std::mem::take(&mut title), &plain(counter));
    }
    let mut title = "not seen";
    for unseen in list(&answer["unseen"]) {
        page.section(std::mem::take(&mut title), &plain(unseen));
    }
    page.text
}
