//! Owns captures as pcapng files (draft-ietf-opsawg-pcapng): one interface per direction, of the workers and of each
//! packet socket, and the verdict as the packet's comment. Never opens a file.

mod outer;

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use etherparse::IpNumber;
use pcap_file::pcapng::PcapNgWriter;
use pcap_file::pcapng::blocks::enhanced_packet::{EnhancedPacketBlock, EnhancedPacketOption};
use pcap_file::pcapng::blocks::interface_description::{
    InterfaceDescriptionBlock, InterfaceDescriptionOption,
};
use pcap_file::pcapng::blocks::interface_statistics::{
    InterfaceStatisticsBlock, InterfaceStatisticsOption,
};
use pcap_file::pcapng::blocks::section_header::{SectionHeaderBlock, SectionHeaderOption};
use pcap_file::{DataLink, Endianness, PcapError};
use serde::{Deserialize, Serialize};

use crate::addr::{Mac, Vni};
use crate::datapath::Encapsulation;
use crate::datapath::tap::{Direction, Lost, Record, Verdict};
use crate::debug::watch::scene::{Kind, Place};
use crate::wire::ipv4::Ipv4;
use crate::wire::ipv6::{self, Ipv6};
use outer::outer_headers;

/// `if_tsresol`: 10⁻⁹ s.
const NANOSECONDS: u8 = 9;
/// `epb_flags`: the packet came in, or went out (section 4.3).
const INBOUND: u32 = 1;
const OUTBOUND: u32 = 2;

/// One data plane's end of the tunnel.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct End {
    /// The TUN device.
    device: String,
    /// The tunnel's own outer address.
    bind: SocketAddr,
    /// VNI and MAC address, where it speaks VXLAN.
    vxlan: Option<(u32, String)>,
}

impl End {
    /// That of a device.
    #[must_use]
    pub fn of(device: &str, bind: SocketAddr, encapsulation: Encapsulation) -> Self {
        Self {
            device: device.to_owned(),
            bind,
            vxlan: match encapsulation {
                Encapsulation::Plain => None,
                Encapsulation::Vxlan { vni, mac } => Some((vni.get(), mac.to_string())),
            },
        }
    }

    /// VNI and MAC address, where it speaks VXLAN.
    fn vxlan(&self) -> Option<(Vni, Mac)> {
        let (vni, mac) = self.vxlan.as_ref()?;
        Some((Vni::new(*vni)?, mac.parse().ok()?))
    }
}

/// What a file says about where it comes from.
#[derive(Clone, Debug, Default)]
pub struct Origin {
    /// One for each family of the underlay that has one.
    pub ends: Vec<End>,
    /// The links where packet sockets are read.
    pub watched: Vec<Place>,
    /// MAC addresses of peers by their outer addresses, where VXLAN is spoken.
    pub macs: HashMap<IpAddr, Mac>,
    /// The filter, as given.
    pub filter: String,
}

/// Writes one file.
pub struct File<W: Write> {
    writer: PcapNgWriter<W>,
    origin: Origin,
    outer: bool,
    packet: Vec<u8>,
    /// Packets written, per interface.
    written: Vec<u64>,
    last_ns: u64,
}

impl<W: Write> fmt::Debug for File<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("File").finish_non_exhaustive()
    }
}

impl<W: Write> File<W> {
    /// Writes the file's beginning. With `outer`, packets are written as the datagrams that carry them.
    ///
    /// # Errors
    /// The writer's.
    pub fn begin(writer: W, origin: &Origin, outer: bool) -> io::Result<Self> {
        let program = concat!("loden ", env!("CARGO_PKG_VERSION"));
        let section = SectionHeaderBlock {
            endianness: Endianness::native(),
            options: vec![SectionHeaderOption::UserApplication(program.into())],
            ..SectionHeaderBlock::default()
        };
        let mut writer = PcapNgWriter::with_section_header(writer, section).map_err(io)?;
        let interfaces = interfaces(origin);
        let written = vec![0; interfaces.len()];
        for (name, description) in interfaces {
            let mut options = vec![
                InterfaceDescriptionOption::IfName(name.into()),
                InterfaceDescriptionOption::IfDescription(description.into()),
                InterfaceDescriptionOption::IfTsResol(NANOSECONDS),
            ];
            if !origin.filter.is_empty() {
                // The zero says that text follows.
                let filter = [&[0], origin.filter.as_bytes()].concat();
                options.push(InterfaceDescriptionOption::IfFilter(filter.into()));
            }
            let interface = InterfaceDescriptionBlock {
                linktype: DataLink::RAW,
                snaplen: 0,
                options,
            };
            writer.write_pcapng_block(interface).map_err(io)?;
        }
        // Whoever reads a pipe sees at once that it is one of these.
        writer.get_mut().flush()?;
        Ok(Self {
            writer,
            origin: origin.clone(),
            outer,
            packet: Vec::new(),
            written,
            last_ns: 0,
        })
    }

