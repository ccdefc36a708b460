//! Who may use a real etcd, and what is said when one may not: users, roles, TLS, and endpoints that are not there.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself must fail"
)]

#[path = "common/etcd.rs"]
mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{Etcd, Follower, PREFIX, Patient, request, soon, vxlan_value};
use loden::lease::LeaseExtension;
use loden::store::etcd::EtcdSettings;
use loden::store::{AcquireRequest, Cause};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, date_time_ymd,
};

const CONFIG: &str = r#"{"Network":"198.18.0.0/16"}"#;

/// What reading the configuration says, as one line.
async fn said(settings: EtcdSettings) -> String {
    let password = settings.password.clone();
    let store = Patient::new(settings);
    let result = soon("an answer", store.network_config()).await;
    let said = result.map_or_else(|e| e.to_string(), |_| "ok".to_owned());
    assert!(password.is_empty() || !said.contains(&password), "{said}");
    let shown = format!("{:?}", store.0);
    assert!(!shown.contains(&password) || password.is_empty());
    said
}

#[test]
fn endpoints_that_are_not_there_are_each_named_with_their_reason() {
    let etcd = Etcd::start();
    etcd.configure(CONFIG);
    etcd.run(async || {
        let with = |endpoints: &str| EtcdSettings {
            endpoints: endpoints.to_owned(),
            ..etcd.settings()
        };
        assert_eq!(
            said(with("http://192.0.2.1:4001")).await,
            "http://192.0.2.1:4001: connection refused: is etcd running there?"
        );
        assert_eq!(
            said(with("http://etcd.invalid:2379")).await,
            "http://etcd.invalid:2379: no such host"
        );
        let unreachable = said(with("http://203.0.113.9:2379")).await;
        assert!(
            unreachable
                .starts_with("http://203.0.113.9:2379: cannot be reached: Network is unreachable"),
            "{unreachable}"
        );
        let several = said(with("http://192.0.2.1:4001,http://etcd.invalid:2379")).await;
        for part in [
            "http://192.0.2.1:4001: connection refused",
            "http://etcd.invalid:2379: no such host",
        ] {
            assert!(several.contains(part), "{several}");
        }
        // One that works is enough, wherever it is in the list; as with flannel's default.
        assert_eq!(
            said(with("http://192.0.2.1:4001,http://192.0.2.1:2379")).await,
            "ok"
        );
        assert_eq!(
            said(with("192.0.2.1:2379,http://etcd.invalid:1")).await,
            "ok"
        );
        // It ends or resets the connection, as its bytes and ours meet.
        let plain = said(with("https://192.0.2.1:2379")).await;
        let begin = "https://192.0.2.1:2379: it closed the connection at once (";
        assert!(plain.starts_with(begin), "{plain}");
        assert!(
            plain.ends_with("if it does not speak TLS, use http://"),
            "{plain}"
        );
        // A user who is not asked for does no harm.
        let user = EtcdSettings {
            username: "joe".to_owned(),
            password: "secret1".to_owned(),
            ..etcd.settings()
        };
        assert_eq!(said(user).await, "ok");
    });
}

