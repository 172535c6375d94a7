//! What Sluice knows: validated objects of the cluster ([`Snapshot`]) and facts of this node
//! ([`NodeContext`]). No Kubernetes API types, no table layouts.

mod context;
mod object;

pub use context::{
    FailSafe, MaglevSettings, Mode, NextHopFacts, NodeContext, OuterDscp, PeerFacts, PodFacts,
    TunnelFacts,
};
pub use object::{
    Endpoint, EndpointPort, EndpointSlice, Node, NodeTunnel, Object, ObjectName, Pod, Protocol,
    Service, ServicePort, ServicePortName, Snapshot, Tuple,
};

/// [`sluice_abi::Mac`] as text, for serde.
pub(crate) mod mac_text {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};
    use sluice_abi::Mac;

    pub(crate) fn serialize<S: Serializer>(mac: &Mac, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(mac)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Mac, D::Error> {
        let text = String::deserialize(d)?;
        super::parse_mac(&text).ok_or_else(|| D::Error::custom(format!("`{text}` is not a MAC")))
    }
}

/// Six hex bytes with colons between them.
pub fn parse_mac(text: &str) -> Option<sluice_abi::Mac> {
    let mut mac = [0u8; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next()?;
        if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    parts.next().is_none().then_some(sluice_abi::Mac(mac))
}