    /// Writes one packet, of which `bytes` were copied. Returns how many bytes the file grew.
    ///
    /// # Errors
    /// The writer's.
    pub fn packet(&mut self, record: &Record, bytes: &[u8]) -> io::Result<usize> {
        self.packet.clear();
        let outer_len = match (self.outer, record.outer) {
            (true, Some(outer)) if !record.transport.is_kernels() => {
                outer_headers(record, &self.origin, outer, bytes, &mut self.packet)
            }
            _ => usize::from(record.inner_at),
        };
        self.packet.extend_from_slice(bytes);
        if let Some(inner) = self.packet.get_mut(outer_len..) {
            set_length(record, inner);
        }
        let flags = match record.direction {
            Direction::Encap => OUTBOUND,
            Direction::Decap => INBOUND,
        };
        let (interface_id, written) = self.interface(record);
        *written += 1;
        self.last_ns = record.time_ns;
        let original_len = record.len as usize + outer_len;
        let block = EnhancedPacketBlock {
            interface_id,
            timestamp: Duration::from_nanos(record.time_ns),
            original_len: u32::try_from(original_len).unwrap_or(u32::MAX),
            data: Cow::Borrowed(&self.packet),
            options: vec![
                EnhancedPacketOption::Comment(Outcome(record).to_string().into()),
                EnhancedPacketOption::Flags(flags),
            ],
        };
        self.writer.write_pcapng_block(block).map_err(io)
    }

    /// A record's interface, and how many packets it has. One of a link that the file does not know is put with the
    /// workers'.
    fn interface(&mut self, record: &Record) -> (u32, &mut u64) {
        let of_workers = workers(&self.origin);
        let pair = match record.transport.is_kernels() {
            true => of_workers + usize::from(record.worker),
            false => 0,
        };
        let id = 2 * pair + usize::from(record.direction == Direction::Decap);
        let id = if id < self.written.len() { id } else { id % 2 };
        let fits = u32::try_from(id).unwrap_or(0);
        (fits, &mut self.written[id])
    }

    /// Hands on what was written so far.
    ///
    /// # Errors
    /// The writer's.
    pub fn flush(&mut self) -> io::Result<()> {
        self.writer.get_mut().flush()
    }

    /// Writes the statistics that end a file: what it holds, and what was lost on the way to it.
    ///
    /// # Errors
    /// The writer's.
    pub fn end(mut self, lost: Lost) -> io::Result<W> {
        for (interface_id, written) in (0_u32..).zip(std::mem::take(&mut self.written)) {
            let block = InterfaceStatisticsBlock {
                interface_id,
                // High half first; the library writes one number in the file's byte order.
                timestamp: if cfg!(target_endian = "little") {
                    self.last_ns.rotate_left(32)
                } else {
                    self.last_ns
                },
                options: vec![
                    InterfaceStatisticsOption::IsbIfRecv(written + share(lost, interface_id)),
                    InterfaceStatisticsOption::IsbIfDrop(share(lost, interface_id)),
                ],
            };
            self.writer.write_pcapng_block(block).map_err(io)?;
        }
        let mut writer = self.writer.into_inner();
        writer.flush()?;
        Ok(writer)
    }
}

/// Whether there are interfaces of workers, one in each direction, in front of the links'.
const fn workers(origin: &Origin) -> usize {
    if origin.ends.is_empty() && !origin.watched.is_empty() {
        0
    } else {
        1
    }
}

