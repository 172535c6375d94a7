//! What no single value shows: ranges, and what must fit to each other.

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use super::{Config, ConfigError};

/// A value that does not fit.
struct Misfit {
    key: &'static str,
    value: String,
    problem: &'static str,
    remedy: &'static str,
}

type Fits = Result<(), Misfit>;

fn misfit(
    key: &'static str,
    value: impl ToString,
    problem: &'static str,
    remedy: &'static str,
) -> Fits {
    Err(Misfit { key, value: value.to_string(), problem, remedy })
}

impl Config {
    /// Looks at all values.
    ///
    /// # Errors
    /// The first one that does not fit.
    pub(super) fn check(&self, path: &Path) -> Result<(), ConfigError> {
        self.check_ports()
            .and_then(|()| self.check_hairpin())
            .and_then(|()| self.check_answers())
            .and_then(|()| self.check_maps())
            .and_then(|()| self.check_changes())
            .and_then(|()| self.check_timeouts())
            .and_then(|()| self.check_places())
            .map_err(|Misfit { key, value, problem, remedy }| ConfigError::Invalid {
                path: path.to_owned(),
                key,
                value,
                problem: problem.to_owned(),
                remedy,
            })
    }

    fn check_ports(&self) -> Fits {
        let snat = self.snat.ports();
        if *snat.start() < 1024 || snat.is_empty() {
            return misfit(
                "snat.first_port",
                snat.start(),
                "not between 1024 and snat.last_port",
                "write a range outside ip_local_port_range and the node ports, such as 16384 to 29999",
            );
        }
        for (key, ports) in
            [("fail_safe.tcp", &self.fail_safe.tcp), ("fail_safe.udp", &self.fail_safe.udp)]
        {
            let value = format!("{ports:?}");
            if ports.len() > 8 {
                let remedy = "keep those that you need to reach a broken node";
                return misfit(key, value, "more than 8 ports", remedy);
            }
            if ports.contains(&0) {
                return misfit(key, value, "port 0", "remove it");
            }
            if ports.iter().any(|port| snat.contains(port)) {
                return misfit(
                    key,
                    value,
                    "a port between snat.first_port and snat.last_port",
                    "move the SNAT ports: what comes to them is taken for a reply",
                );
            }
        }
        Ok(())
    }

    fn check_hairpin(&self) -> Fits {
        let datapath = &self.datapath;
        let v4 = datapath.hairpin_v4.map(IpAddr::V4).map(|addr| ("datapath.hairpin_v4", addr));
        let v6 = datapath.hairpin_v6.map(IpAddr::V6).map(|addr| ("datapath.hairpin_v6", addr));
        for (key, addr) in v4.into_iter().chain(v6) {
            let link_local = matches!(addr, IpAddr::V6(addr) if addr.is_unicast_link_local());
            if addr.is_unspecified() || addr.is_loopback() || addr.is_multicast() || link_local {
                return misfit(
                    key,
                    addr,
                    "no address that a pod would answer by its default route",
                    "write one that nobody has, such as 169.254.77.1 or fd53:6c75:6963:6500::1",
                );
            }
        }
        Ok(())
    }

    fn check_answers(&self) -> Fits {
        let answers = &self.answers;
        for (key, value) in [
            ("answers.rate_per_source", answers.rate_per_source),
            ("answers.burst_per_source", answers.burst_per_source),
            ("answers.rate_per_cpu", answers.rate_per_cpu),
            ("answers.burst_per_cpu", answers.burst_per_cpu),
        ] {
            if value == 0 {
                let remedy = "write answers.enabled = false if that is meant";
                return misfit(key, value, "nothing would ever be answered", remedy);
            }
        }
        Ok(())
    }

