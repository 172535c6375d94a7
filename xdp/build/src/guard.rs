//! What a BPF object may not contain. Checked on every build, because each finding either fails at
//! load time on somebody else's machine or costs time on every packet, silently.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use object::{Object, ObjectSection, ObjectSymbol, SectionKind, SymbolKind, SymbolSection};

use crate::{Error, io_error};

/// Functions of `compiler_builtins` that LLVM calls when it does not expand a copy, fill or
/// comparison inline. In BPF each is a call of a loop over single bytes.
const BYTE_LOOPS: [&str; 5] = ["memset", "memcpy", "memmove", "memcmp", "bcmp"];

/// Where rustc puts code that ends in a panic.
const PANIC_SECTION: &str = ".text.unlikely";

/// Reads the object at `path` and refuses it when it holds panic code or byte loops.
///
/// # Errors
/// [`Error::Refused`] with every finding, [`Error::NotElf`], [`Error::Io`].
pub(crate) fn check(path: &Path) -> Result<(), Error> {
    let data = fs::read(path).map_err(|e| io_error("read", path, e))?;
    let findings =
        findings(&data).map_err(|source| Error::NotElf { path: path.to_path_buf(), source })?;
    if findings.is_empty() {
        Ok(())
    } else {
        Err(Error::Refused { path: path.to_path_buf(), findings })
    }
}

/// One line for each thing that may not be there; empty for a good object.
fn findings(elf: &[u8]) -> object::Result<Vec<String>> {
    let file = object::File::parse(elf)?;
    let mut findings = Vec::new();
    for section in file.sections() {
        let name = section.name()?;
        if name.starts_with(PANIC_SECTION) {
            findings.push(format!(
                "section {name}: code that can panic (an index, a division or an overflow check); \
                 libbpf refuses the object and the verifier the program. Use `get`, a mask, or a \
                 test before the operation"
            ));
            continue;
        }
        if section.kind() != SectionKind::Text {
            continue;
        }
        for (offset, callee) in calls(&file, &section)? {
            let caller = function_at(&file, section.index(), offset).unwrap_or("?");
            if callee.contains("panicking") {
                findings.push(format!(
                    "section {name}, function {caller}, byte {offset:#x}: may panic ({callee})"
                ));
            }
            // aya-ebpf links the byte loops into every object; they may call each other.
            if is_byte_loop(callee) && !is_byte_loop(caller) {
                findings.push(format!(
                    "section {name}, function {caller}, byte {offset:#x}: calls {callee}, a loop \
                     over single bytes. Copy or compare naturally aligned integers of 2, 4 or 8 \
                     bytes"
                ));
            }
        }
    }
    Ok(findings)
}

/// Offset and callee of every BPF-to-BPF call in a section.
fn calls<'a>(
    file: &object::File<'a>,
    section: &object::Section<'a, '_>,
) -> object::Result<Vec<(u64, &'a str)>> {
    /// `BPF_JMP | BPF_CALL` and `BPF_PSEUDO_CALL` (include/uapi/linux/bpf.h).
    const CALL: u8 = 0x85;
    const PSEUDO_CALL: u8 = 1;

    let relocations: HashMap<u64, _> = section.relocations().collect();
    let mut calls = Vec::new();
    for (index, instruction) in section.data()?.chunks_exact(8).enumerate() {
        let offset = index as u64 * 8;
        let source_register =
            if file.is_little_endian() { instruction[1] >> 4 } else { instruction[1] & 0xf };
        if instruction[0] != CALL || source_register != PSEUDO_CALL {
            continue;
        }
        let bytes = [instruction[4], instruction[5], instruction[6], instruction[7]];
        let distance = i64::from(if file.is_little_endian() {
            i32::from_le_bytes(bytes)
        } else {
            i32::from_be_bytes(bytes)
        });
        // A global callee is named by a relocation. A local one is an instruction offset from the
        // next instruction, or from the start of the section whose symbol the relocation holds.
        let callee = match relocations.get(&offset).map(|r| r.target()) {
            Some(object::RelocationTarget::Symbol(index)) => {
                let symbol = file.symbol_by_index(index)?;
                match (symbol.kind(), symbol.section_index()) {
                    (SymbolKind::Section, Some(home)) => {
                        function_at(file, home, (distance + 1).cast_unsigned().wrapping_mul(8))
                    }
                    _ => Some(symbol.name()?),
                }
            }
            _ => {
                let target = offset.wrapping_add((distance + 1).cast_unsigned().wrapping_mul(8));
                function_at(file, section.index(), target)
            }
        };
        calls.push((offset, callee.unwrap_or("?")));
    }
    Ok(calls)
}

/// Whether `name` is one of [`BYTE_LOOPS`]; mangled names of `compiler_builtins` count as well.
fn is_byte_loop(name: &str) -> bool {
    BYTE_LOOPS.contains(&name)
        || (name.contains("compiler_builtins")
            && BYTE_LOOPS.iter().any(|builtin| name.contains(builtin)))
}

/// Name of the function that covers `offset` in a section.
fn function_at<'a>(
    file: &object::File<'a>,
    section: object::SectionIndex,
    offset: u64,
) -> Option<&'a str> {
    file.symbols()
        .filter(|s| s.kind() == SymbolKind::Text && s.section() == SymbolSection::Section(section))
        .find(|s| (s.address()..s.address() + s.size()).contains(&offset))
        .and_then(|s| s.name().ok())
}

