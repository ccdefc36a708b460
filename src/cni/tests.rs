//! The protocol without a delegate: what is refused, and how.

use std::fs;

use serde_json::Value;

use super::*;

fn call(variables: &[(&str, &str)], stdin: &str) -> (bool, Value, String) {
    let environment = Environment::new(|name| {
        let found = variables.iter().find(|(known, _)| *known == name);
        found.map(|(_, value)| OsString::from(value))
    });
    let answer = run(&environment, stdin.as_bytes());
    let json = serde_json::from_slice(&answer.stdout).unwrap_or_default();
    (answer.success, json, answer.stderr)
}

const ADD: [(&str, &str); 5] = [
    ("CNI_COMMAND", "ADD"),
    ("CNI_CONTAINERID", "c1"),
    ("CNI_NETNS", "/nowhere"),
    ("CNI_IFNAME", "eth0"),
    ("CNI_PATH", "/nowhere"),
];

fn with<'a>(changes: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
    let mut all = changes.to_vec();
    all.extend(ADD);
    all
}

#[test]
fn without_a_command_the_plugin_says_what_it_is() {
    let (success, json, stderr) = call(&[], "");
    assert!(success && json.is_null());
    assert!(
        stderr.starts_with("CNI Plugin flannel version "),
        "{stderr}"
    );
    assert!(
        stderr.ends_with(
            "CNI protocol versions supported: 0.1.0, 0.2.0, 0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0\n"
        ),
        "{stderr}"
    );
}

#[test]
fn version_lists_what_the_original_lists() {
    let (success, json, _) = call(&[("CNI_COMMAND", "VERSION")], "");
    assert!(success);
    let expected = json!({
        "cniVersion": "1.1.0",
        "supportedVersions": ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"],
    });
    assert_eq!(json, expected);
}

#[test]
fn what_a_runtime_leaves_out_or_gets_wrong_is_an_error_object() {
    let good = r#"{"name":"n","type":"flannel","cniVersion":"1.0.0"}"#;
    let long = "x".repeat(16);
    for (changes, conf, code, msg) in [
        (
            vec![("CNI_COMMAND", "DANCE")],
            good,
            4,
            "unknown CNI_COMMAND: DANCE",
        ),
        (
            vec![("CNI_NETNS", ""), ("CNI_PATH", "")],
            good,
            4,
            "required env variables [CNI_NETNS,CNI_PATH] missing",
        ),
        (
            vec![("CNI_CONTAINERID", "../../etc")],
            good,
            4,
            "CNI_CONTAINERID",
        ),
        (vec![("CNI_IFNAME", "a/b")], good, 4, "CNI_IFNAME"),
        (vec![("CNI_IFNAME", "a:b")], good, 4, "CNI_IFNAME"),
        (vec![("CNI_IFNAME", "..")], good, 4, "CNI_IFNAME"),
        (vec![("CNI_IFNAME", &long)], good, 4, "CNI_IFNAME"),
        (vec![], "{", 6, "failed to load netconf"),
        (
            vec![],
            r#"{"name":"n","cniVersion":"2.0.0"}"#,
            1,
            "incompatible CNI versions",
        ),
        (
            vec![("CNI_COMMAND", "CHECK")],
            r#"{"name":"n","cniVersion":"0.3.1"}"#,
            1,
            "config version does not allow CHECK",
        ),
        (
            vec![("CNI_COMMAND", "GC")],
            good,
            1,
            "config version does not allow GC",
        ),
        (
            vec![("CNI_COMMAND", "STATUS")],
            good,
            1,
            "config version does not allow STATUS",
        ),
        (vec![], good, 8, "CNI_NETNS: cannot open /nowhere"),
        (
            vec![("CNI_NETNS", "/proc/thread-self/ns/net")],
            good,
            8,
            "plugin's netns and netns from CNI_NETNS should not be the same",
        ),
    ] {
        let (success, json, _) = call(&with(&changes), conf);
        assert!(!success, "{changes:?} {conf}");
        assert_eq!(json["code"], code, "{json}");
        let said = json["msg"].as_str().unwrap();
        assert!(said.contains(msg), "{json}");
        assert!(json["cniVersion"].is_string(), "{json}");
    }
}

#[test]
fn a_file_that_is_not_there_yet_is_named_with_where_to_look() {
    let conf = r#"{"name":"n","subnetFile":"/nowhere/subnet.env"}"#;
    let override_netns = ("CNI_NETNS_OVERRIDE", "TRUE");
    let (success, json, _) = call(&with(&[override_netns]), conf);
    assert!(!success);
    assert_eq!(json["code"], 999);
    assert_eq!(
        json["msg"],
        "failed to load flannel 'subnet.env' file: open /nowhere/subnet.env: No such file or directory \
         (os error 2). Check the flannel pod log for this node."
    );
}

#[test]
fn del_of_what_was_never_added_succeeds() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().display();
    let conf = format!(r#"{{"name":"n","dataDir":"{data}/none"}}"#);
    let variables = with(&[("CNI_COMMAND", "DEL")]);
    assert!(call(&variables, &conf).0);
    fs::write(dir.path().join("c1"), "{ not json").unwrap();
    let conf = format!(r#"{{"name":"n","dataDir":"{data}"}}"#);
    let (success, _, stderr) = call(&variables, &conf);
    assert!(success && stderr.contains("not a network configuration"));
    assert!(dir.path().join("c1").exists());
}

#[test]
fn a_delegate_is_named_and_never_a_path() {
    let dir = tempfile::tempdir().unwrap();
    let env = dir.path().join("subnet.env");
    fs::write(
        &env,
        "FLANNEL_NETWORK=198.18.0.0/16\nFLANNEL_SUBNET=198.18.1.1/24\nFLANNEL_MTU=1400\nFLANNEL_IPMASQ=true\n",
    )
    .unwrap();
    for (delegate, msg) in [
        (
            "bridge",
            "failed to find plugin \"bridge\" in path /nowhere",
        ),
        ("../../bin/sh", "invalid plugin name"),
        ("", "invalid plugin name"),
    ] {
        let conf = json!({
            "name": "n", "subnetFile": env, "dataDir": dir.path(), "delegate": {"type": delegate},
        });
        let (success, json, _) = call(&with(&[("CNI_NETNS_OVERRIDE", "1")]), &conf.to_string());
        assert!(!success);
        assert!(json["msg"].as_str().unwrap().contains(msg), "{json}");
    }
}
