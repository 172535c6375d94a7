//! YAML in, tables out: the cases of `tests/golden`, see the README there.

use sluice_control::dump::{Dump, dump};
use sluice_control::fake::FakeMaps;
use sluice_control::model::{NodeContext, Object, Snapshot};
use sluice_control::{
    Allocator, Limits, MapStore, Names, Origin, Skipped, Tables, compile, delta, ingest,
};
use std::collections::BTreeSet;
use std::error::Error;
use std::io::Write;
use std::path::{Path, PathBuf};

type Outcome = Result<(), Box<dyn Error>>;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden")
}

macro_rules! cases {
    ($($test:ident $folder:literal,)+) => {
        const CASES: &[&str] = &[$($folder),+];
        $(
            #[test]
            fn $test() -> Outcome {
                run($folder)
            }
        )+
    };
}

cases! {
    clusterip "clusterip",
    nodeport "nodeport",
    loadbalancer "loadbalancer",
    external_ip "external-ip",
    dual_stack "dual-stack",
    two_slices_with_duplicate "two-slices-with-duplicate",
    named_target_ports_differ "named-target-ports-differ",
    policies_local "policies-local",
    terminating_only "terminating-only",
    no_endpoints "no-endpoints",
    bad_object_among_good "bad-object-among-good",
    opt_out "opt-out",
    remote_by_tunnel "remote-by-tunnel",
    remote_plain "remote-plain",
    source_ranges "source-ranges",
    shared_address "shared-address",
}

#[test]
fn every_case_folder_is_run() -> Outcome {
    let mut folders = BTreeSet::new();
    for entry in std::fs::read_dir(folder())? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            folders.insert(entry.file_name().to_string_lossy().into_owned());
        }
    }
    assert_eq!(folders, CASES.iter().map(|case| (*case).to_owned()).collect());
    Ok(())
}

/// What `expected.yaml` holds.
#[derive(serde::Serialize)]
struct Expected {
    tables: Dump,
    skipped: Vec<String>,
}

struct Programmed {
    dump: Dump,
    tables: Tables,
    names: Names,
    skipped: Vec<Skipped>,
}

fn program(input: &str, node: &NodeContext, maps: &mut FakeMaps, names: &Names) -> Programmed {
    let origin: Origin = "input.yaml".into();
    let mut ingested = ingest(&origin, input);
    let mut snapshot = Snapshot::default();
    let mut skipped = std::mem::take(&mut ingested.skipped);
    skipped.extend(snapshot.extend(ingested.objects));
    let compiled = compile(&snapshot, node);
    skipped.extend(compiled.skipped);
    let Ok(actual) = maps.load();
    let allocation =
        Allocator::new(Limits::default()).allocate(&compiled.desired, &actual, names, 0);
    skipped.extend(allocation.skipped);
    skipped.sort();
    for op in delta(&actual, &allocation.tables).ops {
        let Ok(()) = maps.apply(&op);
        assert_eq!(maps.tables.dangling(), Vec::<String>::new(), "after {op:?}");
    }
    Programmed {
        dump: dump(&allocation.tables, &allocation.names),
        tables: allocation.tables,
        names: allocation.names,
        skipped,
    }
}

fn run(case: &str) -> Outcome {
    let case = folder().join(case);
    let input = std::fs::read_to_string(case.join("input.yaml"))?;
    let facts = std::fs::read_to_string(case.join("node.toml"))
        .or_else(|_| std::fs::read_to_string(folder().join("node.toml")))?;
    let node: NodeContext = toml::from_str(&facts)?;

    let mut maps = FakeMaps::default();
    let first = program(&input, &node, &mut maps, &Names::default());
    let text = serde_saphyr::to_string(&Expected {
        tables: first.dump.clone(),
        skipped: first.skipped.iter().map(ToString::to_string).collect(),
    })?;
    let path = case.join("expected.yaml");
    if std::env::var_os("UPDATE").is_some_and(|value| value == "1") {
        std::fs::write(&path, &text)?;
    }
    let expected = std::fs::read_to_string(&path)
        .map_err(|error| format!("{}: {error}; UPDATE=1 writes it", path.display()))?;
    assert!(text == expected, "{} differs; got:\n{text}\nUPDATE=1 rewrites it", path.display());

    // The maps hold what was computed, and the same input again changes nothing.
    let Ok(loaded) = maps.load();
    assert_eq!(loaded, first.tables);
    maps.applied.clear();
    let second = program(&input, &node, &mut maps, &first.names);
    assert_eq!(maps.applied, []);
    assert_eq!(second.dump, first.dump);
    // Neither does it when the names are lost.
    let third = program(&input, &node, &mut maps, &Names::default());
    assert_eq!(maps.applied, []);
    assert_eq!(third.names, first.names);

    // Documents in another order: the same tables.
    let mut documents: Vec<&str> = input.split("\n---\n").collect();
    for _ in 0..documents.len() {
        documents.rotate_left(1);
        for order in [documents.clone(), documents.iter().rev().copied().collect()] {
            let other =
                program(&order.join("\n---\n"), &node, &mut FakeMaps::default(), &Names::default());
            assert_eq!(other.dump, first.dump);
        }
    }

    // Objects gone: no Service is left. Node facts gone too: nothing is left.
    let gone = program("", &node, &mut maps, &first.names);
    assert!(gone.tables.frontends.is_empty());
    assert!(gone.tables.backends.is_empty());
    assert!(gone.tables.extents.is_empty());
    program("", &NodeContext::default(), &mut maps, &gone.names);
    let Ok(loaded) = maps.load();
    assert_eq!(loaded, Tables::default());
    Ok(())
}

/// Manifests that were not written for us, where they are there.
#[test]
fn shop_of_others_is_accepted() -> Outcome {
    let data = std::env::var_os("SLUICE_SHARED_DATA").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data"),
        PathBuf::from,
    );
    let path = data.join("manifests/online-boutique.yaml");
    let Ok(text) = std::fs::read_to_string(&path) else {
        return skip(&format!(
            "SKIPPED shop_of_others_is_accepted: shared-data {} is not there",
            path.display()
        ));
    };
    let ingested = ingest(&"online-boutique.yaml".into(), &text);
    assert_eq!(ingested.skipped, []);
    let services =
        ingested.objects.iter().filter(|object| matches!(object, Object::Service(_))).count();
    assert_eq!(services, 12);
    assert_eq!(ingested.ignored.get("apps/v1/Deployment"), Some(&12));
    let mut snapshot = Snapshot::default();
    assert_eq!(snapshot.extend(ingested.objects), []);
    // As the file stands, no Service has an address: nothing is programmed, nothing is wrong.
    let compiled = compile(&snapshot, &NodeContext::default());
    assert_eq!(compiled.skipped, []);
    assert!(compiled.desired.frontends.is_empty());
    Ok(())
}

/// Says on standard output, and in the file that SLUICE_SKIP_LOG names, that a test did not run.
fn skip(line: &str) -> Outcome {
    println!("{line}");
    if let Some(log) = std::env::var_os("SLUICE_SKIP_LOG") {
        let mut log = std::fs::OpenOptions::new().create(true).append(true).open(log)?;
        writeln!(log, "{line}")?;
    }
    Ok(())
}
