//! Owns reading and writing one big-endian header field. Never knows which header.

/// `LEN` bytes at a fixed offset of a header.
#[derive(Clone, Copy)]
pub(super) struct Field<const LEN: usize> {
    off: usize,
}

impl<const LEN: usize> Field<LEN> {
    /// The field `off` bytes into the header.
    pub(super) const fn at(off: usize) -> Self {
        Self { off }
    }

    /// The field's bytes; zeros when it lies beyond the end.
    #[inline]
    pub(super) fn octets(self, header: &[u8]) -> [u8; LEN] {
        let field = header.get(self.off..).and_then(<[u8]>::first_chunk);
        field.copied().unwrap_or([0; LEN])
    }

    /// Writes the field's bytes; nothing when it lies beyond the end.
    #[inline]
    pub(super) fn put(self, header: &mut [u8], octets: [u8; LEN]) {
        if let Some(field) = header.get_mut(self.off..).and_then(<[u8]>::first_chunk_mut) {
            *field = octets;
        }
    }
}

/// The integer readings of the widths that headers use.
macro_rules! integer_field {
    ($($len:literal => $int:ty),*) => {$(
        impl Field<$len> {
            #[inline]
            pub(super) fn get(self, header: &[u8]) -> $int {
                <$int>::from_be_bytes(self.octets(header))
            }

            #[inline]
            pub(super) fn set(self, header: &mut [u8], value: $int) {
                self.put(header, value.to_be_bytes());
            }
        }
    )*};
}

integer_field!(1 => u8, 2 => u16, 4 => u32, 8 => u64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_reads_and_writes_big_endian_at_its_offset() {
        let mut bytes = [0xa5; 8];
        Field::<2>::at(1).set(&mut bytes, 0x1234);
        Field::<4>::at(3).set(&mut bytes, 0x5678_9abc);
        assert_eq!(bytes, [0xa5, 0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc, 0xa5]);
        assert_eq!(Field::<1>::at(2).get(&bytes), 0x34);
        assert_eq!(Field::<2>::at(2).get(&bytes), 0x3456);
    }

    #[test]
    fn a_field_beyond_the_end_reads_zero_and_is_not_written() {
        let mut bytes = [0xa5; 3];
        Field::<2>::at(2).set(&mut bytes, 0x1234);
        Field::<4>::at(9).set(&mut bytes, 1);
        assert_eq!(bytes, [0xa5; 3]);
        assert_eq!(Field::<2>::at(2).get(&bytes), 0);
        assert_eq!(Field::<4>::at(9).get(&bytes), 0);
    }
}
