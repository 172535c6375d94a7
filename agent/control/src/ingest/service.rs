//! Service.

use k8s_openapi::api::core::v1 as core;
use std::collections::BTreeSet;

use super::Origin;
use super::field::{Subject, quote};
use crate::Skipped;
use crate::model::{Service, ServicePort};

/// `"true"`: the Service is left to the kernel.
pub const OPT_OUT_ANNOTATION: &str = "sluice.dev/opt-out";
/// Label: another proxy serves the Service (KEP-2447 and kube-proxy's informers).
const PROXY_NAME_LABEL: &str = "service.kubernetes.io/service-proxy-name";
/// Label: the Service has no virtual address.
pub(super) const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";
/// Annotation that means the same as `spec.loadBalancerSourceRanges`.
const SOURCE_RANGES_ANNOTATION: &str = "service.beta.kubernetes.io/load-balancer-source-ranges";
/// Affinity timeout that the API server fills in.
const DEFAULT_AFFINITY_SECONDS: u32 = 10_800;
/// Longest affinity timeout that the API server admits: one day.
const MAX_AFFINITY_SECONDS: i32 = 86_400;

/// The model of a Service; `None` with a reason in `skipped` when it is not to be programmed. Single
/// bad ports and addresses are left out alone.
pub fn service(
    origin: &Origin,
    object: &core::Service,
    skipped: &mut Vec<Skipped>,
) -> Option<Service> {
    let meta = &object.metadata;
    let (subject, name) = Subject::of(origin, "Service", meta, skipped)?;
    let label = |name: &str| meta.labels.as_ref().and_then(|labels| labels.get(name));
    // Nothing of it is claimed, but its addresses are known to be another's too.
    let foreign = label(PROXY_NAME_LABEL);
    if let Some(proxy) = foreign {
        skipped.push(subject.notice(
            format!("metadata.labels[{PROXY_NAME_LABEL}]"),
            format!("belongs to the proxy {}", quote(proxy)),
        ));
    }
    if label(HEADLESS_LABEL).is_some() {
        skipped.push(subject.notice(
            format!("metadata.labels[{HEADLESS_LABEL}]"),
            "headless: has no address to translate",
        ));
        return None;
    }
    let Some(spec) = &object.spec else {
        skipped.push(subject.error("spec", "is missing").remedy("add the field"));
        return None;
    };
    match spec.type_.as_deref().unwrap_or("ClusterIP") {
        "ClusterIP" | "NodePort" | "LoadBalancer" => {}
        "ExternalName" => {
            skipped.push(subject.notice("spec.type", "ExternalName: only DNS answers it"));
            return None;
        }
        other => {
            skipped.push(
                subject
                    .error("spec.type", format!("{} is not a type", quote(other)))
                    .remedy("use ClusterIP, NodePort or LoadBalancer"),
            );
            return None;
        }
    }
    let cluster_ip_texts: Vec<&str> = match (&spec.cluster_ips, &spec.cluster_ip) {
        (Some(list), _) if !list.is_empty() => list.iter().map(String::as_str).collect(),
        (_, Some(one)) if !one.is_empty() => vec![one],
        _ => Vec::new(),
    };
    if cluster_ip_texts.contains(&"None") {
        skipped.push(subject.notice("spec.clusterIP", "headless: has no address to translate"));
        return None;
    }
    let mut cluster_ips = Vec::new();
    for (i, text) in cluster_ip_texts.into_iter().enumerate() {
        let field = if spec.cluster_ips.as_ref().is_some_and(|list| !list.is_empty()) {
            format!("spec.clusterIPs[{i}]")
        } else {
            "spec.clusterIP".to_owned()
        };
        cluster_ips.extend(subject.address(&field, text, skipped));
    }

    let local = |field: &str, policy: Option<&String>, skipped: &mut Vec<Skipped>| match policy
        .map(String::as_str)
    {
        None | Some("Cluster" | "") => false,
        Some("Local") => true,
        Some(other) => {
            skipped.push(
                subject
                    .error(field, format!("{} is not a policy, taken as Cluster", quote(other)))
                    .remedy("use Cluster or Local"),
            );
            false
        }
    };
    let internal_local =
        local("spec.internalTrafficPolicy", spec.internal_traffic_policy.as_ref(), skipped);
    let external_local =
        local("spec.externalTrafficPolicy", spec.external_traffic_policy.as_ref(), skipped);

    let (load_balancer_ips, uncaptured_ips) = load_balancer_ips(&subject, object, skipped);

    Some(Service {
        origin: origin.clone(),
        created: meta.creation_timestamp.as_ref().map(|time| time.0.as_second()),
        opt_out: meta
            .annotations
            .as_ref()
            .and_then(|annotations| annotations.get(OPT_OUT_ANNOTATION))
            .is_some_and(|value| value == "true")
            || foreign.is_some(),
        internal_local,
        external_local,
        affinity_seconds: affinity_seconds(&subject, spec, skipped),
        cluster_ips,
        external_ips: subject.addresses(
            "spec.externalIPs",
            spec.external_ips.iter().flatten().map(String::as_str),
            skipped,
        ),
        load_balancer_ips,
        uncaptured_ips,
        ports: if foreign.is_some() { Vec::new() } else { ports(&subject, spec, skipped) },
        name,
    })
}

