/*
 * PID 1 of the guests that `trapline run --exec` boots: gives one program what it may
 * expect of a Linux system, runs it on the console and tells its status to the machine.
 *
 * What it is to do stands in files that the initramfs was packed with
 * (harness/src/initramfs), each string of theirs ended by a NUL:
 *
 *   /lib/trapline/command      the file to execute, then its argv from argv[0] on
 *   /lib/trapline/environment  NAME=VALUE
 *   /lib/trapline/modules/     kernel modules, loaded in the order of their names
 *
 * Boot parameters that the kernel does not know and hands to init as its environment go
 * to the program, too, where /lib/trapline/environment does not name the same variable.
 *
 * Exit status N of the program is status N of the machine, death by signal S is 128 + S,
 * 127 a program that is not there and 126 one that cannot be executed.
 */
#include "sys.h"

#define COMMAND "/lib/trapline/command"
#define ENVIRONMENT "/lib/trapline/environment"
#define MODULES "/lib/trapline/modules"

/* An argument list may be as long as the kernel takes (ARG_MAX), each a string at least. */
#define MAX_BYTES (2 << 20)
#define MAX_STRINGS 65536
#define MAX_MODULES 256
#define MODULE_NAME 256

#define STATUS_CANNOT_EXECUTE 126
#define STATUS_NOT_THERE 127
#define STATUS_SIGNAL 128
/* Init's own: it has nothing to run. */
#define STATUS_BAD_INITRAMFS 125

/* vmm/src/devices/exit.rs: the same register as a port and in a page of its own. */
#define EXIT_PORT 0xf4
#define EXIT_PAGE 0xfffba000UL

#define TCSBRK 0x5409
#define TIOCSCTTY 0x540e
#define SIOCSIFFLAGS 0x8914
#define IFF_UP_RUNNING 0x41
#define AF_INET 2
#define SOCK_DGRAM_CLOEXEC (2 | 02000000)

#define S_IFCHR 0020000
#define MKDEV(major, minor) ((major) << 8 | (minor))

#define REBOOT_MAGIC1 0xfee1dead
#define REBOOT_MAGIC2 672274793
#define REBOOT_POWER_OFF 0x4321fedc
#define REBOOT_RESTART 0x01234567

struct strings {
	char bytes[MAX_BYTES];
	char *list[MAX_STRINGS + 1];
	u32 count;
};

static struct strings command, environment;
static char module_names[MAX_MODULES][MODULE_NAME];

/* GCC asks for these even of a freestanding program. */
void *memcpy(void *to, const void *from, size_t size)
{
	for (size_t i = 0; i < size; i++)
		((volatile char *)to)[i] = ((const char *)from)[i];
	return to;
}

void *memset(void *to, int value, size_t size)
{
	for (size_t i = 0; i < size; i++)
		((volatile char *)to)[i] = (char)value;
	return to;
}

static size_t length(const char *text)
{
	size_t n = 0;

	while (text[n])
		n++;
	return n;
}

/* Order of bytes, as strcmp. */
static int compare(const char *a, const char *b)
{
	while (*a && *a == *b)
		a++, b++;
	return (u8)*a - (u8)*b;
}

/* One line on the console, with one write: it is not torn by what others print. */
struct line {
	char text[512];
	size_t used;
};

static void add(struct line *line, const char *text)
{
	for (; *text && line->used < sizeof(line->text) - 1; text++)
		line->text[line->used++] = *text;
}

static void add_number(struct line *line, u64 value)
{
	char digits[21];
	int n = sizeof(digits) - 1;

	digits[n] = 0;
	do {
		digits[--n] = (char)('0' + value % 10);
		value /= 10;
	} while (value);
	add(line, digits + n);
}

static void begin(struct line *line)
{
	line->used = 0;
	add(line, "trapline-init: ");
}

static void print(struct line *line)
{
	line->text[line->used++] = '\n';
	syscall3(SYS_write, 2, (u64)line->text, line->used);
}

static void say_error(const char *what, const char *name, long error)
{
	struct line line;

	begin(&line);
	add(&line, what);
	add(&line, name);
	add(&line, ": error ");
	add_number(&line, (u64)-error);
	print(&line);
}

static int open_file(const char *path, int flags)
{
	return (int)syscall3(SYS_open, (u64)path, (u64)flags | O_CLOEXEC, 0);
}

