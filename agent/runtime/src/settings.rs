//! The one value that tells the programs what the config and the node are.

use std::net::IpAddr;
use std::time::Duration;

use sluice_abi::{
    Addr, Answers, Be16, Flood, MAX_OWN_MACS, Mac, OwnMac, Seeds, Settings, Timeouts,
    settings_flags,
};
use sluice_control::NodeContext;

use crate::config::{Behaviour, Config};
use crate::maps::{ArrayTable, MapsError, Pins};
use crate::run_dir::{RunDir, RunDirError};

/// Why the settings could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The map.
    #[error(transparent)]
    Maps(#[from] MapsError),
    /// The lock.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// No randomness.
    #[error("/dev/urandom: {0}")]
    Random(#[from] std::io::Error),
}

/// Reads the settings, lets `edit` change them and writes them back if it did. Nobody else changes
/// them meanwhile. Returns what is in force.
///
/// # Errors
/// When the map or the lock cannot be used.
pub fn update(
    pins: &Pins,
    run_dir: &RunDir,
    edit: impl FnOnce(&mut Settings),
) -> Result<Settings, SettingsError> {
    let mut table: ArrayTable<Settings> = pins.settings()?;
    let _lock = run_dir.lock_settings()?;
    let before = table.read(0)?;
    let mut after = before;
    edit(&mut after);
    if after != before {
        table.write(0, after)?;
    }
    Ok(after)
}

/// Fills in what follows from config and facts. Keeps the bypass and the epoch; the flow seed is
/// kept while the maps are pinned, because the records stand where it put them.
pub fn fill(settings: &mut Settings, config: &Config, context: &NodeContext, hz: u32) {
    settings.flags = (settings.flags & settings_flags::BYPASS)
        | match config.datapath.behaviour {
            Behaviour::Accelerate => 0,
            Behaviour::Replace => settings_flags::REPLACE,
        }
        | if config.answers.enabled { settings_flags::ANSWERS } else { 0 };
    settings.epoch = settings.epoch.max(1);
    settings.seeds.cluster = config.cluster_seed;
    let ticks = |d: Duration| ticks(d, hz);
    let t = &config.timeouts;
    settings.timeouts = Timeouts {
        tcp_syn: ticks(t.tcp_syn),
        tcp_established: ticks(t.tcp_established),
        tcp_closing: ticks(t.tcp_closing),
        udp_oneway: ticks(t.udp_oneway),
        udp_replied: ticks(t.udp_replied),
        stamp: ticks(t.stamp),
        redecide: ticks(t.redecide),
        reserved: 0,
    };
    let mut ports: Vec<u16> = context.tunnels.iter().map(|t| t.port).collect();
    ports.dedup();
    let first = ports.first().copied().unwrap_or_default();
    settings.vxlan_ports = [Be16::new(first), Be16::new(ports.get(1).copied().unwrap_or(first))];
    settings.snat_first_port = config.snat.first_port;
    settings.snat_last_port = config.snat.last_port;
    // Connections on ports of an earlier range live on; `narrow_replies` knows when they are gone.
    let earlier = (settings.snat_reply_first, settings.snat_reply_last);
    narrow_replies(settings, (earlier.1 != 0).then_some(earlier));
    settings.ticks_per_second = hz;
    let hairpin = |addr: Option<IpAddr>| addr.map_or(Addr::NONE, Addr::from);
    settings.hairpin_v4 = hairpin(config.datapath.hairpin_v4.map(IpAddr::V4));
    settings.hairpin_v6 = hairpin(config.datapath.hairpin_v6.map(IpAddr::V6));
    settings.answers = Answers {
        source_rate: config.answers.rate_per_source,
        source_burst: config.answers.burst_per_source,
        cpu_rate: config.answers.rate_per_cpu,
        cpu_burst: config.answers.burst_per_cpu,
    };
    settings.flow_set_mask = config.maps.flow_sets - 1;
    settings.fragment_mask = config.maps.fragments - 1;
    settings.flood = flood(config, hz);
    settings.fail_safe_tcp = eight(&config.fail_safe.tcp);
    settings.fail_safe_udp = eight(&config.fail_safe.udp);
}

/// Windows in a second over which the flood guard counts.
const FLOOD_WINDOWS: u32 = 8;

fn flood(config: &Config, hz: u32) -> Flood {
    let window = (hz / FLOOD_WINDOWS).max(1);
    let limit = u64::from(config.datapath.flood_rate) * u64::from(window) / u64::from(hz.max(1));
    let limit = u32::try_from(limit).unwrap_or(u32::MAX);
    Flood {
        // A rate of less than one in a window is not "off".
        limit: if config.datapath.flood_rate == 0 { 0 } else { limit.max(1) },
        window,
        mask: config.maps.flood_records - 1,
        reserved: 0,
    }
}

/// Replies are looked for at the ports of the range and between those that connections hold, `used`
/// from the first to the last.
pub fn narrow_replies(settings: &mut Settings, used: Option<(u16, u16)>) {
    let (first, last) = (settings.snat_first_port, settings.snat_last_port);
    let (lowest, highest) = used.unwrap_or((first, last));
    settings.snat_reply_first = first.min(lowest);
    settings.snat_reply_last = last.max(highest);
}

/// Sets the node's own addresses on plain routes.
pub fn fill_addresses(settings: &mut Settings, v4: Option<Addr>, v6: Option<Addr>) {
    settings.node_v4 = v4.unwrap_or(Addr::NONE);
    settings.node_v6 = v6.unwrap_or(Addr::NONE);
}

/// Sets the destination MACs of frames for this node. When there are more than places, an uplink
/// that does not fit as a whole is left out, and takes every frame for its own.
pub fn fill_own_macs(settings: &mut Settings, macs: &[(u32, Mac)]) {
    let mut own = [OwnMac::default(); MAX_OWN_MACS];
    let mut places = own.iter_mut();
    for of_uplink in macs.chunk_by(|a, b| a.0 == b.0) {
        if of_uplink.len() > places.len() {
            continue;
        }
        for ((ifindex, mac), place) in of_uplink.iter().zip(&mut places) {
            *place = OwnMac { ifindex: *ifindex, mac: *mac, reserved: 0 };
        }
    }
    settings.own_macs = own;
}

/// A secret for the flow table, unless there is one.
///
/// # Errors
/// When the system gives no random bytes.
pub fn seed(settings: &mut Settings) -> Result<(), SettingsError> {
    if settings.seeds.flow == 0 {
        let mut bytes = [0u8; 8];
        std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut bytes)?;
        settings.seeds = Seeds { flow: u64::from_ne_bytes(bytes) | 1, ..settings.seeds };
    }
    Ok(())
}

