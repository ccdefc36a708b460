//! Owns what makes packets one flow, and its hash. Never keeps a flow.

use std::net::IpAddr;

use super::field::Field;
use super::ip::{IpMeta, protocol};

/// Where TCP and UDP both have their ports.
const SRC_PORT: Field<2> = Field::at(0);
const DST_PORT: Field<2> = Field::at(2);
const PORTS_LEN: usize = 4;

/// What packets of one flow share: packets with equal keys must not overtake each other.
///
/// A fragment's key is its addresses alone. Only the first fragment has ports, and fragments of one
/// IPv6 datagram may differ in the protocol they name (RFC 8200 section 4.5), yet all have to go
/// the same way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// The source address.
    pub src: IpAddr,
    /// The destination address, of the same family.
    pub dst: IpAddr,
    /// The transport protocol; zero for a fragment.
    pub protocol: u8,
    /// The source port of TCP and UDP, else zero.
    pub src_port: u16,
    /// The destination port of TCP and UDP, else zero.
    pub dst_port: u16,
}

impl FlowKey {
    /// The key of the packet that [`super::ip::parse`] gave `meta` for.
    #[inline]
    #[must_use]
    pub fn of(meta: &IpMeta, packet: &[u8]) -> Self {
        let mut key = Self {
            src: meta.src(),
            dst: meta.dst(),
            protocol: 0,
            src_port: 0,
            dst_port: 0,
        };
        if meta.is_fragment() {
            return key;
        }
        key.protocol = meta.protocol();
        let transport = meta.transport(packet);
        if matches!(key.protocol, protocol::TCP | protocol::UDP) && transport.len() >= PORTS_LEN {
            key.src_port = SRC_PORT.get(transport);
            key.dst_port = DST_PORT.get(transport);
        }
        key
    }

    /// Mixes the key to 32 bits, any of which may choose a queue, a socket or a bucket.
    ///
    /// The same on every node and in every run, so a flow keeps its outer source port over a
    /// restart. It follows that a pod can aim its flows at one bucket: use it to spread load, never
    /// to bound a table.
    #[inline]
    #[must_use]
    pub fn mix(&self) -> u32 {
        let addresses = match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => mix(
                SEED,
                u64::from(src.to_bits()) << 32 | u64::from(dst.to_bits()),
            ),
            (src, dst) => {
                let ([a, b], [c, d]) = (words(src), words(dst));
                mix(pair(SEED, a, b), pair(!SEED, c, d))
            }
        };
        let transport = u64::from(self.protocol) << 32
            | u64::from(self.src_port) << 16
            | u64::from(self.dst_port);
        let hash = mix(addresses, transport);
        let [a, b, c, d, ..] = hash.to_be_bytes();
        u32::from_be_bytes([a, b, c, d])
    }
}

/// The flow hash of a packet: [`FlowKey::mix`] of its [`FlowKey::of`].
#[inline]
#[must_use]
pub fn flow_hash(meta: &IpMeta, packet: &[u8]) -> u32 {
    FlowKey::of(meta, packet).mix()
}

/// Where mixing starts: the first 64 bits of the fraction of pi. Not zero, so that an all-zero key
/// mixes too.
const SEED: u64 = 0x243f_6a88_85a3_08d3;
/// The multiplier: the next 64 bits of pi, made odd. Roughly half its bits are set, so every input
/// bit reaches both halves of the product.
const MULTIPLIER: u64 = 0x1319_8a2e_0370_7345;

/// Folds one word into the hash: the two halves of a 128-bit product, one multiplication on 64-bit
/// CPUs.
#[inline]
fn mix(hash: u64, word: u64) -> u64 {
    let (low, high) = (hash ^ word).carrying_mul(MULTIPLIER, 0);
    low ^ high
}

/// Mixes two words from `seed`; both of a packet's addresses go through it at once.
#[inline]
fn pair(seed: u64, first: u64, second: u64) -> u64 {
    mix(mix(seed, first), second)
}

