//! Which endpoints a Service port has.
