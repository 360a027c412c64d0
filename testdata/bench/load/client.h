// A client connects, and makes single requests that wait for their reply. Everything that goes wrong ends the process: a
// server that fails gets no number.
#pragma once

#include <stddef.h>
#include <stdint.h>

struct export {
	uint64_t size;
	int flushes; // the server has NBD_CMD_FLUSH
};

// die prints what happened, with errno if it is not 0, and exits.
void die(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));

// dial connects to unix:PATH or tcp:HOST:PORT and chooses the export of that name.
int dial(const char *address, const char *name, struct export *e);

void recv_full(int fd, void *p, size_t n);
void send_full(int fd, const void *p, size_t n);

// call makes one request; p is the payload of a write or room for that of a read.
void call(int fd, int type, uint64_t offset, void *p, size_t n);

// hang_up ends a connection in the way of the protocol.
void hang_up(int fd);
