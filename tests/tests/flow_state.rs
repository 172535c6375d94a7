//! State that cannot half-die: one record serves both directions, so both work or both end.
//!
//! Every law is held twice, on the host and on the loaded program, with a table of 64 records.

use std::net::Ipv4Addr;

use sluice_abi::{
    Addr, Be16, Delivery, FLOW_WAYS, Family, FlowRecord, FlowSet, Hook, IPPROTO_TCP, IPPROTO_UDP,
    Reason, SnatSlot, VerdictKind, flow_state, flow_tag, record_flags,
};
use sluice_datapath::flow;
use sluice_datapath::tcp::{FAR, NEAR, STEP};
use sluice_tests::fixtures::{
    CLIENT_PORT, from_peer, later, place, pod_request, request, snat_port, tunnel_service,
};
use sluice_tests::host::Host;
use sluice_tests::judge::{Outcome, Runner, difference};
use sluice_tests::kernel::code;
use sluice_tests::netns::with_kernel;
use sluice_tests::packet::{Packet, inner, tcp};
use sluice_tests::world::{
    BACKEND_PORT, Be, FAMILIES, PROTOCOLS, Svc, TIMEOUTS, World, dev, ip, mac, size,
};

#[path = "flow_state/flood.rs"]
mod flood;

/// Runs a law on the host and on the loaded program.
fn on_both(world: World, law: fn(&mut dyn Runner, &World)) {
    println!("on the host");
    law(&mut Host::new(&world), &world);
    println!("in the kernel");
    with_kernel(move |kernel| {
        kernel.fill(&world);
        law(kernel, &world);
    });
}

/// A connection of a client to a Service, and how its packets travel.
#[derive(Clone)]
struct Connection {
    service: Svc,
    backend: Be,
    request: Packet,
}

/// What a direction did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    /// Translated.
    Works,
    /// Handed to the kernel as it came.
    Ends,
}

impl Connection {
    fn new(family: Family, proto: u8, service: Svc, client: Addr, port: u16) -> Self {
        let backend = service.backends()[0];
        Self { service, backend, request: request(family, proto, service).from(client, port) }
    }

    fn family(&self) -> Family {
        self.request.family()
    }

    /// Sends `packet` as the client does. What the backend sees of it, if it gets there.
    fn send(&self, runner: &mut dyn Runner, packet: &Packet) -> Result<Vec<u8>, Reason> {
        let (reason, outcome) = runner.send(Hook::Xdp, dev::UPLINK, &packet.bytes());
        if reason.kind() != VerdictKind::Forward {
            if reason.kind() == VerdictKind::Pass {
                assert_eq!(outcome.bytes, packet.bytes(), "passed and changed");
            }
            return Err(reason);
        }
        Ok(self.seen_by_backend(&outcome))
    }

    fn seen_by_backend(&self, outcome: &Outcome) -> Vec<u8> {
        match self.backend {
            Be::TunnelV4 | Be::TunnelV6 => inner(&outcome.bytes).to_vec(),
            _ => outcome.bytes.clone(),
        }
    }

    /// The first packet, which must get through.
    fn open(&self, runner: &mut dyn Runner) -> Vec<u8> {
        self.send(runner, &self.request).unwrap_or_else(|r| panic!("{:?}: {r:?}", self.service))
    }

    /// The backend answers what it saw. Whether the client gets what it should.
    fn answer(&self, runner: &mut dyn Runner, seen: &[u8]) -> Way {
        self.reply(runner, seen, &|reply| reply)
    }

    /// The same with a segment that is made from the answer.
    fn reply(&self, runner: &mut dyn Runner, seen: &[u8], how: &dyn Fn(Packet) -> Packet) -> Way {
        let source = sluice_tests::packet::src_port(seen);
        let family = self.family();
        let (backend, backend_port) = place(self.backend, family);
        let client = match self.backend {
            Be::TunnelV4 | Be::TunnelV6 => ip::tunnel(family),
            Be::Plain => ip::node(family),
            _ => self.request.src,
        };
        let mut reply = how(self.request.clone().answer()).hop_limit(64);
        reply = reply.from(backend, backend_port).to(client, source);
        let (hook, ifindex, frame) = match self.backend {
            Be::Stack => {
                reply = reply.eth(mac::UPLINK, mac::GATEWAY);
                (Hook::TcEgress, dev::UPLINK, reply.bytes())
            }
            Be::Redirect => {
                reply = reply.eth(mac::POD_REDIRECT, mac::HOST_REDIRECT);
                (Hook::TcIngress, dev::POD_REDIRECT, reply.bytes())
            }
            Be::TunnelV4 => {
                reply = reply.eth(mac::PEER_V4, mac::VXLAN_V4);
                (Hook::Xdp, dev::UPLINK, from_peer(Family::V4, &reply.bytes()).bytes())
            }
            Be::TunnelV6 => {
                reply = reply.eth(mac::PEER_V6, mac::VXLAN_V6);
                (Hook::Xdp, dev::UPLINK, from_peer(Family::V6, &reply.bytes()).bytes())
            }
            Be::Plain => {
                reply = reply.eth(mac::ROUTER, mac::UPLINK_B);
                (Hook::Xdp, dev::UPLINK_B, reply.bytes())
            }
            other => panic!("no replies from {other:?}"),
        };
        let (reason, outcome) = runner.send(hook, ifindex, &frame);
        match reason.kind() {
            VerdictKind::Pass => {
                assert_eq!(outcome.bytes, frame, "passed and changed");
                return Way::Ends;
            }
            VerdictKind::Drop => panic!("reply dropped: {reason:?}"),
            VerdictKind::Forward => {}
        }
        let hops = if self.backend == Be::Stack { 64 } else { 63 };
        let expected = how(self.request.clone().answer());
        let expected = expected.eth(mac::UPLINK, mac::GATEWAY).hop_limit(hops).bytes();
        assert_eq!(outcome.bytes, expected, "{}", difference(&outcome.bytes, &expected));
        Way::Works
    }

    /// Opens the connection, lets the backend answer once, and the client go on.
    fn establish(&self, runner: &mut dyn Runner) -> Vec<u8> {
        let seen = self.open(runner);
        assert_eq!(self.answer(runner, &seen), Way::Works, "{:?}", self.service);
        let next = self.send(runner, &later(self.request.clone()));
        assert!(next.is_ok(), "{:?}: {next:?}", self.service);
        seen
    }

    /// A later packet of the client, and the backend's answer to what it had seen at first.
    fn both_ways(&self, runner: &mut dyn Runner, seen: &[u8]) -> (Way, Way) {
        let there = match self.send(runner, &later(self.request.clone())) {
            Ok(again) => {
                let port = sluice_tests::packet::src_port;
                assert_eq!(port(&again), port(seen), "another source port than before");
                Way::Works
            }
            Err(Reason::MidFlow) => Way::Ends,
            Err(reason) => panic!("{reason:?}"),
        };
        (there, self.answer(runner, seen))
    }
}

