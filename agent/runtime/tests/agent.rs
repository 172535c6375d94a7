//! The agent as a whole: started, fed, killed, started again, cleaned up. Needs root.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[expect(dead_code, reason = "one harness for several suites")]
mod node;

use std::path::PathBuf;
use std::process::{Child, Command, Output};
use std::time::{Duration, Instant};

use node::{Node, in_namespace, sh};
use serde_json::Value;
use sluice::maps::Pins;
use sluice_abi::Frontend;

const OBJECTS: &str = "\
apiVersion: v1
kind: Node
metadata: {name: node-a}
spec: {podCIDR: 10.244.1.0/24, podCIDRs: [10.244.1.0/24]}
status: {addresses: [{type: InternalIP, address: 192.168.9.1}]}
---
apiVersion: v1
kind: Node
metadata: {name: node-b}
spec: {podCIDR: 10.244.2.0/24, podCIDRs: [10.244.2.0/24]}
status: {addresses: [{type: InternalIP, address: 192.168.9.2}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: cart-1, namespace: shop, labels: {kubernetes.io/service-name: cart}}
addressType: IPv4
ports: [{name: http, port: 8080, protocol: TCP}]
endpoints:
- {addresses: [10.244.1.10], conditions: {ready: true}, nodeName: node-a}
- {addresses: [10.244.2.10], conditions: {ready: true}, nodeName: node-b}
";

fn service(name: &str, cluster_ip: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\n\
         spec: {{clusterIP: {cluster_ip}, clusterIPs: [{cluster_ip}], \
         ports: [{{name: http, port: 80, protocol: TCP}}]}}\n"
    )
}

/// An instance with its files.
struct Instance {
    dir: tempfile::TempDir,
    config: PathBuf,
}

