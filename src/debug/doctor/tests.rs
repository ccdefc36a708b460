use super::*;

fn sender() -> Identity {
    Identity {
        node: 5,
        v4: Some("198.18.2.0/24".parse().unwrap()),
        v6: None,
    }
}

fn good() -> Figures {
    Figures {
        sent: 10,
        answered: 10,
        via_there: Some("tunnel"),
        via_here: Some("tunnel"),
        clock_offset_us: Some(300),
        sender: Some(sender()),
        ..Figures::default()
    }
}

fn lost() -> Figures {
    Figures {
        sent: 10,
        ..Figures::default()
    }
}

fn refused() -> Figures {
    Figures {
        errno: Some(libc::ECONNREFUSED),
        ..lost()
    }
}

fn said() -> Said {
    let facts = Facts {
        health: Health::default(),
        public: None,
        received: None,
        sent: None,
        bad_checksums: 7,
        peers: 1,
        sends_by: Via::Tunnel,
    };
    Said {
        before: facts,
        after: facts,
        sender: sender(),
        hears_us: true,
    }
}

fn healthy() -> Evidence {
    Evidence {
        subnets: "198.18.2.0-24".parse().unwrap(),
        unserved: None,
        way: Way::Open,
        closed_here: None,
        clashes: Vec::new(),
        mtu: 1472,
        overlay: good(),
        overlay_echo: None,
        unchecked: None,
        direct: good(),
        underlay: Some(good()),
        sizes: Some(Sizes {
            tried: 1472,
            up: Some(1472),
            down: Some(1472),
            told: false,
        }),
        refused: false,
        said: Some(said()),
        we_hear: true,
        runs_it: true,
        sends_by: Via::Tunnel,
        bad_checksums_here: 0,
    }
}

/// Nothing through the overlay, and all well past it.
fn silent() -> Evidence {
    Evidence {
        overlay: lost(),
        overlay_echo: Some(lost()),
        unchecked: Some(lost()),
        sizes: None,
        we_hear: false,
        ..healthy()
    }
}

fn causes(evidence: &Evidence) -> Vec<Cause> {
    diagnose(evidence)
        .iter()
        .map(|finding| finding.cause)
        .collect()
}

fn with_health(health: Health, evidence: Evidence) -> Evidence {
    let mut said = said();
    said.after.health = health;
    Evidence {
        said: Some(said),
        ..evidence
    }
}

#[test]
fn healthy_peers_have_nothing_whatever_they_run() {
    assert_eq!(causes(&healthy()), []);
    // The kernel's VXLAN on one end, ours on the other.
    let mut mixed = healthy();
    mixed.overlay.via_there = Some("kernel-tunnel");
    assert_eq!(causes(&mixed), []);
    // An unmodified peer, and one whose firewall closes the probes' port.
    for (overlay, direct) in [(refused(), refused()), (lost(), lost())] {
        let other = Evidence {
            overlay,
            direct,
            overlay_echo: Some(good()),
            said: None,
            runs_it: false,
            ..silent()
        };
        assert_eq!(causes(&other), []);
    }
    // One that has forgotten how to be asked past the overlay.
    let shy = Evidence {
        direct: lost(),
        underlay: Some(lost()),
        ..healthy()
    };
    assert_eq!(causes(&shy), []);
    // A hop that says so is no black hole.
    let mut told = healthy();
    told.sizes = Some(Sizes {
        tried: 1472,
        up: Some(1400),
        down: Some(1400),
        told: true,
    });
    assert_eq!(causes(&told), []);
}

#[test]
fn what_is_wrong_with_a_peer_that_answers_is_named() {
    let mut hole = healthy();
    hole.sizes = Some(Sizes {
        tried: 1472,
        up: Some(1472),
        down: Some(1300),
        told: false,
    });
    assert_eq!(causes(&hole), [Cause::MtuBlackHole]);
    let mut other_way = healthy();
    other_way.overlay.via_here = Some("underlay");
    assert_eq!(causes(&other_way), [Cause::AsymmetricPath]);
    // Each end chooses its own way: what counts is whether packets take the one that was chosen for them.
    let answers = |before, after| {
        let mut said = said();
        said.before.sends_by = before;
        said.after.sends_by = after;
        Some(said)
    };
    other_way.said = answers(Via::Underlay, Via::Underlay);
    assert_eq!(causes(&other_way), []);
    other_way.said = answers(Via::Tunnel, Via::Underlay);
    assert_eq!(causes(&other_way), [], "it has just changed");
    other_way.sends_by = Via::Underlay;
    assert_eq!(causes(&other_way), [Cause::AsymmetricPath]);
    other_way.overlay.via_there = Some("underlay");
    assert_eq!(causes(&other_way), []);
    other_way.sends_by = Via::Unknown;
    assert_eq!(causes(&other_way), []);
    let mut corrupted = healthy();
    corrupted.overlay.answered = 6;
    corrupted.bad_checksums_here = 2;
    assert_eq!(causes(&corrupted), [Cause::ChecksumCorruption]);
    corrupted.bad_checksums_here = 1;
    assert_eq!(causes(&corrupted), [Cause::Loss]);
    for offset in [11_000_000, -11_000_000] {
        let mut clock = healthy();
        clock.overlay.clock_offset_us = Some(offset);
        assert_eq!(causes(&clock), [Cause::ClockOff]);
    }
    let mut loses = healthy();
    loses.overlay.answered = 8;
    assert_eq!(causes(&loses), [Cause::Loss]);
    let stops = with_health(Health::NOT_FORWARDING, healthy());
    assert_eq!(causes(&stops), [Cause::PeerNotForwarding]);
}

