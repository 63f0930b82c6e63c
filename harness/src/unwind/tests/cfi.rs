use super::*;

// DW_CFA_*, DW_OP_* and registers by their numbers (DWARF 5, 7.24, 7.7.1; psABI).
const DEF_CFA: u8 = 0x0c;
const DEF_CFA_EXPRESSION: u8 = 0x0f;
const EXPRESSION: u8 = 0x10;
const UNDEFINED: u8 = 0x07;
const ADVANCE: u8 = 0x40;
const OFFSET: u8 = 0x80;
const BREG: u8 = 0x70;
const DEREF: u8 = 0x06;
const SKIP: u8 = 0x2f;
const RBX: u8 = 3;
const RBP: u8 = 6;
const RSP: u8 = 7;
const RA: u8 = 16;

/// Functions with their lengths, and what says how their frames look; one CIE for all. `is_eh` chooses the section.
fn frames(is_eh: bool, augmentation: &[u8], functions: &[(u64, u64, &[u8])], at: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut entry = |body: &[u8]| {
        let padding = (8 - (4 + body.len()) % 8) % 8;
        let start = bytes.len();
        bytes.extend(((body.len() + padding) as u32).to_le_bytes());
        bytes.extend(body);
        bytes.resize(bytes.len() + padding, 0);
        start as u32
    };
    // Version 1, augmentation, code factor 1, data factor -8, return address in column 16.
    let rules = [DEF_CFA, RSP, 8, OFFSET | RA, 1];
    let data: &[u8] = if augmentation.contains(&b'z') {
        &[1, 0x1b /* pcrel, sdata4 */]
    } else {
        &[]
    };
    let id: u32 = if is_eh { 0 } else { u32::MAX };
    let cie = [&id.to_le_bytes()[..], &[1], augmentation, &[0, 1, 0x78, RA], data, &rules].concat();
    entry(&cie);
    let mut offset = 4 + cie.len() as u64;
    offset = offset.next_multiple_of(8);
    for (start, length, instructions) in functions {
        let pointer = if is_eh { (offset as u32 + 4).to_le_bytes() } else { 0_u32.to_le_bytes() };
        let place: Vec<u8> = if is_eh {
            let relative = start.wrapping_sub(at + offset + 8) as i32;
            [&relative.to_le_bytes()[..], &(*length as u32).to_le_bytes(), &[0]].concat()
        } else {
            [start.to_le_bytes(), length.to_le_bytes()].concat()
        };
        let body = [&pointer[..], &place, instructions].concat();
        entry(&body);
        offset = (offset + 4 + body.len() as u64).next_multiple_of(8);
    }
    bytes
}

