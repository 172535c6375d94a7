//! Builds the BPF object of `sluice-ebpf` from another crate's build script.
//!
//! ```text
//! build.rs ─► find a compiler ─► find bpf-linker ─► inner cargo ─► check the object ─► OUT_DIR
//!             (tools.rs)         (tools.rs)         (this file)     (guard.rs)
//! ```
//!
//! The BPF crate is no member of the workspace: it is compiled for another target, by another
//! compiler, with other flags. This crate is the only place that knows them. It is a plain library
//! for build scripts and never a dependency of code that runs.
//!
//! Settings, all read from the environment:
//!
//! | variable            | meaning                                                              |
//! |---------------------|----------------------------------------------------------------------|
//! | `SLUICE_BPF_RUSTC`  | the compiler to use; it must have `core` for the BPF target          |
//! | `SLUICE_BPF_LINKER` | the `bpf-linker` to use                                              |
//! | `CI`                | when `true`, the lock file of `sluice-ebpf` must be up to date       |

#![forbid(unsafe_code)]

mod guard;
mod tools;

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, io};

use tools::{Compiler, Toolchain};

/// Which build of `sluice-ebpf` is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// The object that the agent loads.
    Product,
    /// The same source with the cargo feature `trap`: helpers that the established path may not
    /// call are counted. For tests only.
    Trap,
    /// The wrapper with which `sluice bench progrun` measures the product's object: programs of its
    /// own, in an object of its own.
    Bench,
}

impl Variant {
    /// The variable that holds the object's path at compile time, for
    /// `aya::include_bytes_aligned!(env!("..."))`.
    pub const fn env_name(self) -> &'static str {
        match self {
            Self::Product => "SLUICE_BPF_OBJECT",
            Self::Trap => "SLUICE_BPF_TRAP_OBJECT",
            Self::Bench => "SLUICE_BPF_BENCH_OBJECT",
        }
    }

    /// File name of the object in `OUT_DIR`.
    const fn file_name(self) -> &'static str {
        match self {
            Self::Product => "sluice.bpf.o",
            Self::Trap => "sluice-trap.bpf.o",
            Self::Bench => "sluice-bench.bpf.o",
        }
    }

    const fn features(self) -> Option<&'static str> {
        match self {
            Self::Product | Self::Bench => None,
            Self::Trap => Some("trap"),
        }
    }

    /// Which binary of `sluice-ebpf` is the object.
    const fn binary(self) -> &'static str {
        match self {
            Self::Product | Self::Trap => "sluice-ebpf",
            Self::Bench => "sluice-bench",
        }
    }
}

/// Why there is no BPF object. Every text ends with what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Cargo did not set a variable that every build script gets.
    #[error("{0} is not set; call this library from a build script only")]
    NotABuildScript(&'static str),
    /// No compiler can build for the BPF target.
    #[error(
        "no Rust compiler with `core` for {target} was found (looked at: {looked_at}). \
         Run `scripts/setup`, or set SLUICE_BPF_RUSTC"
    )]
    NoCompiler {
        /// Target triple that was wanted.
        target: String,
        /// The candidates and why each was refused.
        looked_at: String,
    },
    /// No BPF linker was found.
    #[error(
        "bpf-linker was not found (looked at: {looked_at}). \
         Run `scripts/setup`, or set SLUICE_BPF_LINKER"
    )]
    NoLinker {
        /// The places that were tried.
        looked_at: String,
    },
    /// A file could not be read, written or run.
    #[error("{what} {path}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The inner cargo failed.
    #[error("sluice-ebpf does not build for {target}:\n{stderr}")]
    Build {
        /// Target triple.
        target: String,
        /// What cargo and rustc said.
        stderr: String,
    },
    /// The object contains something that costs speed or cannot be loaded.
    #[error("the BPF object {path} may not be used:\n{}", findings.join("\n"))]
    Refused {
        /// The object, kept for inspection.
        path: PathBuf,
        /// One line for each finding: what, where, what to change.
        findings: Vec<String>,
    },
    /// The linker's output is not an ELF file that can be read.
    #[error("{path} is not a readable ELF object: {source}")]
    NotElf {
        /// The file.
        path: PathBuf,
        /// The reader's answer.
        source: object::Error,
    },
}

