#define _GNU_SOURCE
#include "loop.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "client.h"
#include "cpu.h"
#include "pattern.h"

enum {
	INBOX = 256 << 10, // bytes received at once; more would not stay in the cache
	BURST = 128,       // requests sent at once
};

// NOT_MADE is the cookie of a slot that waits for no reply.
#define NOT_MADE (~0ull)

_Atomic enum phase phase;

// pages is memory that is taken when it is touched.
static void *pages(size_t n)
{
	void *p = mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (p == MAP_FAILED)
		die("%zu bytes of memory", n);
	return p;
}

void loop_init(struct loop *l, const struct load *load, int fd, uint64_t seed)
{
	char *data = pages((size_t)load->depth * load->block);

	*l = (struct loop){.load = load, .fd = fd, .random = scramble(seed) | 1};
	l->slots = calloc(load->depth, sizeof *l->slots);
	l->idle = calloc(load->depth, sizeof *l->idle);
	l->queue = calloc(load->depth, sizeof *l->queue);
	l->inbox_size = load->block > INBOX ? load->block : INBOX;
	l->inbox = pages(l->inbox_size);
	for (int i = 0; i < load->depth; i++) {
		l->slots[i].data = data + (size_t)i * load->block;
		l->slots[i].head.request.cookie = NOT_MADE;
		l->idle[l->nidle++] = i;
	}
}

static uint64_t next_random(struct loop *l)
{
	l->random ^= l->random << 13;
	l->random ^= l->random >> 7;
	l->random ^= l->random << 17;
	return l->random;
}

// choose decides on the next request of the task; there may be none.
static int choose(struct loop *l, struct slot *s)
{
	const struct load *load = l->load;
	int sequential = load->sequential || l->task != LOAD;

	if (l->task == LOAD ? phase == DONE : l->position >= l->end)
		return 0;
	s->write = l->task == FILL || (l->task == LOAD && (int)(next_random(l) % 100) >= load->read_share);
	if (l->task == READ_BACK)
		s->offset = l->written[l->position++];
	else if (sequential)
		s->offset = l->position, l->position += load->block;
	else
		s->offset = next_random(l) % (load->range / load->block) * load->block + (load->empty ? load->range : 0);
	if (l->task == LOAD && sequential && l->position >= l->end)
		l->position = l->start;
	if (l->task == FILL)
		fill_pattern(s->data, s->offset, load->block, 0);
	if (l->task == LOAD && s->write)
		l->written[l->nwritten++ % WRITTEN] = s->offset;
	return 1;
}

// refill queues a request for every idle slot.
static void refill(struct loop *l)
{
	uint64_t t = now();

	while (l->nidle > 0) {
		int i = l->idle[l->nidle - 1];
		struct slot *s = &l->slots[i];

		if (!choose(l, s))
			return;
		l->nidle--;
		s->started = t;
		s->got = 0;
		s->head.stamp = scramble(s->offset);
		s->head.request = (struct nbd_request){
			htobe32(NBD_REQUEST_MAGIC), 0, htobe16(s->write ? NBD_CMD_WRITE : NBD_CMD_READ),
			0xb0b0000000000000ull | i, htobe64(s->offset), htobe32(l->load->block),
		};
		l->queue[(l->first + l->nqueue++) % l->load->depth] = i;
	}
}

static int add(struct iovec *iov, int n, const void *p, size_t length, size_t *skip)
{
	if (*skip >= length) {
		*skip -= length;
		return n;
	}
	iov[n] = (struct iovec){(char *)p + *skip, length - *skip};
	*skip = 0;
	return n + 1;
}

