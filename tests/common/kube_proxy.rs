//! Owns a proxy between the program and a real API server that does what networks, load balancers and busy servers
//! do. Plain HTTP in front, TLS behind; whoever asks keeps the token that he has. Never changes what the server holds.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]
#![allow(dead_code, reason = "every test file uses the part that it needs")]

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, BodyDataStream, Bytes, to_bytes};
use axum::extract::State;
use axum::http::header::{AUTHORIZATION, CONTENT_TYPE, RETRY_AFTER};
use axum::http::{Method, Request, Response};
use axum::serve::Listener;
use futures_util::{StreamExt as _, stream};
use kube::config::{AuthInfo, KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use loden::lab::NetNs;
use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{oneshot, watch};

use crate::etcd::run_in;

/// Where the proxy is, in the API server's namespace.
pub(crate) const PROXY: &str = "http://192.0.2.1:6444";

const LISTEN: &str = "192.0.2.1:6444";

/// No request of ours is larger.
const MAX_REQUEST_LEN: usize = 1 << 20;

/// What is asked of the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    List,
    Watch,
    Get,
    Patch,
    Event,
    Other,
}

/// What becomes of a request.
#[derive(Clone, Debug)]
pub(crate) enum Fault {
    /// Answered by the proxy: the code, the reason, and `Retry-After`.
    Refused(u16, &'static str, Option<u32>),
    /// Never answered.
    Frozen,
    /// Answered with what the server once said.
    Stale(String),
}

/// What becomes of watches that are open, and of those that will be.
#[derive(Clone, Debug)]
pub(crate) enum Stream {
    /// They flow.
    Flowing,
    /// Each piece comes this much later.
    Slow(Duration),
    /// Nothing comes any more, and nobody says so.
    Frozen,
    /// The connection is reset.
    Reset,
    /// It is reset in the middle of the next piece.
    Torn,
    /// The server says 410 in the middle of the watch.
    Gone,
}

struct Rule {
    kind: Kind,
    /// Whose requests; everybody's, if empty.
    token: String,
    fault: Fault,
    left: usize,
}

struct Shared {
    upstream: Client,
    rules: Mutex<Vec<Rule>>,
    /// What was asked, and when.
    seen: Mutex<Vec<(Kind, Instant)>>,
    streams: watch::Sender<Stream>,
}

/// A running proxy; it ends with the value.
pub(crate) struct Proxy {
    shared: Arc<Shared>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Proxy {
    /// In front of the server that this kubeconfig names.
    pub(crate) fn start(netns: &NetNs, kubeconfig: &Path) -> Self {
        let (ready, started) = std::sync::mpsc::channel();
        let (stop, stopped) = oneshot::channel();
        let (netns, kubeconfig) = (netns.clone(), kubeconfig.to_owned());
        let thread = std::thread::spawn(move || {
            run_in(&netns, async || {
                let file = Kubeconfig::read_from(kubeconfig).unwrap();
                let options = KubeConfigOptions::default();
                let mut config = Config::from_custom_kubeconfig(file, &options)
                    .await
                    .unwrap();
                config.auth_info = AuthInfo::default();
                config.default_retry = false;
                let shared = Arc::new(Shared {
                    upstream: Client::try_from(config).unwrap(),
                    rules: Mutex::default(),
                    seen: Mutex::default(),
                    streams: watch::channel(Stream::Flowing).0,
                });
                let app = Router::new().fallback(pass).with_state(Arc::clone(&shared));
                let listener = Abrupt(TcpListener::bind(LISTEN).await.unwrap());
                ready.send(shared).unwrap();
                tokio::select! {
                    served = axum::serve(listener, app) => served.unwrap(),
                    _ = stopped => {}
                }
            });
        });
        Self {
            shared: started.recv().unwrap(),
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    /// The next `times` requests of this kind meet this fault.
    pub(crate) fn fail(&self, kind: Kind, times: usize, fault: Fault) {
        self.fail_token("", kind, times, fault);
    }

    /// Likewise, only those with this token.
    pub(crate) fn fail_token(&self, token: &str, kind: Kind, left: usize, fault: Fault) {
        let token = match token {
            "" => String::new(),
            token => format!("Bearer {token}"),
        };
        let mut rules = self.shared.rules.lock().unwrap();
        rules.push(Rule {
            kind,
            token,
            fault,
            left,
        });
    }

    /// Requests fail no longer.
    pub(crate) fn heal(&self) {
        self.shared.rules.lock().unwrap().clear();
    }

    pub(crate) fn streams(&self, stream: Stream) {
        self.shared.streams.send_replace(stream);
    }

    /// When requests of this kind came.
    pub(crate) fn times(&self, kind: Kind) -> Vec<Instant> {
        let seen = self.shared.seen.lock().unwrap();
        let of_kind = seen.iter().filter(|(of, _)| *of == kind);
        of_kind.map(|(_, at)| *at).collect()
    }

    pub(crate) fn count(&self, kind: Kind) -> usize {
        self.times(kind).len()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ended = self.stop.take().map(|stop| stop.send(()));
        let ended = self.thread.take().map(JoinHandle::join);
        assert!(std::thread::panicking() || matches!(ended, Some(Ok(()))));
    }
}

/// Closes connections with a reset, for whoever has something to read.
struct Abrupt(TcpListener);

impl Listener for Abrupt {
    type Io = TcpStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (TcpStream, SocketAddr) {
        let (stream, addr) = Listener::accept(&mut self.0).await;
        SockRef::from(&stream)
            .set_linger(Some(Duration::ZERO))
            .unwrap();
        (stream, addr)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

fn kind(request: &Request<Body>) -> Kind {
    let path = request.uri().path();
    let query = request.uri().query().unwrap_or_default();
    let on_nodes = path == "/api/v1/nodes";
    match *request.method() {
        Method::GET if on_nodes && query.contains("watch=") => Kind::Watch,
        Method::GET if on_nodes => Kind::List,
        Method::GET if path.starts_with("/api/v1/nodes/") => Kind::Get,
        Method::PATCH if path.starts_with("/api/v1/nodes/") => Kind::Patch,
        Method::POST if path.ends_with("/events") => Kind::Event,
        _ => Kind::Other,
    }
}

impl Shared {
    /// What is to become of a request, if it is not passed on.
    fn fault(&self, kind: Kind, token: &str) -> Option<Fault> {
        let mut rules = self.rules.lock().unwrap();
        let rule = rules.iter_mut().find(|rule| {
            rule.kind == kind && rule.left > 0 && (rule.token.is_empty() || rule.token == token)
        })?;
        rule.left -= 1;
        Some(rule.fault.clone())
    }
}

/// As the API server words it.
fn status(code: u16, reason: &str) -> String {
    format!(
        r#"{{"kind":"Status","apiVersion":"v1","metadata":{{}},"status":"Failure","message":"{reason}, says the proxy","reason":"{reason}","code":{code}}}"#
    )
}

async fn pass(State(shared): State<Arc<Shared>>, request: Request<Body>) -> Response<Body> {
    let kind = kind(&request);
    let token = request.headers().get(AUTHORIZATION);
    let token = token.and_then(|token| token.to_str().ok());
    let fault = shared.fault(kind, token.unwrap_or_default());
    shared.seen.lock().unwrap().push((kind, Instant::now()));
    let json = Response::builder().header(CONTENT_TYPE, "application/json");
    match fault {
        Some(Fault::Refused(code, reason, retry_after)) => {
            let seconds = retry_after.map(|seconds| (RETRY_AFTER, seconds.to_string()));
            let mut answer = json
                .status(code)
                .body(Body::from(status(code, reason)))
                .unwrap();
            let headers = seconds
                .into_iter()
                .map(|(name, s)| (name, s.parse().unwrap()));
            answer.headers_mut().extend(headers);
            return answer;
        }
        Some(Fault::Frozen) => std::future::pending().await,
        Some(Fault::Stale(body)) => return json.body(Body::from(body)).unwrap(),
        None => {}
    }
    let (parts, body) = request.into_parts();
    let body = to_bytes(body, MAX_REQUEST_LEN).await.unwrap();
    let body = kube::client::Body::from(body.to_vec());
    let answer = shared.upstream.send(Request::from_parts(parts, body)).await;
    let Ok(answer) = answer else {
        let gateway = json.status(502).body(Body::from(status(502, "BadGateway")));
        return gateway.unwrap();
    };
    let (parts, body) = answer.into_parts();
    let body = Body::new(body);
    let body = if kind == Kind::Watch {
        disturbed(body, shared.streams.subscribe())
    } else {
        body
    };
    Response::from_parts(parts, body)
}

/// A watch, as it comes through.
struct Disturbed {
    upstream: BodyDataStream,
    streams: watch::Receiver<Stream>,
    /// What is sent next.
    waiting: Option<io::Result<Bytes>>,
    ended: bool,
}

fn disturbed(body: Body, streams: watch::Receiver<Stream>) -> Body {
    let state = Disturbed {
        upstream: body.into_data_stream(),
        streams,
        waiting: None,
        ended: false,
    };
    Body::from_stream(stream::unfold(state, |mut state| async move {
        let piece = state.next().await?;
        Some((piece, state))
    }))
}

impl Disturbed {
    async fn next(&mut self) -> Option<io::Result<Bytes>> {
        if let Some(waiting) = self.waiting.take() {
            return Some(waiting);
        }
        let reset = || Err(io::Error::from(io::ErrorKind::ConnectionReset));
        while !self.ended {
            let mode = self.streams.borrow_and_update().clone();
            match mode {
                Stream::Frozen => {
                    self.streams.changed().await.ok()?;
                    continue;
                }
                Stream::Reset => {
                    self.ended = true;
                    return Some(reset());
                }
                Stream::Gone => {
                    self.ended = true;
                    let error =
                        format!(r#"{{"type":"ERROR","object":{}}}"#, status(410, "Expired"));
                    return Some(Ok(Bytes::from(error + "\n")));
                }
                Stream::Flowing | Stream::Slow(_) | Stream::Torn => {}
            }
            let piece = tokio::select! {
                piece = self.upstream.next() => piece?.map_err(io::Error::other),
                changed = self.streams.changed() => {
                    changed.ok()?;
                    continue;
                }
            };
            match (mode, piece) {
                (Stream::Slow(pause), piece) => {
                    tokio::time::sleep(pause).await;
                    return Some(piece);
                }
                (Stream::Torn, Ok(piece)) => {
                    self.ended = true;
                    self.waiting = Some(reset());
                    return Some(Ok(piece.slice(..piece.len() / 2)));
                }
                (_, piece) => return Some(piece),
            }
        }
        None
    }
}
