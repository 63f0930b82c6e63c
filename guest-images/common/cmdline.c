/* The command line: blank-separated words. */
#include "guest.h"

static char line[2048];

void cmdline_save(const struct start_info *info)
{
	int known = info && info->magic == START_INFO_MAGIC;

	cmdline_save_text(known ? (const char *)info->cmdline : NULL);
}

void cmdline_save_text(const char *from)
{
	u32 n = 0;

	while (from && from[n] && n < sizeof(line) - 1) {
		line[n] = from[n];
		n++;
	}
	line[n] = 0;
}

void cmdline_each(void (*handle)(const char *word))
{
	static char word[sizeof(line)];
	const char *p = line;

	while (*p) {
		u32 n = 0;

		while (*p == ' ')
			p++;
		while (*p && *p != ' ')
			word[n++] = *p++;
		word[n] = 0;
		if (n)
			handle(word);
	}
}

const char *after(const char *word, const char *prefix)
{
	while (*prefix) {
		if (*word++ != *prefix++)
			return NULL;
	}
	return word;
}

int same(const char *a, const char *b)
{
	const char *rest = after(a, b);

	return rest && !*rest;
}

int parse_number(const char *text, u64 *value)
{
	u64 n = 0;

	if (!*text)
		return 0;
	for (; *text; text++) {
		u64 digit = (u64)(*text - '0');

		if (digit > 9 || n > (~0UL - digit) / 10)
			return 0;
		n = n * 10 + digit;
	}
	*value = n;
	return 1;
}
