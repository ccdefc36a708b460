//! Owns when the server may be asked again: what the `Retry-After` header (RFC 9110, section 10.2.3) of its refusals
//! says. Never waits itself.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::http::header::RETRY_AFTER;
use axum::http::{Response, StatusCode};
use tokio::time::Instant;

/// The longest time that a server can send us away for. What it asks for more than that may be a mistake.
const LONGEST: Duration = Duration::from_secs(60);

/// Shared by all requests to one server.
#[derive(Debug, Clone, Default)]
pub(super) struct Courtesy {
    until: Arc<Mutex<Option<Instant>>>,
}

impl Courtesy {
    /// What every response has to pass through.
    pub(super) fn observe<B>(&self) -> impl Fn(Response<B>) -> Response<B> + Clone + 'static {
        let this = self.clone();
        move |response| {
            if let Some(pause) = pause(&response) {
                let mut until = this.until.lock().unwrap_or_else(PoisonError::into_inner);
                *until = Some(Instant::now() + pause);
            }
            response
        }
    }

    /// When the next request may be sent; none, if now.
    pub(super) fn until(&self) -> Option<Instant> {
        let until = *self.until.lock().unwrap_or_else(PoisonError::into_inner);
        until.filter(|until| *until > Instant::now())
    }
}

/// How long a response asks us to stay away. The API server gives seconds, never a date.
fn pause<B>(response: &Response<B>) -> Option<Duration> {
    let refused = [
        StatusCode::TOO_MANY_REQUESTS,
        StatusCode::SERVICE_UNAVAILABLE,
    ];
    if !refused.contains(&response.status()) {
        return None;
    }
    let text = response.headers().get(RETRY_AFTER)?.to_str().ok()?;
    let seconds = Duration::from_secs(text.trim().parse().ok()?);
    Some(seconds.min(LONGEST))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(status: u16, header: &str) -> Option<Duration> {
        let response = Response::builder().status(status);
        pause(&response.header("Retry-After", header).body(()).unwrap())
    }

    #[test]
    fn only_a_refusal_with_a_number_of_seconds_sends_us_away_and_not_for_ever() {
        let second = Duration::from_secs(1);
        assert_eq!(asked(429, "1"), Some(second));
        assert_eq!(asked(503, " 2 "), Some(2 * second));
        assert_eq!(asked(429, "18446744073709551615"), Some(60 * second));
        for (status, header) in [
            (200, "1"),
            (500, "1"),
            (429, "-1"),
            (429, "Sun, 06 Nov 1994 08:49:37 GMT"),
            (429, "18446744073709551616"),
        ] {
            assert_eq!(asked(status, header), None, "{status} {header}");
        }
    }
}
