//! The flood guard: what comes above the rate takes nothing from anybody, and is served all the same.

use super::*;
use sluice_abi::{Flood, FloodWord};
use sluice_tests::fixtures;
use sluice_tests::judge::{in_kernel, judge};
use sluice_tests::packet::icmp;

/// Records of the guard and of the flow table.
fn split(runner: &dyn Runner, world: &World) -> (usize, usize) {
    let sets = world.settings.flow_set_mask;
    let guarded = live(runner).iter().filter(|(set, ..)| *set > sets).count();
    (guarded, live(runner).len() - guarded)
}

fn guarded() -> World {
    World::standard().with_flood(size::FLOOD_PLACES)
}

/// Clients whose connections a test looks at one after the other: none meets another's place.
fn alone(family: Family, proto: u8, service: Svc) -> Connection {
    Connection::new(family, proto, service, ip::client(family, 9), CLIENT_PORT)
}

/// Every fixture once more, its connections in the guard: no packet can tell.
fn transparent(fixture: &mut fixtures::Fixture) -> bool {
    for world in [Some(&mut fixture.world), fixture.world_before.as_mut()].into_iter().flatten() {
        *world = world.clone().with_flood(size::FLOOD_PLACES);
    }
    // The flow table is not full for those that do not go there, and they leave each other their ports.
    !matches!(fixture.reason, Reason::FlowTableFull | Reason::SnatExhausted)
}