/// A running agent; killed when the test ends before it does.
struct Agent(Child);

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Instance {
    fn new(node: &Node) -> Self {
        sh("ip link set lo up
            ip link add up0 type veth peer name far; ip link set up0 up; ip link set far up
            ip addr add 192.168.9.1/24 dev up0
            ip link add vxlan1 address 0a:00:00:00:00:01 type vxlan id 1 local 192.168.9.1 dev up0 dstport 8472 nolearning
            ip addr add 10.244.1.0/32 dev vxlan1; ip link set vxlan1 up
            ip route add 10.244.2.0/24 via 10.244.2.0 dev vxlan1 onlink
            ip neigh add 10.244.2.0 lladdr 0a:00:00:00:00:02 dev vxlan1 nud permanent
            ip neigh add 192.168.9.2 lladdr 02:00:00:00:00:02 dev up0 nud permanent
            bridge fdb add 0a:00:00:00:00:02 dev vxlan1 dst 192.168.9.2");
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("sluice.toml");
        std::fs::create_dir(dir.path().join("objects")).unwrap();
        std::fs::write(
            &config,
            format!(
                "node_name = 'node-a'\npin_dir = '{}'\nrun_dir = '{dir}/run'\n\
                 [source]\npath = '{dir}/objects'\nsettle = '20ms'\npoll = '1s'\n\
                 [datapath]\nuplinks = ['up0']\n\
                 [maps]\nflow_sets = 4\nmaglev = 100000\n",
                node.pin_dir.display(),
                dir = dir.path().display(),
            ),
        )
        .unwrap();
        let instance = Self { dir, config };
        instance.write("shop.yaml", OBJECTS);
        instance.write("cart.yaml", &service("cart", "10.96.0.10"));
        instance
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.dir.path().join("objects").join(name), text).unwrap();
    }

    fn start(&self) -> Agent {
        let child = Command::new(env!("CARGO_BIN_EXE_sluice"))
            .args(["run", "--config"])
            .arg(&self.config)
            .spawn()
            .unwrap();
        Agent(child)
    }

    fn sluice(&self, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_sluice"))
            .args(args)
            .arg("--config")
            .arg(&self.config)
            .output()
            .unwrap()
    }

    fn json(&self, command: &str) -> Value {
        let output = self.sluice(&[command, "--output", "json"]);
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    }

    /// Waits until `holds`; what it looked at last is the message.
    fn until(&self, command: &str, holds: impl Fn(&Value) -> bool) -> Value {
        let patience = Instant::now() + Duration::from_secs(30);
        loop {
            let value = self.json(command);
            if holds(&value) {
                return value;
            }
            assert!(Instant::now() < patience, "{command}: {value:#}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn until_ready(&self, agent: &Agent) -> Value {
        let process = format!("/proc/{}/stat", agent.0.id());
        self.until("status", |s| {
            let stat = std::fs::read_to_string(&process).unwrap_or_default();
            assert!(!stat.contains(") Z "), "the agent ended");
            s["ready"] == true && s["pid"] == agent.0.id()
        })
    }
}

fn names(services: &Value) -> Vec<String> {
    let list = services["services"].as_array().cloned().unwrap_or_default();
    list.iter().map(|s| s["service"].as_str().unwrap_or_default().to_owned()).collect()
}

/// Addresses that the map says are Services' alone.
fn vips(node: &Node) -> Vec<String> {
    let frontends = Pins::new(&node.pin_dir).frontends().unwrap().entries().unwrap();
    let mut vips: Vec<String> = frontends
        .iter()
        .filter(|(key, frontend)| key.is_address() && *frontend == Frontend::ADDRESS)
        .map(|(key, _)| key.addr.to_string())
        .collect();
    vips.sort();
    vips
}

#[test]
fn agent_programs_follows_changes_and_survives_kill() {
    in_namespace(|node| {
        let instance = Instance::new(node);
        let agent = instance.start();
        let status = instance.until_ready(&agent);
        assert_eq!(status["mode"]["up0"], "native", "{status:#}");
        let services = instance.json("services");
        assert_eq!(names(&services), ["shop/cart:http"]);
        let backends = &services["services"][0]["internal_backends"];
        assert_eq!(backends.as_array().map(Vec::len), Some(2), "{services:#}");
        let vteps = instance.json("vteps");
        assert_eq!(vteps["vteps"][0]["next_hop"]["dst_mac"], "02:00:00:00:00:02", "{vteps:#}");

        // Changes are followed in both directions; the addresses as such are there, but no Services.
        assert_eq!(vips(node), ["10.96.0.10"]);
        instance.write("pay.yaml", &service("pay", "10.96.0.11"));
        instance.until("services", |s| names(s).len() == 2);
        instance.until("status", |s| s["tables"]["frontends"] == 2);
        assert_eq!(vips(node), ["10.96.0.10", "10.96.0.11"]);
        std::fs::remove_file(instance.dir.path().join("objects/pay.yaml")).unwrap();
        instance.until("services", |s| names(s) == ["shop/cart:http"]);
        assert_eq!(vips(node), ["10.96.0.10"]);

        // A next hop's new MAC reaches the table.
        sh("ip neigh replace 192.168.9.2 lladdr 02:00:00:00:00:22 dev up0 nud permanent");
        instance.until("vteps", |v| v["vteps"][0]["next_hop"]["dst_mac"] == "02:00:00:00:00:22");

        // Killed: everything stays, and is shown without the agent.
        let before = (instance.json("services"), instance.json("backends"));
        drop(agent);
        assert_eq!(before, (instance.json("services"), instance.json("backends")));
        let status = instance.json("status");
        assert_eq!((&status["running"], &status["ready"]), (&false.into(), &false.into()));
        let epoch = status["epoch"].clone();

        // The next one changes nothing, because nothing changed.
        let agent = instance.start();
        let status = instance.until_ready(&agent);
        assert_eq!(status["epoch"], epoch, "{status:#}");
        assert_eq!(before, (instance.json("services"), instance.json("backends")));
    });
}

#[test]
fn bad_object_is_named_and_the_rest_is_programmed() {
    in_namespace(|node| {
        let instance = Instance::new(node);
        instance
            .write("bad.yaml", &service("bad", "10.96.0.12").replace("port: 80", "port: 99999"));
        let agent = instance.start();
        let status = instance.until_ready(&agent);
        let skipped = &status["skipped"][0];
        assert_eq!(skipped["origin"], "bad.yaml", "{status:#}");
        assert_eq!(skipped["object"], "Service shop/bad");
        assert_eq!(skipped["field"], "spec.ports[0].port");
        assert!(names(&instance.json("services")).contains(&"shop/cart:http".to_owned()));
    });
}

#[test]
fn nothing_is_removed_while_the_objects_cannot_be_read() {
    in_namespace(|node| {
        let instance = Instance::new(node);
        let agent = instance.start();
        instance.until_ready(&agent);
        let objects = instance.dir.path().join("objects");
        let aside = instance.dir.path().join("aside");
        std::fs::rename(&objects, &aside).unwrap();
        let status = instance.until("status", |s| s["ready"] == false);
        assert!(status["not_ready"][0].as_str().unwrap().contains("objects"), "{status:#}");
        assert_eq!(names(&instance.json("services")), ["shop/cart:http"]);
        // And at the next start too.
        drop(agent);
        let agent = instance.start();
        instance.until("status", |s| s["pid"] == agent.0.id());
        assert_eq!(names(&instance.json("services")), ["shop/cart:http"]);
        std::fs::rename(&aside, &objects).unwrap();
        instance.until_ready(&agent);
    });
}

#[test]
fn agent_that_starts_is_not_ready_because_its_predecessor_was() {
    in_namespace(|node| {
        let instance = Instance::new(node);
        let agent = instance.start();
        instance.until_ready(&agent);
        drop(agent);
        // The next one finds no objects, so it never is.
        let objects = instance.dir.path().join("objects");
        std::fs::rename(&objects, instance.dir.path().join("aside")).unwrap();
        let agent = instance.start();
        let status = instance.until("status", |s| {
            assert_eq!(s["ready"], false, "{s:#}");
            s["not_ready"].to_string().contains("objects")
        });
        assert_eq!(status["pid"], agent.0.id());
        assert_eq!(status["mode"]["up0"], "native", "what is attached stays: {status:#}");
        drop(agent);
        let text = String::from_utf8_lossy(&instance.sluice(&["status"]).stdout).into_owned();
        assert!(text.contains("does not run") && !text.contains("starting"), "{text}");
    });
}

#[test]
fn one_agent_writes_and_cleanup_waits_for_its_end() {
    in_namespace(|node| {
        let instance = Instance::new(node);
        let mut agent = instance.start();
        instance.until_ready(&agent);
        let second = instance.sluice(&["run"]);
        assert!(!second.status.success());
        let text = String::from_utf8_lossy(&second.stderr).into_owned();
        assert!(text.contains(&agent.0.id().to_string()), "{text}");
        assert!(!instance.sluice(&["cleanup", "--yes"]).status.success());
        assert_eq!(names(&instance.json("services")).len(), 1);

        sh(&format!("kill -TERM {}", agent.0.id()));
        assert!(agent.0.wait().unwrap().success());
        assert!(!instance.sluice(&["cleanup"]).status.success(), "without --yes");
        assert_eq!(names(&instance.json("services")).len(), 1);
        assert!(instance.sluice(&["cleanup", "--yes"]).status.success());
        assert!(!node.pin_dir.exists());
        assert!(!instance.dir.path().join("run").exists());
        assert!(!sh("ip link show up0").contains("xdp"));
    });
}

#[test]
fn bypass_is_one_word_and_outlives_a_restart() {
    in_namespace(|node| {
        let instance = Instance::new(node);
        let agent = instance.start();
        instance.until_ready(&agent);
        assert!(instance.sluice(&["bypass", "on"]).status.success());
        assert_eq!(instance.json("status")["bypass"], true);
        drop(agent);
        let agent = instance.start();
        instance.until_ready(&agent);
        assert_eq!(instance.json("status")["bypass"], true);
        assert!(instance.sluice(&["bypass", "off"]).status.success());
        assert_eq!(instance.json("status")["bypass"], false);
    });
}

#[test]
fn changed_config_is_reloaded_and_a_wrong_one_is_not() {
    in_namespace(|node| {
        let instance = Instance::new(node);
        let agent = instance.start();
        instance.until_ready(&agent);
        let text = std::fs::read_to_string(&instance.config).unwrap();
        std::fs::write(&instance.config, text.replace("[datapath]", "[datapath]\nmode = 'wrong'"))
            .unwrap();
        sh(&format!("kill -HUP {}", agent.0.id()));
        let read = |instance: &Instance| {
            let run_dir = instance.dir.path().join("run/status.json");
            serde_json::from_slice::<Value>(&std::fs::read(run_dir).unwrap()).unwrap()
        };
        assert_eq!(read(&instance)["mode"]["up0"], "native");
        std::fs::write(
            &instance.config,
            text.replace("[datapath]", "[datapath]\nmode = 'generic'"),
        )
        .unwrap();
        sh(&format!("kill -HUP {}", agent.0.id()));
        instance.until("status", |s| s["mode"]["up0"] == "generic" && s["ready"] == true);
    });
}

#[test]
fn hidden_tags_are_named_switched_with_consent_and_back_by_cleanup() {
    in_namespace(|node| {
        let instance = Instance::new(node);
        let agent = instance.start();
        let status = instance.until_ready(&agent);
        let notes = status["notes"].to_string();
        assert!(notes.contains("ethtool -K far txvlan off"), "{notes}");
        let is_on = || sh("ethtool -k far | grep tx-vlan-offload").contains("on");
        assert!(is_on(), "nothing is switched without consent");
        let text = std::fs::read_to_string(&instance.config).unwrap();
        let consent = "[datapath]\nchange_device_features = true";
        std::fs::write(&instance.config, text.replace("[datapath]", consent)).unwrap();
        instance.until("status", |s| s["notes"].as_array().is_some_and(Vec::is_empty));
        assert!(!is_on());
        // The next agent, without consent, leaves it as it is.
        drop(agent);
        std::fs::write(&instance.config, text).unwrap();
        let agent = instance.start();
        instance.until_ready(&agent);
        assert!(!is_on());
        drop(agent);
        let cleaned = instance.sluice(&["cleanup", "--yes"]);
        let said = String::from_utf8_lossy(&cleaned.stdout).into_owned();
        assert!(
            said.contains("switched on tx-vlan-hw-insert, tx-vlan-stag-hw-insert of far"),
            "{said}"
        );
        assert!(is_on());
    });
}

#[test]
fn ports_of_the_nodes_own_sockets_are_refused() {
    in_namespace(|node| {
        let instance = Instance::new(node);
        let text = std::fs::read_to_string(&instance.config).unwrap();
        let wrong = format!("{text}[snat]\nfirst_port = 30000\nlast_port = 40000\n");
        std::fs::write(&instance.config, &wrong).unwrap();
        let refused = instance.sluice(&["run"]);
        assert!(!refused.status.success());
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(said.contains("ip_local_port_range") && said.contains("port 32768"), "{said}");

        std::fs::write(&instance.config, &text).unwrap();
        let agent = instance.start();
        instance.until_ready(&agent);
        // At a reload the old range stays. What is reloaded with it is not reloaded either.
        let generic = wrong.replace("[datapath]", "[datapath]\nmode = 'generic'");
        std::fs::write(&instance.config, &generic).unwrap();
        std::thread::sleep(Duration::from_secs(3));
        assert_eq!(instance.json("status")["mode"]["up0"], "native");
        // With the ports reserved it is.
        sh("sysctl -qw net.ipv4.ip_local_reserved_ports=30000-40000");
        std::fs::write(&instance.config, format!("{generic}\n")).unwrap();
        instance.until("status", |s| s["mode"]["up0"] == "generic");
        // And said when that changes under it.
        sh("sysctl -qw net.ipv4.ip_local_reserved_ports=''");
        instance.until("status", |s| s["notes"].to_string().contains("ip_local_port_range"));
    });
}

#[test]
fn mass_removal_at_start_is_held_until_it_is_released() {
    in_namespace(|node| {
        let instance = Instance::new(node);
        for i in 0..40 {
            instance
                .write(&format!("s{i}.yaml"), &service(&format!("s{i}"), &format!("10.96.1.{i}")));
        }
        let agent = instance.start();
        instance.until_ready(&agent);
        assert_eq!(names(&instance.json("services")).len(), 41);
        drop(agent);
        for i in 0..40 {
            let name = format!("objects/s{i}.yaml");
            std::fs::remove_file(instance.dir.path().join(name)).unwrap();
        }
        let agent = instance.start();
        let status = instance.until("status", |s| !s["held"].is_null());
        assert_eq!(status["ready"], false, "{status:#}");
        assert_eq!(names(&instance.json("services")).len(), 41);
        assert!(instance.sluice(&["release"]).status.success());
        instance.until_ready(&agent);
        assert_eq!(names(&instance.json("services")).len(), 1);
    });
}
