//! From text to API objects: documents, lists, kinds.

use k8s_openapi::api::{core::v1 as core, discovery::v1 as discovery};
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::collections::BTreeMap;

use super::field::{printable, quote};
use super::{Ingested, Origin, endpoint_slice, node, pod, service};
use crate::Skipped;
use crate::model::Object;

/// Nodes (scalars, sequences, mappings) of one YAML document at most: some 10,000 endpoints have
/// a tenth of that.
const MAX_YAML_NODES: usize = 4_000_000;
/// Lists in lists at most.
const MAX_LIST_DEPTH: u32 = 4;
/// Longest parser message that is passed on.
const MAX_MESSAGE: usize = 300;

/// Reads a multi-document YAML (or JSON) text. A document that does not parse is left out alone.
pub fn ingest(origin: &Origin, text: &str) -> Ingested {
    let mut out = Ingested::default();
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    for (number, document) in documents(text).enumerate() {
        if !has_content(document.text) {
            continue;
        }
        let place = format!("document {} (line {})", number + 1, document.line);
        match parse(document.text) {
            Ok(Value::Null) => {}
            Ok(value) => {
                let list = List { place: &place, depth: 0, item: None };
                flatten(origin, value, &list, &mut out);
            }
            Err(message) => out.skipped.push(
                Skipped::error(place, format!("is not YAML: {message}"))
                    .within(origin)
                    .remedy("correct the document; the others of the file are used"),
            ),
        }
    }
    out
}

struct Document<'a> {
    /// Line of the file on which it starts, from 1.
    line: usize,
    text: &'a str,
}

/// Splits at document markers (YAML 1.2.2 section 9.1.2): `---` or `...` in the first column,
/// which no scalar may contain. Splitting before parsing keeps a bad document from its neighbours.
fn documents(text: &str) -> impl Iterator<Item = Document<'_>> {
    let mut found = Vec::new();
    let (mut start, mut start_line) = (0, 1);
    let mut offset = 0;
    for (i, line) in text.split_inclusive('\n').enumerate() {
        let marker = line
            .strip_prefix("---")
            .or_else(|| line.strip_prefix("..."))
            .is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']));
        if marker {
            found.push(Document { line: start_line, text: &text[start..offset] });
            // What follows the marker on its line belongs to the document: `--- {kind: Service}`.
            start = offset + 3;
            start_line = i + 1;
        }
        offset += line.len();
    }
    found.push(Document { line: start_line, text: &text[start..] });
    found.into_iter()
}

/// Whether a document is more than comments and white space.
fn has_content(text: &str) -> bool {
    text.lines().map(str::trim).any(|line| !line.is_empty() && !line.starts_with('#'))
}

fn parse(text: &str) -> Result<Value, String> {
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_events: 2 * MAX_YAML_NODES,
            max_nodes: MAX_YAML_NODES,
        },
    };
    serde_saphyr::from_str_with_options::<Value>(text, options).map_err(|error| {
        let message = error.without_snippet().to_string();
        let line = message.lines().next().unwrap_or_default();
        line.chars().filter(|c| !c.is_control()).take(MAX_MESSAGE).collect()
    })
}

/// Where an object stands.
struct List<'a> {
    /// For messages about an object that has no name.
    place: &'a str,
    /// Lists around it.
    depth: u32,
    /// Version and kind of a typed list's items, which need not repeat them.
    item: Option<(&'a str, &'a str)>,
}

/// Hands over every object of `value`, which may be a list.
fn flatten(origin: &Origin, value: Value, list: &List<'_>, out: &mut Ingested) {
    let Value::Object(mut fields) = value else {
        out.skipped.push(
            Skipped::error(list.place, "is not a Kubernetes object")
                .within(origin)
                .remedy("a document has the fields apiVersion, kind and metadata"),
        );
        return;
    };
    let text = |name: &str| match fields.get(name) {
        Some(Value::String(text)) => text.clone(),
        _ => String::new(),
    };
    let (mut version, mut kind) = (text("apiVersion"), text("kind"));
    if kind.is_empty()
        && let Some((list_version, item_kind)) = list.item
    {
        (version, kind) = (list_version.to_owned(), item_kind.to_owned());
    }
    if kind.is_empty() {
        out.skipped.push(
            Skipped::error(list.place, "is missing or not text")
                .within(origin)
                .at("kind")
                .remedy("a document has the fields apiVersion, kind and metadata"),
        );
        return;
    }
    if let Some(item_kind) = kind.strip_suffix("List")
        && matches!(item_kind, "" | "Service" | "EndpointSlice" | "Node" | "Pod")
    {
        if list.depth >= MAX_LIST_DEPTH {
            out.skipped.push(
                Skipped::error(&kind, "lists are nested too deep").within(origin).at("items"),
            );
            return;
        }
        match fields.remove("items") {
            Some(Value::Array(items)) => {
                let items_of = List {
                    place: list.place,
                    depth: list.depth + 1,
                    item: (!item_kind.is_empty()).then_some((version.as_str(), item_kind)),
                };
                for item in items {
                    flatten(origin, item, &items_of, out);
                }
            }
            None | Some(Value::Null) => {}
            Some(_) => out
                .skipped
                .push(Skipped::error(&kind, "is not a sequence").within(origin).at("items")),
        }
        return;
    }
    object(origin, &version, &kind, Value::Object(fields), out);
}

