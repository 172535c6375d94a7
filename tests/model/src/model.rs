//! The model as a judge: it follows what was seen, as long as that is lawful.

use std::fmt;

use sluice_abi::{Hook, Reason};

use crate::road::{Account, Action, Case, Lawful, Outcome};
use crate::state::State;
use crate::tables::Tables;
use crate::{tc, xdp};

/// What a program did with a frame.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Seen {
    /// The last step.
    pub action: Action,
    /// Why.
    pub reason: Reason,
    /// The frame afterwards; of no meaning if it was dropped.
    pub frame: Vec<u8>,
    /// Interface that XDP asks TC to hand the frame to.
    pub mark: Option<u32>,
}

impl Seen {
    fn is(&self, outcome: &Outcome) -> bool {
        (self.action, self.reason) == (outcome.action, outcome.reason)
            && outcome.frame.as_ref().is_none_or(|f| (f, outcome.mark) == (&self.frame, self.mark))
    }
}

/// What was seen is not lawful.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Disagreement {
    /// What would have been, the likeliest first.
    pub lawful: Vec<Outcome>,
    /// What was.
    pub seen: Seen,
}

impl fmt::Display for Disagreement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seen = &self.seen;
        writeln!(f, "got      {:?} {:?} mark {:?}", seen.action, seen.reason, seen.mark)?;
        writeln!(f, "         {}", hex(&seen.frame))?;
        for outcome in &self.lawful {
            let Outcome { action, reason, mark, .. } = outcome;
            writeln!(f, "expected {action:?} {reason:?} mark {mark:?}")?;
            if let Some(frame) = &outcome.frame {
                writeln!(f, "         {}", hex(frame))?;
            }
        }
        Ok(())
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A node, as far as it can be known from what was seen.
#[derive(Clone, Debug)]
pub struct Model {
    tables: Tables,
    possible: Vec<State>,
}

impl Model {
    /// A node with these tables and no connections.
    pub fn new(tables: Tables) -> Self {
        Self { tables, possible: vec![State::default()] }
    }

    /// The agent has changed the tables.
    pub fn rewrite(&mut self, tables: Tables) {
        self.tables = tables;
    }

    /// What the agent says.
    pub fn tables(&self) -> &Tables {
        &self.tables
    }

    /// What may be remembered: one state, or several that nothing has told apart yet.
    pub fn possible(&self) -> &[State] {
        &self.possible
    }

    /// A frame has met the program of `hook`: whose counters moved.
    ///
    /// # Errors
    /// What would have been lawful, if what was seen is not. The model goes on as if nothing had
    /// happened.
    pub fn follow(
        &mut self,
        hook: Hook,
        ifindex: u32,
        frame: &[u8],
        seen: Seen,
    ) -> Result<Account, Disagreement> {
        let lawful: Vec<Lawful> = self
            .possible
            .iter()
            .flat_map(|state| [(state, false), (state, true)])
            .flat_map(|(state, hasty)| {
                let tables = &self.tables;
                let case = Case { tables, state, ifindex, frame, seen: &seen.frame, hasty };
                match hook {
                    Hook::Xdp => xdp::receive(&case),
                    Hook::TcIngress => tc::ingress(&case),
                    Hook::TcEgress => tc::egress(&case),
                    // The same law; what is drawn there is held against XDP by the fixtures.
                    Hook::TcNode => xdp::receive(&case),
                }
            })
            .collect();
        let agreeing = lawful.iter().filter(|(outcome, _)| seen.is(outcome));
        let mut accounts: Vec<Account> = agreeing.clone().map(|(o, _)| o.account).collect();
        accounts.dedup();
        let mut possible: Vec<State> = agreeing.map(|(_, state)| state.clone()).collect();
        possible.sort_unstable();
        possible.dedup();
        let Some(account) = accounts.first().copied() else {
            let mut outcomes: Vec<Outcome> = lawful.into_iter().map(|(o, _)| o).collect();
            outcomes.sort_by_key(|o| (o.reason != seen.reason, o.action != seen.action));
            outcomes.dedup();
            return Err(Disagreement { lawful: outcomes, seen });
        };
        assert_eq!(accounts.len(), 1, "what was seen tells whose packet it was");
        self.possible = possible;
        Ok(account)
    }
}
