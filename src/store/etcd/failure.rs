//! Owns why etcd could not do something: finds the cause in the layers of errors of the client, and says it with
//! the endpoint and the remedy. Never shows a password.

use std::error::Error;
use std::io;
use std::time::Duration;

use rustls::{AlertDescription, CertificateError};

use crate::store::StoreError;

/// How deep errors are nested at most before looking stops.
const DEPTH: usize = 16;

/// What happened at one endpoint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{endpoint}: {cause}")]
pub(super) struct Failure {
    pub(super) endpoint: String,
    pub(super) cause: FailureCause,
}

/// What stands in the way.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum FailureCause {
    #[error("connection refused: is etcd running there?")]
    Refused,
    #[error("no such host")]
    NoSuchHost,
    #[error("cannot be reached: {0}")]
    Unreachable(String),
    #[error("no answer within {0:?}")]
    TimedOut(Duration),
    #[error("the connection was closed: {0}")]
    Closed(String),
    /// TLS 1.3 has a server refuse a client only after the handshake, so that the reason may be lost.
    #[error("it closed the connection at once ({said}): {hint}")]
    ClosedAtOnce { said: String, hint: &'static str },
    #[error("the etcd cluster has no leader: more than half of its members must be running")]
    NoLeader,
    #[error("its certificate is signed by an authority that is not trusted: check --etcd-cafile")]
    UnknownAuthority,
    #[error("its certificate is for another name: use a name or address that it lists")]
    WrongName,
    #[error("its certificate has expired, or the clock of this machine is wrong")]
    Expired,
    #[error("its certificate is not valid yet, or the clock of this machine is wrong")]
    NotValidYet,
    #[error("it wants a client certificate: give --etcd-certfile and --etcd-keyfile")]
    ClientCertificateWanted,
    #[error("it does not accept our client certificate: {0}")]
    ClientCertificateRefused(String),
    #[error("TLS: {0}")]
    Tls(String),
    #[error("it does not speak TLS: use http:// if that is meant")]
    NotTls,
    #[error(
        "wrong user name or password for user {0:?}: check --etcd-username and --etcd-password"
    )]
    WrongPassword(String),
    #[error("it wants a user: give --etcd-username and --etcd-password")]
    UserWanted,
    #[error("{0} may not do this: grant its role read and write on the prefix")]
    PermissionDenied(String),
    #[error("authentication is not enabled")]
    AuthNotEnabled,
    #[error("the revision is compacted")]
    Compacted,
    #[error("the revision lies in the future")]
    FutureRevision,
    #[error("etcd says: {0}")]
    Server(String),
    #[error("{0}")]
    Local(String),
}

impl FailureCause {
    /// Whether asking again soon is in vain: somebody has to repair something first.
    pub(super) const fn needs_repair(&self) -> bool {
        matches!(
            self,
            Self::UnknownAuthority
                | Self::WrongName
                | Self::Expired
                | Self::NotValidYet
                | Self::ClientCertificateWanted
                | Self::ClientCertificateRefused(_)
                | Self::WrongPassword(_)
                | Self::UserWanted
                | Self::PermissionDenied(_)
                | Self::Local(_)
        )
    }

    /// Adds to a connection that was closed as soon as it was made what may be behind it.
    pub(super) fn at_once(self, tls: bool, identity: bool) -> Self {
        let Self::Closed(said) = self else {
            return self;
        };
        let hint = match (tls, identity) {
            (false, _) => "if it speaks TLS, use https://",
            (true, _) if said == "tls handshake eof" => "if it does not speak TLS, use http://",
            // A server that does not speak TLS and closes with bytes of ours unread resets the connection, too.
            (true, false) => {
                "if it wants a client certificate, give --etcd-certfile and --etcd-keyfile; if it does not speak TLS, use http://"
            }
            (true, true) => {
                "it may not accept our client certificate, --etcd-certfile; if it does not speak TLS, use http://"
            }
        };
        Self::ClosedAtOnce { said, hint }
    }

    /// Whether it is the answer of a server that works.
    pub(super) const fn is_answer(&self) -> bool {
        matches!(
            self,
            Self::PermissionDenied(_) | Self::Compacted | Self::FutureRevision
        )
    }

