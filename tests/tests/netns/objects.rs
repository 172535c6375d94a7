//! Objects that are wrong, that are gone, or that ask for what they must not have.

use std::net::SocketAddr;
use std::process::Command;

use sluice_lab::serve::READY;
use sluice_lab::traffic::Connection;
use sluice_lab::{Family, LabSpec, Mode};

use crate::bed::{Bed, Config, FAMILIES, HTTP, NODE, Service, wait};

const SHOP: Service = Service { name: "cart", number: 11 };

/// What `sluice status` left out, one text per object.
fn left_out(bed: &Bed) -> Vec<String> {
    let status = bed.status();
    let skipped = status["skipped"].as_array().cloned().unwrap_or_default();
    skipped.iter().map(ToString::to_string).collect()
}

#[test]
fn bad_manifest_is_named_and_disturbs_nothing() {
    let spec = LabSpec::kernel_only(2, 1);
    let objects = [("cart.yaml", SHOP.objects(&spec, &["pod1-1", "pod2-1"]))];
    let bed = Bed::up(&spec, Config::new(Mode::Native), &objects);
    let target = SHOP.load_balancer(Family::V4, HTTP);
    let opened = bed.netns("client").enter(|| Connection::open(target)).expect("the client");
    let mut kept = opened.expect("a connection");
    let pod = kept.ask("/").expect("an answer").pod;

    let wrong = "apiVersion: v1\nkind: Service\nmetadata: {name: wrong, namespace: shop}\n\
                 spec: {clusterIP: 10.96.0.99, ports: [{name: web, port: 70000}]}\n";
    bed.write("wrong.yaml", wrong);
    bed.write("torn.yaml", "apiVersion: v1\nkind: Service\nmetadata: {name: [half\n");
    wait("both are named", || {
        let named = left_out(&bed);
        let has = |words: &[&str]| named.iter().any(|s| words.iter().all(|w| s.contains(w)));
        if has(&["wrong.yaml", "shop/wrong", "port", "70000"]) && has(&["torn.yaml"]) {
            return Ok(());
        }
        Err(format!("{named:?}"))
    });
    let status = bed.status_text();
    assert!(status.contains("wrong.yaml") && status.contains("torn.yaml"), "{status}");
    assert_eq!(bed.status()["ready"], true, "{status}");
    bed.wait_endpoints(SHOP.name, &["pod1-1", "pod2-1"]);
    assert_eq!(kept.ask("/").expect("an answer").pod, pod);
    for family in FAMILIES {
        let pods = bed.ask_often("client", SHOP.load_balancer(family, HTTP), 16);
        assert_eq!(pods.len(), 2, "{pods:?}");
    }
    bed.remove("wrong.yaml");
    bed.remove("torn.yaml");
    wait("nothing is left out any more", || match left_out(&bed) {
        named if named.is_empty() => Ok(()),
        named => Err(format!("{named:?}")),
    });
}

#[test]
fn mass_removal_at_start_is_held_until_it_is_released() {
    let spec = LabSpec::kernel_only(2, 1);
    let services: Vec<Service> =
        (20..30).map(|number| Service { name: format!("cart-{number}").leak(), number }).collect();
    let text: String =
        services.iter().map(|s| format!("---\n{}", s.objects(&spec, &["pod1-1"]))).collect();
    let mut bed = Bed::up(&spec, Config::new(Mode::Native), &[("all.yaml", text)]);
    let target = services[0].load_balancer(Family::V4, HTTP);
    assert_eq!(bed.ask("client", target).pod, "pod1-1");

    // As if the source were sick: everything is gone when the agent comes back.
    bed.stop();
    bed.remove("all.yaml");
    bed.spawn_agent();
    wait("the removal is held", || {
        let status = bed.status();
        if status["running"] == true && status["held"]["removed"].as_u64() > Some(32) {
            return Ok(());
        }
        Err(status["held"].to_string())
    });
    assert_eq!(bed.status()["ready"], false);
    assert!(bed.status_text().contains("sluice release"), "{}", bed.status_text());
    for service in &services {
        assert_eq!(bed.ask("client", service.load_balancer(Family::V6, HTTP)).pod, "pod1-1");
    }
    bed.lab.sluice(NODE, &["release"]).expect("release");
    wait("the removal was let through", || {
        let status = bed.status();
        if status["ready"] == true && status["tables"]["frontends"] == 0 {
            return Ok(());
        }
        Err(status["tables"].to_string())
    });
}

#[test]
fn fail_safe_ports_of_the_node_are_never_captured() {
    let spec = LabSpec::kernel_only(2, 1);
    let greedy = "apiVersion: v1\nkind: Service\nmetadata: {name: greedy, namespace: shop}\n\
                  spec:\n  clusterIP: 10.96.0.98\n\
                  \x20 clusterIPs: [10.96.0.98, \"fd00:10:96::98\"]\n\
                  \x20 externalIPs: [192.0.2.1, \"2001:db8::1\"]\n  ports:\n\
                  \x20   - {name: ssh, port: 22, targetPort: 8080}\n\
                  \x20   - {name: kubelet, port: 10250, targetPort: 8080}\n\
                  \x20   - {name: web, port: 8443, targetPort: 8080}\n";
    let slices: String = FAMILIES
        .map(|family| {
            let name = "t".parse().expect("a name");
            let plan = sluice_lab::plan::Plan::new(&name, &spec);
            let pod = plan.nodes[0].pods[0].address(family);
            let low = family.to_string().to_lowercase();
            format!(
                "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
                 metadata: {{name: greedy-{low}, namespace: shop, \
                 labels: {{kubernetes.io/service-name: greedy}}}}\n\
                 addressType: {family}\n\
                 ports: [{{name: ssh, port: 8080}}, {{name: kubelet, port: 8080}}, \
                 {{name: web, port: 8080}}]\n\
                 endpoints: [{{addresses: [\"{pod}\"], nodeName: node1}}]\n"
            )
        })
        .concat();
    let objects = [("greedy.yaml", format!("{greedy}{slices}"))];
    let mut bed = Bed::up(&spec, Config::new(Mode::Native), &objects);

    let host = bed.lab.host(NODE).expect("node1");
    let mut listener = Command::new(&bed.lab.context().sluice);
    listener.args(["lab", "serve", "--pod", "host-of-node1", "--node", NODE]);
    listener.args(["--tcp", "22", "--tcp", "10250"]);
    bed.lab.spawn(&host, "serve", &mut listener).expect("a listener");
    let log = bed.lab.log_path(NODE, "serve");
    wait("the listener", || match std::fs::read_to_string(&log) {
        Ok(text) if text.trim() == READY => Ok(()),
        other => Err(format!("{other:?}")),
    });

    let named = left_out(&bed);
    for family in FAMILIES {
        let node = bed.node(1).address(family);
        for port in [22, 10250] {
            let tuple = SocketAddr::new(node, port);
            let refused = |s: &&String| s.contains(&tuple.to_string()) && s.contains("fail-safe");
            assert!(named.iter().any(|s| refused(&s)), "{tuple} is not named: {named:?}");
            assert_eq!(bed.ask("client", tuple).pod, "host-of-node1", "{tuple}");
        }
        let taken = bed.ask("client", SocketAddr::new(node, 8443));
        assert_eq!(taken.pod, "pod1-1", "a port that is not fail-safe is served");
    }
}