    fn check_maps(&self) -> Fits {
        let maps = &self.maps;
        if !maps.flow_sets.is_power_of_two() || maps.flow_sets < 4 {
            return misfit(
                "maps.flow_sets",
                maps.flow_sets,
                "not a power of two, or less than 4",
                "write a power of two; one set holds 16 connections and takes 3136 bytes",
            );
        }
        if !maps.flood_records.is_power_of_two() || maps.flood_records < 16 {
            return misfit(
                "maps.flood_records",
                maps.flood_records,
                "not a power of two, or less than 16",
                "write a power of two; 16 take 3136 bytes. datapath.flood_rate = 0 turns the guard off",
            );
        }
        if !maps.fragments.is_power_of_two() {
            let remedy = "write a power of two; an entry takes 64 bytes";
            return misfit("maps.fragments", maps.fragments, "not a power of two", remedy);
        }
        for (key, value) in [
            ("maps.frontends", maps.frontends),
            ("maps.backends", maps.backends),
            ("maps.services", maps.services),
            ("maps.maglev", maps.maglev),
            ("maps.pods", maps.pods),
            ("maps.vteps", maps.vteps),
            ("maps.vtep_sources", maps.vtep_sources),
            ("maps.nexthops", maps.nexthops),
        ] {
            if !(2..=1 << 28).contains(&value) {
                let remedy = "leave the key out for the default";
                return misfit(key, value, "not between 2 and 268435456", remedy);
            }
        }
        if self.maglev.max_table < 2 || self.maglev.max_table > maps.maglev {
            return misfit(
                "maglev.max_table",
                self.maglev.max_table,
                "less than 2 or more than maps.maglev",
                "write about 100 times the largest number of endpoints of a Service",
            );
        }
        Ok(())
    }

    fn check_changes(&self) -> Fits {
        let percent = self.changes.mass_removal_percent;
        if percent > 100 {
            return misfit(
                "changes.mass_removal_percent",
                percent,
                "more than 100",
                "write 1 to 100; 100 holds only the loss of everything",
            );
        }
        Ok(())
    }

    fn check_timeouts(&self) -> Fits {
        let t = &self.timeouts;
        let words = |value| humantime::format_duration(value).to_string();
        for (key, value) in [
            ("timeouts.tcp_syn", t.tcp_syn),
            ("timeouts.tcp_established", t.tcp_established),
            ("timeouts.tcp_closing", t.tcp_closing),
            ("timeouts.udp_oneway", t.udp_oneway),
            ("timeouts.udp_replied", t.udp_replied),
            ("timeouts.stamp", t.stamp),
            ("timeouts.redecide", t.redecide),
            ("timeouts.sweep", t.sweep),
        ] {
            // Records hold 32 bits of jiffies and ages are compared within half of that: at 1000
            // ticks a second twelve days are the limit.
            if value.is_zero() || value > Duration::from_secs(10 * 24 * 3600) {
                let remedy = "leave the key out for the default";
                return misfit(key, words(value), "zero, or more than 10 days", remedy);
            }
        }
        let shortest = t.tcp_syn.min(t.tcp_closing).min(t.udp_oneway);
        if t.stamp * 2 > shortest {
            return misfit(
                "timeouts.stamp",
                words(t.stamp),
                "more than half of the shortest timeout: living connections would expire",
                "write 1s",
            );
        }
        Ok(())
    }

    fn check_places(&self) -> Fits {
        for (key, dir) in [("pin_dir", &self.pin_dir), ("run_dir", &self.run_dir)] {
            if !dir.is_absolute() {
                let remedy = "write the path from / on";
                return misfit(key, dir.display(), "not an absolute path", remedy);
            }
        }
        if self.source.path.as_os_str().is_empty() {
            let remedy = "write the directory that holds the manifests";
            return misfit("source.path", "\"\"", "no directory", remedy);
        }
        if tracing_subscriber::EnvFilter::try_new(&self.log.level).is_err() {
            return misfit(
                "log.level",
                &self.log.level,
                "no level and no filter",
                "write error, warn, info, debug, trace or a filter such as \"sluice=debug,info\"",
            );
        }
        Ok(())
    }
}
