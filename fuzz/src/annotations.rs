//! Feeds arbitrary texts to the reader of flannel's node annotations, one per key, separated by zero bytes.

use loden::store::kube::{Annotations, Texts};

/// The keys, in the order of the input's parts.
const KEYS: [&str; 7] = [
    "public-ip",
    "public-ipv6",
    "backend-type",
    "backend-data",
    "backend-v6-data",
    "public-ip-overwrite",
    "public-ipv6-overwrite",
];

/// Reads the annotations, and writes what was read.
///
/// # Panics
///
/// If what is written says something else than what was read, or is not stable.
pub fn run(data: &[u8]) {
    let Ok(annotations) = "flannel.alpha.coreos.com".parse::<Annotations>() else {
        return;
    };
    let parts = data.split(|byte| *byte == 0);
    let texts: Texts = KEYS
        .iter()
        .zip(parts)
        .map(|(key, part)| {
            let key = format!("flannel.alpha.coreos.com/{key}");
            (key, String::from_utf8_lossy(part).into_owned())
        })
        .collect();
    let Ok(attrs) = annotations.read(&texts) else {
        return;
    };
    assert!(attrs.node().is_some());
    let Ok(written) = annotations.changes(&Texts::new(), &attrs) else {
        return;
    };
    assert_eq!(annotations.changes(&written, &attrs), Ok(Texts::new()));
    // A vxlan node writes nothing for a family without a device.
    if attrs.backend_type != "vxlan" {
        let mut expected = attrs;
        if expected.public_ipv6.is_none() {
            expected.backend_v6_data = None;
        }
        assert_eq!(annotations.read(&written), Ok(expected));
    }
}
