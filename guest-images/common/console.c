/* The serial port COM1, polled. Only one CPU prints at a time. */
#include "guest.h"

#define LINE_STATUS (PORT_CONSOLE + 5)
#define LSR_DATA_READY 0x01
#define LSR_TRANSMIT_EMPTY 0x20
#define LSR_NOTHING_THERE 0xff

void console_char(char c)
{
	/* A console that never becomes ready must not stop the guest. */
	for (int tries = 0; tries < 10000; tries++) {
		if (inb(LINE_STATUS) & LSR_TRANSMIT_EMPTY)
			break;
	}
	outb(PORT_CONSOLE, (u8)c);
}

void console_text(const char *text)
{
	for (; *text; text++) {
		if (*text == '\n')
			console_char('\r');
		console_char(*text);
	}
}

void console_number(u64 value)
{
	char digits[20];
	int n = 0;

	do {
		digits[n++] = (char)('0' + value % 10);
		value /= 10;
	} while (value);
	while (n)
		console_char(digits[--n]);
}

void console_hex(u64 value)
{
	int shift = 60;

	console_text("0x");
	while (shift && !(value >> shift))
		shift -= 4;
	for (; shift >= 0; shift -= 4)
		console_char("0123456789abcdef"[value >> shift & 15]);
}

int console_poll(void)
{
	u8 status = inb(LINE_STATUS);

	if (status == LSR_NOTHING_THERE || !(status & LSR_DATA_READY))
		return -1;
	return inb(PORT_CONSOLE);
}
