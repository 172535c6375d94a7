//! The files below `deploy/` say what the program does: manifests are of the API, command lines and
//! config files are ones that `sluice` accepts, and each capability has a reason.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Parser;
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{ConfigMap, Container, Namespace, PodSpec, ServiceAccount};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use sluice::config::Config;

fn deploy(path: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy")).join(path)
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The manifests that `kubectl apply --kustomize` would apply, in the order of the kustomization.
fn manifests() -> Vec<(String, Value)> {
    let kustomization: Value =
        serde_saphyr::from_str(&read(&deploy("kubernetes/kustomization.yaml"))).expect("YAML");
    let fields: BTreeSet<&str> =
        kustomization.as_object().expect("an object").keys().map(String::as_str).collect();
    // Every other field would change the manifests, and this test would not see it.
    assert_eq!(fields, BTreeSet::from(["apiVersion", "kind", "resources"]));
    let resources = kustomization["resources"].as_array().expect("resources");
    let mut found = Vec::new();
    for name in resources.iter().map(|r| r.as_str().expect("a file name")) {
        let text = read(&deploy("kubernetes").join(name));
        for document in format!("\n{text}").split("\n---\n") {
            let value = serde_saphyr::from_str(document).unwrap_or_else(|e| panic!("{name}: {e}"));
            found.push((name.to_owned(), value));
        }
    }
    found
}

/// `value` as the API type, and nothing in it that the type does not have.
fn strict<T: DeserializeOwned + Serialize>(file: &str, value: &Value) -> T {
    let typed: T =
        serde_json::from_value(value.clone()).unwrap_or_else(|e| panic!("{file}: {e}\n{value:#}"));
    let back = serde_json::to_value(&typed).expect("JSON");
    lost(file, value, &back, "");
    typed
}

/// Panics at the first field of `given` that `kept` does not have.
fn lost(file: &str, given: &Value, kept: &Value, path: &str) {
    match (given, kept) {
        (Value::Object(given), Value::Object(kept)) => {
            for (name, value) in given {
                let path = format!("{path}.{name}");
                let other =
                    kept.get(name).unwrap_or_else(|| panic!("{file}: unknown field {path}"));
                lost(file, value, other, &path);
            }
        }
        (Value::Array(given), Value::Array(kept)) => {
            assert_eq!(given.len(), kept.len(), "{file}: {path}");
            for (i, (value, other)) in given.iter().zip(kept).enumerate() {
                lost(file, value, other, &format!("{path}[{i}]"));
            }
        }
        _ => assert_eq!(given, kept, "{file}: {path}"),
    }
}

fn object<T: DeserializeOwned + Serialize>(kind: &str) -> T {
    let found: Vec<_> = manifests().into_iter().filter(|(_, v)| v["kind"] == kind).collect();
    assert_eq!(found.len(), 1, "{kind}");
    strict(&found[0].0, &found[0].1)
}

fn pod() -> PodSpec {
    let set: DaemonSet = object("DaemonSet");
    set.spec.template.spec.expect("a pod")
}

fn container() -> Container {
    let mut containers = pod().containers;
    assert_eq!(containers.len(), 1);
    containers.remove(0)
}

/// Panics unless `sluice` accepts the command line.
fn accepted(words: &[String]) {
    assert!(words[0].ends_with("/sluice"), "{words:?}");
    if let Err(e) = sluice::cli::Cli::try_parse_from(words) {
        panic!("{words:?}: {e}");
    }
}

#[test]
fn manifests_are_of_the_api_without_unknown_fields() {
    let mut kinds = BTreeMap::new();
    for (file, value) in manifests() {
        let kind = value["kind"].as_str().expect("a kind").to_owned();
        match kind.as_str() {
            "Namespace" => drop(strict::<Namespace>(&file, &value)),
            "ServiceAccount" => drop(strict::<ServiceAccount>(&file, &value)),
            "ClusterRole" => drop(strict::<ClusterRole>(&file, &value)),
            "ClusterRoleBinding" => drop(strict::<ClusterRoleBinding>(&file, &value)),
            "ConfigMap" => drop(strict::<ConfigMap>(&file, &value)),
            "DaemonSet" => drop(strict::<DaemonSet>(&file, &value)),
            other => panic!("{file}: kind {other}"),
        }
        *kinds.entry(kind).or_insert(0) += 1;
    }
    assert_eq!(kinds.len(), 6, "{kinds:?}");
}

#[test]
#[should_panic(expected = "unknown field .spec.template.spec.hostNetwrk")]
fn misspelt_field_is_found() {
    let text = read(&deploy("kubernetes/daemonset.yaml")).replace("hostNetwork", "hostNetwrk");
    let value: Value = serde_saphyr::from_str(&text).expect("YAML");
    strict::<DaemonSet>("daemonset.yaml", &value);
}

#[test]
fn every_manifest_is_in_the_kustomization() {
    let listed: BTreeSet<String> = manifests().into_iter().map(|(file, _)| file).collect();
    let there: BTreeSet<String> = fs::read_dir(deploy("kubernetes"))
        .expect("deploy/kubernetes")
        .map(|e| e.expect("entry").file_name().into_string().expect("UTF-8"))
        .filter(|name| name != "kustomization.yaml")
        .collect();
    assert_eq!(listed, there);
}

#[test]
fn names_that_manifests_refer_to_exist() {
    let namespace: Namespace = object("Namespace");
    let namespace = namespace.metadata.name.expect("a name");
    for (file, value) in manifests() {
        let cluster_wide = ["Namespace", "ClusterRole", "ClusterRoleBinding"];
        if !cluster_wide.contains(&value["kind"].as_str().expect("a kind")) {
            assert_eq!(value["metadata"]["namespace"], namespace.as_str(), "{file}");
        }
    }
    let account: ServiceAccount = object("ServiceAccount");
    let role: ClusterRole = object("ClusterRole");
    let binding: ClusterRoleBinding = object("ClusterRoleBinding");
    assert_eq!(Some(&binding.role_ref.name), role.metadata.name.as_ref());
    let subjects = binding.subjects.expect("subjects");
    assert_eq!(subjects.len(), 1);
    assert_eq!(Some(&subjects[0].name), account.metadata.name.as_ref());
    assert_eq!(subjects[0].namespace.as_deref(), Some(namespace.as_str()));
    let pod = pod();
    assert_eq!(pod.service_account_name, account.metadata.name);

    let set: DaemonSet = object("DaemonSet");
    let spec = set.spec;
    let labels = spec.template.metadata.expect("metadata").labels.expect("labels");
    for (name, value) in spec.selector.match_labels.expect("matchLabels") {
        assert_eq!(labels.get(&name), Some(&value));
    }
    let config: ConfigMap = object("ConfigMap");
    let volumes = pod.volumes.expect("volumes");
    let of_config: Vec<_> = volumes.iter().filter_map(|v| v.config_map.as_ref()).collect();
    assert_eq!(of_config.len(), 1);
    assert_eq!(Some(&of_config[0].name), config.metadata.name.as_ref());
    let names: BTreeSet<&str> = volumes.iter().map(|v| v.name.as_str()).collect();
    let container = container();
    let mounts: BTreeSet<&str> = container
        .volume_mounts
        .as_ref()
        .expect("volumeMounts")
        .iter()
        .map(|m| m.name.as_str())
        .collect();
    assert_eq!(names, mounts, "volumes and mounts");
}

/// What the cluster grants is for reading only, and no pod carries a token for it.
#[test]
fn pods_carry_no_token_and_the_role_only_reads() {
    let account: ServiceAccount = object("ServiceAccount");
    assert_eq!(account.automount_service_account_token, Some(false));
    assert_eq!(pod().automount_service_account_token, Some(false));
    let role: ClusterRole = object("ClusterRole");
    for rule in role.rules.expect("rules") {
        assert!(rule.verbs.iter().all(|v| ["get", "list", "watch"].contains(&v.as_str())));
    }
}

#[test]
fn command_lines_of_the_daemon_set_are_accepted_and_name_the_mounted_config() {
    let container = container();
    let mut run = container.command.clone().expect("command");
    run.extend(container.args.clone().expect("args"));
    accepted(&run);
    let probe = container.readiness_probe.as_ref().and_then(|p| p.exec.as_ref()).expect("a probe");
    let probe = probe.command.clone().expect("command");
    accepted(&probe);

    let config: ConfigMap = object("ConfigMap");
    let mounts = container.volume_mounts.expect("volumeMounts");
    let mount = mounts.iter().find(|m| m.name == "config").expect("the config's mount");
    let data = config.data.expect("data");
    assert_eq!(data.len(), 1);
    for words in [&run, &probe] {
        let at = words.iter().position(|w| w == "--config").expect("--config") + 1;
        let file = Path::new(&words[at]);
        assert_eq!(file.parent(), Some(Path::new(&mount.mount_path)));
        let name = file.file_name().and_then(|n| n.to_str()).expect("a name");
        assert!(data.contains_key(name), "{name} is not in the ConfigMap");
    }
}

#[test]
fn directories_of_the_config_are_mounted_from_the_host() {
    let data = object::<ConfigMap>("ConfigMap").data.expect("data");
    let config = Config::parse(&data["sluice.toml"], Path::new("sluice.toml")).expect("legal");
    let container = container();
    let volumes = pod().volumes.expect("volumes");
    let from_host: BTreeMap<&str, &str> = container
        .volume_mounts
        .as_ref()
        .expect("volumeMounts")
        .iter()
        .filter_map(|mount| {
            let volume = volumes.iter().find(|v| v.name == mount.name)?;
            Some((mount.mount_path.as_str(), volume.host_path.as_ref()?.path.as_str()))
        })
        .collect();
    for dir in [&config.run_dir, &config.source.path, &config.pin_dir] {
        let mounted = from_host.iter().find(|(to, _)| dir.starts_with(to));
        let (to, from) = mounted.unwrap_or_else(|| panic!("{} is not mounted", dir.display()));
        assert_eq!(to, from, "the same path inside and outside, for the command line on the host");
    }
    // Where the agent looks for pods' network namespaces.
    assert!(from_host.contains_key("/run/netns"));
}

#[test]
fn config_file_of_the_unit_is_right() {
    Config::load(&deploy("systemd/sluice.toml")).expect("legal");
}

/// Sections of the unit, each a list of (key, value, line above it).
type Unit = BTreeMap<String, Vec<(String, String, String)>>;

fn unit() -> Unit {
    let mut sections = Unit::new();
    let mut section = String::new();
    let mut above = String::new();
    for (number, line) in read(&deploy("systemd/sluice.service")).lines().enumerate() {
        if let Some(name) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
            section = name.to_owned();
            sections.entry(section.clone()).or_default();
        } else if !line.is_empty() && !line.starts_with('#') {
            let (key, value) =
                line.split_once('=').unwrap_or_else(|| panic!("line {}: {line}", number + 1));
            let entry = (key.to_owned(), value.to_owned(), above.clone());
            sections.get_mut(&section).expect("a section before the first key").push(entry);
        }
        above = line.to_owned();
    }
    sections
}

