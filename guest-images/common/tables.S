/*
 * GDT and identity page tables of the guests that need nothing special:
 * the first 4 GiB in 2 MiB pages. (The fixture guest has its own.)
 */
#include "layout.h"

#define PRESENT_WRITE 0x03
#define PRESENT_WRITE_LARGE 0x83

	.data
	.balign 16
	.globl gdt
gdt:
	.quad 0
	.quad 0x00af9b000000ffff	/* SEL_CODE */
	.quad 0x00cf93000000ffff	/* SEL_DATA */
	.quad 0x00cff3000000ffff	/* SEL_USER_DATA */
	.quad 0x00affb000000ffff	/* SEL_USER_CODE */
	.quad 0x00cf9b000000ffff	/* SEL_CODE32 */
	.globl gdt_limit
	.set gdt_limit, . - gdt - 1

	.balign 8
	.globl gdt_pointer
gdt_pointer:
	.word gdt_limit
	.quad gdt

	.balign 4096
	.globl boot_pml4
boot_pml4:
	.quad page_directory_pointers + PRESENT_WRITE
	.fill 511, 8, 0
page_directory_pointers:
	.quad page_directories + 0x0000 + PRESENT_WRITE
	.quad page_directories + 0x1000 + PRESENT_WRITE
	.quad page_directories + 0x2000 + PRESENT_WRITE
	.quad page_directories + 0x3000 + PRESENT_WRITE
	.fill 508, 8, 0
page_directories:
	.set page, 0
	.rept 2048
	.quad page + PRESENT_WRITE_LARGE
	.set page, page + 0x200000
	.endr

	.section .note.GNU-stack, "", @progbits
