//! End to end: `sluice run` on node1 of a lab, the kernel alone on the other nodes, real programs
//! as clients. Every test makes its own lab and removes it; several run at once. Needs root.
//!
//! Nothing here knows a map or a packet layout: what is asserted is what programs on the hosts see
//! and what the `sluice` command prints.

mod answers;
mod bed;
mod changes;
mod demo;
mod flood;
mod fragments;
mod hairpin;
mod icmp;
mod neighbours;
mod objects;
mod path_mtu;
mod services;
mod switches;
mod throughput;
mod tunnel;
mod vlan;
