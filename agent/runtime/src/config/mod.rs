//! The one configuration file: TOML, read once, into types that cannot be wrong.
//!
//! Every key is documented in `default.toml` beside this folder, which is what
//! `sluice config show-default` prints and what [`Config::default`] is read from; there is no second
//! place. A key that the file does not know, or a value out of its range, is an error that names the
//! key, the value and the remedy.

mod check;
mod values;

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use serde::Deserialize;
use sluice_control::model::OuterDscp;

use values::{address, duration};

pub use values::{Pattern, ServiceName};

/// The documented default file.
pub const DEFAULT_TOML: &str = include_str!("../default.toml");

/// Why a configuration is not usable.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("{}: {source}; give the path of a readable file with --config", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The file is no TOML. The parser names line and column.
    #[error("{}: {source}", path.display())]
    Syntax {
        /// Which file.
        path: PathBuf,
        /// What the parser found and where.
        source: Box<toml::de::Error>,
    },
    /// A key is not known, or its value is not of the right kind.
    #[error(
        "{}: `{line}`: {problem}; `sluice config show-default` lists every key with its meaning",
        path.display()
    )]
    Key {
        /// Which file.
        path: PathBuf,
        /// The key and its value.
        line: String,
        /// What is wrong.
        problem: String,
    },
    /// A value does not fit to another one.
    #[error("{}: {key} = {value}: {problem}; {remedy}", path.display())]
    Invalid {
        /// Which file.
        path: PathBuf,
        /// The key with its table.
        key: &'static str,
        /// The value that was found.
        value: String,
        /// What is wrong with it.
        problem: String,
        /// What to write instead.
        remedy: &'static str,
    },
}

/// The whole configuration. See `default.toml` for the meaning of each key.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Name of this node as Kubernetes knows it; empty: the host name.
    pub node_name: String,
    /// Directory on a BPF file system for maps and links.
    pub pin_dir: PathBuf,
    /// Directory for the lock, the names and the status.
    pub run_dir: PathBuf,
    /// Seed of the backend choice, equal on every node of a cluster.
    pub cluster_seed: u64,
    /// Node addresses on which node ports are served; empty: all.
    pub node_port_addresses: Vec<IpNet>,
    /// Services that are left alone.
    pub opt_out_services: Vec<ServiceName>,
    /// What is logged.
    pub log: Log,
    /// Where the Kubernetes objects come from.
    pub source: Source,
    /// Interfaces and modes.
    pub datapath: Datapath,
    /// SNAT port range.
    pub snat: Snat,
    /// Answers to packets that cannot go on.
    pub answers: Answers,
    /// Ports of the node that are never captured.
    pub fail_safe: FailSafe,
    /// Map sizes.
    pub maps: Maps,
    /// Flow timeouts.
    pub timeouts: Timeouts,
    /// Consistent hashing.
    pub maglev: Maglev,
    /// How changes are batched and held.
    pub changes: Changes,
}

/// `[log]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Log {
    /// Text for people or JSON for programs.
    pub format: LogFormat,
    /// Filter in the notation of tracing: `info`, `sluice=debug,info`.
    pub level: String,
}

/// Form of the log lines.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// One line of text.
    Text,
    /// One JSON object a line.
    Json,
}

/// `[source]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// Which source.
    pub kind: SourceKind,
    /// Directory of manifests.
    pub path: PathBuf,
    /// Quiet time before a changed directory is read.
    #[serde(deserialize_with = "duration")]
    pub settle: Duration,
    /// How often the directory is looked at when no change was reported.
    #[serde(deserialize_with = "duration")]
    pub poll: Duration,
}

/// The kinds of sources.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum SourceKind {
    /// A directory of ordinary manifests.
    File,
}

/// `[datapath]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Datapath {
    /// Interfaces towards the network; empty: those that carry a default route.
    pub uplinks: Vec<Pattern>,
    /// Kernel vxlan devices to use; empty: all that have a VNI of their own.
    pub tunnel_devices: Vec<Pattern>,
    /// Interfaces that are never touched.
    pub exclude_interfaces: Vec<Pattern>,
    /// How XDP is attached to uplinks.
    pub mode: Mode,
    /// Beside kube-proxy or instead of it.
    pub behaviour: Behaviour,
    /// How frames reach pods of this node.
    pub delivery: DeliveryChoice,
    /// DSCP of what is tunnelled.
    pub outer_dscp: OuterDscp,
    /// Source of a pod's requests to itself.
    #[serde(deserialize_with = "address")]
    pub hairpin_v4: Option<Ipv4Addr>,
    /// The same for IPv6.
    #[serde(deserialize_with = "address")]
    pub hairpin_v6: Option<Ipv6Addr>,
    /// New connections of a CPU in a second above which it guards itself; 0: never.
    pub flood_rate: u32,
    /// Features of devices that stand in the way of XDP may be switched.
    pub change_device_features: bool,
    /// Overrides for single interfaces, by name.
    #[serde(default)]
    pub interface: BTreeMap<String, InterfaceOverride>,
}

