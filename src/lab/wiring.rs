//! Owns how a wire behaves: the offload features of an underlay device. Never creates a device.

use super::{Error, NetNs, Wire, command};

/// `ethtool` names, the short one that sets and the long one that shows, of the offloads that let a
/// superpacket cross a veth pair whole.
const SEGMENTATION: [(&str, &str); 5] = [
    ("tso", "tcp-segmentation-offload"),
    ("gso", "generic-segmentation-offload"),
    ("tx-udp-segmentation", "tx-udp-segmentation"),
    ("tx-udp_tnl-segmentation", "tx-udp_tnl-segmentation"),
    (
        "tx-udp_tnl-csum-segmentation",
        "tx-udp_tnl-csum-segmentation",
    ),
];
const GRO: (&str, &str) = ("gro", "generic-receive-offload");

/// Makes `device` in `netns` behave as `wire` asks, and returns the features that this kernel does not let
/// it have: a wire that is almost right is still a wire, but its numbers should say so.
///
/// # Errors
/// [`Error::Missing`] or [`Error::Command`] if `ethtool` cannot be asked at all.
pub(crate) fn apply(netns: &NetNs, device: &str, wire: Wire) -> Result<Vec<String>, Error> {
    let gro = match wire {
        Wire::Superpacket => return Ok(Vec::new()),
        Wire::Packet => "on",
        Wire::PacketNoGro => "off",
    };
    let wanted: Vec<((&str, &str), &str)> = SEGMENTATION
        .into_iter()
        .map(|names| (names, "off"))
        .chain([(GRO, gro)])
        .collect();
    let mut args = vec!["-K", device];
    args.extend(
        wanted
            .iter()
            .flat_map(|((short, _), value)| [*short, *value]),
    );
    if let Err(error @ Error::Missing { .. }) = command::run(Some(netns), "ethtool", &args) {
        return Err(error);
    }
    // Whatever the answer was, the state of the device is what counts.
    let shown = command::run(Some(netns), "ethtool", &["-k", device])?;
    Ok(gaps(&shown, &wanted))
}

fn gaps(shown: &str, wanted: &[((&str, &str), &str)]) -> Vec<String> {
    let state = |long: &str| {
        shown.lines().find_map(|line| {
            let (name, value) = line.trim().split_once(": ")?;
            (name == long).then(|| value.split(' ').next().unwrap_or(value))
        })
    };
    wanted
        .iter()
        // A kernel that does not know an offload does not perform it either.
        .filter(|((_, long), value)| state(long).unwrap_or("off") != *value)
        .map(|((short, _), value)| format!("{short} is not {value}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_feature_in_the_wrong_state_is_reported_and_an_unknown_one_counts_as_off() {
        let shown = "Features for eth0:\ntcp-segmentation-offload: on\n\tx: on\ngeneric-receive-offload: on [fixed]\n";
        let wanted = [
            (SEGMENTATION[0], "off"),
            (SEGMENTATION[1], "off"),
            (GRO, "on"),
        ];
        assert_eq!(gaps(shown, &wanted), ["tso is not off"]);
    }
}