static void mount(const char *what, const char *where, const char *options)
{
	syscall3(SYS_mkdir, (u64)where, 0755, 0);
	/* A kernel without it, or it is there already: the program may not need it. */
	syscall5(SYS_mount, (u64)what, (u64)where, (u64)what, 0, (u64)options);
}

/* The entries of a directory as getdents64 gives them. */
struct entry {
	u64 inode, offset;
	unsigned short size;
	u8 type;
	char name[];
} __attribute__((packed));

/* Calls `each` for what is in a directory, as long as it returns true. Whether it came to the end. */
static int for_each_entry(const char *path, int (*each)(const char *name))
{
	static char entries[4096];
	int fd = open_file(path, O_RDONLY | O_DIRECTORY), more = 1;
	long n;

	if (fd < 0)
		return 1;
	while (more && (n = syscall3(SYS_getdents64, (u64)fd, (u64)entries, sizeof(entries))) > 0) {
		for (long at = 0; more && at < n;) {
			const struct entry *entry = (const struct entry *)(entries + at);

			at += entry->size;
			if (compare(entry->name, ".") && compare(entry->name, ".."))
				more = each(entry->name);
		}
	}
	syscall3(SYS_close, (u64)fd, 0, 0);
	return more;
}

static int stop_here(const char *name)
{
	(void)name;
	return 0;
}

/* What the initramfs was packed with stays to be seen. */
static void mount_if_empty(const char *what, const char *where, const char *options)
{
	if (for_each_entry(where, stop_here))
		mount(what, where, options);
}

/* The devices that a program may expect, for a kernel without devtmpfs. */
static void make_devices(void)
{
	static const struct {
		const char *path;
		u32 device;
	} devices[] = {
		{ "/dev/mem", MKDEV(1, 1) },	 { "/dev/null", MKDEV(1, 3) },	  { "/dev/zero", MKDEV(1, 5) },
		{ "/dev/full", MKDEV(1, 7) },	 { "/dev/random", MKDEV(1, 8) },  { "/dev/urandom", MKDEV(1, 9) },
		{ "/dev/kmsg", MKDEV(1, 11) },	 { "/dev/ttyS0", MKDEV(4, 64) },  { "/dev/tty", MKDEV(5, 0) },
		{ "/dev/console", MKDEV(5, 1) }, { "/dev/ptmx", MKDEV(5, 2) },
	};

	for (u32 i = 0; i < sizeof(devices) / sizeof(devices[0]); i++)
		syscall3(SYS_mknod, (u64)devices[i].path, S_IFCHR | 0666, devices[i].device);
	syscall3(SYS_symlink, (u64)"/proc/self/fd", (u64)"/dev/fd", 0);
	syscall3(SYS_symlink, (u64)"/proc/self/fd/0", (u64)"/dev/stdin", 0);
	syscall3(SYS_symlink, (u64)"/proc/self/fd/1", (u64)"/dev/stdout", 0);
	syscall3(SYS_symlink, (u64)"/proc/self/fd/2", (u64)"/dev/stderr", 0);
}

static void make_system(void)
{
	mount("proc", "/proc", "");
	mount("sysfs", "/sys", "");
	mount("debugfs", "/sys/kernel/debug", "");
	mount("tracefs", "/sys/kernel/tracing", "");
	mount("devtmpfs", "/dev", "mode=755");
	make_devices();
	mount("devpts", "/dev/pts", "ptmxmode=666");
	mount("tmpfs", "/dev/shm", "mode=1777");
	mount_if_empty("tmpfs", "/tmp", "mode=1777");
	mount_if_empty("tmpfs", "/run", "mode=755");
}

/* The console as standard input, output and error, of this process and its children. */
static void take_console(void)
{
	int fd = open_file("/dev/console", O_RDWR | O_NOCTTY);

	/* A kernel without a console: there is nobody to talk to, but the status counts. */
	if (fd < 0)
		fd = open_file("/dev/null", O_RDWR);
	if (fd < 0)
		return;
	for (int i = 0; i < 3; i++)
		syscall3(SYS_dup2, (u64)fd, (u64)i, 0);
	if (fd > 2)
		syscall3(SYS_close, (u64)fd, 0, 0);
}

