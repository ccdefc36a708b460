use super::*;
use crate::datapath::DropReason;

fn wanted(filter: &str) -> Wanted {
    Wanted {
        filter: filter.parse().unwrap(),
        snap_len: MAX_SNAP_LEN,
        segments: false,
    }
}

fn note(tap: &Tap, form: Form, bytes: &[u8], packets: u64) {
    tap.note(form, || {
        let seen = Seen::dropped(Direction::Encap, DropReason::NoRoute, packets);
        let (front, back) = bytes.split_at(bytes.len() / 2);
        (seen, [front, back])
    });
}

/// Everything a capture holds.
fn drain(capture: &mut Capture) -> Vec<(Record, Vec<u8>)> {
    let mut bytes = Vec::new();
    loop {
        let before = bytes.len();
        capture.take(&mut bytes, 1 << 16);
        if bytes.len() == before {
            break;
        }
    }
    let (mut records, mut rest) = (Vec::new(), &bytes[..]);
    while !rest.is_empty() {
        let (record, copied, after) = Record::decode(rest).unwrap();
        records.push((record, copied.to_vec()));
        rest = after;
    }
    records
}

#[test]
fn capture_begins_and_ends_at_a_burst_and_sees_every_byte_between() {
    let taps = Arc::new(Taps::new(1, Transport::Udp));
    let tap = Tap::new(&taps, 0);
    tap.begin();
    assert!(!tap.is_on());
    let mut capture = taps.capture(wanted("")).unwrap();
    note(&tap, Form::Any, b"before the burst", 1);
    tap.begin();
    note(&tap, Form::Any, b"seen", 7);
    let records = drain(&mut capture);
    assert_eq!(records.len(), 1);
    let (record, bytes) = &records[0];
    assert_eq!((record.packets, record.len), (7, 4));
    assert_eq!(record.verdict, Verdict::Dropped(DropReason::NoRoute));
    assert_eq!(bytes, b"seen");
    drop(capture);
    tap.begin();
    assert!(!tap.is_on());
}

#[test]
fn every_capture_has_its_own_filter_form_and_snap_length() {
    let taps = Arc::new(Taps::new(1, Transport::Udp));
    let tap = Tap::new(&taps, 0);
    let mut whole = taps.capture(wanted("encap")).unwrap();
    let mut none = taps.capture(wanted("decap")).unwrap();
    let mut segments = taps
        .capture(Wanted {
            snap_len: 3,
            segments: true,
            ..wanted("dropped")
        })
        .unwrap();
    tap.begin();
    note(&tap, Form::Whole, b"superpacket", 2);
    note(&tap, Form::Segment, b"super", 1);
    note(&tap, Form::Segment, b"packet", 1);
    note(&tap, Form::Any, b"small", 1);
    let of = |capture: &mut Capture| -> Vec<(Vec<u8>, u32)> {
        let records = drain(capture).into_iter();
        records.map(|(record, bytes)| (bytes, record.len)).collect()
    };
    let expect = |list: &[(&str, u32)]| -> Vec<(Vec<u8>, u32)> {
        let bytes = |&(text, len): &(&str, u32)| (text.as_bytes().to_vec(), len);
        list.iter().map(bytes).collect()
    };
    assert_eq!(of(&mut whole), expect(&[("superpacket", 11), ("small", 5)]));
    assert_eq!(of(&mut none), vec![]);
    assert_eq!(
        of(&mut segments),
        expect(&[("sup", 5), ("pac", 6), ("sma", 5)])
    );
}

#[test]
fn what_does_not_fit_is_counted_and_nothing_is_torn() {
    let taps = Arc::new(Taps::new(1, Transport::Udp));
    let tap = Tap::new(&taps, 0);
    let mut capture = taps.capture(wanted("")).unwrap();
    tap.begin();
    let packet = vec![7; 60_000];
    let noted = 2 * RING_LEN / packet.len();
    for _ in 0..noted {
        note(&tap, Form::Any, &packet, 40);
    }
    let records = drain(&mut capture);
    assert!(records.iter().all(|(_, bytes)| *bytes == packet));
    let lost = capture.lost();
    assert!(lost.records > 0);
    assert_eq!(records.len() as u64 + lost.records, noted as u64);
    assert_eq!(lost.packets, 40 * lost.records);
    note(&tap, Form::Any, b"there is room again", 1);
    assert_eq!(drain(&mut capture).len(), 1);
}