/// Builds `variants` and exports the path of each as [`Variant::env_name`]; prints what cargo has to
/// know. The whole body of a build script: on failure it reports the error and ends the process.
pub fn run(variants: &[Variant]) {
    for &variant in variants {
        match build(variant) {
            Ok(path) => println!("cargo::rustc-env={}={}", variant.env_name(), path.display()),
            Err(error) => {
                let text = error.to_string();
                match error {
                    // A compiler's own words are read better without a prefix on each line.
                    Error::Build { target, .. } => {
                        println!("cargo::error=sluice-ebpf does not build for {target}, see below");
                        eprintln!("{text}");
                    }
                    _ => text.lines().for_each(|line| println!("cargo::error={line}")),
                }
                std::process::exit(1);
            }
        }
    }
}

/// Builds one variant, checks it and returns the path of its copy in `OUT_DIR`.
///
/// # Errors
/// No tool chain, a compile error, or an object that [`guard`] refuses.
fn build(variant: Variant) -> Result<PathBuf, Error> {
    let repo = repository();
    let out_dir = PathBuf::from(script_env("OUT_DIR")?);
    let big_endian = script_env("CARGO_CFG_TARGET_ENDIAN")? == "big";
    let target = if big_endian { "bpfeb-unknown-none" } else { "bpfel-unknown-none" };
    let arch = script_env("CARGO_CFG_TARGET_ARCH")?;

    watch(&repo);
    let tools = Toolchain::find(&repo, target)?;
    let target_dir = target_dir(&out_dir);
    fs::create_dir_all(&target_dir).map_err(|e| io_error("create", &target_dir, e))?;

    // Both variants share one target directory, so that the dependencies are compiled once. Cargo
    // puts both binaries at the same path: hold a lock from the build to the copy.
    let lock_path = target_dir.join(".sluice-lock");
    let lock = File::create(&lock_path).map_err(|e| io_error("create", &lock_path, e))?;
    lock.lock().map_err(|e| io_error("lock", &lock_path, e))?;

    let mut cargo = cargo_command(&repo, &tools, target, &arch.to_string_lossy());
    cargo.arg("--target-dir").arg(&target_dir);
    cargo.args(["--bin", variant.binary()]);
    if let Some(features) = variant.features() {
        cargo.args(["--features", features]);
    }
    let output = cargo.output().map_err(|e| io_error("run", &tools.compiler.cargo, e))?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(Error::Build { target: target.to_owned(), stderr });
    }

    forward_warnings(&output.stderr);

    let built = target_dir.join(target).join("release").join(variant.binary());
    let object = out_dir.join(variant.file_name());
    fs::copy(&built, &object).map_err(|e| io_error("copy", &built, e))?;
    drop(lock);

    guard::check(&object)?;
    Ok(object)
}

/// The inner cargo's command line and environment.
fn cargo_command(repo: &Path, tools: &Toolchain, target: &str, arch: &str) -> Command {
    let Compiler { cargo, prefix_args, rustc, build_std, .. } = &tools.compiler;
    let mut command = Command::new(cargo);
    command.args(prefix_args);
    clean_environment(&mut command);
    if let Some(rustc) = rustc {
        command.env("RUSTC", rustc);
    }
    // aya-ebpf turns on `asm_experimental_arch`, a gated feature; the prebuilt `core` belongs to a
    // stable compiler.
    command.env("RUSTC_BOOTSTRAP", "1");
    command.env("CARGO_ENCODED_RUSTFLAGS", rustflags(&tools.linker, arch));
    command.current_dir(repo.join("xdp/ebpf"));
    command.args(["build", "--release", "--target", target]);
    if *build_std {
        command.args(["-Z", "build-std=core"]);
    }
    if env::var_os("CI").is_some_and(|v| v == "true") {
        command.arg("--locked");
    }
    command
}

/// Compiler flags, in the encoding of `CARGO_ENCODED_RUSTFLAGS` (which allows spaces in paths).
fn rustflags(linker: &Path, arch: &str) -> OsString {
    let mut linker_flag = OsString::from("linker=");
    linker_flag.push(linker);
    let arch = format!("bpf_target_arch=\"{arch}\"");
    let flags: [OsString; 12] = [
        "-C".into(),
        linker_flag,
        "-C".into(),
        "debuginfo=2".into(),
        // BTF for maps, programs and line info: the verifier's log then cites source lines.
        "-Clink-arg=--btf".into(),
        // v3 loads from Linux 5.1 on; v4 needs 6.6 and measured no faster.
        "-Ctarget-cpu=v3".into(),
        // Packet loads of 2 and 4 bytes need no natural alignment on the hosts that have native
        // XDP; without this every header field is loaded byte by byte.
        "-Ctarget-feature=+allows-misaligned-mem-access".into(),
        // bpf-linker's own default turns every memset and memmove into a call of a byte loop.
        "-Clink-arg=--disable-expand-memcpy-in-order".into(),
        // Which `struct pt_regs` the helper bindings use.
        "--cfg".into(),
        arch.into(),
        "--check-cfg".into(),
        "cfg(bpf_target_arch,values(any()))".into(),
    ];
    flags.join(std::ffi::OsStr::new("\x1f"))
}

