//! Owns taking secrets out of text that leaves the node. Rather takes too much than too little.

use std::borrow::Cow;
use std::sync::LazyLock;

use regex::bytes::Regex;

/// What stands where a secret was.
const HIDDEN: &str = "***";

/// What is called a secret.
macro_rules! called {
    ($before:literal, $behind:literal) => {
        concat!(
            "(?i-u)(",
            $before,
            "[a-z0-9_.-]*(?:password|passwd|passphrase|token|secret|api[_-]?key|key[_-]data|private[_-]?key|credential)\
             [a-z0-9_.-]*",
            $behind
        )
    };
}

/// What a secret looks like, and what is kept of it. Each is a constant that a test compiles.
const PATTERNS: [(&str, &str); 7] = [
    // Keys in PEM, whatever their kind.
    (
        "(?s-u)-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----.*?(-----END [A-Z0-9 ]*PRIVATE KEY-----|$)",
        "***",
    ),
    // The user of a URL, and of an endpoint that is given without a scheme.
    ("(?-u)://[^/ \t\r\n\"'@]+@", "://***@"),
    ("(?-u)[^/ \t\r\n\0\"'@,=:]+:[^/ \t\r\n\0\"'@,=]+@", "***@"),
    // An HTTP authorisation.
    ("(?i-u)(bearer|basic)[ \t]+[a-z0-9._~+/=-]+", "$1 ***"),
    // A flag in a command line as /proc has it, whose values may hold anything.
    (called!("-", ")([=\0])[^\0]*\0"), "$1$2***\0"),
    // As a variable or another flag, whose values end with the word.
    (
        called!("", "[ \t]*=[ \t]*)(\"[^\"]*\"|'[^']*'|[^ \t\r\n\0]+)"),
        "$1***",
    ),
    // In JSON or YAML, or behind a space.
    (
        called!(
            "",
            "\"?)([ \t]*:[ \t]*|[ \t]+|\0)(\"[^\"]*\"|'[^']*'|[^ \t\r\n\0,}]+)"
        ),
        "$1$2***",
    ),
];

static RULES: LazyLock<Vec<(Regex, &str)>> = LazyLock::new(|| {
    let rules = PATTERNS
        .iter()
        .filter_map(|&(pattern, kept)| Some((Regex::new(pattern).ok()?, kept)));
    rules.collect()
});

/// The same without what looks like a secret; nothing at all if that cannot be told.
pub(super) fn redact(text: &[u8]) -> Cow<'_, [u8]> {
    if RULES.len() != PATTERNS.len() {
        return Cow::Borrowed(HIDDEN.as_bytes());
    }
    let mut text = Cow::Borrowed(text);
    for (rule, kept) in RULES.iter() {
        if let Cow::Owned(replaced) = rule.replace_all(&text, kept.as_bytes()) {
            text = Cow::Owned(replaced);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn redacted(text: &str) -> String {
        assert_eq!(RULES.len(), PATTERNS.len());
        String::from_utf8(redact(text.as_bytes()).into_owned()).unwrap()
    }

    #[test]
    fn secrets_of_every_form_are_taken_out_and_what_they_belong_to_stays() {
        for (text, expected) in [
            (
                "--etcd-password hunter2 --iface eth0",
                "--etcd-password *** --iface eth0",
            ),
            ("--etcd-password=hunter2 x", "--etcd-password=*** x"),
            (
                "--etcd-password\0hunter2\0--iface",
                "--etcd-password\0***\0--iface",
            ),
            (
                "FLANNELD_ETCD_PASSWORD=hunter2\n",
                "FLANNELD_ETCD_PASSWORD=***\n",
            ),
            (
                r#"{"password": "hunter 2", "a": 1}"#,
                r#"{"password": ***, "a": 1}"#,
            ),
            // The value is one argument, whatever is in it.
            (
                "loden\0--etcd-password\0hun ter,2\0--iface\0eth0\0",
                "loden\0--etcd-password\0***\0--iface\0eth0\0",
            ),
            (
                "loden\0-etcd-password=hun ter,2\0-v\0",
                "loden\0-etcd-password=***\0-v\0",
            ),
            (
                "FLANNELD_ETCD_PASSWORD=hunter,2}\n",
                "FLANNELD_ETCD_PASSWORD=***\n",
            ),
            (
                "--etcd-endpoints=me:hunter2@a:2379,b:2379",
                "--etcd-endpoints=***@a:2379,b:2379",
            ),
            ("token: eyJhbGciOi.x.y\nuser: me", "token: ***\nuser: me"),
            ("client-key-data: LS0tLS1C", "client-key-data: ***"),
            (
                "https://me:hunter2@etcd.example:2379/x",
                "https://***@etcd.example:2379/x",
            ),
            (
                "http://one@a:1,http://two:2@b:2",
                "http://***@a:1,http://***@b:2",
            ),
            ("Authorization: Bearer abc.def", "Authorization: Bearer ***"),
        ] {
            assert_eq!(redacted(text), expected);
        }
        let pem =
            "a\n-----BEGIN EC PRIVATE KEY-----\nMHcCAQEE\nIB\n-----END EC PRIVATE KEY-----\nb";
        assert_eq!(redacted(pem), "a\n***\nb");
        assert_eq!(redacted("x -----BEGIN PRIVATE KEY-----\ncut off"), "x ***");
    }

    #[test]
    fn what_is_no_secret_stays() {
        for text in [
            "198.18.1.0/24 via 192.0.2.2 dev eth0 onlink",
            "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----",
            "udp dport 8285 counter packets 3 bytes 99 drop",
            r#"{"reach":"answers","rtt_us":12}"#,
            "5: p1@if4: <UP> mtu 1500 link/ether 02:00:5e:10:00:01",
            "http://127.0.0.1:2379/v3?a@b",
        ] {
            assert_eq!(redacted(text), text);
        }
    }
}