/// A function that pushes RBX, calls another, and the first of its stack.
fn three() -> [(u64, u64, &'static [u8]); 3] {
    [
        (TEXT + 0x100, 0x100, &[]),
        // After one byte the stack is 8 bytes deeper and RBX is below the return address.
        (TEXT + 0x200, 0x100, &[ADVANCE | 1, DEF_CFA, RSP, 16, OFFSET | RBX, 2]),
        (TEXT + 0x300, 0x100, &[UNDEFINED, RA]),
    ]
}

fn stack() -> Ram {
    Ram::default().text(TEXT..TEXT + 0x1000, &[]).words(STACK, &[TEXT + 0x210, 0x77, TEXT + 0x310])
}

#[test]
fn both_sections_and_a_slide() {
    for (is_eh, slide) in [(false, 0), (true, 0), (false, 0x20_0000), (true, 0x20_0000)] {
        let at = TEXT + 0x8000;
        let functions = three().map(|(start, length, rules)| (start - slide, length, rules));
        let section = match is_eh {
            true => (".eh_frame", (at, frames(true, b"zR", &functions, at - slide))),
            false => (".debug_frame", (0, frames(false, b"", &functions, 0))),
        };
        let image = Image { sections: [section].into(), slide, ..Image::default() };
        let backtrace = unwind(image, &kernel_at(TEXT + 0x100, STACK), &stack());
        assert_eq!(pcs(&backtrace), [TEXT + 0x100, TEXT + 0x210, TEXT + 0x310], "{is_eh} {slide:#x}");
        let sps: Vec<u64> = backtrace.frames.iter().map(|frame| frame.sp).collect();
        assert_eq!(sps, [STACK, STACK + 8, STACK + 24]);
        assert_eq!(backtrace.end, End::Complete);
    }
}

/// A call at a function's very end, as one that never returns: the address behind it is another function's.
#[test]
fn a_return_address_is_looked_up_by_its_call() {
    let functions: [(u64, u64, &[u8]); 3] = [
        (TEXT + 0x100, 0x100, &[]),
        (TEXT + 0x200, 0x100, &[DEF_CFA, RSP, 24]),
        (TEXT + 0x300, 0x100, &[UNDEFINED, RA]),
    ];
    let section = (".debug_frame", (0, frames(false, b"", &functions, 0)));
    let image = Image { sections: [section].into(), ..Image::default() };
    let memory = Ram::default().text(TEXT..TEXT + 0x1000, &[]).words(STACK, &[TEXT + 0x300, 0, 0, TEXT + 0x400]);
    let backtrace = unwind(image, &kernel_at(TEXT + 0x100, STACK), &memory);
    assert_eq!(pcs(&backtrace), [TEXT + 0x100, TEXT + 0x300, TEXT + 0x400]);
    assert_eq!(backtrace.end, End::Complete);
}

#[test]
fn expressions_find_frames_and_registers() {
    // The CFA stands at RBP - 8, as GCC writes it for a stack that it has aligned; the caller's RBP at *(RSP + 8).
    let aligned = [DEF_CFA_EXPRESSION, 3, BREG | RBP, 0x78, DEREF, EXPRESSION, RBP, 2, BREG | RSP, 8].to_vec();
    let functions: [(u64, u64, &[u8]); 3] =
        [(TEXT + 0x100, 0x100, &aligned), (TEXT + 0x200, 0x100, &aligned), (TEXT + 0x300, 0x100, &[UNDEFINED, RA])];
    let image =
        Image { sections: [(".debug_frame", (0, frames(false, b"", &functions, 0)))].into(), ..Image::default() };
    // The first one's CFA is STACK + 0x40, which its RBP leads to; the second has the same RBP, and so makes no progress.
    let memory = Ram::default()
        .text(TEXT..TEXT + 0x1000, &[])
        .words(STACK, &[0, STACK + 0x80])
        .words(STACK + 0x38, &[TEXT + 0x210, 0, STACK + 0x80])
        .words(STACK + 0x78, &[STACK + 0x40]);
    let registers = Registers { rbp: STACK + 0x80, ..kernel_at(TEXT + 0x110, STACK) };
    let backtrace = unwind(image, &registers, &memory);
    let caller = Frame { pc: TEXT + 0x210, sp: STACK + 0x40, kind: FrameKind::Call };
    assert_eq!(backtrace.frames[1..], [caller]);
    assert_eq!(backtrace.end, End::Lost("the stack pointer goes the wrong way"));
}

#[test]
fn an_endless_expression_is_cut_off() {
    let endless = [DEF_CFA_EXPRESSION, 3, SKIP, 0xfd, 0xff];
    let functions: [(u64, u64, &[u8]); 1] = [(TEXT + 0x100, 0x100, &endless)];
    let image =
        Image { sections: [(".debug_frame", (0, frames(false, b"", &functions, 0)))].into(), ..Image::default() };
    let backtrace = unwind(image, &kernel_at(TEXT + 0x110, STACK), &stack());
    assert_eq!(backtrace.frames.len(), 1);
    assert!(matches!(backtrace.end, End::Lost(_)));
}

/// The `S` augmentation: the frame was interrupted, and its address is that of an instruction.
#[test]
fn a_signal_frame_gives_an_exact_address() {
    for (augmentation, kind) in [(&b"zRS"[..], FrameKind::Exact), (b"zR", FrameKind::Call)] {
        let at = TEXT + 0x8000;
        let functions: [(u64, u64, &[u8]); 1] = [(TEXT + 0x100, 0x100, &[])];
        let section = (".eh_frame", (at, frames(true, augmentation, &functions, at)));
        let image = Image { sections: [section].into(), ..Image::default() };
        let backtrace = unwind(image, &kernel_at(TEXT + 0x110, STACK), &stack());
        assert_eq!(backtrace.frames[1], Frame { pc: TEXT + 0x210, sp: STACK + 8, kind });
    }
}

#[test]
fn broken_information_is_no_end_of_the_world() {
    let whole = frames(false, b"", &three(), 0);
    for at in 0..whole.len() {
        for value in [0, 0xff, whole[at] ^ 0x40] {
            let mut broken = whole.clone();
            broken[at] = value;
            broken.truncate(whole.len() - at % 3);
            let image = Image { sections: [(".debug_frame", (0, broken))].into(), ..Image::default() };
            let backtrace = unwind(image, &kernel_at(TEXT + 0x100, STACK), &stack());
            assert!((1..=MOST_FRAMES).contains(&backtrace.frames.len()));
        }
    }
}
