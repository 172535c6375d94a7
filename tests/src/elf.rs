//! What an object's programs contain, read from its instructions: helpers, calls, stack.
//!
//! Instruction format: kernel Documentation/bpf/standardization/instruction-set.rst.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use object::{Object as _, ObjectSection, ObjectSymbol, SectionIndex, SymbolKind};

/// Ids of helpers (include/uapi/linux/bpf.h, `___BPF_FUNC_MAPPER`).
pub mod helper {
    /// Those that sum a whole packet up: only for programs that are reached by a tail call.
    pub const SUMS: [u32; 2] = [28, 189];
    /// Those that the way of a packet may never call, with their names. `l4_csum_replace` is not one
    /// of them: at TC only the kernel knows whether a checksum is still to be filled in.
    pub const FORBIDDEN: [(u32, &str); 13] = [
        (2, "map_update_elem"),
        (3, "map_delete_elem"),
        (5, "ktime_get_ns"),
        (7, "get_prandom_u32"),
        (10, "l3_csum_replace"),
        (28, "csum_diff"),
        (69, "fib_lookup"),
        (125, "ktime_get_boot_ns"),
        (160, "ktime_get_coarse_ns"),
        (189, "xdp_load_bytes"),
        (190, "xdp_store_bytes"),
        (195, "map_lookup_percpu_elem"),
        (208, "ktime_get_tai_ns"),
    ];
    /// `bpf_map_lookup_elem`.
    pub const MAP_LOOKUP: u32 = 1;
    /// `bpf_jiffies64`: replaced by a load of the counter by the verifier.
    pub const JIFFIES64: u32 = 118;
    /// `bpf_spin_lock`.
    pub const SPIN_LOCK: u32 = 93;
}

/// What a program, with everything that it calls, contains.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Contents {
    /// Places that call a helper, by its id.
    pub helpers: BTreeMap<u32, u32>,
    /// Places that call a function of the object.
    pub calls: u32,
    /// Functions that are reached, the program first.
    pub functions: Vec<String>,
    /// Bytes of stack on the deepest way.
    pub stack: u32,
}

impl Contents {
    /// Places that call a helper.
    pub fn helper_calls(&self) -> u32 {
        self.helpers.values().sum()
    }
}

struct Function {
    name: String,
    helpers: BTreeMap<u32, u32>,
    callees: Vec<(SectionIndex, u64)>,
    stack: u32,
}

/// The functions of an object, by section and offset.
pub struct Object {
    functions: BTreeMap<(usize, u64), Function>,
}

impl Object {
    /// Reads an ELF object of BPF programs.
    ///
    /// # Panics
    /// If it is none.
    pub fn read(elf: &[u8]) -> Self {
        let file = object::File::parse(elf).expect("an ELF object");
        let mut functions = BTreeMap::new();
        for symbol in file.symbols().filter(|s| s.kind() == SymbolKind::Text) {
            let Some(index) = symbol.section_index() else { continue };
            let section = file.section_by_index(index).expect("the symbol's section");
            let data = section.data().expect("section data");
            let (from, to) = (symbol.address(), symbol.address() + symbol.size());
            let code = data.get(from as usize..to as usize).expect("the function's bytes");
            let relocations: HashMap<u64, _> = section.relocations().collect();
            let name = symbol.name().expect("a name").to_owned();
            let function = Function::read(name, code, from, index, |offset, distance| {
                let Some(relocation) = relocations.get(&offset) else {
                    return (index, offset.wrapping_add_signed((distance + 1) * 8));
                };
                let object::RelocationTarget::Symbol(target) = relocation.target() else {
                    panic!("a call that is relocated to no symbol");
                };
                let target = file.symbol_by_index(target).expect("the called symbol");
                let home = target.section_index().expect("the called symbol's section");
                match target.kind() {
                    SymbolKind::Section => (home, ((distance + 1) * 8) as u64),
                    _ => (home, target.address()),
                }
            });
            functions.insert((index.0, from), function);
        }
        Self { functions }
    }

