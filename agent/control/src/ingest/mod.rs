//! From manifests and API objects to the model: parsing, the API server's defaults, validation.
//!
//! ```text
//!  text ─► documents ─► JSON value ─► (List flattened) ─► API type ─► model object
//!              └ does not parse │ wrong field │ not valid ─► Skipped, the rest goes on
//! ```
//!
//! Nothing here compares objects with each other or with the node: that is compile's.

mod document;
mod field;
mod node;
mod service;
mod slice;

pub use document::ingest;
pub use field::parse_ip;
pub use node::{node, pod};
pub use service::{OPT_OUT_ANNOTATION, service};
pub use slice::endpoint_slice;

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::Skipped;
use crate::model::Object;

/// Where an object comes from: a file name, or the API server's.
pub type Origin = Arc<str>;

/// What one file held.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Ingested {
    /// Valid objects, in the order of the file.
    pub objects: Vec<Object>,
    /// What was left out.
    pub skipped: Vec<Skipped>,
    /// Objects of kinds that Sluice does not read, counted by `apiVersion/kind`.
    pub ignored: BTreeMap<String, usize>,
}
