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
    let findings = findings(&data).map_err(|source| Error::NotElf {
        path: path.to_path_buf(),
        source,
    })?;
    if findings.is_empty() {
        Ok(())
    } else {
        Err(Error::Refused {
            path: path.to_path_buf(),
            findings,
        })
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
        let source_register = if file.is_little_endian() {
            instruction[1] >> 4
        } else {
            instruction[1] & 0xf
        };
        if instruction[0] != CALL || source_register != PSEUDO_CALL {
            continue;
        }
        let bytes = [
            instruction[4],
            instruction[5],
            instruction[6],
            instruction[7],
        ];
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
