/*
 * Entry of the guests that are started in 32-bit protected mode without paging:
 * by Multiboot 1 (EAX = its magic, EBX = its information) or by PVH
 * (EBX = the start information). From there to long mode, and to format_main().
 *
 * Built once for each: MULTIBOOT or PVH is defined.
 */
#include "layout.h"

	.cfi_sections .debug_frame

#ifdef MULTIBOOT
#define MULTIBOOT_MAGIC 0x1badb002
#define MULTIBOOT_FLAGS 0x00000003	/* align modules, say how much memory */

	.section .header, "a"
	.balign 4
	.long MULTIBOOT_MAGIC
	.long MULTIBOOT_FLAGS
	.long -(MULTIBOOT_MAGIC + MULTIBOOT_FLAGS)
#endif

#ifdef PVH
#define NOTE_PHYS32_ENTRY 18

	.section .note.pvh, "a", @note
	.balign 4
	.long 2f - 1f
	.long 4f - 3f
	.long NOTE_PHYS32_ENTRY
1:	.asciz "Xen"
2:	.balign 4
3:	.quad _start
4:	.balign 4
#endif

#define CR0_PE_ET_WP_PG 0x80010011
#define CR4_PAE 0x20
#define MSR_EFER 0xc0000080
#define EFER_LME 0x100

	.text
	.code32
	.globl _start
	.type _start, @function
_start:
	cli
	cld
	movl %eax, %esi
	movl $stack_top, %esp
	lgdt gdt_pointer
	movl $SEL_DATA, %eax
	movl %eax, %ds
	movl %eax, %es
	movl %eax, %ss
	movl $CR4_PAE, %eax
	movl %eax, %cr4
	movl $boot_pml4, %eax
	movl %eax, %cr3
	movl $MSR_EFER, %ecx
	movl $EFER_LME, %eax
	xorl %edx, %edx
	wrmsr
	.globl format_paging
format_paging:
	movl $CR0_PE_ET_WP_PG, %eax
	movl %eax, %cr0
	ljmp $SEL_CODE, $format_long
	.size _start, . - _start

	.code64
	.globl format_long
	.type format_long, @function
format_long:
	.cfi_startproc
	.cfi_undefined %rip
	lidt idt_pointer
	xorl %ebp, %ebp
	movl %esi, %edi
	movl %ebx, %esi
	call format_main
	ud2
	.cfi_endproc
	.size format_long, . - format_long

	.section .bss
	.balign 16
	.skip STACK_SIZE
stack_top:

	.section .note.GNU-stack, "", @progbits
