//! Feeds arbitrary bytes to the readers of the CNI plugin: the network configuration of standard input up to the
//! first zero byte, `subnet.env` behind it.

use loden::cni::{NetConf, PodEnv, delegate_config};

/// Parses `data` and generates what the delegate would get.
///
/// # Panics
///
/// If a delegate were asked for another network, or to hand out addresses that are not this node's.
pub fn run(data: &[u8]) {
    let mut parts = data.splitn(2, |byte| *byte == 0);
    let conf = NetConf::parse(parts.next().unwrap_or_default());
    let env = PodEnv::parse(&String::from_utf8_lossy(parts.next().unwrap_or_default()));
    if let Ok(env) = &env {
        assert!(!(env.networks.is_empty() && env.ipv6_networks.is_empty()));
        assert!(env.subnet.is_some() || env.ipv6_subnet.is_some());
    }
    let (Ok(conf), Ok(env)) = (conf, env) else {
        return;
    };
    assert!(!conf.name.is_empty() && !conf.name.contains('/'));
    let Ok(delegate) = delegate_config(&conf, &env) else {
        return;
    };
    assert_eq!(delegate["name"], conf.name);
    assert!(delegate["type"].is_string());
    let ranges = delegate["ipam"]["ranges"].as_array().map_or(0, Vec::len);
    let families = usize::from(env.subnet.is_some()) + usize::from(env.ipv6_subnet.is_some());
    assert_eq!(ranges, families);
}
