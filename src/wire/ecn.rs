//! Owns the ECN field and how it crosses a tunnel (RFC 3168, RFC 6040). Never touches a packet.

/// The two low bits of the IPv4 TOS byte and the IPv6 traffic class (RFC 3168 section 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Ecn {
    /// The transport does not understand ECN.
    NotEct = 0b00,
    /// ECN-capable transport, codepoint 1 (L4S, RFC 9331).
    Ect1 = 0b01,
    /// ECN-capable transport, codepoint 0.
    Ect0 = 0b10,
    /// Congestion experienced.
    Ce = 0b11,
}

impl Ecn {
    /// The ECN field of a TOS byte or traffic class.
    #[inline]
    #[must_use]
    pub const fn of(tos: u8) -> Self {
        match tos & 0b11 {
            0b00 => Self::NotEct,
            0b01 => Self::Ect1,
            0b10 => Self::Ect0,
            _ => Self::Ce,
        }
    }

    /// `tos` with this ECN field and its DSCP kept.
    #[inline]
    #[must_use]
    pub const fn in_tos(self, tos: u8) -> u8 {
        tos & !0b11 | self as u8
    }
}

/// What the ingress does with the inner ECN field (RFC 6040 section 4.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EcnMode {
    /// The egress understands RFC 6040: the outer field is the inner one.
    #[default]
    Normal,
    /// The egress throws the outer field away, so a mark made on the way would be lost: the outer
    /// field is Not-ECT and routers drop instead of marking.
    Compatibility,
}

/// The outer field for an inner one, RFC 6040 section 4.1.
#[inline]
#[must_use]
pub const fn encap(inner: Ecn, mode: EcnMode) -> Ecn {
    match mode {
        EcnMode::Normal => inner,
        EcnMode::Compatibility => Ecn::NotEct,
    }
}

/// A router marked a packet whose transport cannot hear it: only a drop tells the sender of the
/// congestion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("congestion was marked on a packet that is not ECN-capable")]
pub struct CongestionDrop;

/// The field to forward for an inner and an outer one, RFC 6040 section 4.2, figure 4.
///
/// # Errors
/// [`CongestionDrop`] for an inner Not-ECT under an outer CE.
#[inline]
pub const fn decap(inner: Ecn, outer: Ecn) -> Result<Ecn, CongestionDrop> {
    match (inner, outer) {
        (Ecn::NotEct, Ecn::Ce) => Err(CongestionDrop),
        (Ecn::Ect0 | Ecn::Ect1 | Ecn::Ce, Ecn::Ce) => Ok(Ecn::Ce),
        (Ecn::Ect0, Ecn::Ect1) => Ok(Ecn::Ect1),
        (inner, _) => Ok(inner),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Ecn; 4] = [Ecn::NotEct, Ecn::Ect0, Ecn::Ect1, Ecn::Ce];

    #[test]
    fn decap_is_figure_4_of_rfc_6040() {
        let (not, ect0, ect1, ce) = (Ok(Ecn::NotEct), Ok(Ecn::Ect0), Ok(Ecn::Ect1), Ok(Ecn::Ce));
        // Rows: the inner field; columns: the outer field, both in the order of `ALL`.
        let figure = [
            [not, not, not, Err(CongestionDrop)],
            [ect0, ect0, ect1, ce],
            [ect1, ect1, ect1, ce],
            [ce, ce, ce, ce],
        ];
        for (inner, row) in ALL.into_iter().zip(figure) {
            for (outer, expected) in ALL.into_iter().zip(row) {
                assert_eq!(
                    decap(inner, outer),
                    expected,
                    "inner {inner:?} outer {outer:?}"
                );
            }
        }
    }

    #[test]
    fn a_tunnel_without_congestion_changes_nothing_in_either_mode() {
        for inner in ALL {
            for mode in [EcnMode::Normal, EcnMode::Compatibility] {
                assert_eq!(decap(inner, encap(inner, mode)), Ok(inner));
            }
        }
    }

    #[test]
    fn compatibility_mode_never_lets_routers_mark() {
        for inner in ALL {
            assert_eq!(encap(inner, EcnMode::Compatibility), Ecn::NotEct);
        }
    }

    #[test]
    fn the_field_of_a_tos_byte_leaves_the_dscp_alone() {
        for tos in 0..=u8::MAX {
            assert_eq!(Ecn::of(tos).in_tos(tos), tos);
            for ecn in ALL {
                assert_eq!(Ecn::of(ecn.in_tos(tos)), ecn);
                assert_eq!(ecn.in_tos(tos) >> 2, tos >> 2);
            }
        }
    }
}
