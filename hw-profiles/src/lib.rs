//! Driver profiles: what no probe of a network device tells.
//!
//! ```text
//! default.toml ──┐ merged, key by key
//! drivers/X.toml ┴─► Profile ─► the attach ladder, pre-checks, warnings
//! ```
//!
//! `default.toml` documents every legal key and is the profile of a driver that has no file. The
//! files are compiled in; nothing is read at run time and no device is touched here. A profile never
//! turns on what a probe denies: [`Support::and_probe`] is the rule.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The default profile's text, with the meaning of every key.
pub const DEFAULT: &str = include_str!("../default.toml");

/// Kernel driver name and text of every profile.
const DRIVERS: [(&str, &str); 2] = [
    ("veth", include_str!("../drivers/veth.toml")),
    ("virtio_net", include_str!("../drivers/virtio_net.toml")),
];

/// The format version that this crate reads.
const SCHEMA: u32 = 1;

/// Facts about one kernel driver. Every key is explained in [`DEFAULT`].
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// Format version.
    pub schema: u32,
    /// Kernel driver name (`ethtool -i`), or `unknown`.
    pub id: String,
    /// Name for people.
    pub title: String,
    /// How the facts were checked.
    pub status: Status,
    /// Where the facts are from.
    pub source: Source,
    /// Facts about XDP.
    pub xdp: Xdp,
    /// What no key expresses.
    #[serde(default)]
    pub quirks: Vec<Quirk>,
}

/// How the facts of a profile were checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// Reported by users.
    Community,
    /// Read in the kernel's source, not measured.
    SourceOnly,
    /// Measured on this driver.
    Verified,
}

/// Where the facts of a profile are from.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// Kernel version.
    pub kernel: String,
    /// Files of that kernel's source.
    pub files: Vec<String>,
    /// What was measured and what was read.
    pub notes: Option<String>,
}

/// Facts about XDP on a driver.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Xdp {
    /// Features that the device claims and that must not be used (netdev family, `xdp-act`).
    pub broken_features: Vec<String>,
    /// Modes to try, best first.
    pub prefer: Vec<Mode>,
    /// Ceiling for each mode.
    pub modes: Modes,
    /// Limits of the MTU.
    pub mtu: Mtu,
    /// What attaching does to traffic.
    pub attach: Attach,
    /// Redirecting.
    pub redirect: Redirect,
    /// Conditions to check before attaching.
    #[serde(default)]
    pub require: Vec<Require>,
}

/// Where an XDP program runs. The kernel's words are HW, DRV and SKB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// In the NIC's own processor.
    Offload,
    /// In the driver.
    Native,
    /// In the network core.
    Generic,
}

/// What a driver can do, at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Support {
    /// The device claims it; do not use it.
    Broken,
    /// Never.
    No,
    /// Ask the device.
    Runtime,
    /// Every device of this driver.
    Yes,
}

impl Support {
    /// Whether to use it. `probe` is the device's own answer; `None` where the kernel has no way to
    /// ask (before 6.3), and then only [`Support::Yes`] is enough.
    ///
    /// ```
    /// use sluice_hw_profiles::Support;
    /// assert!(!Support::Yes.and_probe(Some(false)), "a profile never overrules a refusal");
    /// assert!(!Support::Broken.and_probe(Some(true)), "but it may veto a promise");
    /// assert!(Support::Runtime.and_probe(Some(true)));
    /// assert!(!Support::Runtime.and_probe(None));
    /// ```
    pub const fn and_probe(self, probe: Option<bool>) -> bool {
        match (self, probe) {
            (Self::Broken | Self::No, _) | (_, Some(false)) | (Self::Runtime, None) => false,
            (Self::Runtime, Some(true)) | (Self::Yes, Some(true) | None) => true,
        }
    }
}

/// Ceiling for each mode: a limit, never a promise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Modes {
    /// See [`Mode::Offload`].
    pub offload: Support,
    /// See [`Mode::Native`].
    pub native: Support,
    /// See [`Mode::Generic`].
    pub generic: Support,
}

/// Limits of the MTU in native mode, in bytes without the link header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Mtu {
    /// Limit for a program without fragment support; `None`: not known.
    pub linear_max: Option<u32>,
    /// Limit for a program with fragment support; `None`: not known, or no such support.
    pub frags_max: Option<u32>,
    /// Whose MTU is limited.
    pub of: MtuOf,
    /// The kernel refuses a larger MTU while a program is attached.
    pub guarded_after_attach: bool,
}

