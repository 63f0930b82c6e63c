use super::super::orc::Format;
use super::*;

const ADDRESSES: u64 = TEXT + 0x10_0000;
const ENTRIES: u64 = TEXT + 0x20_0000;

// ORC_REG_*
const SP: u8 = 5;
const BP: u8 = 4;
const R10: u8 = 6;
const R13: u8 = 7;
const DX: u8 = 2;
const DI: u8 = 3;
const BP_INDIRECT: u8 = 8;
const SP_INDIRECT: u8 = 9;
const PREV_SP: u8 = 1;

/// An entry, without its encoding.
#[derive(Debug, Clone, Copy)]
struct Row {
    at: u64,
    kind: Kind,
    sp: (u8, i16),
    bp: (u8, i16),
    signal: bool,
}

fn row(at: u64, kind: Kind, register: u8, offset: i16) -> Row {
    let signal = matches!(kind, Kind::Registers | Kind::Iret);
    Row { at: TEXT + at, kind, sp: (register, offset), bp: (0, 0), signal }
}

fn call(at: u64, offset: i16) -> Row {
    row(at, Kind::Call, SP, offset)
}

fn encode(format: Format, row: &Row) -> [u8; 6] {
    let old_type = |kind| match kind {
        Kind::Undefined | Kind::End | Kind::Call => 0,
        Kind::Registers => 1,
        Kind::Iret => 2,
    };
    let (end, signal) = (u8::from(row.kind == Kind::End), u8::from(row.signal));
    let flags = match format {
        Format::V1 => old_type(row.kind) | end << 2,
        Format::V2 => old_type(row.kind) | signal << 2 | end << 3,
        Format::V3 => {
            let kind = match row.kind {
                Kind::Undefined => 0,
                Kind::End => 1,
                Kind::Call => 2,
                Kind::Registers => 3,
                Kind::Iret => 4,
            };
            kind | signal << 3
        }
    };
    let (sp, bp) = (row.sp.1.to_le_bytes(), row.bp.1.to_le_bytes());
    [sp[0], sp[1], bp[0], bp[1], row.sp.0 | row.bp.0 << 4, flags]
}

fn sections(format: Format, rows: &[Row]) -> (Vec<u8>, Vec<u8>) {
    let addresses = (0_u64..).zip(rows).flat_map(|(n, row)| {
        let relative = row.at.wrapping_sub(ADDRESSES + n * 4) as i32;
        relative.to_le_bytes()
    });
    (addresses.collect(), rows.iter().flat_map(|row| encode(format, row)).collect())
}

/// A kernel with these entries, and enough plain ones behind them to show their encoding; also an interrupt's, as
/// every kernel has some.
fn kernel(format: Format, rows: &[Row]) -> Image {
    let mut rows = rows.to_vec();
    rows.push(row(0x8_0000, Kind::Registers, SP, 8));
    rows.extend((0..20).map(|n| call(0x8_0010 + n, 8)));
    rows.push(row(0x8_0100, Kind::Undefined, 0, 0));
    let (addresses, entries) = sections(format, &rows);
    let sections = [(".orc_unwind_ip", (ADDRESSES, addresses)), (".orc_unwind", (ENTRIES, entries))];
    Image { sections: sections.into(), ..Image::default() }
}

const FORMATS: [Format; 3] = [Format::V1, Format::V2, Format::V3];
const CALLER: u64 = TEXT + 0x105;

/// Ends at [`CALLER`].
fn rows_of_caller() -> [Row; 2] {
    [row(0x100, Kind::End, 0, 0), call(0x105, 0x7ff8)]
}

fn memory() -> Ram {
    Ram::default().text(TEXT..TEXT + 0x1000, &[])
}

#[test]
fn a_call_by_each_register() {
    let regs = |rsp| Registers {
        rbp: STACK + 0x100,
        r10: STACK + 0x200,
        r13: STACK + 0x300,
        rdi: STACK + 0x400,
        rdx: STACK + 0x500,
        ..kernel_at(TEXT + 0x10, rsp)
    };
    // Where the caller's stack pointer is by each, and what of memory leads there.
    let cases = [
        ((SP, 0x48), STACK + 0x48),
        ((BP, 16), STACK + 0x110),
        ((R10, 0), STACK + 0x200),
        ((R13, 0), STACK + 0x300),
        ((DI, 0), STACK + 0x400),
        ((DX, 0), STACK + 0x500),
        ((BP_INDIRECT, -8), STACK + 0x600),
        ((SP_INDIRECT, 8), STACK + 0x708),
    ];
    for format in FORMATS {
        for ((register, offset), sp) in cases {
            let rows = [&[row(0, Kind::Call, register, offset)][..], &rows_of_caller()].concat();
            let memory =
                memory().words(STACK, &[STACK + 0x700]).words(STACK + 0xf8, &[STACK + 0x600]).words(sp - 8, &[CALLER]);
            let backtrace = unwind(kernel(format, &rows), &regs(STACK), &memory);
            let caller = Frame { pc: CALLER, sp, kind: FrameKind::Call };
            assert_eq!(backtrace.frames[1..], [caller], "{format:?}, register {register}");
            assert_eq!(backtrace.end, End::Complete, "{format:?}, register {register}");
        }
    }
}

