//! Every way to sum gives what RFC 1071 defines.

use loden::sys::simd;
use loden::wire::checksum;

/// The first byte is where the rest is cut in two, in words.
pub fn run(data: &[u8]) {
    let Some((&cut, bytes)) = data.split_first() else {
        return;
    };
    let expected = naive(bytes);
    assert_eq!(checksum::sum_scalar(bytes), expected);
    assert_eq!(simd::sum()(bytes), expected);

    let (head, tail) = bytes.split_at(bytes.len().min(usize::from(cut) * 2));
    let parts = checksum::combine(simd::sum()(head), simd::sum()(tail));
    assert_eq!(parts, expected);
}

/// RFC 1071 section 1, word by word as the text says it.
pub fn naive(bytes: &[u8]) -> u16 {
    bytes.chunks(2).fold(0, |sum: u16, pair| {
        let word = u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]);
        let (sum, carry) = sum.overflowing_add(word);
        sum + u16::from(carry)
    })
}
