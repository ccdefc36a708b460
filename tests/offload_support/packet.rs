//! Owns the slow, obviously right counterparts of `loden::offload`: a packet builder, a checksum and a
//! splitter written from the RFCs. Shares no code with what it judges, and is never fast.

#![expect(
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    unreachable_pub,
    reason = "an oracle may panic, and is compiled into several crates"
)]

/// RFC 1071, word by word: the folded sum, not inverted, an odd byte padded with zero.
pub fn naive_sum(bytes: &[u8]) -> u16 {
    let mut sum: u64 = 0;
    for pair in bytes.chunks(2) {
        sum += u64::from(pair[0]) << 8;
        if pair.len() == 2 {
            sum += u64::from(pair[1]);
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// A packet by its fields. Lengths and checksums are computed.
#[derive(Clone, Debug)]
pub struct Fields {
    pub v6: bool,
    pub udp: bool,
    pub src: u8,
    pub dst: u8,
    pub src_port: u16,
    pub dst_port: u16,
    pub ttl: u8,
    pub tos: u8,
    pub id: u16,
    /// The IPv4 flags and fragment offset word.
    pub frag: u16,
    pub flow_label: u32,
    pub ip_options: Vec<u8>,
    /// IPv6 extension headers: kind, and units of eight bytes behind the first.
    pub extensions: Vec<(u8, u8)>,
    pub seq: u32,
    pub ack: u32,
    /// The 12 bits behind the data offset.
    pub flags: u16,
    pub window: u16,
    pub urgent: u16,
    pub tcp_options: Vec<u8>,
    pub payload: Vec<u8>,
}

pub const FIN: u16 = 0x01;
pub const PSH: u16 = 0x08;
pub const ACK: u16 = 0x10;
pub const CWR: u16 = 0x80;
pub const DF: u16 = 0x4000;

impl Default for Fields {
    fn default() -> Self {
        Self {
            v6: false,
            udp: false,
            src: 1,
            dst: 2,
            src_port: 4000,
            dst_port: 5201,
            ttl: 63,
            tos: 0,
            id: 7,
            frag: DF,
            flow_label: 0x12345,
            ip_options: vec![],
            extensions: vec![],
            seq: 1000,
            ack: 77,
            flags: ACK,
            window: 501,
            urgent: 0,
            tcp_options: vec![],
            payload: vec![0xa5; 100],
        }
    }
}

impl Fields {
    pub fn build(&self) -> Vec<u8> {
        let mut l4 = Vec::new();
        l4.extend(self.src_port.to_be_bytes());
        l4.extend(self.dst_port.to_be_bytes());
        if self.udp {
            l4.extend(((8 + self.payload.len()) as u16).to_be_bytes());
            l4.extend([0, 0]);
        } else {
            l4.extend(self.seq.to_be_bytes());
            l4.extend(self.ack.to_be_bytes());
            let words = (20 + self.tcp_options.len()) as u16 / 4;
            l4.extend(((words << 12) | self.flags).to_be_bytes());
            l4.extend(self.window.to_be_bytes());
            l4.extend([0, 0]);
            l4.extend(self.urgent.to_be_bytes());
            l4.extend(&self.tcp_options);
        }
        l4.extend(&self.payload);
        let protocol = if self.udp { 17 } else { 6 };
        let mut packet = Vec::new();
        if self.v6 {
            let word = (6 << 28) | (u32::from(self.tos) << 20) | self.flow_label;
            packet.extend(word.to_be_bytes());
            let extensions = self.extension_bytes(protocol);
            packet.extend(((extensions.len() + l4.len()) as u16).to_be_bytes());
            packet.extend([
                self.extensions.first().map_or(protocol, |first| first.0),
                self.ttl,
            ]);
            for host in [self.src, self.dst] {
                packet.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, host]);
            }
            packet.extend(extensions);
        } else {
            let ip_len = 20 + self.ip_options.len();
            packet.extend([0x40 | (ip_len / 4) as u8, self.tos]);
            packet.extend(((ip_len + l4.len()) as u16).to_be_bytes());
            packet.extend(self.id.to_be_bytes());
            packet.extend(self.frag.to_be_bytes());
            packet.extend([self.ttl, protocol, 0, 0]);
            packet.extend([198, 18, 0, self.src, 198, 19, 0, self.dst]);
            packet.extend(&self.ip_options);
        }
        packet.extend(l4);
        fix_checksums(&mut packet);
        packet
    }

    /// RFC 8200 section 4.2: what follows, the length, and one option of padding that fills the rest.
    fn extension_bytes(&self, protocol: u8) -> Vec<u8> {
        const PAD_N: u8 = 1;
        let mut bytes = Vec::new();
        for (i, &(_, units)) in self.extensions.iter().enumerate() {
            let next = self.extensions.get(i + 1).map_or(protocol, |next| next.0);
            bytes.extend([next, units, PAD_N, 4 + 8 * units]);
            bytes.extend(vec![0; 4 + 8 * usize::from(units)]);
        }
        bytes
    }
}

pub fn is_v6(packet: &[u8]) -> bool {
    packet[0] >> 4 == 6
}

/// The transport protocol, and the offset of its header.
fn l4(packet: &[u8]) -> (u8, usize) {
    const HOP_BY_HOP: u8 = 0;
    const DESTINATION: u8 = 60;
    if !is_v6(packet) {
        return (packet[9], usize::from(packet[0] & 15) * 4);
    }
    let (mut protocol, mut at) = (packet[6], 40);
    while matches!(protocol, HOP_BY_HOP | DESTINATION) && at + 8 <= packet.len() {
        protocol = packet[at];
        at += 8 + 8 * usize::from(packet[at + 1]);
    }
    (protocol, at)
}

/// Offset of the transport header.
pub fn l4_at(packet: &[u8]) -> usize {
    l4(packet).1
}

pub fn is_udp(packet: &[u8]) -> bool {
    l4(packet).0 == 17
}

/// Offset of the payload.
pub fn payload_at(packet: &[u8]) -> usize {
    let l4 = l4_at(packet);
    l4 + if is_udp(packet) {
        8
    } else {
        usize::from(packet[l4 + 12] >> 4) * 4
    }
}

/// Offset of the transport checksum.
pub fn checksum_at(packet: &[u8]) -> usize {
    l4_at(packet) + if is_udp(packet) { 6 } else { 16 }
}

/// RFC 9293 section 3.1, RFC 768, RFC 8200 section 8.1.
pub fn pseudo_header(packet: &[u8]) -> Vec<u8> {
    let len = (packet.len() - l4_at(packet)) as u32;
    let mut pseudo = Vec::new();
    pseudo.extend(if is_v6(packet) {
        &packet[8..40]
    } else {
        &packet[12..20]
    });
    pseudo.extend(len.to_be_bytes());
    pseudo.extend([0, 0, 0, if is_udp(packet) { 17 } else { 6 }]);
    pseudo
}

fn transport_sum(packet: &[u8]) -> u16 {
    let mut covered = pseudo_header(packet);
    covered.extend(&packet[l4_at(packet)..]);
    naive_sum(&covered)
}

/// Fills in the IPv4 header checksum and the transport checksum.
pub fn fix_checksums(packet: &mut [u8]) {
    if !is_v6(packet) {
        packet[10..12].fill(0);
        let checksum = !naive_sum(&packet[..l4_at(packet)]);
        packet[10..12].copy_from_slice(&checksum.to_be_bytes());
    }
    let at = checksum_at(packet);
    packet[at..at + 2].fill(0);
    let mut checksum = !transport_sum(packet);
    if is_udp(packet) && checksum == 0 {
        checksum = 0xffff;
    }
    packet[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
}

pub fn checksums_hold(packet: &[u8]) -> bool {
    let ip = is_v6(packet) || naive_sum(&packet[..l4_at(packet)]) == 0xffff;
    ip && transport_sum(packet) == 0xffff
}

/// Writes the lengths in the IP and UDP headers.
pub fn fix_lengths(packet: &mut [u8]) {
    let (len, l4) = (packet.len(), l4_at(packet));
    if is_v6(packet) {
        packet[4..6].copy_from_slice(&((len - 40) as u16).to_be_bytes());
    } else {
        packet[2..4].copy_from_slice(&(len as u16).to_be_bytes());
    }
    if is_udp(packet) {
        packet[l4 + 4..l4 + 6].copy_from_slice(&((len - l4) as u16).to_be_bytes());
    }
}

/// What the sender would have sent, had it made packets of `gso_size` payload bytes in the first place.
pub fn split_slowly(superpacket: &[u8], gso_size: usize) -> Vec<Vec<u8>> {
    let (header, payload) = superpacket.split_at(payload_at(superpacket));
    let chunks: Vec<&[u8]> = payload.chunks(gso_size).collect();
    let mut segments = Vec::new();
    let mut sent: u32 = 0;
    for (i, chunk) in chunks.iter().enumerate() {
        let mut segment = [header, chunk].concat();
        fix_lengths(&mut segment);
        if !is_v6(&segment) {
            let id = u16::from_be_bytes([header[4], header[5]]).wrapping_add(i as u16);
            segment[4..6].copy_from_slice(&id.to_be_bytes());
        }
        if !is_udp(&segment) {
            let l4 = l4_at(&segment);
            let seq = u32::from_be_bytes(segment[l4 + 4..l4 + 8].try_into().unwrap());
            segment[l4 + 4..l4 + 8].copy_from_slice(&seq.wrapping_add(sent).to_be_bytes());
            if i + 1 != chunks.len() {
                segment[l4 + 13] &= !(FIN | PSH) as u8;
            }
            if i != 0 {
                segment[l4 + 13] &= !CWR as u8;
            }
        }
        sent += chunk.len() as u32;
        fix_checksums(&mut segment);
        segments.push(segment);
    }
    segments
}
