//! Packets as data: one table, run on the host and in the loaded program.

use sluice_abi::{Family, Hook, IPPROTO_TCP, REASONS, Reason};
use sluice_datapath::verdict::Action;
use sluice_tests::fixtures::{self, Account, Fixture, HeadRoom, Out, request};
use sluice_tests::host::Host;
use sluice_tests::judge::{OF_ONE_FAMILY, Runner, WITHOUT_FAMILY, WITHOUT_LANES, in_kernel, judge};
use sluice_tests::netns::with_kernel;
use sluice_tests::world::{FAMILIES, Svc, VTEP_V6, World, dev};

#[test]
fn every_reason_has_a_fixture_of_every_family() {
    let mut table = fixtures::all();
    table.extend(fixtures::at_tc().0);
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
            let other = OF_ONE_FAMILY.iter().any(|(r, f)| *r == row.reason && *f != family);
            if other || WITHOUT_LANES.contains(&row.reason) {
                continue;
            }
            if !has(row.reason, Some(family)) {
                missing.push(format!("{} {family:?}", row.label));
            }
        }
    }
    assert!(missing.is_empty(), "no fixture for: {}", missing.join(", "));
}

#[test]
fn names_of_fixtures_are_unique() {
    let table = fixtures::all().into_iter().chain(fixtures::at_tc().0);
    let mut names: Vec<_> = table.map(|f| f.name).collect();
    names.sort_unstable();
    let twice: Vec<_> = names.windows(2).filter(|w| w[0] == w[1]).map(|w| &w[0]).collect();
    assert!(twice.is_empty(), "{twice:?}");
}

#[test]
fn host_does_what_the_fixtures_say() {
    let mut failures = Vec::new();
    let table = fixtures::all();
    for fixture in &table {
        if let Err(text) = judge(fixture, &mut Host::new(fixture.first_world())) {
            failures.push(format!("{}: {text}", fixture.name));
        }
    }
    report(&failures, table.len());
}

#[test]
fn tc_does_at_the_uplink_what_xdp_does() {
    let (table, left_out) = fixtures::at_tc();
    let mut failures = Vec::new();
    for fixture in &table {
        if let Err(text) = judge(fixture, &mut Host::new(fixture.first_world())) {
            failures.push(format!("{}: {text}", fixture.name));
        }
    }
    report(&failures, table.len());
    assert!(left_out * 10 < table.len(), "too many fixtures left out: {left_out}");
}

#[test]
fn loaded_program_does_what_the_host_does() {
    loaded(fixtures::all());
}

#[test]
fn loaded_program_at_tc_does_what_the_host_does() {
    loaded(fixtures::at_tc().0);
}

fn loaded(table: Vec<Fixture>) {
    let (failures, count) = with_kernel(move |kernel| {
        let mut failures = Vec::new();
        let mut count = 0;
        for fixture in table.iter().filter(|f| in_kernel(f)) {
            count += 1;
            kernel.fill(fixture.first_world());
            if let Err(text) = judge(fixture, kernel) {
                failures.push(format!("{}: {text}", fixture.name));
                continue;
            }
            let mut host = Host::new(fixture.first_world());
            if judge(fixture, &mut host).is_ok() && host.state() != kernel.state() {
                failures.push(format!("{}: another flow table than the host's", fixture.name));
            }
        }
        (failures, count)
    });
    report(&failures, count);
}

/// Over IPv6 zero means "none", which a receiver need not take (RFC 8200 section 8.1). The checksum is
/// steered by our own address, on which nothing that the datapath chooses depends.
#[test]
fn outer_checksum_that_computes_to_zero_is_sent_as_all_ones() {
    const CHECKSUM: usize = 14 + 40 + 6;
    for family in FAMILIES {
        let frame = request(family, IPPROTO_TCP, Svc::TunnelV6).bytes();
        let sent = |world: &World| {
            let host = Host::new(world).run(Hook::Xdp, dev::UPLINK, &frame, 200).bytes;
            let (world, frame) = (world.clone(), frame.clone());
            let kernel = with_kernel(move |kernel| {
                kernel.fill(&world);
                kernel.run(Hook::Xdp, dev::UPLINK, &frame).bytes
            });
            assert_eq!(host, kernel);
            [host[CHECKSUM], host[CHECKSUM + 1]]
        };
        let mut world = World::standard();
        let checksum = u16::from_be_bytes(sent(&world));
        assert_ne!(checksum, 0);
        let local = &mut world.vteps[VTEP_V6 as usize].local.0;
        let word = u16::from_be_bytes([local[14], local[15]]);
        let (sum, carry) = word.overflowing_add(checksum);
        local[14..].copy_from_slice(&(sum + u16::from(carry)).to_be_bytes());
        assert_eq!(sent(&world), [0xff, 0xff], "{family:?}");
    }
}

/// A frame whose last byte lies in another buffer is handled as if it lay in one.
#[test]
fn frame_in_two_buffers_is_handled_as_in_one() {
    let (failures, count) = with_kernel(|kernel| {
        let mut failures = Vec::new();
        let mut count = 0;
        for mut fixture in fixtures::all().into_iter().filter(in_two_buffers) {
            count += 1;
            fixture.head_room = HeadRoom::Split(1);
            if let Err(text) = judge(&fixture, &mut Host::new(fixture.first_world())) {
                failures.push(format!("{} on the host: {text}", fixture.name));
            }
            kernel.fill(fixture.first_world());
            if let Err(text) = judge(&fixture, kernel) {
                failures.push(format!("{}: {text}", fixture.name));
            }
        }
        (failures, count)
    });
    assert!(count > 100, "{count}");
    report(&failures, count);
}

/// What a message quotes is translated as a whole or not at all.
#[test]
fn icmp_error_in_two_buffers_passes() {
    let mut count = 0;
    for mut fixture in fixtures::all().into_iter().filter(|f| f.reason == Reason::IcmpError) {
        if fixture.step.hook != Hook::Xdp {
            continue;
        }
        count += 1;
        fixture.head_room = HeadRoom::Split(1);
        (fixture.reason, fixture.action, fixture.mark) = (Reason::NotLinear, Action::Pass, None);
        (fixture.out, fixture.account) = (Out::Untouched, Account::None);
        judge(&fixture, &mut Host::new(fixture.first_world())).expect(&fixture.name);
    }
    assert!(count > 10, "{count}");
}

fn in_two_buffers(fixture: &Fixture) -> bool {
    use Reason::{Bypass, IcmpDenied, IcmpError, IcmpMalformed, Jumbogram};
    use Reason::{L4Malformed, NotIp, VxlanMalformed};
    // The last byte is one of a header, or of a quoted packet, or the program need not know that
    // there is a second buffer, and counts the bytes of the first.
    let mut other = [Bypass, Jumbogram, L4Malformed, NotIp, VxlanMalformed].iter();
    let mut icmp = [IcmpError, IcmpDenied, IcmpMalformed].iter();
    let names = [
        "empty_packet",
        "without_data",
        "without_payload",
        "padding_behind",
        "error",
        "redirect_about",
        "quote",
    ];
    in_kernel(fixture)
        && other.all(|reason| *reason != fixture.reason)
        && icmp.all(|reason| *reason != fixture.reason)
        && !names.iter().any(|name| fixture.name.contains(name))
        && fixture.step.hook == Hook::Xdp
        && fixture.head_room == HeadRoom::Plenty
}

fn report(failures: &[String], of: usize) {
    println!("{of} fixtures");
    assert!(failures.is_empty(), "{} of {of}:\n{}", failures.len(), failures.join("\n"));
}
