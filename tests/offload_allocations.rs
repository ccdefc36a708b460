//! Once constructed, the offloads never allocate: not for a burst, not for a full one, not for a clear.

#![expect(unsafe_code, reason = "counting allocations takes a global allocator")]

#[expect(dead_code, reason = "only its packet builder is needed here")]
#[path = "offload_support/packet.rs"]
mod packet;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use loden::offload::coalesce::{Coalescer, HEAD_LEN, Limits, PacketRef, Write};
use loden::offload::gso::{Planner, RunKey, RunLimits};
use loden::offload::split::{MAX_HEADER_LEN, Split};
use loden::offload::vnet_hdr::VnetHdr;
use packet::{Fields, naive_sum};

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: every call is passed on unchanged to the system allocator; counting touches only a thread-local
// cell without a destructor, which cannot allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller keeps `alloc`'s contract, which is the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: `ptr` came from `System.alloc` with this layout, since `alloc` passes everything on.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// How many allocations `work` makes.
fn allocations(work: impl FnOnce()) -> usize {
    let before = ALLOCATIONS.get();
    work();
    ALLOCATIONS.get() - before
}

#[test]
fn the_counter_counts() {
    assert_eq!(allocations(|| drop(std::hint::black_box(vec![1_u8]))), 1);
}

#[test]
fn full_bursts_of_lone_and_merging_packets_are_coalesced_and_split_without_allocating() {
    let packets: Vec<Vec<u8>> = (0..64_u16)
        .map(|i| {
            let (flow, round) = (i % 5, u32::from(i / 5));
            let seq = 1000 + round * 100;
            let frag = if i == 40 { 0x2000 } else { 0 };
            let (src_port, id, v6) = (flow, i / 5, flow == 4);
            Fields {
                v6,
                src_port,
                seq,
                id,
                frag,
                ..Fields::default()
            }
            .build()
        })
        .collect();
    let bytes_of = |at: PacketRef| {
        let start = at.off as usize;
        &packets[usize::from(at.buf)][start..start + at.len as usize]
    };
    let mut coalescer = Coalescer::new(Limits::default(), 64, naive_sum);
    let mut assembled = vec![0; 65536];
    let (mut writes, mut segments) = (0, 0);
    let count = allocations(|| {
        for _ in 0..3 {
            coalescer.clear();
            for buf in 0..65_u16 {
                let len = packets.get(usize::from(buf)).map_or(0, Vec::len);
                let packet = PacketRef {
                    buf,
                    off: 0,
                    len: u32::try_from(len).unwrap(),
                };
                assert_eq!(coalescer.push(packet, bytes_of).is_err(), buf == 64);
            }
            for write in coalescer.writes() {
                writes += 1;
                let Write::Superpacket(superpacket) = write else {
                    continue;
                };
                let mut head = [0; HEAD_LEN];
                let first = bytes_of(superpacket.packets().next().unwrap());
                let mut len = superpacket.write_head(first, &mut head);
                assembled[..len].copy_from_slice(&head[..len]);
                for payload in superpacket.payloads().map(bytes_of) {
                    assembled[len..len + payload.len()].copy_from_slice(payload);
                    len += payload.len();
                }
                let vnet = VnetHdr::parse(&assembled).unwrap();
                let packet = &assembled[loden::offload::vnet_hdr::VNET_HDR_LEN..len];
                let split = Split::new(&vnet, packet).unwrap();
                for i in 0..split.count() {
                    let mut header = [0; MAX_HEADER_LEN];
                    segments += split.write_header(packet, i, naive_sum, &mut header).min(1);
                }
            }
        }
    });
    assert_eq!(count, 0);
    assert!(
        writes > 3 && segments > 3 * 50,
        "the burst merges: {writes} writes, {segments} segments"
    );
}

#[test]
fn full_bursts_are_planned_without_allocating() {
    let limits = RunLimits {
        gso: true,
        max_segments: 64,
        max_bytes: RunLimits::MAX_BYTES_V4,
    };
    let mut planner = Planner::new(256, 4);
    let mut seen = 0;
    let count = allocations(|| {
        for _ in 0..3 {
            planner.clear();
            for i in 0..257_u16 {
                let key = RunKey {
                    source: i % 4,
                    next_hop: u32::from(i % 12),
                    tos: 0,
                };
                let len = 1400 - u32::from(i / 100);
                assert_eq!(planner.push(key, len, &limits).is_err(), i == 256);
            }
            for source in planner.sources() {
                seen += planner
                    .runs_of(source)
                    .flat_map(|run| planner.segments(run))
                    .count();
            }
        }
    });
    assert_eq!((count, seen), (0, 3 * 256));
}