#[test]
fn users_and_their_roles_decide_and_passwords_are_never_said() {
    let mut etcd = Etcd::start();
    etcd.configure(CONFIG);
    for command in [
        "user add root:secret0",
        "role add network",
        &format!("role grant-permission network --prefix=true readwrite {PREFIX}/"),
        "role add leases",
        &format!("role grant-permission leases readwrite {PREFIX}/config"),
        &format!("role grant-permission leases --prefix=true readwrite {PREFIX}/subnets/"),
        "role add nothing",
        "user add full:secret1",
        "user grant-role full network",
        "user add some:secret2",
        "user grant-role some leases",
        "user add none:secret3",
        "user grant-role none nothing",
        "auth enable",
    ] {
        let words: Vec<&str> = command.split(' ').collect();
        etcd.ctl(&words);
    }
    etcd.ctl = vec!["--user".to_owned(), "root:secret0".to_owned()];
    etcd.run(async || {
        let user = |name: &str, password: &str| EtcdSettings {
            username: name.to_owned(),
            password: password.to_owned(),
            ..etcd.settings()
        };
        let at = "http://192.0.2.1:2379: ";
        assert_eq!(said(user("full", "secret1")).await, "ok");
        assert_eq!(
            said(user("full", "guessed")).await,
            format!("{at}wrong user name or password for user \"full\": check --etcd-username and --etcd-password")
        );
        assert_eq!(
            said(user("none", "secret3")).await,
            format!("{at}user \"none\" may not do this: grant its role read and write on the prefix")
        );
        assert_eq!(
            said(user("", "")).await,
            format!("{at}it wants a user: give --etcd-username and --etcd-password")
        );

        // A role for flannel's own keys alone is enough, but for the extension.
        let store = Patient::new(user("some", "secret2"));
        let mut follower = Follower::new(store.watch());
        let wanted = AcquireRequest { extension: LeaseExtension { ecn: true }, ..request(1) };
        let lease = store.acquire(wanted).await.unwrap();
        follower.until("our lease", |f| f.leases.contains_key(&lease.subnets)).await;
        assert!(!follower.leases[&lease.subnets].extension.ecn);
        store.renew(&lease).await.unwrap();
        etcd.put("subnets/198.18.200.0-24", &vxlan_value(2));
        follower.until("another", |f| f.has("198.18.200.0-24")).await;
        assert_eq!(follower.problems, []);

        // A role that is taken away while we watch.
        etcd.ctl(&["user", "revoke-role", "some", "leases"]);
        let error = store.renew(&lease).await.unwrap_err().to_string();
        assert!(error.contains("user \"some\" may not do this"), "{error}");
        let mut late = Follower::new(store.watch());
        late.until("the reason", |f| !f.problems.is_empty()).await;
        let Cause::Away(reason) = &late.problems[0].cause else {
            unreachable!("{:?}", late.problems)
        };
        assert!(reason.contains("user \"some\" may not do this"), "{reason}");
        etcd.ctl(&["user", "grant-role", "some", "leases"]);
        late.until("the snapshot", |f| f.leases.len() == 2).await;
    });
}

#[test]
fn a_session_survives_a_restart_that_forgets_its_token() {
    let mut etcd = Etcd::start();
    etcd.configure(CONFIG);
    for command in ["user add root:secret0", "auth enable"] {
        let words: Vec<&str> = command.split(' ').collect();
        etcd.ctl(&words);
    }
    etcd.ctl = vec!["--user".to_owned(), "root:secret0".to_owned()];
    let netns = etcd.netns().clone();
    let settings = EtcdSettings {
        username: "root".to_owned(),
        password: "secret0".to_owned(),
        ..etcd.settings()
    };
    let store = Patient::new(settings);
    common::run_in(&netns, async || {
        let mut follower = Follower::new(store.watch());
        let lease = store.acquire(request(1)).await.unwrap();
        follower.until("our lease", |f| f.leases.len() == 1).await;
        etcd.kill(0);
        etcd.spawn(0);
        etcd.await_health();
        store.network_config().await.unwrap();
        store.renew(&lease).await.unwrap();
        etcd.put("subnets/198.18.200.0-24", &vxlan_value(2));
        follower
            .until("another", |f| f.has("198.18.200.0-24"))
            .await;
        assert_eq!(follower.withdrawn, []);
    });
}

/// An authority, and what it signed, as files.
struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn file(&self, dir: &Path, name: &str) -> PathBuf {
        let path = dir.join(name);
        fs::write(&path, self.0.pem()).unwrap();
        path
    }

    /// A certificate for `names` until the end of `year`, and its key.
    fn sign(&self, dir: &Path, name: &str, names: &[&str], year: i32) -> (PathBuf, PathBuf) {
        let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.not_after = date_time_ymd(year, 12, 31);
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.0).unwrap();
        let (cert_file, key_file) = (
            dir.join(format!("{name}.crt")),
            dir.join(format!("{name}.key")),
        );
        fs::write(&cert_file, cert.pem()).unwrap();
        fs::write(&key_file, key.serialize_pem()).unwrap();
        (cert_file, key_file)
    }
}

/// An etcd with this certificate, that asks for clients' certificates if `clients` says whose.
fn tls_etcd(ca: &Path, (cert, key): &(PathBuf, PathBuf), clients: Option<&Path>) -> Etcd {
    let text = |path: &Path| path.display().to_string();
    let mut arguments = vec![
        "--cert-file".to_owned(),
        text(cert),
        "--key-file".to_owned(),
        text(key),
    ];
    if let Some(ca) = clients {
        arguments.extend([
            "--client-cert-auth".to_owned(),
            "--trusted-ca-file".to_owned(),
            text(ca),
        ]);
    }
    Etcd::cluster_with_ctl(
        1,
        "https",
        &arguments,
        &[
            "--cacert".to_owned(),
            text(ca),
            "--cert".to_owned(),
            text(cert),
            "--key".to_owned(),
            text(key),
        ],
    )
}

