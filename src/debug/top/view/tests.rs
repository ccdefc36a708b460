use ratatui::Terminal;
use ratatui::backend::TestBackend;

use super::super::rates::{Capability, Drop, Worker};
use super::*;

fn rates(peers: usize) -> Rates {
    let direction = |packets: f64| Direction {
        packets_per_second: packets,
        bits_per_second: 8000.0 * packets,
        packets_per_read: 12.0,
        packets_per_send: 31.25,
        ..Direction::default()
    };
    let capability = |name: &str, used| Capability {
        name: name.to_owned(),
        used,
        reason: (!used).then(|| "the kernel does not offer it".to_owned()),
    };
    Rates {
        version: "9.9.9".to_owned(),
        pid: 42,
        engine: "mmsg".to_owned(),
        device: "flannel0".to_owned(),
        encap: direction(123_456.0),
        decap: direction(9.5),
        workers: vec![Worker::default(); 2],
        peers: (0..peers)
            .map(|n| Peer {
                subnets: format!("198.18.{n}.0/24"),
                endpoint: Some(format!("192.0.2.{n}:8285")),
                #[expect(clippy::cast_precision_loss, reason = "a few")]
                sent_per_second: n as f64,
                received_per_second: 0.0,
                #[expect(clippy::cast_precision_loss, reason = "a few")]
                dropped_per_second: (peers - n) as f64,
                path_mtu: (n == 3).then_some(1400),
            })
            .collect(),
        drops: vec![Drop {
            reason: "no_route".to_owned(),
            direction: "encap",
            per_second: 3.0,
            total: 18_446_744_073,
        }],
        capabilities: vec![
            capability("tun-vnet-hdr", true),
            capability("udp-gso", true),
            capability("tun-uso", false),
        ],
        ..Rates::default()
    }
}

fn screen(view: &View, width: u16, height: u16) -> String {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| view.draw(frame)).unwrap();
    let buffer = terminal.backend().buffer();
    let rows = buffer.content().chunks(usize::from(width));
    let row = |row: &[ratatui::buffer::Cell]| row.iter().map(|cell| cell.symbol()).collect();
    let rows: Vec<String> = rows.map(row).collect();
    rows.join("\n")
}

fn press(view: &mut View, keys: &str) -> Asked {
    let mut asked = Asked::Draw;
    for c in keys.chars() {
        let code = match c {
            '\n' => KeyCode::Enter,
            '\u{1b}' => KeyCode::Esc,
            c => KeyCode::Char(c),
        };
        asked = view.key(KeyEvent::new(code, KeyModifiers::NONE));
    }
    asked
}

/// The peers' subnets from top to bottom.
fn order(view: &View) -> Vec<String> {
    screen(view, 80, 24)
        .lines()
        .filter_map(|line| line.split(".0/24").next()?.strip_prefix("198.18."))
        .map(str::to_owned)
        .filter(|n| n.len() < 4)
        .collect()
}

#[test]
fn everything_is_readable_at_80_by_24() {
    let mut view = View::default();
    view.update(rates(30));
    let screen = screen(&view, 80, 24);
    for fact in [
        "loden 9.9.9  pid 42  flannel0  mmsg  2 workers",
        "packets/s",
        "123k",
        "988M",
        "9.50",
        "31.2",
        "worker 1 decap",
        "198.18.29.0/24",
        "192.0.2.29:8285",
        "peers by traffic +",
        "no_route",
        "18446744073",
        "uses tun-vnet-hdr udp-gso",
        "not tun-uso: the kernel does not offer it",
        "q quit",
    ] {
        assert!(screen.contains(fact), "{fact:?} is missing in:\n{screen}");
    }
}

#[test]
fn peers_are_sorted_by_what_the_key_chose_and_filtered_by_what_was_typed() {
    let mut view = View::default();
    view.update(rates(4));
    assert_eq!(order(&view), ["3", "2", "1", "0"]);
    press(&mut view, "sss");
    assert!(screen(&view, 80, 24).contains("peers by dropped"));
    assert_eq!(order(&view), ["0", "1", "2", "3"]);
    press(&mut view, "/192.0.2.2:\n");
    assert_eq!(order(&view), ["2"]);
    // While a filter is typed, keys are letters.
    assert_eq!(press(&mut view, "/q"), Asked::Draw);
    press(&mut view, "\u{1b}");
    assert_eq!(order(&view).len(), 4);
}

#[test]
fn frozen_view_stays_and_shows_the_latest_when_it_goes_on() {
    let mut view = View::default();
    view.update(rates(1));
    press(&mut view, " ");
    let mut later = rates(1);
    later.pid = 43;
    view.update(later);
    let frozen = screen(&view, 80, 24);
    assert!(
        frozen.contains("pid 42") && frozen.contains("frozen"),
        "{frozen}"
    );
    press(&mut view, " ");
    assert!(screen(&view, 80, 24).contains("pid 43"));
    assert_eq!(press(&mut view, "q"), Asked::Quit);
}

#[test]
fn trouble_is_shown_and_no_size_is_too_small() {
    let mut view = View::default();
    let mut down = rates(3);
    down.down = Some("device flannel0 was \u{1b}[31m removed".to_owned());
    view.update(down);
    let text = screen(&view, 80, 24);
    assert!(text.contains("DOWN: device flannel0 was"), "{text}");
    assert!(!text.contains('\u{1b}'));
    view.fail("no daemon answers".to_owned());
    assert!(screen(&view, 80, 24).contains("no daemon answers"));
    for (width, height) in [(1, 1), (20, 5), (80, 10), (300, 100)] {
        screen(&view, width, height);
    }
}

#[test]
fn numbers_are_short_at_every_size() {
    for (value, text) in [
        (0.0, "0"),
        (0.5, "0.50"),
        (9.996, "10.0"),
        (99.96, "100"),
        (999.0, "999"),
        (999.6, "1.00k"),
        (12_345.0, "12.3k"),
        (4.2e9, "4.20G"),
        (5e15, "5000T"),
    ] {
        assert_eq!(short(value), text);
    }
}