/* 127.0.0.1 is there. */
static void loopback_up(void)
{
	struct {
		char name[16];
		short flags;
		char rest[22];
	} request = { "lo", IFF_UP_RUNNING, "" };
	long fd = syscall3(SYS_socket, AF_INET, SOCK_DGRAM_CLOEXEC, 0);

	if (fd < 0)
		return;
	syscall3(SYS_ioctl, (u64)fd, SIOCSIFFLAGS, (u64)&request);
	syscall3(SYS_close, (u64)fd, 0, 0);
}

/* Reads a file of NUL-terminated strings. */
static void read_strings(const char *path, struct strings *strings)
{
	int fd = open_file(path, O_RDONLY);
	size_t used = 0;
	long n = 0;

	if (fd < 0)
		return;
	/* The last byte stays 0. */
	while (used < MAX_BYTES - 1) {
		n = syscall3(SYS_read, (u64)fd, (u64)strings->bytes + used, MAX_BYTES - 1 - used);
		if (n <= 0)
			break;
		used += (size_t)n;
	}
	syscall3(SYS_close, (u64)fd, 0, 0);
	for (size_t at = 0; at < used && strings->count < MAX_STRINGS;) {
		strings->list[strings->count++] = strings->bytes + at;
		at += length(strings->bytes + at) + 1;
	}
}

/* Whether both name the same variable. */
static int same_variable(const char *a, const char *b)
{
	while (*a && *a == *b && *a != '=')
		a++, b++;
	return *a == *b && *a == '=';
}

static void add_environment(char **given)
{
	u32 own = environment.count;

	for (; *given && environment.count < MAX_STRINGS; given++) {
		u32 i = 0;

		while (i < own && !same_variable(environment.list[i], *given))
			i++;
		if (i == own)
			environment.list[environment.count++] = *given;
	}
}

static u32 module_count;

static int add_module(const char *name)
{
	size_t size = length(name) + 1;

	if (size > MODULE_NAME || module_count == MAX_MODULES)
		say_error("no room for the module ", name, 0);
	else
		memcpy(module_names[module_count++], name, size);
	return 1;
}

static void load_modules(void)
{
	for_each_entry(MODULES, add_module);
	if (!module_count)
		return;
	syscall3(SYS_chdir, (u64)MODULES, 0, 0);
	for (u32 done = 0; done < module_count; done++) {
		const char *next = 0;
		long result;
		int fd;

		for (u32 i = 0; i < module_count; i++) {
			const char *name = module_names[i];

			if (name[0] && (!next || compare(name, next) < 0))
				next = name;
		}
		if (!next)
			break;
		fd = open_file(next, O_RDONLY);
		result = fd < 0 ? fd : syscall3(SYS_finit_module, (u64)fd, (u64)"", 0);
		if (result < 0)
			say_error("cannot load the module ", next, result);
		if (fd >= 0)
			syscall3(SYS_close, (u64)fd, 0, 0);
		*(char *)next = 0;
	}
	syscall3(SYS_chdir, (u64)"/", 0, 0);
}

static void run_program(void)
{
	const char *path = command.list[0];
	struct line line;
	long error;

	/* A session of its own, with the console for a terminal where it is one: Ctrl-C works. */
	syscall3(SYS_setsid, 0, 0, 0);
	syscall3(SYS_ioctl, 0, TIOCSCTTY, 0);
	error = syscall3(SYS_execve, (u64)path, (u64)(command.list + 1), (u64)environment.list);
	begin(&line);
	add(&line, "cannot run ");
	add(&line, path);
	switch (-error) {
	case ENOENT:
		add(&line, ": it is not in the initramfs, or the interpreter that it names is not");
		break;
	case EACCES:
		add(&line, ": it is not executable");
		break;
	case ENOEXEC:
		add(&line, ": this kernel has no loader for such a file");
		break;
	default:
		add(&line, ": error ");
		add_number(&line, (u64)-error);
	}
	print(&line);
	syscall3(SYS_exit, error == -ENOENT ? STATUS_NOT_THERE : STATUS_CANNOT_EXECUTE, 0, 0);
}

/* Waits for a child, and for every orphan that comes along. Its wait status. */
static int wait_for(long child)
{
	int status = 0;

	for (;;) {
		long ended = syscall5(SYS_wait4, (u64)-1, (u64)&status, 0, 0, 0);

		if (ended == child)
			return status;
		if (ended < 0 && ended != -EINTR)
			return STATUS_BAD_INITRAMFS << 8;
	}
}