/// An address as two words, an IPv4 address in the lower half of the second.
#[inline]
fn words(address: IpAddr) -> [u64; 2] {
    match address {
        IpAddr::V4(v4) => [0, u64::from(v4.to_bits())],
        IpAddr::V6(v6) => {
            let octets = v6.octets();
            [Field::at(0), Field::at(8)].map(|half| u64::from_be_bytes(half.octets(&octets)))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use etherparse::PacketBuilder;

    use super::super::ip;
    use super::*;

    fn key(i: u32) -> FlowKey {
        FlowKey {
            src: IpAddr::V4(Ipv4Addr::new(198, 18, 0, 2)),
            dst: IpAddr::V4(Ipv4Addr::new(198, 18, 1, 2)),
            protocol: protocol::TCP,
            src_port: u16::try_from(32_768 + i).unwrap(),
            dst_port: 80,
        }
    }

    fn v6(key: FlowKey) -> FlowKey {
        let map = |address| match address {
            IpAddr::V4(v4) => Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, v4.octets()[2].into()).into(),
            IpAddr::V6(v6) => IpAddr::V6(v6),
        };
        FlowKey {
            src: map(key.src),
            dst: map(key.dst),
            ..key
        }
    }

    fn udp_packet(src_port: u16) -> Vec<u8> {
        let mut packet = Vec::new();
        let builder = PacketBuilder::ipv4([198, 18, 0, 1], [198, 18, 0, 2], 64).udp(src_port, 53);
        builder.write(&mut packet, &[7; 32]).unwrap();
        packet
    }

    fn key_of(packet: &[u8]) -> FlowKey {
        FlowKey::of(&ip::parse(packet).unwrap(), packet)
    }

    #[test]
    fn ports_and_protocol_are_part_of_a_whole_datagrams_key() {
        let key = key_of(&udp_packet(1000));
        assert_eq!(
            (key.protocol, key.src_port, key.dst_port),
            (protocol::UDP, 1000, 53)
        );
        assert_ne!(key, key_of(&udp_packet(1001)));
    }

    #[test]
    fn all_fragments_of_a_datagram_have_one_key() {
        let mut first = udp_packet(1000);
        first[6] = 0x20;
        let mut last = udp_packet(9999);
        last[7] = 100;
        assert_eq!(key_of(&first), key_of(&last));
        assert_eq!(key_of(&first).protocol, 0);
    }

    #[test]
    fn a_protocol_without_ports_is_keyed_without_them() {
        let mut packet = udp_packet(1000);
        packet[9] = 47;
        let key = key_of(&packet);
        assert_eq!((key.protocol, key.src_port, key.dst_port), (47, 0, 0));
    }

    #[test]
    fn ports_cut_off_by_the_total_length_are_not_read() {
        let mut packet = udp_packet(1000);
        packet[3] = 23;
        assert_eq!((key_of(&packet).src_port, key_of(&packet).dst_port), (0, 0));
    }

    /// Every bit range a caller may take: sequential ports, the usual pattern, must fill buckets
    /// evenly.
    #[test]
    fn sequential_ports_spread_evenly_over_any_four_bits() {
        for family in [std::convert::identity, v6] {
            for shift in (0..32).step_by(4) {
                let mut buckets = [0u32; 16];
                for i in 0..16_384 {
                    buckets[(family(key(i)).mix() >> shift & 0xf) as usize] += 1;
                }
                // 1024 expected, standard deviation 31: five of them.
                assert!(
                    buckets.iter().all(|&count| (869..=1179).contains(&count)),
                    "shift {shift}: {buckets:?}"
                );
            }
        }
    }

    #[test]
    fn flipping_any_input_bit_flips_about_half_of_the_output_bits() {
        type Flip = fn(FlowKey, u32) -> FlowKey;
        let flips: [(&str, Flip); 4] = [
            ("source port", |k, bit| FlowKey {
                src_port: k.src_port ^ 1 << (bit % 16),
                ..k
            }),
            ("destination port", |k, bit| FlowKey {
                dst_port: k.dst_port ^ 1 << (bit % 16),
                ..k
            }),
            ("source", |k, bit| FlowKey {
                src: flip(k.src, bit),
                ..k
            }),
            ("destination", |k, bit| FlowKey {
                dst: flip(k.dst, bit),
                ..k
            }),
        ];
        for family in [std::convert::identity, v6] {
            for (name, change) in flips {
                for bit in 0..32 {
                    let differing: u32 = (0..256)
                        .map(|i| {
                            (family(key(i)).mix() ^ change(family(key(i)), bit).mix()).count_ones()
                        })
                        .sum();
                    let average = f64::from(differing) / 256.0;
                    assert!(
                        (12.0..=20.0).contains(&average),
                        "{name} bit {bit}: {average}"
                    );
                }
            }
        }
    }

    fn flip(address: IpAddr, bit: u32) -> IpAddr {
        match address {
            IpAddr::V4(v4) => Ipv4Addr::from_bits(v4.to_bits() ^ 1 << bit).into(),
            IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() ^ 1 << (bit * 4)).into(),
        }
    }
}