#[test]
fn guarded_connections_are_served_as_the_fixtures_say() {
    let mut failures = Vec::new();
    let mut put = 0;
    for mut fixture in fixtures::all() {
        if !transparent(&mut fixture) {
            continue;
        }
        let mut host = Host::new(fixture.first_world());
        host.guard(true);
        if let Err(text) = judge(&fixture, &mut host) {
            failures.push(format!("{}: {text}", fixture.name));
        }
        put += host.guarded().put;
    }
    assert!(put > 300, "{put} connections were guarded");
    assert!(failures.is_empty(), "{}:\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn guarded_connections_are_served_so_by_the_loaded_program() {
    let failures = with_kernel(|kernel| {
        let mut failures = Vec::new();
        for mut fixture in fixtures::all().into_iter().filter(in_kernel) {
            if !transparent(&mut fixture) {
                continue;
            }
            kernel.fill(fixture.first_world());
            kernel.guard(true);
            if let Err(text) = judge(&fixture, kernel) {
                failures.push(format!("{}: {text}", fixture.name));
                continue;
            }
            let mut host = Host::new(fixture.first_world());
            host.guard(true);
            if judge(&fixture, &mut host).is_ok() && host.state() != kernel.state() {
                failures.push(format!("{}: another flow table than the host's", fixture.name));
            }
        }
        failures
    });
    assert!(failures.is_empty(), "{}:\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn flood_above_the_rate_leaves_the_flow_table_to_those_who_have_it() {
    on_both(guarded(), |runner, world| {
        let mut established = Vec::new();
        for family in FAMILIES {
            for proto in PROTOCOLS {
                for service in ESTABLISHED {
                    let client = ip::client(family, 9);
                    let c = Connection::new(family, proto, service, client, 50_000);
                    let seen = c.establish(runner);
                    established.push((c, seen));
                }
            }
        }
        // A client that is slow to answer has a place in the flow table, too.
        let slow = alone(Family::V4, IPPROTO_TCP, Svc::LocalStack);
        let slow_seen = slow.open(runner);
        let before = live(runner);

        runner.guard(true);
        for n in 0..600 {
            let service = [Svc::LocalStack, Svc::TunnelV4, Svc::TunnelV6][n as usize % 3];
            let packet = stranger(FAMILIES[n as usize % 2], n, service);
            let (reason, _) = runner.send(Hook::Xdp, dev::UPLINK, &packet.bytes());
            assert!(matches!(reason, Reason::DnatLocal | Reason::DnatRemote), "{reason:?}");
        }
        let sets = world.settings.flow_set_mask;
        let after: Vec<_> = live(runner).into_iter().filter(|(set, ..)| *set <= sets).collect();
        assert_eq!(after, before, "the flood has reached the flow table");
        let counts = runner.guarded();
        assert_eq!(counts.put, 600);
        assert!(counts.overwritten > 400, "{counts:?}");
        tables_agree(runner);
        for (c, seen) in &established {
            assert_eq!(c.both_ways(runner, seen), (Way::Works, Way::Works), "{:?}", c.request);
        }
        assert_eq!(slow.both_ways(runner, &slow_seen), (Way::Works, Way::Works));
    });
}

#[test]
fn guarded_connection_goes_to_the_flow_table_when_its_client_has_seen_the_answer() {
    on_both(guarded(), |runner, world| {
        for family in FAMILIES {
            for proto in PROTOCOLS {
                for service in ESTABLISHED {
                    runner.guard(true);
                    let c = alone(family, proto, service);
                    let before = (split(runner, world), runner.guarded());
                    let seen = c.open(runner);
                    let (guard, table) = before.0;
                    assert_eq!(split(runner, world), (guard + 1, table));
                    let begun = record_of(runner, &c).2;
                    tables_agree(runner);
                    assert_eq!(c.answer(runner, &seen), Way::Works, "{service:?}");
                    assert_eq!(split(runner, world), (guard + 1, table));

                    assert_eq!(c.both_ways(runner, &seen), (Way::Works, Way::Works), "{service:?}");
                    assert_eq!(split(runner, world), (guard, table + 1), "{service:?}");
                    let record = record_of(runner, &c).2;
                    let of = |r: &FlowRecord| {
                        (r.backend_id, r.backend, r.source, r.source_port, r.snat, r.created)
                    };
                    assert_eq!(of(&record), of(&begun));
                    assert_ne!(record.state & flow_state::CONFIRMED, 0);
                    tables_agree(runner);
                    assert_eq!(runner.guarded().promoted, before.1.promoted + 1);
                    assert_eq!(c.both_ways(runner, &seen), (Way::Works, Way::Works));
                    // Room for the next one, which has the same client and the same backend.
                    change(runner, &c, |tag, _| *tag = flow_tag::freed(*tag));
                    if record.snat != 0 {
                        runner.put_slot(record.snat - 1, SnatSlot::FREE);
                    }
                }
            }
        }
    });
}

#[test]
fn what_proves_no_client_stays_in_the_guard() {
    on_both(guarded(), |runner, world| {
        runner.guard(true);
        for family in FAMILIES {
            for service in ESTABLISHED {
                let c = alone(family, IPPROTO_TCP, service);
                let port = sluice_tests::packet::src_port;
                let seen = c.open(runner);
                // The same SYN; an acknowledgement of nothing; then of what nobody has sent.
                for packet in [c.request.clone(), later(c.request.clone())] {
                    assert_eq!(c.send(runner, &packet).map(|seen| port(&seen)), Ok(port(&seen)));
                }
                assert_eq!(c.answer(runner, &seen), Way::Works);
                let record = record_of(runner, &c).2;
                let forged = later(c.request.clone())
                    .at(record.ack_reply.wrapping_add(1), record.ack_forward.wrapping_add(NEAR));
                for packet in [c.request.clone(), forged] {
                    assert_eq!(c.send(runner, &packet).map(|seen| port(&seen)), Ok(port(&seen)));
                }
                assert_eq!(split(runner, world), (1, 0), "{service:?}");
                assert_eq!(runner.guarded().promoted, 0);
                let record = record_of(runner, &c).2;
                change(runner, &c, |tag, _| *tag = flow_tag::freed(*tag));
                if record.snat != 0 {
                    runner.put_slot(record.snat - 1, SnatSlot::FREE);
                }
            }
        }
    });
}

#[test]
fn overwritten_connection_gives_its_snat_port_back() {
    on_both(World::standard().with_flood(1), |runner, world| {
        runner.guard(true);
        for n in 0..200 {
            let family = FAMILIES[n as usize % 2];
            let (service, _) = tunnel_service(family);
            let packet = stranger(Family::V4, n, service);
            let (reason, _) = runner.send(Hook::Xdp, dev::UPLINK, &packet.bytes());
            assert_eq!(reason, Reason::DnatRemote);
            assert_eq!(split(runner, world), (1, 0));
            assert_eq!(runner.slots().len(), 1, "a port was lost");
            tables_agree(runner);
        }
        assert_eq!(runner.guarded().overwritten, 199);
        // One that keeps its client's address holds none.
        let packet = stranger(Family::V4, 200, Svc::LocalStack);
        runner.send(Hook::Xdp, dev::UPLINK, &packet.bytes());
        assert_eq!(runner.slots(), []);
    });
}

#[test]
fn flood_to_another_node_takes_its_source_ports_from_itself_alone() {
    on_both(guarded(), |runner, world| {
        for underlay in FAMILIES {
            let (service, _) = tunnel_service(underlay);
            let mut established = Vec::new();
            for n in 0..6 {
                let client = ip::client(Family::V4, 20 + n);
                let c = Connection::new(Family::V4, IPPROTO_TCP, service, client, 50_000);
                let seen = c.establish(runner);
                established.push((c, seen));
            }
            let (_, table) = split(runner, world);
            runner.guard(true);
            // Twice as many places as ports.
            for n in 0..300 {
                let packet = stranger(Family::V4, n, service);
                let (reason, _) = runner.send(Hook::Xdp, dev::UPLINK, &packet.bytes());
                assert_eq!(reason, Reason::DnatRemote, "{n}");
            }
            let ports = usize::from(size::SNAT_LAST - size::SNAT_FIRST) + 1;
            assert!(runner.slots().len() > ports / 2, "the flood wants all ports");
            tables_agree(runner);
            assert_eq!(split(runner, world).1, table);
            for (c, seen) in &established {
                assert_eq!(c.both_ways(runner, seen), (Way::Works, Way::Works));
            }
            let c = alone(Family::V4, IPPROTO_TCP, service);
            c.establish(runner);
            runner.guard(false);
        }
    });
}

#[test]
fn guarded_connection_is_found_when_the_guard_is_off_again() {
    on_both(guarded(), |runner, world| {
        for service in ESTABLISHED {
            runner.rewrite(world);
            runner.guard(true);
            let client = ip::client(Family::V4, 9);
            let c = Connection::new(Family::V4, IPPROTO_TCP, service, client, CLIENT_PORT);
            let seen = c.open(runner);
            runner.guard(false);
            let mut off = world.clone();
            off.settings.flood = Flood { limit: 0, ..off.settings.flood };
            runner.rewrite(&off);
            assert_eq!(c.answer(runner, &seen), Way::Works, "{service:?}");
            assert_eq!(c.both_ways(runner, &seen), (Way::Works, Way::Works), "{service:?}");
            let (guard, _) = split(runner, world);
            assert_eq!(guard, 0, "{service:?}");
            let record = record_of(runner, &c).2;
            change(runner, &c, |tag, _| *tag = flow_tag::freed(*tag));
            if record.snat != 0 {
                runner.put_slot(record.snat - 1, SnatSlot::FREE);
            }
        }
    });
}

/// Sixteen established connections in the one set of the flow table.
fn fill_one_set(runner: &mut dyn Runner) {
    for n in 0..16 {
        let client = ip::client(Family::V4, 100 + n);
        let c = Connection::new(Family::V4, IPPROTO_TCP, Svc::LocalStack, client, CLIENT_PORT);
        c.establish(runner);
    }
}

#[test]
fn connection_that_the_flow_table_has_no_room_for_keeps_its_place_in_the_guard() {
    let mut world = World::standard().with_flood(1);
    world.settings.flow_set_mask = 0;
    on_both(world, |runner, world| {
        fill_one_set(runner);
        runner.guard(true);
        let client = ip::client(Family::V4, 9);
        let c = Connection::new(Family::V4, IPPROTO_TCP, Svc::TunnelV4, client, CLIENT_PORT);
        let seen = c.establish(runner);
        assert_eq!(split(runner, world), (1, 16));
        for n in 0..50 {
            let packet = stranger(Family::V4, n, Svc::LocalStack);
            let (reason, _) = runner.send(Hook::Xdp, dev::UPLINK, &packet.bytes());
            assert_eq!(reason, Reason::FlowTableFull);
        }
        assert_eq!(c.both_ways(runner, &seen), (Way::Works, Way::Works));
        tables_agree(runner);
        // Silent for too long, though nobody has swept yet.
        change(runner, &c, |_, r| (r.seen, r.timeout) = (r.seen.wrapping_sub(50), 40));
        let packet = stranger(Family::V4, 50, Svc::LocalStack);
        let (reason, _) = runner.send(Hook::Xdp, dev::UPLINK, &packet.bytes());
        assert_eq!(reason, Reason::DnatLocal);
        tables_agree(runner);
    });
}

#[test]
fn second_comer_gets_another_source_port_though_the_guard_is_on() {
    on_both(guarded(), |runner, _| {
        for family in FAMILIES {
            for proto in PROTOCOLS {
                let client = ip::client(family, 9);
                let to = |service| Connection::new(family, proto, service, client, CLIENT_PORT);
                let (first, second) = (to(Svc::LocalStack), to(Svc::LocalStackToo));
                runner.guard(false);
                let seen = first.establish(runner);
                runner.guard(true);
                let seen_too = second.open(runner);
                let port = sluice_tests::packet::src_port;
                assert_ne!(port(&seen_too), port(&seen));
                for _ in 0..2 {
                    assert_eq!(first.both_ways(runner, &seen), (Way::Works, Way::Works));
                    assert_eq!(second.both_ways(runner, &seen_too), (Way::Works, Way::Works));
                }
            }
        }
    });
}

#[test]
fn second_comer_gets_another_source_port_though_the_first_is_in_the_guard() {
    on_both(guarded(), |runner, world| {
        for on in [true, false] {
            for family in FAMILIES {
                for proto in PROTOCOLS {
                    let client = ip::client(family, if on { 9 } else { 10 });
                    let to = |service| Connection::new(family, proto, service, client, CLIENT_PORT);
                    let (first, second) = (to(Svc::LocalStack), to(Svc::LocalStackToo));
                    runner.guard(true);
                    let (guard, table) = split(runner, world);
                    let seen = first.open(runner);
                    runner.guard(on);
                    let seen_too = second.open(runner);
                    assert_eq!(split(runner, world), (guard + 1, table + 1));
                    let port = sluice_tests::packet::src_port;
                    assert_ne!(port(&seen_too), port(&seen));
                    for _ in 0..2 {
                        assert_eq!(first.answer(runner, &seen), Way::Works);
                        assert_eq!(second.answer(runner, &seen_too), Way::Works);
                        assert_eq!(first.both_ways(runner, &seen), (Way::Works, Way::Works));
                        assert_eq!(second.both_ways(runner, &seen_too), (Way::Works, Way::Works));
                    }
                    assert_eq!(split(runner, world), (guard, table + 2));
                }
            }
        }
    });
}

/// A place that was given up keeps what it held, and nobody finds it.
#[test]
fn connection_that_ended_in_the_guard_begins_anew() {
    on_both(guarded(), |runner, world| {
        runner.guard(true);
        for service in ESTABLISHED {
            let c = alone(Family::V4, IPPROTO_TCP, service);
            c.open(runner);
            for _ in 0..3 {
                let record = record_of(runner, &c).2;
                change(runner, &c, |tag, _| *tag = flow_tag::freed(*tag));
                if record.snat != 0 {
                    runner.put_slot(record.snat - 1, SnatSlot::FREE);
                }
                assert_eq!(c.send(runner, &later(c.request.clone())), Err(Reason::MidFlow));
                let seen = c.open(runner);
                assert_eq!(c.answer(runner, &seen), Way::Works, "{service:?}");
                assert_eq!(split(runner, world), (1, 0));
            }
            change(runner, &c, |tag, _| *tag = 0);
            let record = runner.slots();
            record.into_iter().for_each(|(index, _)| runner.put_slot(index, SnatSlot::FREE));
        }
    });
}

#[test]
fn backend_stays_though_the_tables_say_another() {
    on_both(guarded(), |runner, world| {
        for family in FAMILIES {
            for proto in PROTOCOLS {
                runner.rewrite(world);
                runner.guard(true);
                let c = alone(family, proto, Svc::LocalStack);
                let seen = c.open(runner);
                let mut world = world.clone();
                let other = world.extent(&[Be::Redirect.id(family, proto)]);
                let key = Svc::LocalStack.key(family, proto);
                world.frontends.get_mut(&key).expect("it is there").external = other;
                world.settings.epoch += 1;
                runner.rewrite(&world);
                // Decided anew where it is, then moved.
                for _ in 0..2 {
                    assert_eq!(c.both_ways(runner, &seen), (Way::Works, Way::Works));
                }
                let (set, _, record) = record_of(runner, &c);
                assert_eq!(record.backend, ip::pod_stack(family));
                assert_eq!(record.epoch, world.settings.epoch);
                assert!(set <= world.settings.flow_set_mask, "still in the guard");
            }
        }
    });
}

#[test]
fn forged_tunnel_source_cannot_ride_a_guarded_connection() {
    on_both(guarded(), |runner, _| {
        runner.guard(true);
        for family in FAMILIES {
            let packet = pod_request(family, IPPROTO_UDP, Svc::LocalRedirect, Family::V4);
            let through = |runner: &mut dyn Runner, underlay| {
                let (ours, peers) = fixtures::tunnel_macs(underlay);
                let inner = packet.clone().eth(peers, ours);
                let frame = from_peer(underlay, &inner.bytes()).bytes();
                runner.send(Hook::Xdp, dev::UPLINK, &frame).0
            };
            assert_eq!(through(runner, Family::V4), Reason::DecapDnatLocal);
            assert_eq!(through(runner, Family::V6), Reason::TunnelChanged);
            let plain = packet.clone().eth(mac::GATEWAY, mac::UPLINK).bytes();
            let (reason, _) = runner.send(Hook::Xdp, dev::UPLINK, &plain);
            assert_eq!(reason, Reason::TunnelChanged);
        }
    });
}

/// What a form of header is no way round.
#[test]
fn options_and_tags_are_no_way_round_the_guard() {
    on_both(guarded(), |runner, world| {
        runner.guard(true);
        let plain = |n| stranger(Family::V4, n, Svc::TunnelV4);
        let v6 = stranger(Family::V6, 3, Svc::LocalStack);
        let packets = [
            plain(1).tags(&[(0x8100, 7)]),
            plain(2).options_of_ip(&[1, 1, 1, 0]),
            v6.extensions(&[sluice_tests::packet::extension(60, 8)]),
        ];
        for packet in &packets {
            let (reason, _) = runner.send(Hook::Xdp, dev::UPLINK, &packet.bytes());
            assert_eq!(reason.kind(), VerdictKind::Forward, "{reason:?}");
        }
        assert_eq!(split(runner, world), (packets.len(), 0));
        assert_eq!(runner.guarded().put, packets.len() as u64);
    });
}

#[test]
fn pods_of_this_node_are_guarded_too() {
    on_both(guarded(), |runner, world| {
        for family in FAMILIES {
            for proto in PROTOCOLS {
                runner.guard(true);
                let packet = request(family, proto, Svc::LocalRedirect)
                    .from(ip::pod_stack(family), CLIENT_PORT)
                    .eth(mac::POD_STACK, mac::HOST_STACK);
                let (guard, table) = split(runner, world);
                let at_pod = |runner: &mut dyn Runner, packet: &Packet| {
                    runner.send(Hook::TcIngress, dev::POD_STACK, &packet.bytes())
                };
                let (reason, first) = at_pod(runner, &packet);
                assert_eq!(reason, Reason::DnatLocal);
                assert_eq!(split(runner, world), (guard + 1, table));
                // The answer, behind the stack.
                let (backend, port) = place(Be::Redirect, family);
                let reply = packet.clone().to(backend, port).answer();
                let reply = reply.eth(mac::HOST_STACK, mac::POD_STACK).bytes();
                let (reason, outcome) = runner.send(Hook::TcEgress, dev::POD_STACK, &reply);
                assert_eq!(reason, Reason::ReplyLocal);
                let expected = packet.clone().answer().eth(mac::HOST_STACK, mac::POD_STACK);
                assert_eq!(outcome.bytes, expected.bytes());
                let (reason, second) = at_pod(runner, &later(packet.clone()));
                assert_eq!(reason, Reason::DnatLocal);
                let port = sluice_tests::packet::src_port;
                assert_eq!(port(&second.bytes), port(&first.bytes));
                assert_eq!(split(runner, world), (guard, table + 1));
            }
        }
    });
}

#[test]
fn rate_turns_the_guard_on_and_a_quiet_window_turns_it_off() {
    const WINDOW: u32 = 100;
    const LIMIT: u32 = 8;
    let mut world = World::standard().with_flood(size::FLOOD_PLACES);
    world.settings.flood = Flood { limit: LIMIT, window: WINDOW, ..world.settings.flood };
    let mut host = Host::new(&world);
    let mut next = 0;
    // `count` new connections, and how many of them the guard got.
    let mut begin = |host: &mut Host, count: u32| {
        let before = host.flood_cpu().put;
        for _ in 0..count {
            let packet = stranger(Family::V4, next, Svc::LocalStack);
            let (reason, _) = host.send(Hook::Xdp, dev::UPLINK, &packet.bytes());
            assert_eq!(reason, Reason::DnatLocal);
            next += 1;
        }
        (host.flood_cpu().put - before) as u32
    };
    let wait = |host: &Host, ticks: u32| host.now.set(host.now.get() + ticks);

    assert_eq!(begin(&mut host, LIMIT), 0, "as many as may come");
    assert_eq!(host.flood(), FloodWord::default());
    wait(&host, WINDOW);
    assert_eq!(begin(&mut host, LIMIT + 3), 3);
    let on = host.flood_cpu();
    assert_eq!((on.on, on.since, on.begun), (1, host.now.get(), 1));
    assert_eq!(host.flood(), FloodWord::written(host.now.get()));
    // A little less than too many does not turn it off: it would flutter.
    for _ in 0..3 {
        wait(&host, WINDOW);
        assert_eq!(begin(&mut host, LIMIT / 2 + 1), LIMIT / 2 + 1);
    }
    wait(&host, WINDOW);
    assert_eq!(begin(&mut host, LIMIT / 2), LIMIT / 2, "the window that counts is the last");
    wait(&host, WINDOW);
    assert_eq!(begin(&mut host, LIMIT), 0);
    assert_eq!(host.flood_cpu().begun, 1);
    // A pause is as good as a quiet window.
    assert_eq!(begin(&mut host, 3), 3);
    wait(&host, 2 * WINDOW);
    assert_eq!(begin(&mut host, LIMIT), 0);
    // Off is off.
    world.settings.flood.limit = 0;
    host.rewrite(&world);
    assert_eq!(begin(&mut host, 10 * LIMIT), 0);
}

#[test]
fn error_about_a_guarded_connection_reaches_its_backend() {
    on_both(guarded(), |runner, world| {
        runner.guard(true);
        for family in FAMILIES {
            let c = alone(family, IPPROTO_TCP, Svc::LocalStack);
            c.open(runner);
            let reply = c.request.clone().answer().hop_limit(50).bytes();
            let kind = if family == Family::V4 { (3, 1) } else { (1, 3) };
            let error = icmp(ip::elsewhere(family), c.request.dst, kind, 0, &reply[14..]);
            let (reason, _) = runner.send(Hook::Xdp, dev::UPLINK, &error.bytes());
            assert_eq!(reason, Reason::IcmpError);
            let (guard, table) = split(runner, world);
            assert_eq!((guard > 0, table), (true, 0));
        }
    });
}