/// The live record of a connection: set, way, record.
fn record_of(runner: &dyn Runner, connection: &Connection) -> (u32, usize, FlowRecord) {
    let (client, vip) = (connection.request.src, connection.request.dst);
    let port = Be16::new(connection.request.src_port);
    live(runner)
        .into_iter()
        .find(|(_, _, r)| {
            r.client == client
                && r.vip == vip
                && r.client_port == port
                && r.proto == connection.request.proto
        })
        .expect("a record")
}

fn live(runner: &dyn Runner) -> Vec<(u32, usize, FlowRecord)> {
    let sets = runner.flows().into_iter().zip(0u32..);
    sets.flat_map(|(set, index)| {
        (0..FLOW_WAYS)
            .filter(move |&way| flow_tag::is_used(set.tags[way]))
            .map(move |way| (index, way, set.records[way]))
    })
    .collect()
}

/// Changes the live record of a connection by hand.
fn change(
    runner: &mut dyn Runner,
    connection: &Connection,
    how: impl Fn(&mut u32, &mut FlowRecord),
) {
    let (index, way, _) = record_of(runner, connection);
    let mut set = runner.flows()[index as usize];
    how(&mut set.tags[way], &mut set.records[way]);
    runner.put_flow_set(index, set);
}

/// The flow table and the SNAT table say the same.
fn tables_agree(runner: &dyn Runner) {
    let slots = runner.slots();
    let records = live(runner);
    for (set, way, record) in &records {
        let rewritten = record.flags & record_flags::SNAT != 0;
        assert_eq!(rewritten, record.snat != 0, "{record:?}");
        if rewritten {
            let owner = (record.snat - 1, SnatSlot::owned(*set, *way as u32));
            assert!(slots.contains(&owner), "a record without its SNAT slot: {record:?}");
        }
    }
    let rewritten = records.iter().filter(|(_, _, r)| r.snat != 0).count();
    assert_eq!(slots.len(), rewritten, "SNAT slots without a record: {slots:?}");
}

/// A SYN from a client that nobody knows.
fn stranger(family: Family, n: u32, service: Svc) -> Packet {
    let n = n.wrapping_mul(0x9e37_79b9);
    let client = match family {
        Family::V4 => Addr::from_v4(Ipv4Addr::from(0x5000_0000 | n >> 4).octets()),
        Family::V6 => {
            let mut addr = ip::client(family, 0);
            addr.0[12..].copy_from_slice(&n.to_be_bytes());
            addr
        }
    };
    request(family, IPPROTO_TCP, service).from(client, 1024 + (n >> 7) as u16 % 60_000)
}

const ESTABLISHED: [Svc; 5] =
    [Svc::LocalStack, Svc::LocalRedirect, Svc::TunnelV4, Svc::TunnelV6, Svc::Plain];

#[test]
fn flood_of_new_connections_takes_nothing_from_established_ones() {
    on_both(World::standard(), |runner, _| {
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
        assert_eq!(live(runner).len(), established.len());
        tables_agree(runner);

        let (mut taken, mut refused) = (0, 0);
        for n in 0..600 {
            let service = [Svc::LocalStack, Svc::TunnelV4, Svc::TunnelV6][n as usize % 3];
            let packet = stranger(FAMILIES[n as usize % 2], n, service);
            let (reason, _) = runner.send(Hook::Xdp, dev::UPLINK, &packet.bytes());
            match reason {
                Reason::DnatLocal | Reason::DnatRemote => taken += 1,
                Reason::FlowTableFull | Reason::SnatExhausted => refused += 1,
                other => panic!("{other:?}"),
            }
        }
        assert!(taken > 100, "{taken} taken, {refused} refused");
        let full = size::FLOW_SETS as usize * FLOW_WAYS;
        assert_eq!(live(runner).len(), full, "the flood has filled the table");
        tables_agree(runner);

        for (c, seen) in &established {
            assert_eq!(c.both_ways(runner, seen), (Way::Works, Way::Works), "{:?}", c.request);
        }
    });
}

#[test]
fn unanswered_connections_give_way_oldest_first() {
    let mut world = World::standard();
    world.settings.flow_set_mask = 0;
    on_both(world, |runner, _| {
        let client = |n: u16| ip::client(Family::V4, 100 + n);
        let connection =
            |n| Connection::new(Family::V4, IPPROTO_TCP, Svc::LocalStack, client(n), CLIENT_PORT);
        for n in 0..16 {
            connection(n).open(runner);
            // By hand, because a test does not wait: the first is the oldest.
            change(runner, &connection(n), |_, r| {
                r.seen = r.seen.wrapping_sub(1000 - u32::from(n))
            });
        }
        for n in 16..24 {
            connection(n).open(runner);
            let alive: Vec<Addr> = live(runner).iter().map(|(_, _, r)| r.client).collect();
            assert_eq!(alive.len(), 16);
            assert!(!alive.contains(&client(n - 16)), "{n}: the oldest is still there");
            assert!(alive.contains(&client(n - 15)), "{n}: a younger one gave way");
        }
    });
}

#[test]
fn forged_syns_give_way_though_the_backend_answered_them() {
    let mut world = World::standard();
    world.settings.flow_set_mask = 0;
    on_both(world, |runner, _| {
        let connection = |n: u16| {
            let client = ip::client(Family::V4, 100 + n);
            Connection::new(Family::V4, IPPROTO_TCP, Svc::LocalStack, client, CLIENT_PORT)
        };
        for n in 0..16 {
            let seen = connection(n).open(runner);
            assert_eq!(connection(n).answer(runner, &seen), Way::Works);
        }
        for n in 16..32 {
            connection(n).establish(runner);
        }
        let newcomer = connection(99);
        assert_eq!(newcomer.send(runner, &newcomer.request), Err(Reason::FlowTableFull));
    });
}

#[test]
fn syn_after_the_end_of_a_connection_begins_another() {
    on_both(World::standard(), |runner, world| {
        for service in [Svc::LocalStack, Svc::TunnelV4] {
            let client = ip::client(Family::V4, 9);
            let c = Connection::new(Family::V4, IPPROTO_TCP, service, client, 50_000);
            c.establish(runner);
            assert!(c.send(runner, &c.request.clone().flags(tcp::RST)).is_ok());
            let old = record_of(runner, &c).2;
            assert_eq!(old.timeout, TIMEOUTS.tcp_closing);
            c.establish(runner);
            let new = record_of(runner, &c).2;
            assert_eq!(new.timeout, TIMEOUTS.tcp_established);
            assert_eq!(new.backend_id, old.backend_id, "consistent hashing");
            tables_agree(runner);
            runner.rewrite(world);
        }
    });
}