#[test]
fn captures_are_limited_and_idle_workers_do_not_hoard_ended_ones() {
    let taps = Arc::new(Taps::new(2, Transport::Udp));
    let all: Vec<_> = (0..MAX_CAPTURES)
        .map(|_| taps.capture(wanted("")).unwrap())
        .collect();
    assert_eq!(taps.capture(wanted("")).unwrap_err(), TooMany);
    drop(all);
    for _ in 0..100 {
        drop(taps.capture(wanted("")).unwrap());
    }
    let waiting = taps.boxes[0].lock().unwrap().len();
    assert!(waiting <= MAX_CAPTURES, "{waiting}");
}

#[test]
fn capture_is_over_when_every_worker_is_gone() {
    let taps = Arc::new(Taps::new(2, Transport::Udp));
    let (first, second) = (Tap::new(&taps, 0), Tap::new(&taps, 1));
    let mut capture = taps.capture(wanted("")).unwrap();
    first.begin();
    note(&first, Form::Any, b"last words", 1);
    drop(first);
    assert!(!capture.is_over());
    drop(second);
    drop(taps);
    assert!(capture.is_over());
    assert_eq!(drain(&mut capture).len(), 1);
}

#[test]
fn another_thread_reads_while_the_worker_writes() {
    let taps = Arc::new(Taps::new(1, Transport::Udp));
    let tap = Tap::new(&taps, 0);
    let mut capture = taps.capture(wanted("")).unwrap();
    let count = 20_000_u64;
    let reader = std::thread::spawn(move || {
        let (mut next, mut lost) = (0, 0);
        while next + lost < count || !capture.is_over() {
            for (_, bytes) in drain(&mut capture) {
                let number = u64::from_le_bytes(bytes[..8].try_into().unwrap());
                assert!(number >= next, "records keep their order");
                assert!(bytes.iter().skip(8).all(|&b| b == bytes[0]));
                next += 1;
            }
            lost = capture.lost().records;
        }
        assert_eq!(next + lost, count);
    });
    tap.begin();
    for number in 0..count {
        let mut bytes = number.to_le_bytes().to_vec();
        bytes.resize(8 + usize::try_from(number % 1400).unwrap(), bytes[0]);
        note(&tap, Form::Any, &bytes, 1);
    }
    drop(tap);
    drop(taps);
    reader.join().unwrap();
}

#[test]
fn nothing_that_comes_after_is_older_than_what_was_said_to_be_settled() {
    const EACH: u64 = 20_000;
    let taps = Arc::new(Taps::new(2, Transport::Udp));
    let mut capture = taps.capture(wanted("")).unwrap();
    let workers: Vec<_> = (0..2)
        .map(|worker| {
            let taps = Arc::clone(&taps);
            std::thread::spawn(move || {
                let tap = Tap::new(&taps, worker);
                drop(taps);
                for _ in 0..EACH {
                    tap.begin();
                    tap.stamp();
                    // As a worker that the scheduler takes away between reading and telling.
                    std::thread::yield_now();
                    note(&tap, Form::Any, b"packet", 1);
                    tap.end();
                }
            })
        })
        .collect();
    drop(taps);
    let (mut settled, mut seen, mut over) = (0, 0, false);
    while !over {
        over = capture.is_over();
        let until = capture.settled();
        let mut bytes = Vec::new();
        let emptied = capture.take(&mut bytes, 1 << 24);
        assert!(emptied);
        let mut rest = bytes.as_slice();
        while let Ok((record, _, after)) = Record::decode(rest) {
            assert!(record.time_ns >= settled, "{} {settled}", record.time_ns);
            (rest, seen) = (after, seen + 1);
        }
        settled = until;
    }
    for worker in workers {
        worker.join().unwrap();
    }
    assert_eq!(seen + capture.lost().records, 2 * EACH);
}

#[test]
fn worker_in_a_burst_keeps_its_time_from_being_settled_and_one_at_rest_does_not() {
    let taps = Arc::new(Taps::new(2, Transport::Udp));
    let (busy, idle) = (Tap::new(&taps, 0), Tap::new(&taps, 1));
    let capture = taps.capture(wanted("")).unwrap();
    for tap in [&busy, &idle] {
        tap.begin();
    }
    idle.end();
    let begun = capture.settled();
    assert_eq!(capture.settled(), begun, "a burst is under way");
    busy.end();
    assert!(capture.settled() >= begun);
    let before = capture.settled();
    busy.begin();
    assert!(capture.settled() >= before);
    drop(busy);
    let floors = capture.floors.iter().flat_map(|floors| floors.iter());
    assert!(
        floors
            .map(|floor| floor.load(Ordering::SeqCst))
            .all(|floor| floor == AT_REST)
    );
}
