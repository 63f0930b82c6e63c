/* The local APIC, in the mode in which the VMM left it. */
#include "guest.h"

#define MSR_APIC_BASE 0x1b
#define APIC_BASE_X2APIC (1UL << 10)
#define APIC_BASE_ADDRESS 0xffffff000UL

#define REG_ID 0x20
#define REG_SPURIOUS 0xf0
#define REG_ICR_LOW 0x300
#define REG_ICR_HIGH 0x310

#define REG_LVT_TIMER 0x320
#define REG_TIMER_INITIAL 0x380
#define REG_TIMER_DIVIDE 0x3e0

#define MSR_X2APIC 0x800
#define SOFTWARE_ENABLE 0x100
#define SPURIOUS_VECTOR 0xff
#define TIMER_PERIODIC (1 << 17)
#define DIVIDE_BY_1 0xb

static int x2apic(void)
{
	return (rdmsr(MSR_APIC_BASE) & APIC_BASE_X2APIC) != 0;
}

static u64 xapic(void)
{
	return rdmsr(MSR_APIC_BASE) & APIC_BASE_ADDRESS;
}

static void write_register(u32 reg, u32 value)
{
	if (x2apic())
		wrmsr(MSR_X2APIC + reg / 16, value);
	else
		write32(xapic() + reg, value);
}

void lapic_enable(void)
{
	write_register(REG_SPURIOUS, SOFTWARE_ENABLE | SPURIOUS_VECTOR);
}

void lapic_timer(u8 vector, u32 cycles)
{
	write_register(REG_TIMER_DIVIDE, DIVIDE_BY_1);
	write_register(REG_LVT_TIMER, TIMER_PERIODIC | vector);
	write_register(REG_TIMER_INITIAL, cycles);
}

u32 lapic_id(void)
{
	if (x2apic())
		return (u32)rdmsr(MSR_X2APIC + REG_ID / 16);
	return read32(xapic() + REG_ID) >> 24;
}

void lapic_ipi(u32 apic_id, u32 low_word)
{
	if (x2apic()) {
		wrmsr(MSR_X2APIC + REG_ICR_LOW / 16, (u64)apic_id << 32 | low_word);
	} else {
		write32(xapic() + REG_ICR_HIGH, apic_id << 24);
		write32(xapic() + REG_ICR_LOW, low_word);
	}
}