// gather lists what is to be sent next.
static int gather(struct loop *l, struct iovec *iov)
{
	int n = 0, count = l->nqueue < BURST ? l->nqueue : BURST;
	size_t skip = l->sent;

	if (l->load->kernel)
		count = 1;
	for (int i = 0; i < count; i++) {
		struct slot *s = &l->slots[l->queue[(l->first + i) % l->load->depth]];

		if (!s->write) {
			n = add(iov, n, &s->head.request, sizeof s->head.request, &skip);
		} else if (l->task == FILL) {
			n = add(iov, n, &s->head.request, sizeof s->head.request, &skip);
			n = add(iov, n, s->data, l->load->block, &skip);
		} else {
			n = add(iov, n, &s->head, sizeof s->head, &skip);
			n = add(iov, n, l->load->body + 8, l->load->block - 8, &skip);
		}
	}
	return n;
}

// push sends what is queued, and tells whether the socket took it all.
static int push(struct loop *l)
{
	struct iovec iov[2 * BURST];

	while (l->nqueue > 0) {
		ssize_t n = net_send(l->fd, iov, gather(l, iov));

		if (n < 0 && errno == EAGAIN)
			return 0;
		if (n < 0)
			die("send");
		l->sent += n;
		while (l->nqueue > 0) {
			struct slot *s = &l->slots[l->queue[l->first]];
			size_t length = sizeof s->head.request + (s->write ? l->load->block : 0);

			if (l->sent < length)
				break;
			l->sent -= length;
			l->first = (l->first + 1) % l->load->depth;
			l->nqueue--;
		}
	}
	return 1;
}

// find finds the slot that a reply is for.
static struct slot *find(struct loop *l, uint64_t cookie)
{
	uint64_t i = cookie & 0xffffff;

	errno = 0;
	if (i >= (uint64_t)l->load->depth || l->slots[i].head.request.cookie != cookie)
		die("reply to a request that was not made, cookie %#lx", (unsigned long)cookie);
	return &l->slots[i];
}

// header_size is how long the header is that begins with what has come of it; more, once more of it has.
static size_t header_size(const struct loop *l)
{
	const struct nbd_chunk *c = &l->reply.chunk;

	if (l->reply_got < sizeof c->magic || be32toh(c->magic) == NBD_REPLY_MAGIC)
		return sizeof(struct nbd_reply);
	errno = 0;
	if (be32toh(c->magic) != NBD_CHUNK_MAGIC)
		die("reply with magic %#x", be32toh(c->magic));
	if (l->reply_got < offsetof(struct nbd_chunk, offset) || be16toh(c->type) == NBD_REPLY_TYPE_NONE)
		return offsetof(struct nbd_chunk, offset);
	return be16toh(c->type) == NBD_REPLY_TYPE_OFFSET_DATA ? offsetof(struct nbd_chunk, hole) : sizeof *c;
}

// begin_chunk makes of a chunk's header what is to come, and sets holes to zero.
static void begin_chunk(struct loop *l)
{
	const struct nbd_chunk *c = &l->reply.chunk;
	uint32_t hole = be32toh(c->hole);
	uint64_t at;

	l->slot = find(l, c->cookie);
	l->done = be16toh(c->flags) & NBD_REPLY_FLAG_DONE;
	if (be16toh(c->type) == NBD_REPLY_TYPE_NONE)
		return;
	at = be64toh(c->offset) - l->slot->offset;
	if (be16toh(c->type) > NBD_REPLY_TYPE_OFFSET_HOLE || at != l->slot->got)
		die("read at %lu: chunk of type %#x at %lu", (unsigned long)l->slot->offset, be16toh(c->type), (unsigned long)at);
	if (be16toh(c->type) == NBD_REPLY_TYPE_OFFSET_DATA) {
		l->data_left = be32toh(c->length) - 8;
	} else {
		memset(l->slot->data + at, 0, l->task == LOAD ? 8 : hole);
		l->slot->got += hole;
	}
	if (l->slot->got + l->data_left > l->load->block)
		die("read at %lu: more data than wanted", (unsigned long)l->slot->offset);
}

