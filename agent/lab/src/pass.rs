//! A two-instruction XDP program, `return XDP_PASS`, for the fabric's end of the uplinks.
//!
//! What a node sends by XDP_TX is taken from the veth's ring only if the *other* end has an XDP
//! program: `veth_xdp_flush` looks at the peer's `xdp_prog`, and with GRO alone the frames are
//! counted as sent and never arrive. In production a switch is at the other end; here it is this.
//!
//! The object is put together in code, so that the lab needs no compiler and no file. It is
//! attached by netlink, not by a `bpf_link`: the attachment then lives exactly as long as the
//! device and nobody has to keep a descriptor.

use std::os::fd::{AsFd, AsRawFd, RawFd};

use aya::Ebpf;
use aya::programs::Xdp;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkMessage, LinkXdp};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use nix::net::if_::if_nametoindex;

use crate::{LabError, Netns};

/// XDP_FLAGS_DRV_MODE of linux/if_link.h: in the driver or not at all.
const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;

const PROGRAM: &str = "lab_pass";

/// r0 = XDP_PASS (2); exit. RFC 9669 section 3: opcode, registers, offset, immediate.
const RETURN_PASS: [u8; 16] = [0xb7, 0, 0, 0, 2, 0, 0, 0, 0x95, 0, 0, 0, 0, 0, 0, 0];

/// The loaded program; attachments outlive it.
pub struct PassProgram {
    object: Ebpf,
}

impl PassProgram {
    /// Loads the program.
    ///
    /// # Errors
    /// The kernel has no BPF or the right is missing.
    pub fn load() -> Result<Self, LabError> {
        Self::load_code(&RETURN_PASS)
    }

    fn load_code(code: &[u8]) -> Result<Self, LabError> {
        let mut object =
            Ebpf::load(&object("xdp", PROGRAM, code)).map_err(|e| LabError::Bpf(chain(&e)))?;
        let program: &mut Xdp = object
            .program_mut(PROGRAM)
            .ok_or_else(|| LabError::Bpf(format!("no program {PROGRAM} in the object")))?
            .try_into()
            .map_err(|e| LabError::Bpf(chain(&e)))?;
        program.load().map_err(|e| LabError::Bpf(chain(&e)))?;
        Ok(Self { object })
    }

    /// Attaches it in native mode to devices of a namespace.
    ///
    /// # Errors
    /// A device is not there or has a program already.
    pub fn attach(&self, netns: &Netns, devices: &[String]) -> Result<(), LabError> {
        let program: &Xdp = self
            .object
            .program(PROGRAM)
            .ok_or_else(|| LabError::Bpf(format!("no program {PROGRAM} in the object")))?
            .try_into()
            .map_err(|e| LabError::Bpf(chain(&e)))?;
        let fd = program.fd().map_err(|e| LabError::Bpf(chain(&e)))?.as_fd().as_raw_fd();
        netns.enter(|| devices.iter().try_for_each(|device| set_link_xdp(device, fd)))?
    }
}

fn set_link_xdp(device: &str, fd: RawFd) -> Result<(), LabError> {
    let what = format!("attach of the XDP pass program to {device}");
    let refused = |message: String| LabError::Netlink { what: what.clone(), message };
    let index = if_nametoindex(device).map_err(|e| refused(e.desc().to_owned()))?;
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.attributes =
        vec![LinkAttribute::Xdp(vec![LinkXdp::Fd(fd), LinkXdp::Flags(XDP_FLAGS_DRV_MODE)])];
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_ACK;
    let mut message =
        NetlinkMessage::new(header, NetlinkPayload::from(RouteNetlinkMessage::SetLink(link)));
    message.finalize();
    let mut buffer = vec![0; message.buffer_len()];
    message.serialize(&mut buffer);

    let socket = Socket::new(NETLINK_ROUTE).map_err(|e| refused(e.to_string()))?;
    socket.send_to(&buffer, &SocketAddr::new(0, 0), 0).map_err(|e| refused(e.to_string()))?;
    let (answer, _) = socket.recv_from_full().map_err(|e| refused(e.to_string()))?;
    let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer)
        .map_err(|e| refused(e.to_string()))?;
    match answer.payload {
        NetlinkPayload::Error(error) if error.code.is_some() => {
            Err(refused(error.to_io().to_string()))
        }
        _ => Ok(()),
    }
}