/// `[datapath.interface.<name>]`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InterfaceOverride {
    /// Replaces `datapath.mode` on an uplink.
    pub mode: Option<Mode>,
    /// Replaces `datapath.delivery` on the host side of a pod's veth.
    pub delivery: Option<DeliveryChoice>,
}

/// How XDP is attached.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// The fastest that works.
    Auto,
    /// In the driver only.
    Native,
    /// In the stack only.
    Generic,
    /// Without XDP: TC does its work.
    Tc,
    /// On the NIC only.
    Offload,
}

impl Mode {
    /// The word in config and output.
    pub const fn label(self) -> &'static str {
        match self {
            Mode::Auto => "auto",
            Mode::Native => "native",
            Mode::Generic => "generic",
            Mode::Tc => "tc",
            Mode::Offload => "offload",
        }
    }
}

/// Beside kube-proxy or instead of it.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Behaviour {
    /// kube-proxy runs too and gets what we do not take.
    Accelerate,
    /// We are the proxy.
    Replace,
}

/// How frames reach pods of this node.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum DeliveryChoice {
    /// `redirect` where it is verified and skips no rule of the host's, else `stack`.
    Auto,
    /// Through the kernel.
    Stack,
    /// Straight into the pod's veth, where the pod's end can receive it.
    Redirect,
    /// Handed to the pod's end by TC.
    Peer,
}

/// `[snat]`.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Snat {
    /// First port.
    pub first_port: u16,
    /// Last port, inclusive.
    pub last_port: u16,
}

impl Snat {
    /// The ports.
    pub const fn ports(&self) -> RangeInclusive<u16> {
        self.first_port..=self.last_port
    }
}

/// `[answers]`.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Answers {
    /// Whether answers are made.
    pub enabled: bool,
    /// Answers a second to one source address.
    pub rate_per_source: u16,
    /// Answers at once to one source address.
    pub burst_per_source: u16,
    /// Answers a second of one CPU.
    pub rate_per_cpu: u16,
    /// Answers at once of one CPU.
    pub burst_per_cpu: u16,
}

/// `[fail_safe]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FailSafe {
    /// TCP ports.
    pub tcp: Vec<u16>,
    /// UDP ports.
    pub udp: Vec<u16>,
}

/// `[maps]`: numbers of entries.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Maps {
    /// Service addresses and ports.
    pub frontends: u32,
    /// Endpoints.
    pub backends: u32,
    /// Service ports.
    pub services: u32,
    /// Entries of all consistent-hash tables together.
    pub maglev: u32,
    /// Pods of this node.
    pub pods: u32,
    /// Tunnel ends of other nodes.
    pub vteps: u32,
    /// Underlay addresses of other nodes.
    pub vtep_sources: u32,
    /// Next hops.
    pub nexthops: u32,
    /// Sets of the flow table, 16 connections each.
    pub flow_sets: u32,
    /// New connections in the places of the flood guard.
    pub flood_records: u32,
    /// Fragmented packets under way at once.
    pub fragments: u32,
}

impl Maps {
    /// Sets of the map of connections: those of the table and those of the flood guard.
    pub const fn all_flow_sets(&self) -> u32 {
        self.flow_sets + self.flood_records / sluice_abi::FLOW_WAYS as u32
    }
}

/// `[timeouts]`.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Timeouts {
    /// TCP, no reply yet.
    #[serde(deserialize_with = "duration")]
    pub tcp_syn: Duration,
    /// TCP, replied.
    #[serde(deserialize_with = "duration")]
    pub tcp_established: Duration,
    /// TCP, ended.
    #[serde(deserialize_with = "duration")]
    pub tcp_closing: Duration,
    /// UDP, no reply yet.
    #[serde(deserialize_with = "duration")]
    pub udp_oneway: Duration,
    /// UDP, replied.
    #[serde(deserialize_with = "duration")]
    pub udp_replied: Duration,
    /// Age at which a record's time stamp is renewed.
    #[serde(deserialize_with = "duration")]
    pub stamp: Duration,
    /// Age at which a record is decided anew.
    #[serde(deserialize_with = "duration")]
    pub redecide: Duration,
    /// How often the agent looks for expired records.
    #[serde(deserialize_with = "duration")]
    pub sweep: Duration,
}

