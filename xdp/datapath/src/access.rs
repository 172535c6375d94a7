//! The one place of this crate that touches memory through pointers.
//!
//! Packets and map values are memory that others write at the same time: the NIC's driver has
//! finished with a packet, but other CPUs and the agent share the maps. So nothing here hands out a
//! `&T` or `&mut T`; it hands out [`At`], a place whose bounds were checked once and which is read
//! and written by value.
//!
//! # Contract
//! - A [`View`] is made only by [`Frame`] and [`Buffer`] implementors, who promise that
//!   `start..end` is readable and writable for the view's lifetime. The lifetime is a borrow of the
//!   frame, and moving the head takes the frame by `&mut`: a stale pointer does not compile.
//! - An [`At`] covers `size_of::<T>()` bytes inside such memory. `T` is plain bytes
//!   (`FromBytes + IntoBytes`), so that every content is a value.
//! - Reads and writes are unaligned: packets are aligned to nothing.
//! - In the kernel the verifier proves the same a second time. It reasons in pointers compared
//!   with the packet's end, hence the shape of [`View::at`].

use core::marker::PhantomData;
use core::ptr::NonNull;
use core::sync::atomic::{Ordering, compiler_fence};
use sluice_abi::{Hook, Lane, Reason};
use zerocopy::{FromBytes, Immutable, IntoBytes, Unaligned};

/// Plain bytes: what packets and maps hold.
pub trait Plain: FromBytes + IntoBytes + Immutable + Copy {}
impl<T: FromBytes + IntoBytes + Immutable + Copy> Plain for T {}

/// A packet whose head can move.
///
/// # Safety
/// `start..end` (end exclusive) is one allocation, readable and writable until the next call of a
/// `&mut self` method.
pub unsafe trait Frame {
    /// First byte of the Ethernet header.
    fn start(&self) -> *mut u8;
    /// One past the last byte.
    fn end(&self) -> *mut u8;
    /// Moves the first byte by `delta`: positive cuts bytes off, negative adds room (content
    /// undefined). False if there is no such room; the frame is then unchanged.
    fn adjust_head(&mut self, delta: i32) -> bool;
    /// Cuts the last `bytes` off. False if that cannot be; the frame is then unchanged.
    fn cut_tail(&mut self, bytes: u32) -> bool;
    /// Takes the `len` bytes behind the IP header (20 bytes, 40 with IPv6) out where the kernel cuts no
    /// tail that the transport header begins in; how many it took, else 0.
    fn take_options_out(&mut self, len: u32) -> u32;
    /// Whether the transport checksum at `offset` is still to be filled in behind us
    /// (CHECKSUM_PARTIAL), so that what stands there is the pseudo header's sum.
    fn is_checksum_pending(&mut self, offset: u32) -> bool;
    /// Leaves a note for TC ingress in front of the packet: hand it to interface `ifindex`.
    /// False if the driver has no room for it.
    fn hand_over_mark(&mut self, ifindex: u32) -> bool;
    /// The same: hand it to the other end of the veth `ifindex`.
    fn peer_mark(&mut self, ifindex: u32) -> bool;
    /// Adds `addresses` (pseudo header) and `ports` to the transport checksum at `offset` bytes
    /// from the start; `udp` keeps a zero checksum zero (RFC 768).
    fn transport_checksum(&mut self, offset: usize, addresses: u16, ports: u16, udp: bool) -> bool;
    /// Adds `delta` to the sum of the packet's bytes, where a driver has told it (CHECKSUM_COMPLETE).
    fn packet_sum(&mut self, delta: u16);
    /// Interface on which the packet arrived.
    fn ingress_ifindex(&self) -> u32;
    /// One's complement sum of `len` bytes from byte `offset` on, wherever they lie; 0 if they are
    /// not there or more than 16 KiB. Slow: it reads them all.
    fn sum(&self, offset: u32, len: u32) -> u16;
    /// Lets the program of `lane` go on with the packet, which is untouched. In the kernel this does
    /// not come back unless there is no such program (tail call); then, and only then, false.
    fn change_lane(&mut self, hook: Hook, lane: Lane) -> bool;

    /// Bytes of payload in each of the segments that were merged into this packet (`gso_size`), 0 if it
    /// is one.
    #[inline(always)]
    fn segment(&self) -> u32 {
        0
    }

    /// Makes room for `len` bytes of outer headers, Ethernet included, of IPv4 or IPv6, in front of the
    /// Ethernet header (content undefined). False if there is no such room; the frame is then
    /// unchanged.
    #[inline(always)]
    fn wrap(&mut self, len: u32, _v4: bool) -> bool {
        self.adjust_head((len as i32).wrapping_neg())
    }

    /// Bytes of the packet. More than `start..end` where a part lies elsewhere (page fragments).
    #[inline(always)]
    fn packet_len(&self) -> usize {
        (self.end() as usize).wrapping_sub(self.start() as usize)
    }

    /// Whether bytes of the packet lie beyond `start..end`, in other buffers.
    fn is_split(&self) -> bool;

