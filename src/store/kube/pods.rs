//! Owns asking for one pod by its name. Never watches pods, and never lists them.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Pod as Object, PodStatus};
use kube::Api;
use tokio::time::timeout;

use super::Inner;
use super::claim::GET_POD;
use crate::store::StoreError;
use crate::store::pods::{Pod, PodError, PodName};

/// How long an answer may take: somebody waits for it, with ten seconds for all.
const PATIENCE: Duration = Duration::from_secs(3);

impl Inner {
    pub(super) async fn pod(self: Arc<Self>, name: PodName) -> Result<Pod, PodError> {
        let pods: Api<Object> = Api::namespaced(self.client.clone(), name.namespace());
        let asked = timeout(PATIENCE, self.ask(GET_POD, pods.get_opt(name.name()))).await;
        let asked = asked.unwrap_or_else(|_elapsed| {
            Err(StoreError::Unavailable {
                location: self.location.clone(),
                source: std::io::Error::other(format!("no answer within {PATIENCE:?}")),
            })
        });
        match asked {
            Ok(Some(object)) => Ok(pod(object)),
            Ok(None) => Err(PodError::Missing(name)),
            Err(source) => Err(PodError::Store { name, source }),
        }
    }
}

/// What an object means. What it says of addresses is the node's kubelet's word; what is none is left out.
fn pod(object: Object) -> Pod {
    let spec = object.spec.unwrap_or_default();
    let status = object.status.unwrap_or_default();
    let phase = phase(&status);
    let has_ended = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
    let many = status.pod_ips.unwrap_or_default().into_iter();
    let texts = many.map(|entry| entry.ip).chain(status.pod_ip);
    let mut addrs = Vec::new();
    // Whoever ended may have given its address to another already.
    for addr in texts
        .filter(|_| !has_ended)
        .filter_map(|text| text.parse().ok())
    {
        if !addrs.contains(&addr) {
            addrs.push(addr);
        }
    }
    Pod {
        node: spec.node_name,
        addrs,
        shares_node: spec.host_network == Some(true),
        phase,
    }
}

/// The phase, and what a container waits for.
fn phase(status: &PodStatus) -> String {
    let phase = status.phase.as_deref().unwrap_or("Unknown");
    let containers = status.container_statuses.iter().flatten();
    let mut waiting = containers.filter_map(|container| {
        let waiting = container.state.as_ref()?.waiting.as_ref()?;
        waiting.reason.as_deref()
    });
    let conditions = status.conditions.iter().flatten();
    let mut unscheduled = conditions
        .filter(|condition| condition.type_ == "PodScheduled" && condition.status == "False")
        .filter_map(|condition| condition.reason.as_deref());
    match waiting.next().or(unscheduled.next()) {
        Some(why) => format!("{phase} ({why})"),
        None => phase.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(spec: &str, status: &str) -> Pod {
        let object = format!(r#"{{"spec":{{"containers":[]{spec}}},"status":{status}}}"#);
        pod(serde_json::from_str(&object).unwrap())
    }

    #[test]
    fn addresses_are_those_of_a_pod_that_has_not_ended() {
        let ips =
            r#""podIP":"198.18.1.2","podIPs":[{"ip":"198.18.1.2"},{"ip":"fd00::2"},{"ip":"x"}]"#;
        let running = of(
            r#","nodeName":"n1""#,
            &format!(r#"{{"phase":"Running",{ips}}}"#),
        );
        let texts: Vec<String> = running.addrs.iter().map(ToString::to_string).collect();
        assert_eq!(texts, ["198.18.1.2", "fd00::2"]);
        assert_eq!(
            (running.node.as_deref(), running.shares_node),
            (Some("n1"), false)
        );
        let ended = of("", &format!(r#"{{"phase":"Succeeded",{ips}}}"#));
        assert_eq!((ended.addrs.len(), ended.phase.as_str()), (0, "Succeeded"));
        let old = of(
            r#","hostNetwork":true"#,
            r#"{"phase":"Running","podIP":"192.0.2.1"}"#,
        );
        assert!(old.shares_node && old.addrs.len() == 1);
    }

    #[test]
    fn who_waits_says_for_what() {
        let waits = r#"{"phase":"Pending","containerStatuses":[{"name":"a","image":"","imageID":"","ready":false,"restartCount":0,"state":{"waiting":{"reason":"ContainerCreating"}}}]}"#;
        assert_eq!(of("", waits).phase, "Pending (ContainerCreating)");
        let homeless = r#"{"phase":"Pending","conditions":[{"type":"PodScheduled","status":"False","reason":"Unschedulable"}]}"#;
        assert_eq!(of("", homeless).phase, "Pending (Unschedulable)");
        assert_eq!(of("", "{}").phase, "Unknown");
    }
}
