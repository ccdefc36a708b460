use super::*;

fn probe() -> Probe {
    Probe {
        kind: Kind::Answer,
        flags: Flags::FULL.with(Flags::TRACE),
        sequence: 0x0102_0304,
        nonce: 0x1112_1314_1516_1718,
        heard: Some(Heard {
            sequence: 0x0506_0708,
            age: Duration::from_millis(0x1234),
        }),
        seen_len: 1472,
        seen_ttl: 62,
        seen_tos: 0xb9,
        via: Via::Tunnel,
        left: 0x2122_2324_2526_2728,
        arrived: 0x3132_3334_3536_3738,
        answered: 0x4142_4344_4546_4748,
        sender: Identity {
            node: 0x5152_5354_5556_5758,
            v4: Some("198.18.7.0/24".parse().unwrap()),
            v6: Some("fd00:1:0:7::/64".parse().unwrap()),
        },
    }
}

#[test]
fn a_probe_stands_on_the_wire_as_the_table_says() {
    let mut bytes = [0xa5; HEADER_LEN + 2];
    probe().write(&mut bytes);
    let mut expected = b"loPr\x01\x02\x00\x05".to_vec();
    expected.extend([1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0x12, 0x34, 5, 0xc0, 62, 0xb9]);
    expected.extend(0x11..=0x18);
    for first in [0x21, 0x31, 0x41, 0x51] {
        expected.extend(first..first + 8);
    }
    expected.extend([1, 24, 64, 0, 198, 18, 7, 0]);
    expected.extend([0xfd, 0, 0, 1, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0]);
    expected.extend([0xa5, 0xa5]);
    assert_eq!(bytes.as_slice(), expected);
    assert_eq!(Probe::parse(&bytes), Ok(probe()));
}

#[test]
fn a_request_says_nothing_that_only_an_answer_knows() {
    let request = Probe::request(Kind::Request, 7, 9, Identity::default());
    let mut bytes = [0; HEADER_LEN];
    request.write(&mut bytes);
    let read = Probe::parse(&bytes).unwrap();
    assert_eq!(read, request);
    assert_eq!(
        (read.heard, read.sender.v4, read.via),
        (None, None, Via::Unknown)
    );
    assert_eq!(bytes[16..20], [0xff; 4], "never");
}

#[test]
fn what_is_no_probe_is_told_by_its_first_fault() {
    let mut bytes = [0; HEADER_LEN];
    probe().write(&mut bytes);
    let broken = |off: usize, value: u8| {
        let mut bytes = bytes;
        bytes[off] = value;
        Probe::parse(&bytes).unwrap_err()
    };
    assert_eq!(
        Probe::parse(&bytes[..HEADER_LEN - 1]),
        Err(ProbeError::TooShort(HEADER_LEN - 1))
    );
    assert_eq!(broken(0, b'L'), ProbeError::NotAProbe);
    assert_eq!(broken(4, 2), ProbeError::Version(2));
    assert_eq!(broken(5, 0), ProbeError::Kind(0));
    assert_eq!(broken(5, 7), ProbeError::Kind(7));
    assert_eq!(broken(65, 33), ProbeError::PrefixLen(33));
    assert_eq!(broken(66, 129), ProbeError::PrefixLen(129));
}

#[test]
fn a_newer_programs_flags_and_ways_do_not_matter() {
    let mut bytes = [0; HEADER_LEN];
    probe().write(&mut bytes);
    bytes[6] = 0x80;
    bytes[64] = 200;
    bytes[67] = 1;
    let read = Probe::parse(&bytes).unwrap();
    assert!(read.flags.has(Flags::FULL) && !read.flags.has(Flags::CUT));
    assert_eq!(read.via, Via::Other);
}

fn entry(nth: u8) -> Entry {
    Entry {
        subnet: IpNet::new([198, 18, nth, 0].into(), 24).unwrap(),
        reach: Reach::Loses,
        loss: nth,
        rtt: (nth > 0).then(|| Duration::from_micros(u64::from(nth) * 1000)),
    }
}

fn report(entries: u8) -> Report {
    Report {
        facts: Facts {
            health: Health::NOT_FORWARDING.with(Health::FIREWALL_CLOSED),
            public: Some([192, 0, 2, 9].into()),
            received: Some(5),
            sent: None,
            bad_checksums: 3,
            peers: 400,
            sends_by: Via::Underlay,
        },
        first: 11,
        entries: (0..entries).map(entry).collect(),
    }
}

