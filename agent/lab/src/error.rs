//! What can go wrong in the lab, said with the object it happened to and what to do about it.

use std::io;
use std::path::PathBuf;

use crate::preflight::Finding;

/// Errors of the lab.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// A file, directory or process could not be used.
    #[error("{what}: {source}")]
    Io {
        /// The action and its object, for example `create /run/netns/slab-a-node1`.
        what: String,
        /// The system's answer.
        source: io::Error,
    },
    /// A command ended with an error.
    #[error("{command} (in {host}) failed: {message}")]
    Command {
        /// Program and arguments.
        command: String,
        /// The namespace it ran in.
        host: String,
        /// What it printed on its error stream.
        message: String,
    },
    /// A line of a batch for `ip` or `bridge` was refused.
    #[error("{program} refused `{line}` in {host}: {message}")]
    Batch {
        /// `ip` or `bridge`.
        program: &'static str,
        /// The namespace it ran in.
        host: String,
        /// The refused line.
        line: String,
        /// What the program printed.
        message: String,
    },
    /// The kernel refused a netlink request.
    #[error("netlink, {what}: {message}")]
    Netlink {
        /// The request and its object.
        what: String,
        /// The kernel's answer.
        message: String,
    },
    /// The small BPF program of the lab could not be loaded.
    #[error("load of the lab's XDP pass program: {0}; it needs CAP_BPF and CAP_NET_ADMIN")]
    Bpf(String),
    /// A name or number in the specification is not usable.
    #[error("{field} `{value}`: {remedy}")]
    Spec {
        /// The field, as the command line or `LabSpec` calls it.
        field: &'static str,
        /// What was given.
        value: String,
        /// What is allowed.
        remedy: String,
    },
    /// A lab of this name is there already.
    #[error("lab `{0}` exists already; `sluice lab down --name {0}` removes it")]
    Exists(String),
    /// No lab of this name is known.
    #[error("no lab `{0}`; `sluice lab list` shows what is there")]
    NoLab(String),
    /// More than one lab is up and none was named.
    #[error("several labs are up ({0}); say which one with --name")]
    Ambiguous(String),
    /// The lab has no such host.
    #[error("lab `{lab}` has no host `{host}`; it has {known}")]
    NoHost {
        /// The lab's name.
        lab: String,
        /// The host asked for.
        host: String,
        /// Its hosts, for the reader.
        known: String,
    },
    /// The machine lacks something.
    #[error("this machine cannot run the lab:\n{}", Finding::lines(.0))]
    Preflight(Vec<Finding>),
    /// A process of the lab ended or answered wrongly.
    #[error("{process} on {host} {message}")]
    Process {
        /// What it is, for example `sluice run`.
        process: String,
        /// The host it runs on.
        host: String,
        /// What happened.
        message: String,
        /// Where its output went, as long as the lab is there; the message holds its end.
        log: PathBuf,
    },
    /// A file's contents are not what this version writes.
    #[error("{}: {message}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// Ctrl-C, or a request to end.
    #[error("interrupted; the lab was removed")]
    Interrupted,
}

impl LabError {
    /// An I/O error with the action it belongs to.
    pub fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    /// The same for an error number of nix.
    pub fn errno(what: impl Into<String>) -> impl FnOnce(nix::Error) -> Self {
        let what = what.into();
        move |errno| Self::Io { what, source: errno.into() }
    }
}
