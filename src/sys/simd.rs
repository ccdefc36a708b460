//! Owns the choice of CPU-specific code: today the checksum. Never defines what is computed,
//! [`checksum`] does.

#![expect(
    unsafe_code,
    reason = "vector loads and calls of functions compiled for a detected CPU feature"
)]

use crate::wire::checksum::{self, SumFn};

/// The fastest [`SumFn`] of this CPU; every one gives the same result for the same bytes.
///
/// Call it once and keep the pointer.
#[must_use]
pub fn sum() -> SumFn {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        return avx2::sum_detected;
    }
    checksum::sum_scalar
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::{
        __m256i, _mm_add_epi64, _mm_cvtsi128_si64, _mm_extract_epi64, _mm256_add_epi64,
        _mm256_castsi256_si128, _mm256_extracti128_si256, _mm256_loadu_si256, _mm256_setzero_si256,
        _mm256_srli_epi64,
    };

    use crate::wire::checksum::WordSum;

    /// [`sum`] as a plain function pointer. Private to the module above, which hands it out only
    /// after detection.
    pub(super) fn sum_detected(bytes: &[u8]) -> u16 {
        // SAFETY: `sum` needs a CPU with AVX2. This function is reachable only through the pointer that `super::sum`
        // returns after `is_x86_feature_detected!("avx2")`; a CPU loses no features.
        unsafe { sum(bytes) }
    }

    /// [`WordSum`] over vectors: four words at a time, two vectors per round so that neither
    /// running sum waits for its own last addition. More per round measures slower on 64 bytes and
    /// no faster on 64 KiB.
    #[target_feature(enable = "avx2")]
    fn sum(bytes: &[u8]) -> u16 {
        let (vectors, rest) = bytes.as_chunks::<32>();
        let (pairs, last) = vectors.as_chunks::<2>();
        let (mut even, mut odd) = (Lanes::zero(), Lanes::zero());
        for [first, second] in pairs {
            even.add(load(first));
            odd.add(load(second));
        }
        for vector in last {
            even.add(load(vector));
        }
        WordSum {
            all: horizontal(_mm256_add_epi64(even.all, odd.all)),
            high: horizontal(_mm256_add_epi64(even.high, odd.high)),
        }
        .finish(rest)
    }

    /// Four [`WordSum`]s side by side.
    struct Lanes {
        all: __m256i,
        high: __m256i,
    }

    impl Lanes {
        #[target_feature(enable = "avx2")]
        #[inline]
        fn zero() -> Self {
            Self {
                all: _mm256_setzero_si256(),
                high: _mm256_setzero_si256(),
            }
        }

        #[target_feature(enable = "avx2")]
        #[inline]
        fn add(&mut self, words: __m256i) {
            self.all = _mm256_add_epi64(self.all, words);
            self.high = _mm256_add_epi64(self.high, _mm256_srli_epi64::<32>(words));
        }
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    fn load(bytes: &[u8; 32]) -> __m256i {
        // SAFETY: the pointer comes from a reference to 32 initialised bytes, exactly what the load reads, and `loadu`
        // asks for no alignment.
        unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
    }

    /// The wrapping sum of the four words of a vector.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn horizontal(words: __m256i) -> u64 {
        let halves = _mm_add_epi64(
            _mm256_castsi256_si128(words),
            _mm256_extracti128_si256::<1>(words),
        );
        let low = _mm_cvtsi128_si64(halves).cast_unsigned();
        low.wrapping_add(_mm_extract_epi64::<1>(halves).cast_unsigned())
    }
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
    fn every_short_length_at_every_alignment_agrees_with_the_definition() {
        let bytes: Vec<u8> = (0..400u32)
            .map(|i| i.wrapping_mul(0x9e37_79b9).to_be_bytes()[0])
            .collect();
        let sum = sum();
        for start in 0..64 {
            for len in 0..=300 {
                let part = &bytes[start..start + len];
                assert_eq!(sum(part), naive(part), "start {start} len {len}");
            }
        }
    }

    #[test]
    fn every_length_of_a_packet_of_ones_agrees_with_the_definition() {
        let ones = vec![0xff; 65_536 + 64];
        let sum = sum();
        for len in (0..ones.len()).step_by(61).chain([65_534, 65_535, 65_536]) {
            // The sum of ones is all ones, except that an odd length ends in 0xff00 and nothing
            // sums to zero.
            let expected = match (len, len % 2) {
                (0, _) => 0,
                (_, 0) => 0xffff,
                _ => 0xff00,
            };
            assert_eq!(sum(&ones[..len]), expected, "len {len}");
        }
        assert_eq!(sum(&vec![0; 65_535]), 0);
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn a_cpu_with_avx2_gets_the_avx2_sum() {
        let scalar: SumFn = checksum::sum_scalar;
        let chosen_scalar = std::ptr::fn_addr_eq(sum(), scalar);
        assert_eq!(is_x86_feature_detected!("avx2"), !chosen_scalar);
    }

    proptest! {
        #[test]
        fn any_bytes_agree_with_the_definition(
            bytes in proptest::collection::vec(any::<u8>(), 0..9000), skip in 0usize..40,
        ) {
            let part = &bytes[skip.min(bytes.len())..];
            prop_assert_eq!(sum()(part), naive(part));
        }
    }
}