/// `[maglev]`.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Maglev {
    /// Largest table of one Service.
    pub max_table: u32,
}

/// `[changes]`.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Changes {
    /// After the first change of a burst, how long further ones are gathered.
    #[serde(deserialize_with = "duration")]
    pub batch: Duration,
    /// Share of the programmed frontends whose disappearance at once is held.
    pub mass_removal_percent: u8,
    /// Fewer programmed frontends than this are never held.
    pub mass_removal_minimum: u32,
}

impl Default for Config {
    /// What `default.toml` says.
    fn default() -> Self {
        match Self::parse(DEFAULT_TOML, Path::new("default.toml")) {
            Ok(config) => config,
            // The file is compiled in and a test reads it.
            Err(e) => unreachable!("{e}"),
        }
    }
}

impl Config {
    /// Reads the file at `path`; keys that it does not name have their default.
    ///
    /// # Errors
    /// When the file cannot be read, or a key or a value is not usable.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::parse(&text, path)
    }

    /// Reads `text`; `path` appears in messages only.
    ///
    /// # Errors
    /// When a key or a value is not usable.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let syntax = |source: toml::de::Error| ConfigError::Syntax {
            path: path.to_owned(),
            source: Box::new(source),
        };
        let given: toml::Table = toml::from_str(text).map_err(syntax)?;
        let mut merged: toml::Table = toml::from_str(DEFAULT_TOML).map_err(syntax)?;
        if text != DEFAULT_TOML {
            merge(&mut merged, given);
        }
        let rendered = toml::to_string(&merged).unwrap_or_default();
        // Positions in the merged document mean nothing to the reader; the line itself does.
        let config: Config = toml::from_str(&rendered).map_err(|e| {
            let at = e.span().map_or(0, |s| s.start).min(rendered.len());
            let from = rendered[..at].rfind('\n').map_or(0, |i| i + 1);
            let line = rendered[from..].lines().next().unwrap_or_default();
            ConfigError::Key {
                path: path.to_owned(),
                line: line.to_owned(),
                problem: e.message().to_owned(),
            }
        })?;
        config.check(path)?;
        Ok(config)
    }

    /// The node's name: the configured one or the host name.
    pub fn node_name(&self) -> String {
        if !self.node_name.is_empty() {
            return self.node_name.clone();
        }
        nix::unistd::gethostname()
            .ok()
            .and_then(|n| n.into_string().ok())
            .unwrap_or_else(|| "localhost".to_owned())
            .to_lowercase()
    }

    /// The mode for uplink `name`.
    pub fn mode_of(&self, name: &str) -> Mode {
        self.datapath.interface.get(name).and_then(|o| o.mode).unwrap_or(self.datapath.mode)
    }

    /// The delivery for the host side `name` of a pod's veth.
    pub fn delivery_of(&self, name: &str) -> DeliveryChoice {
        self.datapath.interface.get(name).and_then(|o| o.delivery).unwrap_or(self.datapath.delivery)
    }
}

