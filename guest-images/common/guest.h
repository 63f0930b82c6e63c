/*
 * What every guest in this directory shares: integer types, the few
 * instructions C has no words for, and the services of common/.
 *
 * The guests run in ring 0 with general registers only. One of the KVM
 * flavours they are made for interprets ring 0, about two million instructions
 * a second, and knows neither SSE/x87 arithmetic nor popcnt; it takes lzcnt for
 * bsr and tzcnt for bsf. The crate's tests decode every .text and refuse those.
 */
#ifndef TRAPLINE_GUEST_H
#define TRAPLINE_GUEST_H

#include "layout.h"

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;

_Static_assert(sizeof(u64) == 8, "guests are built for LP64");

#define NULL ((void *)0)
#define noinline __attribute__((noinline, noclone))
#define noreturn __attribute__((noreturn))
#define offsetof(type, member) __builtin_offsetof(type, member)

static inline void outb(u16 port, u8 value)
{
	__asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline u8 inb(u16 port)
{
	u8 value;
	__asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port) : "memory");
	return value;
}

static inline u64 rdmsr(u32 index)
{
	u32 low, high;
	__asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(index) : "memory");
	return (u64)high << 32 | low;
}

static inline void wrmsr(u32 index, u64 value)
{
	__asm__ volatile("wrmsr" : : "c"(index), "a"((u32)value), "d"((u32)(value >> 32)) : "memory");
}

static inline void set_bits_cr0(u64 bits)
{
	u64 cr0;

	__asm__ volatile("movq %%cr0, %0\n\torq %1, %0\n\tmovq %0, %%cr0" : "=&r"(cr0) : "r"(bits) : "memory");
}

static inline u64 rdtsc(void)
{
	u32 low, high;
	__asm__ volatile("rdtsc" : "=a"(low), "=d"(high) : : "memory");
	return (u64)high << 32 | low;
}

static inline void pause(void)
{
	__asm__ volatile("pause" : : : "memory");
}

static inline void outw(u16 port, u16 value)
{
	__asm__ volatile("outw %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline u16 inw(u16 port)
{
	u16 value;
	__asm__ volatile("inw %1, %0" : "=a"(value) : "Nd"(port) : "memory");
	return value;
}

static inline void outl(u16 port, u32 value)
{
	__asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline u32 inl(u16 port)
{
	u32 value;
	__asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port) : "memory");
	return value;
}

/* Read or write memory that another CPU or a device shares. */
static inline u32 read32(u64 address)
{
	return *(volatile u32 *)address;
}

static inline void write32(u64 address, u32 value)
{
	*(volatile u32 *)address = value;
}

/* Stops this CPU for good. */
static inline noreturn void halt_forever(void)
{
	for (;;)
		__asm__ volatile("cli\n\thlt" : : : "memory");
}

#define START_INFO_MAGIC 0x336ec578

/*
 * What a bare-metal guest gets in RDI and a PVH guest in EBX: hvm_start_info, as
 * in Xen's public/arch-x86/hvm/start_info.h. Its lists are those below.
 */
struct start_info {
	u32 magic, version, flags, module_count;
	u64 modules, cmdline, rsdp;
	u64 memory_map; /* from version 1 on */
	u32 memory_map_count, reserved;
};

struct start_info_module {
	u64 address, size, cmdline, reserved;
};

struct start_info_memory {
	u64 address, size;
	u32 type, reserved;
};

/* --- console.c: the serial port COM1, polled --- */
void console_char(char c);
void console_text(const char *text);
void console_number(u64 value);
void console_hex(u64 value);
/* One character that was typed, or -1. */
int console_poll(void);

/* --- cmdline.c --- */
/* Copies the VMM's command line (NULL: none) out of the way of everything. */
void cmdline_save(const struct start_info *info);
/* The same from the text itself. */
void cmdline_save_text(const char *from);
/* Calls word() for each blank-separated word. */
void cmdline_each(void (*word)(const char *word));
/* The rest of word after prefix, or NULL. */
const char *after(const char *word, const char *prefix);
int same(const char *a, const char *b);
/* Reads decimal digits up to the end of text; 0 if there is anything else. */
int parse_number(const char *text, u64 *value);

/* --- end.c --- */
/* Ends the VM: exit status through the exit port. */
noreturn void guest_exit(u8 status);

/* --- acpi.c --- */
/* The first table with this signature, its checksum right, or NULL. */
const u8 *acpi_table(const char *signature);

/* --- lapic.c: this CPU's local APIC, xAPIC or x2APIC as the VMM left it --- */
void lapic_enable(void);
u32 lapic_id(void);
void lapic_ipi(u32 apic_id, u32 low_word);
/* A periodic timer interrupt. */
void lapic_timer(u8 vector, u32 cycles);

/* --- smp.c --- */

/* One CPU. Tests know the size and the offset of count: see src/demo.rs. */
struct cpu {
	u64 count;        /* what this CPU has counted; only it writes here */
	u64 traced_count; /* the same, by the function that looks like Linux's */
	u64 rounds;
	u32 id;           /* index into cpus[]; 0 is the boot processor */
	u32 apic_id;
	volatile u32 online;
	volatile u32 done;
	u64 reserved[3];
};
_Static_assert(sizeof(struct cpu) == CPU_SIZE, "tests rely on the size of struct cpu");
_Static_assert(offsetof(struct cpu, count) == 0, "tests rely on where count is");
_Static_assert(offsetof(struct cpu, traced_count) == 8, "tests rely on where traced_count is");
_Static_assert(offsetof(struct cpu, rounds) == 16, "tests rely on where rounds is");

extern struct cpu cpus[MAX_CPUS];
extern u32 cpu_count;

enum start_method { START_NONE, START_SIPI, START_MAILBOX };

/* Fills cpus[] from the MADT, the caller first; says how the others are started. */
enum start_method smp_find_cpus(void);
/* Starts cpus[1..]; each runs ap_main(). A CPU that does not come is left offline. */
void smp_start_others(enum start_method method);
/* Before the first SIPI: the code a CPU wakes up in, below 1 MiB. */
void smp_place_trampoline(void);
/* INIT and SIPI to one of cpus[]; it then comes to ap_main(). */
void smp_start_by_sipi(struct cpu *cpu);
/* Waits until *flag is set; 0 if that takes far too long. */
int wait_for(volatile u32 *flag);

/* --- what each guest provides --- */
noreturn void guest_main(const struct start_info *info);
noreturn void ap_main(struct cpu *cpu);

#endif
