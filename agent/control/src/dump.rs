//! Tables for people and for comparison: by names, without ids.