fn ticks(duration: Duration, hz: u32) -> u32 {
    let ticks = duration.as_millis() * u128::from(hz) / 1000;
    u32::try_from(ticks).unwrap_or(u32::MAX / 2).max(1)
}

fn eight(ports: &[u16]) -> [Be16; 8] {
    let mut out = [Be16::default(); 8];
    for (to, port) in out.iter_mut().zip(ports) {
        *to = Be16::new(*port);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bypass_epoch_and_flow_seed_outlive_a_restart() {
        let mut settings = Settings {
            flags: settings_flags::BYPASS | settings_flags::REPLACE,
            epoch: 7,
            seeds: Seeds { flow: 99, cluster: 1 },
            ..Settings::default()
        };
        seed(&mut settings).expect("random");
        fill(&mut settings, &Config::default(), &NodeContext::default(), 250);
        assert_eq!(settings.flags, settings_flags::BYPASS | settings_flags::ANSWERS);
        assert_eq!(settings.epoch, 7);
        assert_eq!(settings.seeds.flow, 99);
        assert_eq!(settings.timeouts.tcp_syn, 60 * 250);
        assert_eq!(settings.ticks_per_second, 250);
        assert_eq!(settings.flow_set_mask, 8191);
        assert_eq!(settings.fail_safe_tcp[0], Be16::new(22));
    }

    #[test]
    fn uplink_whose_addresses_do_not_fit_takes_every_frame() {
        let mac = |n: u8| Mac([2, 0, 0, 0, 0, n]);
        let mut macs: Vec<(u32, Mac)> = (0..3).map(|n| (5, mac(n))).collect();
        macs.extend((0..20).map(|n| (6, mac(n))));
        macs.push((7, mac(9)));
        let mut settings = Settings::default();
        fill_own_macs(&mut settings, &macs);
        let named: Vec<(u32, Mac)> = settings
            .own_macs
            .iter()
            .filter(|own| own.ifindex != 0)
            .map(|own| (own.ifindex, own.mac))
            .collect();
        assert_eq!(named, [(5, mac(0)), (5, mac(1)), (5, mac(2)), (7, mac(9))]);
    }

    #[test]
    fn replies_are_looked_for_at_the_ports_of_an_earlier_range_until_they_are_free() {
        let mut config = Config::default();
        let mut settings = Settings::default();
        let mut fill = |first: u16, last: u16, settings: &mut Settings| {
            (config.snat.first_port, config.snat.last_port) = (first, last);
            super::fill(settings, &config, &NodeContext::default(), 250);
            (settings.snat_reply_first, settings.snat_reply_last)
        };
        assert_eq!(fill(16_384, 29_999, &mut settings), (16_384, 29_999));
        assert_eq!(fill(20_000, 21_000, &mut settings), (16_384, 29_999));
        assert_eq!(fill(40_000, 41_000, &mut settings), (16_384, 41_000));
        narrow_replies(&mut settings, Some((20_500, 40_100)));
        assert_eq!((settings.snat_reply_first, settings.snat_reply_last), (20_500, 41_000));
        narrow_replies(&mut settings, None);
        assert_eq!((settings.snat_reply_first, settings.snat_reply_last), (40_000, 41_000));
    }

    #[test]
    fn flood_rate_is_counted_in_windows() {
        let mut config = Config::default();
        let mut settings = Settings::default();
        let mut flood = |rate, hz| {
            config.datapath.flood_rate = rate;
            fill(&mut settings, &config, &NodeContext::default(), hz);
            (settings.flood.limit, settings.flood.window)
        };
        assert_eq!(flood(50_000, 1000), (6250, 125));
        assert_eq!(flood(50_000, 250), (6200, 31));
        assert_eq!(flood(50_000, 100), (6000, 12));
        assert_eq!(flood(1, 250), (1, 31), "not off");
        assert_eq!(flood(u32::MAX, 1000).0, 536_870_911);
        assert_eq!(flood(0, 1000).0, 0);
        assert_eq!(settings.flood.mask, Config::default().maps.flood_records - 1);
    }

    /// A bucket in 32 bits: the fullest one and one answer more.
    #[test]
    fn answers_are_set_and_switched_off() {
        let mut config = Config::default();
        config.answers.burst_per_cpu = u16::MAX;
        let mut settings = Settings::default();
        fill(&mut settings, &config, &NodeContext::default(), 1000);
        let answers = settings.answers;
        assert_eq!((answers.source_rate, answers.source_burst), (10, 20));
        assert_eq!((answers.cpu_rate, answers.cpu_burst), (1000, u16::MAX));
        let full = u32::from(answers.cpu_burst).checked_mul(settings.ticks_per_second);
        assert!(full.and_then(|full| full.checked_add(settings.ticks_per_second)).is_some());
        config.answers.enabled = false;
        fill(&mut settings, &config, &NodeContext::default(), 1000);
        assert_eq!(settings.flags & settings_flags::ANSWERS, 0);
    }
}
