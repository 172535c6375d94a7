//! Packets as data: one table, run on the host and in the loaded program.

use sluice_abi::{Family, REASONS};
use sluice_tests::fixtures;
use sluice_tests::host::Host;
use sluice_tests::judge::{Runner, WITHOUT_FAMILY, in_kernel, judge};
use sluice_tests::netns::with_kernel;
use sluice_tests::world::FAMILIES;

#[test]
fn every_reason_has_a_fixture_of_every_family() {
    let table = fixtures::all();
    let has = |reason, family: Option<Family>| {
        table.iter().any(|f| f.reason == reason && (family.is_none() || f.family == family))
    };
    let mut missing = Vec::new();
    for row in REASONS {
        if WITHOUT_FAMILY.contains(&row.reason) {
            if !has(row.reason, None) {
                missing.push(row.label.to_owned());
            }
            continue;
        }
        for family in FAMILIES {
            if !has(row.reason, Some(family)) {
                missing.push(format!("{} {family:?}", row.label));
            }
        }
    }
    assert!(missing.is_empty(), "no fixture for: {}", missing.join(", "));
}

#[test]
fn names_of_fixtures_are_unique() {
    let mut names: Vec<_> = fixtures::all().into_iter().map(|f| f.name).collect();
    names.sort_unstable();
    let twice: Vec<_> = names.windows(2).filter(|w| w[0] == w[1]).map(|w| &w[0]).collect();
    assert!(twice.is_empty(), "{twice:?}");
}

#[test]
fn host_does_what_the_fixtures_say() {
    let mut failures = Vec::new();
    let table = fixtures::all();
    for fixture in &table {
        if let Err(text) = judge(fixture, &mut Host::new(&fixture.world)) {
            failures.push(format!("{}: {text}", fixture.name));
        }
    }
    report(&failures, table.len());
}

#[test]
fn loaded_program_does_what_the_host_does() {
    let (failures, count) = with_kernel(|kernel| {
        let mut failures = Vec::new();
        let mut count = 0;
        for fixture in fixtures::all().iter().filter(|f| in_kernel(f)) {
            count += 1;
            kernel.fill(&fixture.world);
            if let Err(text) = judge(fixture, kernel) {
                failures.push(format!("{}: {text}", fixture.name));
                continue;
            }
            let mut host = Host::new(&fixture.world);
            if judge(fixture, &mut host).is_ok() && host.state() != kernel.state() {
                failures.push(format!("{}: another flow table than the host's", fixture.name));
            }
        }
        (failures, count)
    });
    report(&failures, count);
}

fn report(failures: &[String], of: usize) {
    println!("{of} fixtures");
    assert!(failures.is_empty(), "{} of {of}:\n{}", failures.len(), failures.join("\n"));
}