// begin makes of the header of a reply what is to come.
static void begin(struct loop *l)
{
	const struct nbd_reply *r = &l->reply.simple;

	l->data_left = 0;
	if (be32toh(r->magic) == NBD_CHUNK_MAGIC) {
		begin_chunk(l);
		return;
	}
	l->slot = find(l, r->cookie);
	if (r->error)
		die("%s at %lu: error %u", l->slot->write ? "write" : "read", (unsigned long)l->slot->offset, be32toh(r->error));
	l->done = 1;
	l->data_left = l->slot->write ? 0 : l->load->block;
}

// finish judges a request that has been answered.
static void finish(struct loop *l, struct slot *s, uint64_t t)
{
	uint32_t block = l->load->block;
	int good = 1;

	if (l->task == CHECK)
		good = is_pattern(s->data, s->offset, block, 0);
	else if (l->task == READ_BACK)
		good = is_stamp(s->data, s->offset) && is_pattern(s->data + 8, 8, block - 8, l->load->salt);
	else if (!s->write)
		good = l->load->empty ? *(uint64_t *)s->data == 0 : is_stamp(s->data, s->offset);
	errno = 0;
	if (!good)
		die("wrong data at %lu, length %u%s", (unsigned long)s->offset, block,
		    l->task == READ_BACK ? ", which had been written" : "");
	if (l->task == LOAD && phase == TIMED) {
		l->requests++;
		l->latency.count[bucket(t - s->started)]++;
	}
	s->head.request.cookie = NOT_MADE;
	l->idle[l->nidle++] = s - l->slots;
}

// consume takes n bytes that came at time t. Of the data of a timed read only what is_stamp looks at is kept.
static void consume(struct loop *l, const char *p, size_t n, uint64_t t)
{
	while (n > 0) {
		struct slot *s;
		size_t want, keep;

		if (l->slot == NULL) {
			want = header_size(l) - l->reply_got;
			want = n < want ? n : want;
			memcpy((char *)&l->reply + l->reply_got, p, want);
			p += want, n -= want, l->reply_got += want;
			if (l->reply_got < header_size(l))
				continue;
			l->reply_got = 0;
			begin(l);
		}
		s = l->slot;
		want = n < l->data_left ? n : l->data_left;
		keep = l->task != LOAD ? want : s->got < 8 ? 8 - s->got : 0;
		memcpy(s->data + s->got, p, keep < want ? keep : want);
		p += want, n -= want, s->got += want, l->data_left -= want;
		if (l->data_left > 0)
			return;
		l->slot = NULL;
		errno = 0;
		if (l->done && !s->write && s->got != l->load->block)
			die("read at %lu: %zu bytes came", (unsigned long)s->offset, s->got);
		if (l->done)
			finish(l, s, t);
	}
}

// pull receives what there is; like the kernel, exactly one reply.
static void pull(struct loop *l)
{
	ssize_t n;

	errno = 0;
	if (!l->load->kernel) {
		n = net_recv(l->fd, l->inbox, INBOX);
		if (n <= 0)
			die("connection lost");
		consume(l, l->inbox, n, now());
		return;
	}
	recv_full(l->fd, l->inbox, sizeof l->reply.simple);
	consume(l, l->inbox, sizeof l->reply.simple, now());
	if (l->slot) {
		recv_full(l->fd, l->inbox, l->load->block);
		consume(l, l->inbox, l->load->block, now());
	}
}

void loop_run(struct loop *l, enum task task, uint64_t position, uint64_t end)
{
	l->task = task;
	l->start = l->position = position;
	l->end = end;
	for (;;) {
		refill(l);
		if (l->nidle == l->load->depth)
			return;
		if (!push(l)) {
			// Never blocked in a send: a server that waits for its replies to be taken would wait for ever.
			struct pollfd p = {.fd = l->fd, .events = POLLIN | POLLOUT};
			poll(&p, 1, -1);
			if (!(p.revents & POLLIN))
				continue;
		}
		pull(l);
	}
}