/// Repeats the BPF compiler's warnings as ours; cargo shows nothing else of a build script that
/// succeeds. Left out: counts, and the remark that our target feature is unstable.
fn forward_warnings(stderr: &[u8]) {
    const NOISE: [&str; 2] = ["generated ", "unstable feature specified for"];
    let text = String::from_utf8_lossy(stderr);
    let mut lines = text.lines().peekable();
    while let Some(line) = lines.next() {
        if !line.starts_with("warning: ") || NOISE.iter().any(|noise| line.contains(noise)) {
            continue;
        }
        let place = lines.next_if(|next| next.trim_start().starts_with("--> "));
        println!("cargo::warning=sluice-ebpf: {line} {}", place.unwrap_or_default().trim());
    }
}

/// Takes from `command` what the outer cargo, rustup or make put into the environment for
/// themselves. Network and registry settings (`CARGO_HOME`, `CARGO_HTTP_*`, ...) stay.
fn clean_environment(command: &mut Command) {
    const EXACT: [&str; 19] = [
        "CARGO_ENCODED_RUSTFLAGS",
        "CARGO_INCREMENTAL",
        "CARGO_MAKEFLAGS",
        "CARGO_MANIFEST_DIR",
        "CARGO_MANIFEST_LINKS",
        "CARGO_MANIFEST_PATH",
        "CARGO_PRIMARY_PACKAGE",
        "DEBUG",
        "HOST",
        "MAKEFLAGS",
        "MFLAGS",
        "NUM_JOBS",
        "OPT_LEVEL",
        "OUT_DIR",
        "PROFILE",
        "RUSTFLAGS",
        "RUSTUP_TOOLCHAIN",
        "TARGET",
        "LD_LIBRARY_PATH",
    ];
    const PREFIXES: [&str; 9] = [
        "CARGO_BUILD_",
        "CARGO_CFG_",
        "CARGO_FEATURE_",
        "CARGO_PKG_",
        "CARGO_PROFILE_",
        "CARGO_TARGET_",
        "DEP_",
        "RUSTC",
        "RUSTDOC",
    ];
    for (name, _) in env::vars_os() {
        let Some(text) = name.to_str() else { continue };
        if EXACT.contains(&text) || PREFIXES.iter().any(|prefix| text.starts_with(prefix)) {
            command.env_remove(&name);
        }
    }
}

/// Tells cargo which sources and settings the object depends on.
fn watch(repo: &Path) {
    for path in [
        "xdp/ebpf/Cargo.toml",
        "xdp/ebpf/Cargo.lock",
        "xdp/ebpf/src",
        "xdp/abi/Cargo.toml",
        "xdp/abi/src",
        "xdp/datapath/Cargo.toml",
        "xdp/datapath/src",
    ] {
        println!("cargo::rerun-if-changed={}", repo.join(path).display());
    }
    for name in ["SLUICE_BPF_RUSTC", "SLUICE_BPF_LINKER", "CI"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
}

/// The repository's root: two levels above this crate.
fn repository() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).unwrap_or(here).to_path_buf()
}

/// `bpf` inside the outer target directory (which cargo marks with a `CACHEDIR.TAG`), so that the
/// inner build survives a change of the build script; inside `OUT_DIR` when there is no mark.
fn target_dir(out_dir: &Path) -> PathBuf {
    let root = out_dir.ancestors().find(|dir| dir.join("CACHEDIR.TAG").is_file());
    root.unwrap_or(out_dir).join("bpf")
}

fn script_env(name: &'static str) -> Result<OsString, Error> {
    env::var_os(name).ok_or(Error::NotABuildScript(name))
}

fn io_error(what: &'static str, path: &Path, source: io::Error) -> Error {
    Error::Io { what, path: path.to_path_buf(), source }
}
