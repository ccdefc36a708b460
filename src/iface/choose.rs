//! Owns the rules of the choice: which address is usable, which interface a selector means, and the sentence
//! why each other one lost.

use std::cmp::Reverse;
use std::net::{IpAddr, Ipv4Addr};

use super::{
    Address, Candidate, Choice, Decision, Family, Link, NoInterface, Selector, Snapshot, Stack,
    Wanted,
};
use crate::addr::Mtu;

/// Chooses the external interface; specification sections 3.1 and 3.2.
#[must_use]
pub fn choose(snapshot: &Snapshot, wanted: &Wanted, stack: Stack) -> Decision {
    let mut failed = Vec::new();
    for selector in selectors(wanted, stack) {
        match select(snapshot, wanted, stack, &selector) {
            Ok(choice) => {
                let candidates = explain(snapshot, stack, &selector, Some(&choice));
                return Decision {
                    choice: Ok(choice),
                    failed,
                    candidates,
                };
            }
            Err(why) => failed.push(format!("{selector}: {why}")),
        }
    }
    let found: Vec<String> = snapshot.links.iter().map(describe).collect();
    let error = NoInterface {
        tried: failed.clone(),
        found: found.join(", "),
    };
    let last = selectors(wanted, stack)
        .pop()
        .unwrap_or(Selector::DefaultRoute);
    Decision {
        choice: Err(error),
        failed,
        candidates: explain(snapshot, stack, &last, None),
    }
}

/// What to try, in order. A public IP without any selector is one itself, so it must be local.
fn selectors(wanted: &Wanted, stack: Stack) -> Vec<Selector> {
    if !wanted.selectors.is_empty() {
        return wanted.selectors.clone();
    }
    let mut families = stack.families().iter();
    let public = families.find_map(|&family| wanted.public(family));
    vec![public.map_or(Selector::DefaultRoute, Selector::Address)]
}

/// An interface a selector means, with the address if the selector settles that too.
struct Match<'a> {
    link: &'a Link,
    addr: Option<IpAddr>,
    reason: String,
}

fn select(
    snapshot: &Snapshot,
    wanted: &Wanted,
    stack: Stack,
    selector: &Selector,
) -> Result<Choice, String> {
    let found = match selector {
        Selector::Address(ip) => by_address(snapshot, stack, *ip)?,
        Selector::Name(name) => by_name(snapshot, name)?,
        Selector::Pattern(pattern) => by_pattern(snapshot, stack, |text| pattern.matches(text))?,
        Selector::Reach(ip) => by_reach(snapshot, stack, *ip)?,
        Selector::DefaultRoute => by_default_route(snapshot, stack)?,
    };
    let link = found.link;
    let addr = match found.addr {
        Some(addr) => addr,
        None => *usable(link, stack)
            .first()
            .ok_or_else(|| format!("{} has {}", link.name, nothing_usable(link, stack)))?,
    };
    // The loopback has 65536, one more than an IP packet can be long.
    let mtu = Mtu::new(link.mtu.min(u32::from(u16::MAX)))
        .ok_or_else(|| format!("{} has an unusable MTU of {}", link.name, link.mtu))?;
    Ok(Choice {
        index: link.index,
        name: link.name.clone(),
        mtu,
        addr,
        public: wanted.public(Family::of(addr)).unwrap_or(addr),
        reason: found.reason,
    })
}

fn by_address(snapshot: &Snapshot, stack: Stack, ip: IpAddr) -> Result<Match<'_>, String> {
    if !stack.families().contains(&Family::of(ip)) {
        return Err(format!("the network needs an {} underlay", families(stack)));
    }
    let mut links = snapshot.links.iter();
    let link = links
        .find(|link| link.addrs.iter().any(|addr| addr.ip == ip))
        .ok_or("no interface has it")?;
    Ok(Match {
        link,
        addr: Some(ip),
        reason: format!("it has the address {ip}"),
    })
}

fn by_name<'a>(snapshot: &'a Snapshot, name: &str) -> Result<Match<'a>, String> {
    let mut links = snapshot.links.iter();
    let link = links
        .find(|link| link.name == name)
        .ok_or("there is no such interface")?;
    Ok(Match {
        link,
        addr: None,
        reason: "it was named".to_owned(),
    })
}

fn by_reach(snapshot: &Snapshot, stack: Stack, to: IpAddr) -> Result<Match<'_>, String> {
    let mut answers = snapshot.reach.iter();
    let reach = answers
        .find(|reach| reach.to == to)
        .ok_or("there is no route to it")?;
    let mut links = snapshot.links.iter();
    let link = links
        .find(|link| link.index == reach.link)
        .ok_or("its route leaves by no interface")?;
    let fits = |from: &IpAddr| stack.families().contains(&Family::of(*from));
    Ok(Match {
        link,
        addr: reach.from.filter(fits),
        reason: format!("the way to {to} leaves by it"),
    })
}

/// Addresses first, over all interfaces; names only if no address matches.
fn by_pattern(
    snapshot: &Snapshot,
    stack: Stack,
    matches: impl Fn(&str) -> bool,
) -> Result<Match<'_>, String> {
    for link in &snapshot.links {
        let addrs = usable(link, stack);
        if let Some(&addr) = addrs.iter().find(|addr| matches(&addr.to_string())) {
            return Ok(Match {
                link,
                addr: Some(addr),
                reason: format!("its address {addr} is the first that matches"),
            });
        }
    }
    let mut links = snapshot.links.iter();
    let link = links
        .find(|link| matches(&link.name))
        .ok_or("no address and no name matches")?;
    Ok(Match {
        link,
        addr: None,
        reason: "its name is the first that matches".to_owned(),
    })
}

