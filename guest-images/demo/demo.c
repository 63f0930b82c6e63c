/*
 * The demo guest: every CPU counts, and there is something to trap.
 *
 *   hbreak count_up            the hot function; every CPU calls it all the time
 *   hbreak *count_up_here      the very instruction that counts a call
 *   hbreak count_up_traced     the same, beginning as Linux's functions begin
 *   hbreak publish             now and then, by every CPU
 *   watch jiffies              goes up some ten times a second
 *   watch last_writer          which CPU published last
 *   bt                         count_up < count_a_round < cpu_loop < ...
 *   p cpus[1]                  what a CPU knows about itself
 *   set var stop_request = 1   ends the guest; so does q on the console
 *
 * Command line: ticks=N (end by itself after N ticks), exit=V (with status V
 * then, and on stop_request), quiet (no progress lines).
 */
#include "guest.h"
#include "demo.h"

/* One tick is so many cycles of the TSC: a tenth of a second on most machines. */
#define TICK_CYCLES (1UL << 28)
#define TICKS_PER_LINE 16
#define POLLS_PER_TICK 16
#define CALLS_PER_ROUND 16
#define ROUNDS_PER_PUBLISH 64

/* Ticks since the start; CPU 0 advances it. */
volatile u64 jiffies;
/* How many rounds all CPUs together have published. */
volatile u64 rounds_published;
/* The CPU that published last. */
volatile u32 last_writer;
/* Set it to end the guest. */
volatile u32 stop_request;
/* The status the guest then ends with. */
volatile u32 exit_status;

static u64 ticks_wanted;
static u32 quiet;
static volatile u32 others_may_run;
static volatile u32 stopping;

extern volatile u64 debug_exceptions_seen;
extern volatile u64 breakpoint_exceptions_seen;
void traps_init(void);

/*
 * The hot function. The count is one instruction, so that at each stop of this
 * CPU a breakpoint on count_up_here was hit as often as count says (once more
 * when the CPU stands on it).
 */
noinline void count_up(struct cpu *cpu)
{
	__asm__ volatile(".globl count_up_here\n"
			 "count_up_here:\n\t"
			 "incq %0"
			 : "+m"(cpu->count));
}

/* Tells the world, with the only store that all CPUs share. */
noinline void publish(struct cpu *cpu)
{
	last_writer = cpu->id;
	__asm__ volatile("lock addq %1, %0"
			 : "+m"(rounds_published)
			 : "er"((u64)ROUNDS_PER_PUBLISH)
			 : "memory");
}

/* One round of counting: sixteen calls, and one of the other kind. */
noinline u32 count_a_round(struct cpu *cpu)
{
	u32 calls;

	for (calls = 0; calls < CALLS_PER_ROUND; calls++)
		count_up(cpu);
	count_up_traced(cpu);
	cpu->rounds++;
	if (cpu->rounds % ROUNDS_PER_PUBLISH == 0)
		publish(cpu);
	return calls;
}

static void end_with(u8 status)
{
	exit_status = status;
	stop_request = 1;
}

noinline void print_progress(void)
{
	console_text("tick ");
	console_number(jiffies);
	console_text(": ");
	console_number(rounds_published);
	console_text(" rounds, the last by cpu ");
	console_number(last_writer);
	console_text("\n");
}

/* Another tick. */
noinline void tick(void)
{
	jiffies++;
	if (!quiet && jiffies % TICKS_PER_LINE == 0)
		print_progress();
	if (ticks_wanted && jiffies >= ticks_wanted)
		stop_request = 1;
}

/* What CPU 0 does between its rounds: the time and the keyboard. */
static void keep_time(void)
{
	static u64 last_tick, last_poll;
	u64 now = rdtsc();

	if (!last_tick)
		last_tick = last_poll = now;
	if (now - last_poll < TICK_CYCLES / POLLS_PER_TICK)
		return;
	last_poll = now;
	if (console_poll() == 'q')
		end_with(0);
	/* After a stop in the debugger this is one tick, not a burst of them. */
	if (now - last_tick >= TICK_CYCLES) {
		last_tick = now;
		tick();
	}
}

/* Where every CPU spends its life. */
noinline void cpu_loop(struct cpu *cpu)
{
	while (!stopping) {
		count_a_round(cpu);
		if (cpu->id == 0) {
			keep_time();
			if (stop_request)
				stopping = 1;
		}
	}
	cpu->done = 1;
}

noreturn void ap_main(struct cpu *cpu)
{
	wait_for(&others_may_run);
	cpu_loop(cpu);
	halt_forever();
}

static void take_word(const char *word)
{
	const char *value;
	u64 number;

	if (same(word, "quiet")) {
		quiet = 1;
	} else if ((value = after(word, "ticks=")) && parse_number(value, &number) && number) {
		ticks_wanted = number;
	} else if ((value = after(word, "exit=")) && parse_number(value, &number) && number < 256) {
		exit_status = (u32)number;
	} else {
		console_text("demo: not understood: ");
		console_text(word);
		console_text(" (known: ticks=N exit=0..255 quiet)\n");
	}
}

static void introduce(const struct cpu *cpu, enum start_method method)
{
	console_text("cpu ");
	console_number(cpu->id);
	console_text(": APIC id ");
	console_number(cpu->apic_id);
	if (!cpu->online)
		console_text(", did not start\n");
	else if (cpu->id == 0)
		console_text(", the boot processor\n");
	else
		console_text(method == START_MAILBOX ? ", started by the wakeup mailbox\n"
						     : ", started by INIT and SIPI\n");
}

/* The last words: what each CPU counted. */
static void sum_up(void)
{
	for (u32 i = 0; i < cpu_count; i++) {
		if (!cpus[i].online || !wait_for(&cpus[i].done))
			continue;
		console_text("cpu ");
		console_number(i);
		console_text(" counted ");
		console_number(cpus[i].count);
		console_text("\n");
	}
	if (debug_exceptions_seen || breakpoint_exceptions_seen) {
		console_text("demo: exceptions nobody here asked for: #DB ");
		console_number(debug_exceptions_seen);
		console_text(", #BP ");
		console_number(breakpoint_exceptions_seen);
		console_text("\n");
	}
	console_text("demo: ends with status ");
	console_number(exit_status);
	console_text(" after ");
	console_number(jiffies);
	console_text(" ticks\n");
}

noreturn void guest_main(const struct start_info *info)
{
	enum start_method method;

	traps_init();
	cmdline_save(info);
	console_text("Trapline demo guest: every CPU counts. Type q to end it.\n");
	cmdline_each(take_word);
	method = smp_find_cpus();
	smp_start_others(method);
	for (u32 i = 0; i < cpu_count; i++)
		introduce(&cpus[i], method);
	others_may_run = 1;
	cpu_loop(&cpus[0]);
	sum_up();
	guest_exit((u8)exit_status);
}
