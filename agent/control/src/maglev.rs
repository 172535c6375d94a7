//! Consistent hashing.
