//! Commands that show something.

use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;

use comfy_table::{Attribute, Cell, Color, Table, presets};
use serde_json::{Value, json};
use sluice_abi::{
    AnswerCounter, Backend, Exit, ExitKind, Extent, IPPROTO_TCP, PodNet, Route, Settings,
    flow_state, frontend_flags, record_flags, settings_flags,
};
use sluice_control::Names;

use super::{CliError, Output, Place, Show, colour, out};
use crate::attach::pinned_jiffies;
use crate::flood::Guard;
use crate::run_dir::Status;

fn table(columns: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    let bold = colour();
    table.set_header(columns.iter().map(|c| {
        let cell = Cell::new(c);
        if bold { cell.add_attribute(Attribute::Bold) } else { cell }
    }));
    if let Some(column) = table.column_mut(0) {
        column.set_padding((0, 1));
    }
    table
}

fn print(table: &Table) -> Result<(), CliError> {
    let text: String = table.lines().map(|line| format!("{}\n", line.trim_end())).collect();
    out(&text)
}

fn print_json(value: &Value) -> Result<(), CliError> {
    out(&format!("{value:#}\n"))
}

fn proto(number: u8) -> &'static str {
    if number == IPPROTO_TCP { "tcp" } else { "udp" }
}

fn service_name(names: &Names, id: u32) -> String {
    names.services.get(&id).cloned().unwrap_or_else(|| format!("#{id}"))
}

fn endpoint(addr: sluice_abi::Addr, port: sluice_abi::Be16) -> String {
    std::net::SocketAddr::new(addr.to_ip(), port.host()).to_string()
}

