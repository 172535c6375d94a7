//! Draws cases until one fails, and makes that one small.

use std::cell::RefCell;
use std::collections::BTreeMap;

use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};
use sluice_abi::{Hook, Reason};

use super::drive::{Failure, Report, Twin, drive};
use super::moves::{Case, case};
use crate::host::Host;
use crate::world::World;

/// What was driven.
#[derive(Clone, Debug, Default)]
pub struct Hunt {
    /// Cases.
    pub cases: u64,
    /// Packets in them.
    pub packets: u64,
    /// Packets by verdict.
    pub reasons: BTreeMap<(Hook, Reason), u64>,
}

impl Hunt {
    fn add(&mut self, report: &Report) {
        self.cases += 1;
        self.packets += report.packets();
        for key in report.reasons() {
            *self.reasons.entry(key).or_default() += 1;
        }
    }

    /// Both.
    pub fn and(mut self, other: Hunt) -> Self {
        self.cases += other.cases;
        self.packets += other.packets;
        for (key, n) in other.reasons {
            *self.reasons.entry(key).or_default() += n;
        }
        self
    }
}

/// The smallest failing case that was found.
#[derive(Clone, Debug)]
pub struct Prey {
    /// The case.
    pub case: Case,
    /// What happened in it.
    pub report: Report,
}

/// Drives `cases` cases, the same for the same seed.
///
/// # Errors
/// A failing case, as small as it gets.
pub fn hunt(cases: u32, seed: u64, twin: &mut impl Twin) -> Result<Hunt, Box<Prey>> {
    let config =
        Config { cases, failure_persistence: None, max_shrink_iters: 20_000, ..Config::default() };
    // All zero would be no seed.
    let bytes = [seed.to_le_bytes(), *b"sequence"].concat();
    let rng = TestRng::from_seed(RngAlgorithm::XorShift, &bytes);
    let mut runner = TestRunner::new_with_rng(config, rng);
    let mut host = Host::new(&World::standard());
    let (place, hunt) = (RefCell::new((&mut host, twin)), RefCell::new(Hunt::default()));
    let drive = |case: &Case| {
        let (host, twin) = &mut *place.borrow_mut();
        drive(case, host, *twin)
    };
    let outcome = runner.run(&case(), |case| {
        let report = drive(&case);
        hunt.borrow_mut().add(&report);
        match report.failure {
            Some(failure) => Err(TestCaseError::fail(failure.0)),
            None => Ok(()),
        }
    });
    match outcome {
        Ok(()) => Ok(hunt.into_inner()),
        Err(TestError::Fail(why, case)) => {
            let mut report = drive(&case);
            let again = || Failure(format!("seen once, and not again: {why}"));
            report.failure.get_or_insert_with(again);
            Err(Box::new(Prey { case, report }))
        }
        Err(TestError::Abort(reason)) => panic!("the cases cannot be drawn: {reason}"),
    }
}
