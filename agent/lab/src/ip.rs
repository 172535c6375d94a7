//! `ip` and `bridge` in batches, and `ethtool`: one process per namespace and program, not one per
//! setting, which is what makes a lab come up in about a second.

use std::io::Write;
use std::process::{Command, Stdio};

use crate::{LabError, Netns};

/// Lines for one program in one namespace.
#[derive(Debug, Default)]
pub struct Batch {
    lines: Vec<String>,
}

impl Batch {
    /// Adds a line, without the program's name.
    pub fn add(&mut self, line: impl Into<String>) -> &mut Self {
        self.lines.push(line.into());
        self
    }

    /// Runs all lines; the first refused one ends it.
    ///
    /// # Errors
    /// The refused line with the program's words.
    pub fn run(&self, program: &'static str, netns: &Netns) -> Result<(), LabError> {
        if self.lines.is_empty() {
            return Ok(());
        }
        let mut text = self.lines.join("\n");
        text.push('\n');
        let mut child = netns.spawn(
            Command::new(program)
                .args(["-batch", "-"])
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .stderr(Stdio::piped()),
        )?;
        if let Some(mut stdin) = child.stdin.take() {
            // A refused line closes the pipe early; the program's own words say more than EPIPE.
            let _ = stdin.write_all(text.as_bytes());
        }
        let output = child
            .wait_with_output()
            .map_err(LabError::io(format!("{program} in {}", netns.name())))?;
        if output.status.success() {
            return Ok(());
        }
        let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(LabError::Batch {
            program,
            host: netns.name().to_owned(),
            line: self.refused_line(&message),
            message,
        })
    }

    /// `ip` ends with "Command failed -:LINE".
    fn refused_line(&self, message: &str) -> String {
        message
            .rsplit_once("Command failed -:")
            .and_then(|(_, number)| number.trim().parse::<usize>().ok())
            .and_then(|number| self.lines.get(number.checked_sub(1)?))
            .cloned()
            .unwrap_or_else(|| self.lines.join("; "))
    }
}

/// Sets offloads of a device.
///
/// # Errors
/// `ethtool` is missing or refuses.
pub fn offloads(netns: &Netns, device: &str, settings: &[&str]) -> Result<(), LabError> {
    let mut args = vec!["-K", device];
    args.extend_from_slice(settings);
    netns.run("ethtool", &args).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_refused_line_is_named() {
        let mut batch = Batch::default();
        batch.add("link set a up").add("link set b up");
        let said = "Cannot find device \"b\"\nCommand failed -:2";
        assert_eq!(batch.refused_line(said), "link set b up");
        assert_eq!(batch.refused_line("Killed"), "link set a up; link set b up");
    }
}
