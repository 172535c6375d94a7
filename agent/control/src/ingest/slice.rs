//! EndpointSlice.

use k8s_openapi::api::discovery::v1 as discovery;
use sluice_abi::Family;
use std::collections::BTreeSet;
use std::net::IpAddr;

use super::Origin;
use super::field::{Subject, is_name, quote};
use super::service::HEADLESS_LABEL;
use crate::Skipped;
use crate::model::{Endpoint, EndpointPort, EndpointSlice, ObjectName};

/// Label: the Service that a slice belongs to.
const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";

/// The model of an EndpointSlice; `None` with a reason in `skipped` when it is of no use. Single bad
/// endpoints and ports are left out alone.
pub fn endpoint_slice(
    origin: &Origin,
    object: &discovery::EndpointSlice,
    skipped: &mut Vec<Skipped>,
) -> Option<EndpointSlice> {
    let meta = &object.metadata;
    let (subject, name) = Subject::of(origin, "EndpointSlice", meta, skipped)?;
    let label = |name: &str| meta.labels.as_ref().and_then(|labels| labels.get(name));
    if label(HEADLESS_LABEL).is_some() {
        skipped.push(
            subject.notice(
                format!("metadata.labels[{HEADLESS_LABEL}]"),
                "belongs to a headless Service",
            ),
        );
        return None;
    }
    let Some(service) = label(SERVICE_NAME_LABEL).filter(|service| !service.is_empty()) else {
        skipped.push(
            subject
                .notice(format!("metadata.labels[{SERVICE_NAME_LABEL}]"), "belongs to no Service")
                .remedy("add the label with the Service's name"),
        );
        return None;
    };
    let family = match object.address_type.as_str() {
        "IPv4" => Family::V4,
        "IPv6" => Family::V6,
        "FQDN" => {
            skipped.push(subject.notice("addressType", "FQDN has no addresses to translate to"));
            return None;
        }
        other => {
            skipped.push(
                subject
                    .error("addressType", format!("{} is not a type", quote(other)))
                    .remedy("use IPv4 or IPv6"),
            );
            return None;
        }
    };
    Some(EndpointSlice {
        origin: origin.clone(),
        service: ObjectName::new(name.namespace.clone(), service.as_str()),
        family,
        ports: ports(&subject, object, skipped),
        endpoints: endpoints(&subject, &name, object, family, skipped),
        name,
    })
}

/// Ports. One without a number means "all ports" (API reference) and is of no use to a proxy; one
/// without a name is the unnamed port, as the API server's defaulting has it.
fn ports(
    subject: &Subject<'_>,
    object: &discovery::EndpointSlice,
    skipped: &mut Vec<Skipped>,
) -> Vec<EndpointPort> {
    let mut names = BTreeSet::new();
    let mut ports = Vec::new();
    for (i, port) in object.ports.iter().flatten().enumerate() {
        let field = |name: &str| format!("ports[{i}].{name}");
        let name = port.name.as_deref().unwrap_or("");
        let Some(number) = port.port else {
            skipped.push(subject.notice(field("port"), "is missing: means every port"));
            continue;
        };
        let Some(number) = subject.port(&field("port"), number, skipped) else {
            continue;
        };
        let Some(protocol) =
            subject.protocol(&field("protocol"), port.protocol.as_deref(), skipped)
        else {
            continue;
        };
        if !names.insert((name, protocol)) {
            skipped.push(
                subject
                    .error(field("name"), format!("{} names two ports", quote(name)))
                    .remedy("give each port its own name"),
            );
            continue;
        }
        ports.push(EndpointPort { name: name.into(), protocol, port: number });
    }
    ports
}

fn endpoints(
    subject: &Subject<'_>,
    name: &ObjectName,
    object: &discovery::EndpointSlice,
    family: Family,
    skipped: &mut Vec<Skipped>,
) -> Vec<Endpoint> {
    let mut endpoints = Vec::new();
    for (i, endpoint) in object.endpoints.iter().flatten().enumerate() {
        let field = format!("endpoints[{i}].addresses");
        // Only the first address counts: the others are undefined (API reference).
        let Some(text) = endpoint.addresses.first() else {
            skipped.push(subject.error(field, "is empty").remedy("give the endpoint an address"));
            continue;
        };
        let field = format!("{field}[0]");
        let Some(address) = subject.address(&field, text, skipped) else {
            continue;
        };
        if address.is_ipv4() != (family == Family::V4) {
            skipped.push(
                subject
                    .error(field, format!("{address} is not of type {}", object.address_type))
                    .remedy("one slice holds one family"),
            );
            continue;
        }
        endpoints.push(self::endpoint(name, endpoint, address));
    }
    endpoints
}

fn endpoint(name: &ObjectName, endpoint: &discovery::Endpoint, address: IpAddr) -> Endpoint {
    let conditions = endpoint.conditions.as_ref();
    let pod = endpoint
        .target_ref
        .as_ref()
        .filter(|target| target.kind.as_deref() == Some("Pod"))
        .and_then(|target| {
            let namespace = target.namespace.as_deref().unwrap_or(&name.namespace);
            let name = target.name.as_deref()?;
            (is_name(namespace) && is_name(name)).then(|| ObjectName::new(namespace, name))
        });
    Endpoint {
        address,
        node: endpoint.node_name.as_deref().filter(|node| is_name(node)).map(Into::into),
        pod,
        ready: conditions.and_then(|c| c.ready).unwrap_or(true),
        serving: conditions.and_then(|c| c.serving).unwrap_or(true),
        terminating: conditions.and_then(|c| c.terminating).unwrap_or(false),
    }
}
