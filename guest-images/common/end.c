#include "guest.h"

noreturn void guest_exit(u8 status)
{
	outb(PORT_EXIT, status);
	/* A VMM without the exit port: at least take no more of the machine. */
	halt_forever();
}