/// Converts one object, or counts it as ignored.
fn object(origin: &Origin, version: &str, kind: &str, value: Value, out: &mut Ingested) {
    let skipped = &mut out.skipped;
    let object = match (version, kind) {
        ("v1", "Service") => typed::<core::Service>(origin, kind, value, skipped)
            .and_then(|o| service(origin, &o, skipped))
            .map(Object::Service),
        ("discovery.k8s.io/v1", "EndpointSlice") => {
            typed::<discovery::EndpointSlice>(origin, kind, value, skipped)
                .and_then(|o| endpoint_slice(origin, &o, skipped))
                .map(Object::EndpointSlice)
        }
        ("v1", "Node") => typed::<core::Node>(origin, kind, value, skipped)
            .and_then(|o| node(origin, &o, skipped))
            .map(Object::Node),
        ("v1", "Pod") => typed::<core::Pod>(origin, kind, value, skipped)
            .and_then(|o| pod(origin, &o, skipped))
            .map(Object::Pod),
        ("" | "v1" | "discovery.k8s.io/v1beta1", "Service" | "EndpointSlice" | "Node" | "Pod") => {
            skipped.push(
                Skipped::error(
                    title(kind, &value),
                    format!("{} is not the version of {kind}", quote(version)),
                )
                .within(origin)
                .at("apiVersion")
                .remedy("use v1, or discovery.k8s.io/v1 for EndpointSlice"),
            );
            None
        }
        _ => {
            count(&mut out.ignored, version, kind);
            None
        }
    };
    out.objects.extend(object);
}

fn count(ignored: &mut BTreeMap<String, usize>, version: &str, kind: &str) {
    let name = printable(&format!("{version}/{kind}"), 100);
    *ignored.entry(name).or_default() += 1;
}

/// `Kind namespace/name` of an object that may lack either.
fn title(kind: &str, value: &Value) -> String {
    let text = |name: &str| match value.pointer(&format!("/metadata/{name}")) {
        Some(Value::String(text)) => {
            text.chars().filter(|c| !c.is_control()).take(253).collect::<String>()
        }
        _ => String::new(),
    };
    match (text("namespace"), text("name")) {
        (_, name) if name.is_empty() => kind.to_owned(),
        (namespace, name) if namespace.is_empty() => format!("{kind} default/{name}"),
        (namespace, name) => format!("{kind} {namespace}/{name}"),
    }
}

/// The API type of a value, or the path of the first field that does not fit it.
fn typed<T: DeserializeOwned>(
    origin: &Origin,
    kind: &str,
    value: Value,
    skipped: &mut Vec<Skipped>,
) -> Option<T> {
    let title = title(kind, &value);
    serde_path_to_error::deserialize(value)
        .map_err(|error| {
            let path = printable(&error.path().to_string(), MAX_MESSAGE);
            let reason = printable(&error.into_inner().to_string(), MAX_MESSAGE);
            skipped.push(
                Skipped::error(title, reason)
                    .within(origin)
                    .at(path)
                    .remedy("compare the field with the Kubernetes API reference"),
            );
        })
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Ingested {
        ingest(&"test.yaml".into(), text)
    }

    const GOOD: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: good}\n\
                        spec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}\n";

    #[test]
    fn bad_document_leaves_its_neighbours_alone() {
        let out = read(&format!("{GOOD}---\nkind: [unclosed\n---\n{}", GOOD.replace("good", "b")));
        assert_eq!(out.objects.len(), 2);
        assert_eq!(out.skipped.len(), 1);
        let message = out.skipped[0].to_string();
        assert!(message.starts_with("test.yaml: document 2 (line 5): is not YAML"), "{message}");
    }

    #[test]
    fn wrong_type_names_object_and_field() {
        let out = read(&format!("{GOOD}---\n{}", GOOD.replace("port: 80", "port: eighty")));
        assert_eq!(out.objects.len(), 1);
        assert_eq!(out.skipped[0].object, "Service default/good");
        assert_eq!(out.skipped[0].field, "spec.ports[0].port");
    }

    #[test]
    fn lists_are_flattened_and_other_kinds_counted() {
        let out = read(
            "apiVersion: v1\nkind: List\nitems:\n\
             - {apiVersion: v1, kind: Service, metadata: {name: a}, spec: {ports: [{port: 1}]}}\n\
             - apiVersion: v1\n  kind: ServiceList\n  items:\n\
             \x20 - {metadata: {name: b}, spec: {ports: [{port: 1}]}}\n\
             - {apiVersion: apps/v1, kind: Deployment, metadata: {name: c}}\n\
             - {apiVersion: serving.knative.dev/v1, kind: Service, metadata: {name: d}}\n",
        );
        assert_eq!(out.skipped, []);
        let titles: Vec<_> = out.objects.iter().map(Object::title).collect();
        assert_eq!(titles, ["Service default/a", "Service default/b"]);
        assert_eq!(out.ignored.len(), 2);
        assert_eq!(out.ignored["apps/v1/Deployment"], 1);
    }

    #[test]
    fn empty_and_comment_documents_are_silent() {
        let out = read("# nothing\n---\n\n---\n# here\n...\n---\n");
        assert_eq!(out, Ingested::default());
    }

    #[test]
    fn json_is_yaml() {
        let out = read(
            "{\"apiVersion\": \"v1\", \"kind\": \"Service\", \"metadata\": {\"name\": \"a\"},\n\
             \t\"spec\": {\"ports\": [{\"port\": 80}]}}",
        );
        assert_eq!(out.skipped, []);
        assert_eq!(out.objects.len(), 1);
    }
}
