#ifndef TRAPLINE_DEMO_H
#define TRAPLINE_DEMO_H

#include "guest.h"

void count_up(struct cpu *cpu);
void count_up_traced(struct cpu *cpu);
void publish(struct cpu *cpu);
u32 count_a_round(struct cpu *cpu);
void cpu_loop(struct cpu *cpu);
void tick(void);
void print_progress(void);

#endif
