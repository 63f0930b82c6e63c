/*
 * The guest expects no exception. A debug exception or a breakpoint that
 * reaches it anyway is counted: a debugger below must never let one through.
 */
#include "guest.h"

struct trap_frame {
	u64 r11, r10, r9, r8, rdi, rsi, rdx, rcx, rax;
	u64 vector, error;
	u64 rip, cs, rflags, rsp, ss;
};

struct gate {
	u16 offset_low, selector;
	u8 stack, type;
	u16 offset_middle;
	u32 offset_high, reserved;
};

#define STUB_SIZE 16
#define GATE_INTERRUPT 0x8e

extern const u8 trap_stubs[];
struct gate idt[32];

volatile u64 debug_exceptions_seen;
volatile u64 breakpoint_exceptions_seen;
volatile u64 nmis_seen;

void traps_init(void);
void trap(struct trap_frame *frame);

/* Before the first CPU takes an exception: all CPUs share this IDT. */
void traps_init(void)
{
	for (u32 vector = 0; vector < 32; vector++) {
		u64 stub = (u64)trap_stubs + vector * STUB_SIZE;
		idt[vector] = (struct gate){
			.offset_low = (u16)stub,
			.selector = SEL_CODE,
			.type = GATE_INTERRUPT,
			.offset_middle = (u16)(stub >> 16),
			.offset_high = (u32)(stub >> 32),
		};
	}
}

static void increment(volatile u64 *counter)
{
	__asm__ volatile("lock incq %0" : "+m"(*counter) : : "memory");
}

void trap(struct trap_frame *frame)
{
	u64 cr2;

	switch (frame->vector) {
	case 1:
		increment(&debug_exceptions_seen);
		frame->rflags &= ~0x100UL; /* a leaked TF would come back for ever */
		return;
	case 2:
		increment(&nmis_seen);
		return;
	case 3:
		increment(&breakpoint_exceptions_seen);
		return;
	}
	__asm__ volatile("movq %%cr2, %0" : "=r"(cr2));
	console_text("\nguest: exception ");
	console_number(frame->vector);
	console_text(" error ");
	console_hex(frame->error);
	console_text(" at rip ");
	console_hex(frame->rip);
	console_text(" cr2 ");
	console_hex(cr2);
	console_text("\n");
	guest_exit(STATUS_EXCEPTION);
}