#[test]
fn expired_connection_gives_way_though_answered() {
    let mut world = World::standard();
    world.settings.flow_set_mask = 0;
    on_both(world, |runner, _| {
        let connection = |n: u16| {
            let client = ip::client(Family::V6, 100 + n);
            Connection::new(Family::V6, IPPROTO_TCP, Svc::LocalStack, client, CLIENT_PORT)
        };
        for n in 0..16 {
            connection(n).establish(runner);
        }
        let newcomer = connection(99);
        assert_eq!(newcomer.send(runner, &newcomer.request), Err(Reason::FlowTableFull));
        let late = |r: &mut FlowRecord, by: u32| r.seen = r.seen.wrapping_sub(by);
        // Another CPU stamped it after this one had read the time: no age at all, and no wrap.
        change(runner, &connection(7), |_, r| r.seen = r.seen.wrapping_add(100_000));
        assert_eq!(newcomer.send(runner, &newcomer.request), Err(Reason::FlowTableFull));
        change(runner, &connection(5), |_, r| late(r, TIMEOUTS.tcp_established - 100_000));
        assert_eq!(newcomer.send(runner, &newcomer.request), Err(Reason::FlowTableFull));
        let way = record_of(runner, &connection(5)).1;
        change(runner, &connection(5), |_, r| late(r, 200_000));
        newcomer.establish(runner);
        assert_eq!(record_of(runner, &newcomer).1, way, "another record gave way");
    });
}

#[test]
fn client_that_fills_a_set_harms_itself_alone() {
    let mut world = World::standard();
    world.settings.flow_set_mask = 0;
    on_both(world, |runner, _| {
        let connection = |n, port| {
            let client = ip::client(Family::V4, n);
            Connection::new(Family::V4, IPPROTO_UDP, Svc::LocalStack, client, port)
        };
        let mut others = Vec::new();
        for n in 0..8 {
            let c = connection(100 + n, CLIENT_PORT);
            let seen = c.establish(runner);
            others.push((c, seen));
        }
        for n in 0..100 {
            let c = connection(66, 2000 + n);
            c.establish(runner);
        }
        assert_eq!(live(runner).len(), 16);
        for (c, seen) in &others {
            assert_eq!(c.both_ways(runner, seen), (Way::Works, Way::Works));
        }
    });
}

/// Whether a request's SNAT port is still its record's is asked when the stamp is old, which of a
/// connection that goes on is so once a second: it stands in another cache line, of the largest table.
fn let_stamp_age(runner: &mut dyn Runner, c: &Connection) {
    change(runner, c, |_, r| r.seen = r.seen.wrapping_sub(TIMEOUTS.stamp + 100_000));
}

#[test]
fn record_deleted_by_hand_ends_both_directions() {
    on_both(World::standard(), |runner, _| {
        for family in FAMILIES {
            for service in ESTABLISHED {
                let client = ip::client(family, 9);
                let c = Connection::new(family, IPPROTO_TCP, service, client, CLIENT_PORT);
                let seen = c.establish(runner);
                assert_eq!(c.both_ways(runner, &seen), (Way::Works, Way::Works));
                change(runner, &c, |tag, _| *tag = 0);
                assert_eq!(c.both_ways(runner, &seen), (Way::Ends, Way::Ends), "{service:?}");
            }
        }
    });
}

#[test]
fn snat_slot_deleted_by_hand_ends_both_directions() {
    on_both(World::standard(), |runner, _| {
        for family in FAMILIES {
            for service in [Svc::TunnelV4, Svc::TunnelV6, Svc::Plain] {
                let client = ip::client(family, 9);
                let c = Connection::new(family, IPPROTO_TCP, service, client, CLIENT_PORT);
                let seen = c.establish(runner);
                let record = record_of(runner, &c).2;
                runner.put_slot(record.snat - 1, SnatSlot::FREE);
                assert_eq!(c.answer(runner, &seen), Way::Ends);
                let_stamp_age(runner, &c);
                assert_eq!(c.both_ways(runner, &seen), (Way::Ends, Way::Ends), "{service:?}");
                tables_agree(runner);
            }
        }
    });
}

#[test]
fn connections_of_an_earlier_snat_range_go_on() {
    on_both(World::standard(), |runner, _| {
        let mut world = World::standard();
        for family in FAMILIES {
            let client = ip::client(family, 9);
            let c = Connection::new(family, IPPROTO_TCP, Svc::TunnelV4, client, CLIENT_PORT);
            let seen = c.establish(runner);
            let port = snat_port(&seen);
            let settings = &mut world.settings;
            (settings.snat_first_port, settings.snat_last_port) = (port + 1, port + 9);
            (settings.snat_reply_first, settings.snat_reply_last) = (port, port + 9);
            runner.rewrite(&world);
            assert_eq!(c.both_ways(runner, &seen), (Way::Works, Way::Works));
            world.settings.snat_reply_first = port + 1;
            runner.rewrite(&world);
            assert_eq!(c.answer(runner, &seen), Way::Ends);
            world.settings = World::standard().settings;
            runner.rewrite(&world);
        }
    });
}

#[test]
fn packet_of_another_backend_to_a_snat_port_is_no_reply() {
    on_both(World::standard(), |runner, _| {
        for family in FAMILIES {
            let client = ip::client(family, 9);
            let c = Connection::new(family, IPPROTO_TCP, Svc::TunnelV4, client, CLIENT_PORT);
            let seen = c.establish(runner);
            let to = (ip::tunnel(family), snat_port(&seen));
            // Of so many, some share the SNAT slot of the real backend.
            for n in 0..100 {
                let (from, port) = match n % 2 {
                    0 => (ip::peer_pod(family, 100 + n), BACKEND_PORT),
                    _ => (c.backend.addr(family), BACKEND_PORT + 1 + u16::from(n)),
                };
                let forged = Packet::new(IPPROTO_TCP, (from, port), to)
                    .flags(tcp::ACK)
                    .eth(mac::PEER_V4, mac::VXLAN_V4);
                let frame = from_peer(Family::V4, &forged.bytes()).bytes();
                let (reason, _) = runner.send(Hook::Xdp, dev::UPLINK, &frame);
                assert_eq!(reason, Reason::InnerNotLocal, "{from} port {port}");
            }
            assert_eq!(c.both_ways(runner, &seen), (Way::Works, Way::Works));
        }
    });
}

#[test]
fn snat_slot_given_to_another_ends_both_directions() {
    on_both(World::standard(), |runner, _| {
        for family in FAMILIES {
            let client = ip::client(family, 9);
            let c = Connection::new(family, IPPROTO_TCP, Svc::TunnelV4, client, CLIENT_PORT);
            let seen = c.establish(runner);
            let (set, way, record) = record_of(runner, &c);
            let other = SnatSlot::owned(set, (way as u32 + 1) % FLOW_WAYS as u32);
            runner.put_slot(record.snat - 1, other);
            let_stamp_age(runner, &c);
            assert_eq!(c.both_ways(runner, &seen), (Way::Ends, Way::Ends));
            runner.put_slot(record.snat - 1, SnatSlot::FREE);
        }
    });
}

