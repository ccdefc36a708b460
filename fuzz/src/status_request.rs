//! Feeds arbitrary lines to the reader of the status socket's requests, and what it accepts to what acts on it.

use loden::datapath::tap::filter::Filter;
use loden::debug::socket::Request;

/// Reads `data` as one line of a client.
///
/// # Panics
///
/// If an accepted request is not the request that its own text says.
pub fn run(data: &[u8]) {
    let Some(request) = Request::parse(data) else {
        return;
    };
    let text = serde_json::to_vec(&request).expect("it came from such text");
    assert_eq!(Request::parse(&text).as_ref(), Some(&request));
    if let Request::Capture { filter, .. } = request {
        // A filter that makes no sense is an answer, and nothing else.
        let _refused = filter.parse::<Filter>();
    }
}
