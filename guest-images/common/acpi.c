/* From the RSDP to a table. All below 4 GiB, all checksummed. */
#include "guest.h"

#define RSDP_FIRST 0xe0000UL
#define RSDP_LAST 0xffff0UL
#define HEADER_SIZE 36
#define TABLE_MAX 65536
#define FOUR_GIB (1UL << 32)

static u64 load(const u8 *from, int bytes)
{
	u64 value = 0;

	while (bytes--)
		value = value << 8 | from[bytes];
	return value;
}

static int sums_to_zero(const u8 *from, u64 length)
{
	u8 sum = 0;

	while (length--)
		sum = (u8)(sum + *from++);
	return sum == 0;
}

static int begins_with(const u8 *from, const char *text)
{
	while (*text) {
		if (*from++ != (u8)*text++)
			return 0;
	}
	return 1;
}

/* A table with this signature at this address, or NULL. */
static const u8 *table_at(u64 address, const char *signature)
{
	const u8 *table = (const u8 *)address;
	u64 length;

	if (!address || address > FOUR_GIB - TABLE_MAX || !begins_with(table, signature))
		return NULL;
	length = load(table + 4, 4);
	if (length < HEADER_SIZE || length > TABLE_MAX || !sums_to_zero(table, length))
		return NULL;
	return table;
}

static const u8 *find_rsdp(void)
{
	for (u64 address = RSDP_FIRST; address <= RSDP_LAST; address += 16) {
		const u8 *rsdp = (const u8 *)address;

		if (*rsdp == 'R' && begins_with(rsdp, "RSD PTR ") && sums_to_zero(rsdp, 20))
			return rsdp;
	}
	return NULL;
}

const u8 *acpi_table(const char *signature)
{
	const u8 *rsdp = find_rsdp();
	const u8 *root = NULL;
	int entry_size = 8;

	if (!rsdp)
		return NULL;
	if (rsdp[15] >= 2)
		root = table_at(load(rsdp + 24, 8), "XSDT");
	if (!root) {
		entry_size = 4;
		root = table_at(load(rsdp + 16, 4), "RSDT");
	}
	if (!root)
		return NULL;
	for (u64 at = HEADER_SIZE; at + (u64)entry_size <= load(root + 4, 4); at += (u64)entry_size) {
		const u8 *table = table_at(load(root + at, entry_size), signature);

		if (table)
			return table;
	}
	return NULL;
}
