//! Owns the conclusion of a trace: between which two points of their way the probes got lost, by what both ends counted.
//! Pure. Never concludes anything from what was not watched.

/// How many passed each point of the way, in its order; none where nobody watched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Passed {
    /// Sent by our daemon.
    pub(super) sent: u32,
    /// Left this node.
    pub(super) left: Option<u32>,
    /// Came to the other node.
    pub(super) came: Option<u32>,
    /// Reached its daemon.
    pub(super) taken: Option<u32>,
    /// Answers that left it.
    pub(super) answers_left: Option<u32>,
    /// Answers that came to this node.
    pub(super) answers_came: Option<u32>,
    /// Answers that reached our daemon.
    pub(super) answered: u32,
}

/// The points, as they are called, with `NODE` for the other node.
const POINTS: [&str; 7] = [
    "this node's daemon",
    "this node's links",
    "the links of NODE",
    "the daemon of NODE",
    "the links of NODE, as answers",
    "this node's links, as answers",
    "this node's daemon, as answers",
];

/// What decides between a point and the next.
const BETWEEN: [&str; 6] = [
    "on this node, before they leave it: ask its firewall, routes and neighbours",
    "between this node and NODE, on the way there: ask the underlay's firewalls and security groups, and who has that \
     address",
    "on NODE, between its links and its daemon: ask its firewall, and its routes back (reverse path filter)",
    "on NODE, which does not send its answers: ask its routes and its firewall",
    "between NODE and this node, on the way back: ask the underlay's firewalls and security groups, and who has our \
     address",
    "on this node, between its links and its daemon: ask its firewall, and its routes back (reverse path filter)",
];

impl Passed {
    /// Where they get lost first, in a sentence; none where nothing is lost.
    pub(super) fn lost(&self, node: &str) -> Option<String> {
        let counts = [
            Some(self.sent),
            self.left,
            self.came,
            self.taken,
            self.answers_left,
            self.answers_came,
            Some(self.answered),
        ];
        // Whatever has come further has passed every point before.
        let mut least = 0;
        let mut known = Vec::new();
        for (point, count) in counts.iter().enumerate().rev() {
            if let Some(count) = count {
                least = least.max(*count);
                known.push((point, least));
            }
        }
        known.reverse();
        let steps = known.windows(2);
        let lost = steps.filter_map(|step| match *step {
            [(from, before), (to, after)] if after < before => Some((from, to, before - after)),
            _ => None,
        });
        let (from, to, count) = lost.into_iter().next()?;
        let place = match to - from {
            1 => BETWEEN[from].to_owned(),
            _ => format!(
                "between {} and {}: not all of the points between are seen",
                POINTS[from], POINTS[to]
            ),
        };
        Some(format!("{count} of {} get lost {place}", self.sent).replace("NODE", node))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Passed = Passed {
        sent: 3,
        left: Some(3),
        came: Some(3),
        taken: Some(3),
        answers_left: Some(3),
        answers_came: Some(3),
        answered: 3,
    };

    #[track_caller]
    fn lost(passed: Passed, words: &str) {
        let said = passed.lost("192.0.2.2").unwrap();
        assert!(said.starts_with(words), "{said}");
    }

    #[test]
    fn nothing_is_lost_where_all_are_answered_whatever_was_not_seen() {
        assert_eq!(ALL.lost("x"), None);
        let unseen = Passed {
            left: Some(0),
            came: None,
            answers_came: Some(1),
            ..ALL
        };
        assert_eq!(unseen.lost("x"), None);
    }

    #[test]
    fn first_point_behind_which_fewer_were_counted_is_where_they_get_lost() {
        let none = Passed {
            answered: 0,
            ..Passed::default()
        };
        let upto = |points: usize| {
            let seen = |point: usize| Some(if point < points { 3 } else { 0 });
            Passed {
                sent: 3,
                left: seen(1),
                came: seen(2),
                taken: seen(3),
                answers_left: seen(4),
                answers_came: seen(5),
                ..none
            }
        };
        for (points, words) in [
            (1, "3 of 3 get lost on this node, before"),
            (
                2,
                "3 of 3 get lost between this node and 192.0.2.2, on the way there",
            ),
            (
                3,
                "3 of 3 get lost on 192.0.2.2, between its links and its daemon",
            ),
            (4, "3 of 3 get lost on 192.0.2.2, which does not send"),
            (
                5,
                "3 of 3 get lost between 192.0.2.2 and this node, on the way back",
            ),
            (6, "3 of 3 get lost on this node, between its links"),
        ] {
            lost(upto(points), words);
        }
        let partly = Passed {
            answers_came: Some(2),
            answered: 2,
            ..ALL
        };
        lost(partly, "1 of 3 get lost between 192.0.2.2 and this node");
    }

    #[test]
    fn points_that_nobody_watched_widen_the_place() {
        let passed = Passed {
            came: None,
            taken: None,
            answers_left: None,
            answers_came: Some(0),
            answered: 0,
            ..ALL
        };
        lost(
            passed,
            "3 of 3 get lost between this node's links and this node's links, as answers: not all",
        );
    }
}
