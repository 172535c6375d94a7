//! A directory of ordinary Kubernetes manifests, watched for changes.
//!
//! After every change the whole directory is read again, once it was quiet for a while: an object is
//! gone when no file names it, whatever order the changes came in. A slow poll catches what the
//! watch missed.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use notify::{RecursiveMode, Watcher};
use sluice_control::{Snapshot, ingest};

use super::{Listing, SourceError};

/// Directories in directories at most.
const MAX_DEPTH: u32 = 8;

/// Reads every manifest below `dir`, in the order of the file names, so that the first of two
/// objects with one name is always the same.
///
/// # Errors
/// When the directory or one of its files cannot be read.
pub fn read(dir: &Path) -> Result<Listing, SourceError> {
    let mut files = Vec::new();
    manifests(dir, 0, &mut files)?;
    files.sort();
    let mut snapshot = Snapshot::default();
    let mut skipped = Vec::new();
    for path in &files {
        let bytes = std::fs::read(path)
            .map_err(|e| SourceError { path: path.clone(), reason: e.to_string() })?;
        // Kubernetes manifests are UTF-8; a wrong byte spoils the word that it is in, no more.
        let text = String::from_utf8_lossy(&bytes);
        let origin: Arc<str> = path.strip_prefix(dir).unwrap_or(path).to_string_lossy().into();
        let found = ingest(&origin, &text);
        skipped.extend(found.skipped);
        skipped.extend(snapshot.extend(found.objects));
    }
    Ok(Listing { snapshot: Arc::new(snapshot), skipped, files: files.len() })
}

fn manifests(dir: &Path, depth: u32, files: &mut Vec<PathBuf>) -> Result<(), SourceError> {
    let fail = |e: std::io::Error| SourceError { path: dir.to_owned(), reason: e.to_string() };
    for entry in std::fs::read_dir(dir).map_err(fail)? {
        let path = entry.map_err(fail)?.path();
        let hidden = path.file_name().is_none_or(|n| n.to_string_lossy().starts_with('.'));
        if hidden {
            continue;
        }
        if path.is_dir() {
            if depth < MAX_DEPTH {
                manifests(&path, depth + 1, files)?;
            }
        } else if path.extension().is_some_and(|e| e == "yaml" || e == "yml" || e == "json") {
            files.push(path);
        }
    }
    Ok(())
}

/// Reads `dir` now and after each change, in a thread of its own, until `deliver` returns false.
/// A list or an error that equals the one before is not delivered again.
///
/// # Errors
/// When the thread cannot be started. A watch that cannot be set up is logged; the poll remains.
pub fn watch(
    dir: PathBuf,
    settle: Duration,
    poll: Duration,
    deliver: impl Fn(Result<Listing, SourceError>) -> bool + Send + 'static,
) -> std::io::Result<()> {
    std::thread::Builder::new().name("file-source".to_owned()).spawn(move || {
        let (changed, changes) = channel();
        let mut watcher = None;
        let mut last: Option<Result<Listing, SourceError>> = None;
        let mut seen = None;
        let mut told = true;
        loop {
            // What changes after this line differs at the next poll.
            let now = fingerprint(&dir);
            if told || now.is_none() || now != seen {
                // A watch is set up before reading, so that nothing is missed in between; anew where
                // it did not tell of a change: then the directory itself was replaced.
                if watcher.is_none() || !told {
                    let changed = changed.clone();
                    watcher = start(&dir, move || changed.send(()).is_ok());
                }
                let listing = read(&dir);
                if last.as_ref() != Some(&listing) {
                    if !deliver(listing.clone()) {
                        return;
                    }
                    last = Some(listing);
                }
                seen = now;
            }
            told = wait(&changes, settle, poll);
        }
    })?;
    Ok(())
}

fn start(
    dir: &Path,
    changed: impl Fn() -> bool + Send + 'static,
) -> Option<notify::RecommendedWatcher> {
    let handler = move |event: notify::Result<notify::Event>| {
        // Reading is no change, but our own reading would be reported.
        if !event.is_ok_and(|e| e.kind.is_access()) {
            changed();
        }
    };
    let started = notify::recommended_watcher(handler).and_then(|mut watcher| {
        watcher.watch(dir, RecursiveMode::Recursive)?;
        Ok(watcher)
    });
    match started {
        Ok(watcher) => Some(watcher),
        Err(e) => {
            tracing::debug!("{}: no watch, polling: {e}", dir.display());
            None
        }
    }
}

