//! Feeds arbitrary bytes to the parser of `net-conf.json` and checks what a valid result promises.

use loden::addr::OverlayPrefix;
use loden::config::{NetworkConfig, SubnetPool};

/// Parses `data` and checks the pools of an accepted configuration.
///
/// # Panics
///
/// On a configuration that breaks a promise of [`NetworkConfig`].
pub fn run(data: &[u8]) {
    let Ok(config) = NetworkConfig::parse(data) else {
        return;
    };
    assert!(config.ipv4.is_some() || config.ipv6.is_some());
    config.ipv4.iter().for_each(pool);
    config.ipv6.iter().for_each(pool);
}

fn pool<N: OverlayPrefix>(pool: &SubnetPool<N>) {
    assert!(pool.network().len_bits() > 0);
    assert!(pool.first() <= pool.last());
    for bound in [pool.first(), pool.last()] {
        assert!(pool.network().holds(&bound) && pool.contains(&bound));
        assert_eq!(
            N::from_bits(bound.first_bits(), pool.subnet_len()),
            Some(bound)
        );
    }
}