#[test]
fn a_server_is_verified_by_the_authority_alone_and_each_failure_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let (authority, stranger) = (Authority::new("ours"), Authority::new("theirs"));
    let (ca, other_ca) = (
        authority.file(dir, "ca.pem"),
        stranger.file(dir, "other.pem"),
    );
    let server = authority.sign(dir, "server", &["192.0.2.1", "etcd.example"], 2090);
    let etcd = tls_etcd(&ca, &server, None);
    etcd.configure(CONFIG);
    etcd.run(async || {
        let with = |endpoints: &str, ca: Option<&PathBuf>| EtcdSettings {
            endpoints: endpoints.to_owned(),
            ca_file: ca.cloned(),
            ..etcd.settings()
        };
        let url = "https://192.0.2.1:2379";
        assert_eq!(said(with(url, Some(&ca))).await, "ok");
        assert_eq!(said(with("192.0.2.1:2379", Some(&ca))).await, "ok");
        let unknown = format!("{url}: its certificate is signed by an authority that is not trusted: check --etcd-cafile");
        assert_eq!(said(with(url, Some(&other_ca))).await, unknown);
        assert_eq!(said(with(url, None)).await, unknown);
        assert_eq!(
            said(with("https://127.0.0.1:2379,", Some(&ca))).await,
            "https://127.0.0.1:2379: connection refused: is etcd running there?"
        );
        let plain = said(with("http://192.0.2.1:2379", None)).await;
        assert!(plain.starts_with("http://192.0.2.1:2379: it closed the connection at once")
                && plain.ends_with("if it speaks TLS, use https://"), "{plain}");

        // Renewed files count from the next connection on.
        let file = dir.join("rotating.pem");
        fs::copy(&other_ca, &file).unwrap();
        let store = Patient::new(with(url, Some(&file)));
        assert!(store.network_config().await.is_err());
        fs::copy(&ca, &file).unwrap();
        store.network_config().await.unwrap();
    });
}

#[test]
fn a_certificate_for_another_name_or_of_another_time_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let authority = Authority::new("ours");
    let ca = authority.file(dir, "ca.pem");
    for (name, names, year, reason) in [
        (
            "elsewhere",
            "192.0.2.77",
            2090,
            "its certificate is for another name",
        ),
        ("old", "192.0.2.1", 2001, "its certificate has expired"),
    ] {
        let server = authority.sign(dir, name, &[names], year);
        let arguments = [
            "--cert-file".to_owned(),
            server.0.display().to_string(),
            "--key-file".to_owned(),
            server.1.display().to_string(),
        ];
        let skip = [
            "--insecure-skip-tls-verify".to_owned(),
            "--insecure-transport=false".to_owned(),
        ];
        let etcd = Etcd::cluster_with_ctl(1, "https", &arguments, &skip);
        let settings = EtcdSettings {
            ca_file: Some(ca.clone()),
            ..etcd.settings()
        };
        let said = etcd.run(async || said(settings).await);
        assert!(
            said.starts_with(&format!("https://192.0.2.1:2379: {reason}")),
            "{said}"
        );
    }
}

#[test]
fn a_server_that_wants_a_client_certificate_gets_one() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let (authority, stranger) = (Authority::new("ours"), Authority::new("theirs"));
    let ca = authority.file(dir, "ca.pem");
    let server = authority.sign(dir, "server", &["192.0.2.1"], 2090);
    let client = authority.sign(dir, "client", &["node"], 2090);
    let false_client = stranger.sign(dir, "false", &["node"], 2090);
    let etcd = tls_etcd(&ca, &server, Some(&ca));
    etcd.configure(CONFIG);
    etcd.run(async || {
        let with = |identity: Option<&(PathBuf, PathBuf)>| EtcdSettings {
            ca_file: Some(ca.clone()),
            cert_file: identity.map(|i| i.0.clone()),
            key_file: identity.map(|i| i.1.clone()),
            ..etcd.settings()
        };
        assert_eq!(said(with(Some(&client))).await, "ok");
        let without = said(with(None)).await;
        assert!(without.contains("client certificate"), "{without}");
        let wrong = said(with(Some(&false_client))).await;
        assert!(wrong.contains("accept our client certificate"), "{wrong}");
        let lease = Patient::new(with(Some(&client))).acquire(request(1)).await;
        assert!(lease.is_ok());
    });
}