/// An error with its causes, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// A relocatable ELF file (TIS ELF 1.2; e_machine EM_BPF = 247) with program `name` in `section`, by
/// which loaders know its kind: `xdp`, `classifier`.
pub fn object(section: &str, name: &str, code: &[u8]) -> Vec<u8> {
    let license = b"GPL\0";
    let names = format!("\0{name}\0");
    let section_names = format!("\0{section}\0license\0.symtab\0.strtab\0.shstrtab\0");
    let at = |name: &str| section_names.find(&format!("\0{name}\0")).map_or(0, |at| at as u32 + 1);

    // Two symbols: the empty one, and the program (global, function, section 1).
    let mut symbols = vec![0; 24];
    symbols.extend(1u32.to_ne_bytes());
    symbols.extend([1 << 4 | 2, 0]);
    symbols.extend(1u16.to_ne_bytes());
    symbols.extend(0u64.to_ne_bytes());
    symbols.extend((code.len() as u64).to_ne_bytes());

    // name offset, type, flags, contents, link, info, entry size
    type Section<'a> = (u32, u32, u64, &'a [u8], u32, u32, u64);
    let sections: [Section<'_>; 6] = [
        (0, 0, 0, &[], 0, 0, 0),
        (at(section), 1, 2 | 4, code, 0, 0, 0),
        (at("license"), 1, 2, license, 0, 0, 0),
        (at(".symtab"), 2, 0, &symbols, 4, 1, 24),
        (at(".strtab"), 3, 0, names.as_bytes(), 0, 0, 0),
        (at(".shstrtab"), 3, 0, section_names.as_bytes(), 0, 0, 0),
    ];
    let mut body = Vec::new();
    let mut headers = Vec::new();
    for (name, kind, flags, contents, link, info, entry_size) in sections {
        while body.len() % 8 != 0 {
            body.push(0);
        }
        let offset = if kind == 0 { 0 } else { ELF_HEADER_LEN + body.len() as u64 };
        headers.extend(name.to_ne_bytes());
        headers.extend(kind.to_ne_bytes());
        headers.extend(flags.to_ne_bytes());
        headers.extend(0u64.to_ne_bytes());
        headers.extend(offset.to_ne_bytes());
        headers.extend((contents.len() as u64).to_ne_bytes());
        headers.extend(link.to_ne_bytes());
        headers.extend(info.to_ne_bytes());
        headers.extend(8u64.to_ne_bytes());
        headers.extend(entry_size.to_ne_bytes());
        body.extend(contents);
    }
    while body.len() % 8 != 0 {
        body.push(0);
    }

    let data_encoding = if cfg!(target_endian = "little") { 1 } else { 2 };
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, data_encoding, 1, 0];
    file.extend([0; 8]);
    file.extend(1u16.to_ne_bytes());
    file.extend(247u16.to_ne_bytes());
    file.extend(1u32.to_ne_bytes());
    file.extend(0u64.to_ne_bytes());
    file.extend(0u64.to_ne_bytes());
    file.extend((ELF_HEADER_LEN + body.len() as u64).to_ne_bytes());
    file.extend(0u32.to_ne_bytes());
    for half in [ELF_HEADER_LEN as u16, 0, 0, 64, sections.len() as u16, 5] {
        file.extend(half.to_ne_bytes());
    }
    file.extend(body);
    file.extend(headers);
    file
}

const ELF_HEADER_LEN: u64 = 64;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::plan::{HOST_INTERFACE, UPLINK};
    use crate::probe::{self, FrameSocket, Packet, Transport};
    use crate::{Lab, LabContext, LabSpec};

    /// Swaps the MAC addresses and returns XDP_TX.
    fn reflect() -> Vec<u8> {
        // opcode, destination register | source register << 4, offset, immediate
        let instructions: [(u8, u8, i16, i32); 17] = [
            (0x61, 0x12, 0, 0),  // r2 = data
            (0x61, 0x13, 4, 0),  // r3 = data_end
            (0xbf, 0x24, 0, 0),  // r4 = r2
            (0x07, 0x04, 0, 14), // r4 += 14
            (0x2d, 0x34, 10, 0), // if r4 > r3 goto r0 = XDP_PASS
            (0x61, 0x25, 0, 0),  // r5 = bytes 0..4
            (0x69, 0x26, 4, 0),  // r6 = bytes 4..6
            (0x61, 0x27, 6, 0),  // r7 = bytes 6..10
            (0x69, 0x28, 10, 0), // r8 = bytes 10..12
            (0x63, 0x72, 0, 0),  // bytes 0..4 = r7
            (0x6b, 0x82, 4, 0),  // bytes 4..6 = r8
            (0x63, 0x52, 6, 0),  // bytes 6..10 = r5
            (0x6b, 0x62, 10, 0), // bytes 10..12 = r6
            (0xb7, 0x00, 0, 3),  // r0 = XDP_TX
            (0x95, 0x00, 0, 0),  // exit
            (0xb7, 0x00, 0, 2),  // r0 = XDP_PASS
            (0x95, 0x00, 0, 0),  // exit
        ];
        let mut code = Vec::new();
        for (opcode, registers, offset, immediate) in instructions {
            code.extend([opcode, registers]);
            code.extend(offset.to_ne_bytes());
            code.extend(immediate.to_ne_bytes());
        }
        code
    }

    /// Whether the client sees its frame again that node1's native program sends back.
    fn comes_back(fabric_xdp: bool) -> bool {
        let dir = tempfile::tempdir().expect("a temporary directory");
        // Without servers no executable is needed.
        let context =
            LabContext { run_root: dir.path().join("lab"), ..LabContext::new("/nonexistent") };
        let spec = LabSpec { servers: false, fabric_xdp, ..LabSpec::kernel_only(2, 0) };
        let lab = Lab::up(&context, &spec).expect("up");
        let (node, client) = (&lab.plan().nodes[0], &lab.plan().client);
        let program = PassProgram::load_code(&reflect()).expect("load");
        program.attach(&node.netns, &[UPLINK.to_owned()]).expect("attach");

        let packet = Packet {
            source: crate::plan::CLIENT_V4.into(),
            destination: node.address_v4.into(),
            ttl: 64,
            transport: Transport::udp(1, 2),
            payload: b"there and back".to_vec(),
        };
        let frame = probe::frame(client.mac, node.uplink_mac, &packet).expect("legal");
        let mut socket = FrameSocket::open(&client.netns, HOST_INTERFACE).expect("open");
        socket.send(&frame).expect("send");
        let is_it = |bytes: &[u8]| {
            let seen = probe::inspect(bytes, None);
            seen.is_ok_and(|seen| seen.source_mac == node.uplink_mac && seen.packet == packet)
        };
        socket.receive(Duration::from_secs(1), is_it).expect("receive").is_some()
    }

    #[test]
    fn what_a_node_sends_by_xdp_tx_arrives_with_the_fabrics_program_only() {
        assert!(comes_back(true));
        assert!(!comes_back(false));
    }
}
