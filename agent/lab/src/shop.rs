//! The application of the demonstration: a shop of twelve Services and a name service, as ordinary
//! Kubernetes objects in `manifests/`, and the pods that stand behind them.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use crate::plan::Plan;
use crate::{Agent, Family, LabError, LabSpec, NodeSpec, PodSpec};

/// The Services.
pub const SERVICES: &str = include_str!("../manifests/services.yaml");
/// Their EndpointSlices.
pub const ENDPOINTS: &str = include_str!("../manifests/endpoints.yaml");

/// Name, TCP ports, UDP ports of each pod, by node. The order gives the addresses, which
/// `endpoints.yaml` repeats (a test compares).
type PodRow = (&'static str, &'static [u16], &'static [u16]);
const PODS: [&[PodRow]; 2] = [
    &[
        ("frontend-1", &[8080], &[]),
        ("cartservice-1", &[7070], &[]),
        ("checkoutservice-1", &[5050], &[]),
        ("currencyservice-1", &[7000], &[]),
        ("adservice-1", &[9555], &[]),
        ("emailservice-1", &[8080], &[]),
        ("redis-cart-1", &[6379], &[]),
        ("nameservice-1", &[5353], &[5353]),
    ],
    &[
        ("frontend-2", &[8080], &[]),
        ("cartservice-2", &[7070], &[]),
        ("currencyservice-2", &[7000], &[]),
        ("productcatalogservice-1", &[3550], &[]),
        ("recommendationservice-1", &[8080], &[]),
        ("paymentservice-1", &[50051], &[]),
        ("shippingservice-1", &[50051], &[]),
        ("nameservice-2", &[5353], &[5353]),
    ],
];

/// Two nodes with the shop's pods, no agent.
pub fn spec() -> LabSpec {
    let nodes = PODS.iter().map(|pods| NodeSpec {
        agent: Agent::None,
        pods: pods
            .iter()
            .map(|(name, tcp, udp)| PodSpec {
                name: (*name).to_owned(),
                tcp_ports: tcp.to_vec(),
                udp_ports: udp.to_vec(),
            })
            .collect(),
    });
    LabSpec { nodes: nodes.collect(), ..LabSpec::kernel_only(0, 0) }
}

/// Writes the shop's objects and the Nodes of a lab into a directory.
///
/// # Errors
/// The directory is not writable.
pub fn write_objects(dir: &Path, plan: &Plan, spec: &LabSpec) -> Result<(), LabError> {
    write_nodes(dir, plan, spec)?;
    for (name, text) in [("services.yaml", SERVICES), ("endpoints.yaml", ENDPOINTS)] {
        let path = dir.join(name);
        fs::write(&path, text).map_err(LabError::io(format!("write {}", path.display())))?;
    }
    Ok(())
}

/// Writes the Nodes of a lab alone.
///
/// # Errors
/// The directory is not writable.
pub fn write_nodes(dir: &Path, plan: &Plan, spec: &LabSpec) -> Result<(), LabError> {
    let path = dir.join("nodes.yaml");
    fs::create_dir_all(dir)
        .and_then(|()| fs::write(&path, nodes_yaml(plan, spec)))
        .map_err(LabError::io(format!("write {}", path.display())))
}

/// The Nodes of a lab as YAML, with the annotations that Flannel puts on them.
pub fn nodes_yaml(plan: &Plan, spec: &LabSpec) -> String {
    let (public, data) = match spec.underlay {
        Family::V4 => ("public-ip", "backend-data"),
        Family::V6 => ("public-ipv6", "backend-v6-data"),
    };
    let mut text = String::new();
    for node in &plan.nodes {
        // Writing to a String does not fail.
        let _ = write!(
            text,
            "---\n\
             apiVersion: v1\n\
             kind: Node\n\
             metadata:\n\
             \x20 name: {name}\n\
             \x20 annotations:\n\
             \x20   flannel.alpha.coreos.com/backend-type: vxlan\n\
             \x20   flannel.alpha.coreos.com/{public}: \"{outer}\"\n\
             \x20   flannel.alpha.coreos.com/{data}: '{{\"VNI\":{vni},\"VtepMAC\":\"{mac}\"}}'\n\
             spec:\n\
             \x20 podCIDR: {cidr_v4}\n\
             \x20 podCIDRs: [{cidr_v4}, \"{cidr_v6}\"]\n\
             status:\n\
             \x20 addresses:\n\
             \x20   - {{type: InternalIP, address: {v4}}}\n\
             \x20   - {{type: InternalIP, address: \"{v6}\"}}\n\
             \x20   - {{type: Hostname, address: {name}}}\n",
            name = node.name,
            outer = node.address(spec.underlay),
            v4 = node.address_v4,
            v6 = node.address_v6,
            vni = spec.vni,
            mac = node.vxlan_mac,
            cidr_v4 = node.pod_cidr_v4,
            cidr_v6 = node.pod_cidr_v6,
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_stand_where_the_lab_puts_their_pods() {
        let name = "t".parse().expect("legal");
        let plan = Plan::new(&name, &spec());
        let mut seen = std::collections::BTreeSet::new();
        let lines: Vec<&str> = ENDPOINTS.lines().collect();
        for entry in lines.windows(4).filter(|entry| entry[0].starts_with("  - addresses: [")) {
            let address = entry[0]["  - addresses: [".len()..].trim_matches(['"', ']']);
            let address: std::net::IpAddr = address.parse().expect("an address");
            let node_name = entry[2].trim().strip_prefix("nodeName: ").expect("a node");
            let pod_name = entry[3].split("name: ").nth(1).and_then(|rest| rest.split(',').next());
            let (node, pod) = plan.pod(pod_name.expect("a pod")).expect("a pod of the lab");
            assert_eq!(node.name, node_name, "{}", pod.name);
            assert!([pod.v4.into(), pod.v6.into()].contains(&address), "{}: {address}", pod.name);
            seen.insert((pod.name.clone(), address));
        }
        assert_eq!(seen.len(), 2 * 16, "every pod in both families");
    }
}