/// Whose MTU a limit is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum MtuOf {
    /// The interface's that the program is attached to.
    Own,
    /// The other end's of a veth pair.
    Peer,
}

/// What attaching does to traffic.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Attach {
    /// By the first program.
    pub first: Disruption,
    /// By one program replacing another.
    pub swap: Disruption,
    /// By the last program's removal.
    pub last: Disruption,
    /// Meaning of an error number, by its symbol (`EINVAL`).
    #[serde(default)]
    pub error_hint: BTreeMap<String, String>,
}

/// What traffic sees of a change, mildest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Disruption {
    /// Nothing.
    None,
    /// A pause of the queues.
    QueueRestart,
    /// The link goes down and up.
    CarrierFlap,
    /// The device starts anew.
    DeviceReset,
}

/// Redirecting in native mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Redirect {
    /// Frames that arrive on the device.
    pub ingress: Support,
    /// Frames that leave through the device.
    pub egress: Support,
}

/// A condition for native mode.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Require {
    /// What to check.
    pub check: Check,
    /// What it means when the check fails.
    pub severity: Severity,
    /// What the operator can do; `{if}` stands for the interface.
    pub fix: String,
}

/// The checks that the agent knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Check {
    /// Receive queues here are at least as many as the peer's transmit queues.
    PeerQueues,
    /// There is a free transmit queue for each CPU.
    TxqPerCpu,
}

/// What a failed check means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// Native mode is refused.
    Error,
    /// Native mode works, but worse.
    Warn,
}

/// What an operator should know.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Quirk {
    /// Stable name.
    pub id: String,
    /// What happens.
    pub text: String,
    /// What to do about it.
    pub mitigation: String,
}

/// Why a profile cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProfileError {
    /// Not TOML, an unknown key, a missing key or a value of the wrong kind.
    #[error("profile {name}: {source}; legal keys and values stand in hw-profiles/default.toml")]
    Syntax {
        /// Which profile.
        name: String,
        /// What and where.
        source: Box<toml::de::Error>,
    },
    /// The format is of another version.
    #[error("profile {name}: schema is {found}, this version reads {SCHEMA}")]
    Schema {
        /// Which profile.
        name: String,
        /// Its version.
        found: u32,
    },
    /// The file's name and its `id` differ, so that it would not be found.
    #[error("profile {name}: id is {id:?}; it must be the kernel driver's name, as the file's")]
    Name {
        /// Which profile.
        name: String,
        /// The `id` in it.
        id: String,
    },
}

/// All profiles.
#[derive(Clone, Debug)]
pub struct Profiles {
    unknown: Profile,
    by_driver: BTreeMap<String, Profile>,
}

impl Profiles {
    /// The profiles that are compiled in.
    ///
    /// ```
    /// # fn main() -> Result<(), sluice_hw_profiles::ProfileError> {
    /// use sluice_hw_profiles::{Mode, Profiles};
    /// let profiles = Profiles::built_in()?;
    /// assert_eq!(profiles.of_driver("veth").xdp.prefer, [Mode::Native, Mode::Generic]);
    /// assert_eq!(profiles.of_driver("no_such_driver").id, "unknown");
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// A file of this crate is wrong; the crate's tests exclude that.
    pub fn built_in() -> Result<Self, ProfileError> {
        let unknown = parse("unknown", "")?;
        let by_driver = DRIVERS
            .into_iter()
            .map(|(driver, text)| Ok((driver.to_owned(), parse(driver, text)?)))
            .collect::<Result<_, ProfileError>>()?;
        Ok(Self { unknown, by_driver })
    }

    /// The profile of a kernel driver; the default for one that has none.
    pub fn of_driver(&self, driver: &str) -> &Profile {
        self.by_driver.get(driver).unwrap_or(&self.unknown)
    }

    /// The drivers that have a profile, by name.
    pub fn drivers(&self) -> impl Iterator<Item = &str> {
        self.by_driver.keys().map(String::as_str)
    }
}

/// Lays the profile `text` over the default one. An empty text inherits everything.
fn parse(name: &str, text: &str) -> Result<Profile, ProfileError> {
    let syntax = |source| ProfileError::Syntax { name: name.to_owned(), source: Box::new(source) };
    let mut merged: toml::Table = DEFAULT.parse().map_err(syntax)?;
    merge(&mut merged, text.parse().map_err(syntax)?);
    let profile: Profile = merged.try_into().map_err(syntax)?;
    if profile.schema != SCHEMA {
        return Err(ProfileError::Schema { name: name.to_owned(), found: profile.schema });
    }
    if profile.id != name {
        return Err(ProfileError::Name { name: name.to_owned(), id: profile.id });
    }
    Ok(profile)
}