#[test]
fn connection_that_ended_by_hand_begins_again() {
    on_both(World::standard(), |runner, _| {
        for family in FAMILIES {
            for proto in PROTOCOLS {
                for service in ESTABLISHED {
                    let client = ip::client(family, 9);
                    let c = Connection::new(family, proto, service, client, CLIENT_PORT);
                    c.establish(runner);
                    let record = record_of(runner, &c).2;
                    if record.snat != 0 {
                        runner.put_slot(record.snat - 1, SnatSlot::FREE);
                        let_stamp_age(runner, &c);
                    } else {
                        change(runner, &c, |tag, _| *tag = 0);
                    }
                    let seen = c.establish(runner);
                    assert_eq!(c.both_ways(runner, &seen), (Way::Works, Way::Works));
                    tables_agree(runner);
                }
            }
        }
    });
}

#[test]
fn replacing_heals_a_connection_whose_state_is_lost() {
    on_both(World::replacing(), |runner, _| {
        for family in FAMILIES {
            for service in ESTABLISHED {
                let client = ip::client(family, 9);
                let c = Connection::new(family, IPPROTO_TCP, service, client, CLIENT_PORT);
                let seen = c.establish(runner);
                let record = record_of(runner, &c).2;
                if record.snat != 0 {
                    runner.put_slot(record.snat - 1, SnatSlot::FREE);
                }
                change(runner, &c, |tag, _| *tag = 0);
                // The same connection gets the same port again, so the backend notices nothing.
                assert_eq!(c.both_ways(runner, &seen), (Way::Works, Way::Works), "{service:?}");
                tables_agree(runner);
            }
        }
    });
}

#[test]
fn exhausted_snat_refuses_newcomers_until_a_port_is_free() {
    on_both(World::standard().with_flow_sets(4), |runner, _| {
        for underlay in FAMILIES {
            let (service, _) = tunnel_service(underlay);
            let connection = |n: u16| {
                let client = ip::client(Family::V4, 300 + n);
                Connection::new(Family::V4, IPPROTO_UDP, service, client, CLIENT_PORT)
            };
            let mut open = Vec::new();
            let refused = loop {
                let c = connection(open.len() as u16);
                match c.send(runner, &c.request) {
                    Ok(seen) => open.push((c, seen)),
                    Err(Reason::SnatExhausted) => break c,
                    Err(reason) => panic!("{reason:?} after {}", open.len()),
                }
            };
            // Random tries miss a free port now and then, but not half of them.
            let ports = usize::from(size::SNAT_LAST - size::SNAT_FIRST) + 1;
            assert!(open.len() > ports / 2, "{} of {ports} ports used", open.len());
            let mut used: Vec<u16> = open.iter().map(|(_, seen)| snat_port(seen)).collect();
            used.sort_unstable();
            used.dedup();
            assert_eq!(used.len(), open.len(), "a port was given twice");
            tables_agree(runner);
            for (c, seen) in &open {
                assert_eq!(c.both_ways(runner, seen), (Way::Works, Way::Works));
            }
            for (c, _) in &open {
                let record = record_of(runner, c).2;
                change(runner, c, |tag, _| *tag = 0);
                runner.put_slot(record.snat - 1, SnatSlot::FREE);
            }
            refused.establish(runner);
            let record = record_of(runner, &refused).2;
            change(runner, &refused, |tag, _| *tag = 0);
            runner.put_slot(record.snat - 1, SnatSlot::FREE);
        }
    });
}

#[test]
fn refused_connection_gives_its_snat_port_back() {
    let mut world = World::standard();
    world.settings.flow_set_mask = 0;
    on_both(world, |runner, _| {
        for n in 0..16 {
            let client = ip::client(Family::V4, 100 + n);
            let c = Connection::new(Family::V4, IPPROTO_TCP, Svc::LocalStack, client, CLIENT_PORT);
            c.establish(runner);
        }
        let client = ip::client(Family::V4, 99);
        let c = Connection::new(Family::V4, IPPROTO_TCP, Svc::TunnelV4, client, CLIENT_PORT);
        assert_eq!(c.send(runner, &c.request), Err(Reason::FlowTableFull));
        assert_eq!(runner.slots(), [], "the port is still claimed");
    });
}

#[test]
fn second_comer_gets_another_source_port_and_both_replies_arrive() {
    on_both(World::standard(), |runner, _| {
        for family in FAMILIES {
            for proto in PROTOCOLS {
                let client = ip::client(family, 9);
                let to = |service| Connection::new(family, proto, service, client, CLIENT_PORT);
                let (first, second) = (to(Svc::LocalStack), to(Svc::LocalStackToo));
                let seen = first.open(runner);
                let seen_too = second.open(runner);
                let port = sluice_tests::packet::src_port;
                assert_eq!(port(&seen), CLIENT_PORT);
                assert_ne!(port(&seen_too), CLIENT_PORT);
                for _ in 0..2 {
                    assert_eq!(first.both_ways(runner, &seen), (Way::Works, Way::Works));
                    assert_eq!(second.both_ways(runner, &seen_too), (Way::Works, Way::Works));
                }
            }
        }
    });
}

/// The flow set in which another CPU has just begun `connection`.
fn begun_elsewhere(world: &World, connection: &Connection) -> (u32, FlowSet) {
    let mut other = Host::new(world);
    connection.open(&mut other);
    let (index, ..) = record_of(&other, connection);
    (index, other.flow_sets()[index as usize])
}

#[test]
fn source_port_is_chosen_where_no_other_cpu_can_take_it() {
    let world = World::standard();
    for family in FAMILIES {
        for proto in PROTOCOLS {
            let client = ip::client(family, 9);
            let to = |service| Connection::new(family, proto, service, client, CLIENT_PORT);
            let (first, second) = (to(Svc::LocalStackToo), to(Svc::LocalStack));
            let mut host = Host::new(&world);
            host.put_at_lock.set(Some(begun_elsewhere(&world, &first)));
            let seen = second.open(&mut host);
            assert_ne!(sluice_tests::packet::src_port(&seen), CLIENT_PORT);
            let first_seen = first.open(&mut host);
            assert_eq!(sluice_tests::packet::src_port(&first_seen), CLIENT_PORT);
            assert_eq!(second.both_ways(&mut host, &seen), (Way::Works, Way::Works));
            assert_eq!(first.both_ways(&mut host, &first_seen), (Way::Works, Way::Works));
        }
    }
}

