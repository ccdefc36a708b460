//! Owns a wire with faults, for which this kernel need have no queueing discipline: whole frames between two links of a
//! namespace, moved in user space. Never changes what it is not told to.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

use std::io::{ErrorKind, Read as _};
use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use loden::lab::NetNs;
use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{LinkAddr, bind};
use socket2::{Domain, Protocol, Socket, Type};

/// A frame that is held back waits no longer for another.
const PATIENCE: Duration = Duration::from_millis(100);

/// What happens to datagrams of a UDP port on their way, in one direction.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fault {
    /// Every so many lets the one behind it pass.
    Reorder(u32),
    /// The last bit of every so many is another.
    Corrupt(u32),
}

/// A wire. Dropping it cuts it.
pub(crate) struct Relay {
    cut: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Relay {
    /// Between two links of a namespace, with a fault on IPv4 datagrams to `port` from the first to the second.
    pub(crate) fn start(netns: &NetNs, links: [&str; 2], port: u16, fault: Fault) -> Self {
        let sockets = netns.run(|| links.map(open)).unwrap();
        let sockets = sockets.map(Arc::new);
        let cut = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        for (from, to, fault) in [(0, 1, Some(fault)), (1, 0, None)] {
            let (from, to) = (Arc::clone(&sockets[from]), Arc::clone(&sockets[to]));
            let cut = Arc::clone(&cut);
            threads.push(std::thread::spawn(move || {
                carry(&from, &to, port, fault, &cut)
            }));
        }
        Self { cut, threads }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.cut.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let ended = thread.join();
            assert!(
                std::thread::panicking() || ended.is_ok(),
                "the wire broke by itself"
            );
        }
    }
}

/// All frames of a link (packet(7)).
fn open(link: &str) -> Socket {
    let all = u16::try_from(libc::ETH_P_ALL).unwrap();
    let all = Protocol::from(i32::from(all.to_be()));
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(all)).unwrap();
    let links = getifaddrs()
        .unwrap()
        .filter(|one| one.interface_name == link);
    let addrs: Vec<LinkAddr> = links
        .filter_map(|one| one.address?.as_link_addr().copied())
        .collect();
    bind(socket.as_raw_fd(), &addrs[0]).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

fn carry(from: &Socket, to: &Socket, port: u16, fault: Option<Fault>, cut: &AtomicBool) {
    let mut buffer = vec![0; 1 << 16];
    let mut held: Option<Vec<u8>> = None;
    let mut count = 0;
    while !cut.load(Ordering::Relaxed) {
        let len = match (&*from).read(&mut buffer) {
            Ok(len) => len,
            Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
            // The link may go down and come back.
            Err(_down) => 0,
        };
        let frame = &mut buffer[..len];
        count += u32::from(is_for(frame, port));
        match fault {
            Some(Fault::Reorder(every))
                if held.is_none() && is_for(frame, port) && count % every == 0 =>
            {
                held = Some(frame.to_vec());
                continue;
            }
            Some(Fault::Corrupt(every)) if is_for(frame, port) && count % every == 0 => {
                frame[len - 1] ^= 1;
            }
            Some(Fault::Reorder(_) | Fault::Corrupt(_)) | None => {}
        }
        let behind = held.take();
        for frame in [Some(&*frame), behind.as_deref()].into_iter().flatten() {
            if !frame.is_empty() {
                // As on any wire, what is too much is lost.
                let _lost = to.send(frame);
            }
        }
    }
}

/// An IPv4 datagram to this UDP port, unfragmented and without options.
fn is_for(frame: &[u8], port: u16) -> bool {
    let is_udp = frame.get(12..15) == Some(&[0x08, 0x00, 0x45]) && frame.get(23) == Some(&17);
    is_udp && frame.get(36..38) == Some(&port.to_be_bytes())
}
