//! Owns what this node asks and writes about itself: who it is, its subnets, its annotations. Never looks at others.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, Pod};
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};

use super::annotations::Texts;
use super::failure::{Permission, explain};
use super::node::{NodeFault, subnets};
use super::settings::Identity;
use super::{Inner, Own};
use crate::config::{MAX_CONFIG_LEN, NetworkConfig};
use crate::file::read_bounded;
use crate::lease::{Lease, LeaseAttrs, LeaseExtension};
use crate::store::{Cause, LostTo, Problem, RenewError, StoreError};

/// How long the server may take for one answer.
const ANSWER: Duration = Duration::from_secs(10);

pub(super) const GET_POD: Permission = Permission {
    resource: "pods",
    verbs: "get",
};
const GET_NODE: Permission = Permission {
    resource: "nodes",
    verbs: "get",
};
const PATCH_STATUS: Permission = Permission {
    resource: "nodes/status",
    verbs: "patch",
};

impl Inner {
    pub(super) fn network_config(&self) -> Result<NetworkConfig, StoreError> {
        let path = &self.settings.net_config;
        let location = path.display().to_string();
        let text = match read_bounded(path, MAX_CONFIG_LEN) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(StoreError::ConfigMissing { location });
            }
            Err(source) => return Err(StoreError::Unavailable { location, source }),
        };
        NetworkConfig::parse_assigned(&text)
            .map_err(|source| StoreError::Config { location, source })
    }

    /// One request to the server, within bounds.
    pub(super) async fn ask<T>(
        &self,
        needs: Permission,
        request: impl Future<Output = kube::Result<T>>,
    ) -> Result<T, StoreError> {
        self.wait_our_turn().await;
        let reason = match tokio::time::timeout(ANSWER, request).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(error)) => explain(&error, needs),
            Err(_elapsed) => format!("no answer within {ANSWER:?}"),
        };
        Err(StoreError::Unavailable {
            location: self.location.clone(),
            source: std::io::Error::other(reason),
        })
    }

    /// The name of our node.
    pub(super) async fn name(&self) -> Result<&str, StoreError> {
        let name = self.name.get_or_try_init(|| async {
            let (namespace, name) = match &self.settings.identity {
                Identity::Node(name) => return Ok(name.clone()),
                Identity::Pod { namespace, name } => (namespace, name),
            };
            let pods: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
            let pod = self.ask(GET_POD, pods.get(name)).await?;
            let node = pod.spec.and_then(|spec| spec.node_name);
            node.ok_or_else(|| StoreError::Unavailable {
                location: self.location.clone(),
                source: std::io::Error::other(format!(
                    "node name not present in pod spec of '{namespace}/{name}'"
                )),
            })
        });
        name.await.map(String::as_str)
    }

    pub(super) fn nodes(&self) -> Api<Node> {
        Api::all(self.client.clone())
    }

    async fn node(&self) -> Result<Node, StoreError> {
        let name = self.name().await?;
        self.ask(GET_NODE, self.nodes().get(name)).await
    }

    /// What our Node is now, by the server's own word and not by that of a watch; `None` if it is gone.
    pub(super) async fn look_up(&self) -> Result<Option<Node>, StoreError> {
        let (name, nodes) = (self.name().await?, self.nodes());
        self.ask(GET_NODE, nodes.get_opt(name)).await
    }

    pub(super) async fn patch_status(&self, patch: &Value) -> Result<Node, StoreError> {
        let (name, nodes) = (self.name().await?, self.nodes());
        let parameters = PatchParams::default();
        let patch = Patch::Strategic(patch);
        self.ask(PATCH_STATUS, nodes.patch_status(name, &parameters, &patch))
            .await
    }

    pub(super) async fn public_ips(
        &self,
    ) -> Result<(Option<Ipv4Addr>, Option<Ipv6Addr>), StoreError> {
        let node = self.node().await?;
        let texts = node.metadata.annotations.unwrap_or_default();
        let wanted = self.settings.annotations.wanted(&texts);
        wanted.map_err(|wrong| self.fault(wrong.into()))
    }

    /// What is wrong with our own node, as an error that is worth another try.
    fn fault(&self, fault: NodeFault) -> StoreError {
        StoreError::Unusable(Problem {
            subject: format!("node {}", self.name.get().map_or("?", String::as_str)),
            cause: Cause::Node(fault),
        })
    }

    pub(super) async fn acquire(&self, attrs: LeaseAttrs) -> Result<Lease, StoreError> {
        if attrs.node().is_none() {
            return Err(StoreError::NoPublicIp);
        }
        let config = self.network_config()?;
        let node = self.node().await?;
        let subnets = subnets(&node, &config).map_err(|fault| self.fault(fault))?;
        let texts = node.metadata.annotations.unwrap_or_default();
        self.publish(&texts, &attrs).await?;
        self.own(|own| {
            *own = Some(Own {
                subnets,
                attrs: attrs.clone(),
            });
        });
        Ok(Lease {
            subnets,
            attrs,
            expires: None,
            extension: LeaseExtension::default(),
        })
    }

    /// Makes the annotations say `attrs`; `now` is what they say.
    async fn publish(&self, now: &Texts, attrs: &LeaseAttrs) -> Result<(), StoreError> {
        let changes = self.settings.annotations.changes(now, attrs);
        let changes = changes.map_err(|wrong| self.fault(wrong.into()))?;
        if changes.is_empty() {
            return Ok(());
        }
        let patch = json!({"metadata": {"annotations": changes}});
        self.patch_status(&patch).await.map(drop)
    }

    /// Whether the annotations of our node say something else than we do.
    pub(super) fn differs(&self, texts: &Texts) -> bool {
        let own = self.own(|own| own.clone());
        own.is_some_and(|own| {
            let changes = self.settings.annotations.changes(texts, &own.attrs);
            changes.is_ok_and(|changes| !changes.is_empty())
        })
    }

    /// Writes what we say about ourselves again.
    pub(super) async fn restore(&self) -> Result<(), StoreError> {
        let Some(own) = self.own(|own| own.clone()) else {
            return Ok(());
        };
        let texts = self.node().await?.metadata.annotations;
        self.publish(&texts.unwrap_or_default(), &own.attrs).await
    }

    pub(super) async fn renew(&self, lease: &Lease) -> Result<Lease, RenewError> {
        let renewed = self.acquire(lease.attrs.clone()).await?;
        if renewed.subnets == lease.subnets {
            return Ok(renewed);
        }
        Err(RenewError::Lost {
            subnets: lease.subnets,
            to: LostTo::Nobody,
        })
    }
}
