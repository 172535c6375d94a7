//! A map store in memory, for tests.

use crate::{MapOp, MapStore, Tables};
use std::convert::Infallible;

/// Maps in memory. `tables` can be read and broken at will.
#[derive(Clone, Default, Debug)]
pub struct FakeMaps {
    /// The contents.
    pub tables: Tables,
    /// Operations applied so far.
    pub applied: Vec<MapOp>,
}

impl MapStore for FakeMaps {
    type Error = Infallible;

    fn load(&mut self) -> Result<Tables, Infallible> {
        let mut tables = self.tables.clone();
        let referenced = tables.referenced_extents();
        tables
            .extents
            .retain(|offset, entries| referenced.contains(&(*offset, entries.len() as u32)));
        Ok(tables)
    }

    fn apply(&mut self, op: &MapOp) -> Result<(), Infallible> {
        self.tables.apply(op);
        self.applied.push(op.clone());
        Ok(())
    }
}