/// Tables are merged key by key; every other value of `over` replaces the one in `base`.
fn merge(base: &mut toml::Table, over: toml::Table) {
    for (key, value) in over {
        match (base.get_mut(&key), value) {
            (Some(toml::Value::Table(base)), toml::Value::Table(over)) => merge(base, over),
            (_, value) => {
                base.insert(key, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `default.toml` with its example lines made real, so that every key has a value.
    fn default_with_examples() -> String {
        DEFAULT.lines().map(|line| format!("{}\n", line.trim_start_matches("#: "))).collect()
    }

    #[test]
    fn every_compiled_in_profile_is_legal() {
        let profiles = Profiles::built_in().expect("profiles of this crate");
        assert_eq!(profiles.drivers().collect::<Vec<_>>(), ["veth", "virtio_net"]);
    }

    #[test]
    fn every_file_is_compiled_in() {
        let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/drivers");
        let mut files: Vec<_> = std::fs::read_dir(directory)
            .expect("drivers/")
            .map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8"))
            .collect();
        files.sort();
        assert_eq!(files, DRIVERS.map(|(driver, _)| format!("{driver}.toml")));
    }

    #[test]
    fn default_file_documents_every_key() {
        let text = default_with_examples();
        let profile: Profile = toml::from_str(&text).expect("examples are legal");
        let json = serde_json::to_value(&profile).expect("a profile as JSON");
        let mut undocumented = Vec::new();
        find_unset("", &json, &mut undocumented);
        // The only key whose default is empty and meant so.
        assert_eq!(undocumented, ["/xdp/broken_features"]);
    }

    /// Paths of the values that the text did not set.
    fn find_unset(path: &str, value: &serde_json::Value, unset: &mut Vec<String>) {
        use serde_json::Value::{Array, Null, Object};
        match value {
            Null => unset.push(path.to_owned()),
            Array(items) if items.is_empty() => unset.push(path.to_owned()),
            Object(fields) if fields.is_empty() => unset.push(path.to_owned()),
            Array(items) => items.iter().for_each(|item| find_unset(path, item, unset)),
            Object(fields) => {
                for (key, field) in fields {
                    find_unset(&format!("{path}/{key}"), field, unset);
                }
            }
            _ => {}
        }
    }

    #[test]
    fn unknown_key_is_refused_at_every_level() {
        for text in ["colour = 1", "[xdp]\ncolour = 1", "[xdp.modes]\nhw = \"yes\""] {
            let error = parse("unknown", text).expect_err(text).to_string();
            assert!(error.contains("unknown field"), "{text}: {error}");
            assert!(error.contains("default.toml"), "{text}: {error}");
        }
    }

    #[test]
    fn wrong_schema_and_wrong_name_are_refused() {
        assert!(matches!(
            parse("unknown", "schema = 2"),
            Err(ProfileError::Schema { found: 2, .. })
        ));
        assert!(matches!(parse("veth", "id = \"veth2\""), Err(ProfileError::Name { .. })));
    }

    #[test]
    fn driver_file_overrides_one_key_of_a_table_and_inherits_the_rest() {
        let text = "id = \"x\"\n[xdp.modes]\nnative = \"broken\"";
        let profile = parse("x", text).expect("legal");
        let default = parse("unknown", "").expect("legal");
        assert_eq!(profile.xdp.modes, Modes { native: Support::Broken, ..default.xdp.modes });
        assert_eq!(profile.xdp.attach, default.xdp.attach);
    }

    #[test]
    fn unknown_driver_gets_the_careful_profile() {
        let profiles = Profiles::built_in().expect("profiles of this crate");
        let unknown = profiles.of_driver("no_such_driver");
        assert!(!unknown.xdp.modes.offload.and_probe(Some(true)));
        assert_eq!(unknown.xdp.attach.first, Disruption::DeviceReset);
        assert!(!unknown.xdp.prefer.contains(&Mode::Generic), "generic only when asked for");
    }

    #[test]
    fn preferred_modes_are_not_ruled_out_by_the_same_profile() {
        for (driver, text) in DRIVERS {
            let profile = parse(driver, text).expect("legal");
            for mode in profile.xdp.prefer {
                let Modes { offload, native, generic } = profile.xdp.modes;
                let support = match mode {
                    Mode::Offload => offload,
                    Mode::Native => native,
                    Mode::Generic => generic,
                };
                assert!(support.and_probe(Some(true)), "{driver}: {mode:?}");
            }
        }
    }
}
