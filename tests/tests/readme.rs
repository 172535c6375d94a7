//! Commands and links in the documents are ones that exist.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Parser;

fn root() -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).to_owned()
}

/// The documents for people, with their text.
fn documents() -> Vec<(PathBuf, String)> {
    let mut found: Vec<PathBuf> =
        ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"]
            .iter()
            .map(|name| root().join(name))
            .collect();
    for dir in ["docs", "docs/adr"] {
        found.extend(
            fs::read_dir(root().join(dir))
                .expect("a directory")
                .map(|e| e.expect("entry").path())
                .filter(|p| p.extension().is_some_and(|e| e == "md")),
        );
    }
    assert!(found.len() > 8, "{found:?}");
    found
        .into_iter()
        .map(|path| {
            let text = fs::read_to_string(&path);
            (path.clone(), text.unwrap_or_else(|e| panic!("{}: {e}", path.display())))
        })
        .collect()
}

/// Lines of the `sh` blocks.
fn commands(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut inside = false;
    for line in text.lines() {
        if line.starts_with("```") {
            inside = line == "```sh";
        } else if inside && !line.is_empty() {
            found.push(line.to_owned());
        }
    }
    found
}

/// Why a command would not run as printed.
fn refused(command: &str) -> Result<(), String> {
    let line = command.split(" > ").next().unwrap_or_default();
    let line = line.strip_prefix("sudo ").unwrap_or(line);
    let words: Vec<&str> = line.split_whitespace().collect();
    let there = |path: &str| match root().join(path).exists() {
        true => Ok(()),
        false => Err(format!("{path} is not there")),
    };
    match words.as_slice() {
        ["make", targets @ ..] => {
            let makefile = fs::read_to_string(root().join("Makefile")).expect("Makefile");
            for target in targets {
                let rule = format!("{target}:");
                if !makefile.lines().any(|l| l.starts_with(&rule)) {
                    return Err(format!("no target {target}"));
                }
            }
            Ok(())
        }
        ["sluice" | "target/debug/sluice" | "target/release/sluice", ..] => {
            match sluice::cli::Cli::try_parse_from(&words) {
                Ok(_) => Ok(()),
                Err(e) if !e.use_stderr() => Ok(()),
                Err(e) => Err(e.to_string()),
            }
        }
        ["install", "-d", _] => Ok(()),
        // What `make build` makes is there only after it.
        ["install", "-m", _, "target/release/sluice", _] => Ok(()),
        ["install", "-m", _, from, _] => there(from),
        ["systemctl", "daemon-reload"] | ["systemctl", "enable", "--now", "sluice"] => Ok(()),
        ["kubectl", "get", ..] => Ok(()),
        ["ethtool", "-K", _, "rxvlan", "off"] => Ok(()),
        ["cargo", "test", "--package", name] => {
            let lock = fs::read_to_string(root().join("Cargo.lock")).expect("Cargo.lock");
            let known = lock.lines().any(|l| l == format!("name = \"{name}\""));
            if known { Ok(()) } else { Err(format!("no crate {name}")) }
        }
        ["cargo", "test", "--package", "sluice-tests", "--test", suite, ..] => {
            let file = format!("tests/tests/{suite}");
            there(&format!("{file}.rs")).or_else(|_| there(&format!("{file}/main.rs")))
        }
        // An environment variable in front.
        [setting, .., last] if setting.contains('=') && !last.contains('=') => {
            let rest = words.iter().skip_while(|word| word.contains('='));
            refused(&rest.copied().collect::<Vec<_>>().join(" "))
        }
        ["kubectl", "apply", "--kustomize", dir] => there(&format!("{dir}/kustomization.yaml")),
        [program, ..] if program.contains('/') => there(program),
        _ => Err("a command that this test does not know".to_owned()),
    }
}

#[test]
fn commands_in_documents_exist() {
    let mut seen = 0;
    for (path, text) in documents() {
        for command in commands(&text) {
            seen += 1;
            if let Err(reason) = refused(&command) {
                panic!("{}: {command}: {reason}", path.display());
            }
        }
    }
    assert!(seen > 20, "only {seen} commands found");
}

#[test]
fn wrong_commands_are_found() {
    for command in [
        "make coffee",
        "sluice flood",
        "sluice status --loud",
        "sudo target/debug/sluice lab upp",
        "scripts/nothing",
        "kubectl apply --kustomize nowhere",
        "rm file",
    ] {
        assert!(refused(command).is_err(), "{command}");
    }
}

/// The first commands of the README are the two that it promises.
#[test]
fn readme_shows_the_two_commands_first() {
    let text = fs::read_to_string(root().join("README.md")).expect("README.md");
    assert_eq!(commands(&text)[..2], ["make demo", "make test"]);
}

#[test]
fn links_in_documents_lead_somewhere() {
    let mut seen = 0;
    for (path, text) in documents() {
        let dir = path.parent().expect("a directory");
        for link in text.split("](").skip(1) {
            let target = link.split(')').next().unwrap_or_default();
            if target.contains("://") {
                continue;
            }
            seen += 1;
            let (file, place) = target.split_once('#').unwrap_or((target, ""));
            let file = if file.is_empty() { path.clone() } else { dir.join(file) };
            assert!(file.exists(), "{}: {target}", path.display());
            if !place.is_empty() {
                let linked = fs::read_to_string(&file).expect("text");
                let heading = |l: &str| l.trim_start_matches('#').trim().to_lowercase();
                let places = linked.lines().filter(|l| l.starts_with('#')).map(heading);
                let found = places.map(|h| h.replace(' ', "-")).any(|h| h == place);
                assert!(found, "{}: {target}", path.display());
            }
        }
    }
    assert!(seen > 10, "only {seen} links found");
}