#[test]
fn connection_that_two_cpus_begin_at_once_is_one() {
    let world = World::standard();
    for service in ESTABLISHED {
        let client = ip::client(Family::V4, 9);
        let c = Connection::new(Family::V4, IPPROTO_TCP, service, client, CLIENT_PORT);
        let mut host = Host::new(&world);
        let (index, set) = begun_elsewhere(&world, &c);
        host.put_at_lock.set(Some((index, set)));
        c.open(&mut host);
        assert_eq!(host.flow_sets()[index as usize].records, set.records, "{service:?}");
        assert_eq!(live(&host).len(), 1);
        let claimed = host.snat_slots().len();
        assert_eq!(claimed, 0, "{service:?}: the loser's SNAT port is still claimed");
    }
}

#[test]
fn end_of_a_connection_spares_the_one_that_took_its_place() {
    let world = World::standard();
    for service in [Svc::LocalStack, Svc::TunnelV4] {
        let client = ip::client(Family::V4, 9);
        let c = Connection::new(Family::V4, IPPROTO_TCP, service, client, CLIENT_PORT);
        let mut host = Host::new(&world);
        c.open(&mut host);
        let (index, way, record) = record_of(&host, &c);
        let slots = host.snat_slots();
        let found = flow::at(&host, index, way as u32).expect("a record");
        // The same client begins anew in the same place: only the generation tells the two apart.
        let mut set = host.flow_sets()[index as usize];
        set.tags[way] += flow_tag::NEXT;
        host.set_flow_set(index, set);
        flow::release(&host, &found);
        assert!(!found.is_still_there());
        assert_eq!(record_of(&host, &c).2, record);
        assert_eq!(host.snat_slots(), slots);
        let found = flow::at(&host, index, way as u32).expect("a record");
        flow::release(&host, &found);
        assert_eq!(live(&host), []);
        assert_eq!(host.snat_slots(), []);
    }
}

#[test]
fn record_made_anew_in_its_place_is_not_taken_for_the_old_one() {
    on_both(World::standard(), |runner, _| {
        let client = ip::client(Family::V4, 9);
        let c = Connection::new(Family::V4, IPPROTO_UDP, Svc::LocalStack, client, CLIENT_PORT);
        let mut tags = std::collections::BTreeSet::new();
        for _ in 0..16 {
            c.open(runner);
            let (index, way, _) = record_of(runner, &c);
            let mut set = runner.flows()[index as usize];
            tags.insert((index, way, set.tags[way]));
            set.tags[way] = flow_tag::freed(set.tags[way]);
            runner.put_flow_set(index, set);
        }
        assert_eq!(tags.len(), 16, "a tag came again: {tags:x?}");
    });
}

#[test]
fn new_epoch_keeps_the_backend_and_takes_the_new_way() {
    on_both(World::standard(), |runner, world| {
        for family in FAMILIES {
            for proto in PROTOCOLS {
                runner.rewrite(world);
                let client = ip::client(family, 9);
                let c = Connection::new(family, proto, Svc::LocalStack, client, CLIENT_PORT);
                let seen = c.establish(runner);
                assert_eq!(c.both_ways(runner, &seen), (Way::Works, Way::Works));

                // The Service now has another backend, and the old one's pod takes frames.
                let mut world = world.clone();
                let other = world.extent(&[Be::Redirect.id(family, proto)]);
                let key = Svc::LocalStack.key(family, proto);
                world.frontends.get_mut(&key).expect("it is there").external = other;
                let pod = world.pods.get_mut(&ip::pod_stack(family)).expect("it is there");
                pod.delivery = Delivery::Redirect as u16;
                world.settings.epoch += 1;
                runner.rewrite(&world);

                let packet = later(c.request.clone());
                let (reason, outcome) = runner.send(Hook::Xdp, dev::UPLINK, &packet.bytes());
                assert_eq!(reason, Reason::DnatLocal);
                let (backend, port) = place(Be::Stack, family);
                let way = packet.to(backend, port).hop().eth(mac::HOST_STACK, mac::POD_STACK);
                let expected = way.bytes();
                assert_eq!(outcome.bytes, expected, "{}", difference(&outcome.bytes, &expected));
                let record = record_of(runner, &c).2;
                assert_eq!(record.epoch, world.settings.epoch);
                assert_eq!(record.state & flow_state::REPLIED, flow_state::REPLIED);

                // A new connection goes where the table says now.
                let client = ip::client(family, 10);
                let c = Connection::new(family, proto, Svc::LocalStack, client, CLIENT_PORT);
                c.open(runner);
                assert_eq!(record_of(runner, &c).2.backend, ip::pod_redirect(family));
            }
        }
    });
}

#[test]
fn old_decision_is_taken_anew_though_nothing_was_announced() {
    on_both(World::standard(), |runner, world| {
        let client = ip::client(Family::V4, 9);
        let c = Connection::new(Family::V4, IPPROTO_UDP, Svc::LocalStack, client, CLIENT_PORT);
        c.establish(runner);
        // The agent changed the tables and died before it bumped the epoch.
        let mut world = world.clone();
        let pod = world.pods.get_mut(&ip::pod_stack(Family::V4)).expect("it is there");
        pod.delivery = Delivery::Redirect as u16;
        runner.rewrite(&world);
        let code = |runner: &mut dyn Runner| {
            runner.send(Hook::Xdp, dev::UPLINK, &c.request.bytes()).1.code
        };
        // Looked at when the stamp is old, which of a connection that goes on is so once a second.
        let age = |runner: &mut dyn Runner, by: u32| {
            change(runner, &c, |_, r| {
                r.decided = r.decided.wrapping_sub(by);
                r.seen = r.seen.wrapping_sub(TIMEOUTS.stamp + 100_000);
            });
        };
        age(runner, TIMEOUTS.redecide - 100_000);
        assert_eq!(code(runner), code::XDP_PASS, "decided anew before its time");
        age(runner, 200_000);
        assert_eq!(code(runner), code::XDP_REDIRECT, "not decided anew");
        let decided = record_of(runner, &c).2.decided;
        assert_eq!(code(runner), code::XDP_REDIRECT);
        assert_eq!(record_of(runner, &c).2.decided, decided, "decided anew once more");
    });
}

#[test]
fn stamp_is_renewed_only_when_it_is_old() {
    on_both(World::standard(), |runner, _| {
        let client = ip::client(Family::V6, 9);
        let c = Connection::new(Family::V6, IPPROTO_UDP, Svc::LocalRedirect, client, CLIENT_PORT);
        let seen = c.establish(runner);
        assert_eq!(c.both_ways(runner, &seen), (Way::Works, Way::Works));
        let stamp = |runner: &dyn Runner| record_of(runner, &c).2.seen;
        let age = |runner: &mut dyn Runner, by: u32| {
            change(runner, &c, |_, r| r.seen = r.seen.wrapping_sub(by));
        };
        age(runner, TIMEOUTS.stamp - 100_000);
        let old = stamp(runner);
        assert_eq!(c.both_ways(runner, &seen), (Way::Works, Way::Works));
        assert_eq!(stamp(runner), old, "written on the established path");
        age(runner, 200_000);
        let old = stamp(runner);
        assert_eq!(c.both_ways(runner, &seen), (Way::Works, Way::Works));
        assert!(stamp(runner).wrapping_sub(old) > TIMEOUTS.stamp, "not renewed");
    });
}

