#include "verify.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "nbd.h"
#include "pattern.h"

enum {
	REQUESTS = 300,
	SECTOR = 512,
	SPACE = 8 << 20,    // bytes of the device that are written
	LONGEST = 1 << 20,  // bytes of a request
	USUAL = 128 << 10,  // likewise, of most
};

void verify(int fd, const struct export *e, uint64_t range)
{
	uint64_t space = range < SPACE ? range : SPACE;
	char *model = malloc(space), *got = malloc(space);

	srandom(1);
	fill_pattern(model, 0, space, 0);
	for (int i = 1; i <= REQUESTS; i++) {
		uint64_t longest = i % 16 == 0 ? LONGEST : USUAL;
		uint64_t length = (1 + random() % (longest / SECTOR)) * SECTOR;
		uint64_t offset = random() % ((space - length) / SECTOR + 1) * SECTOR;

		if (random() % 2) {
			fill_pattern(model + offset, offset, length, i);
			call(fd, NBD_CMD_WRITE, offset, model + offset, length);
			continue;
		}
		call(fd, NBD_CMD_READ, offset, got, length);
		errno = 0;
		if (memcmp(got, model + offset, length) != 0)
			die("wrong data at %lu, length %lu", (unsigned long)offset, (unsigned long)length);
	}
	for (uint64_t at = 0; at < space; at += LONGEST) {
		uint64_t length = space - at < LONGEST ? space - at : LONGEST;

		call(fd, NBD_CMD_READ, at, got + at, length);
		errno = 0;
		if (memcmp(got + at, model + at, length) != 0)
			die("wrong data at %lu, length %lu", (unsigned long)at, (unsigned long)length);
		fill_pattern(model + at, at, length, 0);
		call(fd, NBD_CMD_WRITE, at, model + at, length);
	}
	if (e->flushes)
		call(fd, NBD_CMD_FLUSH, 0, NULL, 0);
	free(model);
	free(got);
}
