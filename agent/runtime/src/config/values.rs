//! Values with a form of their own.

use std::fmt::Display;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer};

/// A name with `*`, `?` and `[...]` as the shell has them.
#[derive(Clone, Debug)]
pub struct Pattern(glob::Pattern);

impl Pattern {
    /// Whether `name` fits.
    pub fn matches(&self, name: &str) -> bool {
        self.0.matches(name)
    }

    /// As it was written.
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }
}

impl<'de> Deserialize<'de> for Pattern {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text.is_empty() {
            return Err(serde::de::Error::custom(
                "an empty interface name; write a name such as \"eth0\" or a pattern such as \"eth*\"",
            ));
        }
        glob::Pattern::new(&text).map(Self).map_err(|e| {
            serde::de::Error::custom(format!(
                "{text:?} is no interface name or pattern ({e}); use *, ? and [...] as in the shell"
            ))
        })
    }
}

/// `namespace/name` of a Service.
#[derive(Clone, Debug)]
pub struct ServiceName {
    namespace: String,
    name: String,
}

impl ServiceName {
    /// The namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The name in it.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl<'de> Deserialize<'de> for ServiceName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        match text.split_once('/') {
            Some((namespace, name))
                if !namespace.is_empty() && !name.is_empty() && !name.contains('/') =>
            {
                Ok(Self { namespace: namespace.to_owned(), name: name.to_owned() })
            }
            _ => Err(serde::de::Error::custom(format!(
                "{text:?} names no Service; write \"namespace/name\""
            ))),
        }
    }
}

pub(super) fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    humantime::parse_duration(&text).map_err(|e| {
        serde::de::Error::custom(format!(
            "{text:?} is no duration ({e}); write a number with a unit, such as \"30s\", \"5m\", \"1h30m\""
        ))
    })
}

/// An address of one family, or nothing for an empty text.
pub(super) fn address<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err: Display>,
{
    let text = String::deserialize(deserializer)?;
    if text.is_empty() {
        return Ok(None);
    }
    let parsed = text.parse().map(Some);
    parsed.map_err(|e| serde::de::Error::custom(format!("{text:?} does not fit: {e}")))
}
