//! From the plan to devices, addresses, routes and sysctls. Namespaces exist already.
//!
//! Work on different namespaces runs side by side: the kernel's own locks are the limit then.

use std::thread;

use crate::ip::{Batch, offloads};
use crate::pass::PassProgram;
use crate::plan::{
    BRIDGE, CLIENT_V4, CLIENT_V6, HOST_INTERFACE, NodePlan, POD_GATEWAY_MAC, POD_GATEWAY_V4,
    POD_GATEWAY_V6, Plan, PodPlan, SERVICE_CIDRS, UNDERLAY_MTU, UPLINK, VXLAN_DEVICE, pod_mtu,
};
use crate::{LabError, LabSpec, Netns, interrupt};

/// The fabric's end of the client's veth.
const CLIENT_PORT: &str = "to-client";

/// Builds everything inside the namespaces.
pub fn build(plan: &Plan, spec: &LabSpec) -> Result<(), LabError> {
    side_by_side(plan.hosts().into_iter().map(|(_, netns)| {
        let forwards = plan.nodes.iter().any(|node| node.netns == *netns);
        move || host_sysctls(netns, forwards, spec)
    }))?;
    fabric(plan)?;
    side_by_side(plan.nodes.iter().map(|node| move || build_node(node, plan, spec)))?;
    let pods = plan.nodes.iter().flat_map(|node| &node.pods);
    side_by_side(pods.map(|pod| move || build_pod(pod, spec)))?;
    client(plan, spec)?;
    if spec.fabric_xdp {
        let ports: Vec<String> = plan.nodes.iter().map(NodePlan::fabric_port).collect();
        PassProgram::load()?.attach(&plan.fabric, &ports)?;
    }
    interrupt::check()
}