fn by_default_route(snapshot: &Snapshot, stack: Stack) -> Result<Match<'_>, String> {
    for &family in stack.families() {
        let mut routes = snapshot.default_routes.iter();
        let Some(route) = routes.find(|route| route.family == family) else {
            continue;
        };
        let index = route
            .link
            .ok_or_else(|| format!("the {family} default route names no interface"))?;
        let mut links = snapshot.links.iter();
        let link = links
            .find(|link| link.index == index)
            .ok_or_else(|| format!("the {family} default route's interface is gone"))?;
        return Ok(Match {
            link,
            addr: None,
            reason: format!("the {family} default route leaves by it"),
        });
    }
    Err(format!(
        "there is no {} default route in the main table",
        families(stack)
    ))
}

const fn families(stack: Stack) -> &'static str {
    match stack {
        Stack::V4 => "IPv4",
        Stack::V6 => "IPv6",
        Stack::Either => "IPv4 or IPv6",
    }
}

/// The usable addresses of a link, best first; specification section 3.3, but temporary IPv6 addresses never
/// count (nodes would lose a peer daily), nor addresses that cannot be bound.
fn usable(link: &Link, stack: Stack) -> Vec<IpAddr> {
    let of_family = |&family: &Family| {
        let addrs = link.addrs.iter();
        let mut addrs: Vec<&Address> = addrs
            .filter(|addr| Family::of(addr.ip) == family && flaw(addr).is_none())
            .collect();
        // Stable: equals stay in the kernel's order.
        addrs.sort_by_key(|addr| (is_link_local(addr.ip), Reverse(addr.permanent)));
        addrs.into_iter().map(|addr| addr.ip)
    };
    stack.families().iter().flat_map(of_family).collect()
}

/// Why an address cannot be the underlay's; `None` if it can.
fn flaw(addr: &Address) -> Option<&'static str> {
    let ip = addr.ip;
    if ip.is_loopback() {
        Some("loopback")
    } else if ip.is_unspecified()
        || ip.is_multicast()
        || matches!(ip, IpAddr::V4(v4) if v4 == Ipv4Addr::BROADCAST)
    {
        Some("not unicast")
    } else if addr.deprecated {
        Some("deprecated")
    } else if addr.temporary {
        Some("temporary")
    } else if addr.unverified {
        Some("not verified to be unique")
    } else {
        None
    }
}

const fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

/// "no usable IPv4 address (127.0.0.1 is loopback)".
fn nothing_usable(link: &Link, stack: Stack) -> String {
    let looked_at = |addr: &&Address| stack.families().contains(&Family::of(addr.ip));
    let flaws: Vec<String> = link
        .addrs
        .iter()
        .filter(looked_at)
        .filter_map(|addr| flaw(addr).map(|flaw| format!("{} is {flaw}", addr.ip)))
        .collect();
    let mut text = format!("no usable {} address", families(stack));
    if !flaws.is_empty() {
        text.push_str(&format!(" ({})", flaws.join(", ")));
    }
    text
}

/// `eth0 [192.0.2.1 2001:db8::1]`.
fn describe(link: &Link) -> String {
    let addrs: Vec<String> = link.addrs.iter().map(|addr| addr.ip.to_string()).collect();
    format!("{} [{}]", link.name, addrs.join(" "))
}

/// One verdict per link, given the selector that decided (or the last that was tried).
fn explain(
    snapshot: &Snapshot,
    stack: Stack,
    selector: &Selector,
    choice: Option<&Choice>,
) -> Vec<Candidate> {
    let verdict = |link: &Link| {
        let addrs = usable(link, stack);
        if let Some(choice) = choice.filter(|choice| choice.index == link.index) {
            return (true, choice.reason.clone());
        }
        let why = match selector {
            Selector::Address(ip) => format!("it does not have the address {ip}"),
            Selector::Name(name) => format!("it is not {name}"),
            Selector::Pattern(pattern) => {
                let matches = |text: &str| pattern.matches(text);
                if addrs.iter().any(|addr| matches(&addr.to_string())) {
                    "its address matches, but it comes later".to_owned()
                } else if matches(&link.name) {
                    "its name matches, but another match goes first".to_owned()
                } else {
                    format!("neither its name nor a usable address matches {pattern}")
                }
            }
            Selector::Reach(ip) => format!("the way to {ip} leaves by another"),
            Selector::DefaultRoute => "the preferred default route leaves by another".to_owned(),
        };
        let why = match (choice, addrs.is_empty()) {
            (None, true) => nothing_usable(link, stack),
            (None, false) if matches!(selector, Selector::DefaultRoute) => {
                "no default route leaves by it".to_owned()
            }
            (Some(_), true) => format!("{why}; {}", nothing_usable(link, stack)),
            _ => why,
        };
        (false, why)
    };
    let candidate = |link: &Link| {
        let (chosen, why) = verdict(link);
        Candidate {
            name: link.name.clone(),
            addrs: usable(link, stack),
            chosen,
            why,
        }
    };
    snapshot.links.iter().map(candidate).collect()
}
