//! Owns what an operator says about etcd: endpoints, TLS files, user. Never connects.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use etcd_client::{Certificate, ConnectOptions, Identity, TlsOptions};

/// How a TLS handshake may take at most; a frozen server accepts connections.
const HANDSHAKE: Duration = Duration::from_secs(3);

/// Where systems keep the certificates of public authorities; the places where Go programs, and so flannel,
/// look. The first that exists counts.
const SYSTEM_ROOTS: [&str; 5] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/tls/cacert.pem",
    "/etc/ssl/cert.pem",
];

/// Which etcd to use, and how; flannel's options of the same names.
#[derive(Clone, Default)]
pub struct EtcdSettings {
    /// `--etcd-endpoints`: a comma list of `http://host:port`, `https://host:port` or `host:port`, which uses
    /// TLS if any is configured.
    pub endpoints: String,
    /// `--etcd-prefix`.
    pub prefix: String,
    /// `--etcd-cafile`: who may sign the servers' certificates. Without it, the authorities the system trusts.
    pub ca_file: Option<PathBuf>,
    /// `--etcd-certfile`: our certificate, for servers that ask for one.
    pub cert_file: Option<PathBuf>,
    /// `--etcd-keyfile`: its key.
    pub key_file: Option<PathBuf>,
    /// `--etcd-username`. Used if there is a password too.
    pub username: String,
    /// `--etcd-password`. Never shown.
    pub password: String,
}

impl fmt::Debug for EtcdSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let endpoints: Vec<String> = self.endpoints.split(',').map(without_user).collect();
        f.debug_struct("EtcdSettings")
            .field("endpoints", &endpoints)
            .field("prefix", &self.prefix)
            .field("ca_file", &self.ca_file)
            .field("cert_file", &self.cert_file)
            .field("key_file", &self.key_file)
            .field("username", &self.username)
            .field("password", &Redacted(&self.password))
            .finish()
    }
}

struct Redacted<'a>(&'a str);

impl fmt::Debug for Redacted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "none" } else { "***" })
    }
}

/// An endpoint without the credentials that somebody may have put into it.
fn without_user(endpoint: &str) -> String {
    let (scheme, rest) = endpoint
        .split_once("://")
        .map_or(("", endpoint), |(scheme, rest)| (scheme, rest));
    let host = rest.rsplit_once('@').map_or(rest, |(_user, host)| host);
    if scheme.is_empty() {
        host.to_owned()
    } else {
        format!("{scheme}://{host}")
    }
}

/// Why settings cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EtcdSettingsError {
    /// There is no endpoint.
    #[error("--etcd-endpoints names no endpoint: give one like http://127.0.0.1:2379")]
    NoEndpoint,
    /// One endpoint cannot be read.
    #[error(
        "--etcd-endpoints: {endpoint:?} is not of the form http://host:port, https://host:port or host:port"
    )]
    Endpoint {
        /// The endpoint.
        endpoint: String,
    },
    /// One of two files that only make sense together.
    #[error(
        "a client certificate needs its key: give both --etcd-certfile and --etcd-keyfile, or neither"
    )]
    HalfIdentity,
    /// A TLS file cannot be read.
    #[error("{option} {}: {source}", path.display())]
    File {
        /// The option that names it.
        option: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The system has no certificates of public authorities.
    #[error("no file with the certificates that this system trusts was found: give --etcd-cafile")]
    NoSystemRoots,
}

/// One server to connect to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Endpoint {
    /// With scheme, without credentials: to connect to and to show.
    pub(super) url: String,
    host: String,
    pub(super) tls: bool,
}

impl Endpoint {
    fn parse(text: &str, tls_by_default: bool) -> Option<Self> {
        let shown = without_user(text);
        let (tls, authority) = match shown.split_once("://") {
            Some(("http", rest)) => (false, rest),
            Some(("https", rest)) => (true, rest),
            Some(_) => return None,
            None => (tls_by_default, shown.as_str()),
        };
        let authority = authority.trim_end_matches('/');
        let (host, port) = match authority.strip_prefix('[') {
            Some(rest) => {
                let (host, port) = rest.split_once(']')?;
                host.parse::<std::net::Ipv6Addr>().ok()?;
                (host, port.strip_prefix(':'))
            }
            None => match authority.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (authority, None),
            },
        };
        let named = |c: char| c.is_ascii_alphanumeric() || "-._:".contains(c);
        let good_port = port.is_none_or(|port| port.parse::<u16>().is_ok());
        if host.is_empty() || !host.chars().all(named) || !good_port {
            return None;
        }
        let scheme = if tls { "https" } else { "http" };
        Some(Self {
            url: format!("{scheme}://{authority}"),
            host: host.to_owned(),
            tls,
        })
    }
}

impl EtcdSettings {
    /// The endpoints, at least one.
    pub(super) fn parse_endpoints(&self) -> Result<Vec<Endpoint>, EtcdSettingsError> {
        let tls = self.ca_file.is_some() || (self.cert_file.is_some() && self.key_file.is_some());
        let endpoints = self
            .endpoints
            .split(',')
            .map(str::trim)
            .filter(|text| !text.is_empty())
            .map(|text| {
                Endpoint::parse(text, tls).ok_or_else(|| EtcdSettingsError::Endpoint {
                    endpoint: without_user(text),
                })
            })
            .collect::<Result<Vec<_>, _>>()?;
        if endpoints.is_empty() {
            return Err(EtcdSettingsError::NoEndpoint);
        }
        Ok(endpoints)
    }

