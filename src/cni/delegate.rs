//! Owns the configuration that the delegate gets: the original's JSON, specification section 12.4. Pure.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::conf::NetConf;
use super::error::{CONFIGURATION, CniError};
use super::subnet_env::PodEnv;

/// The delegate unless another is named.
const BRIDGE: &str = "bridge";

/// A route of the input, as the protocol has it; unknown members are left out, as the original does.
#[derive(Serialize, Deserialize)]
struct Route {
    dst: IpNet,
    #[serde(skip_serializing_if = "Option::is_none")]
    gw: Option<IpAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mtu: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    advmss: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    priority: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    table: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    scope: Option<i64>,
}

/// The program that `delegate.type` names.
///
/// # Errors
///
/// If it is not a text.
pub(super) fn plugin(delegate: &Map<String, Value>) -> Result<&str, CniError> {
    match delegate.get("type") {
        None => Ok(BRIDGE),
        Some(Value::String(name)) => Ok(name),
        Some(_) => Err(refused(
            "'delegate' dictionary, if present, must have (string) 'type' field",
        )),
    }
}

/// What the delegate is asked to do for this node.
///
/// # Errors
///
/// The first member of `delegate` or `ipam` that the original refuses.
pub fn config(conf: &NetConf, env: &PodEnv) -> Result<Map<String, Value>, CniError> {
    let mut delegate = conf.delegate.clone();
    let plugin = plugin(&delegate)?.to_owned();
    for member in ["name", "ipam"] {
        if delegate.contains_key(member) {
            return Err(refused(format!(
                "'delegate' dictionary must not have '{member}' field, it'll be set by flannel"
            )));
        }
    }
    if let Some(given) = &conf.runtime_config {
        delegate.insert("runtimeConfig".into(), given.clone().into());
    }
    delegate.insert("name".into(), conf.name.clone().into());
    let mut default = |key: &str, value: Value| {
        delegate.entry(key).or_insert(value);
    };
    default("ipMasq", (!env.ip_masq).into());
    default("mtu", env.mtu.into());
    if plugin == BRIDGE {
        default("isGateway", true.into());
    }
    default("type", plugin.into());
    if let Some(version) = &conf.cni_version {
        delegate.insert("cniVersion".into(), version.clone().into());
    }
    delegate.insert("ipam".into(), ipam(conf, env)?.into());
    Ok(delegate)
}

fn ipam(conf: &NetConf, env: &PodEnv) -> Result<Map<String, Value>, CniError> {
    let mut ipam = conf.ipam.clone();
    ipam.entry("type").or_insert("host-local".into());
    let subnets = [env.subnet.map(IpNet::V4), env.ipv6_subnet.map(IpNet::V6)];
    let ranges = subnets.iter().flatten();
    ipam.insert(
        "ranges".into(),
        ranges.map(|subnet| json!([{ "subnet": subnet }])).collect(),
    );
    let mut routes = match ipam.remove("routes") {
        None | Some(Value::Null) => Vec::new(),
        Some(given) => serde_json::from_value::<Vec<Route>>(given).map_err(|e| {
            refused(format!(
                "failed to parse ipam.routes: {e}: give a list of {{\"dst\": PREFIX}}"
            ))
        })?,
    };
    let networks = env.networks.iter().copied().map(IpNet::V4);
    let networks = networks.chain(env.ipv6_networks.iter().copied().map(IpNet::V6));
    routes.extend(networks.map(|dst| Route {
        dst,
        gw: None,
        mtu: None,
        advmss: None,
        priority: None,
        table: None,
        scope: None,
    }));
    ipam.insert("routes".into(), json!(routes));
    Ok(ipam)
}

