use std::collections::HashMap;
use std::ffi::OsString;

use super::*;

fn parsed(line: &str, env: &[(&str, &str)]) -> Result<Invocation, clap::Error> {
    let env: HashMap<&str, &str> = env.iter().copied().collect();
    let args = line.split(' ').map(OsString::from).collect();
    parse_from(args, |name| env.get(name).map(OsString::from))
}

/// The daemon's arguments as `Debug` shows them, which is all there is to see of private fields.
fn daemon(line: &str, env: &[(&str, &str)]) -> (String, Vec<String>) {
    let invocation = parsed(line, env).unwrap();
    let Command::Daemon(args) = invocation.command else {
        panic!("{line} is no daemon");
    };
    (format!("{args:?}"), invocation.warnings)
}

fn refusal(line: &str, env: &[(&str, &str)]) -> String {
    parsed(line, env).unwrap_err().to_string()
}

#[test]
fn go_and_gnu_spellings_mean_the_same() {
    let expected = daemon(
        "loden daemon --iface=eth0 --iface=192.0.2.1 --v=2 --pin=true",
        &[],
    );
    assert!(expected.1.is_empty());
    for line in [
        "loden daemon -iface eth0 -iface 192.0.2.1 -v 2 -pin",
        "loden daemon -iface=eth0 --iface 192.0.2.1 -v=2 -pin=t",
        "loden daemon --iface eth0 -iface=192.0.2.1 --v 2 --pin",
        "flanneld -iface eth0 -iface 192.0.2.1 -v 2 -pin=True",
        "/opt/bin/flanneld --iface=eth0 --iface=192.0.2.1 -v=2 --pin=1",
        "loden daemon -iface eth0 -iface 192.0.2.1 -v 2 -pin --",
    ] {
        assert_eq!(daemon(line, &[]), expected, "{line}");
    }
}

#[test]
fn last_of_a_repeated_flag_counts_as_in_go_and_interfaces_add_up() {
    assert_eq!(
        daemon("flanneld -v 1 -iface a -v=3 -iface b -pin -pin=false", &[]),
        daemon("flanneld -iface=a -iface=b -v 3", &[])
    );
}

#[test]
fn value_that_looks_like_a_flag_is_the_value_of_the_flag_before_it() {
    let (args, _) = daemon("flanneld -iface -v -subnet-file --x", &[]);
    assert!(args.contains(r#"iface: ["-v"]"#), "{args}");
    assert!(args.contains(r#"subnet_file: "--x""#), "{args}");
}

#[test]
fn arguments_after_the_first_that_is_no_flag_are_ignored_with_a_warning() {
    let (args, warnings) = daemon("flanneld -v 1 stray -iface eth0", &[]);
    assert!(args.contains("iface: []"), "{args}");
    assert_eq!(warnings.len(), 1);
    assert!(warnings[0].ends_with("stray -iface eth0"), "{warnings:?}");
}

#[test]
fn environment_counts_unless_empty_or_the_flag_is_given() {
    let env = [
        ("FLANNELD_IFACE", "eth1"),
        ("FLANNELD_PUBLIC_IP", ""),
        ("FLANNELD_V", "1"),
        ("FLANNELD_ENGINE", "nonsense"),
    ];
    assert_eq!(
        daemon("loden daemon -v 2", &env),
        daemon("loden daemon --iface=eth1 --v=2", &[])
    );
}

#[test]
fn bad_value_from_the_environment_is_refused_by_the_name_of_the_variable() {
    let text = refusal("loden daemon", &[("FLANNELD_PUBLIC_IP", "192.0.2")]);
    assert!(text.contains("FLANNELD_PUBLIC_IP"), "{text}");
    assert!(text.contains("192.0.2"), "{text}");
    let text = refusal("loden daemon --public-ip 192.0.2", &[]);
    assert!(!text.contains("from FLANNELD"), "{text}");
}

#[test]
fn empty_values_of_templates_mean_nothing_was_given() {
    assert_eq!(
        daemon(
            "flanneld --public-ip= --public-ipv6= --iface-regex= -v=0",
            &[]
        )
        .0
        .replace("public_ip: Some(PublicIp(None))", "public_ip: None")
        .replace("public_ipv6: Some(PublicIp(None))", "public_ipv6: None")
        .replace("iface_regex: [None]", "iface_regex: []"),
        daemon("flanneld", &[]).0
    );
}

#[test]
fn nonsense_is_refused_before_anything_starts() {
    for (line, names) in [
        ("loden daemon --ifcae eth0", "--iface"),
        ("loden daemon --public-ip 224.0.0.1", "unicast"),
        ("loden daemon --public-ip 2001:db8::1", "--public-ip"),
        ("loden daemon --public-ipv6 ::", "unicast"),
        ("loden daemon --iface-regex [", "--iface-regex"),
        ("loden daemon --workers 0", "--workers"),
        ("loden daemon --engine fast", "mmsg"),
        ("loden daemon --pin=maybe", "--pin"),
        ("loden daemon --subnet-file /run/", "--subnet-file"),
        ("loden daemon -v two", "two"),
        ("loden daemon -iface", "--iface"),
        ("loden daemon -kube-subnet-mgr", "not available yet"),
        (
            "loden daemon -etcd-endpoints http://192.0.2.1",
            "etcd-endpoints",
        ),
        ("loden daemno", "daemon"),
        ("loden", "Usage"),
    ] {
        let error = parsed(line, &[]).unwrap_err();
        assert!(error.use_stderr(), "{line}");
        assert!(error.to_string().contains(names), "{line}: {error}");
    }
    let long = format!("loden daemon --status-socket /{}", "x".repeat(107));
    assert!(refusal(&long, &[]).contains("107"));
}

#[test]
fn help_and_version_are_answers_in_every_spelling() {
    for line in [
        "loden --help",
        "loden daemon --help",
        "flanneld -h",
        "flanneld -help",
        "flanneld --version",
    ] {
        assert!(!parsed(line, &[]).unwrap_err().use_stderr(), "{line}");
    }
    let help = refusal("flanneld -h", &[]);
    for flag in ["--iface", "--subnet-file", "--local-store", "--engine"] {
        assert!(help.contains(flag), "{flag}");
    }
}

#[test]
fn flannels_variables_without_a_flag_here_are_named_not_obeyed() {
    let (_, warnings) = daemon("loden daemon", &[("FLANNELD_IP_MASQ", "true")]);
    assert_eq!(warnings.len(), 1);
    assert!(warnings[0].contains("FLANNELD_IP_MASQ"), "{warnings:?}");
}

#[test]
fn derived_command_is_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn an_error_that_names_its_cause_names_it_once() {
    let denied = || std::io::Error::from(std::io::ErrorKind::PermissionDenied);
    let whole = crate::lab::Error::Io {
        doing: "create",
        thing: "/run/x".to_owned(),
        source: denied(),
    };
    assert_eq!(
        sentence(&whole.into()),
        "cannot create /run/x: permission denied"
    );
    let part = anyhow::Error::new(denied()).context("cannot listen");
    assert_eq!(sentence(&part), "cannot listen: permission denied");
}
