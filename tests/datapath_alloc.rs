//! The packet path allocates nothing once it is warm: an allocator that counts what workers ask for. A test binary of
//! its own, because the allocator is the process's.

#![expect(
    unsafe_code,
    reason = "an allocator is unsafe by its trait; this one asks for the thread's name, counts and hands on"
)]

mod memory;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use memory::{Node, TCP_PAYLOAD, UDP_PAYLOAD, VNET, pair, pod, read, write};

static COUNTING: AtomicBool = AtomicBool::new(false);
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

struct Counting;

/// Whether the calling thread is a worker, by its name. The others are the test's own and the harness's, which says
/// so when a test takes long.
fn is_worker() -> bool {
    // Of 15 bytes and a zero (prctl(2)).
    let mut name = [0_u8; 16];
    // SAFETY: PR_GET_NAME writes at most 16 bytes to where its argument points, which `name` has.
    let result = unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    result == 0 && name.starts_with(b"loden-")
}

fn count() {
    if COUNTING.load(Ordering::Relaxed) && is_worker() {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: every method hands its arguments to `System` unchanged and returns what that returned; `count` neither
// allocates nor unwinds.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise about `layout` is handed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller got `ptr` from `alloc` or `realloc` above, which got it from `System`.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count();
        // SAFETY: as for `dealloc`, and the caller's promise about `new_size` is handed on.
        unsafe { System.realloc(ptr, layout, new_size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A framed packet and how many payload bytes it carries, whose headers take `header_len` bytes per write.
struct Load {
    framed: Vec<u8>,
    payload_len: usize,
    header_len: usize,
}

/// Every kind of packet that takes the fast path, from node `from` to node `to`.
fn loads(from: u8, to: u8) -> Vec<Load> {
    let (src, dst) = (pod(from), pod(to));
    let payload: Vec<u8> = (0..60_000_u32).map(|i| i.to_le_bytes()[1]).collect();
    let load = |framed, payload_len, header_len| Load {
        framed,
        payload_len,
        header_len,
    };
    let tcp = |len: usize| memory::tcp_superpacket(src, dst, 1, 1400, &payload[..len]);
    let uso = |len: usize| memory::udp_superpacket(src, dst, (7, 9), 1200, &payload[..len]);
    let small = |len: usize| memory::udp(src, dst, (8, 9), &payload[..len]);
    vec![
        load(tcp(60_000), 60_000, TCP_PAYLOAD),
        load(tcp(9000), 9000, TCP_PAYLOAD),
        load(uso(30_000), 30_000, UDP_PAYLOAD),
        load(small(64), 64, UDP_PAYLOAD),
        load(small(1400), 1400, UDP_PAYLOAD),
    ]
}

/// Writes, as soon as the device has room.
fn put(node: &Node, framed: &[u8], limit: Instant) {
    while !write(&node.tun[0], framed) {
        assert!(Instant::now() < limit, "the device stays full");
        std::thread::yield_now();
    }
}

/// Sends each load in bursts of `burst` and waits until all of its payload is on the other side.
fn push(from: &Node, to: &Node, loads: &[Load], burst: usize, buf: &mut [u8]) {
    let limit = Instant::now() + Duration::from_secs(20);
    for load in loads {
        for _ in 0..burst {
            put(from, &load.framed, limit);
        }
        let mut left = load.payload_len * burst;
        while left > 0 {
            if let Some(framed) = read(&to.tun[0], buf) {
                left -= framed.len() - VNET - load.header_len;
            } else {
                assert!(Instant::now() < limit, "{left} bytes did not arrive");
                std::thread::yield_now();
            }
        }
    }
}

/// Packets for which there is no route: each is answered or dropped.
fn push_nowhere(node: &Node, framed: &[u8], count: u64) {
    let limit = Instant::now() + Duration::from_secs(20);
    let done = |node: &Node| node.datapath.status().total.encap.read;
    let before = done(node);
    let mut buf = [0; 2048];
    for _ in 0..count {
        put(node, framed, limit);
    }
    while done(node) < before + count {
        assert!(Instant::now() < limit);
        std::thread::yield_now();
    }
    while read(&node.tun[0], &mut buf).is_some() {}
}

fn allocates_nothing(vxlan: bool) {
    let (a, b) = pair(1, vxlan);
    let (there, back) = (loads(1, 2), loads(2, 1));
    let nowhere = memory::udp(pod(1), pod(9), (1, 2), b"nowhere");
    let mut buf = vec![0; 70_000];
    let mut round = || {
        for burst in [1, 2, 8] {
            push(&a, &b, &there, burst, &mut buf);
            push(&b, &a, &back, burst, &mut buf);
        }
        push_nowhere(&a, &nowhere, 20);
    };
    round();
    COUNTING.store(true, Ordering::Relaxed);
    for _ in 0..100 {
        round();
    }
    COUNTING.store(false, Ordering::Relaxed);
    let status = a.datapath.status().total;
    assert!(status.encap.read_superpackets > 0 && status.decap.sent_superpackets > 0);
    assert_eq!(
        ALLOCATIONS.load(Ordering::Relaxed),
        0,
        "in {} packets there and {} back",
        status.encap.read,
        status.decap.read
    );
}

// One test: the allocations counted are those of all workers of the process.
#[test]
fn warm_workers_allocate_nothing() {
    COUNTING.store(true, Ordering::Relaxed);
    // The allocator works, and tells threads apart.
    drop(std::hint::black_box(vec![0_u8; 100]));
    assert_eq!(ALLOCATIONS.load(Ordering::Relaxed), 0);
    let witness = || drop(std::hint::black_box(vec![0_u8; 100]));
    let worker = std::thread::Builder::new().name("loden-witness".to_owned());
    worker.spawn(witness).unwrap().join().unwrap();
    let witnessed = ALLOCATIONS.swap(0, Ordering::Relaxed);
    assert!(witnessed > 0, "an allocation of a worker is counted");
    COUNTING.store(false, Ordering::Relaxed);

    for vxlan in [false, true] {
        allocates_nothing(vxlan);
    }
}
