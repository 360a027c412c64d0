// A client connects, and makes single requests that wait for their reply. Everything that goes wrong ends the process: a
// server that fails gets no number.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

struct export {
	uint64_t size;
	int flushes; // the server has NBD_CMD_FLUSH
};

// die prints what happened, with errno if it is not 0, and exits.
void die(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));

// How dial speaks to a server.
struct manner {
	int structured; // with structured replies
	const char *tls; // over TLS, with ca-cert.pem, client-cert.pem and client-key.pem of this folder; NULL: in plain text
};

// dial connects to unix:PATH or tcp:HOST:PORT and chooses the export of that name. What it returns is for the functions
// below, and for poll.
int dial(const char *address, const char *name, struct manner m, struct export *e);

// net_send sends as much of n pieces as the socket takes, and net_recv waits for something to receive. They return what
// sendmsg and recv do.
ssize_t net_send(int fd, const struct iovec *iov, int n);
ssize_t net_recv(int fd, void *p, size_t n);

void recv_full(int fd, void *p, size_t n);
void send_full(int fd, const void *p, size_t n);

// call makes one request; p is the payload of a write or room for that of a read.
void call(int fd, int type, uint64_t offset, void *p, size_t n);

// hang_up ends a connection in the way of the protocol.
void hang_up(int fd);
