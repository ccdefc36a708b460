//! Owns following the external interface: where it is another one now, or has other addresses, the lease says so
//! and what carries the packets is opened anew.

use std::time::Instant;

use super::Session;
use crate::backend::ends::{self, Ends};
use crate::backend::kernel::Kernel;
use crate::backend::plan::Plan;
use crate::daemon::renewal::Order;
use crate::daemon::{Daemon, register};
use crate::iface::Choice;
use crate::store::LeaseStore;

impl<S: LeaseStore, K: Kernel> Daemon<'_, S, K> {
    /// Follows the external interface: where its address, MTU or name is another one now, the lease says so and
    /// the tunnel is opened anew. Without any interface everything stays as it is until there is one.
    pub(super) async fn compare_interface(&self, session: &mut Session) {
        let wanted = session.registration.wanted.clone();
        let Ok(snapshot) = register::look(self.kernel, &wanted).await else {
            return;
        };
        let registration = &session.registration;
        let was = registration.choice().clone();
        let search = ends::search(&snapshot, &wanted, &registration.config);
        let moved = match search.ends {
            Ok(now) => {
                let moved = self.follow(session, now).await.err();
                session.registration.candidates = search.candidates;
                moved
            }
            Err(error) => Some(format!("{} with {} is gone: {error}", was.name, was.addr)),
        };
        if moved != session.moved {
            match &moved {
                Some(text) => tracing::warn!("{text}"),
                None => tracing::info!(
                    "the external interface is back: {} with {}",
                    session.registration.choice().name,
                    session.registration.choice().addr
                ),
            }
        }
        session.moved = moved;
    }

    /// Moves the session to what the external interface is now.
    async fn follow(&self, session: &mut Session, now: Ends) -> Result<(), String> {
        let registration = &mut session.registration;
        let same = |was: &Choice, now: &Choice| {
            (now.addr, now.public, now.index, now.mtu) == (was.addr, was.public, was.index, was.mtu)
        };
        let unchanged = registration.ends.iter().count() == now.iter().count()
            && registration
                .ends
                .iter()
                .zip(now.iter())
                .all(|(was, now)| same(was, now));
        if unchanged {
            registration.ends = now;
            return Ok(());
        }
        let mut plan =
            Plan::new(&registration.config, now.clone()).map_err(|error| error.to_string())?;
        plan.keep(&registration.plan);
        let public_moved = plan.attrs() != registration.plan.attrs();
        let was = registration.choice();
        if public_moved && !self.store.can_move() {
            let now = now.primary();
            return Err(format!(
                "the external interface is {} with {} now, the lease names {}: restart the daemon to \
                 move the lease",
                now.name, now.addr, was.public
            ));
        }
        for (was, now) in registration.ends.iter().zip(now.iter()) {
            tracing::warn!(
                "the external interface is {} with {} and MTU {} now, it was {} with {} and MTU {}",
                now.name,
                now.addr,
                now.mtu,
                was.name,
                was.addr,
                was.mtu
            );
        }
        if public_moved {
            // The keeper lives as long as the session.
            let _ended = session.orders.send(Order::Publish(plan.attrs()));
            registration.lease.attrs = plan.attrs();
        }
        let resized = plan.mtu() != registration.plan.mtu();
        registration.ends = now;
        registration.plan = plan;
        if resized {
            self.update_env(session);
        }
        session.carrier = None;
        session.reopen_at = Instant::now();
        session.down = Some("moving to another address".to_owned());
        Ok(())
    }
}
