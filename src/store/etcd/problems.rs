//! Owns what is wrong with the keys of a store, and what of that is news or solved. Never decides what is wrong.

use std::collections::BTreeMap;

use crate::store::Cause;

/// What is wrong, and what of it was touched since somebody asked: thousands of bad keys must not make every
/// message dear.
#[derive(Debug)]
pub(super) struct Problems {
    now: BTreeMap<String, Cause>,
    /// Those that were touched, as they were before.
    before: BTreeMap<String, Option<Cause>>,
}

impl Problems {
    pub(super) const fn new() -> Self {
        Self {
            now: BTreeMap::new(),
            before: BTreeMap::new(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.now.is_empty()
    }

    /// Whether anything is wrong with this.
    pub(super) fn concern(&self, subject: &str) -> bool {
        self.now.contains_key(subject)
    }

    pub(super) fn insert(&mut self, subject: String, cause: Cause) {
        let was = self.now.insert(subject.clone(), cause);
        self.before.entry(subject).or_insert(was);
    }

    pub(super) fn remove(&mut self, subject: &str) {
        if let Some((subject, was)) = self.now.remove_entry(subject) {
            self.before.entry(subject).or_insert(Some(was));
        }
    }

    /// Nothing is wrong, as far as is known.
    pub(super) fn restart(&mut self) {
        for (subject, was) in std::mem::take(&mut self.now) {
            self.before.entry(subject).or_insert(Some(was));
        }
    }

    /// This is still wrong, as it was before everything was forgotten.
    pub(super) fn keep(&mut self, subject: &str) {
        if let Some(Some(was)) = self.before.get(subject) {
            self.now.insert(subject.to_owned(), was.clone());
        }
    }

    /// What is wrong now and was not, or was otherwise, when this was asked last; and what is solved since.
    pub(super) fn fresh(&mut self) -> BTreeMap<String, Cause> {
        let touched = std::mem::take(&mut self.before).into_iter();
        let fresh = touched.filter_map(|(subject, was)| {
            let cause = match (self.now.get(&subject), was) {
                (Some(now), was) if was.as_ref() != Some(now) => now.clone(),
                (None, Some(_solved)) => Cause::Solved,
                (Some(_) | None, _) => return None,
            };
            Some((subject, cause))
        });
        fresh.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone)]
    enum Step {
        Insert(u8, u8),
        Remove(u8),
        Restart,
        Ask,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0..4_u8, 0..3_u8).prop_map(|(subject, cause)| Step::Insert(subject, cause)),
            2 => (0..4_u8).prop_map(Step::Remove),
            1 => Just(Step::Restart),
            2 => Just(Step::Ask),
        ]
    }

    proptest! {
        /// The oracle keeps a copy of everything.
        #[test]
        fn news_is_what_differs_from_a_copy_made_when_it_was_asked_for(
            steps in proptest::collection::vec(step(), 0..60)
        ) {
            let mut problems = Problems::new();
            let (mut now, mut copy): (BTreeMap<String, Cause>, BTreeMap<String, Cause>) = Default::default();
            for step in steps {
                match step {
                    Step::Insert(subject, cause) => {
                        let cause = Cause::Sidecar(cause.to_string());
                        problems.insert(subject.to_string(), cause.clone());
                        now.insert(subject.to_string(), cause);
                    }
                    Step::Remove(subject) => {
                        problems.remove(&subject.to_string());
                        now.remove(&subject.to_string());
                    }
                    Step::Restart => {
                        problems.restart();
                        now.clear();
                    }
                    Step::Ask => {
                        let mut news = now.clone();
                        news.retain(|subject, cause| copy.get(subject) != Some(cause));
                        for subject in copy.keys().filter(|subject| !now.contains_key(*subject)) {
                            news.insert(subject.clone(), Cause::Solved);
                        }
                        prop_assert_eq!(problems.fresh(), news);
                        copy = now.clone();
                    }
                }
                prop_assert_eq!(problems.is_empty(), now.is_empty());
            }
        }
    }
}
