//! The offload rung of the attach ladder: an XDP program that the NIC's own processor runs.

/// What a driver profile says about XDP in the NIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DriverOffload {
    /// The driver refuses every program that is bound to the device.
    Absent,
    /// The driver takes such programs, at least with some firmware.
    Possible,
}

/// Why the offload rung cannot be used on an interface.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OffloadUnavailable {
    /// The driver has no such mode.
    #[error(
        "{interface}: driver {driver} runs no XDP program in the NIC; the next rung is native mode"
    )]
    DriverHasNone {
        /// Name of the interface.
        interface: String,
        /// Kernel name of its driver.
        driver: String,
    },
    /// The driver may be able to, but there is nothing to load.
    #[error(
        "{interface}: driver {driver} may run XDP programs in the NIC, but this version of Sluice \
         carries none for a NIC, and no setting lifts that; the next rung is native mode"
    )]
    NoProgram {
        /// Name of the interface.
        interface: String,
        /// Kernel name of its driver.
        driver: String,
    },
}

/// Why `interface` gets no offloaded program. There is always a reason in this version; the return
/// type becomes a `Result` with the first program for a NIC.
pub fn why_unavailable(
    interface: &str,
    driver: &str,
    offload: DriverOffload,
) -> OffloadUnavailable {
    let (interface, driver) = (interface.to_owned(), driver.to_owned());
    match offload {
        DriverOffload::Absent => OffloadUnavailable::DriverHasNone { interface, driver },
        DriverOffload::Possible => OffloadUnavailable::NoProgram { interface, driver },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reason_names_interface_driver_and_next_rung() {
        for offload in [DriverOffload::Absent, DriverOffload::Possible] {
            let text = why_unavailable("eth7", "nfp", offload).to_string();
            for word in ["eth7", "nfp", "native"] {
                assert!(text.contains(word), "{offload:?}: {word:?} is not in {text:?}");
            }
        }
    }

    #[test]
    fn driver_limit_and_our_limit_are_different_reasons() {
        let absent = why_unavailable("eth0", "veth", DriverOffload::Absent);
        let possible = why_unavailable("eth0", "veth", DriverOffload::Possible);
        assert!(matches!(absent, OffloadUnavailable::DriverHasNone { .. }));
        assert!(matches!(possible, OffloadUnavailable::NoProgram { .. }));
    }
}