    /// Names of the functions that nothing calls but the kernel: the programs.
    pub fn programs(&self) -> BTreeSet<&str> {
        let called: BTreeSet<_> = self
            .functions
            .values()
            .flat_map(|f| f.callees.iter().map(|(section, at)| (section.0, *at)))
            .collect();
        self.functions
            .iter()
            .filter(|(place, f)| !called.contains(place) && !f.name.starts_with("mem"))
            .map(|(_, f)| f.name.as_str())
            .collect()
    }

    /// What `program` contains.
    ///
    /// # Panics
    /// If there is no such program.
    pub fn contents(&self, program: &str) -> Contents {
        let (place, _) = self
            .functions
            .iter()
            .find(|(_, f)| f.name == program)
            .unwrap_or_else(|| panic!("no program {program}"));
        let mut contents = Contents::default();
        contents.stack = self.visit(*place, &mut contents);
        contents
    }

    /// Adds a function and what it calls; the stack that they take together.
    fn visit(&self, place: (usize, u64), contents: &mut Contents) -> u32 {
        let function =
            self.functions.get(&place).unwrap_or_else(|| panic!("a call into nothing: {place:?}"));
        let first = !contents.functions.contains(&function.name);
        if first {
            contents.functions.push(function.name.clone());
            contents.calls += function.callees.len() as u32;
            for (id, places) in &function.helpers {
                *contents.helpers.entry(*id).or_default() += places;
            }
        }
        let below = function.callees.iter().map(|(s, at)| self.visit((s.0, *at), contents)).max();
        function.stack + below.unwrap_or_default()
    }
}

impl Function {
    fn read(
        name: String,
        code: &[u8],
        start: u64,
        _section: SectionIndex,
        callee: impl Fn(u64, i64) -> (SectionIndex, u64),
    ) -> Self {
        const CALL: u8 = 0x85;
        const LOAD_WIDE: u8 = 0x18;
        const MOVE: u8 = 0xbf;
        const ADD: u8 = 0x07;
        const FRAME: u8 = 10;
        let little = cfg!(target_endian = "little");
        let mut function = Self { name, helpers: BTreeMap::new(), callees: Vec::new(), stack: 0 };
        // Registers that hold the frame's address.
        let mut frame = [false; 16];
        let mut deepest = 0i64;
        let mut skip = false;
        for (i, instruction) in code.chunks_exact(8).enumerate() {
            if std::mem::take(&mut skip) {
                continue;
            }
            let (dst, src) = if little {
                (instruction[1] & 0xf, instruction[1] >> 4)
            } else {
                (instruction[1] >> 4, instruction[1] & 0xf)
            };
            let off = i16::from_ne_bytes([instruction[2], instruction[3]]);
            let imm = i32::from_ne_bytes(instruction[4..8].try_into().expect("four bytes"));
            let offset = start + i as u64 * 8;
            match (instruction[0], src) {
                (LOAD_WIDE, _) => skip = true,
                (CALL, 0) => *function.helpers.entry(imm.cast_unsigned()).or_default() += 1,
                (CALL, 1) => function.callees.push(callee(offset, imm.into())),
                (MOVE, FRAME) => frame[dst as usize] = true,
                (ADD, _) if frame[dst as usize] => {
                    deepest = deepest.min(imm.into());
                    frame[dst as usize] = false;
                }
                (op, _) => {
                    // LDX reads through src; ST and STX write through dst.
                    let base = match op & 7 {
                        1 => Some(src),
                        2 | 3 => Some(dst),
                        _ => None,
                    };
                    if base == Some(FRAME) {
                        deepest = deepest.min(off.into());
                    }
                }
            }
        }
        // The kernel rounds up (check_max_stack_depth_subprog in kernel/bpf/verifier.c).
        function.stack = (deepest.unsigned_abs() as u32).max(1).next_multiple_of(16);
        function
    }
}
