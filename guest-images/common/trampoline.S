/*
 * From INIT/SIPI to long mode. smp.c copies this to TRAMPOLINE, where the CPU
 * starts in real mode with CS:IP = 0800:0000; so every address is written as
 * an offset from trampoline_begin.
 */
#include "layout.h"

#define CR0_PE 0x00000001
#define CR0_ET 0x00000010
#define CR0_WP 0x00010000
#define CR0_PG 0x80000000
#define CR4_PAE 0x20
#define MSR_EFER 0xc0000080
#define EFER_SCE 0x001
#define EFER_LME 0x100

	.section .rodata
	.balign 16
	.globl trampoline_begin
trampoline_begin:
	.code16
	cli
	cld
	movw %cs, %ax
	movw %ax, %ds
	lgdtl trampoline_gdt - trampoline_begin
	movl $CR0_PE | CR0_ET, %eax
	movl %eax, %cr0
	ljmpl $SEL_CODE32, $TRAMPOLINE + protected - trampoline_begin

	.code32
	.globl trampoline_protected
trampoline_protected:
protected:
	movl $SEL_DATA, %eax
	movl %eax, %ds
	movl %eax, %es
	movl %eax, %ss
	movl $CR4_PAE, %eax
	movl %eax, %cr4
	movl $boot_pml4, %eax
	movl %eax, %cr3
	movl $MSR_EFER, %ecx
	movl $EFER_LME | EFER_SCE, %eax
	xorl %edx, %edx
	wrmsr
	movl $CR0_PE | CR0_ET | CR0_WP | CR0_PG, %eax
	movl %eax, %cr0
	ljmpl $SEL_CODE, $TRAMPOLINE + long_mode - trampoline_begin

	.code64
	.globl trampoline_long
trampoline_long:
long_mode:
	movq $ap_start, %rax
	jmp *%rax

	.balign 4
trampoline_gdt:
	.word gdt_limit
	.long gdt
	.globl trampoline_end
trampoline_end:

	.section .note.GNU-stack, "", @progbits
