// libnbd loads an NBD server as loadgen does, by libnbd's asynchronous calls: what other clients are measured beside.
//
//	libnbd verify  -a unix:PATH [flags]   read what loadgen fill has written, and compare all of it
//	libnbd load    -a unix:PATH [flags]   the timed load; what it wrote last is read back afterwards
//
// It is written for speed. A completion callback puts its slot on the stack of idle ones, so that nothing is searched
// for. The loop makes the next request of each as soon as nbd_poll returns. The callback cannot: libnbd holds its lock
// there and would wait for itself ("Callbacks and locking" in libnbd(3)). Commands retire by themselves. Buffers of
// reads are not zeroed before. What the server checks is not checked twice.
#define _GNU_SOURCE
#include <errno.h>
#include <libnbd.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "client.h"
#include "cpu.h"
#include "histogram.h"
#include "pattern.h"

enum { WRITTEN = 256 }; // how many of the last writes are read back

enum task { LOAD, CHECK, READ_BACK };
enum phase { WARMING, TIMED, DONE };

static _Atomic enum phase phase;

static struct {
	const char *path, *name;
	int depth, writes, sequential, pid, processor;
	uint32_t block;
	uint64_t range;
	double warm, timed; // seconds
} options = {
	.name = "",
	.depth = 1,
	.processor = -1,
	.block = 4096,
	.range = 512 << 20,
	.warm = 0.1,
	.timed = 0.5,
};

// A slot is a request that is made again and again.
struct slot {
	uint64_t offset, started;
	int write;
	char *data; // block bytes
};

static struct nbd_handle *nbd;
static enum task task;
static struct slot *slots, **idle;
static int nidle;
static uint64_t position, seed, salt;
static uint64_t written[WRITTEN], nwritten, requests;
static struct histogram latency; // in nanoseconds

static void usage(void)
{
	fprintf(stderr, "usage: libnbd verify|load -a unix:PATH [flags]\n"
	                "  -n -S -q -b -s -w -d -p -P as loadgen has them, -c 1, -r 100 or 0\n");
	exit(2);
}

static void parse(int argc, char **argv)
{
	int o;

	while ((o = getopt(argc, argv, "a:n:S:c:q:b:r:sw:d:p:P:")) != -1) {
		switch (o) {
		case 'a': options.path = strncmp(optarg, "unix:", 5) == 0 ? optarg + 5 : NULL; break;
		case 'n': options.name = optarg; break;
		case 'S': options.range = strtoull(optarg, NULL, 0); break;
		case 'c': if (atoi(optarg) != 1) usage(); break;
		case 'q': options.depth = atoi(optarg); break;
		case 'b': options.block = atoi(optarg); break;
		case 'r': options.writes = strcmp(optarg, "0") == 0; break;
		case 's': options.sequential = 1; break;
		case 'w': options.warm = atof(optarg); break;
		case 'd': options.timed = atof(optarg); break;
		case 'p': options.pid = atoi(optarg); break;
		case 'P': options.processor = atoi(optarg); break;
		default: usage();
		}
	}
	if (options.path == NULL || options.depth < 1 || options.block < 512 || options.block % 512)
		usage();
	options.range -= options.range % options.block;
}

// must ends the process if a call of libnbd has failed.
static void must(int64_t result)
{
	errno = 0;
	if (result == -1)
		die("%s", nbd_get_error());
}

static void start(void)
{
	char *data;

	nbd = nbd_create();
	errno = 0;
	if (nbd == NULL)
		die("%s", nbd_get_error());
	must(nbd_set_export_name(nbd, options.name));
	must(nbd_set_pread_initialize(nbd, false));
	must(nbd_set_strict_mode(nbd, 0));
	must(nbd_connect_unix(nbd, options.path));
	errno = 0;
	if ((uint64_t)nbd_get_size(nbd) < options.range)
		die("the export has %ld bytes", (long)nbd_get_size(nbd));
	data = mmap(NULL, (size_t)options.depth * options.block, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
	            -1, 0);
	if (data == MAP_FAILED)
		die("memory for %d requests", options.depth);
	slots = calloc(options.depth, sizeof *slots);
	idle = calloc(options.depth, sizeof *idle);
	salt = scramble(now());
	seed = salt | 1;
	for (int i = 0; i < options.depth; i++) {
		slots[i].data = data + (size_t)i * options.block;
		fill_pattern(slots[i].data, 0, options.block, salt);
		idle[nidle++] = &slots[i];
	}
}

static uint64_t next_random(void)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return seed;
}