static void say_signal(u32 signal)
{
	static const char *const names[] = {
		[1] = "SIGHUP",	  [2] = "SIGINT",   [3] = "SIGQUIT", [4] = "SIGILL",   [5] = "SIGTRAP",
		[6] = "SIGABRT",  [7] = "SIGBUS",   [8] = "SIGFPE",  [9] = "SIGKILL",  [10] = "SIGUSR1",
		[11] = "SIGSEGV", [12] = "SIGUSR2", [13] = "SIGPIPE", [14] = "SIGALRM", [15] = "SIGTERM",
		[24] = "SIGXCPU", [25] = "SIGXFSZ", [31] = "SIGSYS",
	};
	struct line line;

	begin(&line);
	add(&line, command.list[0]);
	add(&line, " was killed by signal ");
	add_number(&line, signal);
	if (signal < sizeof(names) / sizeof(names[0]) && names[signal]) {
		add(&line, " (");
		add(&line, names[signal]);
		add(&line, ")");
	}
	print(&line);
}

static u8 run(void)
{
	long child;
	int status;

	if (command.count < 2) {
		say_error("nothing to run in ", COMMAND, 0);
		return STATUS_BAD_INITRAMFS;
	}
	child = syscall3(SYS_fork, 0, 0, 0);
	if (child == 0)
		run_program();
	if (child < 0) {
		say_error("cannot fork for ", command.list[0], child);
		return STATUS_CANNOT_EXECUTE;
	}
	status = wait_for(child);
	if (!(status & 0x7f))
		return (u8)(status >> 8);
	say_signal(status & 0x7f);
	return (u8)(STATUS_SIGNAL + (status & 0x7f));
}

static void tell_by_port(u8 status)
{
	if (syscall3(SYS_ioperm, EXIT_PORT, 1, 1) == 0)
		__asm__ volatile("outb %0, %1" : : "a"(status), "Nd"((unsigned short)EXIT_PORT));
}

static void tell_by_memory(u8 status)
{
	int fd = open_file("/dev/mem", O_RDWR | O_SYNC);
	long page;

	if (fd < 0)
		return;
	page = map_page(fd, EXIT_PAGE);
	if (page > 0)
		*(volatile u32 *)page = status;
}

/*
 * A way out that does not work returns here. Each is tried in a child: kernels refuse ports
 * (CONFIG_X86_IOPL_IOPERM, lockdown), and there are processors that answer with an exception.
 */
static void try_to_tell(void (*tell)(u8), u8 status)
{
	long child = syscall3(SYS_fork, 0, 0, 0);

	if (child == 0) {
		tell(status);
		syscall3(SYS_exit, 1, 0, 0);
	}
	if (child > 0)
		wait_for(child);
	else
		tell(status);
}

static void finish(u8 status)
{
	struct line line;

	/* What was printed is on its way to the serial port still. */
	syscall3(SYS_ioctl, 1, TCSBRK, 1);
	syscall3(SYS_sync, 0, 0, 0);
	try_to_tell(tell_by_port, status);
	try_to_tell(tell_by_memory, status);
	/* The console's reader looks for this line: harness/src/initramfs/init.rs. */
	begin(&line);
	add(&line, "exit ");
	add_number(&line, status);
	print(&line);
	syscall3(SYS_ioctl, 1, TCSBRK, 1);
	syscall5(SYS_reboot, REBOOT_MAGIC1, REBOOT_MAGIC2, REBOOT_POWER_OFF, 0, 0);
	syscall5(SYS_reboot, REBOOT_MAGIC1, REBOOT_MAGIC2, REBOOT_RESTART, 0, 0);
	for (;;)
		syscall3(SYS_pause, 0, 0, 0);
}

/* `stack` is as the kernel leaves it: argc, argv, NULL, envp, NULL. */
__attribute__((used)) void init_main(u64 *stack)
{
	make_system();
	take_console();
	loopback_up();
	read_strings(COMMAND, &command);
	read_strings(ENVIRONMENT, &environment);
	add_environment((char **)(stack + 1 + stack[0] + 1));
	load_modules();
	finish(run());
}

__asm__(".globl _start\n"
	"_start:\n\t"
	"xor %ebp, %ebp\n\t"
	"mov %rsp, %rdi\n\t"
	"and $-16, %rsp\n\t"
	"call init_main\n\t"
	"ud2\n");