/// `sluice status`.
pub(super) fn status(show: &Show) -> Result<ExitCode, CliError> {
    let place = show.instance.place()?;
    let running = place.run_dir.agent_runs();
    let mut status = place.run_dir.status()?.unwrap_or_else(|| Status {
        not_ready: vec![format!(
            "{}: no agent ran with this run_dir",
            place.run_dir.path().display()
        )],
        ..Status::default()
    });
    if !running {
        status.ready = false;
        status.not_ready.retain(|reason| reason != Status::STARTING);
        status
            .not_ready
            .insert(0, "the agent does not run; the datapath goes on without it".to_owned());
    }
    if running && !place.run_dir.is_of_holder(&status) {
        status.ready = false;
        status.not_ready = vec![Status::STARTING.to_owned()];
    }
    let settings: Option<Settings> = place.pins.settings().and_then(|s| s.read(0)).ok();
    let bypass = settings.is_some_and(|s| s.flags & settings_flags::BYPASS != 0);
    let guard = settings.and_then(|s| flood_guard(&place, &s));
    let code = if status.ready { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    if show.output == Output::Json {
        let mut value = serde_json::to_value(&status).unwrap_or_default();
        if let Value::Object(fields) = &mut value {
            fields.insert("running".to_owned(), running.into());
            fields.insert("bypass".to_owned(), bypass.into());
            fields.insert("flood_guard".to_owned(), json!(guard));
            fields.insert("epoch".to_owned(), settings.map(|s| s.epoch).unwrap_or_default().into());
        }
        print_json(&value)?;
        return Ok(code);
    }
    let mut text = String::new();
    let word = match (status.ready, colour()) {
        (true, true) => "\u{1b}[32mready\u{1b}[0m",
        (true, false) => "ready",
        (false, true) => "\u{1b}[31mnot ready\u{1b}[0m",
        (false, false) => "not ready",
    };
    text.push_str(&format!("{word}   node {}", status.node));
    if running {
        text.push_str(&format!(
            "   agent {} pid {}   generation {}",
            status.version, status.pid, status.generation
        ));
    }
    text.push('\n');
    for reason in &status.not_ready {
        text.push_str(&format!("  {reason}\n"));
    }
    if bypass {
        text.push_str("  BYPASS is on: every packet passes to the kernel (`sluice bypass off`)\n");
    }
    let t = &status.tables;
    text.push_str(&format!(
        "tables  {} service ports, {} frontends, {} backends, {} local pods, {} vteps, {} next hops ({} unresolved)\n",
        t.services, t.frontends, t.backends, t.pods, t.vteps, t.next_hops, t.next_hops_unresolved
    ));
    if let Some(guard) = guard {
        text.push_str(&format!("flood guard  {}\n", guard.line()));
    }
    text.push('\n');
    out(&text)?;
    let mut interfaces =
        table(&["INTERFACE", "ROLE", "MODE", "TC INGRESS", "TC EGRESS", "DELIVERY"]);
    for (name, a) in &status.interfaces {
        let role = format!("{:?}", a.role).to_lowercase();
        let delivery = match (role.as_str(), status.stack_delivery.contains_key(name)) {
            ("pod", true) => "stack",
            ("pod", false) => "redirect",
            _ => "",
        };
        let yes = |b: bool| if b { "yes" } else { "no" };
        let mode = Cell::new(a.mode.label());
        interfaces.add_row(vec![
            Cell::new(name),
            Cell::new(&role),
            if colour() && role == "uplink" { mode.fg(Color::Cyan) } else { mode },
            Cell::new(yes(a.tc_ingress)),
            Cell::new(yes(a.tc_egress)),
            Cell::new(delivery),
        ]);
    }
    print(&interfaces)?;
    let mut text = String::new();
    for (name, a) in &status.interfaces {
        for r in &a.refusals {
            text.push_str(&format!("  {name}: {} refused: {}; {}\n", r.rung, r.reason, r.remedy));
        }
    }
    for (name, reason) in &status.stack_delivery {
        text.push_str(&format!("  {name}: delivery by stack: {reason}\n"));
    }
    for note in &status.notes {
        text.push_str(&format!("  {note}\n"));
    }
    for s in &status.skipped {
        let parts: Vec<&str> = [&s.origin, &s.object, &s.field]
            .into_iter()
            .filter(|p| !p.is_empty())
            .map(String::as_str)
            .collect();
        text.push_str(&format!("  left out ({}): {}: {}", s.level, parts.join(": "), s.reason));
        if !s.remedy.is_empty() {
            text.push_str(&format!(" ({})", s.remedy));
        }
        text.push('\n');
    }
    if !text.is_empty() {
        out(&format!("\n{text}"))?;
    }
    Ok(code)
}

/// The flood guard, as the maps have it.
fn flood_guard(place: &Place, settings: &Settings) -> Option<Guard> {
    let cpus = place.pins.counters().and_then(|c| c.flood()).ok()?;
    Some(Guard::new(&cpus, settings, pinned_jiffies(place.pins.dir()).ok()))
}

fn kinds(flags: u32) -> Vec<&'static str> {
    [
        (frontend_flags::CLUSTER_IP, "ClusterIP"),
        (frontend_flags::NODE_PORT, "NodePort"),
        (frontend_flags::LOAD_BALANCER, "LoadBalancer"),
        (frontend_flags::EXTERNAL_IP, "ExternalIP"),
    ]
    .into_iter()
    .filter(|(bit, _)| flags & bit != 0)
    .map(|(_, word)| word)
    .collect()
}