/// Lays `given` over `base`: tables are merged, everything else is replaced.
fn merge(base: &mut toml::Table, given: toml::Table) {
    for (key, value) in given {
        match (base.get_mut(&key), value) {
            (Some(toml::Value::Table(old)), toml::Value::Table(new)) => merge(old, new),
            (_, value) => {
                base.insert(key, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("test.toml"))
    }

    fn message(text: &str) -> String {
        match parse(text) {
            Ok(_) => panic!("accepted: {text}"),
            Err(e) => e.to_string(),
        }
    }

    #[test]
    fn default_file_is_the_default() {
        let config = Config::default();
        assert_eq!(config.maps.flow_sets, sluice_abi::maps::DEFAULT_FLOW_SETS);
        assert_eq!(config.maps.fragments, sluice_abi::maps::DEFAULT_FRAGMENTS);
        assert_eq!(config.maps.frontends, sluice_abi::maps::DEFAULT_FRONTENDS);
        assert_eq!(config.maps.backends, sluice_abi::maps::DEFAULT_BACKENDS);
        assert_eq!(config.maps.services, sluice_abi::maps::DEFAULT_SERVICES);
        assert_eq!(config.maps.maglev, sluice_abi::maps::DEFAULT_MAGLEV);
        assert_eq!(config.maps.pods, sluice_abi::maps::DEFAULT_PODS);
        assert_eq!(config.maps.vteps, sluice_abi::maps::DEFAULT_VTEPS);
        assert_eq!(config.maps.nexthops, sluice_abi::maps::DEFAULT_NEXTHOPS);
        assert_eq!(config.snat.first_port, sluice_abi::maps::DEFAULT_SNAT_FIRST_PORT);
        assert_eq!(config.snat.last_port, sluice_abi::maps::DEFAULT_SNAT_LAST_PORT);
    }

    /// Every line with a key has a comment directly above it, or above the key before it.
    #[test]
    fn every_key_of_the_default_file_is_documented() {
        let mut documented = false;
        let mut keys = 0;
        for line in DEFAULT_TOML.lines() {
            let line = line.trim();
            if line.starts_with('#') {
                documented = true;
            } else if line.is_empty() || line.starts_with('[') {
                documented = false;
            } else if let Some((key, _)) = line.split_once('=') {
                keys += 1;
                assert!(documented, "{key} has no comment");
            }
        }
        assert!(keys > 40, "only {keys} keys found");
    }

    #[test]
    fn given_keys_replace_defaults_and_leave_the_rest() {
        let config = parse(
            "[datapath]\nuplinks = ['uplink*']\nmode = 'generic'\n[datapath.interface.uplink1]\nmode = 'native'\n",
        )
        .expect("legal");
        assert!(config.datapath.uplinks[0].matches("uplink0"));
        assert_eq!(config.mode_of("uplink0"), Mode::Generic);
        assert_eq!(config.mode_of("uplink1"), Mode::Native);
        assert_eq!(config.fail_safe.tcp[0], 22);
    }

    #[test]
    fn unknown_key_is_named() {
        let text = message("[datapath]\nuplink = ['eth0']\n");
        assert!(text.contains("uplink") && text.contains("test.toml"), "{text}");
        assert!(text.contains("show-default"), "{text}");
    }

    #[test]
    fn wrong_values_are_named_with_a_remedy() {
        for (text, needles) in [
            ("[timeouts]\ntcp_syn = '5 parsecs'", ["5 parsecs", "unit"]),
            ("[timeouts]\nstamp = '1h'", ["timeouts.stamp", "1s"]),
            ("[maps]\nflow_sets = 5", ["maps.flow_sets = 5", "power of two"]),
            ("[maps]\nflood_records = 24", ["maps.flood_records = 24", "power of two"]),
            ("[maps]\nfragments = 0", ["maps.fragments = 0", "power of two"]),
            ("[datapath]\nmode = 'fast'", ["fast", "native"]),
            ("[datapath]\nuplinks = ['[']", ["[", "shell"]),
            ("[datapath]\nouter_dscp = 64", ["64", "inherit"]),
            ("[datapath]\nouter_dscp = 'high'", ["high", "0 to 63"]),
            ("[datapath]\nhairpin_v4 = 'fd00::1'", ["fd00::1", "IPv4"]),
            ("[datapath]\nhairpin_v6 = 'fe80::1'", ["datapath.hairpin_v6", "nobody has"]),
            ("[snat]\nfirst_port = 40000\nlast_port = 300", ["40000", "16384"]),
            ("[answers]\nrate_per_cpu = 0", ["answers.rate_per_cpu = 0", "enabled = false"]),
            ("[answers]\nburst_per_cpu = 70000", ["burst_per_cpu = 70000", "u16"]),
            ("[fail_safe]\ntcp = [0]", ["fail_safe.tcp", "remove"]),
            ("[fail_safe]\ntcp = [22, 20000]", ["fail_safe.tcp", "snat.first_port"]),
            ("[log]\nlevel = 'sluice=loud'", ["sluice=loud", "debug"]),
            ("[maglev]\nmax_table = 1", ["maglev.max_table", "100 times"]),
            ("pin_dir = 'here'", ["pin_dir", "from /"]),
            ("node_port_addresses = ['ten']", ["ten", "address"]),
            ("opt_out_services = ['shop']", ["shop", "namespace/name"]),
        ] {
            let message = message(text);
            for needle in needles {
                assert!(message.contains(needle), "{needle:?} not in: {message}");
            }
        }
    }
}