    /// The user, if one is to be authenticated.
    pub(super) fn user(&self) -> Option<(&str, &str)> {
        let both = !self.username.is_empty() && !self.password.is_empty();
        both.then_some((&self.username, &self.password))
    }

    /// What it takes to connect to `endpoint`. Reads the TLS files anew, so that renewed ones are used.
    pub(super) fn connect_options(
        &self,
        endpoint: &Endpoint,
    ) -> Result<ConnectOptions, EtcdSettingsError> {
        let options = ConnectOptions::new()
            .with_connect_timeout(HANDSHAKE)
            // A member cut off from the others must not pretend that nothing happens.
            .with_require_leader(true)
            .with_auto_token_refresh(true);
        if endpoint.tls {
            Ok(options.with_tls(self.tls(endpoint)?))
        } else {
            Ok(options)
        }
    }

    fn tls(&self, endpoint: &Endpoint) -> Result<TlsOptions, EtcdSettingsError> {
        let roots = match &self.ca_file {
            Some(path) => read("--etcd-cafile", path)?,
            None => {
                let path = SYSTEM_ROOTS
                    .iter()
                    .map(Path::new)
                    .find(|path| path.exists())
                    .ok_or(EtcdSettingsError::NoSystemRoots)?;
                read("the system's certificates", path)?
            }
        };
        let tls = TlsOptions::new()
            .domain_name(endpoint.host.as_str())
            .ca_certificate(Certificate::from_pem(roots))
            .timeout(HANDSHAKE);
        match (&self.cert_file, &self.key_file) {
            (Some(cert), Some(key)) => {
                let cert = read("--etcd-certfile", cert)?;
                let key = read("--etcd-keyfile", key)?;
                Ok(tls.identity(Identity::from_pem(cert, key)))
            }
            (None, None) => Ok(tls),
            (Some(_), None) | (None, Some(_)) => Err(EtcdSettingsError::HalfIdentity),
        }
    }
}

fn read(option: &'static str, path: &Path) -> Result<Vec<u8>, EtcdSettingsError> {
    std::fs::read(path).map_err(|source| EtcdSettingsError::File {
        option,
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn urls(endpoints: &str, ca: bool) -> Result<Vec<String>, String> {
        let settings = EtcdSettings {
            endpoints: endpoints.to_owned(),
            ca_file: ca.then(|| PathBuf::from("/nowhere")),
            ..EtcdSettings::default()
        };
        settings
            .parse_endpoints()
            .map(|all| all.into_iter().map(|e| e.url).collect())
            .map_err(|e| e.to_string())
    }

    #[test]
    fn endpoints_are_read_as_flannel_reads_them() {
        assert_eq!(
            urls("http://127.0.0.1:4001,http://127.0.0.1:2379", false).unwrap(),
            ["http://127.0.0.1:4001", "http://127.0.0.1:2379"]
        );
        assert_eq!(
            urls("https://etcd.example:2379/, [2001:db8::1]:2379", false).unwrap(),
            ["https://etcd.example:2379", "http://[2001:db8::1]:2379"]
        );
        assert_eq!(
            urls("etcd:2379,http://etcd:1", true).unwrap(),
            ["https://etcd:2379", "http://etcd:1"]
        );
    }

    #[test]
    fn what_is_no_endpoint_is_named() {
        for text in ["", ",", " "] {
            assert!(urls(text, false).unwrap_err().contains("no endpoint"));
        }
        for text in [
            "unix:///run/etcd",
            "http://",
            "http://a:99999",
            "http://[x]:1",
            "a b:1",
            "::1:2379",
        ] {
            let error = urls(text, false).unwrap_err();
            assert!(error.contains("--etcd-endpoints"), "{text}: {error}");
        }
    }

    #[test]
    fn a_password_is_shown_nowhere() {
        let settings = EtcdSettings {
            endpoints: "http://joe:hidden@etcd:1,x://joe:hidden@e".to_owned(),
            username: "joe".to_owned(),
            password: "hidden".to_owned(),
            ..EtcdSettings::default()
        };
        let shown = format!("{settings:?} {:?}", settings.parse_endpoints());
        assert!(
            !shown.contains("hidden") && shown.contains("***"),
            "{shown}"
        );
        let error = settings.parse_endpoints().unwrap_err().to_string();
        assert!(!error.contains("hidden"), "{error}");
    }

    #[test]
    fn half_an_identity_matters_only_with_tls() {
        let settings = EtcdSettings {
            endpoints: "http://a:1,https://b:1".to_owned(),
            cert_file: Some(PathBuf::from("/nowhere")),
            ..EtcdSettings::default()
        };
        let endpoints = settings.parse_endpoints().unwrap();
        assert!(settings.connect_options(&endpoints[0]).is_ok());
        assert!(settings.connect_options(&endpoints[1]).is_err());
    }

    #[test]
    fn a_file_that_cannot_be_read_is_named_with_its_option() {
        let settings = EtcdSettings {
            endpoints: "https://b:1".to_owned(),
            ca_file: Some(PathBuf::from("/nowhere/ca.pem")),
            ..EtcdSettings::default()
        };
        let endpoints = settings.parse_endpoints().unwrap();
        let error = settings.connect_options(&endpoints[0]).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("--etcd-cafile /nowhere/ca.pem: No such file"),
            "{error}"
        );
    }
}
