//! What the object that only tests load counts: calls that cost time on the way of a packet.

/// ARRAY of u64 counts, index [`Trap`]. Only in the object built with the feature `trap`.
pub const TRAP: &str = "sl_trap_v1";

/// A call that is counted.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u32)]
pub enum Trap {
    /// `bpf_spin_lock`: a record is being written.
    Lock = 0,
    /// The function that decides.
    Decide = 1,
    /// Lookup in a hash map (lookups in arrays are inlined by the verifier).
    HashLookup = 2,
    /// `bpf_xdp_adjust_head`.
    AdjustHead = 3,
    /// `bpf_xdp_adjust_meta`.
    AdjustMeta = 4,
    /// `bpf_redirect`.
    Redirect = 5,
    /// The function that takes a segment into a connection's state.
    Segment = 6,
    /// `bpf_xdp_get_buff_len`.
    BufferLength = 7,
}

impl Trap {
    /// All, in index order.
    pub const ALL: [Trap; 8] = [
        Trap::Lock,
        Trap::Decide,
        Trap::HashLookup,
        Trap::AdjustHead,
        Trap::AdjustMeta,
        Trap::Redirect,
        Trap::Segment,
        Trap::BufferLength,
    ];

    /// The name in the budget and in messages.
    pub const fn label(self) -> &'static str {
        match self {
            Trap::Lock => "lock",
            Trap::Decide => "decide",
            Trap::HashLookup => "hash_lookup",
            Trap::AdjustHead => "adjust_head",
            Trap::AdjustMeta => "adjust_meta",
            Trap::Redirect => "redirect",
            Trap::Segment => "segment",
            Trap::BufferLength => "buffer_length",
        }
    }
}
