//! Owns which frames of a link the kernel copies for a capture, as programs of classic BPF
//! (Documentation/networking/filter.rst). Pure. Loads are relative to the network header, so that no program knows
//! what kind of link it is on.

use ipnet::IpNet;
use socket2::SockFilter;

/// `SKF_NET_OFF`: from the network header on (include/uapi/linux/filter.h).
const NET: u32 = (-0x10_0000_i32).cast_unsigned();
/// `SKF_AD_OFF + SKF_AD_PROTOCOL`: the EtherType.
const PROTOCOL: u32 = (-0x1000_i32).cast_unsigned();

const IPV4: u32 = libc::ETH_P_IP.cast_unsigned();
const IPV6: u32 = libc::ETH_P_IPV6.cast_unsigned();
const UDP: u32 = libc::IPPROTO_UDP.cast_unsigned();
const IPIP: u32 = libc::IPPROTO_IPIP.cast_unsigned();
/// Of the 16 bits that begin with IPv4's flags (RFC 791 section 3.1).
const FRAGMENT_OFFSET: u32 = 0x1fff;

// include/uapi/linux/bpf_common.h
const LOAD_WORD: u16 = 0x20;
const LOAD_HALF: u16 = 0x28;
const LOAD_BYTE: u16 = 0x30;
const LOAD_HALF_INDEXED: u16 = 0x48;
/// The length of the IPv4 header at an offset, into the index.
const INDEX_IPV4_HEADER: u16 = 0xb1;
const AND: u16 = 0x54;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_SET: u16 = 0x45;
const RETURN: u16 = 0x06;

const REFUSE: SockFilter = SockFilter::new(RETURN, 0, 0, 0);

const fn load(code: u16, offset: u32) -> SockFilter {
    SockFilter::new(code, 0, 0, NET.wrapping_add(offset))
}

/// Goes on if what was loaded equals `value`, and skips `skip` instructions if it does not.
const fn equals(value: u32, skip: u8) -> SockFilter {
    SockFilter::new(JUMP_EQUAL, 0, skip, value)
}

const fn accept(len: u32) -> SockFilter {
    SockFilter::new(RETURN, 0, 0, len)
}

/// All IP packets, of which `len` bytes are kept.
pub(super) fn all(len: u32) -> Vec<SockFilter> {
    vec![
        SockFilter::new(LOAD_WORD, 0, 0, PROTOCOL),
        equals(IPV4, 1),
        accept(len),
        equals(IPV6, 1),
        accept(len),
        REFUSE,
    ]
}

/// IP packets from or to an address of these networks.
pub(super) fn of_networks(networks: &[IpNet], len: u32) -> Vec<SockFilter> {
    let mut program = Vec::new();
    for network in networks {
        let (ethertype, ends, words): (u32, [u32; 2], Vec<(u32, u32)>) = match network {
            IpNet::V4(net) => {
                let word = (net.network().to_bits(), net.netmask().to_bits());
                (IPV4, [12, 16], vec![word])
            }
            IpNet::V6(net) => {
                let parts = |bits: u128| {
                    let parts: [u32; 4] = std::array::from_fn(|i| low32(bits >> (96 - 32 * i)));
                    parts
                };
                let (addr, mask) = (
                    parts(net.network().to_bits()),
                    parts(net.netmask().to_bits()),
                );
                (IPV6, [8, 24], addr.into_iter().zip(mask).collect())
            }
        };
        for end in ends {
            let mut test = Vec::new();
            for ((addr, mask), at) in words.iter().zip((end..).step_by(4)) {
                if *mask != 0 {
                    test.push((at, *addr, *mask));
                }
            }
            // What is skipped where a word differs: the words behind it and the acceptance.
            let count = test.len();
            let skip = |rest: usize| u8::try_from(3 * rest + 1).unwrap_or(u8::MAX);
            program.push(SockFilter::new(LOAD_WORD, 0, 0, PROTOCOL));
            program.push(equals(ethertype, skip(count)));
            for (number, (at, addr, mask)) in (1..).zip(test) {
                program.push(load(LOAD_WORD, at));
                program.push(SockFilter::new(AND, 0, 0, mask));
                program.push(equals(addr, skip(count - number)));
            }
            program.push(accept(len));
        }
    }
    program.push(REFUSE);
    program
}

/// UDP datagrams to this port, except for fragments behind the first.
pub(super) fn to_port(port: u16, len: u32) -> Vec<SockFilter> {
    vec![
        SockFilter::new(LOAD_WORD, 0, 0, PROTOCOL),
        equals(IPV4, 8),
        load(LOAD_BYTE, 9),
        equals(UDP, 12),
        load(LOAD_HALF, 6),
        SockFilter::new(JUMP_SET, 10, 0, FRAGMENT_OFFSET),
        load(INDEX_IPV4_HEADER, 0),
        load(LOAD_HALF_INDEXED, 2),
        equals(port as u32, 7),
        accept(len),
        equals(IPV6, 5),
        load(LOAD_BYTE, 6),
        equals(UDP, 3),
        load(LOAD_HALF, 42),
        equals(port as u32, 1),
        accept(len),
        REFUSE,
    ]
}

/// IPv4 in IPv4, except for fragments behind the first.
pub(super) fn ipip(len: u32) -> Vec<SockFilter> {
    vec![
        SockFilter::new(LOAD_WORD, 0, 0, PROTOCOL),
        equals(IPV4, 5),
        load(LOAD_BYTE, 9),
        equals(IPIP, 3),
        load(LOAD_HALF, 6),
        SockFilter::new(JUMP_SET, 1, 0, FRAGMENT_OFFSET),
        accept(len),
        REFUSE,
    ]
}

/// The low 32 bits.
const fn low32(bits: u128) -> u32 {
    let [.., a, b, c, d] = bits.to_be_bytes();
    u32::from_be_bytes([a, b, c, d])
}
