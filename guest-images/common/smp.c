/*
 * The other CPUs: found in the MADT, started by its wakeup mailbox if it has
 * one (ACPI 6.4, 5.2.12.19), else by INIT and SIPI.
 */
#include "guest.h"

#define MADT_ENTRIES 44
#define ENTRY_LOCAL_APIC 0
#define ENTRY_LOCAL_X2APIC 9
#define ENTRY_WAKEUP 16
#define CPU_ENABLED 1

#define MAILBOX_COMMAND 0
#define MAILBOX_APIC_ID 4
#define MAILBOX_VECTOR 8
#define COMMAND_WAKEUP 1

#define ICR_INIT 0x4500
#define ICR_STARTUP 0x4600

/* Both must pass before we give up: a debugger may hold all CPUs for minutes. */
#define PATIENCE_CYCLES (1UL << 34)
#define PATIENCE_LOOPS 1000000

struct cpu cpus[MAX_CPUS];
u32 cpu_count = 1;
static u64 mailbox;

extern const u8 trampoline_begin[], trampoline_end[];
extern const u8 ap_start[];

void ap_entered(void);

static void add_cpu(u32 apic_id, u32 flags)
{
	if (!(flags & CPU_ENABLED) || apic_id == cpus[0].apic_id)
		return;
	if (cpu_count == MAX_CPUS) {
		console_text("guest: more than 64 CPUs; the rest stay off\n");
		return;
	}
	cpus[cpu_count].id = cpu_count;
	cpus[cpu_count].apic_id = apic_id;
	cpu_count++;
}

enum start_method smp_find_cpus(void)
{
	const u8 *madt = acpi_table("APIC");
	const u8 *entry, *end;

	cpus[0].apic_id = lapic_id();
	cpus[0].online = 1;
	if (!madt)
		return START_NONE;
	end = madt + *(const u32 *)(madt + 4);
	for (entry = madt + MADT_ENTRIES; entry + 2 <= end; entry += entry[1]) {
		if (entry[1] < 2 || entry + entry[1] > end)
			break;
		if (entry[0] == ENTRY_LOCAL_APIC && entry[1] >= 8)
			add_cpu(entry[3], *(const u32 *)(entry + 4));
		else if (entry[0] == ENTRY_LOCAL_X2APIC && entry[1] >= 16)
			add_cpu(*(const u32 *)(entry + 4), *(const u32 *)(entry + 8));
		else if (entry[0] == ENTRY_WAKEUP && entry[1] >= 16)
			mailbox = *(const u64 *)(entry + 8);
	}
	if (cpu_count == 1)
		return START_NONE;
	return mailbox ? START_MAILBOX : START_SIPI;
}

int wait_for(volatile u32 *flag)
{
	u64 start = rdtsc();

	for (u64 loops = 0; !*flag; loops++) {
		if (loops > PATIENCE_LOOPS && rdtsc() - start > PATIENCE_CYCLES)
			return 0;
		pause();
	}
	return 1;
}

static void start_by_mailbox(struct cpu *cpu)
{
	*(volatile u32 *)(mailbox + MAILBOX_APIC_ID) = cpu->apic_id;
	*(volatile u64 *)(mailbox + MAILBOX_VECTOR) = (u64)ap_start;
	*(volatile u16 *)(mailbox + MAILBOX_COMMAND) = COMMAND_WAKEUP;
}

/* Puts the real-mode code where a SIPI starts it; again is harmless. */
void smp_place_trampoline(void)
{
	volatile u8 *to = (volatile u8 *)TRAMPOLINE;

	for (const u8 *from = trampoline_begin; from < trampoline_end; from++)
		*to++ = *from;
}

void smp_start_by_sipi(struct cpu *cpu)
{
	lapic_ipi(cpu->apic_id, ICR_INIT);
	lapic_ipi(cpu->apic_id, ICR_STARTUP | TRAMPOLINE >> 12);
}

void smp_start_others(enum start_method method)
{
	if (method == START_SIPI)
		smp_place_trampoline();
	lapic_enable();
	for (u32 i = 1; i < cpu_count && method != START_NONE; i++) {
		if (method == START_MAILBOX) {
			start_by_mailbox(&cpus[i]);
			wait_for(&cpus[i].online); /* the mailbox has one place */
		} else {
			smp_start_by_sipi(&cpus[i]);
		}
	}
	for (u32 i = 1; i < cpu_count && method == START_SIPI; i++)
		wait_for(&cpus[i].online);
}

/* From ap_start, on the new CPU's own stack: which one of cpus[] are we? */
void ap_entered(void)
{
	u32 apic_id = lapic_id();

	for (u32 i = 1; i < cpu_count; i++) {
		if (cpus[i].apic_id != apic_id)
			continue;
		lapic_enable();
		cpus[i].online = 1;
		ap_main(&cpus[i]);
	}
}