fn values<'a>(unit: &'a Unit, section: &str, key: &str) -> Vec<&'a str> {
    unit[section].iter().filter(|(k, _, _)| k == key).map(|(_, v, _)| v.as_str()).collect()
}

#[test]
fn command_lines_of_the_unit_are_accepted() {
    let unit = unit();
    let names: Vec<&str> = unit.keys().map(String::as_str).collect();
    assert_eq!(names, ["Install", "Service", "Unit"]);
    let mut seen = 0;
    for key in ["ExecStartPre", "ExecStart"] {
        for line in values(&unit, "Service", key) {
            accepted(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>());
            seen += 1;
        }
    }
    assert_eq!(seen, 2);
    assert_eq!(values(&unit, "Service", "Restart"), ["on-failure"]);
}

/// What the agent writes stays writable and outlives it.
#[test]
fn unit_keeps_what_the_next_start_needs() {
    let unit = unit();
    let config = Config::load(&deploy("systemd/sluice.toml")).expect("legal");
    let run = Path::new("/run").join(values(&unit, "Service", "RuntimeDirectory")[0]);
    assert_eq!(config.run_dir, run);
    assert_eq!(values(&unit, "Service", "RuntimeDirectoryPreserve"), ["yes"]);
    assert!(config.pin_dir.starts_with(values(&unit, "Service", "ReadWritePaths")[0]));
    assert!(config.pin_dir.starts_with(values(&unit, "Unit", "RequiresMountsFor")[0]));
}

