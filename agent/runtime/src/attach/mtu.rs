//! Whether native XDP can carry an interface's MTU. Most drivers say so themselves when a program is
//! attached, in a number; some do not, and then frames that are too large are lost.

use sluice_hw_profiles::{MtuOf, Profile, Profiles};

use super::{Refusal, Rung};
use crate::facts::ethtool;
use crate::facts::kernel::Link;

/// Why the MTU is known to be too large for native XDP before anything was tried. `frags`: the
/// program takes frames in several buffers.
pub fn refusal(link: &Link, frags: bool) -> Option<Refusal> {
    let driver = driver(link);
    let profiles = Profiles::built_in().ok()?;
    let profile = profiles.of_driver(&driver);
    // The other end's MTU is not to be had; the kernel compares it.
    if profile.xdp.mtu.of == MtuOf::Peer {
        return None;
    }
    let limit = limit(profile, takes_frags(link, profile, frags))?;
    (link.mtu > limit).then(|| {
        let (reason, remedy) = words(link, &driver, Some(limit), why_one_buffer(link, frags));
        Refusal { rung: Rung::Native.label().to_owned(), errno: 0, reason, remedy }
    })
}

/// Reason and remedy for a device that has refused its MTU.
pub fn above_limit(link: &Link, frags: bool) -> (String, String) {
    let driver = driver(link);
    let limit = Profiles::built_in().ok().and_then(|profiles| {
        let profile = profiles.of_driver(&driver);
        limit(profile, takes_frags(link, profile, frags))
    });
    words(link, &driver, limit, why_one_buffer(link, frags))
}

fn words(
    link: &Link,
    driver: &str,
    limit: Option<u32>,
    why: Option<&'static str>,
) -> (String, String) {
    let Link { name, mtu, .. } = link;
    let most = limit.map(|limit| format!(" ({limit})")).unwrap_or_default();
    let why = why.map(|why| format!(": {why}")).unwrap_or_default();
    let lower = limit.map_or_else(
        || "lower it".to_owned(),
        |limit| format!("lower it at both ends (ip link set dev {name} mtu {limit})"),
    );
    (
        format!("the MTU {mtu} is more than native XDP of the driver {driver} takes{most}{why}"),
        format!("{lower}, or use mode generic"),
    )
}

/// Why a frame must fit one buffer, if it must.
fn why_one_buffer(link: &Link, frags: bool) -> Option<&'static str> {
    if !frags {
        return Some("this kernel knows no XDP programs for frames in several buffers (5.18 does)");
    }
    let claims = link.xdp_features.is_none_or(|features| features.rx_frags());
    (!claims).then_some("the device takes no frames in several buffers (no feature rx-sg)")
}

/// The device's own word, else what is known of its driver.
fn takes_frags(link: &Link, profile: &Profile, frags: bool) -> bool {
    let driver = profile.xdp.mtu.frags_max.is_some();
    frags && link.xdp_features.map_or(driver, |features| features.rx_frags())
}

/// The largest MTU, where it is known.
fn limit(profile: &Profile, frags: bool) -> Option<u32> {
    if frags { profile.xdp.mtu.frags_max } else { profile.xdp.mtu.linear_max }
}

/// The kernel driver's name.
fn driver(link: &Link) -> String {
    ethtool::driver(&link.name).unwrap_or_else(|_| link.kind.clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::xdp_features::XdpFeatures;

    /// Basic, redirect, transmit; and reception in several buffers.
    const LINEAR: u64 = 0b111;
    const RX_SG: u64 = 1 << 5;

    fn link(mtu: u32, features: u64) -> Link {
        // Not there, so that the kind counts for the driver's name.
        let name = "no such device".to_owned();
        let kind = "virtio_net".to_owned();
        let xdp_features = Some(XdpFeatures(features));
        Link { name, kind, mtu, xdp_features, ..Link::default() }
    }

    #[test]
    fn mtu_beyond_one_buffer_is_refused_unless_device_and_program_take_several() {
        let refused = refusal(&link(9000, LINEAR), true).expect("a refusal");
        assert!(refused.reason.contains("9000") && refused.reason.contains("3506"), "{refused:?}");
        assert!(refused.reason.contains("rx-sg"), "{refused:?}");
        assert!(refused.remedy.contains("mtu 3506"), "{refused:?}");
        let refused = refusal(&link(9000, LINEAR | RX_SG), false).expect("a refusal");
        assert!(refused.reason.contains("5.18"), "{refused:?}");
        assert_eq!(refusal(&link(9000, LINEAR | RX_SG), true), None);
        assert_eq!(refusal(&link(3506, LINEAR), true), None);
        assert_eq!(refusal(&link(3506, LINEAR), false), None);
    }

    #[test]
    fn drivers_without_a_profile_are_asked_themselves() {
        let unknown = Link { kind: "new_nic".to_owned(), ..link(9000, LINEAR) };
        assert_eq!(refusal(&unknown, true), None);
    }
}
