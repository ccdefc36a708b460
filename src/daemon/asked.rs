//! Owns answering the clients of the status socket: who knows what is asked, and what may take its time beside the run
//! loop. Never waits for a client.

use std::collections::BTreeMap;
use std::pin::Pin;

use tokio::sync::oneshot;

use super::Daemon;
use super::doctor;
use super::explain::{Found, Named, Question, begin_trace, explain, find};
use super::renewal::Held;
use super::session::{Part, Session, Whose};
use super::status::document;
use crate::backend::kernel::Kernel;
use crate::datapath::tap::filter::Filter;
use crate::datapath::tap::{Capture, MAX_SNAP_LEN, Wanted};
use crate::debug::pcapng::End;
use crate::debug::socket::{Answer, Asked, Request};
use crate::store::LeaseStore;

/// What becomes of a request.
enum Told {
    Now(Answer),
    /// It takes longer than a moment, and nothing of the session.
    Later(Pin<Box<dyn Future<Output = Answer> + Send>>),
    /// It takes the session, once it is known who is meant.
    Named(Found, Wish),
}

/// What is asked about a packet, beside its ends.
#[derive(Debug, Clone, Copy)]
struct Wish {
    len: u16,
    whole: bool,
    trace: bool,
}

/// A packet that is asked about, with its ends found.
#[derive(Debug)]
pub(super) struct Resolved {
    ends: [Named; 2],
    wish: Wish,
    answer: oneshot::Sender<Answer>,
}

/// Answers a client.
pub(super) async fn serve<S: LeaseStore, K: Kernel>(
    daemon: &Daemon<'_, S, K>,
    session: &Session,
    held: &Held,
    Asked { request, answer }: Asked,
) {
    match tell(daemon, session, held, request).await {
        Ok(Told::Now(told)) => send(answer, told),
        Ok(Told::Later(later)) => {
            tokio::spawn(async move { send(answer, later.await) });
        }
        Ok(Told::Named(found, wish)) => {
            let resolver = daemon.resolver.clone();
            tokio::spawn(async move {
                match found.await {
                    Ok(ends) => {
                        let resolved = Resolved { ends, wish, answer };
                        // The daemon may have ended meanwhile.
                        let _gone = resolver.send(resolved).await;
                    }
                    Err(why) => send(answer, Answer::error(&why)),
                }
            });
        }
        Err(why) => send(answer, Answer::error(&why)),
    }
}

/// The client may have given up.
fn send(answer: oneshot::Sender<Answer>, told: Answer) {
    let _gone = answer.send(told);
}

/// Explains a packet whose ends are found.
pub(super) async fn explained<S: LeaseStore, K: Kernel>(
    daemon: &Daemon<'_, S, K>,
    session: &Session,
    Resolved { ends, wish, answer }: Resolved,
) {
    let question = Question {
        from: ends[0].addr,
        to: ends[1].addr,
        len: wish.len,
        whole: wish.whole,
    };
    let mut explanation = match explain(daemon, session, question, &ends).await {
        Ok(explanation) => explanation,
        Err(why) => return send(answer, Answer::error(&why)),
    };
    let begun = wish.trace.then(|| begin_trace(daemon, session, question));
    match begun {
        Some(Ok(trace)) => {
            tokio::spawn(async move {
                trace.run(&mut explanation).await;
                send(answer, Answer::document(&explanation));
            });
            return;
        }
        Some(Err(why)) => explanation.trace.push(why),
        None => {}
    }
    send(answer, Answer::document(&explanation));
}

async fn tell<S: LeaseStore, K: Kernel>(
    daemon: &Daemon<'_, S, K>,
    session: &Session,
    held: &Held,
    request: Request,
) -> Result<Told, String> {
    Ok(match request {
        Request::Status => {
            let expires = held.expires.get();
            Told::Now(Answer::document(&document(daemon, session, expires).await))
        }
        Request::Capture {
            filter,
            snap_len,
            segments,
            outer,
        } => {
            let wanted = Wanted {
                filter: filter.parse::<Filter>().map_err(|e| e.to_string())?,
                snap_len: snap_len.min(MAX_SNAP_LEN),
                segments,
            };
            Told::Now(capture(session, &wanted, outer)?)
        }
        Request::Doctor { peer, mesh } => {
            let examination = doctor::begin(daemon, session, held, peer, mesh).await?;
            Told::Later(Box::pin(async move {
                Answer::document(&examination.run().await)
            }))
        }
        Request::Explain {
            from,
            to,
            family,
            len,
            whole,
            trace,
        } => Told::Named(
            find(daemon.store, from, to, family),
            Wish { len, whole, trace },
        ),
    })
}

/// Begins a capture of whatever carries the packets: on our data plane, which it ends with, and on what the kernel
/// carries.
fn capture(session: &Session, wanted: &Wanted, outer: bool) -> Result<Answer, String> {
    let carrier = session.carrier.as_ref().ok_or_else(|| {
        let why = session.down.as_deref().unwrap_or("not opened yet");
        format!("the tunnel is down, so there is nothing to capture: {why}")
    })?;
    let mut all: Option<Capture> = None;
    let mut ends = Vec::new();
    for tunnel in &carrier.tunnels {
        let taps = tunnel.taps().ok_or("the data plane is being closed")?;
        let capture = taps.capture(wanted.clone()).map_err(|e| e.to_string())?;
        match &mut all {
            Some(all) => all.join(capture),
            None => all = Some(capture),
        }
        ends.push(End::of(&tunnel.device, tunnel.bind, tunnel.encapsulation));
    }
    let (mut watched, mut unwatched) = (Vec::new(), None);
    let part = if outer { Part::Outer } else { Part::Inner };
    match (
        session.watch(wanted.clone(), part, Whose::Clients),
        &mut all,
    ) {
        (None, _) => {}
        (Some(Ok((capture, places))), all) => {
            watched = places;
            match all {
                Some(all) => all.join_beside(capture),
                None => *all = Some(capture),
            }
        }
        (Some(Err(why)), Some(_)) => unwatched = Some(why.to_string()),
        (Some(Err(why)), None) => return Err(why.to_string()),
    }
    let capture = all.ok_or_else(|| {
        let plan = session.registration.plan.name();
        format!("the {plan} backend leaves the packets to others: capture with tcpdump")
    })?;
    let macs = carrier.routes().iter();
    let macs = macs.filter_map(|route| Some((route.addr.ip(), route.mac?.to_string())));
    let origin = serde_json::json!({
        "ends": ends,
        "watched": watched,
        "unwatched": unwatched,
        "macs": macs.collect::<BTreeMap<_, _>>(),
    });
    Ok(Answer::capture(&origin, capture))
}
