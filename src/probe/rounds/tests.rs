use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::probe::proof::GIVEN_UP_WITHIN;

const LEN: u16 = 1450;

/// What is promised, whatever the number of peers.
const IN_TIME: Duration = Duration::from_secs(3);

fn target(n: u32) -> Target {
    let base = std::net::Ipv4Addr::from(0xc612_0000 + n * 4);
    Target {
        net: IpNet::new(base.into(), 30).unwrap(),
        port: 18285,
        public: std::net::Ipv4Addr::from(0xc000_0200 + n).into(),
        link: 2,
    }
}

/// A network in memory, in which an answer comes back a tick after its probe.
struct World {
    rounds: Rounds,
    begun: Instant,
    now: Instant,
    sequence: u32,
    answers: Vec<Answer>,
    /// Probes and long ones in each second.
    sent: Vec<(usize, usize)>,
}

impl World {
    fn new(count: u32) -> Self {
        let now = Instant::now();
        let targets: Vec<Target> = (0..count).map(target).collect();
        let mut rounds = Rounds::default();
        rounds.take(&targets, LEN, true, false, now);
        Self {
            rounds,
            begun: now,
            now,
            sequence: 0,
            answers: Vec::new(),
            sent: Vec::new(),
        }
    }

    fn tick(&mut self, arrives: &impl Fn(&Due) -> bool) {
        self.now += TICK;
        for answer in std::mem::take(&mut self.answers) {
            self.rounds.answered(&answer, self.now);
        }
        let second = usize::try_from((self.now - self.begun).as_secs()).unwrap();
        self.sent.resize(second + 1, (0, 0));
        for due in self.rounds.due(self.now) {
            self.sequence += 1;
            self.rounds.sent(&due, self.sequence);
            let seen_len = u16::try_from(due.payload + 28).unwrap();
            self.sent[second].0 += 1;
            self.sent[second].1 += usize::from(seen_len == LEN);
            if arrives(&due) {
                self.answers.push(Answer {
                    sequence: self.sequence,
                    from: due.target.net.network(),
                    via: Via::Underlay,
                    seen_len,
                    past: false,
                });
            }
        }
    }

    fn run(&mut self, time: Duration, arrives: impl Fn(&Due) -> bool) {
        let end = self.now + time;
        while self.now < end {
            self.tick(&arrives);
        }
    }

    /// Until all are proven.
    fn prove_all(&mut self, count: u32) {
        while self.rounds.used.len() < usize::try_from(count).unwrap() {
            assert!(self.now - self.begun < Duration::from_secs(60));
            self.tick(&|_: &Due| true);
        }
    }

    /// When each way ended that was given up from now on.
    fn given_up(
        &mut self,
        time: Duration,
        arrives: impl Fn(&Due) -> bool,
    ) -> BTreeMap<IpNet, Duration> {
        let (begun, end) = (self.now, self.now + time);
        let mut ended = BTreeMap::new();
        while self.now < end {
            self.tick(&arrives);
            if let Some(found) = self.rounds.news() {
                for net in found.why_not.keys() {
                    ended.entry(*net).or_insert(self.now - begun);
                }
            }
        }
        ended
    }
}

#[test]
fn five_thousand_ways_cost_a_probe_each_a_second_and_few_of_them_are_long() {
    let count = 5000;
    let mut world = World::new(count);
    world.prove_all(count);
    let seconds = world.sent.len();
    // Before they are in use: a share of their own.
    let (first, _) = world.sent[0];
    assert!((400..=800).contains(&first), "{first}");
    world.run(Duration::from_secs(10), |_| true);
    for &(sent, long) in &world.sent[seconds + 1..seconds + 9] {
        assert!((4800..=5000).contains(&sent), "{sent} probes in a second");
        assert!(long <= 1000, "{long} long probes in a second");
    }
    assert_eq!(world.rounds.used.len(), 5000);
}

#[test]
fn few_ways_are_probed_with_long_packets_only() {
    let mut world = World::new(800);
    world.prove_all(800);
    world.run(Duration::from_secs(3), |_| true);
    let all: usize = world.sent.iter().map(|(sent, _)| sent).sum();
    let long: usize = world.sent.iter().map(|(_, long)| long).sum();
    assert_eq!(all, long);
}

