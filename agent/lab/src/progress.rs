//! What a long command is doing, for whoever waits for it.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// A bar on a terminal, lines elsewhere.
pub struct Progress {
    command: &'static str,
    bar: Option<ProgressBar>,
    talk: bool,
}

impl Progress {
    /// For a command; silent unless `talk`.
    pub fn new(command: &'static str, talk: bool) -> Self {
        let bar = (talk && std::io::stderr().is_terminal()).then(|| {
            let bar = ProgressBar::new_spinner();
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        Self { command, bar, talk }
    }

    /// The number of steps is known now.
    pub fn steps(&self, number: usize) {
        if let Some(bar) = &self.bar {
            bar.set_length(number as u64);
            if let Ok(style) =
                ProgressStyle::with_template("{spinner} [{bar:30}] {pos}/{len} {msg}")
            {
                bar.set_style(style);
            }
        }
    }

    /// What is being done now.
    pub fn say(&self, what: &str) {
        match &self.bar {
            Some(bar) => bar.set_message(what.to_owned()),
            None if self.talk => eprintln!("{}: {what}", self.command),
            None => {}
        }
    }

    /// One step is done.
    pub fn step(&self) {
        if let Some(bar) = &self.bar {
            bar.inc(1);
        }
    }

    /// All is done: the bar goes.
    pub fn done(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.done();
    }
}