#[test]
fn the_callers_rbp_is_followed() {
    for format in FORMATS {
        // The first has pushed it (PREV_SP - 16), the second has not touched it, the third has it below itself (BP - 8).
        let first = Row { bp: (PREV_SP, -16), ..call(0, 16) };
        let second = call(0x20, 8);
        let third = Row { bp: (BP, -8), ..row(0x40, Kind::Call, BP, 16) };
        let fourth = row(0x60, Kind::Call, BP, 0x10);
        let rows = [&[first, second, third, fourth][..], &rows_of_caller()].concat();
        let memory = memory()
            .words(STACK, &[STACK + 0x80, TEXT + 0x25, TEXT + 0x45])
            .words(STACK + 0x78, &[STACK + 0x200, 0, TEXT + 0x65])
            .words(STACK + 0x208, &[CALLER]);
        let backtrace = unwind(kernel(format, &rows), &kernel_at(TEXT + 0x10, STACK), &memory);
        assert_eq!(pcs(&backtrace), [TEXT + 0x10, TEXT + 0x25, TEXT + 0x45, TEXT + 0x65, CALLER], "{format:?}");
        assert_eq!(backtrace.end, End::Complete);
    }
}

#[test]
fn interrupts_lead_to_what_they_interrupted() {
    let other_stack = STACK - 0x800;
    for format in FORMATS {
        // A handler, called by entry code that has saved everything 8 bytes above its stack pointer.
        let rows = [&[call(0, 8), row(0x20, Kind::Registers, SP, 8), call(0x200, 8)][..], &rows_of_caller()].concat();
        let rows = {
            let mut rows = rows;
            rows.sort_by_key(|row| row.at);
            rows
        };
        let saved = Saved { ip: TEXT + 0x200, cs: 0x10, sp: other_stack, bp: 0x77 };
        let memory =
            memory().words(STACK, &[TEXT + 0x25, 0]).words(STACK + 16, &pt_regs(&saved)).words(other_stack, &[CALLER]);
        let backtrace = unwind(kernel(format, &rows), &kernel_at(TEXT + 0x10, STACK), &memory);
        assert_eq!(pcs(&backtrace), [TEXT + 0x10, TEXT + 0x25, TEXT + 0x200, CALLER], "{format:?}");
        // The very first instruction of a function: it is not looked up by the one before.
        assert_eq!(backtrace.frames[2].kind, FrameKind::Exact);
        assert_eq!(backtrace.frames[2].sp, other_stack);
        assert_eq!(backtrace.end, End::Complete);
    }
}

#[test]
fn registers_that_a_call_has_saved_are_of_a_call() {
    for format in [Format::V2, Format::V3] {
        let traced = Row { signal: false, ..row(0, Kind::Registers, SP, 0) };
        let rows = [&[traced][..], &rows_of_caller()].concat();
        let saved = Saved { ip: CALLER, cs: 0x10, sp: STACK + 0x400, bp: 0 };
        let memory = memory().words(STACK, &pt_regs(&saved));
        let backtrace = unwind(kernel(format, &rows), &kernel_at(TEXT + 0x10, STACK), &memory);
        assert_eq!(backtrace.frames[1], Frame { pc: CALLER, sp: STACK + 0x400, kind: FrameKind::Call });
        assert_eq!(backtrace.end, End::Complete, "{format:?}");
    }
}

/// Nobody has called where a new thread begins: what is right before it is another function.
#[test]
fn a_thread_that_has_not_begun_is_where_it_will_begin() {
    for format in FORMATS {
        for name in ["ret_from_fork_asm", "ret_from_fork"] {
            let rows = [call(0, 8), row(0x20, Kind::Undefined, 0, 0), row(0x40, Kind::End, 0, 0), call(0x50, 8)];
            let image = Image { symbols: [(name.to_owned(), TEXT + 0x40)].into(), ..kernel(format, &rows) };
            let backtrace = unwind(image, &kernel_at(TEXT + 0x10, STACK), &memory().words(STACK, &[TEXT + 0x40]));
            let begin = Frame { pc: TEXT + 0x40, sp: STACK + 8, kind: FrameKind::Exact };
            assert_eq!((&backtrace.frames[1..], backtrace.end), (&[begin][..], End::Complete), "{format:?}, {name}");
        }
    }
}

