/*
 * One act each: run=NAME on the command line. Most are ways to end.
 *
 *   exit             the exit port, with exit=V (0)
 *   triple           a triple fault
 *   reset-i8042      reset by the keyboard controller
 *   reset-cf9        reset by port 0xcf9
 *   reset-acpi       reset by the FADT's reset register
 *   off-acpi         power off, S5 by PM1a
 *   panic            the pvpanic port: panicked
 *   crash-loaded     the pvpanic port: a crash kernel takes over
 *   exception        an exception nobody handles: one line, status 99
 *   fetch-hole       a jump to where there is nothing: no KVM can emulate that
 *   clac             an instruction that an interpreting KVM does not know
 *   hang             a CPU that spins with interrupts off
 *   sleep            a CPU that halts with interrupts off
 *   echo             echoes the console, line ends as CR LF; q or ^D ends
 *   flood            lines=N (1000) numbered lines as fast as possible
 *   ports            writes and reads N=count (20000) random ports
 *   mmio             the same with addresses that no memory backs
 *
 * With cpu=N it is CPU N that acts (CPU 0), while all the others count in
 * busy_here. seed=N begins another random sequence.
 */
#include "guest.h"

#define FADT_DSDT 40
#define FADT_PM1A_CONTROL 64
#define FADT_RESET_PORT 120
#define FADT_RESET_VALUE 128
#define FADT_SIZE_WITH_RESET 129

#define PORT_I8042 0x64
#define I8042_PULSE_RESET 0xfe
#define PORT_92 0x92
#define PORT_DEBUG_OUT 0xe9
#define PORT_FIRMWARE_LOG 0x402
#define PORT_RESET 0xcf9
#define RESET_FULL 0x06
#define PORT_PVPANIC 0x505
#define PVPANIC_PANICKED 1
#define PVPANIC_CRASH_LOADED 2
#define SLP_EN (1 << 13)

#define HOLE 0xd0000000UL
#define HOLE_SIZE 0x2ec00000UL
#define END_OF_TRANSMISSION 4

struct act {
	const char *name;
	void (*run)(void);
};

void traps_init(void);

static const struct act *chosen;
static u32 acting_cpu;
static volatile u32 others_may_run;
static u64 exit_status, lines = 1000, count = 20000, seed = 1;

static void act_exit(void)
{
	guest_exit((u8)exit_status);
}

static void act_triple(void)
{
	static const struct {
		u16 limit;
		u64 base;
	} __attribute__((packed)) nothing;

	__asm__ volatile("lidt %0\n"
			 ".globl triple_here\n"
			 "triple_here:\n\t"
			 "ud2" : : "m"(nothing));
}

static void act_reset_i8042(void)
{
	outb(PORT_I8042, I8042_PULSE_RESET);
}

static void act_reset_cf9(void)
{
	outb(PORT_RESET, RESET_FULL);
}

static u64 field(const u8 *table, u32 offset, u32 bytes)
{
	u64 value = 0;

	while (bytes--)
		value = value << 8 | table[offset + bytes];
	return value;
}

static void act_reset_acpi(void)
{
	const u8 *fadt = acpi_table("FACP");

	if (fadt && field(fadt, 4, 4) >= FADT_SIZE_WITH_RESET)
		outb((u16)field(fadt, FADT_RESET_PORT, 8), fadt[FADT_RESET_VALUE]);
}

/* The first element of the package _S5_: 08 "_S5_" 12 length count [0a] value. */
static int sleep_type(const u8 *dsdt, u64 *type)
{
	u64 length = field(dsdt, 4, 4);

	for (u64 at = 36; at + 10 < length; at++) {
		const u8 *p = dsdt + at;

		if (p[0] != '_' || p[1] != 'S' || p[2] != '5' || p[3] != '_' || p[4] != 0x12)
			continue;
		p += 7;
		*type = p[0] == 0x0a ? p[1] : p[0];
		return *type < 8;
	}
	return 0;
}

