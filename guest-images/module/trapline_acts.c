// SPDX-License-Identifier: GPL-2.0
/*
 * Things that go wrong in a kernel, one each on request: a word, and a number where one is
 * taken, written to /proc/trapline_acts. Tests of Trapline set their traps on them.
 *
 *   warn               a WARN in trapline_warns
 *   bug                a BUG in trapline_bugs
 *   oops               a load through a null pointer in trapline_oopses
 *   panic              a panic in trapline_panics
 *   list-corruption    list_add behind an entry that leads elsewhere
 *   refcount           an increment of a refcount_t that is 0
 *   store N            trapline_stores writes N to trapline_value
 *   store-kernel N     trapline_stores_kernel writes N to the kernel's own panic_timeout
 *   recurse N          N calls of trapline_recurses in one another, trapline_bottom in the last
 *   hang-one CPU       that CPU spins in trapline_hangs with interrupts off
 *   hang-all           all CPUs do
 *   triple-fault       an exception without an interrupt descriptor table, in trapline_faults
 *   ktap               a KTAP report in the kernel's log: one test passes, one fails, one is skipped
 *
 * A word that it does not know gives EINVAL.
 */
#define pr_fmt(fmt) "trapline_acts: " fmt

#include <linux/kernel.h>
#include <linux/list.h>
#include <linux/module.h>
#include <linux/panic.h>
#include <linux/proc_fs.h>
#include <linux/refcount.h>
#include <linux/smp.h>
#include <linux/string.h>
#include <linux/uaccess.h>

#define FILE_NAME "trapline_acts"
#define MAX_REQUEST 64
#define MAX_DEPTH 64

/* Looked at by traps, so they keep their names and are written when the source says so. */
long trapline_value;
long trapline_depth;

static noinline void trapline_warns(long unused)
{
	WARN(1, "trapline_acts warns\n");
}

static noinline void trapline_bugs(long unused)
{
	BUG();
}

static noinline void trapline_oopses(long unused)
{
	long *nowhere = NULL;

	OPTIMIZER_HIDE_VAR(nowhere);
	WRITE_ONCE(trapline_value, READ_ONCE(*nowhere));
}

static noinline void trapline_panics(long unused)
{
	panic("trapline_acts panics");
}

static noinline void trapline_corrupts(long unused)
{
	LIST_HEAD(list);
	LIST_HEAD(other);
	struct list_head entry;

	list.next = &other;
	list_add(&entry, &list);
}

static noinline void trapline_saturates(long unused)
{
	refcount_t count = REFCOUNT_INIT(0);

	refcount_inc(&count);
}

static noinline void trapline_stores(long value)
{
	WRITE_ONCE(trapline_value, value);
}

static noinline void trapline_stores_kernel(long value)
{
	WRITE_ONCE(panic_timeout, (int)value);
}

static noinline void trapline_bottom(long depth)
{
	WRITE_ONCE(trapline_depth, depth);
}

static noinline void trapline_recurses(long left, long depth)
{
	if (left > 1)
		trapline_recurses(left - 1, depth + 1);
	else
		trapline_bottom(depth);
	/* Not a tail call. */
	barrier();
}

static void trapline_recursion(long depth)
{
	trapline_recurses(clamp(depth, 1L, (long)MAX_DEPTH), 1);
}

static noinline void trapline_hangs(void *unused)
{
	/* Interrupts are off: this is called as an interrupt handler, or as if. */
	for (;;)
		cpu_relax();
}

static void trapline_hang_one(long cpu)
{
	smp_call_function_single((int)cpu, trapline_hangs, NULL, 0);
}

static void trapline_hang_all(long unused)
{
	on_each_cpu(trapline_hangs, NULL, 0);
}

static noinline void trapline_faults(long unused)
{
	static const struct {
		u16 limit;
		u64 base;
	} __packed nothing;

	asm volatile("cli\n\t"
		     "lidt %0\n\t"
		     "ud2"
		     : : "m"(nothing));
}

static void trapline_ktap(long unused)
{
	pr_info("KTAP version 1\n");
	pr_info("1..3\n");
	pr_info("ok 1 trapline_passes\n");
	pr_info("# expected 1, got 2\n");
	pr_info("not ok 2 trapline_fails\n");
	pr_info("ok 3 trapline_is_skipped # SKIP not today\n");
}

static const struct {
	const char *name;
	void (*act)(long value);
} acts[] = {
	{ "warn", trapline_warns },
	{ "bug", trapline_bugs },
	{ "oops", trapline_oopses },
	{ "panic", trapline_panics },
	{ "list-corruption", trapline_corrupts },
	{ "refcount", trapline_saturates },
	{ "store", trapline_stores },
	{ "store-kernel", trapline_stores_kernel },
	{ "recurse", trapline_recursion },
	{ "hang-one", trapline_hang_one },
	{ "hang-all", trapline_hang_all },
	{ "triple-fault", trapline_faults },
	{ "ktap", trapline_ktap },
};

static ssize_t trapline_write(struct file *file, const char __user *from, size_t size, loff_t *at)
{
	char request[MAX_REQUEST];
	char *rest, *name;
	long value = 0;

	if (size >= sizeof(request))
		return -EINVAL;
	if (copy_from_user(request, from, size))
		return -EFAULT;
	request[size] = 0;
	rest = strim(request);
	name = strsep(&rest, " ");
	if (rest && kstrtol(rest, 0, &value))
		return -EINVAL;
	for (size_t i = 0; i < ARRAY_SIZE(acts); i++) {
		if (strcmp(acts[i].name, name))
			continue;
		acts[i].act(value);
		return size;
	}
	return -EINVAL;
}

static const struct proc_ops trapline_file = {
	.proc_write = trapline_write,
};

static int __init trapline_init(void)
{
	return proc_create(FILE_NAME, 0200, NULL, &trapline_file) ? 0 : -ENOMEM;
}

static void __exit trapline_exit(void)
{
	remove_proc_entry(FILE_NAME, NULL);
}

module_init(trapline_init);
module_exit(trapline_exit);

MODULE_DESCRIPTION("Goes wrong on request, for tests of a debugger");
MODULE_LICENSE("GPL");