#[test]
fn entry_code_that_has_saved_nothing_yet() {
    for format in FORMATS {
        let rows = [&[row(0, Kind::Iret, SP, 8), row(0x80, Kind::Call, R10, 0)][..], &rows_of_caller()].concat();
        // An error code, and what the processor pushes.
        let iret = [0xdead, TEXT + 0x90, 0x10, 0x202, STACK + 0x400, 0x18];
        let memory = memory().words(STACK, &iret).words(STACK + 0x4f8, &[CALLER]);
        let mut registers = kernel_at(TEXT + 0x10, STACK);
        registers.r10 = STACK + 0x500;
        let backtrace = unwind(kernel(format, &rows), &registers, &memory);
        assert_eq!(pcs(&backtrace), [TEXT + 0x10, TEXT + 0x90, CALLER], "{format:?}");
        let from_user = [0xdead, 0x40_1234, 0x33, 0x202, 0x7fff_1000, 0x2b];
        let memory = self::memory().words(STACK, &from_user);
        let backtrace = unwind(kernel(format, &rows), &registers, &memory);
        let user = Frame { pc: 0x40_1234, sp: 0x7fff_1000, kind: FrameKind::User };
        assert_eq!((&backtrace.frames[1..], backtrace.end), (&[user][..], End::User));
    }
}

#[test]
fn entry_code_whose_registers_a_function_saves_for_it() {
    for format in FORMATS {
        // error_entry() leaves them on the stack below its own return address, of which the call's entry does not know.
        let rows = [&[call(0, 8), row(0x20, Kind::Iret, SP, 8)][..], &rows_of_caller()].concat();
        let saved = Saved { ip: 0x40_1234, cs: 0x33, sp: 0x7fff_1000, bp: 0x77 };
        let memory = memory().words(STACK, &[TEXT + 0x25]).words(STACK + 8, &pt_regs(&saved));
        let backtrace = unwind(kernel(format, &rows), &kernel_at(TEXT + 0x10, STACK), &memory);
        let user = Frame { pc: 0x40_1234, sp: 0x7fff_1000, kind: FrameKind::User };
        assert_eq!(pcs(&backtrace), [TEXT + 0x10, TEXT + 0x25, 0x40_1234], "{format:?}");
        assert_eq!((backtrace.frames[2], backtrace.end), (user, End::User));
        // It has returned, and nobody has told the entry yet.
        let memory = self::memory().words(STACK + 8, &pt_regs(&saved));
        let backtrace = unwind(kernel(format, &rows), &kernel_at(TEXT + 0x25, STACK + 8), &memory);
        assert_eq!((&backtrace.frames[1..], backtrace.end), (&[user][..], End::User), "{format:?}");
        // It has been called, and has saved nothing yet.
        let iret = [TEXT + 0x25, 0xdead, 0x40_1234, 0x33, 0x202, 0x7fff_1000, 0x2b];
        let memory = self::memory().words(STACK + 8, &iret);
        let backtrace = unwind(kernel(format, &rows), &kernel_at(TEXT, STACK + 8), &memory);
        assert_eq!((backtrace.frames[2], backtrace.end), (user, End::User), "{format:?}");
    }
}

#[test]
fn an_unsorted_table_is_sorted_and_weak_entries_come_first() {
    for format in FORMATS {
        let ended = row(0x40, Kind::Undefined, 0, 0);
        let rows = [call(0x40, 24), ended, rows_of_caller()[1], call(0, 8), rows_of_caller()[0]];
        let memory = memory().words(STACK, &[TEXT + 0x45, 0, 0, CALLER]);
        let backtrace = unwind(kernel(format, &rows), &kernel_at(TEXT + 0x3f, STACK), &memory);
        assert_eq!(pcs(&backtrace), [TEXT + 0x3f, TEXT + 0x45, CALLER], "{format:?}");
        assert_eq!(backtrace.end, End::Complete);
    }
}

#[test]
fn a_modules_table_is_read_from_guest_memory() {
    for format in FORMATS {
        let module = TEXT + 0x40_0000;
        let (addresses, entries) = sections(
            format,
            &[
                Row { at: module, ..call(0, 24) },
                Row { at: module + 0x20, ..call(0, 8) },
                Row { at: module + 0x40, ..row(0, Kind::Undefined, 0, 0) },
            ],
        );
        let memory = memory()
            .with(ADDRESSES, addresses)
            .with(ENTRIES, entries)
            .with(module, vec![0x90; 0x40])
            .words(STACK, &[0, 0, CALLER]);
        let module_struct = STACK + 0x800;
        let memory = memory.words(module_struct + 0x20, &[ENTRIES, 3 | 7 << 32, ADDRESSES]);
        // With the kernel's own table, and without: then the module's shows how it is made.
        let own = kernel(format, &rows_of_caller());
        for image in [own, Image::default()] {
            let has_own = !image.sections.is_empty();
            let image = Image { module: Some(module_struct), ..image };
            let registers = Registers { rbp: 8, ..kernel_at(module + 0x10, STACK) };
            let backtrace = unwind(image, &registers, &memory);
            assert_eq!(pcs(&backtrace), [module + 0x10, CALLER], "{format:?}");
            assert_eq!(backtrace.end == End::Complete, has_own, "{format:?} {:?}", backtrace.end);
        }
    }
}