#[test]
fn connection_moves_to_another_tunnel_once_the_tables_have_changed() {
    on_both(World::standard(), |runner, world| {
        for family in FAMILIES {
            let through = |runner: &mut dyn Runner, underlay| {
                let packet = pod_request(family, IPPROTO_UDP, Svc::LocalRedirect, underlay);
                let frame = from_peer(underlay, &packet.bytes()).bytes();
                runner.send(Hook::Xdp, dev::UPLINK, &frame).0
            };
            runner.rewrite(world);
            assert_eq!(through(runner, Family::V4), Reason::DecapDnatLocal);
            assert_eq!(through(runner, Family::V6), Reason::TunnelChanged);
            let mut world = world.clone();
            world.settings.epoch += 1;
            runner.rewrite(&world);
            let forged = pod_request(family, IPPROTO_UDP, Svc::LocalRedirect, Family::V4);
            let forged = forged.eth(mac::GATEWAY, mac::UPLINK).bytes();
            let (reason, _) = runner.send(Hook::Xdp, dev::UPLINK, &forged);
            assert_eq!(reason, Reason::TunnelChanged, "without any tunnel");
            assert_eq!(through(runner, Family::V6), Reason::DecapDnatLocal);
            assert_eq!(through(runner, Family::V4), Reason::TunnelChanged);
        }
    });
}

#[test]
fn vanished_backend_keeps_its_connections() {
    on_both(World::standard(), |runner, world| {
        for service in ESTABLISHED {
            let client = ip::client(Family::V4, 9);
            let c = Connection::new(Family::V4, IPPROTO_TCP, service, client, CLIENT_PORT);
            let seen = c.establish(runner);
            let mut world = world.clone();
            let id = c.backend.id(Family::V4, IPPROTO_TCP);
            world.backends[id as usize] = Default::default();
            world.frontends.remove(&service.key(Family::V4, IPPROTO_TCP));
            world.settings.epoch += 1;
            runner.rewrite(&world);
            assert_eq!(c.both_ways(runner, &seen), (Way::Works, Way::Works), "{service:?}");
        }
    });
}

#[test]
fn same_request_chooses_the_same_backend_and_all_backends_are_chosen() {
    on_both(World::standard(), |runner, world| {
        let mut chosen = std::collections::BTreeMap::<u32, u32>::new();
        for n in 0..200 {
            let packet = stranger(Family::V4, n, Svc::Many);
            let backend = |runner: &mut dyn Runner| {
                let (reason, _) = runner.send(Hook::Xdp, dev::UPLINK, &packet.bytes());
                assert_eq!(reason.kind(), VerdictKind::Forward, "{reason:?}");
                let (index, way, record) = live(runner)
                    .into_iter()
                    .find(|(_, _, r)| {
                        r.client == packet.src && r.client_port.host() == packet.src_port
                    })
                    .expect("a record");
                let mut set = runner.flows()[index as usize];
                set.tags[way] = 0;
                runner.put_flow_set(index, set);
                if record.snat != 0 {
                    runner.put_slot(record.snat - 1, SnatSlot::FREE);
                }
                record.backend_id
            };
            let first = backend(runner);
            // A new boot has another flow seed; the choice depends on the cluster's alone.
            let mut world = world.clone();
            world.settings.seeds.flow ^= u64::from(n) << 3 | 1;
            runner.rewrite(&world);
            assert_eq!(backend(runner), first);
            *chosen.entry(first).or_default() += 1;
        }
        let expected = Svc::Many.backends().len();
        assert_eq!(chosen.len(), expected, "{chosen:?}");
        assert!(chosen.values().all(|&n| n > 15), "{chosen:?}");
    });
}

#[test]
fn affinity_keeps_a_client_with_one_backend() {
    let mut world = World::standard();
    for family in FAMILIES {
        let frontend = world.frontends.get_mut(&Svc::Pair.key(family, IPPROTO_TCP));
        frontend.expect("it is there").affinity_seconds = 10_800;
    }
    on_both(world, |runner, _| {
        for family in FAMILIES {
            let mut chosen = std::collections::BTreeSet::new();
            for n in 0..20 {
                let client = ip::client(family, 400 + n);
                let connect = |runner: &mut dyn Runner, port| {
                    let c = Connection::new(family, IPPROTO_TCP, Svc::Pair, client, port);
                    c.open(runner);
                    record_of(runner, &c).2.backend_id
                };
                let first = connect(runner, 2000);
                for port in 2001..2008 {
                    assert_eq!(connect(runner, port), first, "client {n}, port {port}");
                }
                chosen.insert(first);
            }
            assert_eq!(chosen.len(), 2, "all clients went to {chosen:?}");
        }
    });
}

/// A segment of either side of a connection, and whether it got through.
struct Ends<'c> {
    connection: &'c Connection,
    seen: Vec<u8>,
}

impl<'c> Ends<'c> {
    /// A connection that both sides have confirmed.
    fn establish(runner: &mut dyn Runner, connection: &'c Connection) -> Self {
        let seen = connection.establish(runner);
        Self { connection, seen }
    }

    /// Sends a segment whose numbers are so far ahead of where the other side waits.
    fn send(&self, runner: &mut dyn Runner, reply: bool, flags: u8, ahead: u32, acked: u32) {
        let how = |p: Packet| {
            let (seq, ack) = (p.seq.wrapping_add(ahead), p.ack.wrapping_add(acked));
            p.flags(flags).at(seq, ack)
        };
        if reply {
            assert_eq!(self.connection.reply(runner, &self.seen, &how), Way::Works);
        } else {
            let sent = self.connection.send(runner, &how(self.connection.request.clone()));
            assert!(sent.is_ok(), "{sent:?}");
        }
    }

    fn record(&self, runner: &dyn Runner) -> FlowRecord {
        record_of(runner, self.connection).2
    }
}

const ACK: u8 = tcp::ACK;
const RST: u8 = tcp::RST;
const FIN: u8 = tcp::FIN;

