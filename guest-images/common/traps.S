/*
 * Exceptions of the guests that expect none. Every vector has a stub that
 * brings the frame to one shape and calls trap() in traps.c.
 */
#include "layout.h"

	.code64
	.text

	.altmacro
	.macro stub vector
	.balign 16
	.ifeq (\vector - 8) * (\vector - 10) * (\vector - 11) * (\vector - 12) * (\vector - 13) * (\vector - 14) * (\vector - 17) * (\vector - 21) * (\vector - 29) * (\vector - 30)
	.else
	pushq $0			/* this vector has no error code */
	.endif
	pushq $\vector
	jmp trap_common
	.endm

	.balign 16
	.globl trap_stubs
trap_stubs:
	.set vector, 0
	.rept 32
	stub %vector
	.set vector, vector + 1
	.endr

	.type trap_common, @function
trap_common:
	pushq %rax
	pushq %rcx
	pushq %rdx
	pushq %rsi
	pushq %rdi
	pushq %r8
	pushq %r9
	pushq %r10
	pushq %r11
	cld
	movq %rsp, %rdi
	pushq %rbp
	movq %rsp, %rbp
	andq $-16, %rsp
	call trap
	movq %rbp, %rsp
	popq %rbp
	popq %r11
	popq %r10
	popq %r9
	popq %r8
	popq %rdi
	popq %rsi
	popq %rdx
	popq %rcx
	popq %rax
	addq $16, %rsp
	iretq
	.size trap_common, . - trap_common

	.data
	.balign 8
	.globl idt_pointer
idt_pointer:
	.word 32 * 16 - 1
	.quad idt

	.section .note.GNU-stack, "", @progbits
