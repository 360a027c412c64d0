// A histogram of latencies, with 32 steps for each power of two: at most 3 % off.
#pragma once

#include <stdint.h>

enum { STEPS = 32, BUCKETS = 60 * STEPS };

struct histogram {
	uint64_t count[BUCKETS];
};

static inline int bucket(uint64_t v)
{
	int exponent;

	if (v < 2 * STEPS)
		return v;
	exponent = 63 - __builtin_clzll(v) - 5; // v >> exponent is STEPS to 2 * STEPS - 1
	return exponent * STEPS + (int)(v >> exponent);
}

static inline uint64_t bucket_value(int i)
{
	int exponent;

	if (i < 2 * STEPS)
		return i;
	exponent = i / STEPS - 1;
	return (uint64_t)(i % STEPS + STEPS) << exponent;
}

static inline void histogram_add(struct histogram *to, const struct histogram *from)
{
	for (int i = 0; i < BUCKETS; i++)
		to->count[i] += from->count[i];
}

// percentile is the value below which p percent are.
static inline uint64_t percentile(const struct histogram *h, int p)
{
	uint64_t total = 0, seen = 0;

	for (int i = 0; i < BUCKETS; i++)
		total += h->count[i];
	for (int i = 0; i < BUCKETS; i++)
		if ((seen += h->count[i]) * 100 >= total * p && seen > 0)
			return bucket_value(i);
	return 0;
}