static void act_off_acpi(void)
{
	const u8 *fadt = acpi_table("FACP");
	u64 type;

	if (fadt && field(fadt, FADT_DSDT, 4) && sleep_type((const u8 *)field(fadt, FADT_DSDT, 4), &type))
		outw((u16)field(fadt, FADT_PM1A_CONTROL, 4), (u16)(type << 10 | SLP_EN));
}

static void act_panic(void)
{
	outb(PORT_PVPANIC, PVPANIC_PANICKED);
}

static void act_crash_loaded(void)
{
	outb(PORT_PVPANIC, PVPANIC_CRASH_LOADED);
}

static void act_exception(void)
{
	__asm__ volatile(".globl exception_here\nexception_here:\n\tud2");
}

static void act_fetch_hole(void)
{
	__asm__ volatile(".globl fetch_hole_here\nfetch_hole_here:\n\tcall *%0" : : "r"(HOLE) : "memory");
}

static void act_clac(void)
{
	/* Elsewhere it needs CR4.SMAP's CPUID bit, and is a #UD without. */
	__asm__ volatile(".globl clac_here\nclac_here:\n\tclac" : : : "memory");
}

static void act_hang(void)
{
	__asm__ volatile(".globl hang_here\nhang_here:\n\tjmp hang_here");
}

static void act_sleep(void)
{
	halt_forever();
}

static void act_echo(void)
{
	for (;;) {
		int c = console_poll();

		if (c == 'q' || c == END_OF_TRANSMISSION)
			break;
		if (c == '\n' || c == '\r')
			console_text("\n");
		else if (c >= 0)
			console_char((char)c);
	}
	console_text("\nacts: bye\n");
	guest_exit((u8)exit_status);
}

static void act_flood(void)
{
	for (u64 n = 1; n <= lines; n++) {
		console_text("line ");
		console_number(n);
		console_text("\n");
	}
	guest_exit((u8)exit_status);
}

static u64 random(void)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return seed;
}

/* Those whose business it is to end or reset the machine, or to print. */
static int port_is_left_alone(u64 port, u64 pm1a)
{
	return (port >= PORT_CONSOLE - 3 && port < PORT_CONSOLE + 8) ||
	       (port >= PORT_EXIT - 3 && port <= PORT_EXIT) ||
	       (port >= PORT_RESET - 4 && port <= PORT_RESET + 2) ||
	       (port >= PORT_PVPANIC - 3 && port <= PORT_PVPANIC) ||
	       (port >= PORT_I8042 - 4 && port <= PORT_I8042) ||
	       (port >= PORT_92 - 3 && port <= PORT_92) ||
	       (port >= PORT_DEBUG_OUT - 3 && port <= PORT_DEBUG_OUT) ||
	       (port >= PORT_FIRMWARE_LOG - 3 && port <= PORT_FIRMWARE_LOG) ||
	       (pm1a && port >= pm1a - 4 && port < pm1a + 2);
}

static void act_ports(void)
{
	const u8 *fadt = acpi_table("FACP");
	u64 pm1a = fadt ? field(fadt, FADT_PM1A_CONTROL, 4) : 0;

	for (u64 n = 0; n < count; n++) {
		u64 draw = random();
		/* Half of them where the devices are. */
		u16 port = draw & 1 ? (u16)(draw >> 8) : (u16)(draw >> 8 & 0xfff);

		if (port_is_left_alone(port, pm1a))
			continue;
		switch (draw >> 32 & 7) {
		case 0: outb(port, (u8)(draw >> 40)); break;
		case 1: outw(port, (u16)(draw >> 40)); break;
		case 2: outl(port, (u32)(draw >> 32)); break;
		case 3: inb(port); break;
		case 4: inw(port); break;
		default: inl(port); break;
		}
	}
	console_text("acts: ports done\n");
	guest_exit((u8)exit_status);
}