fn refused(msg: impl Into<String>) -> CniError {
    CniError::new(CONFIGURATION, msg)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENV: &str = "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.17.1/24\nFLANNEL_MTU=1472\n\
                       FLANNEL_IPMASQ=true\n";

    fn generate(conf: &str, env: &str) -> Result<String, CniError> {
        let conf = NetConf::parse(conf.as_bytes()).unwrap();
        let config = config(&conf, &PodEnv::parse(env).unwrap())?;
        Ok(serde_json::to_string(&config).unwrap())
    }

    #[test]
    fn the_example_of_the_specification_comes_out_to_the_byte() {
        assert_eq!(
            generate(r#"{"name":"cni-flannel","type":"flannel"}"#, ENV).unwrap(),
            r#"{"ipMasq":false,"ipam":{"ranges":[[{"subnet":"10.1.17.0/24"}]],"routes":[{"dst":"10.1.0.0/16"}],"type":"host-local"},"isGateway":true,"mtu":1472,"name":"cni-flannel","type":"bridge"}"#
        );
    }

    #[test]
    fn what_the_manifest_asks_for_is_passed_through_and_what_is_missing_added() {
        let env = "FLANNEL_NETWORK=10.1.0.0/16,10.2.0.0/16\nFLANNEL_SUBNET=10.1.17.1/24\n\
                   FLANNEL_IPV6_NETWORK=fd00::/48\nFLANNEL_IPV6_SUBNET=fd00:0:0:17::1/64\nFLANNEL_MTU=1450\n\
                   FLANNEL_IPMASQ=false\n";
        let conf = r#"{"name":"cbr0","cniVersion":"0.3.1","type":"flannel",
            "runtimeConfig":{"portMappings":[]},
            "ipam":{"dataDir":"/x","ranges":"overwritten","routes":[{"dst":"192.0.2.9/24","gw":"10.1.17.9","mtu":9,"table":0,"colour":1}]},
            "delegate":{"hairpinMode":true,"isDefaultGateway":true,"mtu":1400,"cniVersion":"9"}}"#;
        assert_eq!(
            generate(conf, env).unwrap(),
            r#"{"cniVersion":"0.3.1","hairpinMode":true,"ipMasq":true,"ipam":{"dataDir":"/x","ranges":[[{"subnet":"10.1.17.0/24"}],[{"subnet":"fd00:0:0:17::/64"}]],"routes":[{"dst":"192.0.2.9/24","gw":"10.1.17.9","mtu":9,"table":0},{"dst":"10.1.0.0/16"},{"dst":"10.2.0.0/16"},{"dst":"fd00::/48"}],"type":"host-local"},"isDefaultGateway":true,"isGateway":true,"mtu":1400,"name":"cbr0","runtimeConfig":{"portMappings":[]},"type":"bridge"}"#
        );
    }

    #[test]
    fn another_delegate_is_no_gateway() {
        let json = generate(
            r#"{"name":"n","delegate":{"type":"ptp","isGateway":7}}"#,
            ENV,
        )
        .unwrap();
        assert!(
            json.contains(r#""isGateway":7"#) && json.contains(r#""type":"ptp""#),
            "{json}"
        );
        let json = generate(r#"{"name":"n","delegate":{"type":"ptp"}}"#, ENV).unwrap();
        assert!(!json.contains("isGateway"), "{json}");
    }

    #[test]
    fn what_the_original_refuses_is_refused_by_name() {
        for (conf, named) in [
            (r#"{"name":"n","delegate":{"type":1}}"#, "'type'"),
            (r#"{"name":"n","delegate":{"name":"x"}}"#, "'name'"),
            (r#"{"name":"n","delegate":{"ipam":{}}}"#, "'ipam'"),
            (
                r#"{"name":"n","ipam":{"routes":[{"dst":"x"}]}}"#,
                "ipam.routes",
            ),
            (r#"{"name":"n","ipam":{"routes":{}}}"#, "ipam.routes"),
        ] {
            let error = generate(conf, ENV).unwrap_err();
            assert!(error.code == 7 && error.msg.contains(named), "{error}");
        }
    }
}