    const fn kind(&self) -> io::ErrorKind {
        match self {
            Self::Refused => io::ErrorKind::ConnectionRefused,
            Self::NoSuchHost | Self::Unreachable(_) => io::ErrorKind::HostUnreachable,
            Self::TimedOut(_) => io::ErrorKind::TimedOut,
            Self::Closed(_) | Self::ClosedAtOnce { .. } => io::ErrorKind::ConnectionReset,
            Self::WrongPassword(_) | Self::UserWanted | Self::PermissionDenied(_) => {
                io::ErrorKind::PermissionDenied
            }
            Self::NoLeader
            | Self::UnknownAuthority
            | Self::WrongName
            | Self::Expired
            | Self::NotValidYet
            | Self::ClientCertificateWanted
            | Self::ClientCertificateRefused(_)
            | Self::Tls(_)
            | Self::NotTls
            | Self::AuthNotEnabled
            | Self::Compacted
            | Self::FutureRevision
            | Self::Server(_)
            | Self::Local(_) => io::ErrorKind::Other,
        }
    }

    /// Finds the cause in what the client returned.
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "all others come from the client itself, not from a server"
    )]
    pub(super) fn of(error: &etcd_client::Error, user: Option<&str>) -> Self {
        match error {
            // What a server says has nothing beneath it.
            etcd_client::Error::GRpcStatus(status) if status.source().is_none() => {
                Self::of_message(status.message(), user)
            }
            etcd_client::Error::GRpcStatus(status) => {
                Self::beneath(status).unwrap_or_else(|| Self::Closed(deepest(status)))
            }
            etcd_client::Error::TransportError(transport) => {
                Self::beneath(transport).unwrap_or_else(|| Self::Closed(deepest(transport)))
            }
            etcd_client::Error::IoError(error) => {
                Self::beneath(error).unwrap_or_else(|| Self::Closed(error.to_string()))
            }
            other => Self::Local(other.to_string()),
        }
    }

    /// What etcd says, in the words of its `rpctypes`; also the reason for which it cancels a watch.
    pub(super) fn of_message(message: &str, user: Option<&str>) -> Self {
        let says = |text: &str| message.contains(text);
        if says("no leader") {
            Self::NoLeader
        } else if says("authentication failed") {
            Self::WrongPassword(user.unwrap_or_default().to_owned())
        } else if says("user name is empty") {
            Self::UserWanted
        } else if says("permission denied") {
            Self::PermissionDenied(user.map_or_else(
                || "whoever has no user".to_owned(),
                |user| format!("user {user:?}"),
            ))
        } else if says("authentication is not enabled") {
            Self::AuthNotEnabled
        } else if says("has been compacted") {
            Self::Compacted
        } else if says("is a future revision") {
            Self::FutureRevision
        } else if message.is_empty() {
            Self::Closed("without a word".to_owned())
        } else {
            Self::Server(message.to_owned())
        }
    }

    /// Looks for an error of the system or of TLS beneath the layers.
    fn beneath(top: &(dyn Error + 'static)) -> Option<Self> {
        let mut layer = Some(top);
        for _ in 0..DEPTH {
            let error = layer?;
            if let Some(tls) = error.downcast_ref::<rustls::Error>() {
                return Some(Self::of_tls(tls));
            }
            if let Some(io) = error.downcast_ref::<io::Error>() {
                // The source of an I/O error is the source of what it carries, which is left out.
                match io.get_ref() {
                    Some(carried) => {
                        if let Some(found) = Self::beneath(carried) {
                            return Some(found);
                        }
                    }
                    None => return Some(Self::of_io(io)),
                }
            }
            if error.to_string() == "dns error" {
                return Some(Self::NoSuchHost);
            }
            layer = error.source();
        }
        None
    }

    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "what the system says is passed on"
    )]
    fn of_io(error: &io::Error) -> Self {
        let text = error.to_string();
        match error.kind() {
            io::ErrorKind::ConnectionRefused => Self::Refused,
            io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => {
                Self::Unreachable(text)
            }
            io::ErrorKind::TimedOut => Self::Unreachable("connection timed out".to_owned()),
            _ => Self::Closed(text),
        }
    }

    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "the rest is rare, and passed on as it is"
    )]
    fn of_tls(error: &rustls::Error) -> Self {
        match error {
            rustls::Error::InvalidCertificate(why) => match why {
                CertificateError::UnknownIssuer => Self::UnknownAuthority,
                CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                    Self::Expired
                }
                CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                    Self::NotValidYet
                }
                CertificateError::NotValidForName
                | CertificateError::NotValidForNameContext { .. } => Self::WrongName,
                other => Self::Tls(format!("its certificate is not usable: {other}")),
            },
            rustls::Error::AlertReceived(AlertDescription::CertificateRequired) => {
                Self::ClientCertificateWanted
            }
            // Go answers this, in TLS 1.2 and 1.3, to a missing and to a wrong certificate.
            rustls::Error::AlertReceived(
                alert @ (AlertDescription::BadCertificate
                | AlertDescription::UnknownCA
                | AlertDescription::CertificateExpired
                | AlertDescription::CertificateUnknown),
            ) => Self::ClientCertificateRefused(format!("{alert:?}")),
            rustls::Error::InvalidMessage(_) => Self::NotTls,
            other => Self::Tls(other.to_string()),
        }
    }
}