/// `sluice services`.
pub(super) fn services(show: &Show) -> Result<(), CliError> {
    let Place { pins, run_dir } = show.instance.place()?;
    let names = run_dir.names()?;
    let maglev = pins.maglev()?;
    let backends: BTreeMap<u32, Backend> = pins.backends()?.used()?.into_iter().collect();
    let mut members: BTreeMap<(u32, u32), BTreeSet<u32>> = BTreeMap::new();
    let mut rows = pins.frontends()?.entries()?;
    rows.retain(|(key, _)| !key.is_address());
    rows.sort_by_key(|(key, f)| (service_name(&names, f.service), kinds(f.flags), *key));
    let mut of = |extent: Extent| -> Vec<String> {
        members
            .entry((extent.offset, extent.size))
            .or_insert_with(|| maglev.read(extent.offset, extent.size).into_iter().collect())
            .iter()
            .map(|id| match backends.get(id) {
                Some(b) => endpoint(b.addr, b.port),
                None => format!("#{id}"),
            })
            .collect()
    };
    if show.output == Output::Json {
        let list: Vec<Value> = rows
            .iter()
            .map(|(key, f)| {
                json!({
                    "service": service_name(&names, f.service),
                    "id": f.service,
                    "address": key.addr.to_ip(),
                    "port": key.port.host(),
                    "protocol": proto(key.proto),
                    "kinds": kinds(f.flags),
                    "external_local": f.flags & frontend_flags::EXTERNAL_LOCAL != 0,
                    "internal_local": f.flags & frontend_flags::INTERNAL_LOCAL != 0,
                    "affinity_seconds": f.affinity_seconds,
                    "external_backends": of(f.external),
                    "internal_backends": of(f.internal),
                    "external_table": f.external.size,
                    "internal_table": f.internal.size,
                })
            })
            .collect();
        return print_json(&json!({ "services": list }));
    }
    let mut table = table(&["SERVICE", "KIND", "ADDRESS", "PROTO", "BACKENDS", "FROM OUTSIDE"]);
    for (key, f) in &rows {
        let (internal, external) = (of(f.internal), of(f.external));
        table.add_row(vec![
            service_name(&names, f.service),
            kinds(f.flags).join(","),
            endpoint(key.addr, key.port),
            proto(key.proto).to_owned(),
            shorten(&internal),
            if external == internal { "same".to_owned() } else { shorten(&external) },
        ]);
    }
    print(&table)
}

fn shorten(list: &[String]) -> String {
    const SHOWN: usize = 3;
    match list.len() {
        0 => "none".to_owned(),
        n if n > SHOWN => format!("{} and {} more", list[..SHOWN].join(" "), n - SHOWN),
        _ => list.join(" "),
    }
}

fn route(backend: &Backend, names: &Names) -> String {
    match backend.route {
        r if r == Route::Local as u16 => "local".to_owned(),
        r if r == Route::Tunnel as u16 => match names.vteps.get(&backend.index) {
            Some(v) => format!("tunnel {}", v.remote),
            None => format!("tunnel #{}", backend.index),
        },
        r if r == Route::Plain as u16 => format!("plain #{}", backend.index),
        r => format!("unknown {r}"),
    }
}

/// `sluice backends`.
pub(super) fn backends(show: &Show) -> Result<(), CliError> {
    let Place { pins, run_dir } = show.instance.place()?;
    let names = run_dir.names()?;
    let counters = pins.counters()?;
    let mut list = Vec::new();
    let mut table = table(&[
        "ID",
        "ENDPOINT",
        "PROTO",
        "WAY",
        "NODE",
        "POD",
        "CONNECTIONS",
        "PACKETS",
        "REPLIES",
    ]);
    for (id, b) in pins.backends()?.used()? {
        let c = counters.backend(id)?;
        let label = names.backends.get(&id);
        let pod = label.and_then(|l| l.pod.clone());
        let node = label.and_then(|l| l.node.clone());
        if show.output == Output::Json {
            list.push(json!({
                "id": id,
                "endpoint": endpoint(b.addr, b.port),
                "protocol": proto(b.proto),
                "route": route(&b, &names),
                "node": node,
                "pod": pod,
                "new_flows": c.new_flows,
                "forward_packets": c.forward_packets,
                "forward_bytes": c.forward_bytes,
                "reply_packets": c.reply_packets,
                "reply_bytes": c.reply_bytes,
            }));
        } else {
            table.add_row(vec![
                id.to_string(),
                endpoint(b.addr, b.port),
                proto(b.proto).to_owned(),
                route(&b, &names),
                node.unwrap_or_default(),
                pod.unwrap_or_default(),
                c.new_flows.to_string(),
                c.forward_packets.to_string(),
                c.reply_packets.to_string(),
            ]);
        }
    }
    if show.output == Output::Json {
        return print_json(&json!({ "backends": list }));
    }
    print(&table)
}

