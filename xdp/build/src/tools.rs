//! Finds a compiler that can build for BPF, and `bpf-linker`.
//!
//! The order is fixed: what the user named, what is already there, what can be made to work. The
//! first candidate that answers is taken; every refusal is kept for the error text.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Error;

/// A compiler and a linker that go together.
#[derive(Debug)]
pub(crate) struct Toolchain {
    pub(crate) compiler: Compiler,
    pub(crate) linker: PathBuf,
}

/// How to call a cargo whose compiler has, or can build, `core` for the BPF target.
#[derive(Debug)]
pub(crate) struct Compiler {
    /// Program to run.
    pub(crate) cargo: PathBuf,
    /// Arguments before cargo's own (`run nightly cargo`).
    pub(crate) prefix_args: Vec<OsString>,
    /// Value for `RUSTC`; `None` leaves the choice to cargo.
    pub(crate) rustc: Option<PathBuf>,
    /// `core` is compiled from source instead of taken prebuilt.
    pub(crate) build_std: bool,
}

impl Toolchain {
    pub(crate) fn find(repo: &Path, target: &str) -> Result<Self, Error> {
        Ok(Self { compiler: find_compiler(target)?, linker: find_linker(repo)? })
    }
}

fn find_compiler(target: &str) -> Result<Compiler, Error> {
    let mut looked_at = Vec::new();
    let named = env::var_os("SLUICE_BPF_RUSTC").map(PathBuf::from);
    let candidates = match &named {
        Some(path) => vec![path.clone()],
        None => {
            let mut found: Vec<PathBuf> =
                env::var_os("RUSTC").map(PathBuf::from).into_iter().collect();
            found.extend(all_in_path("rustc"));
            // A package manager's compiler beside a rustup may be shadowed or not in PATH at all.
            found.push(PathBuf::from("/usr/bin/rustc"));
            found
        }
    };
    for rustc in candidates {
        let text = rustc.display().to_string();
        if looked_at.iter().any(|line: &String| line.starts_with(&text)) {
            continue;
        }
        match prebuilt_core(&rustc, target) {
            Ok(()) => {
                let cargo = cargo_beside(&rustc);
                return Ok(Compiler {
                    cargo,
                    prefix_args: Vec::new(),
                    rustc: Some(rustc),
                    build_std: false,
                });
            }
            Err(reason) => looked_at.push(format!("{text}: {reason}")),
        }
    }
    if named.is_none() {
        match nightly_with_source() {
            Ok(compiler) => return Ok(compiler),
            Err(reason) => looked_at.push(format!("rustup nightly: {reason}")),
        }
    }
    Err(Error::NoCompiler { target: target.to_owned(), looked_at: looked_at.join("; ") })
}

/// Whether `rustc` comes with a compiled `core` for `target`; rustc prints the directory's name
/// even when it does not exist.
fn prebuilt_core(rustc: &Path, target: &str) -> Result<(), String> {
    let dir = answer(Command::new(rustc).args(["--print", "target-libdir", "--target", target]))?;
    let has_core = std::fs::read_dir(&dir).is_ok_and(|entries| {
        entries.flatten().any(|entry| {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            name.starts_with("libcore-") && name.ends_with(".rlib")
        })
    });
    if has_core { Ok(()) } else { Err("no prebuilt core for this target".to_owned()) }
}

/// A rustup nightly whose `rust-src` is installed.
fn nightly_with_source() -> Result<Compiler, String> {
    let rustup = all_in_path("rustup").into_iter().next().ok_or("rustup is not in PATH")?;
    let sysroot =
        answer(Command::new(&rustup).args(["run", "nightly", "rustc", "--print", "sysroot"]))?;
    if !Path::new(&sysroot).join("lib/rustlib/src/rust/library/core").is_dir() {
        return Err("rust-src is not installed".to_owned());
    }
    Ok(Compiler {
        cargo: rustup,
        prefix_args: ["run", "nightly", "cargo"].map(OsString::from).to_vec(),
        rustc: None,
        build_std: true,
    })
}

fn find_linker(repo: &Path) -> Result<PathBuf, Error> {
    let candidates: Vec<PathBuf> = match env::var_os("SLUICE_BPF_LINKER") {
        Some(path) => vec![path.into()],
        None => {
            let own = repo.join(".sluice/bpf-linker/bin/bpf-linker");
            std::iter::once(own).chain(all_in_path("bpf-linker")).collect()
        }
    };
    let mut looked_at = Vec::new();
    for linker in candidates {
        match answer(Command::new(&linker).arg("--version")) {
            Ok(_) => return Ok(linker),
            Err(reason) => looked_at.push(format!("{}: {reason}", linker.display())),
        }
    }
    Err(Error::NoLinker { looked_at: looked_at.join("; ") })
}

/// The cargo that was shipped with `rustc`, or the outer one.
fn cargo_beside(rustc: &Path) -> PathBuf {
    rustc
        .parent()
        .map(|dir| dir.join("cargo"))
        .filter(|cargo| cargo.is_file())
        .or_else(|| env::var_os("CARGO").map(PathBuf::from))
        .unwrap_or_else(|| PathBuf::from("cargo"))
}

/// Every file of that name in `PATH`, in order.
fn all_in_path(name: &str) -> Vec<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).map(|dir| dir.join(name)).filter(|file| file.is_file()).collect()
}

/// First line of what `command` prints, or why there is none.
fn answer(command: &mut Command) -> Result<String, String> {
    crate::clean_environment(command);
    let output = command.output().map_err(|e| e.to_string())?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        return Err(stderr.lines().next().unwrap_or("failed without a word").to_owned());
    }
    let stdout = String::from_utf8_lossy(&output.stdout);
    Ok(stdout.lines().next().unwrap_or_default().trim().to_owned())
}
