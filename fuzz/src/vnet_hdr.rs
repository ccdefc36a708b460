//! Any ten bytes: what parses, encodes to the same bytes.

use loden::offload::vnet_hdr::{VNET_HDR_LEN, VnetHdr};

/// Input: a vnet header, with or without something behind it.
pub fn run(data: &[u8]) {
    if let Ok(vnet) = VnetHdr::parse(data) {
        assert_eq!(data.get(..VNET_HDR_LEN), Some(vnet.encode().as_slice()));
    } else {
        // Refusing must not depend on what follows the header.
        let head = data.get(..VNET_HDR_LEN).unwrap_or(data);
        assert!(VnetHdr::parse(head).is_err());
    }
}