#[test]
fn ways_that_let_only_short_packets_pass_are_given_up_when_it_is_a_long_ones_turn() {
    let count = 2400;
    let mut world = World::new(count);
    world.prove_all(count);
    let fails = |due: &Due| due.target.net.network() < target(100).net.network();
    let ended = world.given_up(Duration::from_secs(8), |due| {
        !fails(due) || due.payload + 28 < usize::from(LEN)
    });
    assert_eq!(ended.len(), 100);
    // Three turns, the first of which has passed when it fails.
    let slowest = ended.values().max().unwrap();
    assert!(*slowest <= Duration::from_secs(2) + IN_TIME, "{slowest:?}");
}

#[test]
fn answer_by_one_way_is_enough_and_the_second_is_asked_for_after_a_loss() {
    let mut world = World::new(1);
    let now = world.now;
    let ask = |world: &mut World, past: Option<bool>| {
        world.now = world.rounds.at().unwrap();
        let due = world.rounds.due(world.now);
        let due = due.first().copied();
        if let (Some(due), Some(past)) = (due, past) {
            world.sequence += 1;
            world.rounds.sent(&due, world.sequence);
            let answer = Answer {
                sequence: world.sequence,
                from: due.target.net.network(),
                via: Via::Underlay,
                seen_len: LEN,
                past,
            };
            world.rounds.answered(&answer, world.now);
            // The other one of the two.
            world.rounds.answered(&answer, world.now);
        } else if let Some(due) = due {
            world.sequence += 1;
            world.rounds.sent(&due, world.sequence);
        }
        due.map(|due| due.past)
    };
    // None that came by the table's way is known.
    for _ in 0..4 {
        assert_eq!(ask(&mut world, Some(true)), Some(true));
    }
    assert_eq!(world.rounds.used.len(), 1);
    assert_eq!(ask(&mut world, Some(false)), Some(true));
    assert_eq!(ask(&mut world, Some(false)), Some(false));
    assert_eq!(ask(&mut world, None), Some(false));
    assert_eq!(ask(&mut world, Some(true)), Some(true));
    assert_eq!(ask(&mut world, Some(true)), Some(true));
    assert_eq!(world.rounds.used.len(), 1);
    assert!(world.now > now);
}

#[test]
fn answers_that_nobody_waits_for_change_nothing() {
    let mut world = World::new(2);
    let due = world.rounds.due(world.now);
    world.rounds.sent(&due[0], 7);
    let _told = world.rounds.news();
    let right = Answer {
        sequence: 7,
        from: due[0].target.net.network(),
        via: Via::KernelTunnel,
        seen_len: LEN,
        past: false,
    };
    for wrong in [
        Answer {
            sequence: 8,
            ..right
        },
        Answer {
            from: due[1].target.net.network(),
            ..right
        },
    ] {
        world.rounds.answered(&wrong, world.now);
        assert_eq!(world.rounds.on_the_way.len(), 1);
    }
    // A target that is not wanted any more takes its probe along.
    world
        .rounds
        .take(&[due[1].target], LEN, false, false, world.now);
    world.rounds.answered(&right, world.now);
    assert!(world.rounds.on_the_way.is_empty());
    assert!(world.rounds.news().unwrap().why_not.is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4))]

    #[test]
    fn failing_ways_are_given_up_in_time_whatever_their_number_and_no_others(
        count in prop_oneof![1_u32..40, 800_u32..1200, Just(5000)],
        part in prop_oneof![Just(1), Just(3), Just(100)],
        phase in 0_u64..1000,
    ) {
        let mut world = World::new(count);
        world.prove_all(count);
        world.run(Duration::from_millis(phase), |_| true);
        let _told = world.rounds.news();
        let failing: HashSet<IpNet> =
            (0..count).filter(|n| n % part == 0).map(|n| target(n).net).collect();
        let ended = world.given_up(Duration::from_secs(4), |due| !failing.contains(&due.target.net));
        let given_up: HashSet<IpNet> = ended.keys().copied().collect();
        prop_assert_eq!(&given_up, &failing);
        let slowest = ended.values().max().copied().unwrap_or_default();
        prop_assert!(slowest < IN_TIME, "{} ways: {:?}", count, slowest);
        if count < 40 {
            prop_assert!(slowest <= GIVEN_UP_WITHIN + TICK * 4, "{:?}", slowest);
        }
    }
}