#[cfg(test)]
mod tests {
    use object::elf::R_BPF_64_32;
    use object::write::{Object, Relocation, SectionId, Symbol, SymbolId, SymbolSection};
    use object::{Architecture, BinaryFormat, Endianness, RelocationFlags};
    use object::{SectionKind, SymbolFlags, SymbolKind, SymbolScope};

    use super::findings;

    const EXIT: [u8; 8] = [0x95, 0, 0, 0, 0, 0, 0, 0];
    /// A call of helper 1, which is no BPF-to-BPF call.
    const HELPER: [u8; 8] = [0x85, 0, 0, 0, 1, 0, 0, 0];

    /// A BPF-to-BPF call with the given distance in instructions.
    fn call(distance: i32) -> [u8; 8] {
        let [a, b, c, d] = distance.to_le_bytes();
        [0x85, 0x10, 0, 0, a, b, c, d]
    }

    /// An object file in the making.
    struct Elf(Object<'static>);

    impl Elf {
        fn new() -> Self {
            Self(Object::new(BinaryFormat::Elf, Architecture::Bpf, Endianness::Little))
        }

        fn section(&mut self, name: &str) -> SectionId {
            self.0.add_section(Vec::new(), name.into(), SectionKind::Text)
        }

        fn function(&mut self, section: SectionId, name: &str, code: &[[u8; 8]]) -> SymbolId {
            let symbol = self.0.add_symbol(Symbol {
                name: name.into(),
                value: 0,
                size: 0,
                kind: SymbolKind::Text,
                scope: SymbolScope::Linkage,
                weak: false,
                section: SymbolSection::Undefined,
                flags: SymbolFlags::None,
            });
            self.0.add_symbol_data(symbol, section, &code.concat(), 8);
            symbol
        }

        fn relocate(&mut self, section: SectionId, offset: u64, symbol: SymbolId) {
            let flags = RelocationFlags::Elf { r_type: R_BPF_64_32 };
            let relocation = Relocation { offset, symbol, addend: 0, flags };
            self.0.add_relocation(section, relocation).expect("a BPF relocation");
        }

        fn findings(self) -> Vec<String> {
            findings(&self.0.write().expect("an ELF file")).expect("readable")
        }
    }

    #[test]
    fn object_with_helpers_and_own_functions_is_good() {
        let mut elf = Elf::new();
        let text = elf.section(".text");
        let own = elf.function(text, "own", &[EXIT]);
        let xdp = elf.section("xdp");
        elf.function(xdp, "xdp_node", &[HELPER, call(-1), EXIT]);
        elf.relocate(xdp, 8, own);
        assert_eq!(elf.findings(), [""; 0]);
    }

    #[test]
    fn byte_loops_that_only_call_each_other_are_no_finding() {
        let mut elf = Elf::new();
        let text = elf.section(".text");
        let memcpy = elf.function(text, "memcpy", &[EXIT]);
        elf.function(text, "memmove", &[call(-1), EXIT]);
        elf.relocate(text, 8, memcpy);
        assert_eq!(elf.findings(), [""; 0]);
    }

    #[test]
    fn call_of_a_byte_loop_is_refused_with_its_caller() {
        for name in super::BYTE_LOOPS {
            let mut elf = Elf::new();
            let text = elf.section(".text");
            let byte_loop = elf.function(text, name, &[EXIT]);
            let xdp = elf.section("xdp");
            elf.function(xdp, "first", &[EXIT]);
            elf.function(xdp, "second", &[HELPER, call(-1), EXIT]);
            elf.relocate(xdp, 16, byte_loop);
            let findings = elf.findings();
            let [finding] = findings.as_slice() else { panic!("{name}: {findings:?}") };
            for word in ["section xdp", "function second", "0x10", name] {
                assert!(finding.contains(word), "{word:?} is not in {finding:?}");
            }
        }
    }

    #[test]
    fn local_call_without_relocation_is_followed_backwards_and_forwards() {
        for (code, distance) in [(["memset", "own"], -3), (["own", "memset"], 1)] {
            let mut elf = Elf::new();
            let text = elf.section(".text");
            for name in code {
                let body = if name == "own" { [call(distance), EXIT] } else { [HELPER, EXIT] };
                elf.function(text, name, &body);
            }
            let findings = elf.findings();
            assert_eq!(findings.len(), 1, "{findings:?}");
            assert!(findings[0].contains("function own"), "{findings:?}");
            assert!(findings[0].contains("calls memset"), "{findings:?}");
        }
    }

    #[test]
    fn call_through_a_section_symbol_is_followed() {
        let mut elf = Elf::new();
        let text = elf.section(".text");
        elf.function(text, "own", &[EXIT]);
        elf.function(text, "memcpy", &[EXIT]);
        let section_symbol = elf.0.section_symbol(text);
        let xdp = elf.section("xdp");
        elf.function(xdp, "xdp_node", &[call(0), EXIT]);
        elf.relocate(xdp, 0, section_symbol);
        let findings = elf.findings();
        assert_eq!(findings.len(), 1, "{findings:?}");
        assert!(findings[0].contains("calls memcpy"), "{findings:?}");
    }

    #[test]
    fn panic_code_is_refused_and_whoever_reaches_it_is_named() {
        let mut elf = Elf::new();
        let unlikely = elf.section(".text.unlikely.");
        let panic = elf.function(unlikely, "core9panicking9panic_fmt", &[EXIT]);
        let xdp = elf.section("xdp");
        elf.function(xdp, "xdp_node", &[call(-1), EXIT]);
        elf.relocate(xdp, 0, panic);
        let text = elf.findings().join("\n");
        assert!(text.contains("section .text.unlikely."), "{text}");
        assert!(text.contains("function xdp_node"), "{text}");
    }
}
