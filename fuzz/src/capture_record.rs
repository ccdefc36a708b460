//! Feeds arbitrary bytes to the reader of capture records, and what it accepts to the writer of files.

use std::io::sink;

use loden::addr::{Mac, Vni};
use loden::datapath::Encapsulation;
use loden::datapath::tap::record::HEADER_LEN;
use loden::datapath::tap::{Lost, Record};
use loden::debug::pcapng::{End, File, Origin};

/// Decodes `data` as records, encodes each again and writes it to a file, as it is and with outer headers.
///
/// # Panics
///
/// If an accepted record is not written as it was read, or cannot be put into a file.
pub fn run(data: &[u8]) {
    let vxlan = Encapsulation::Vxlan {
        vni: Vni::new(1).expect("it has 24 bits"),
        mac: Mac::local(1),
    };
    let files = [
        (Encapsulation::Plain, true),
        (Encapsulation::Plain, false),
        (vxlan, true),
    ];
    let mut files = files.map(|(encapsulation, outer)| {
        let bind = ([192, 0, 2, 1], 8285).into();
        let origin = Origin {
            ends: vec![End::of("flannel0", bind, encapsulation)],
            ..Origin::default()
        };
        File::begin(sink(), &origin, outer).expect("a sink")
    });
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