// choose decides on the next request of the task, which has count of them if it is not LOAD; there may be none.
static int choose(struct slot *s, uint64_t count)
{
	uint64_t blocks = options.range / options.block;

	if (task == LOAD ? phase == DONE : position == count)
		return 0;
	s->write = task == LOAD && options.writes;
	if (task == READ_BACK)
		s->offset = written[position++];
	else if (task == CHECK || options.sequential)
		s->offset = position++ % blocks * options.block;
	else
		s->offset = next_random() % blocks * options.block;
	return 1;
}

// completed is called by libnbd, with its lock held, when a request has been answered.
static int completed(void *arg, int *error)
{
	struct slot *s = arg;
	uint32_t block = options.block;
	int good = 1;

	errno = *error;
	if (*error)
		die("%s at %lu", s->write ? "write" : "read", (unsigned long)s->offset);
	if (task == CHECK)
		good = is_pattern(s->data, s->offset, block, 0);
	else if (task == READ_BACK)
		good = is_stamp(s->data, s->offset) && is_pattern(s->data + 8, 8, block - 8, salt);
	else if (!s->write)
		good = is_stamp(s->data, s->offset);
	if (!good)
		die("wrong data at %lu, length %u", (unsigned long)s->offset, block);
	if (task == LOAD && phase == TIMED) {
		requests++;
		latency.count[bucket(now() - s->started)]++;
	}
	idle[nidle++] = s;
	return 1; // There is nothing left to ask for.
}

static void request(struct slot *s)
{
	nbd_completion_callback done = {.callback = completed, .user_data = s};
	uint64_t stamp = scramble(s->offset);

	if (!s->write) {
		must(nbd_aio_pread(nbd, s->data, options.block, s->offset, done, 0));
		return;
	}
	memcpy(s->data, &stamp, sizeof stamp);
	written[nwritten++ % WRITTEN] = s->offset;
	must(nbd_aio_pwrite(nbd, s->data, options.block, s->offset, done, 0));
}

// work does a task, and returns when no request is in flight any more.
static void work(enum task what, uint64_t count)
{
	task = what;
	position = 0;
	for (;;) {
		uint64_t t = now();

		while (nidle > 0 && choose(idle[nidle - 1], count)) {
			struct slot *s = idle[--nidle];

			s->started = t;
			request(s);
		}
		if (nidle == options.depth)
			return;
		must(nbd_poll(nbd, -1));
	}
}

static void *run(void *arg)
{
	work(LOAD, 0);
	return arg;
}

// load is the timed run.
static void load(void)
{
	enum { READ_BACK_BYTES = 32 << 20 };
	uint64_t t, server, own, all, others, most = READ_BACK_BYTES / options.block;
	pthread_t thread;

	if (pthread_create(&thread, NULL, run, NULL))
		die("thread");
	server_cpu_watch(options.pid);
	usleep(options.warm * 1e6);
	all = processor_cpu(options.processor), server = server_cpu(), own = own_cpu(), t = now();
	phase = TIMED;
	do // On a machine where nobody got a turn meanwhile, until somebody has.
		usleep(options.timed * 1e6);
	while (__atomic_load_n(&requests, __ATOMIC_RELAXED) == 0 && now() - t < 30 * 1000000000ull);
	phase = DONE;
	t = now() - t, server = server_cpu() - server, own = own_cpu() - own, all = processor_cpu(options.processor) - all;
	pthread_join(thread, NULL);
	most = most < WRITTEN ? most : WRITTEN;
	work(READ_BACK, nwritten < most ? nwritten : most);
	errno = 0;
	if (requests == 0)
		die("no request was answered in time");
	others = all > server + own ? all - server - own : 0;
	printf("{\"iops\": %.0f, \"mbps\": %.2f, \"p50_us\": %.2f, \"p99_us\": %.2f, \"server_us\": %.4f, "
	       "\"client_us\": %.4f, \"others\": %.2f}\n",
	       requests * 1e9 / t, requests * 1e3 / t * options.block, percentile(&latency, 50) / 1e3,
	       percentile(&latency, 99) / 1e3, server / 1e3 / requests, own / 1e3 / requests, (double)others / t);
}

int main(int argc, char **argv)
{
	if (argc < 2)
		usage();
	parse(argc - 1, argv + 1);
	start();
	if (strcmp(argv[1], "verify") == 0)
		work(CHECK, options.range / options.block);
	else if (strcmp(argv[1], "load") == 0)
		load();
	else
		usage();
	must(nbd_shutdown(nbd, 0));
	nbd_close(nbd);
	return 0;
}
