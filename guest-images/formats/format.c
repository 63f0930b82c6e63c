/*
 * Says how it was started and what it was given, and ends.
 *
 * Command line: exit=V (the status), spin (stays in spin_here for ever).
 */
#include "guest.h"

#define MULTIBOOT_EAX 0x2badb002
#define MULTIBOOT_HAS_MEMORY (1 << 0)
#define MULTIBOOT_HAS_CMDLINE (1 << 2)
#define MULTIBOOT_HAS_MODULES (1 << 3)
#define MULTIBOOT_HAS_MEMORY_MAP (1 << 6)

#define E820_RAM 1

void traps_init(void);
noreturn void format_main(u32 eax, u64 info);

static u32 exit_status;
static u32 spin;
volatile u64 spin_count;

static void take_word(const char *word)
{
	const char *value;
	u64 number;

	if (same(word, "spin"))
		spin = 1;
	else if ((value = after(word, "exit=")) && parse_number(value, &number) && number < 256)
		exit_status = (u32)number;
}

static void say(const char *what, u64 number)
{
	console_text("format: ");
	console_text(what);
	console_number(number);
	console_text("\n");
}

static void say_text(const char *what, const char *text)
{
	console_text("format: ");
	console_text(what);
	console_text(text);
	console_text("\n");
}

static u64 read64(u64 address)
{
	return *(volatile u64 *)address;
}

/* Name, length and sum of the bytes of what was loaded along. */
static void say_module(u64 from, u64 to, const char *name)
{
	u64 sum = 0;

	for (u64 at = from; at < to; at++)
		sum += *(volatile u8 *)at;
	say_text("module: ", name);
	say("module bytes: ", to - from);
	say("module sum: ", sum);
}

static void multiboot(u64 info)
{
	u32 flags = read32(info);

	say_text("started by ", "Multiboot");
	if (flags & MULTIBOOT_HAS_MEMORY) {
		say("lower KiB: ", read32(info + 4));
		say("upper KiB: ", read32(info + 8));
	}
	if (flags & MULTIBOOT_HAS_CMDLINE)
		cmdline_save_text((const char *)(u64)read32(info + 16));
	if (flags & MULTIBOOT_HAS_MODULES) {
		u64 module = read32(info + 24);

		for (u32 n = read32(info + 20); n; n--, module += 16)
			say_module(read32(module), read32(module + 4),
				   (const char *)(u64)read32(module + 8));
	}
	if (flags & MULTIBOOT_HAS_MEMORY_MAP) {
		u64 at = read32(info + 48), end = at + read32(info + 44), ram = 0;

		for (; at < end; at += 4 + read32(at)) {
			if (read32(at + 20) == E820_RAM)
				ram += read64(at + 12);
		}
		say("RAM KiB by the map: ", ram >> 10);
	}
}

static void pvh(const struct start_info *info)
{
	const struct start_info_module *module = (const void *)info->modules;
	const struct start_info_memory *area = (const void *)info->memory_map;
	u64 ram = 0;

	say_text("started by ", "PVH");
	say("version: ", info->version);
	cmdline_save(info);
	for (u32 n = info->module_count; n; n--, module++)
		say_module(module->address, module->address + module->size,
			   module->cmdline ? (const char *)module->cmdline : "");
	say("RSDP found: ", info->rsdp != 0);
	if (info->version < 1)
		return;
	for (u32 n = info->memory_map_count; n; n--, area++) {
		if (area->type == E820_RAM)
			ram += area->size;
	}
	say("RAM KiB by the map: ", ram >> 10);
}

static void say_word(const char *word)
{
	say_text("word: ", word);
}

noreturn void format_main(u32 eax, u64 info)
{
	traps_init();
	cmdline_save_text(NULL);
	if (eax == MULTIBOOT_EAX)
		multiboot(info);
	else if (info && read32(info) == START_INFO_MAGIC)
		pvh((const struct start_info *)info);
	else
		say_text("started by ", "nobody I know");
	cmdline_each(say_word);
	cmdline_each(take_word);
	while (spin) {
		__asm__ volatile(".globl spin_here\nspin_here:\n\tincq %0" : "+m"(spin_count));
	}
	say("ends with status ", exit_status);
	guest_exit((u8)exit_status);
}
