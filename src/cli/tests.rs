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
    // The name of a switch is written otherwise.
    let text = refusal("flanneld", &[("FLANNELD_IP_MASQ", "yes")]);
    assert!(text.contains("from FLANNELD_IP_MASQ"), "{text}");
    assert!(!text.contains("loden <COMMAND>"), "{text}");
}

#[test]
fn usage_is_that_of_the_name_the_program_was_called_by() {
    for (line, usage) in [
        ("flanneld -h", "Usage: flanneld [OPTIONS]"),
        ("/opt/bin/flanneld --nope", "Usage: flanneld [OPTIONS]"),
        ("loden daemon --nope", "Usage: loden daemon [OPTIONS]"),
        (
            "/run/mk-docker-opts.sh -x",
            "Usage: mk-docker-opts.sh [OPTIONS]",
        ),
        ("install-conf --help", "Usage: install-conf SRC DEST"),
    ] {
        let text = refusal(line, &[]);
        assert!(text.contains(usage), "{line}: {text}");
    }
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
        ("flanneld -subnet-lease-renew-margin 0", "1 to 1439"),
        ("flanneld -subnet-lease-renew-margin 1440", "1 to 1439"),
        ("flanneld -iptables-resync 0", "--iptables-resync"),
        ("flanneld -healthz-port 65536", "--healthz-port"),
        ("flanneld -healthz-ip node1", "--healthz-ip"),
        ("flanneld -ip-masq=yes", "true or false"),
        ("flanneld -version=perhaps", "--version"),
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
        "loden --version",
    ] {
        assert!(!parsed(line, &[]).unwrap_err().use_stderr(), "{line}");
    }
    let help = refusal("flanneld -h", &[]);
    for flag in ["--iface", "--subnet-file", "--local-store", "--engine"] {
        assert!(help.contains(flag), "{flag}");
    }
}

/// The store that a line chooses, as `Debug` shows it, or why none.
fn store(line: &str, env: &[(&str, &str)]) -> String {
    let invocation = parsed(line, env).unwrap();
    let Command::Daemon(args) = invocation.command else {
        panic!("{line} is no daemon");
    };
    match args.into_options(invocation.as_flanneld) {
        Ok(options) => format!("{:?}", options.store),
        Err(error) => error.to_string(),
    }
}

