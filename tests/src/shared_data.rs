//! Test data that is not part of the repository. A test without it says so and is counted as
//! skipped (`scripts/test`).

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::PathBuf;

/// Files of a folder of the shared data, sorted; nothing if it is not there, after saying so in the
/// name of `test`.
///
/// # Panics
/// If the skip cannot be noted.
pub fn files(test: &str, folder: &str) -> Option<Vec<PathBuf>> {
    let root = std::env::var_os("SLUICE_SHARED_DATA").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/data")),
        PathBuf::from,
    );
    let mut files: Vec<PathBuf> = fs::read_dir(root.join(folder))
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.is_file())
        .collect();
    files.sort_unstable();
    if !files.is_empty() {
        return Some(files);
    }
    let line = format!("SKIPPED {test}: shared-data {folder}");
    println!("{line}");
    if let Some(log) = std::env::var_os("SLUICE_SKIP_LOG") {
        let mut log = OpenOptions::new().append(true).create(true).open(log).expect("the skip log");
        writeln!(log, "{line}").expect("the skip log");
    }
    None
}