/// The text of the innermost error.
fn deepest(top: &(dyn Error + 'static)) -> String {
    let mut innermost = top;
    for _ in 0..DEPTH {
        match innermost.source() {
            Some(source) => innermost = source,
            None => break,
        }
    }
    innermost.to_string()
}

/// What happened at the endpoints that were tried; at least one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failures(pub(super) Vec<Failure>);

impl Failures {
    /// Whether asking again soon is in vain at every endpoint.
    pub(super) fn need_repair(&self) -> bool {
        self.0.iter().all(|failure| failure.cause.needs_repair())
    }
}

impl std::fmt::Display for Failures {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (n, failure) in self.0.iter().enumerate() {
            let separator = if n == 0 { "" } else { "; " };
            write!(f, "{separator}{failure}")?;
        }
        Ok(())
    }
}

impl Error for Failures {}

impl From<Failure> for Failures {
    fn from(failure: Failure) -> Self {
        Self(vec![failure])
    }
}

impl From<Failures> for StoreError {
    fn from(failures: Failures) -> Self {
        match <[Failure; 1]>::try_from(failures.0) {
            Ok([failure]) => failure.into(),
            Err(many) => {
                let kind = many.first().map(|failure| failure.cause.kind());
                Self::Unavailable {
                    location: "etcd".to_owned(),
                    source: io::Error::new(kind.unwrap_or(io::ErrorKind::Other), Failures(many)),
                }
            }
        }
    }
}

impl From<Failure> for StoreError {
    fn from(Failure { endpoint, cause }: Failure) -> Self {
        Self::Unavailable {
            location: endpoint,
            source: io::Error::new(cause.kind(), cause),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_etcd_says_is_understood() {
        let of = |message| FailureCause::of_message(message, Some("joe"));
        assert_eq!(of("etcdserver: no leader"), FailureCause::NoLeader);
        assert_eq!(
            of("etcdserver: authentication failed, invalid user ID or password"),
            FailureCause::WrongPassword("joe".to_owned())
        );
        assert_eq!(
            of("etcdserver: user name is empty"),
            FailureCause::UserWanted
        );
        assert_eq!(
            of("rpc error: code = PermissionDenied desc = etcdserver: permission denied"),
            FailureCause::PermissionDenied("user \"joe\"".to_owned())
        );
        assert_eq!(
            of("etcdserver: mvcc: required revision has been compacted"),
            FailureCause::Compacted
        );
        assert_eq!(
            of("etcdserver: mvcc: required revision is a future revision"),
            FailureCause::FutureRevision
        );
        assert_eq!(of("boo"), FailureCause::Server("boo".to_owned()));
    }

    #[test]
    fn an_error_of_the_system_is_found_beneath_others() {
        let refused = io::Error::from_raw_os_error(libc::ECONNREFUSED);
        let wrapped = io::Error::other(io::Error::other(refused));
        assert_eq!(FailureCause::beneath(&wrapped), Some(FailureCause::Refused));
        let tls = rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer);
        let wrapped = io::Error::new(io::ErrorKind::InvalidData, tls);
        assert_eq!(
            FailureCause::beneath(&wrapped),
            Some(FailureCause::UnknownAuthority)
        );
        assert_eq!(FailureCause::beneath(&io::Error::other("x")), None);
    }

    #[test]
    fn several_endpoints_are_all_named() {
        let failure = |endpoint: &str, cause| Failure {
            endpoint: endpoint.to_owned(),
            cause,
        };
        let both = Failures(vec![
            failure("http://a:1", FailureCause::Refused),
            failure("http://b:1", FailureCause::NoSuchHost),
        ]);
        assert_eq!(
            StoreError::from(both).to_string(),
            "etcd: http://a:1: connection refused: is etcd running there?; http://b:1: no such host"
        );
    }
}