static void act_mmio(void)
{
	for (u64 n = 0; n < count; n++) {
		u64 draw = random();
		u64 address = HOLE + (draw >> 8) % (HOLE_SIZE - 8);

		switch (draw & 7) {
		case 0: *(volatile u8 *)address = (u8)(draw >> 40); break;
		case 1: *(volatile u16 *)address = (u16)(draw >> 40); break;
		case 2: *(volatile u32 *)address = (u32)(draw >> 32); break;
		case 3: *(volatile u64 *)address = draw; break;
		case 4: (void)*(volatile u8 *)address; break;
		case 5: (void)*(volatile u16 *)address; break;
		case 6: (void)*(volatile u32 *)address; break;
		default: (void)*(volatile u64 *)address; break;
		}
	}
	console_text("acts: mmio done\n");
	guest_exit((u8)exit_status);
}

static const struct act acts[] = {
	{ "exit", act_exit },
	{ "triple", act_triple },
	{ "reset-i8042", act_reset_i8042 },
	{ "reset-cf9", act_reset_cf9 },
	{ "reset-acpi", act_reset_acpi },
	{ "off-acpi", act_off_acpi },
	{ "panic", act_panic },
	{ "crash-loaded", act_crash_loaded },
	{ "exception", act_exception },
	{ "fetch-hole", act_fetch_hole },
	{ "clac", act_clac },
	{ "hang", act_hang },
	{ "sleep", act_sleep },
	{ "echo", act_echo },
	{ "flood", act_flood },
	{ "ports", act_ports },
	{ "mmio", act_mmio },
};

static noreturn void refuse(const char *what, const char *word)
{
	console_text("acts: ");
	console_text(what);
	console_text(word);
	console_text(" (say run=NAME, one of:");
	for (u32 i = 0; i < sizeof(acts) / sizeof(acts[0]); i++) {
		console_text(" ");
		console_text(acts[i].name);
	}
	console_text(")\n");
	guest_exit(STATUS_USAGE);
}

static void take_word(const char *word)
{
	const char *value;
	u64 number;

	if ((value = after(word, "run="))) {
		for (u32 i = 0; i < sizeof(acts) / sizeof(acts[0]); i++) {
			if (same(value, acts[i].name))
				chosen = &acts[i];
		}
		if (!chosen)
			refuse("no act named ", value);
	} else if ((value = after(word, "cpu=")) && parse_number(value, &number) && number < MAX_CPUS) {
		acting_cpu = (u32)number;
	} else if ((value = after(word, "exit=")) && parse_number(value, &number) && number < 256) {
		exit_status = number;
	} else if ((value = after(word, "lines=")) && parse_number(value, &number)) {
		lines = number;
	} else if ((value = after(word, "count=")) && parse_number(value, &number)) {
		count = number;
	} else if ((value = after(word, "seed=")) && parse_number(value, &number) && number) {
		seed = number;
	} else {
		refuse("not understood: ", word);
	}
}

static noreturn void perform(struct cpu *cpu)
{
	if (cpu->id == acting_cpu) {
		chosen->run();
		console_text("acts: still here after ");
		console_text(chosen->name);
		console_text("\n");
		guest_exit(STATUS_EXCEPTION);
	}
	for (;;)
		__asm__ volatile(".globl busy_here\nbusy_here:\n\tincq %0" : "+m"(cpu->count));
}

noreturn void ap_main(struct cpu *cpu)
{
	wait_for(&others_may_run);
	perform(cpu);
}

noreturn void guest_main(const struct start_info *info)
{
	enum start_method method;

	traps_init();
	cmdline_save(info);
	cmdline_each(take_word);
	if (!chosen)
		refuse("nothing to do", "");
	method = smp_find_cpus();
	if (acting_cpu >= cpu_count)
		refuse("no such CPU", "");
	smp_start_others(method);
	console_text("acts: ");
	console_text(chosen->name);
	console_text("\n");
	others_may_run = 1;
	perform(&cpus[0]);
}
