use std::os::unix::fs::symlink;

use proptest::prelude::*;

use std::fs::{self, File, Permissions};
use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;

use super::*;

fn v4_env() -> SubnetEnv {
    SubnetEnv {
        network: Some("10.244.0.0/16".parse().unwrap()),
        ipv6_network: None,
        subnets: "10.244.1.0-24".parse().unwrap(),
        mtu: Mtu::new(1450).unwrap(),
        ip_masq: true,
    }
}

fn v4(list: &[&str]) -> Vec<Ipv4Net> {
    list.iter().map(|net| net.parse().unwrap()).collect()
}

#[test]
fn the_bytes_are_those_of_the_specification() {
    let v4 = include_str!("../../../tests/golden/store/subnet-v4.env");
    assert_eq!(v4_env().render(), v4);
    let dual = SubnetEnv {
        ipv6_network: Some("2001:cafe:42::/56".parse().unwrap()),
        subnets: "10.244.1.0-24&2001:cafe:42:1::-64".parse().unwrap(),
        ..v4_env()
    };
    let golden = include_str!("../../../tests/golden/store/subnet-dual.env");
    assert_eq!(dual.render(), golden);
    let no_masq = SubnetEnv {
        ip_masq: false,
        ..dual
    };
    assert_eq!(no_masq.render(), golden.replace("true", "false"));
    let v6_only = SubnetEnv {
        network: None,
        subnets: "0.0.0.0-0&2001:cafe:42:1::-64".parse().unwrap(),
        ..dual
    };
    let golden = include_str!("../../../tests/golden/store/subnet-v6.env");
    assert_eq!(v6_only.render(), golden);
}

#[test]
fn writing_makes_directories_sets_the_mode_and_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run/flannel/subnet.env");
    v4_env().write(&path).unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(fs::read_to_string(&path).unwrap(), v4_env().render());
    assert_eq!(mode(&path), 0o644);
    assert_eq!(mode(path.parent().unwrap()) & 0o755, 0o755);

    fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    SubnetEnv {
        ip_masq: false,
        ..v4_env()
    }
    .write(&path)
    .unwrap();
    assert_eq!(
        mode(&path),
        0o600,
        "the bits of the file that was there are kept"
    );
    assert!(
        fs::read_to_string(&path)
            .unwrap()
            .ends_with("IPMASQ=false\n")
    );
    assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
}

#[test]
fn a_reader_of_the_old_file_keeps_the_old_content() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("subnet.env");
    fs::write(&path, "old").unwrap();
    let mut reader = File::open(&path).unwrap();
    v4_env().write(&path).unwrap();
    let mut seen = String::new();
    reader.read_to_string(&mut seen).unwrap();
    assert_eq!(seen, "old");
}

#[test]
fn a_write_that_fails_names_the_step_and_cleans_up() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("subnet.env");
    fs::create_dir(&path).unwrap();
    fs::write(path.join("x"), "").unwrap();
    let error = v4_env().write(&path).unwrap_err();
    assert!(
        error.to_string().contains("subnet.env: cannot replace"),
        "{error}"
    );
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let error = v4_env().write(&file.join("subnet.env")).unwrap_err();
    assert!(
        error.to_string().contains("cannot create the directory"),
        "{error}"
    );
}

#[test]
fn what_is_written_is_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("subnet.env");
    assert_eq!(PreviousEnv::read(&path).unwrap(), PreviousEnv::default());
    let dual = SubnetEnv {
        ipv6_network: Some("2001:cafe:42::/56".parse().unwrap()),
        subnets: "10.244.1.0-24&2001:cafe:42:1::-64".parse().unwrap(),
        ..v4_env()
    };
    dual.write(&path).unwrap();
    let read = PreviousEnv::read(&path).unwrap();
    assert_eq!(read.networks, v4(&["10.244.0.0/16"]));
    assert_eq!(read.ipv6_networks, ["2001:cafe:42::/56".parse().unwrap()]);
    assert_eq!(read.previous(), Some(dual.subnets));
    assert_eq!(read.skipped, []);
}

