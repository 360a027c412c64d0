// floor is what a server cannot do without: one large recv, all complete requests executed on a store in memory, one
// sendmsg with all replies, whose data are sent from where they are. No bounds are checked and no command but READ, WRITE
// and DISC is known, so it is of no use but as the measure for servers that are.
//
//	floor PATH|127.0.0.1:PORT SIZE [FILE]
//
// With a file it is what a server of files cannot do without: a pread or a pwrite for each request, and for large reads a
// sendfile. The file must be in the page cache.
#define _GNU_SOURCE
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
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

static char *store; // or
static int file = -1;
static uint64_t size;

struct conn {
	int fd;
	char *inbox;
	size_t have; // bytes in inbox
	struct nbd_reply replies[BATCH_REPLIES];
	struct iovec iov[2 * BATCH_REPLIES];
	int nreplies, niov;
	size_t bytes;                     // of data in the batch
	char outbox[BATCH_BYTES + IN_PLACE]; // data of the batch that come from a file
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

// read_file answers a read.
static int read_file(struct conn *c, const struct nbd_request *r)
{
	off_t offset = be64toh(r->offset);
	size_t length = be32toh(r->length);
	struct nbd_reply reply = {.magic = htobe32(NBD_REPLY_MAGIC), .cookie = r->cookie};

	if (length < IN_PLACE) {
		char *to = c->outbox + c->bytes;
		return pread(file, to, length, offset) != (ssize_t)length || answer(c, r->cookie, to, length) ? -1 : 0;
	}
	if (flush(c) || send(c->fd, &reply, sizeof reply, MSG_NOSIGNAL | MSG_MORE) != sizeof reply)
		return -1;
	while (length > 0) {
		ssize_t n = sendfile(c->fd, file, &offset, length);
		if (n <= 0)
			return -1;
		length -= n;
	}
	return 0;
}

// complete has the whole payload of a write in the inbox.
static int complete(struct conn *c, size_t end)
{
	if (flush(c) || recv_full(c->fd, c->inbox + c->have, end - c->have))
		return -1;
	c->have = end;
	return 0;
}

// finish_write takes the rest of a write, of which got bytes are here, from the socket into the store, and ends with an
// empty inbox.
static int finish_write(struct conn *c, const struct nbd_request *r, const char *payload, size_t got)
{
	uint64_t offset = be64toh(r->offset), cookie = r->cookie;
	size_t length = be32toh(r->length);

	c->have = 0;
	if (flush(c))
		return -1;
	if (file < 0) {
		memcpy(store + offset, payload, got);
		if (recv_full(c->fd, store + offset + got, length - got))
			return -1;
		return answer(c, cookie, NULL, 0);
	}
	while (pwrite(file, payload, got, offset) == (ssize_t)got) {
		offset += got;
		length -= got;
		if (length == 0)
			return answer(c, cookie, NULL, 0);
		payload = c->inbox;
		got = length < BATCH_BYTES ? length : BATCH_BYTES;
		if (recv_full(c->fd, c->inbox, got))
			return -1;
	}
	return -1;
}

// execute answers a request whose payload, if it has one, is complete.
static int execute(struct conn *c, const struct nbd_request *r, const char *payload)
{
	uint64_t offset = be64toh(r->offset);
	size_t length = be32toh(r->length);

	if (be16toh(r->type) == NBD_CMD_READ)
		return file < 0 ? answer(c, r->cookie, store + offset, length) : read_file(c, r);
	if (file < 0)
		memcpy(store + offset, payload, length);
	else if (pwrite(file, payload, length, offset) != (ssize_t)length)
		return -1;
	return answer(c, r->cookie, NULL, 0);
}

// execute_all answers what the inbox has, and keeps what is not complete.
static int execute_all(struct conn *c)
{
	size_t pos = 0;

	while (c->have - pos >= sizeof(struct nbd_request)) {
		const struct nbd_request *r = (void *)(c->inbox + pos);
		size_t start = pos + sizeof *r, end = start;

		if (be16toh(r->type) == NBD_CMD_WRITE)
			end += be32toh(r->length);
		else if (be16toh(r->type) != NBD_CMD_READ)
			return -1;
		if (c->have < end) {
			if (end - start < IN_PLACE)
				break;
			if (file < 0 || end > INBOX)
				return finish_write(c, r, c->inbox + start, c->have - start) || flush(c) ? -1 : 0;
			if (complete(c, end))
				return -1;
		}
		if (execute(c, r, c->inbox + start))
			return -1;
		pos = end;
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

static int bind_path(const char *path)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_STREAM, 0);

	strncpy(address.sun_path, path, sizeof address.sun_path - 1);
	unlink(path);
	return bind(fd, (void *)&address, sizeof address) ? -1 : fd;
}

static int bind_port(const char *host)
{
	const char *port = strchr(host, ':');
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	int fd = socket(AF_INET, SOCK_STREAM, 0), yes = 1;

	address.sin_port = htons(port ? atoi(port + 1) : 0);
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
	return bind(fd, (void *)&address, sizeof address) ? -1 : fd;
}

int main(int argc, char **argv)
{
	int listener;

	if (argc != 3 && argc != 4) {
		fprintf(stderr, "usage: floor PATH|127.0.0.1:PORT SIZE [FILE]\n");
		return 2;
	}
	if (argc == 4 && (file = open(argv[3], O_RDWR)) < 0) {
		perror(argv[3]);
		return 1;
	}
	size = strtoull(argv[2], NULL, 0);
	store = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	listener = argv[1][0] == '/' ? bind_path(argv[1]) : bind_port(argv[1]);
	if (store == MAP_FAILED || listener < 0 || listen(listener, 64)) {
		perror("floor");
		return 1;
	}
	for (;;) {
		int fd = accept(listener, NULL, NULL);
		int yes = 1;
		pthread_t thread;

		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes); // which is no harm where it is not TCP

		if (fd < 0 || pthread_create(&thread, NULL, serve, (void *)(intptr_t)fd)) {
			perror("floor");
			return 1;
		}
		pthread_detach(thread);
	}
}