#[test]
fn a_kernel_without_a_file_is_read_from_guest_memory() {
    for format in FORMATS {
        let image = kernel(format, &[&[call(0, 24)][..], &rows_of_caller()].concat());
        let [(_, addresses), (_, entries)] = [".orc_unwind_ip", ".orc_unwind"].map(|name| image.sections[name].clone());
        let names = [
            ("__start_orc_unwind_ip", ADDRESSES),
            ("__stop_orc_unwind_ip", ADDRESSES + addresses.len() as u64),
            ("__start_orc_unwind", ENTRIES),
        ];
        let symbols = names.map(|(name, at)| (name.to_owned(), at)).into();
        let image = Image { symbols, ..Image::default() };
        let memory = memory().with(ADDRESSES, addresses).with(ENTRIES, entries).words(STACK, &[0, 0, CALLER]);
        let backtrace = unwind(image, &kernel_at(TEXT + 0x10, STACK), &memory);
        assert_eq!((pcs(&backtrace), backtrace.end), (vec![TEXT + 0x10, CALLER], End::Complete), "{format:?}");
    }
}

/// The function tracer's own code, copied to a page: as deep in the stack as the original is at the same place.
#[test]
fn a_tracers_trampoline_is_unwound_as_what_it_is_a_copy_of() {
    let copy = TEXT + 0x70_0000;
    let original: Vec<u8> = (0..0x80).collect();
    let mut copied = original.clone();
    // A call within it leads elsewhere.
    copied[0x30] = 0xe8;
    let rows = [&[call(0, 8), call(0x20, 0xa8)][..], &rows_of_caller()].concat();
    let names = [("ftrace_caller", TEXT), ("ftrace_caller_end", TEXT + 0x80)];
    let symbols = names.map(|(name, at)| (name.to_owned(), at)).into();
    let image = Image { symbols, ..kernel(Format::V3, &rows) };
    let memory = Ram::default()
        .text(TEXT + 0x80..TEXT + 0x1000, &[])
        .with(TEXT, original)
        .words(STACK, &[0; 20])
        .words(STACK + 0xa0, &[CALLER]);
    let traced = memory.clone().with(copy, copied.clone());
    let backtrace = unwind(&image, &kernel_at(copy + 0x40, STACK), &traced);
    assert_eq!((pcs(&backtrace), backtrace.end), (vec![copy + 0x40, CALLER], End::Complete));
    // Behind its end, and if it is not a copy, nothing is known.
    copied[3] ^= 1;
    let other = memory.with(copy, copied);
    assert_eq!(unwind(&image, &kernel_at(copy + 0x40, STACK), &other).frames.len(), 1);
    let longer = traced.with(copy + 0x80, vec![0x90; 0x80]);
    assert_eq!(unwind(&image, &kernel_at(copy + 0x90, STACK), &longer).frames.len(), 1);
}

#[test]
fn what_is_not_known_is_said() {
    for format in FORMATS {
        let lost = |row: Row, memory: &Ram| {
            let image = kernel(format, &[&[row][..], &rows_of_caller()].concat());
            let backtrace = unwind(image, &kernel_at(TEXT + 0x10, STACK), memory);
            assert_eq!(backtrace.frames.len(), 1, "{format:?} {row:?}");
            match backtrace.end {
                End::Lost(why) => why,
                end => panic!("{format:?} {row:?}: {end:?}"),
            }
        };
        let stack = memory().words(STACK, &[STACK, CALLER, 0, 0]);
        assert_eq!(lost(call(0, 8), &memory()), "the stack cannot be read");
        assert_eq!(lost(row(0, Kind::Registers, SP, 0), &stack), "the stack cannot be read");
        assert_eq!(lost(call(0, 0), &stack), "the stack pointer goes the wrong way");
        assert_eq!(lost(call(0, -16), &stack), "the stack pointer goes the wrong way");
        assert_eq!(lost(call(0, 32), &stack.clone()), "the return address is not one of code");
        assert!(lost(row(0, Kind::Call, 12, 0), &stack).contains("unknown kind"));
        assert!(lost(Row { bp: (9, 0), ..call(0, 16) }, &stack).contains("unknown kind"));
        // A stack that was switched to itself.
        assert!(lost(row(0, Kind::Undefined, 0, 0), &memory()).contains("nothing is known"));
    }
}