    /// The bytes from the Ethernet header on.
    #[inline(always)]
    fn view(&self) -> View<'_> {
        let (start, end, len) = (self.start(), self.end(), self.packet_len());
        View { start, end, len, segment: self.segment(), life: PhantomData }
    }
}

/// Bytes of a packet.
#[derive(Clone, Copy)]
pub struct View<'a> {
    start: *mut u8,
    end: *mut u8,
    len: usize,
    segment: u32,
    life: PhantomData<&'a ()>,
}

impl<'a> View<'a> {
    /// The `T` at the view's first byte, if it is all there.
    #[inline(always)]
    pub fn at<T: Plain>(self) -> Option<At<'a, T>> {
        if self.start.wrapping_add(size_of::<T>()) > self.end {
            return None;
        }
        // SAFETY: `size_of::<T>()` bytes from `start` on lie inside the view, as was just checked.
        Some(unsafe { At::from_ptr(self.start.cast()) })
    }

    /// The view from `bytes` further on; may be beyond the end, then [`View::at`] finds nothing.
    #[inline(always)]
    pub fn skip(self, bytes: usize) -> Self {
        let (start, len) = (self.start.wrapping_add(bytes), self.len.wrapping_sub(bytes));
        Self { start, len, ..self }
    }

    /// The `T` at the view's first byte; `why` if the packet has no such bytes.
    ///
    /// # Errors
    /// `why`; `NotLinear` if the bytes are there, but not in the first buffer.
    #[inline(always)]
    pub fn need<T: Plain>(self, why: Reason) -> Result<At<'a, T>, Reason> {
        match self.at::<T>() {
            Some(at) => Ok(at),
            // Signed: a view may begin beyond the end.
            None if self.len as isize >= size_of::<T>() as isize => Err(Reason::NotLinear),
            None => Err(why),
        }
    }

    /// Whether the packet goes on beyond reach.
    #[inline(always)]
    pub fn is_split(self) -> bool {
        // Opaque, or LLVM compares the end with start plus length, in 32 bits.
        let linear = opaque((self.end as u64).wrapping_sub(self.start as u64));
        (linear as i64) < self.len as i64
    }

    /// Bytes of payload in each of the merged segments, 0 if the packet is one ([`Frame::segment`]).
    #[inline(always)]
    pub fn segment(self) -> u32 {
        self.segment
    }

    /// Bytes of the packet from the view's first on, those beyond reach included; wraps if it begins beyond the end, so compare only after an
    /// [`View::at`] that succeeded.
    #[inline(always)]
    #[expect(clippy::len_without_is_empty, reason = "a packet's length, not a collection's")]
    pub fn len(self) -> usize {
        self.len
    }
}

/// A checked place of a `T` in a packet or in a map value.
pub struct At<'a, T> {
    place: NonNull<T>,
    life: PhantomData<&'a ()>,
}

impl<T> Clone for At<'_, T> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for At<'_, T> {}

impl<'a, T> At<'a, T> {
    /// A place that somebody else has checked: a map value from the kernel, or a host table.
    ///
    /// # Safety
    /// `place` points to a `T` that stays readable and writable for `'a`.
    #[inline(always)]
    pub const unsafe fn from_ptr(place: *mut T) -> Self {
        // SAFETY: a readable place is not null.
        Self { place: unsafe { NonNull::new_unchecked(place) }, life: PhantomData }
    }

    /// The address, for helpers of the kernel.
    #[inline(always)]
    pub const fn as_ptr(self) -> *mut T {
        self.place.as_ptr()
    }

    /// The field of type `U` at `offset`; use the macro [`field!`](crate::field), which gets both
    /// from the field's name. `_typed` only names the type.
    ///
    /// # Panics
    /// If the field is not inside `T`; never with the macro, and folded away when compiled.
    #[inline(always)]
    pub fn part<U>(self, offset: usize, _typed: fn(&T) -> &U) -> At<'a, U> {
        if offset + size_of::<U>() > size_of::<T>() {
            outside();
        }
        // SAFETY: inside `T`, as was just checked.
        unsafe { At::from_ptr(self.place.as_ptr().cast::<u8>().wrapping_add(offset).cast()) }
    }
}

/// Reached only by a wrong use of [`At::part`], which the compiler folds away.
#[cold]
fn outside() {
    panic!("field outside its struct");
}

impl<'a, T: Plain> At<'a, T> {
    /// The value.
    #[inline(always)]
    pub fn get(self) -> T {
        // SAFETY: the type's contract: `place` was checked for `size_of::<T>()` bytes when this
        // was made, and every bit pattern is a `T`.
        unsafe { self.as_ptr().read_unaligned() }
    }

    /// The value as a key for a lookup. Only while nobody writes it: a place of this CPU alone.
    #[inline(always)]
    pub fn as_key(&self) -> &'a T
    where
        T: Unaligned,
    {
        // SAFETY: as in `get`; the memory is this CPU's, which asks for nothing else meanwhile.
        unsafe { self.place.as_ref() }
    }

    /// Writes `value`.
    #[inline(always)]
    pub fn set(self, value: T) {
        // SAFETY: as in `get`; the memory is writable by the contract.
        unsafe { self.as_ptr().write_unaligned(value) }
    }