fn affinity_seconds(
    subject: &Subject<'_>,
    spec: &core::ServiceSpec,
    skipped: &mut Vec<Skipped>,
) -> u32 {
    if spec.session_affinity.as_deref() != Some("ClientIP") {
        return 0;
    }
    let timeout = spec
        .session_affinity_config
        .as_ref()
        .and_then(|config| config.client_ip.as_ref())
        .and_then(|client_ip| client_ip.timeout_seconds);
    match timeout {
        None => DEFAULT_AFFINITY_SECONDS,
        Some(seconds @ 1..=MAX_AFFINITY_SECONDS) => seconds.unsigned_abs(),
        Some(seconds) => {
            skipped.push(
                subject
                    .error(
                        "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
                        format!("{seconds} is out of range, {DEFAULT_AFFINITY_SECONDS} is used"),
                    )
                    .remedy("use 1 to 86400"),
            );
            DEFAULT_AFFINITY_SECONDS
        }
    }
}

/// Ingress IPs that are to be translated, and those that are not: an entry with ipMode Proxy is the
/// load balancer's own (KEP-1860), one with a hostname only has no address.
fn load_balancer_ips(
    subject: &Subject<'_>,
    object: &core::Service,
    skipped: &mut Vec<Skipped>,
) -> (Vec<std::net::IpAddr>, Vec<std::net::IpAddr>) {
    let is_load_balancer =
        object.spec.as_ref().and_then(|s| s.type_.as_deref()) == Some("LoadBalancer");
    let ingress = object
        .status
        .as_ref()
        .and_then(|status| status.load_balancer.as_ref())
        .and_then(|lb| lb.ingress.as_ref());
    let ranges = object.spec.as_ref().and_then(|s| s.load_balancer_source_ranges.as_ref());
    let annotations = object.metadata.annotations.as_ref();
    let field = if ranges.is_some_and(|ranges| !ranges.is_empty()) {
        Some("spec.loadBalancerSourceRanges".to_owned())
    } else {
        annotations
            .is_some_and(|all| all.contains_key(SOURCE_RANGES_ANNOTATION))
            .then(|| format!("metadata.annotations[{SOURCE_RANGES_ANNOTATION}]"))
    };
    let filtered = field.is_some() && is_load_balancer;
    if let Some(field) = field
        && is_load_balancer
    {
        // Translating without the filter would open the Service to everybody.
        skipped.push(
            subject
                .notice(field, "LoadBalancer IPs are left to the kernel, which filters sources")
                .remedy("its other addresses are translated"),
        );
    }
    let (mut ips, mut uncaptured) = (Vec::new(), Vec::new());
    for (i, entry) in ingress.into_iter().flatten().enumerate() {
        let Some(text) = entry.ip.as_deref().filter(|ip| !ip.is_empty()) else {
            continue;
        };
        let field = format!("status.loadBalancer.ingress[{i}].ip");
        let foreign = !is_load_balancer || entry.ip_mode.as_deref() == Some("Proxy");
        if filtered || foreign {
            uncaptured.extend(text.parse::<std::net::IpAddr>());
            if !filtered {
                skipped.push(subject.notice(field, "not captured: type or ipMode says so"));
            }
        } else if let Some(ip) = subject.address(&field, text, skipped)
            && !ips.contains(&ip)
        {
            ips.push(ip);
        }
    }
    (ips, uncaptured)
}

fn ports(
    subject: &Subject<'_>,
    spec: &core::ServiceSpec,
    skipped: &mut Vec<Skipped>,
) -> Vec<ServicePort> {
    let mut names = BTreeSet::new();
    let mut numbers = BTreeSet::new();
    let mut ports = Vec::new();
    for (i, port) in spec.ports.iter().flatten().enumerate() {
        let field = |name: &str| format!("spec.ports[{i}].{name}");
        let name = port.name.as_deref().unwrap_or("");
        let Some(number) = subject.port(&field("port"), port.port, skipped) else {
            continue;
        };
        let Some(protocol) =
            subject.protocol(&field("protocol"), port.protocol.as_deref(), skipped)
        else {
            continue;
        };
        let node_port = match port.node_port {
            None | Some(0) => None,
            Some(node_port) => subject.port(&field("nodePort"), node_port, skipped),
        };
        if !names.insert(name) {
            skipped.push(
                subject
                    .error(field("name"), format!("{} names two ports", quote(name)))
                    .remedy("give each port its own name"),
            );
            continue;
        }
        if name.len() > 63 || name.chars().any(|c| !c.is_ascii_graphic()) {
            skipped.push(
                subject
                    .error(field("name"), format!("{} is not a port name", quote(name)))
                    .remedy("use at most 63 letters, digits and '-'"),
            );
            continue;
        }
        if !numbers.insert((number, protocol)) {
            skipped.push(
                subject
                    .error(field("port"), format!("{number}/{protocol} is there twice"))
                    .remedy("remove one of the two"),
            );
            continue;
        }
        ports.push(ServicePort { name: name.into(), protocol, port: number, node_port });
    }
    ports
}