fn state_words(proto: u8, state: u32) -> &'static str {
    let fins = flow_state::FIN_FORWARD | flow_state::FIN_REPLY;
    let confirmed = state & flow_state::CONFIRMED != 0;
    let replied = state & flow_state::REPLIED != 0;
    if proto == IPPROTO_TCP && state & flow_state::RESET != 0 {
        "reset"
    } else if proto == IPPROTO_TCP && state & fins != 0 {
        "closing"
    } else if confirmed {
        "established"
    } else if replied {
        "half-open"
    } else {
        "unreplied"
    }
}

fn exit_words(exit: &Exit) -> String {
    let kind = |k: ExitKind| exit.kind == k as u8;
    if kind(ExitKind::Stack) {
        "stack".to_owned()
    } else if kind(ExitKind::Frame) {
        let by = if exit.index & Exit::PEER != 0 { "peer" } else { "frame" };
        format!("{by} if{}", exit.index & !Exit::PEER)
    } else if kind(ExitKind::Tunnel) {
        format!("vtep #{}", exit.index)
    } else if kind(ExitKind::NextHop) {
        format!("next hop #{}", exit.index)
    } else {
        format!("unknown {}", exit.kind)
    }
}

/// `sluice flows`.
pub(super) fn flows(show: &Show, service: Option<&str>, limit: usize) -> Result<(), CliError> {
    let Place { pins, run_dir } = show.instance.place()?;
    let names = run_dir.names()?;
    let hz = run_dir.status()?.map_or(0, |s| s.hz);
    let now = pinned_jiffies(pins.dir()).ok().filter(|_| hz > 0);
    let seconds = |then: u32| {
        let ticks = now?.wrapping_sub(then) & 0x7fff_ffff;
        // Just now: the packet came after the clock was read.
        let ticks = if ticks > 0x3fff_ffff { 0 } else { ticks };
        Some(ticks / hz)
    };
    let wanted = |name: &str| {
        service
            .is_none_or(|s| name == s || name.strip_prefix(s).is_some_and(|r| r.starts_with(':')))
    };
    let settings: Settings = pins.settings()?.read(0)?;
    let table_of_flows = pins.flows()?.with_sets(settings.flow_set_mask.saturating_add(1));
    let mut found: Vec<_> = table_of_flows
        .iter()
        .map(|f| (service_name(&names, f.record.service), f))
        .filter(|(name, _)| wanted(name))
        .collect();
    let total = found.len();
    found.sort_by(|(a, f), (b, g)| {
        (a, f.record.client.0, f.record.client_port.host()).cmp(&(
            b,
            g.record.client.0,
            g.record.client_port.host(),
        ))
    });
    found.truncate(limit);
    if show.output == Output::Json {
        let list: Vec<Value> = found
            .iter()
            .map(|(name, f)| {
                let r = &f.record;
                json!({
                    "service": name,
                    "protocol": proto(r.proto),
                    "client": endpoint(r.client, r.client_port),
                    "vip": endpoint(r.vip, r.vip_port),
                    "backend": endpoint(r.backend, r.backend_port),
                    "backend_id": r.backend_id,
                    "source": endpoint(r.source, r.source_port),
                    "snat": r.flags & record_flags::SNAT != 0,
                    "state": state_words(r.proto, r.state),
                    "guarded": table_of_flows.is_guarded(f),
                    "forward": exit_words(&r.forward),
                    "reply": exit_words(&r.reply),
                    "epoch": r.epoch,
                    "idle_seconds": seconds(r.seen),
                    "age_seconds": seconds(r.created),
                    "set": f.set,
                    "way": f.way,
                })
            })
            .collect();
        return print_json(&json!({
            "flows": list,
            "total": total,
            "capacity": table_of_flows.capacity(),
        }));
    }
    let mut table = table(&[
        "SERVICE", "PROTO", "CLIENT", "FRONTEND", "BACKEND", "AS", "STATE", "IDLE", "AGE", "WAY",
        "BACK",
    ]);
    for (name, f) in &found {
        let r = &f.record;
        let time = |s: Option<u32>| s.map_or_else(String::new, |s| format!("{s}s"));
        table.add_row(vec![
            name.clone(),
            proto(r.proto).to_owned(),
            endpoint(r.client, r.client_port),
            endpoint(r.vip, r.vip_port),
            endpoint(r.backend, r.backend_port),
            if r.flags & record_flags::SNAT != 0 {
                endpoint(r.source, r.source_port)
            } else {
                String::new()
            },
            if table_of_flows.is_guarded(f) {
                format!("{}, guarded", state_words(r.proto, r.state))
            } else {
                state_words(r.proto, r.state).to_owned()
            },
            time(seconds(r.seen)),
            time(seconds(r.created)),
            exit_words(&r.forward),
            exit_words(&r.reply),
        ]);
    }
    print(&table)?;
    out(&format!("{} of {total} connections; {} fit\n", found.len(), table_of_flows.capacity()))
}