/// Runs a law on an established TCP connection of each family to backends of each kind.
fn on_established(law: fn(&mut dyn Runner, &Ends<'_>)) {
    for world in [World::standard(), World::replacing()] {
        let both = move |runner: &mut dyn Runner, world: &World| {
            for family in FAMILIES {
                for service in ESTABLISHED {
                    let client = ip::client(family, 9);
                    let c = Connection::new(family, IPPROTO_TCP, service, client, CLIENT_PORT);
                    let ends = Ends::establish(runner, &c);
                    law(runner, &ends);
                    let record = record_of(runner, &c).2;
                    change(runner, &c, |tag, _| *tag = 0);
                    if record.snat != 0 {
                        runner.put_slot(record.snat - 1, SnatSlot::FREE);
                    }
                    runner.rewrite(world);
                }
            }
        };
        both(&mut Host::new(&world), &world);
        with_kernel(move |kernel| {
            kernel.fill(&world);
            both(kernel, &world);
        });
    }
}

/// Places where no window is, seen from where the other side waits.
const ASTRAY: [u32; 6] = [u32::MAX, u32::MAX - 70_000, NEAR, NEAR + 1, 1 << 31, FAR * 3];

#[test]
fn a45_forged_rst_is_forwarded_and_changes_nothing() {
    on_established(|runner, ends| {
        let before = ends.record(runner);
        for reply in [false, true] {
            for ahead in ASTRAY {
                ends.send(runner, reply, RST, ahead, 0);
                // With an acknowledgement that is as wrong.
                ends.send(runner, reply, RST | ACK, ahead, ahead);
                assert_eq!(ends.record(runner), before, "reply {reply}, {ahead} ahead");
            }
            // Right where the window is wide, but beyond every window.
            ends.send(runner, reply, RST | ACK, FAR, 0);
            assert_eq!(ends.record(runner), before, "reply {reply}");
        }
    });
}

#[test]
fn a45_forged_fin_is_forwarded_and_changes_nothing() {
    on_established(|runner, ends| {
        let before = ends.record(runner);
        for reply in [false, true] {
            for ahead in ASTRAY {
                ends.send(runner, reply, FIN | ACK, ahead, 1 << 31);
                ends.send(runner, reply, FIN, ahead, 0);
                assert_eq!(ends.record(runner), before, "reply {reply}, {ahead} ahead");
            }
        }
    });
}

#[test]
fn a45_forged_syn_of_an_established_connection_changes_nothing() {
    on_established(|runner, ends| {
        let before = ends.record(runner);
        for ahead in [0, 1, 1000, NEAR, 1 << 31] {
            ends.send(runner, false, tcp::SYN, ahead, 0);
            assert_eq!(ends.record(runner), before, "{ahead} ahead");
        }
    });
}

#[test]
fn a45_acknowledgements_that_nobody_can_have_sent_are_not_remembered() {
    on_established(|runner, ends| {
        let before = ends.record(runner);
        for reply in [false, true] {
            // A forger who hits neither number, or only one of the two.
            for (ahead, acked) in
                [(1 << 31, 1 << 20), (0, 1 << 31), (0, FAR + STEP), (FAR, 1 << 20)]
            {
                ends.send(runner, reply, ACK, ahead, acked);
                assert_eq!(ends.record(runner), before, "reply {reply}, {ahead}, {acked}");
            }
        }
    });
}

#[test]
fn rst_in_the_window_shortens_the_life_and_going_on_takes_it_back() {
    on_established(|runner, ends| {
        let before = ends.record(runner);
        for reply in [false, true] {
            for (flags, ahead) in [(RST, 0), (RST, 1), (RST, NEAR - 1), (RST | ACK, FAR - 1)] {
                ends.send(runner, reply, flags, ahead, 0);
                let record = ends.record(runner);
                assert_eq!(record.state, before.state | flow_state::RESET, "{ahead} ahead");
                assert_eq!(record.timeout, TIMEOUTS.tcp_closing);
                // What is no answer takes nothing back.
                ends.send(runner, !reply, ACK, 1 << 31, 1 << 31);
                ends.send(runner, reply, ACK, 1 << 31, 1 << 31);
                assert_eq!(ends.record(runner), record);
                // The receiver says where it is (RFC 5961), or the sender goes on.
                ends.send(runner, reply ^ (ahead != 0), ACK, 0, 0);
                assert_eq!(ends.record(runner), before, "{ahead} ahead");
            }
        }
    });
}

#[test]
fn fin_of_each_side_ends_a_connection_however_much_is_in_flight() {
    on_established(|runner, ends| {
        let before = ends.record(runner);
        ends.send(runner, true, FIN | ACK, FAR - 1, 0);
        let half = ends.record(runner);
        assert_eq!(half.state, before.state | flow_state::FIN_REPLY);
        assert_eq!(half.timeout, TIMEOUTS.tcp_established, "half closed is open");
        ends.send(runner, false, FIN | ACK, 0, FAR - 1);
        let record = ends.record(runner);
        assert_eq!(record.state, half.state | flow_state::FIN_FORWARD);
        assert_eq!(record.timeout, TIMEOUTS.tcp_closing);
    });
}

#[test]
fn acknowledgements_are_written_once_for_many_segments() {
    on_established(|runner, ends| {
        for reply in [false, true] {
            let acked = |r: FlowRecord| if reply { r.ack_reply } else { r.ack_forward };
            let before = ends.record(runner);
            // The client went first: the backend's bytes are acknowledged so far.
            let at = if reply { 10 * STEP } else { 0 };
            ends.send(runner, reply, ACK, at, STEP - 1);
            assert_eq!(ends.record(runner), before, "written on the established path");
            ends.send(runner, reply, ACK, at, STEP);
            assert_eq!(acked(ends.record(runner)), acked(before).wrapping_add(STEP));
            // Reordered: what is remembered does not go back.
            ends.send(runner, reply, ACK, at, 0);
            ends.send(runner, reply, ACK, at, 10 * STEP);
            ends.send(runner, reply, ACK, at, 9 * STEP);
            let record = ends.record(runner);
            assert_eq!(acked(record), acked(before).wrapping_add(10 * STEP));
            assert_eq!(record.state, before.state);
            // The window has moved on: what fitted does not any more, what did not does.
            ends.send(runner, !reply, RST, 0, 0);
            assert_eq!(ends.record(runner), record);
            ends.send(runner, !reply, RST, 10 * STEP + NEAR - 1, 0);
            assert_eq!(ends.record(runner).state, record.state | flow_state::RESET);
            ends.send(runner, !reply, ACK, 10 * STEP, 0);
            assert_eq!(ends.record(runner), record);
        }
    });
}

#[test]
fn refused_connection_is_forgotten_soon_and_a_forged_refusal_changes_nothing() {
    on_both(World::standard(), |runner, _| {
        for family in FAMILIES {
            for service in ESTABLISHED {
                let client = ip::client(family, 9);
                let c = Connection::new(family, IPPROTO_TCP, service, client, CLIENT_PORT);
                let seen = c.open(runner);
                let before = record_of(runner, &c).2;
                for (flags, ack) in [(RST, 0), (RST | ACK, NEAR), (RST | ACK, u32::MAX)] {
                    let forged = |p: Packet| {
                        let ack = p.ack.wrapping_add(ack);
                        p.flags(flags).at(0, ack)
                    };
                    assert_eq!(c.reply(runner, &seen, &forged), Way::Works);
                    assert_eq!(record_of(runner, &c).2, before);
                }
                // RFC 9293 section 3.10.7.1: what came is acknowledged, the number is zero.
                let refusal = |p: Packet| {
                    let ack = p.ack.wrapping_add(1);
                    p.flags(RST | ACK).at(0, ack)
                };
                assert_eq!(c.reply(runner, &seen, &refusal), Way::Works);
                let record = record_of(runner, &c).2;
                assert_eq!(record.state, flow_state::REPLIED | flow_state::RESET);
                assert_eq!(record.timeout, TIMEOUTS.tcp_closing);
            }
        }
    });
}

#[test]
fn acknowledgement_by_somebody_who_did_not_see_the_reply_confirms_nothing() {
    on_both(World::standard(), |runner, _| {
        for family in FAMILIES {
            let client = ip::client(family, 9);
            let c = Connection::new(family, IPPROTO_TCP, Svc::LocalStack, client, CLIENT_PORT);
            let seen = c.open(runner);
            let guess = |ack: u32| {
                let ack = c.request.ack.wrapping_add(ack);
                c.request.clone().flags(ACK).at(c.request.seq + 1, ack)
            };
            let state = |runner: &dyn Runner| record_of(runner, &c).2.state;
            assert!(c.send(runner, &guess(1)).is_ok());
            assert_eq!(state(runner), 0, "nobody has replied");
            assert_eq!(c.answer(runner, &seen), Way::Works);
            for ack in ASTRAY {
                assert!(c.send(runner, &guess(ack)).is_ok());
                assert_eq!(state(runner), flow_state::REPLIED, "{ack}");
            }
            assert!(c.send(runner, &guess(1)).is_ok());
            assert_eq!(state(runner), flow_state::REPLIED | flow_state::CONFIRMED);
        }
    });
}

#[test]
fn attempt_with_other_numbers_is_followed_like_the_first() {
    on_both(World::standard(), |runner, _| {
        let client = ip::client(Family::V4, 9);
        let mut c = Connection::new(Family::V4, IPPROTO_TCP, Svc::LocalStack, client, CLIENT_PORT);
        let seen = c.open(runner);
        assert_eq!(c.answer(runner, &seen), Way::Works);
        // The client gave up before the answer came, and tries the same port again.
        c.request = c.request.at(0x7000_0000, 0x9000_0000);
        assert!(c.send(runner, &c.request).is_ok());
        assert_eq!(record_of(runner, &c).2.state, 0);
        let ends = Ends::establish(runner, &c);
        let before = ends.record(runner);
        assert_eq!(before.timeout, TIMEOUTS.tcp_established);
        ends.send(runner, false, FIN | ACK, 10, 10);
        ends.send(runner, true, FIN | ACK, 10, 10);
        assert_eq!(ends.record(runner).timeout, TIMEOUTS.tcp_closing);
    });
}

#[test]
fn syn_sent_again_goes_to_the_same_backend_while_there_is_one() {
    on_both(World::standard(), |runner, world| {
        for family in FAMILIES {
            let client = ip::client(family, 9);
            let c = Connection::new(family, IPPROTO_TCP, Svc::LocalStack, client, CLIENT_PORT);
            c.open(runner);
            let backend = |runner: &dyn Runner| record_of(runner, &c).2.backend;
            assert_eq!(backend(runner), ip::pod_stack(family));
            // New connections go elsewhere now, but the backend is there.
            let mut world = world.clone();
            let other = world.extent(&[Be::Redirect.id(family, IPPROTO_TCP)]);
            let key = Svc::LocalStack.key(family, IPPROTO_TCP);
            world.frontends.get_mut(&key).expect("it is there").external = other;
            world.settings.epoch += 1;
            runner.rewrite(&world);
            for _ in 0..3 {
                assert!(c.send(runner, &c.request).is_ok());
                assert_eq!(backend(runner), ip::pod_stack(family));
            }
            // It goes: the next attempt meets another one.
            world.backends[Be::Stack.id(family, IPPROTO_TCP) as usize] = Default::default();
            runner.rewrite(&world);
            let (reason, _) = runner.send(Hook::Xdp, dev::UPLINK, &c.request.bytes());
            assert_eq!(reason, Reason::DnatLocal);
            assert_eq!(backend(runner), ip::pod_redirect(family));
            assert_eq!(live(runner).len(), 1 + (family as usize - Family::V4 as usize));
        }
    });
}

#[test]
fn ends_of_a_connection_shorten_its_life() {
    on_both(World::standard(), |runner, _| {
        let client = ip::client(Family::V4, 9);
        let connect = |runner: &mut dyn Runner, proto, port| {
            let c = Connection::new(Family::V4, proto, Svc::LocalStack, client, port);
            let seen = c.open(runner);
            (c, seen)
        };
        let timeout = |runner: &dyn Runner, c: &Connection| record_of(runner, c).2.timeout;

        let (c, seen) = connect(runner, IPPROTO_TCP, 1111);
        assert_eq!(timeout(runner, &c), TIMEOUTS.tcp_syn);
        assert_eq!(c.answer(runner, &seen), Way::Works);
        assert_eq!(timeout(runner, &c), TIMEOUTS.tcp_syn, "the client may be forged");
        assert!(c.send(runner, &c.request).is_ok());
        assert_eq!(timeout(runner, &c), TIMEOUTS.tcp_syn, "a SYN sent again proves nothing");
        assert!(c.send(runner, &later(c.request.clone())).is_ok());
        assert_eq!(timeout(runner, &c), TIMEOUTS.tcp_established);
        let fin = c.request.clone().flags(tcp::FIN | tcp::ACK);
        assert!(c.send(runner, &fin).is_ok());
        assert_eq!(timeout(runner, &c), TIMEOUTS.tcp_established, "half closed is open");
        let (backend, port) = place(Be::Stack, Family::V4);
        let fin = c.request.clone().to(backend, port).answer().flags(tcp::FIN | tcp::ACK);
        let (reason, _) = runner.send(Hook::TcEgress, dev::UPLINK, &fin.bytes());
        assert_eq!(reason, Reason::ReplyLocal);
        assert_eq!(timeout(runner, &c), TIMEOUTS.tcp_closing);

        let (c, seen) = connect(runner, IPPROTO_TCP, 2222);
        assert_eq!(c.answer(runner, &seen), Way::Works);
        assert!(c.send(runner, &c.request.clone().flags(tcp::RST)).is_ok());
        assert_eq!(timeout(runner, &c), TIMEOUTS.tcp_closing);

        let (c, seen) = connect(runner, IPPROTO_UDP, 3333);
        assert_eq!(timeout(runner, &c), TIMEOUTS.udp_oneway);
        assert_eq!(c.answer(runner, &seen), Way::Works);
        assert_eq!(timeout(runner, &c), TIMEOUTS.udp_replied);
    });
}
