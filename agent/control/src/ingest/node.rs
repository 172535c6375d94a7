//! Node and Pod.

use k8s_openapi::api::core::v1 as core;
use serde::Deserialize;
use std::collections::BTreeMap;

use super::Origin;
use super::field::{Subject, is_name, quote};
use crate::Skipped;
use crate::model::{Node, NodeTunnel, Pod, parse_mac};

/// Flannel's annotations, one pair per underlay family
/// (flannel pkg/subnet/kube/annotations.go): tunnel facts, underlay address.
const FLANNEL: [(&str, &str); 2] = [
    ("flannel.alpha.coreos.com/backend-data", "flannel.alpha.coreos.com/public-ip"),
    ("flannel.alpha.coreos.com/backend-v6-data", "flannel.alpha.coreos.com/public-ipv6"),
];
/// Flannel's annotation: the backend; only `vxlan` is a tunnel of ours.
const FLANNEL_TYPE: &str = "flannel.alpha.coreos.com/backend-type";

/// Flannel's tunnel facts (pkg/backend/vxlan: vxlanLeaseAttrs).
#[derive(Deserialize)]
struct FlannelData {
    #[serde(rename = "VNI", default = "FlannelData::default_vni")]
    vni: u32,
    #[serde(rename = "VtepMAC")]
    vtep_mac: String,
}

impl FlannelData {
    /// Older releases do not write it.
    fn default_vni() -> u32 {
        1
    }
}

/// The model of a Node.
pub fn node(origin: &Origin, object: &core::Node, skipped: &mut Vec<Skipped>) -> Option<Node> {
    let (mut subject, name) = Subject::of(origin, "Node", &object.metadata, skipped)?;
    subject.title = format!("Node {}", name.name);
    let mut addresses = Vec::new();
    let listed = object.status.as_ref().and_then(|s| s.addresses.as_ref());
    for (i, address) in listed.into_iter().flatten().enumerate() {
        if matches!(address.type_.as_str(), "InternalIP" | "ExternalIP") {
            let field = format!("status.addresses[{i}].address");
            if let Some(ip) = subject.address(&field, &address.address, skipped)
                && !addresses.contains(&ip)
            {
                addresses.push(ip);
            }
        }
    }
    let spec = object.spec.as_ref();
    let cidrs: Vec<&String> = match spec.and_then(|s| s.pod_cidrs.as_ref()) {
        Some(list) if !list.is_empty() => list.iter().collect(),
        _ => spec.and_then(|s| s.pod_cidr.as_ref()).into_iter().collect(),
    };
    let mut pod_cidrs = Vec::new();
    for (i, text) in cidrs.into_iter().enumerate() {
        pod_cidrs.extend(subject.cidr(&format!("spec.podCIDRs[{i}]"), text, skipped));
    }
    let tunnels = match &object.metadata.annotations {
        Some(annotations) => tunnels(&subject, annotations, skipped),
        None => Vec::new(),
    };
    Some(Node { name: name.name, origin: origin.clone(), addresses, pod_cidrs, tunnels })
}

fn tunnels(
    subject: &Subject<'_>,
    annotations: &BTreeMap<String, String>,
    skipped: &mut Vec<Skipped>,
) -> Vec<NodeTunnel> {
    if annotations.get(FLANNEL_TYPE).is_some_and(|t| t != "vxlan") {
        return Vec::new();
    }
    let mut tunnels = Vec::new();
    for (data_name, ip_name) in FLANNEL {
        // Flannel writes `null` for a family that it does not run.
        let Some(data) = annotations.get(data_name).filter(|text| *text != "null") else {
            continue;
        };
        let field = |name: &str| format!("metadata.annotations[{name}]");
        let facts = serde_json::from_str::<FlannelData>(data)
            .ok()
            .filter(|facts| facts.vni < 1 << 24)
            .and_then(|facts| Some((facts.vni, parse_mac(&facts.vtep_mac)?)));
        let Some((vni, mac)) = facts.filter(|(_, mac)| !mac.is_group() && !mac.is_zero()) else {
            skipped.push(
                subject
                    .error(field(data_name), format!("{} is not readable", quote(data)))
                    .remedy("Flannel writes {\"VNI\":1,\"VtepMAC\":\"aa:bb:cc:dd:ee:ff\"}"),
            );
            continue;
        };
        let text = annotations.get(ip_name).map_or("", String::as_str);
        if let Some(underlay) = subject.address(&field(ip_name), text, skipped) {
            tunnels.push(NodeTunnel { vni, mac, underlay });
        }
    }
    tunnels
}

/// The model of a Pod; `None` for one that has ended, because its address may be another's by now.
pub fn pod(origin: &Origin, object: &core::Pod, skipped: &mut Vec<Skipped>) -> Option<Pod> {
    let (subject, name) = Subject::of(origin, "Pod", &object.metadata, skipped)?;
    let status = object.status.as_ref();
    if matches!(status.and_then(|s| s.phase.as_deref()), Some("Succeeded" | "Failed")) {
        return None;
    }
    let mut texts: Vec<&str> = status
        .and_then(|s| s.pod_ips.as_ref())
        .into_iter()
        .flatten()
        .map(|pod_ip| pod_ip.ip.as_str())
        .collect();
    if texts.is_empty() {
        texts.extend(status.and_then(|s| s.pod_ip.as_deref()).filter(|ip| !ip.is_empty()));
    }
    let addresses = subject.addresses("status.podIPs", texts, skipped);
    let spec = object.spec.as_ref();
    Some(Pod {
        name,
        origin: origin.clone(),
        node: spec
            .and_then(|s| s.node_name.as_deref())
            .filter(|node| is_name(node))
            .map(Into::into),
        host_network: spec.and_then(|s| s.host_network).unwrap_or(false),
        addresses,
    })
}
