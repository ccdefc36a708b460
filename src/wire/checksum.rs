//! Owns the Internet checksum (RFC 1071) and its incremental update (RFC 1624). Never touches a
//! packet's layout.
//!
//! A *sum* is the folded, not inverted one's-complement sum; a *check* is what a header's checksum
//! field holds, the inverted sum. [`finish`] turns the first into the second.

/// Sums a byte string as big-endian 16-bit words in one's-complement arithmetic, an odd last byte
/// padded with zero, folded to 16 bits and *not* inverted. `sys::simd::sum()` returns the fastest
/// one this CPU has.
pub type SumFn = fn(&[u8]) -> u16;

/// 64-bit words added per round of [`sum_scalar`]: independent additions that the compiler packs
/// into vectors.
const LANES: usize = 8;

/// The portable [`SumFn`], exact for every length and alignment.
///
/// Written so that the compiler vectorises it for the target's baseline (SSE2 on x86-64, NEON on
/// aarch64).
#[must_use]
pub fn sum_scalar(bytes: &[u8]) -> u16 {
    let (blocks, rest) = bytes.as_chunks::<{ 8 * LANES }>();
    let mut lanes = [WordSum::default(); LANES];
    for block in blocks {
        for (lane, word) in lanes.iter_mut().zip(block.as_chunks().0) {
            lane.add(u64::from_ne_bytes(*word));
        }
    }
    lanes
        .into_iter()
        .fold(WordSum::default(), WordSum::merge)
        .finish(rest)
}

/// The sum of many native-endian 64-bit words, kept in two parts that need neither carries nor
/// masks.
///
/// One's-complement addition does not depend on byte order (RFC 1071 section 2 B), so words are
/// added as the CPU loads them and the result is swapped once. `all` is `Σw` modulo 2^64 and `high`
/// is `Σ(w >> 32)`. The sum of the lower halves is then `all - 2^32·high` modulo 2^64, which is
/// exact because fewer than 2^32 of them (32 GiB) cannot reach 2^64. Per word that is two additions
/// and a shift: less than widening both halves costs.
#[derive(Clone, Copy, Default)]
pub(crate) struct WordSum {
    pub(crate) all: u64,
    pub(crate) high: u64,
}

impl WordSum {
    /// Adds one word.
    #[inline]
    pub(crate) const fn add(&mut self, word: u64) {
        self.all = self.all.wrapping_add(word);
        self.high = self.high.wrapping_add(word >> 32);
    }

    /// The sum of both.
    #[inline]
    pub(crate) const fn merge(self, other: Self) -> Self {
        Self {
            all: self.all.wrapping_add(other.all),
            high: self.high.wrapping_add(other.high),
        }
    }

    /// Adds the bytes that follow the words, then folds to a sum in network byte order.
    #[inline]
    pub(crate) fn finish(mut self, rest: &[u8]) -> u16 {
        let (words, tail) = rest.as_chunks();
        for word in words {
            self.add(u64::from_ne_bytes(*word));
        }
        let low = self.all.wrapping_sub(self.high << 32);
        u16::from_be(fold(
            low.wrapping_add(self.high).wrapping_add(tail_words(tail)),
        ))
    }
}

/// Sums fewer than eight bytes as native words of four, two and one byte.
#[inline]
fn tail_words(mut tail: &[u8]) -> u64 {
    let mut sum = 0;
    if let Some((word, rest)) = tail.split_first_chunk() {
        sum += u64::from(u32::from_ne_bytes(*word));
        tail = rest;
    }
    if let Some((word, rest)) = tail.split_first_chunk() {
        sum += u64::from(u16::from_ne_bytes(*word));
        tail = rest;
    }
    if let Some(&last) = tail.first() {
        sum += u64::from(u16::from_ne_bytes([last, 0]));
    }
    sum
}

/// Folds a sum of 16-bit words to 16 bits with end-around carry; zero only for zero.
#[inline]
#[expect(
    clippy::cast_possible_truncation,
    reason = "the last step leaves at most 16 bits"
)]
const fn fold(sum: u64) -> u16 {
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    ((sum >> 16) + (sum & 0xffff)) as u16
}

/// One's-complement addition of two sums. The bytes summed second must begin at an even offset of
/// the whole.
#[inline]
#[must_use]
pub const fn combine(a: u16, b: u16) -> u16 {
    let (sum, carry) = a.overflowing_add(b);
    sum + carry as u16
}

/// The check for a sum: what goes into an IPv4, TCP or ICMP checksum field.
#[inline]
#[must_use]
pub const fn finish(sum: u16) -> u16 {
    !sum
}

/// The check for a sum over a UDP datagram, where zero means "no checksum" and is sent as all ones
/// (RFC 768).
#[inline]
#[must_use]
pub const fn finish_udp(sum: u16) -> u16 {
    match !sum {
        0 => 0xffff,
        check => check,
    }
}

/// Whether a sum that covers a checksum field shows that field to be right.
#[inline]
#[must_use]
pub const fn verify(sum: u16) -> bool {
    sum == 0xffff
}

/// The sum of the pseudo header of RFC 9293 section 3.1 (IPv4) and RFC 8200 section 8.1 (IPv6),
/// which have the same words. `src` and `dst` are the addresses' octets, `len` the bytes of the
/// transport header and payload.
#[inline]
#[must_use]
pub fn pseudo_header(src: &[u8], dst: &[u8], protocol: u8, len: u32) -> u16 {
    let addresses = combine(
        WordSum::default().finish(src),
        WordSum::default().finish(dst),
    );
    combine(addresses, fold(u64::from(protocol) + u64::from(len)))
}