fn pod_net(net: &PodNet) -> Option<String> {
    if *net == PodNet::NONE {
        return None;
    }
    let bits: u32 = net.mask.0.iter().map(|b| b.count_ones()).sum();
    let ip = net.net.to_ip();
    let length = if ip.is_ipv4() { bits.saturating_sub(96) } else { bits };
    Some(format!("{ip}/{length}"))
}

/// `sluice vteps`.
pub(super) fn vteps(show: &Show) -> Result<(), CliError> {
    let Place { pins, run_dir } = show.instance.place()?;
    let names = run_dir.names()?;
    let nexthops: BTreeMap<_, _> = pins.nexthops()?.used()?.into_iter().collect();
    let sources = pins.vtep_sources()?.entries()?;
    let mut list = Vec::new();
    let mut table =
        table(&["NODE", "REMOTE", "VNI", "PORT", "DEVICE MAC", "POD CIDRS", "SOURCES", "NEXT HOP"]);
    for (index, v) in pins.vteps()?.used()? {
        let node = names.vteps.get(&index).and_then(|l| l.node.clone());
        let nets: Vec<String> = v.pod_nets.iter().filter_map(pod_net).collect();
        let mut from: Vec<String> = sources
            .iter()
            .filter(|(key, to)| *to == index && !key.is_mac())
            .map(|(key, _)| key.source.to_string())
            .collect();
        from.sort();
        let hop = nexthops.get(&v.nexthop).filter(|h| h.ifindex != 0);
        let hop_words = hop.map_or_else(
            || "unresolved".to_owned(),
            |h| format!("if{} {} mtu {}", h.ifindex, h.dst_mac, h.mtu),
        );
        if show.output == Output::Json {
            list.push(json!({
                "index": index,
                "node": node,
                "remote": v.remote.to_ip(),
                "local": v.local.to_ip(),
                "vni": v.vni.host() >> 8,
                "port": v.port.host(),
                "remote_mac": v.remote_mac.to_string(),
                "pod_cidrs": nets,
                "sources": from,
                "next_hop": hop.map(|h| json!({
                    "ifindex": h.ifindex,
                    "mtu": h.mtu,
                    "dst_mac": h.dst_mac.to_string(),
                    "src_mac": h.src_mac.to_string(),
                })),
            }));
        } else {
            table.add_row(vec![
                node.unwrap_or_default(),
                v.remote.to_string(),
                (v.vni.host() >> 8).to_string(),
                v.port.to_string(),
                v.remote_mac.to_string(),
                nets.join(" "),
                from.join(" "),
                hop_words,
            ]);
        }
    }
    if show.output == Output::Json {
        return print_json(&json!({ "vteps": list }));
    }
    print(&table)
}

