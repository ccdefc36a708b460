//! Owns batched datagram I/O: `recvmmsg`, `sendmmsg`, the error queue, over arrays built once. Never decides
//! what an error means.
//!
//! Vocabulary: an *entry* is one `mmsghdr`, the kernel's unit of success. A received entry may hold several
//! datagrams of one size (its *stride*, `UDP_GRO`); a sent entry may be cut into several (`UDP_SEGMENT`).

mod abi;
mod errors;
mod receive;
mod send;
mod slots;

pub(super) use abi::ControlMessages;
pub use errors::{QueuedError, take_error};
pub use receive::{Received, RecvBatch};
pub use send::{Entry, SendBatch, Sending};
pub(super) use slots::{Filled, Slots};

#[cfg(test)]
mod tests {
    use super::abi::ControlMessages;
    use super::*;
    use crate::sys::socket::{self, IntOption};
    use socket2::SockAddr;
    use std::io;
    use std::net::UdpSocket;
    use std::os::fd::AsFd;

    fn pair() -> (UdpSocket, UdpSocket) {
        let bind = || UdpSocket::bind("127.0.0.1:0").unwrap();
        (bind(), bind())
    }

    /// Receives until `bytes` arrived; loopback delivers before the send returns, so this never waits.
    fn receive_all(batch: &mut RecvBatch, socket: &UdpSocket) -> Vec<(Received, Vec<u8>)> {
        let mut all = Vec::new();
        loop {
            match batch.receive(socket.as_fd()) {
                Ok(_) => all.extend(batch.entries().map(|(r, bytes)| (r, bytes.to_vec()))),
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                    return all;
                }
            }
        }
    }

    #[test]
    fn a_batch_of_gathered_entries_arrives_whole_and_in_order() {
        let (from, to) = pair();
        let address = SockAddr::from(to.local_addr().unwrap());
        let payloads: Vec<Vec<u8>> = (0..20_u8).map(|i| vec![i; 100 + usize::from(i)]).collect();
        let mut batch = SendBatch::new(20, 40);
        let mut sending = batch.start();
        for payload in &payloads {
            let (head, tail) = payload.split_at(7);
            let entry = Entry {
                to: &address,
                segment_len: None,
                tos: 0,
            };
            assert!(sending.push(entry, [head, tail].into_iter()));
        }
        assert_eq!(sending.send(from.as_fd(), 0).unwrap(), 20);
        let received = receive_all(&mut RecvBatch::new(8), &to);
        let bytes: Vec<_> = received.iter().map(|(_, bytes)| bytes.clone()).collect();
        assert_eq!(bytes, payloads);
        assert!(
            received
                .iter()
                .all(|(r, bytes)| r.source == from.local_addr().unwrap()
                    && r.stride == bytes.len()
                    && !r.truncated)
        );
    }

    #[test]
    fn a_run_is_cut_by_the_kernel_and_comes_back_as_one_buffer_with_its_stride() {
        let (from, to) = pair();
        socket::set(to.as_fd(), IntOption::UDP_GRO, 1).unwrap();
        socket::set(to.as_fd(), IntOption::IP_RECVTOS, 1).unwrap();
        let address = SockAddr::from(to.local_addr().unwrap());
        let payload: Vec<u8> = (0..1000_u16).map(|i| i.to_ne_bytes()[0]).collect();
        let mut batch = SendBatch::new(1, 1);
        let mut sending = batch.start();
        let entry = Entry {
            to: &address,
            segment_len: Some(300),
            tos: 2,
        };
        assert!(sending.push(entry, std::iter::once(payload.as_slice())));
        assert!(!sending.push(entry, std::iter::empty()), "one entry fits");
        assert_eq!(sending.send(from.as_fd(), 0).unwrap(), 1);
        let received = receive_all(&mut RecvBatch::new(8), &to);
        let (first, _) = received.first().unwrap();
        assert_eq!((first.stride, first.tos), (300, 2));
        let joined: Vec<u8> = received.into_iter().flat_map(|(_, bytes)| bytes).collect();
        assert_eq!(joined, payload);
    }

    #[test]
    fn the_error_queue_names_who_refused() {
        let from = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket::set(from.as_fd(), IntOption::IP_RECVERR, 1).unwrap();
        let closed = pair().0.local_addr().unwrap();
        assert_eq!(take_error(from.as_fd()).unwrap(), None);
        from.send_to(b"x", closed).unwrap();
        let error = take_error(from.as_fd()).unwrap().unwrap();
        assert_eq!(error.errno, libc::ECONNREFUSED);
        assert_eq!((error.destination, error.from_network), (closed, true));
        assert_eq!(take_error(from.as_fd()).unwrap(), None);
    }

    #[test]
    fn ipv6_names_and_classes_survive() {
        let to = UdpSocket::bind("[::1]:0").unwrap();
        socket::set(to.as_fd(), IntOption::IPV6_RECVTCLASS, 1).unwrap();
        let from = UdpSocket::bind("[::1]:0").unwrap();
        let address = SockAddr::from(to.local_addr().unwrap());
        let mut batch = SendBatch::new(1, 1);
        let mut sending = batch.start();
        let entry = Entry {
            to: &address,
            segment_len: None,
            tos: 1,
        };
        assert!(sending.push(entry, std::iter::once(b"six".as_slice())));
        sending.send(from.as_fd(), 0).unwrap();
        let received = receive_all(&mut RecvBatch::new(1), &to);
        let (received, bytes) = received.first().unwrap();
        assert_eq!(
            (received.source, received.tos),
            (from.local_addr().unwrap(), 1)
        );
        assert_eq!(bytes, b"six");
    }

    #[test]
    fn hostile_control_bytes_never_panic() {
        for len in 0..64 {
            for fill in [0_u8, 1, 16, 20, 0xff] {
                assert!(ControlMessages(&vec![fill; len]).count() <= len);
            }
        }
    }
}
