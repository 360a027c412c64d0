// What the store holds, so that every byte that comes back can be judged without a copy of the store.
//
// The fill pattern is a function of the offset: word i, of 8 bytes, of the device is scramble(8 * i). A timed write at
// offset o is scramble(o) followed by a body that is the same for all writes of that run and for no other run's, so that
// a write which was answered but not made shows. A block thus begins with the word of its offset whoever wrote it last, as
// long as all writes since the fill had its size.
#pragma once

#include <stdint.h>
#include <string.h>

static inline uint64_t scramble(uint64_t v)
{
	return (v + 1) * 0x9e3779b97f4a7c15ull;
}

// fill_pattern writes n bytes, a multiple of 8, of the device at offset. A salt other than 0 gives another pattern.
static inline void fill_pattern(char *to, uint64_t offset, size_t n, uint64_t salt)
{
	for (size_t i = 0; i < n; i += 8) {
		uint64_t word = scramble(offset + i) ^ salt;
		memcpy(to + i, &word, 8);
	}
}

// is_pattern tells whether n bytes are what fill_pattern writes.
static inline int is_pattern(const char *p, uint64_t offset, size_t n, uint64_t salt)
{
	uint64_t wrong = 0, word;

	for (size_t i = 0; i < n; i += 8) {
		memcpy(&word, p + i, 8);
		wrong |= word ^ scramble(offset + i) ^ salt;
	}
	return wrong == 0;
}

static inline int is_stamp(const char *p, uint64_t offset)
{
	return is_pattern(p, offset, 8, 0);
}
