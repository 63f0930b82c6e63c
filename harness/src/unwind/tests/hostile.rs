use proptest::prelude::*;

use super::*;

/// Tables and memory of random bytes, near enough to each other that steps succeed now and then.
fn image() -> impl Strategy<Value = Image> {
    let bytes = |most: usize| proptest::collection::vec(any::<u8>(), 0..most);
    let near = proptest::collection::vec(-0x1000_i32..0x1000, 0..64);
    (near, bytes(400), bytes(300), bytes(300), any::<bool>(), 0..0x2000_u64).prop_map(
        |(near, orc, debug_frame, eh_frame, is_guest, slide)| {
            let addresses: Vec<u8> = near.iter().flat_map(|offset| offset.to_le_bytes()).collect();
            let mut sections = BTreeMap::from([
                (".debug_frame", (0, debug_frame)),
                (".eh_frame", (TEXT, eh_frame)),
                (".text", (TEXT, Vec::new())),
            ]);
            let mut symbols =
                BTreeMap::from([("ftrace_caller".to_owned(), TEXT), ("ftrace_caller_end".to_owned(), STACK)]);
            if is_guest {
                symbols.insert("__start_orc_unwind_ip".to_owned(), TEXT);
                symbols.insert("__stop_orc_unwind_ip".to_owned(), TEXT + slide);
                symbols.insert("__start_orc_unwind".to_owned(), STACK);
            } else {
                sections.insert(".orc_unwind_ip", (TEXT, addresses));
                sections.insert(".orc_unwind", (TEXT, orc));
            }
            Image { sections, function: TEXT..TEXT + 0x800, symbols, module: is_guest.then_some(STACK), slide }
        },
    )
}

/// Words that are likely to be taken for something.
fn word() -> impl Strategy<Value = u64> {
    prop_oneof![
        TEXT..TEXT + 0x400,
        STACK..STACK + 0x400,
        (STACK / 8..STACK / 8 + 0x80).prop_map(|word| word * 8),
        (STACK..STACK + 0x400).prop_map(|addr| addr | 1),
        any::<u64>(),
        0..0x100_u64,
        Just(u64::MAX),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn every_backtrace_ends_and_no_frame_comes_twice(
        image in image(),
        text in proptest::collection::vec(prop_oneof![Just(0xe8_u8), Just(0xff), Just(0xd0), any::<u8>()], 0x400),
        stack in proptest::collection::vec(word(), 0x80),
        values in proptest::collection::vec(word(), 16),
        user in any::<bool>(),
    ) {
        let memory = Ram::default().with(TEXT, text).words(STACK, &stack);
        let mut registers = kernel_at(values[0], values[1]);
        registers.rbp = values[2];
        registers.r10 = values[3];
        registers.r13 = values[4];
        registers.rdi = values[5];
        registers.rdx = values[6];
        registers.ss.attributes = if user { 3 << 5 } else { 0 };
        let backtrace = unwind(&image, &registers, &memory);
        prop_assert!((1..=MOST_FRAMES).contains(&backtrace.frames.len()));
        for (n, frame) in backtrace.frames.iter().enumerate() {
            prop_assert!(!backtrace.frames[..n].contains(frame));
            prop_assert!(frame.kind != FrameKind::User || n + 1 == backtrace.frames.len());
        }
        prop_assert_eq!(
            backtrace.end == End::User,
            backtrace.frames.last().is_some_and(|frame| frame.kind == FrameKind::User)
        );
    }
}

/// A stack of nothing but frames.
#[test]
fn a_stack_without_end_is_cut_off() {
    let frames: Vec<u64> = (0..1000).flat_map(|n| [STACK + (n + 1) * 16, TEXT + 0x105]).collect();
    let memory = Ram::default().text(TEXT..TEXT + 0x200, &[TEXT + 0x105]).words(STACK, &frames);
    let mut registers = kernel_at(TEXT + 0x50, STACK);
    registers.rbp = STACK;
    let backtrace = unwind(Image::default(), &registers, &memory);
    assert_eq!((backtrace.frames.len(), backtrace.end), (MOST_FRAMES, End::TooDeep));
}

/// Saved registers that lead to themselves: the only kind of step that may go down.
#[test]
fn a_circle_is_noticed() {
    let saved = Saved { ip: TEXT + 0x300, cs: 0x10, sp: STACK, bp: (STACK + 0x100) | 1 };
    let memory = Ram::default().text(TEXT..TEXT + 0x800, &[]).words(STACK + 0x100, &pt_regs(&saved));
    let mut registers = kernel_at(TEXT + 0x50, STACK);
    registers.rbp = (STACK + 0x100) | 1;
    let backtrace = unwind(Image::default(), &registers, &memory);
    assert_eq!(pcs(&backtrace), [TEXT + 0x50, TEXT + 0x300]);
    assert_eq!(backtrace.end, End::Lost("the stack leads back into itself"));
}