    /// Copies the value of another place, word by word and without a stop on the stack.
    #[inline(always)]
    pub fn copy_from(self, other: At<'_, T>) {
        let size = size_of::<T>();
        let mut done = 0;
        while done + 8 <= size {
            self.copy_part::<u64>(other, done);
            done += 8;
        }
        if done + 4 <= size {
            self.copy_part::<u32>(other, done);
            done += 4;
        }
        if done + 2 <= size {
            self.copy_part::<u16>(other, done);
            done += 2;
        }
        if done < size {
            self.copy_part::<u8>(other, done);
        }
    }

    #[inline(always)]
    fn copy_part<W>(self, other: At<'_, T>, at: usize) {
        let from = other.as_ptr().cast::<u8>().wrapping_add(at).cast::<W>();
        let to = self.as_ptr().cast::<u8>().wrapping_add(at).cast::<W>();
        // SAFETY: `at + size_of::<W>() <= size_of::<T>()` by the loop above, and both places were
        // checked for `size_of::<T>()` bytes of plain data.
        unsafe { to.write_unaligned(from.read_unaligned()) }
    }
}

impl<'a, T: Plain, const N: usize> At<'a, [T; N]> {
    /// Element `index % N`; `N` is a power of two.
    #[inline(always)]
    pub fn element(self, index: u32) -> At<'a, T> {
        const { assert!(N.is_power_of_two()) };
        let offset = (index as usize & (N - 1)) * size_of::<T>();
        // SAFETY: inside the array, because the index was masked.
        unsafe { At::from_ptr(self.place.as_ptr().cast::<u8>().wrapping_add(offset).cast()) }
    }
}

/// Words that are read and written here and now.
macro_rules! now {
    ($word:ty) => {
        impl At<'_, $word> {
            /// The value, read here and now: never merged with another read.
            #[inline(always)]
            pub fn get_now(self) -> $word {
                // SAFETY: as in `get`; words in maps are aligned.
                unsafe { self.as_ptr().read_volatile() }
            }

            /// Writes `value` here and now: after everything before it, before everything after.
            #[inline(always)]
            pub fn set_now(self, value: $word) {
                compiler_fence(Ordering::SeqCst);
                // SAFETY: as in `set`; words in maps are aligned.
                unsafe { self.as_ptr().write_volatile(value) };
                compiler_fence(Ordering::SeqCst);
            }
        }
    };
}
now!(u8);
now!(u32);
now!(u64);

/// Words that several CPUs change at once.
macro_rules! replace_if {
    ($word:ty, $atomic:ident, $class:ident, $accumulator:tt, $instruction:literal) => {
        impl At<'_, $word> {
            /// Replaces `old` by `new` if the word still is `old`; true if it was.
            ///
            /// # Kernel
            /// 5.12, for the atomic compare and exchange instruction (BPF_CMPXCHG).
            #[inline(always)]
            pub fn replace_if(self, old: $word, new: $word) -> bool {
                #[cfg(target_arch = "bpf")]
                {
                    let was: $word;
                    // SAFETY: `place` is an aligned word of a map value by the type's contract.
                    unsafe {
                        core::arch::asm!(
                            $instruction,
                            p = in(reg) self.as_ptr(),
                            new = in($class) new,
                            inout($accumulator) old => was,
                        );
                    }
                    was == old
                }
                #[cfg(not(target_arch = "bpf"))]
                {
                    use core::sync::atomic::$atomic;
                    // SAFETY: `place` is an aligned word by the type's contract, shared only
                    // atomically.
                    let word = unsafe { $atomic::from_ptr(self.as_ptr()) };
                    word.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst).is_ok()
                }
            }
        }
    };
}
replace_if!(u32, AtomicU32, wreg, "w0", "w0 = cmpxchg32_32({p} + 0, w0, {new})");
replace_if!(u64, AtomicU64, reg, "r0", "r0 = cmpxchg_64({p} + 0, r0, {new})");

impl At<'_, u64> {
    /// Adds to a word that only this CPU writes (per-CPU counters).
    #[inline(always)]
    pub fn add(self, n: u64) {
        self.set(self.get().wrapping_add(n));
    }
}

/// `value`, of which the compiler knows nothing. It turns arithmetic on conditions into branches,
/// and sixteen turns of a loop with five branches each are too many states for the verifier.
#[inline(always)]
pub fn opaque(value: u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    {
        let mut value = value;
        // SAFETY: a register moves to itself. An empty text would leave a line of debug
        // information without an instruction, which the kernel refuses.
        unsafe { core::arch::asm!("{0} = {0}", inout(reg) value, options(pure, nomem, nostack)) };
        value
    }
    #[cfg(not(target_arch = "bpf"))]
    core::hint::black_box(value)
}

/// The place of a field: `field!(place, Struct, name)`.
#[macro_export]
macro_rules! field {
    ($at:expr, $t:ty, $f:ident) => {
        $at.part(core::mem::offset_of!($t, $f), |t: &$t| &t.$f)
    };
}
