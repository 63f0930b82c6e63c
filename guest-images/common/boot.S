/*
 * Entry of the bare-metal guests.
 *
 * The VMM enters here in long mode with the first 4 GiB identity-mapped,
 * interrupts off, RDI = an hvm_start_info or 0, and no stack. Nothing of the
 * VMM's tables is kept: they may lie where the real-mode trampoline goes.
 */
#include "layout.h"

	.cfi_sections .debug_frame

	.code64
	.text

	.globl _start
	.type _start, @function
_start:
	.cfi_startproc
	.cfi_undefined %rip		/* backtraces end here */
	cli
	cld
	movq $boot_stacks + STACK_SIZE, %rsp
	xorl %ebp, %ebp
	movq %rdi, %rbx
	call load_tables
	movq %rbx, %rdi
	call guest_main
	ud2
	.cfi_endproc
	.size _start, . - _start

/*
 * Where every further CPU enters: from the trampoline after INIT/SIPI, or
 * straight from the ACPI wakeup mailbox. It takes a stack by ticket.
 */
	.globl ap_start
	.type ap_start, @function
ap_start:
	.cfi_startproc
	.cfi_undefined %rip
	cli
	cld
	movl $1, %eax
	lock xaddl %eax, ap_tickets
	incl %eax			/* stack 0 is the boot processor's */
	cmpl $MAX_CPUS, %eax
	jae 1f
	imull $STACK_SIZE, %eax, %eax
	leaq boot_stacks + STACK_SIZE(%rax), %rsp
	xorl %ebp, %ebp
	call load_tables
	call ap_entered
1:	hlt
	jmp 1b
	.cfi_endproc
	.size ap_start, . - ap_start

	.type load_tables, @function
load_tables:
	.cfi_startproc
	movq $boot_pml4, %rax
	movq %rax, %cr3
	lgdt gdt_pointer
	lidt idt_pointer
	popq %rdx
	.cfi_adjust_cfa_offset -8
	.cfi_register %rip, %rdx
	pushq $SEL_CODE
	pushq $1f
	lretq
1:	movl $SEL_DATA, %eax
	movl %eax, %ds
	movl %eax, %es
	movl %eax, %ss
	xorl %eax, %eax
	movl %eax, %fs
	movl %eax, %gs
	jmp *%rdx
	.cfi_endproc
	.size load_tables, . - load_tables

	.data
	.balign 4
	.globl ap_tickets
ap_tickets:
	.long 0

	.section .bss
	.balign 16
	.globl boot_stacks
	.type boot_stacks, @object
boot_stacks:
	.skip STACK_SIZE * MAX_CPUS
	.size boot_stacks, . - boot_stacks

	.section .note.GNU-stack, "", @progbits
