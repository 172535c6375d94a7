//! What was left out, and what would put it in.

use serde::Serialize;
use std::fmt;

/// How much a person must care.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// Left out on purpose, as Kubernetes says: headless, ExternalName, opted out.
    Notice,
    /// Left out because something is wrong with the object or with the node.
    Error,
}

/// Something that was not programmed: an object, or a part of one. Becomes a log line, an Event and
/// a metric. The rest of the input is not affected.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
pub struct Skipped {
    /// How much a person must care.
    pub level: Level,
    /// File or API source of the object; empty for facts of the node.
    pub origin: String,
    /// `Kind namespace/name`, as far as known.
    pub object: String,
    /// Path of the field, for example `spec.ports[0].port`; empty for the whole object.
    pub field: String,
    /// What is wrong.
    pub reason: String,
    /// What would lift it; empty where nothing needs to be done.
    pub remedy: String,
}

impl Skipped {
    /// An error without a field; add with [`Skipped::at`], [`Skipped::remedy`].
    pub fn error(object: impl fmt::Display, reason: impl Into<String>) -> Self {
        Self {
            level: Level::Error,
            origin: String::new(),
            object: object.to_string(),
            field: String::new(),
            reason: reason.into(),
            remedy: String::new(),
        }
    }

    /// A notice: left out on purpose.
    pub fn notice(object: impl fmt::Display, reason: impl Into<String>) -> Self {
        Self { level: Level::Notice, ..Self::error(object, reason) }
    }

    /// With the path of the field.
    pub fn at(mut self, field: impl Into<String>) -> Self {
        self.field = field.into();
        self
    }

    /// With what would lift it.
    pub fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = remedy.into();
        self
    }

    /// With the file or source.
    pub fn within(mut self, origin: impl fmt::Display) -> Self {
        self.origin = origin.to_string();
        self
    }
}

impl fmt::Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for part in [&self.origin, &self.object, &self.field] {
            if !part.is_empty() {
                write!(f, "{part}: ")?;
            }
        }
        f.write_str(&self.reason)?;
        if !self.remedy.is_empty() {
            write!(f, " ({})", self.remedy)?;
        }
        Ok(())
    }
}
