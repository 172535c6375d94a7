//! Which endpoints a Service port has: slices merged, conditions judged, policies applied.
//!
//! kube-proxy's rules (pkg/proxy/topology.go and endpointslicecache.go; KEP-1669).

use sluice_abi::Family;
use std::collections::BTreeMap;

use crate::model::{Endpoint, EndpointSlice, ServicePort, Tuple};

/// The endpoints that a Service port sends to.
#[derive(Clone, Default, PartialEq, Debug)]
pub struct Selection<'a> {
    /// Policy Cluster: all ready endpoints, or, when there are none, all that serve while they
    /// terminate.
    pub cluster: BTreeMap<Tuple, &'a Endpoint>,
    /// Policy Local: the same among the endpoints of this node alone.
    pub local: BTreeMap<Tuple, &'a Endpoint>,
}

/// Whether the endpoint runs on `own_node`; one without a node never does.
pub fn is_local(endpoint: &Endpoint, own_node: &str) -> bool {
    endpoint.node.as_deref().is_some_and(|node| node == own_node)
}

/// Merges `slices`, all of one Service, for one port and family.
pub fn select<'a>(
    slices: &[&'a EndpointSlice],
    port: &ServicePort,
    family: Family,
    own_node: &str,
) -> Selection<'a> {
    let mut merged: BTreeMap<Tuple, &'a Endpoint> = BTreeMap::new();
    for slice in slices.iter().filter(|slice| slice.family == family) {
        for target in &slice.ports {
            if target.name != port.name || target.protocol != port.protocol {
                continue;
            }
            for endpoint in &slice.endpoints {
                let tuple = Tuple {
                    addr: endpoint.address,
                    port: target.port.get(),
                    protocol: target.protocol,
                };
                merged
                    .entry(tuple)
                    .and_modify(|kept| {
                        if rank(endpoint, own_node) > rank(kept, own_node) {
                            *kept = endpoint;
                        }
                    })
                    .or_insert(endpoint);
            }
        }
    }
    let mut selection = Selection {
        local: usable(&merged, |endpoint| is_local(endpoint, own_node)),
        ..Selection::default()
    };
    selection.cluster = usable(&merged, |_| true);
    selection
}

/// Which of two entries for one address and port stays: a running pod rather than a terminating one
/// (an address may have been given anew), then a ready one, then one of this node. The pod's name
/// makes the choice independent of the order of the slices.
fn rank<'a>(
    endpoint: &'a Endpoint,
    own_node: &str,
) -> (bool, bool, bool, bool, Option<&'a crate::model::ObjectName>) {
    (
        !endpoint.terminating,
        endpoint.ready,
        endpoint.serving,
        is_local(endpoint, own_node),
        endpoint.pod.as_ref(),
    )
}

/// The ready ones among those that `admits`, else the serving and terminating ones.
/// Topology hints would narrow the ready ones only.
fn usable<'a>(
    merged: &BTreeMap<Tuple, &'a Endpoint>,
    admits: impl Fn(&Endpoint) -> bool,
) -> BTreeMap<Tuple, &'a Endpoint> {
    let choose = |condition: fn(&Endpoint) -> bool| -> BTreeMap<Tuple, &'a Endpoint> {
        merged
            .iter()
            .filter(|(_, endpoint)| admits(endpoint) && condition(endpoint))
            .map(|(tuple, endpoint)| (*tuple, *endpoint))
            .collect()
    };
    let ready = choose(|endpoint| endpoint.ready);
    if ready.is_empty() {
        choose(|endpoint| endpoint.serving && endpoint.terminating)
    } else {
        ready
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{EndpointPort, ObjectName, Protocol};
    use std::num::NonZeroU16;

    const PORT: NonZeroU16 = NonZeroU16::MIN;

    fn endpoint(last: u8, node: &str, ready: bool, serving: bool, terminating: bool) -> Endpoint {
        Endpoint {
            address: [10, 0, 0, last].into(),
            node: (!node.is_empty()).then(|| node.into()),
            pod: None,
            ready,
            serving,
            terminating,
        }
    }

    fn slice(endpoints: Vec<Endpoint>) -> EndpointSlice {
        EndpointSlice {
            name: ObjectName::new("ns", "slice"),
            origin: "test".into(),
            service: ObjectName::new("ns", "svc"),
            family: Family::V4,
            ports: vec![EndpointPort { name: "".into(), protocol: Protocol::Tcp, port: PORT }],
            endpoints,
        }
    }

    /// Last bytes of the addresses in the Cluster and in the Local set.
    fn chosen(slices: &[EndpointSlice]) -> (Vec<u8>, Vec<u8>) {
        let port =
            ServicePort { name: "".into(), protocol: Protocol::Tcp, port: PORT, node_port: None };
        let slices: Vec<_> = slices.iter().collect();
        let selection = select(&slices, &port, Family::V4, "us");
        let last = |set: &BTreeMap<Tuple, &Endpoint>| {
            set.keys().map(|tuple| sluice_abi::Addr::from(tuple.addr).0[15]).collect()
        };
        (last(&selection.cluster), last(&selection.local))
    }

    #[test]
    fn ready_ones_are_used_and_terminating_ones_only_without_any() {
        let ready = endpoint(1, "us", true, true, false);
        let leaving = endpoint(2, "them", false, true, true);
        assert_eq!(chosen(&[slice(vec![ready, leaving.clone()])]), (vec![1], vec![1]));
        assert_eq!(chosen(&[slice(vec![leaving])]), (vec![2], vec![]));
    }

    #[test]
    fn unready_but_serving_ones_are_never_used() {
        let unready = endpoint(1, "us", false, true, false);
        assert_eq!(chosen(&[slice(vec![unready])]), (vec![], vec![]));
    }

    #[test]
    fn ready_and_terminating_counts_as_ready() {
        let published = endpoint(1, "us", true, false, true);
        let ready = endpoint(2, "us", true, true, false);
        assert_eq!(chosen(&[slice(vec![published, ready])]), (vec![1, 2], vec![1, 2]));
    }

    #[test]
    fn local_set_falls_back_to_terminating_by_itself() {
        let here = endpoint(1, "us", false, true, true);
        let there = endpoint(2, "them", true, true, false);
        assert_eq!(chosen(&[slice(vec![here, there])]), (vec![2], vec![1]));
    }

    #[test]
    fn endpoint_without_node_is_never_local() {
        let nowhere = endpoint(1, "", true, true, false);
        assert_eq!(chosen(&[slice(vec![nowhere])]), (vec![1], vec![]));
    }

    #[test]
    fn running_duplicate_wins_in_either_order() {
        let running = slice(vec![endpoint(1, "us", true, true, false)]);
        let leaving = slice(vec![endpoint(1, "them", false, true, true)]);
        let expected = (vec![1], vec![1]);
        assert_eq!(chosen(&[running.clone(), leaving.clone()]), expected);
        assert_eq!(chosen(&[leaving, running]), expected);
    }

    #[test]
    fn running_duplicate_wins_over_a_published_terminating_one() {
        let running = slice(vec![endpoint(1, "them", true, true, false)]);
        let published = slice(vec![endpoint(1, "us", true, true, true)]);
        assert_eq!(chosen(&[running, published.clone()]), (vec![1], vec![]));
        // The address may be a new pod's that is not ready yet.
        let starting = slice(vec![endpoint(1, "us", false, false, false)]);
        assert_eq!(chosen(&[published, starting]), (vec![], vec![]));
    }
}