/// The names of a file's interfaces, and what is seen there: encap and decap in turn.
fn interfaces(origin: &Origin) -> Vec<(String, String)> {
    let directions = [
        ("encap", "from pods to peers"),
        ("decap", "from peers to pods"),
    ];
    let mut interfaces = Vec::new();
    if workers(origin) > 0 {
        interfaces.extend(directions.map(|(name, what)| {
            let ends = origin.ends.iter();
            let ends = ends.map(|end| format!("{} {what}, tunnel at {}", end.device, end.bind));
            (name.to_owned(), ends.collect::<Vec<_>>().join("; "))
        }));
    }
    for place in &origin.watched {
        let (Place { device, kind, .. }, by) = (place, place.transport().name());
        interfaces.extend(directions.map(|(name, what)| {
            let what = match kind {
                Kind::Inner(_) => format!("packets {what} that the kernel carries by {by}"),
                Kind::Outer(_) => format!("packets {what} in those that the kernel's {by} sends"),
                Kind::Past { .. } => format!("packets {what} that the kernel routes"),
            };
            (
                format!("{name} {device}"),
                format!("packet socket on {device}: {what}"),
            )
        }));
    }
    interfaces
}

/// Losses are counted for both directions together; they are told once, with the first.
const fn share(lost: Lost, interface_id: u32) -> u64 {
    if interface_id == 0 { lost.records } else { 0 }
}

fn io(error: PcapError) -> io::Error {
    if let PcapError::IoError(error) = error {
        return error;
    }
    io::Error::other(error)
}

/// Writes the length of a superpacket that was put together from segments into its headers, as a NIC's
/// merging does. Its transport checksum is not that of the whole.
fn set_length(record: &Record, packet: &mut [u8]) {
    if record.packets < 2 {
        return;
    }
    let total = u16::try_from(record.len).unwrap_or(u16::MAX);
    let Some(&first) = packet.first() else { return };
    let (transport_at, protocol) = if first >> 4 == 4 && packet.len() >= 20 {
        let mut ip = Ipv4::new_unchecked(&mut *packet);
        ip.set_total_len(total);
        ip.fill_checksum();
        (ip.header_len(), ip.protocol())
    } else if first >> 4 == 6 && packet.len() >= ipv6::HEADER_LEN {
        let mut ip = Ipv6::new_unchecked(&mut *packet);
        ip.set_payload_len(total.saturating_sub(40));
        (ipv6::HEADER_LEN, ip.next_header())
    } else {
        return;
    };
    if protocol == IpNumber::UDP.0
        && let Some(udp) = packet.get_mut(transport_at..transport_at + 8)
    {
        let len = total.saturating_sub(u16::try_from(transport_at).unwrap_or(0));
        udp[4..6].copy_from_slice(&len.to_be_bytes());
    }
}

/// What became of a packet, in words.
#[derive(Clone, Copy, Debug)]
pub struct Outcome<'a>(pub &'a Record);

impl fmt::Display for Outcome<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Record {
            outer,
            packets,
            verdict,
            ..
        } = *self.0;
        match verdict {
            Verdict::Sent => f.write_str("sent")?,
            Verdict::Fragmented => f.write_str("sent in fragments")?,
            Verdict::Delivered => f.write_str("delivered")?,
            Verdict::Answered(reason) => write!(f, "answered: {}", reason.name())?,
            Verdict::Dropped(reason) => write!(f, "dropped: {}", reason.name())?,
            Verdict::Handed => f.write_str("handed to the kernel")?,
            Verdict::Arrived => f.write_str("arrived by the kernel")?,
        }
        let transport = self.0.transport.name();
        if let Some(outer) = outer {
            f.write_str(match self.0.direction {
                Direction::Encap => ", to ",
                Direction::Decap => ", from ",
            })?;
            match outer.port() {
                // Without a tunnel there are no ports.
                0 => write!(f, "{} over {transport}", outer.ip())?,
                _ => write!(f, "{outer} over {transport}")?,
            }
        }
        if packets > 1 {
            write!(f, ", {packets} packets")?;
        }
        if !self.0.transport.is_kernels() {
            write!(f, ", worker {}", self.0.worker)?;
        }
        if let Verdict::Answered(reason) | Verdict::Dropped(reason) = verdict {
            write!(f, "; {}", reason.remedy())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
