// A loop keeps a number of requests in flight on one connection, and checks what comes back.
#pragma once

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "histogram.h"
#include "nbd.h"

// What all connections of a run do.
struct load {
	int depth;       // requests in flight on each connection
	uint32_t block;  // bytes of each request
	int read_share;  // percent
	int sequential;  // each connection has a part of the range for itself
	int kernel;      // frame as drivers/block/nbd.c does: one send for a request, exact receives
	uint64_t range;  // bytes of the device that are used, a multiple of block
	int empty;       // timed reads are of as many bytes behind these, which nobody has written
	uint64_t salt;   // of the body of timed writes
	const char *body; // block bytes
};

enum phase { WARMING, TIMED, DONE };
extern _Atomic enum phase phase;

enum task {
	LOAD,  // until phase is DONE, counted while it is TIMED
	FILL,  // write the fill pattern from start to end
	CHECK, // read it
	READ_BACK, // read what was written last, and check that it is there
};

enum { WRITTEN = 256 }; // how many of the last writes are read back

struct slot {
	// As sent. A timed write goes on with the body.
	struct {
		struct nbd_request request;
		uint64_t stamp;
	} __attribute__((packed)) head;
	uint64_t offset, started;
	int write;
	size_t got; // bytes of its data that have come, or are holes
	char *data; // block bytes, for whatever is written or checked as a whole
};

struct loop {
	const struct load *load;
	int fd;
	enum task task;
	uint64_t random;        // state of the generator
	uint64_t start, position, end; // of a sequential task

	struct slot *slots;
	int *idle, nidle;            // slots that have no request
	int *queue, first, nqueue;   // ring of slots whose request is not sent
	size_t sent;                 // bytes of the first of them that are
	char *inbox;
	size_t inbox_size;
	union {
		struct nbd_reply simple;
		struct nbd_chunk chunk;
	} reply;                // being received
	size_t reply_got;       // bytes of it
	struct slot *slot;      // whose data are being received
	size_t data_left;       // bytes that belong to the reply, or chunk
	int done;               // nothing comes behind them

	uint64_t written[WRITTEN]; // offsets of the last timed writes
	uint64_t nwritten;
	uint64_t requests; // counted
	struct histogram latency; // in nanoseconds
};

void loop_init(struct loop *l, const struct load *load, int fd, uint64_t seed);

// loop_run does a task, and returns when no request is in flight any more.
void loop_run(struct loop *l, enum task task, uint64_t position, uint64_t end);
