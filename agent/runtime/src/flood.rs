//! What the flood guard does: for people, and in the log when it begins and ends.

use serde::Serialize;
use sluice_abi::{FloodCpu, Settings};

/// The flood guard, over all CPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Guard {
    /// New connections of a CPU in a second above which it guards itself; 0: never.
    pub rate: u64,
    /// CPUs that do at the moment.
    pub cpus_on: usize,
    /// For how long the first of them has, in seconds.
    pub on_seconds: Option<u32>,
    /// How often a CPU has begun to.
    pub begun: u64,
    /// Connections that were put into the guard.
    pub put: u64,
    /// Of these, how many went on to the connection table.
    pub promoted: u64,
    /// Of these, how many another one took the place of.
    pub overwritten: u64,
}

/// Jiffies are compared in 31 bits: that much the clock program returns.
const MASK: u32 = 0x7fff_ffff;

impl Guard {
    /// From what the CPUs counted; `now` are the low 31 bits of jiffies, if they are known.
    pub fn new(cpus: &[FloodCpu], settings: &Settings, now: Option<u32>) -> Self {
        let flood = settings.flood;
        let hz = settings.ticks_per_second.max(1);
        let rate = u64::from(flood.limit) * u64::from(hz) / u64::from(flood.window.max(1));
        let mut guard = Self { rate, ..Self::default() };
        for cpu in cpus {
            guard.begun += cpu.begun;
            guard.put += cpu.put;
            guard.promoted += cpu.promoted;
            guard.overwritten += cpu.overwritten;
            let passed = |then: u32| {
                let ticks = now?.wrapping_sub(then) & MASK;
                Some(if ticks > MASK / 2 { 0 } else { ticks })
            };
            // A CPU that gets no new connection does not notice that its windows pass.
            let goes_on = passed(cpu.window).is_none_or(|ticks| ticks / 2 < flood.window);
            if cpu.on != 0 && flood.limit != 0 && goes_on {
                guard.cpus_on += 1;
                guard.on_seconds = guard.on_seconds.max(passed(cpu.since).map(|t| t / hz));
            }
        }
        guard
    }

    /// One line for people.
    pub fn line(&self) -> String {
        if self.rate == 0 {
            return "off (datapath.flood_rate = 0)".to_owned();
        }
        let counts = format!(
            "{} connections taken, {} went on, {} overwritten",
            self.put, self.promoted, self.overwritten
        );
        let rate = format!("{} new connections a second and CPU", self.rate);
        match (self.cpus_on, self.put) {
            (0, 0) => format!("not needed yet (above {rate})"),
            (0, _) => format!("off now; {counts} (above {rate})"),
            (cpus, _) => {
                let time = self.on_seconds.map(|s| format!(" for {s}s")).unwrap_or_default();
                format!("ON{time} on {cpus} CPUs; {counts} (above {rate})")
            }
        }
    }
}

/// Whether the guard was on when the agent last looked, and what it had counted then.
#[derive(Clone, Copy, Debug, Default)]
pub struct Watch {
    before: Option<Guard>,
    on: bool,
}

/// What is new about the guard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum News {
    /// It has taken connections, and had not before.
    Began,
    /// It has taken none since the last time.
    Ended,
}

impl Watch {
    /// Looks at the guard. It may have been on and off again since, so what counts is whether it took
    /// connections: one piece of news for each time, however often it turned on meanwhile.
    pub fn look(&mut self, guard: Guard) -> Option<News> {
        let before = self.before.replace(guard);
        let took = guard.put != before.map_or(guard.put, |b| b.put) || guard.cpus_on != 0;
        let was = std::mem::replace(&mut self.on, took);
        match (was, took) {
            (false, true) => Some(News::Began),
            (true, false) => Some(News::Ended),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_abi::Flood;

    fn settings() -> Settings {
        Settings {
            flood: Flood { limit: 1000, window: 25, ..Flood::default() },
            ticks_per_second: 250,
            ..Settings::default()
        }
    }

    #[test]
    fn guard_is_on_where_a_cpu_still_counts() {
        let cpu = |on, window, put| FloodCpu { on, window, since: 500, put, ..FloodCpu::default() };
        let cpus = [cpu(1, 1000, 7), cpu(1, 900, 5), cpu(0, 1000, 0)];
        let guard = Guard::new(&cpus, &settings(), Some(1010));
        assert_eq!((guard.rate, guard.cpus_on, guard.put), (10_000, 1, 12));
        assert_eq!(guard.on_seconds, Some(2));
        assert!(guard.line().starts_with("ON for 2s on 1 CPUs"), "{}", guard.line());
        let later = Guard::new(&cpus, &settings(), Some(1100));
        assert_eq!((later.cpus_on, later.on_seconds), (0, None));
        assert!(later.line().starts_with("off now; 12 "), "{}", later.line());
        let off = Settings { flood: Flood::default(), ..settings() };
        assert!(Guard::new(&cpus, &off, Some(1010)).line().contains("flood_rate = 0"));
    }

    #[test]
    fn flood_is_told_once_when_it_begins_and_once_when_it_ends() {
        let guard = |cpus_on, put| Guard { cpus_on, put, ..Guard::default() };
        let mut watch = Watch::default();
        // What an earlier agent saw is no news.
        assert_eq!(watch.look(guard(0, 50)), None);
        assert_eq!(watch.look(guard(0, 90)), Some(News::Began), "on and off in between");
        assert_eq!(watch.look(guard(2, 95)), None);
        assert_eq!(watch.look(guard(0, 99)), None);
        assert_eq!(watch.look(guard(0, 99)), Some(News::Ended));
        assert_eq!(watch.look(guard(0, 99)), None);
        assert_eq!(watch.look(guard(1, 99)), Some(News::Began));
    }
}
