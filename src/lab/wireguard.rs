//! Owns `wireguard-go` as a lab's tunnel: starting it, its keys, and configuring it over its own socket
//! (<https://www.wireguard.com/xplatform/>). Never meant to keep anything secret.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::plan::{self, PodNet};
use super::process::Tracked;
use super::wait::{self, Interrupt};
use super::{Error, LabName, Member, NetNs, Spec, command};

/// What WireGuard takes of the underlay's MTU, as `wg-quick` reckons: it allows for an outer IPv6 header.
pub(crate) const OVERHEAD: u16 = 80;
/// The port that the project uses in its examples.
const PORT: u16 = 51820;
/// It opens its socket within milliseconds; only a machine that is stuck takes longer.
const START_LIMIT: Duration = Duration::from_secs(10);
/// How long it may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Where it puts its sockets, one per device name, whatever the network namespace.
const SOCKETS: &str = "/var/run/wireguard";

/// Private and public keys of the two nodes: the published example of RFC 7748, section 6.1. Two namespaces of one
/// machine have nothing to hide from each other.
const KEYS: [(&str, &str); 2] = [
    (
        "77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a",
        "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a",
    ),
    (
        "5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb",
        "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f",
    ),
];

/// A device name that no other lab has: names are the only thing that divides the sockets, and have 15 characters
/// at most, so the lab's name goes in as its FNV-1a hash.
fn device(name: &LabName, node: u8) -> String {
    let hash = name.as_str().bytes().fold(0x811c_9dc5_u32, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    });
    format!("wg{hash:08x}n{node}")
}

fn socket(name: &LabName, node: u8) -> PathBuf {
    Path::new(SOCKETS).join(format!("{}.sock", device(name, node)))
}

/// Starts it on one node.
///
/// # Errors
/// [`Error::Io`] or [`Error::Missing`].
pub(crate) fn start(spec: &Spec, lab_dir: &Path, node: u8) -> Result<Tracked, Error> {
    let member = Member::Node(node);
    let netns = NetNs::named(spec.name.namespace(member));
    let files = lab_dir.join(member.to_string());
    fs::create_dir_all(&files).map_err(Error::io("create", files.display().to_string()))?;
    let program = spec.daemon.as_deref().ok_or(Error::Invalid {
        what: "the daemon's program",
        given: String::new(),
        rule: "given when the backend is wireguard-go",
    })?;
    let mut command = Command::new(program);
    // In the foreground, or it would leave the process that is tracked.
    command.args(["-f", &device(&spec.name, node)]);
    Tracked::spawn(&netns, &files, "daemon", &mut command)
}

/// Waits for its socket, gives it its keys and its peer, and routes the peer's subnet to it.
///
/// # Errors
/// [`Error::Ended`] with its log if it gave up, [`Error::Timeout`], [`Error::Command`].
pub(crate) fn configure(
    spec: &Spec,
    node: u8,
    daemon: &mut Tracked,
    interrupt: &Interrupt,
) -> Result<(), Error> {
    let path = socket(&spec.name, node);
    let shown = path.display().to_string();
    let mut stream = wait::until(&shown, START_LIMIT, interrupt, || {
        daemon.check_running()?;
        Ok(UnixStream::connect(&path).ok())
    })?;
    let answer = ask(&mut stream, &settings(spec, node)).map_err(Error::io("configure", &shown))?;
    if answer.trim() != "errno=0" {
        return Err(Error::Malformed {
            path,
            expected: "an answer of wireguard-go that says errno=0",
            reason: format!("it is {answer:?}"),
        });
    }
    let netns = NetNs::named(spec.name.namespace(Member::Node(node)));
    command::batch(Some(&netns), "ip", &links(spec, node))
}

fn ask(stream: &mut UnixStream, request: &str) -> io::Result<String> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(request.as_bytes())?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    stream.take(4096).read_to_string(&mut answer)?;
    Ok(answer)
}

fn settings(spec: &Spec, node: u8) -> String {
    let key = |node: u8| KEYS[usize::from(node > 1)];
    let mut text = format!("set=1\nprivate_key={}\nlisten_port={PORT}\n", key(node).0);
    for peer in plan::others(spec, node) {
        text.push_str(&format!(
            "public_key={}\nendpoint={}:{PORT}\nallowed_ip={}/24\n",
            key(peer).1,
            plan::underlay_v4(peer),
            PodNet::chosen(peer, 0).base(),
        ));
    }
    text.push('\n');
    text
}

fn links(spec: &Spec, node: u8) -> Vec<String> {
    let device = device(&spec.name, node);
    let mtu = spec.underlay_mtu - OVERHEAD;
    let base = |node| PodNet::chosen(node, mtu).base();
    let mut lines = vec![
        format!("addr add {}/32 dev {device}", base(node)),
        format!("link set {device} mtu {mtu} up"),
    ];
    lines.extend(
        plan::others(spec, node).map(|peer| format!("route add {}/24 dev {device}", base(peer))),
    );
    lines
}

/// Removes the socket that a killed one leaves.
///
/// # Errors
/// [`Error::Io`] names the file.
pub(crate) fn remove_socket(name: &LabName, node: u8) -> Result<(), Error> {
    let path = socket(name, node);
    match fs::remove_file(&path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(Error::io("remove", path.display().to_string())(source))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_of_two_labs_and_of_two_nodes_differ_and_fit_the_kernel() {
        let name = |text: &str| text.parse::<LabName>().unwrap();
        let long = name(&"x".repeat(32));
        let names = [
            device(&long, 1),
            device(&long, 2),
            device(&name("bench-1-wireguard-go"), 1),
            device(&name("bench-2-wireguard-go"), 1),
        ];
        // IFNAMSIZ is 16 with the final zero.
        assert!(names.iter().all(|name| name.len() < 16), "{names:?}");
        let different: std::collections::BTreeSet<&String> = names.iter().collect();
        assert_eq!(different.len(), names.len());
    }

    #[test]
    fn each_node_has_the_others_public_key_and_subnet() {
        let spec = Spec::new("x".parse().unwrap(), 2);
        let text = settings(&spec, 1);
        assert!(text.contains(&format!("private_key={}\n", KEYS[0].0)));
        assert!(text.contains(&format!("public_key={}\n", KEYS[1].1)));
        assert!(text.ends_with("endpoint=192.0.2.2:51820\nallowed_ip=198.18.2.0/24\n\n"));
    }
}