/// systemd's own opinion of the unit, where systemd is installed. It complains of a program that is
/// not there, so the unit is shown one that is.
#[test]
fn systemd_accepts_the_unit() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("sluice.service");
    let text =
        read(&deploy("systemd/sluice.service")).replace("/usr/local/bin/sluice", "/bin/true");
    fs::write(&file, text).expect("write");
    match Command::new("systemd-analyze").arg("verify").arg(&file).output() {
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            let about: Vec<&str> = said.lines().filter(|l| l.contains("sluice.service")).collect();
            assert!(about.is_empty(), "{said}");
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            println!("no systemd-analyze here; sections and keys are read by the other tests");
        }
        Err(e) => panic!("systemd-analyze: {e}"),
    }
}

/// The line above each capability is a comment: its reason.
#[test]
fn each_capability_has_a_reason_and_both_deployments_name_the_same() {
    let mut of_unit = BTreeSet::new();
    for (key, value, above) in &unit()["Service"] {
        if key == "CapabilityBoundingSet" {
            assert!(above.starts_with("# "), "{value} has no reason");
            assert!(of_unit.insert(value.clone()), "{value} twice");
        }
    }
    let context = container().security_context.expect("securityContext");
    assert_eq!(context.privileged, Some(false));
    let capabilities = context.capabilities.expect("capabilities");
    assert_eq!(capabilities.drop, Some(vec!["ALL".to_owned()]));
    let of_pod: BTreeSet<String> =
        capabilities.add.expect("add").into_iter().map(|c| format!("CAP_{c}")).collect();
    assert!(!of_pod.is_empty());
    assert_eq!(of_pod, of_unit);
    let text = read(&deploy("kubernetes/daemonset.yaml"));
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    for capability in &of_pod {
        let item = format!("- {}", &capability["CAP_".len()..]);
        let at = lines.iter().position(|l| *l == item).expect("a line of its own");
        assert!(lines[at - 1].starts_with("# "), "{capability} has no reason");
    }
}

/// The image holds the program where unit and DaemonSet look for it, under the tag that the
/// DaemonSet names.
#[test]
fn image_script_and_daemon_set_agree() {
    let script = deploy("image/build");
    let checked = Command::new("bash").arg("-n").arg(&script).output().expect("bash");
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
    let container = container();
    let image = format!("sluice:{}", env!("CARGO_PKG_VERSION"));
    assert_eq!(container.image.as_deref(), Some(image.as_str()));
    let program = container.command.expect("command").remove(0);
    assert!(read(&script).contains(&format!("\"$root{program}\"")), "{program}");
    // The script's own arguments are read before anything is needed.
    let refused = Command::new(&script).arg("--nonsense").output().expect("the script runs");
    assert_eq!(refused.status.code(), Some(2));
}