/// The new check after the 16-bit word `old` under it becomes `new`: RFC 1624 equation 3, which
/// unlike equation 2 never turns a right check into the other zero.
#[inline]
#[must_use]
pub const fn update(check: u16, old: u16, new: u16) -> u16 {
    !combine(combine(!check, !old), new)
}

/// [`update`] for a 32-bit word, such as an IPv4 address or a sequence number, at an even offset.
#[inline]
#[must_use]
pub const fn update32(check: u16, old: u32, new: u32) -> u16 {
    !combine(combine(!check, !fold(old as u64)), fold(new as u64))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// RFC 1071 section 1, word by word as the text says it.
    fn naive(bytes: &[u8]) -> u16 {
        let mut sum = 0u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(pair[0]) * 256 + pair.get(1).map_or(0, |&low| u32::from(low));
            if sum > 0xffff {
                sum -= 0xffff;
            }
        }
        u16::try_from(sum).unwrap()
    }

    #[test]
    fn rfc_1071_section_3_example() {
        assert_eq!(
            sum_scalar(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]),
            0xddf2
        );
    }

    #[test]
    fn every_short_length_at_every_alignment_agrees_with_the_definition() {
        let bytes: Vec<u8> = (0..400u32)
            .map(|i| i.wrapping_mul(0x9e37_79b9).to_be_bytes()[0])
            .collect();
        for start in 0..64 {
            for len in 0..=300 {
                let part = &bytes[start..start + len];
                assert_eq!(sum_scalar(part), naive(part), "start {start} len {len}");
            }
        }
    }

    #[test]
    fn all_ones_do_not_overflow_and_zeros_stay_zero() {
        for len in [65_534, 65_535, 65_536, 1 << 20] {
            assert_eq!(
                sum_scalar(&vec![0xff; len]),
                naive(&vec![0xff; len]),
                "len {len}"
            );
            assert_eq!(sum_scalar(&vec![0; len]), 0);
        }
    }

    #[test]
    fn the_udp_check_is_never_zero() {
        assert_eq!(finish_udp(0xffff), 0xffff);
        assert_eq!(finish_udp(0x1234), 0xedcb);
        assert_eq!(finish(0xffff), 0);
    }

    #[test]
    fn updating_keeps_the_example_of_rfc_1624_section_4() {
        assert_eq!(update(0xdd2f, 0x5555, 0x3285), 0x0000);
    }

    #[test]
    fn the_pseudo_header_of_each_family_agrees_with_etherparse() {
        let payload = [1, 2, 3, 4, 5];
        let (src, dst) = ([198, 18, 0, 1], [198, 18, 255, 254]);
        let udp = etherparse::UdpHeader::with_ipv4_checksum(
            1000,
            2000,
            &etherparse::Ipv4Header::new(13, 64, etherparse::IpNumber::UDP, src, dst).unwrap(),
            &payload,
        )
        .unwrap();
        let covered = [&udp.to_bytes()[..], &payload].concat();
        assert!(verify(combine(
            pseudo_header(&src, &dst, 17, 13),
            sum_scalar(&covered)
        )));

        let (src, dst) = ([0xfd; 16], [0xfe; 16]);
        let ip = etherparse::Ipv6Header {
            source: src,
            destination: dst,
            ..Default::default()
        };
        let udp = etherparse::UdpHeader::with_ipv6_checksum(1000, 2000, &ip, &payload).unwrap();
        let covered = [&udp.to_bytes()[..], &payload].concat();
        assert!(verify(combine(
            pseudo_header(&src, &dst, 17, 13),
            sum_scalar(&covered)
        )));
    }

    proptest! {
        #[test]
        fn any_bytes_agree_with_the_definition(
            bytes in proptest::collection::vec(any::<u8>(), 0..4096),
        ) {
            prop_assert_eq!(sum_scalar(&bytes), naive(&bytes));
        }

        #[test]
        fn sums_of_parts_combine_to_the_sum_of_the_whole(
            bytes in proptest::collection::vec(any::<u8>(), 0..512), cut in 0usize..256,
        ) {
            let (head, tail) = bytes.split_at((cut * 2).min(bytes.len()));
            prop_assert_eq!(combine(sum_scalar(head), sum_scalar(tail)), naive(&bytes));
        }

        #[test]
        fn updating_equals_summing_again(
            mut words in proptest::collection::vec(any::<u16>(), 3..40),
            at in any::<prop::sample::Index>(), new in any::<u16>(), new32 in any::<u32>(),
        ) {
            let bytes =
                |words: &[u16]| words.iter().flat_map(|w| w.to_be_bytes()).collect::<Vec<_>>();
            // A packet's first words are never all zero (version), so its sum is never the plus
            // zero.
            words[0] |= 0x4000;
            let at = 1 + at.index(words.len() - 2);
            let check = finish(naive(&bytes(&words)));

            let old = std::mem::replace(&mut words[at], new);
            let once = update(check, old, new);
            prop_assert_eq!(once, finish(naive(&bytes(&words))));

            let [high, low] =
                [new32 >> 16, new32 & 0xffff].map(|half| u16::try_from(half).unwrap());
            let old32 = u32::from(words[at]) << 16 | u32::from(words[at + 1]);
            (words[at], words[at + 1]) = (high, low);
            prop_assert_eq!(update32(once, old32, new32), finish(naive(&bytes(&words))));
        }
    }
}
