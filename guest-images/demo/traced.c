/*
 * Built as the functions of a Linux kernel with function tracing and indirect
 * branch tracking: endbr64, then a nop of five bytes, then the function.
 */
#include "demo.h"

noinline void count_up_traced(struct cpu *cpu)
{
	__asm__ volatile(".globl count_up_traced_here\n"
			 "count_up_traced_here:\n\t"
			 "incq %0"
			 : "+m"(cpu->traced_count));
}