/// Names, sizes and times of all manifests; `None` where they cannot be had.
fn fingerprint(dir: &Path) -> Option<Vec<(PathBuf, [i64; 4])>> {
    let mut files = Vec::new();
    manifests(dir, 0, &mut files).ok()?;
    files.sort();
    files
        .into_iter()
        .map(|path| {
            let meta = std::fs::metadata(&path).ok()?;
            let (ino, len) = (meta.ino() as i64, meta.len() as i64);
            Some((path, [ino, len, meta.ctime(), meta.ctime_nsec()]))
        })
        .collect()
}

/// Returns true `settle` after the last reported change, or false after `poll` without one.
fn wait(changes: &Receiver<()>, settle: Duration, poll: Duration) -> bool {
    match changes.recv_timeout(poll) {
        // Under endless changes the directory is read now and then all the same.
        Ok(()) => {
            let patience = std::time::Instant::now() + settle * 10;
            while changes.recv_timeout(settle).is_ok() && std::time::Instant::now() < patience {}
            true
        }
        Err(RecvTimeoutError::Timeout) => false,
        Err(RecvTimeoutError::Disconnected) => {
            std::thread::sleep(poll);
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVICE: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: NAME, namespace: shop}\n\
                           spec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}\n";

    fn service(name: &str) -> String {
        SERVICE.replace("NAME", name)
    }

    fn names(listing: &Listing) -> Vec<String> {
        listing.snapshot.services.keys().map(ToString::to_string).collect()
    }

    #[test]
    fn whole_directory_is_read_and_hidden_files_are_not() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let write = |name: &str, text: &str| {
            std::fs::write(dir.path().join(name), text).expect("write");
        };
        std::fs::create_dir(dir.path().join("sub")).expect("directory");
        write("a.yaml", &format!("{}---\n{}", service("a"), service("b")));
        write("sub/c.yml", &service("c"));
        write(".hidden.yaml", &service("hidden"));
        write("notes.txt", "no manifest");
        let listing = read(dir.path()).expect("readable");
        assert_eq!(names(&listing), ["shop/a", "shop/b", "shop/c"]);
        assert_eq!(listing.files, 2);
        assert!(listing.skipped.is_empty(), "{:?}", listing.skipped);
    }

    #[test]
    fn bad_object_is_named_and_disturbs_nothing_else() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let bad = service("bad").replace("port: 80", "port: 80000");
        std::fs::write(dir.path().join("bad.yaml"), bad).expect("write");
        std::fs::write(dir.path().join("good.yaml"), service("good")).expect("write");
        let listing = read(dir.path()).expect("readable");
        assert!(names(&listing).contains(&"shop/good".to_owned()));
        let text = listing.skipped.iter().map(ToString::to_string).collect::<String>();
        assert!(
            text.contains("bad.yaml") && text.contains("shop/bad") && text.contains("port"),
            "{text}"
        );
    }

    #[test]
    fn unreadable_directory_is_an_error_and_not_an_empty_list() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let missing = dir.path().join("missing");
        assert!(read(&missing).is_err());
        std::os::unix::fs::symlink("/nonexistent", dir.path().join("gone.yaml")).expect("symlink");
        assert!(read(dir.path()).is_err());
    }

    #[test]
    fn changes_are_delivered_and_equal_lists_are_not() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (send, lists) = channel();
        watch(
            dir.path().to_owned(),
            Duration::from_millis(20),
            Duration::from_millis(100),
            move |listing| send.send(listing).is_ok(),
        )
        .expect("thread");
        let patience = Duration::from_secs(20);
        let first = lists.recv_timeout(patience).expect("first list");
        assert_eq!(names(&first.expect("readable")), Vec::<String>::new());
        std::fs::write(dir.path().join("a.yaml"), service("a")).expect("write");
        let second = lists.recv_timeout(patience).expect("second list");
        assert_eq!(names(&second.expect("readable")), ["shop/a"]);
        // A touch changes no object: several polls later there is still nothing new.
        std::fs::write(dir.path().join("a.yaml"), service("a")).expect("write");
        assert!(lists.recv_timeout(Duration::from_millis(500)).is_err());
    }
}