#[test]
fn silence_is_explained_by_what_is_nearest() {
    let other = Evidence {
        unserved: Some("it uses the vxlan backend and this node udp".to_owned()),
        refused: true,
        ..silent()
    };
    let [finding] = &diagnose(&other)[..] else {
        panic!("{:?}", diagnose(&other))
    };
    assert_eq!(finding.cause, Cause::NotServed);
    assert!(finding.detail.contains("vxlan backend"), "{finding:?}");
    // As long as the kernel has a way to it, from before, nothing is the matter.
    let reached = Evidence {
        unserved: other.unserved,
        ..healthy()
    };
    assert_eq!(diagnose(&reached), []);
    let closed = Evidence {
        way: Way::Closed("no route".to_owned()),
        closed_here: Some("a rule".to_owned()),
        ..silent()
    };
    assert_eq!(causes(&closed), [Cause::UnderlayDown]);
    let firewall = Evidence {
        closed_here: Some("a rule".to_owned()),
        ..silent()
    };
    assert_eq!(causes(&firewall), [Cause::FirewallDrop]);
    let dead = Evidence {
        direct: lost(),
        underlay: Some(lost()),
        said: None,
        ..silent()
    };
    assert_eq!(causes(&dead), [Cause::UnderlayDown]);
    let no_daemon = Evidence {
        direct: refused(),
        said: None,
        refused: true,
        ..silent()
    };
    assert_eq!(causes(&no_daemon), [Cause::PeerDaemonGone]);
    assert_eq!(
        causes(&with_health(Health::FIREWALL_CLOSED, silent())),
        [Cause::FirewallDrop]
    );
    assert_eq!(
        causes(&with_health(Health::TUNNEL_DOWN, silent())),
        [Cause::PeerTunnelDown]
    );
    let kernel_goes_on = Evidence {
        overlay: refused(),
        direct: refused(),
        overlay_echo: Some(good()),
        said: None,
        ..silent()
    };
    assert_eq!(causes(&kernel_goes_on), [Cause::PeerDaemonGone]);
}

#[test]
fn who_answers_there_tells_a_wrong_lease_from_an_address_that_two_publish() {
    let mut wrong = silent();
    wrong.subnets = "198.18.9.0-24".parse().unwrap();
    let findings = diagnose(&wrong);
    assert_eq!(causes(&wrong), [Cause::WrongLease]);
    assert!(findings[0].detail.contains("198.18.9.0-24"), "{findings:?}");
    assert!(findings[0].detail.contains("198.18.2.0/24"), "{findings:?}");
    wrong.clashes = vec!["198.18.2.0-24 publishes 192.0.2.2, too".to_owned()];
    assert_eq!(causes(&wrong), [Cause::DuplicatePublicIp]);
}

#[test]
fn wrong_checksums_are_told_by_the_other_or_by_probes_without() {
    let mut counted = said();
    counted.after.bad_checksums += 10;
    counted.hears_us = false;
    let outer = Evidence {
        said: Some(counted),
        ..silent()
    };
    assert_eq!(causes(&outer), [Cause::ChecksumCorruption]);
    let inner = Evidence {
        overlay_echo: Some(good()),
        unchecked: Some(good()),
        ..silent()
    };
    assert_eq!(causes(&inner), [Cause::ChecksumCorruption]);
}

#[test]
fn a_filter_is_told_with_the_direction_by_the_end_that_hears() {
    let filtered = |hears_us: Option<bool>, we_hear| {
        let said = hears_us.map(|hears_us| Said { hears_us, ..said() });
        let findings = diagnose(&Evidence {
            said,
            we_hear,
            ..silent()
        });
        assert_eq!(findings[0].cause, Cause::PortFiltered);
        findings[0].detail.clone()
    };
    assert!(filtered(Some(true), false).contains("from it to us"));
    assert!(filtered(Some(false), true).contains("from us to it:"));
    assert!(filtered(Some(false), false).contains("both ways"));
    assert!(filtered(None, false).contains("cannot be asked"));
}

#[test]
fn every_cause_has_a_name_of_its_own_and_a_remedy() {
    let names: std::collections::BTreeSet<_> =
        Cause::ALL.iter().map(|cause| cause.name()).collect();
    assert_eq!(names.len(), Cause::ALL.len());
    for cause in Cause::ALL {
        assert_eq!(serde_json::to_value(cause).unwrap(), cause.name());
        assert!(!cause.remedy().is_empty());
    }
}