#[test]
fn a_report_is_read_as_it_was_written_and_no_longer_than_there_is_room() {
    for (len, entries) in [(144, 0), (167, 0), (168, 1), (144 + 72, 3), (1400, 5)] {
        let mut bytes = vec![0xa5; len];
        probe().write(&mut bytes);
        let written = report(5).write(&mut bytes);
        assert_eq!(written, 144 + entries * 24);
        let read = Report::parse(&bytes[..written]).unwrap();
        assert_eq!(read, report(u8::try_from(entries).unwrap()));
        assert_eq!(read.entries.len(), Report::room(len).min(5));
    }
    let v6 = Report {
        entries: vec![Entry {
            subnet: "fd00:1:0:7::/64".parse().unwrap(),
            ..entry(0)
        }],
        ..report(0)
    };
    let mut bytes = [0; 200];
    let written = v6.write(&mut bytes);
    assert_eq!(Report::parse(&bytes[..written]), Ok(v6));
}

#[test]
fn a_report_that_claims_more_than_it_has_is_refused() {
    let mut bytes = [0; 168];
    let written = report(1).write(&mut bytes);
    assert_eq!(
        Report::parse(&bytes[..written - 1]),
        Err(ProbeError::Entries {
            entries: 1,
            len: 167
        })
    );
    assert_eq!(Report::parse(&bytes[..143]), Err(ProbeError::TooShort(143)));
    bytes[144 + 16] = 99;
    assert_eq!(Report::parse(&bytes), Err(ProbeError::PrefixLen(99)));
}

#[test]
fn an_ask_names_the_first_peer_or_all() {
    let mut bytes = [0; HEADER_LEN + 4];
    write_asked_from(&mut bytes, 77);
    assert_eq!(asked_from(&bytes), 77);
    assert_eq!(asked_from(&bytes[..HEADER_LEN]), 0);
}

fn sights() -> Sights {
    Sights {
        standing: Standing::Told,
        whole: true,
        more: false,
        came: 3,
        taken: 0x0102,
        left: 1,
        lines: vec![
            (About::Probes, "3 on eth0".to_owned()),
            (About::Answers, "none".to_owned()),
        ],
    }
}

#[test]
fn what_is_told_of_a_trace_stands_on_the_wire_as_the_table_says() {
    let mut bytes = [0xa5; 200];
    let written = sights().write(&mut bytes);
    let mut expected = vec![2, 1, 0, 2, 0, 3, 1, 2, 0, 1, 0, 0];
    expected.extend(b"\x00\x093 on eth0\x01\x04none");
    assert_eq!(bytes[HEADER_LEN..written], expected);
    assert_eq!(Sights::parse(&bytes[..written]), Ok(sights()));
    for order in [Order::Begin, Order::Tell] {
        order.write(&mut bytes);
        assert_eq!((bytes[88], Order::of(&bytes)), (order as u8, Some(order)));
    }
    bytes[88] = 7;
    assert_eq!(Order::of(&bytes), None);
    let read = Sights::parse(&bytes[..written]).unwrap();
    assert_eq!(read.standing, Standing::Unwatched);
}

#[test]
fn lines_that_do_not_fit_are_left_out_and_that_is_said() {
    for (len, lines) in [(100, 0), (110, 0), (111, 1), (116, 1), (117, 2)] {
        let mut bytes = vec![0; len];
        let written = sights().write(&mut bytes);
        let read = Sights::parse(&bytes[..written]).unwrap();
        assert_eq!((read.lines.len(), read.more), (lines, lines < 2), "{len}");
        assert_eq!(read.came, 3);
    }
    let long = Sights {
        lines: vec![(About::Probes, "x".repeat(300))],
        ..sights()
    };
    let mut bytes = [0; 1000];
    let written = long.write(&mut bytes);
    let read = Sights::parse(&bytes[..written]).unwrap();
    assert_eq!(read.lines[0].1, "x".repeat(255));
}

#[test]
fn lines_that_are_not_there_are_refused_and_no_terminal_obeys_one() {
    let mut bytes = [0; 200];
    let written = sights().write(&mut bytes);
    for len in [0, 99, 101, 105, written - 1] {
        let short = Sights::parse(&bytes[..len]);
        assert_eq!(short, Err(ProbeError::TooShort(len)));
    }
    let hostile = Sights {
        lines: vec![(About::Probes, "\u{1b}[2Jok\n\u{202e}".to_owned())],
        ..sights()
    };
    let written = hostile.write(&mut bytes);
    let read = Sights::parse(&bytes[..written]).unwrap();
    assert_eq!(read.lines[0].1, "?[2Jok????");
}
