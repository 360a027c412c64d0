// floor is what a server cannot do without: one large recv, all complete requests executed on a store in memory, one
// sendmsg with all replies, whose data are sent from where they are. No bounds are checked and no command but READ, WRITE
// and DISC is known, so it is of no use but as the measure for servers that are.
//
//	floor PATH SIZE
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#include "nbd.h"

enum {
	INBOX = 512 << 10,       // bytes received at once
	BATCH_REPLIES = 256,     // that one sendmsg carries at most
	BATCH_BYTES = 256 << 10, // likewise; a larger batch falls out of the cache
	IN_PLACE = 64 << 10,     // a write from here on is received into the store if it has not all arrived
};

static char *store;
static uint64_t size;

struct conn {
	int fd;
	char *inbox;
	size_t have; // bytes in inbox
	struct nbd_reply replies[BATCH_REPLIES];
	struct iovec iov[2 * BATCH_REPLIES];
	int nreplies, niov;
	size_t bytes; // of data in the batch
};

static int recv_full(int fd, void *p, size_t n)
{
	return recv(fd, p, n, MSG_WAITALL) == (ssize_t)n ? 0 : -1;
}

static int send_full(int fd, const void *p, size_t n)
{
	return send(fd, p, n, MSG_NOSIGNAL) == (ssize_t)n ? 0 : -1;
}

// flush sends the batch.
static int flush(struct conn *c)
{
	struct iovec *v = c->iov;
	int n = c->niov;

	c->niov = c->nreplies = 0;
	c->bytes = 0;
	while (n > 0) {
		struct msghdr m = {.msg_iov = v, .msg_iovlen = n};
		ssize_t sent = sendmsg(c->fd, &m, MSG_NOSIGNAL);
		if (sent < 0)
			return -1;
		while (n > 0 && sent >= (ssize_t)v->iov_len) {
			sent -= v->iov_len;
			v++, n--;
		}
		if (n > 0) {
			v->iov_base = (char *)v->iov_base + sent;
			v->iov_len -= sent;
		}
	}
	return 0;
}

static int answer(struct conn *c, uint64_t cookie, void *data, size_t n)
{
	struct nbd_reply *r = &c->replies[c->nreplies++];

	*r = (struct nbd_reply){.magic = htobe32(NBD_REPLY_MAGIC), .cookie = cookie};
	c->iov[c->niov++] = (struct iovec){r, sizeof *r};
	if (n > 0)
		c->iov[c->niov++] = (struct iovec){data, n};
	c->bytes += n;
	return c->nreplies == BATCH_REPLIES || c->bytes >= BATCH_BYTES ? flush(c) : 0;
}

// finish_write takes the rest of a write, of which got bytes are here, from the socket into the store.
static int finish_write(struct conn *c, const struct nbd_request *r, const char *payload, size_t got)
{
	char *to = store + be64toh(r->offset);
	uint64_t cookie = r->cookie;
	size_t length = be32toh(r->length);

	memcpy(to, payload, got);
	if (flush(c) || recv_full(c->fd, to + got, length - got))
		return -1;
	return answer(c, cookie, NULL, 0);
}

// execute_all answers what the inbox has, and keeps what is not complete.
static int execute_all(struct conn *c)
{
	size_t pos = 0;

	while (c->have - pos >= sizeof(struct nbd_request)) {
		const struct nbd_request *r = (void *)(c->inbox + pos);
		char *payload = c->inbox + pos + sizeof *r, *at = store + be64toh(r->offset);
		size_t length = be32toh(r->length), got = c->have - pos - sizeof *r;

		if (be16toh(r->type) == NBD_CMD_READ) {
			if (answer(c, r->cookie, at, length))
				return -1;
			pos += sizeof *r;
		} else if (be16toh(r->type) != NBD_CMD_WRITE) {
			return -1;
		} else if (got >= length) {
			memcpy(at, payload, length);
			if (answer(c, r->cookie, NULL, 0))
				return -1;
			pos += sizeof *r + length;
		} else if (length >= IN_PLACE) {
			if (finish_write(c, r, payload, got))
				return -1;
			pos = c->have;
		} else {
			break;
		}
	}
	memmove(c->inbox, c->inbox + pos, c->have - pos);
	c->have -= pos;
	return flush(c);
}

static int handshake(int fd)
{
	struct nbd_hello hello = {htobe64(NBD_MAGIC), htobe64(NBD_OPTION_MAGIC), htobe16(3)};
	struct {
		struct nbd_option_reply head;
		struct nbd_export_info info;
		struct nbd_option_reply ack;
	} __attribute__((packed)) reply = {
		{htobe64(NBD_OPTION_REPLY_MAGIC), htobe32(NBD_OPT_GO), htobe32(NBD_REP_INFO), htobe32(sizeof reply.info)},
		{htobe16(NBD_INFO_EXPORT), htobe64(size), htobe16(NBD_FLAG_HAS_FLAGS | NBD_FLAG_CAN_MULTI_CONN)},
		{htobe64(NBD_OPTION_REPLY_MAGIC), htobe32(NBD_OPT_GO), htobe32(NBD_REP_ACK), 0},
	};
	uint32_t client_flags;
	struct nbd_option option;
	char data[4096];

	if (send_full(fd, &hello, sizeof hello) || recv_full(fd, &client_flags, sizeof client_flags) ||
	    recv_full(fd, &option, sizeof option))
		return -1;
	if (be32toh(option.option) != NBD_OPT_GO || be32toh(option.length) > sizeof data ||
	    recv_full(fd, data, be32toh(option.length)))
		return -1;
	return send_full(fd, &reply, sizeof reply);
}

static void *serve(void *arg)
{
	struct conn *c = calloc(1, sizeof *c);

	c->fd = (int)(intptr_t)arg;
	c->inbox = aligned_alloc(4096, INBOX);
	memset(c->inbox, 0, INBOX);
	if (handshake(c->fd) == 0) {
		for (;;) {
			ssize_t n = recv(c->fd, c->inbox + c->have, INBOX - c->have, 0);
			if (n <= 0)
				break;
			c->have += n;
			if (execute_all(c))
				break;
		}
	}
	close(c->fd);
	free(c->inbox);
	free(c);
	return NULL;
}

int main(int argc, char **argv)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int listener = socket(AF_UNIX, SOCK_STREAM, 0);

	if (argc != 3) {
		fprintf(stderr, "usage: floor PATH SIZE\n");
		return 2;
	}
	size = strtoull(argv[2], NULL, 0);
	store = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	strncpy(address.sun_path, argv[1], sizeof address.sun_path - 1);
	unlink(argv[1]);
	if (store == MAP_FAILED || bind(listener, (void *)&address, sizeof address) || listen(listener, 64)) {
		perror("floor");
		return 1;
	}
	for (;;) {
		int fd = accept(listener, NULL, NULL);
		pthread_t thread;

		if (fd < 0 || pthread_create(&thread, NULL, serve, (void *)(intptr_t)fd)) {
			perror("floor");
			return 1;
		}
		pthread_detach(thread);
	}
}