/// Runs pieces of work in threads and returns the first error, after all have ended.
fn side_by_side<W>(work: impl Iterator<Item = W>) -> Result<(), LabError>
where
    W: FnOnce() -> Result<(), LabError> + Send,
{
    interrupt::check()?;
    let results: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = work.map(|piece| scope.spawn(piece)).collect();
        threads.into_iter().map(|thread| thread.join()).collect()
    });
    for result in results {
        match result {
            Ok(done) => done?,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
    Ok(())
}

/// Settings that devices inherit, so they come before the first device.
fn host_sysctls(netns: &Netns, forwards: bool, spec: &LabSpec) -> Result<(), LabError> {
    let rp_filter = if forwards { spec.rp_filter.as_str() } else { "0" };
    let mut settings = vec![
        // Duplicate address detection would keep every address unusable for a second.
        ("ipv6/conf/default/accept_dad", "0"),
        ("ipv6/conf/all/accept_dad", "0"),
        ("ipv6/conf/default/accept_ra", "0"),
        ("ipv6/conf/default/disable_ipv6", "0"),
    ];
    if forwards {
        // ip_forward resets other settings of the namespace, so it is first of them.
        settings.push(("ipv4/ip_forward", "1"));
        settings.push(("ipv6/conf/all/forwarding", "1"));
        settings.push(("ipv6/conf/default/forwarding", "1"));
    }
    // The stricter of `all` and the device counts, so both must be said.
    settings.push(("ipv4/conf/all/rp_filter", rp_filter));
    settings.push(("ipv4/conf/default/rp_filter", rp_filter));
    netns.sysctls(&settings)
}

fn fabric(plan: &Plan) -> Result<(), LabError> {
    let mut ip = Batch::default();
    ip.add("link set lo up");
    ip.add(format!(
        "link add {BRIDGE} mtu {UNDERLAY_MTU} type bridge stp_state 0 forward_delay 0 \
         mcast_snooping 0"
    ));
    ip.add(format!("link set {BRIDGE} up addrgenmode none"));
    let mut ports = vec![CLIENT_PORT.to_owned()];
    ip.add(format!(
        "link add {CLIENT_PORT} mtu {UNDERLAY_MTU} type veth peer name {HOST_INTERFACE} \
         address {} netns {}",
        plan.client.mac,
        plan.client.netns.name(),
    ));
    for node in &plan.nodes {
        let port = node.fabric_port();
        ip.add(format!(
            "link add {port} mtu {UNDERLAY_MTU} type veth peer name {UPLINK} \
             address {} mtu {UNDERLAY_MTU} netns {}",
            node.uplink_mac,
            node.netns.name(),
        ));
        ports.push(port);
    }
    for port in &ports {
        ip.add(format!("link set {port} master {BRIDGE} addrgenmode none"));
        ip.add(format!("link set {port} up"));
    }
    ip.run("ip", &plan.fabric)?;
    for port in &ports {
        without_offloads(&plan.fabric, port, "off")?;
    }
    Ok(())
}

/// A native XDP program sees what the other end hands over: a checksum still to be filled in, a
/// segment larger than the MTU or a VLAN tag beside the packet is not a packet of the wire. A veth
/// hands those over unless told not to.
fn without_offloads(netns: &Netns, device: &str, gro: &str) -> Result<(), LabError> {
    let tags = ["txvlan", "off", "tx-vlan-stag-hw-insert", "off"];
    offloads(netns, device, &["tx", "off", "tso", "off", "gso", "off", "gro", gro])?;
    offloads(netns, device, &tags)
}

/// The same for an interface of a host, unless hosts keep their offloads.
fn host_offloads(netns: &Netns, device: &str, gro: &str, spec: &LabSpec) -> Result<(), LabError> {
    if spec.offloads {
        return offloads(netns, device, &["gro", gro]);
    }
    without_offloads(netns, device, gro)
}

fn client(plan: &Plan, spec: &LabSpec) -> Result<(), LabError> {
    let mut ip = Batch::default();
    ip.add("link set lo up");
    ip.add(format!("link set {HOST_INTERFACE} mtu {} up", spec.client_mtu));
    ip.add(format!("addr add {CLIENT_V4}/24 dev {HOST_INTERFACE}"));
    ip.add(format!("addr add {CLIENT_V6}/64 dev {HOST_INTERFACE} nodad"));
    if let Some(node) = plan.nodes.first() {
        for cidr in SERVICE_CIDRS {
            let via = if cidr.contains(':') {
                node.address_v6.to_string()
            } else {
                node.address_v4.to_string()
            };
            ip.add(format!("route add {cidr} via {via}"));
        }
    }
    ip.run("ip", &plan.client.netns)?;
    host_offloads(&plan.client.netns, HOST_INTERFACE, "on", spec)
}

fn build_node(node: &NodePlan, plan: &Plan, spec: &LabSpec) -> Result<(), LabError> {
    let mut ip = Batch::default();
    ip.add("link set lo up");
    ip.add(format!("link set {UPLINK} up"));
    ip.add(format!("addr add {}/24 dev {UPLINK}", node.address_v4));
    ip.add(format!("addr add {}/64 dev {UPLINK} nodad", node.address_v6));
    add_vxlan(&mut ip, node, plan, spec);
    let mtu = pod_mtu(spec.underlay);
    for pod in &node.pods {
        let device = &pod.host_interface;
        ip.add(format!(
            "link add {device} address {POD_GATEWAY_MAC} mtu {mtu} type veth \
             peer name {HOST_INTERFACE} address {} mtu {mtu} netns {}",
            pod.mac,
            pod.netns.name(),
        ));
        ip.add(format!("link set {device} up"));
        ip.add(format!("route add {}/32 dev {device} scope link", pod.v4));
        ip.add(format!("route add {}/128 dev {device}", pod.v6));
    }
    ip.run("ip", &node.netns)?;

    let mut fdb = Batch::default();
    for peer in peers(node, plan) {
        fdb.add(format!(
            "fdb append {} dev {VXLAN_DEVICE} dst {} self permanent",
            peer.vxlan_mac,
            peer.address(spec.underlay),
        ));
    }
    fdb.run("bridge", &node.netns)?;
    // A NIC's driver has GRO on, a veth only if told so.
    host_offloads(&node.netns, UPLINK, if spec.offloads { "on" } else { "off" }, spec)?;
    host_offloads(&node.netns, VXLAN_DEVICE, if spec.offloads { "on" } else { "off" }, spec)?;
    let pods = &mut node.pods.iter();
    pods.try_for_each(|pod| host_offloads(&node.netns, &pod.host_interface, "off", spec))
}

/// The device as Flannel sets it up: the tunnel's address is the first of the pod CIDR, and each
/// peer is a permanent neighbour behind which its pod CIDR is routed `onlink`.
fn add_vxlan(ip: &mut Batch, node: &NodePlan, plan: &Plan, spec: &LabSpec) {
    let zero_checksum = match spec.underlay {
        crate::Family::V6 if spec.udp6_zero_checksum => " udp6zerocsumrx",
        _ => "",
    };
    ip.add(format!(
        "link add {VXLAN_DEVICE} address {} mtu {} type vxlan id {} dstport {} local {} \
         dev {UPLINK} nolearning{zero_checksum}",
        node.vxlan_mac,
        pod_mtu(spec.underlay),
        spec.vni,
        spec.vxlan_port,
        node.address(spec.underlay),
    ));
    ip.add(format!("link set {VXLAN_DEVICE} up"));
    ip.add(format!("addr add {}/32 dev {VXLAN_DEVICE}", node.tunnel_v4()));
    ip.add(format!("addr add {}/128 dev {VXLAN_DEVICE} nodad", node.tunnel_v6()));
    for peer in peers(node, plan) {
        for tunnel in [peer.tunnel_v4().to_string(), peer.tunnel_v6().to_string()] {
            let mac = peer.vxlan_mac;
            ip.add(format!("neigh replace {tunnel} lladdr {mac} dev {VXLAN_DEVICE} nud permanent"));
        }
        for (cidr, via) in [
            (peer.pod_cidr_v4.to_string(), peer.tunnel_v4().to_string()),
            (peer.pod_cidr_v6.to_string(), peer.tunnel_v6().to_string()),
        ] {
            ip.add(format!("route add {cidr} via {via} dev {VXLAN_DEVICE} onlink"));
        }
    }
}

fn peers<'a>(node: &'a NodePlan, plan: &'a Plan) -> impl Iterator<Item = &'a NodePlan> {
    plan.nodes.iter().filter(|peer| peer.number != node.number)
}

/// A pod as Calico sets it up: one host address, and a next hop that exists only as a permanent
/// neighbour.
fn build_pod(pod: &PodPlan, spec: &LabSpec) -> Result<(), LabError> {
    let mut ip = Batch::default();
    ip.add("link set lo up");
    ip.add(format!("link set {HOST_INTERFACE} up"));
    ip.add(format!("addr add {}/32 dev {HOST_INTERFACE}", pod.v4));
    ip.add(format!("addr add {}/128 dev {HOST_INTERFACE} nodad", pod.v6));
    for gateway in [POD_GATEWAY_V4.to_string(), POD_GATEWAY_V6.to_string()] {
        ip.add(format!(
            "neigh replace {gateway} lladdr {POD_GATEWAY_MAC} dev {HOST_INTERFACE} nud permanent"
        ));
        ip.add(format!("route add default via {gateway} dev {HOST_INTERFACE} onlink"));
    }
    ip.run("ip", &pod.netns)?;
    host_offloads(&pod.netns, HOST_INTERFACE, if spec.pod_gro { "on" } else { "off" }, spec)
}