#[test]
fn good_elements_are_kept_and_bad_ones_named() {
    let env =
        PreviousEnv::parse("FLANNEL_SUBNET=10.1.74.1/24,foo,10.1.75.0\nFLANNEL_NETWORK=bar\n");
    assert_eq!(env.subnets, v4(&["10.1.74.0/24"]));
    assert_eq!(env.networks, v4(&[]));
    let said: Vec<String> = env.skipped.iter().map(ToString::to_string).collect();
    assert_eq!(
        said,
        [
            "FLANNEL_NETWORK: \"bar\" is not a prefix like 10.1.74.0/24",
            "FLANNEL_SUBNET: \"foo\" is not a prefix like 10.1.74.0/24",
            "FLANNEL_SUBNET: \"10.1.75.0\" is not a prefix like 10.1.74.0/24",
        ]
    );
    let two = PreviousEnv::parse("FLANNEL_SUBNET=10.1.74.1/24,10.1.75.1/24");
    assert_eq!(two.subnets.len(), 2);
    assert_eq!(two.previous(), None);
}

#[test]
fn dotenv_syntax_is_understood() {
    for text in [
        "FLANNEL_SUBNET=10.1.74.1/24",
        "  export FLANNEL_SUBNET = 10.1.74.1/24  # ours",
        "FLANNEL_SUBNET='10.1.74.1/24' # ours",
        "FLANNEL_SUBNET=\"10.1.74.1/24\"\r\n",
        "BASE=10.1\nFLANNEL_SUBNET=$BASE.74.1/24",
        "BASE=10.1\nFLANNEL_SUBNET=\"${BASE}.74.1/24\"",
        "FLANNEL_SUBNET=10.9.9.9/24\nFLANNEL_SUBNET=10.1.74.1/24",
        "# FLANNEL_SUBNET=10.9.9.9/24\n\nFLANNEL_SUBNET=10.1.74.1$NOTHING/24",
    ] {
        let env = PreviousEnv::parse(text);
        assert_eq!(env.subnets, v4(&["10.1.74.0/24"]), "{text}");
        assert_eq!(env.skipped, [], "{text}");
    }
    let literal = PreviousEnv::parse("B=10.1\nFLANNEL_SUBNET='$B.74.1/24'");
    assert_eq!(literal.subnets, []);
    for bad in [
        "FLANNEL_SUBNET",
        "=x",
        "A B=c",
        "A='x",
        "A=\"x\" y",
        "A=\"x\\\"",
    ] {
        assert_eq!(
            PreviousEnv::parse(bad).skipped,
            [Skipped::Line { line: 1 }],
            "{bad}"
        );
    }
}

#[test]
fn doubling_variables_do_not_grow_without_bound() {
    let mut text = String::from("V0=xxxxxxxxxxxxxxxx\n");
    for i in 1..60 {
        let _infallible = writeln!(text, "V{i}=$V{}$V{}", i - 1, i - 1);
    }
    let env = PreviousEnv::parse(&text);
    assert!(
        env.skipped.contains(&Skipped::Line { line: 10 }),
        "{:?}",
        env.skipped
    );
}

#[test]
fn what_is_no_bounded_regular_file_is_refused_without_blocking() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let large = dir.path().join("large");
    fs::write(&large, vec![b'\n'; MAX_ENV_LEN + 1]).unwrap();
    let link = dir.path().join("link");
    symlink(&pipe, &link).unwrap();
    for (path, named) in [
        (&pipe, "not a regular file"),
        (&link, "not a regular file"),
        (&large, "larger than 65536"),
        (&dir.path().to_owned(), "not a regular file"),
    ] {
        let error = PreviousEnv::read(path).unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
    }
}

proptest! {
    #[test]
    fn no_text_panics(text in "[A-C=$'\"\\\\{} #\n,/.0-9]{0,80}") {
        let _env = PreviousEnv::parse(&text);
    }
}