#[test]
fn store_is_etcd_for_flanneld_and_with_any_flag_of_etcd_and_a_directory_otherwise() {
    let default = r#"["http://127.0.0.1:4001", "http://127.0.0.1:2379"]"#;
    for (line, env, expected) in [
        ("flanneld", &[][..], default),
        ("flanneld", &[], r#"prefix: "/coreos.com/network""#),
        ("loden daemon", &[], r#"Local("/var/lib/loden")"#),
        ("loden daemon --local-store /x", &[], r#"Local("/x")"#),
        ("flanneld --local-store=/x", &[], r#"Local("/x")"#),
        ("loden daemon --etcd-prefix /p", &[], default),
        ("loden daemon -etcd-cafile=", &[], "Local"),
        ("loden daemon", &[("FLANNELD_ETCD_USERNAME", "u")], default),
        (
            "flanneld -etcd-endpoints=https://u:secret@192.0.2.1:2379",
            &[("FLANNELD_ETCD_ENDPOINTS", "http://192.0.2.9")],
            r#"["https://192.0.2.1:2379"]"#,
        ),
        (
            "flanneld --local-store /x --etcd-prefix /p",
            &[],
            "leave out one",
        ),
        (
            "flanneld -kube-subnet-mgr",
            &[],
            "POD_NAME and POD_NAMESPACE must be set",
        ),
        (
            "flanneld",
            &[("FLANNELD_KUBE_SUBNET_MGR", "t")],
            "or NODE_NAME",
        ),
        ("flanneld -kube-subnet-mgr=false", &[], default),
    ] {
        let text = store(line, env);
        assert!(text.contains(expected), "{line}: {text}");
        assert!(!text.contains("secret"), "{text}");
    }
}

#[test]
fn every_flag_of_flannel_and_its_variable_are_understood() {
    // Specification section 1.2, each with a value that is not the default.
    let flags = [
        ("etcd-endpoints", "http://192.0.2.1:2379"),
        ("etcd-prefix", "/other"),
        ("etcd-keyfile", "/k"),
        ("etcd-certfile", "/c"),
        ("etcd-cafile", "/a"),
        ("etcd-username", "u"),
        ("etcd-password", "p"),
        ("kube-subnet-mgr", "true"),
        ("kube-api-url", "https://192.0.2.1"),
        ("kube-annotation-prefix", "x"),
        ("kubeconfig-file", "/f"),
        ("net-config-path", "/n"),
        ("set-node-network-unavailable", "false"),
        ("iface", "eth7"),
        ("iface-regex", "eth."),
        ("iface-can-reach", "192.0.2.9"),
        ("public-ip", "192.0.2.3"),
        ("public-ipv6", "2001:db8::3"),
        ("subnet-file", "/s"),
        ("subnet-lease-renew-margin", "0x20"),
        ("ip-masq", "true"),
        ("ip-masq-fully-random-disable", "true"),
        ("iptables-forward-rules", "false"),
        ("iptables-resync", "07"),
        ("ip-blackhole-route", "T"),
        ("healthz-ip", "127.0.0.1"),
        ("healthz-port", "8080"),
        ("v", "2"),
        ("vmodule", "main=3"),
        ("log_backtrace_at", "main.go:1"),
    ];
    let (default, _) = daemon("flanneld", &[]);
    for (flag, value) in flags {
        let (given, _) = daemon(&format!("flanneld -{flag}={value}"), &[]);
        assert_ne!(given, default, "{flag}");
        let variable = format!("FLANNELD_{}", flag.to_uppercase().replace('-', "_"));
        let (from_env, _) = daemon("flanneld", &[(&variable, value)]);
        assert_eq!(from_env, given, "{variable}");
        let (empty, _) = daemon("flanneld", &[(&variable, "")]);
        assert_eq!(empty, default, "{variable}");
    }
}

#[test]
fn every_flag_is_among_what_was_understood() {
    let invocation = parsed("flanneld -iface eth7", &[("FLANNELD_V", "1")]).unwrap();
    let text = format!("{:?}", invocation.understood);
    let command = DaemonArgs::augment_args(clap::Command::new(DAEMON));
    let shown = command.get_arguments().filter(|arg| !arg.is_hide_set());
    for flag in shown.filter_map(|arg| arg.get_long()) {
        assert!(text.contains(&format!("flag: {flag:?}")), "{flag}: {text}");
    }
    for origin in [
        r#"flag: "iface", value: "eth7", origin: "flag""#,
        r#"flag: "v", value: "1", origin: "environment FLANNELD_V""#,
        r#"flag: "ip-masq", value: "false", origin: "default""#,
        r#"flag: "public-ip", value: "", origin: "not given""#,
    ] {
        assert!(text.contains(origin), "{origin}: {text}");
    }
}

#[test]
fn password_is_shown_nowhere() {
    let invocation = parsed("flanneld -etcd-username u -etcd-password hunter2", &[]).unwrap();
    let text = format!("{invocation:?}");
    assert!(!text.contains("hunter2"), "{text}");
    assert!(text.contains("***"), "{text}");
}

#[test]
fn version_is_asked_for_on_the_command_line_alone() {
    for line in [
        "flanneld -version",
        "flanneld --version=1 -v 2",
        "loden daemon -version",
    ] {
        let invocation = parsed(line, &[]).unwrap();
        assert!(matches!(invocation.command, Command::Version), "{line}");
    }
    for (line, env) in [
        ("flanneld -version=false", &[][..]),
        ("flanneld", &[("FLANNELD_VERSION", "true")]),
    ] {
        let invocation = parsed(line, env).unwrap();
        assert!(matches!(invocation.command, Command::Daemon(_)), "{line}");
    }
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
