/* Numbers that C and assembler share. */
#ifndef TRAPLINE_LAYOUT_H
#define TRAPLINE_LAYOUT_H

#define MAX_CPUS 64
#define CPU_SIZE 64
#define STACK_SIZE 8192

/* Where a CPU wakes up in real mode: page 8, so SIPI vector 8. */
#define TRAMPOLINE 0x8000

/* Selectors. SYSCALL and SYSRET need this order. */
#define SEL_CODE 0x08
#define SEL_DATA 0x10
#define SEL_USER_DATA 0x1b
#define SEL_USER_CODE 0x23
#define SEL_CODE32 0x28

#define PORT_CONSOLE 0x3f8
#define PORT_EXIT 0xf4

/* Exit status of a guest that took an exception it has no use for. */
#define STATUS_EXCEPTION 99
/* Exit status of a guest that was asked for something it does not know. */
#define STATUS_USAGE 64

#endif