/// `sluice counters`.
pub(super) fn counters(show: &Show) -> Result<(), CliError> {
    let Place { pins, run_dir } = show.instance.place()?;
    let names = run_dir.names()?;
    let counters = pins.counters()?;
    let reasons = counters.reasons()?;
    let answers = counters.answers()?;
    let settings: Settings = pins.settings()?.read(0)?;
    let guard = Guard::new(&counters.flood()?, &settings, pinned_jiffies(pins.dir()).ok());
    let mut services = Vec::new();
    for (id, name) in &names.services {
        services.push((*id, name.clone(), counters.service(*id)?));
    }
    let mut backends = Vec::new();
    for (id, b) in pins.backends()?.used()? {
        backends.push((id, endpoint(b.addr, b.port), counters.backend(id)?));
    }
    if show.output == Output::Json {
        return print_json(&json!({
            "reasons": reasons.iter().map(|(hook, reason, c)| json!({
                "hook": hook.label(),
                "reason": reason.label(),
                "verdict": reason.kind().label(),
                "packets": c.packets,
                "bytes": c.bytes,
            })).collect::<Vec<_>>(),
            "answers": answers.iter().map(|(kind, c)| json!({
                "answer": kind.label(),
                "sent": c.sent,
                "limited": c.limited,
            })).collect::<Vec<_>>(),
            "flood_guard": guard,
            "services": services.iter().map(|(id, name, c)| json!({
                "service": name,
                "id": id,
                "forward_packets": c.forward_packets,
                "forward_bytes": c.forward_bytes,
                "reply_packets": c.reply_packets,
                "reply_bytes": c.reply_bytes,
                "new_flows": c.new_flows,
                "dropped_packets": c.dropped_packets,
            })).collect::<Vec<_>>(),
            "backends": backends.iter().map(|(id, name, c)| json!({
                "backend": name,
                "id": id,
                "forward_packets": c.forward_packets,
                "forward_bytes": c.forward_bytes,
                "reply_packets": c.reply_packets,
                "reply_bytes": c.reply_bytes,
                "new_flows": c.new_flows,
            })).collect::<Vec<_>>(),
        }));
    }
    let mut by_reason = table(&["HOOK", "VERDICT", "REASON", "PACKETS", "BYTES", "MEANING"]);
    for (hook, reason, c) in reasons.iter().filter(|(_, _, c)| c.packets > 0) {
        by_reason.add_row(vec![
            hook.label().to_owned(),
            reason.kind().label().to_owned(),
            reason.label().to_owned(),
            c.packets.to_string(),
            c.bytes.to_string(),
            reason.info().text.to_owned(),
        ]);
    }
    print(&by_reason)?;
    out("\n")?;
    if answers.iter().any(|(_, c)| *c != AnswerCounter::default()) {
        let mut by_kind = table(&["ANSWER", "SENT", "NOT SENT"]);
        for (kind, c) in &answers {
            by_kind.add_row(vec![
                kind.label().to_owned(),
                c.sent.to_string(),
                c.limited.to_string(),
            ]);
        }
        print(&by_kind)?;
        out("\n")?;
    }
    if guard.put > 0 {
        let mut of_guard = table(&["FLOOD GUARD", "CONNECTIONS"]);
        for (name, count) in [
            ("taken", guard.put),
            ("went on to the connection table", guard.promoted),
            ("overwritten", guard.overwritten),
        ] {
            of_guard.add_row(vec![name.to_owned(), count.to_string()]);
        }
        print(&of_guard)?;
        out("\n")?;
    }
    let mut by_service =
        table(&["SERVICE", "CONNECTIONS", "PACKETS", "BYTES", "REPLIES", "REPLY BYTES", "DROPPED"]);
    for (_, name, c) in
        services.iter().filter(|(_, _, c)| c.forward_packets + c.dropped_packets > 0)
    {
        by_service.add_row(vec![
            name.clone(),
            c.new_flows.to_string(),
            c.forward_packets.to_string(),
            c.forward_bytes.to_string(),
            c.reply_packets.to_string(),
            c.reply_bytes.to_string(),
            c.dropped_packets.to_string(),
        ]);
    }
    print(&by_service)
}
