//! Feeds arbitrary bytes to the reader of capture records, and what it accepts to the writer of files.

use std::io::sink;

use loden::datapath::tap::record::HEADER_LEN;
use loden::datapath::tap::{Lost, Record};
use loden::debug::pcapng::{File, Origin};

/// Decodes `data` as records, encodes each again and writes it to a file, as it is and with outer headers.
///
/// # Panics
///
/// If an accepted record is not written as it was read, or cannot be put into a file.
pub fn run(data: &[u8]) {
    let origin = Origin {
        device: "flannel0".to_owned(),
        bind: ([192, 0, 2, 1], 8285).into(),
        filter: String::new(),
    };
    let mut files = [true, false].map(|outer| File::begin(sink(), &origin, outer).expect("a sink"));
    let mut rest = data;
    while let Ok((record, copied, after)) = Record::decode(rest) {
        let encoded = record.encode(copied.len());
        let (again, none, _) = Record::decode(&[&encoded[..], copied].concat())
            .map(|(r, c, a)| (r, c.len(), a.len()))
            .expect("it was just encoded");
        assert_eq!((again, none), (record, copied.len()));
        assert_eq!(encoded.len(), HEADER_LEN);
        for file in &mut files {
            file.packet(&record, copied).expect("a sink");
        }
        rest = after;
    }
    for file in files {
        file.end(Lost::default()).expect("a sink");
    }
}
