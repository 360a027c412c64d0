// loadgen loads an NBD server, and checks every answer. One line of JSON on stdout is the result; whatever goes wrong, a
// wrong byte included, is a line on stderr and exit code 1.
//
//	loadgen fill    -a ADDRESS [flags]   write the pattern that the other two expect
//	loadgen verify  -a ADDRESS [flags]   read all of it; then requests of many sizes; leaves the pattern
//	loadgen load    -a ADDRESS [flags]   the timed load; what it wrote last is read back afterwards
//
// The client is lean, so that it is the server that is seen: new requests go out in one sendmsg, replies are taken with
// large recvs, and of their data only the beginning is looked at.
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "client.h"
#include "cpu.h"
#include "loop.h"
#include "pattern.h"
#include "verify.h"

static struct {
	const char *address, *name;
	int connections, pid, processor, hold;
	struct manner manner;
	double warm, timed; // seconds
	struct load load;
} options = {
	.name = "",
	.connections = 1,
	.processor = -1,
	.warm = 0.1,
	.timed = 0.5,
	.load = {.depth = 1, .block = 4096, .read_share = 100, .range = 512 << 20},
};

static void usage(void)
{
	fprintf(stderr, "usage: loadgen fill|verify|load -a unix:PATH|tcp:HOST:PORT [flags]\n"
	                "  -n NAME  of the export           -S BYTES  of the device that are used (512 MiB)\n"
	                "  -c N     connections (1)         -q N      requests in flight on each (1)\n"
	                "  -b BYTES of a request (4096)     -r N      percent of them that read (100)\n"
	                "  -s       sequential              -k        frame as the kernel's client does\n"
	                "  -x       structured replies      -T DIR    TLS, with ca-cert.pem, client-cert.pem, client-key.pem\n"
	                "  -e       read as many bytes behind those of -S, which nobody has written\n"
	                "  -w S     seconds to warm up      -d S      seconds that count\n"
	                "  -p PID   the server, whose CPU time is taken with that of its children\n"
	                "  -P N     all of them are on that processor; what others use of it is told, else of all\n"
	                "  -i       then keep the connections until stdin ends\n");
	exit(2);
}

static void parse(int argc, char **argv)
{
	int o;

	while ((o = getopt(argc, argv, "a:n:S:c:q:b:r:skxeT:w:d:p:P:i")) != -1) {
		switch (o) {
		case 'a': options.address = optarg; break;
		case 'n': options.name = optarg; break;
		case 'S': options.load.range = strtoull(optarg, NULL, 0); break;
		case 'c': options.connections = atoi(optarg); break;
		case 'q': options.load.depth = atoi(optarg); break;
		case 'b': options.load.block = atoi(optarg); break;
		case 'r': options.load.read_share = atoi(optarg); break;
		case 's': options.load.sequential = 1; break;
		case 'k': options.load.kernel = 1; break;
		case 'x': options.manner.structured = 1; break;
		case 'e': options.load.empty = 1; break;
		case 'T': options.manner.tls = optarg; break;
		case 'w': options.warm = atof(optarg); break;
		case 'd': options.timed = atof(optarg); break;
		case 'p': options.pid = atoi(optarg); break;
		case 'P': options.processor = atoi(optarg); break;
		case 'i': options.hold = 1; break;
		default: usage();
		}
	}
	if (options.address == NULL || options.connections < 1 || options.load.depth < 1 || options.load.block < 512 ||
	    options.load.block % 512)
		usage();
}

static struct loop *connect_all(void)
{
	struct loop *loops = calloc(options.connections, sizeof *loops);
	char *body = malloc(options.load.block);

	options.load.salt = scramble(now());
	fill_pattern(body, 0, options.load.block, options.load.salt);
	options.load.body = body;
	for (int i = 0; i < options.connections; i++) {
		struct export e;
		int fd = dial(options.address, options.name, options.manner, &e);

		if (options.load.range > e.size)
			options.load.range = e.size;
		options.load.range -= options.load.range % options.load.block;
		loop_init(&loops[i], &options.load, fd, i + options.load.salt);
	}
	return loops;
}

static void *run(void *arg)
{
	struct loop *l = arg;
	uint64_t share = l->load->range / options.connections / l->load->block * l->load->block;

	loop_run(l, LOAD, l->start, l->start + share);
	return NULL;
}

static void sleep_for(double seconds)
{
	usleep(seconds * 1e6);
}

static uint64_t counted(const struct loop *loops)
{
	uint64_t n = 0;

	for (int i = 0; i < options.connections; i++)
		n += __atomic_load_n(&loops[i].requests, __ATOMIC_RELAXED);
	return n;
}

// measure_time sleeps for the timed part. On a machine where nobody got a turn meanwhile, until somebody has.
static void measure_time(const struct loop *loops)
{
	uint64_t began = now();

	do
		sleep_for(options.timed);
	while (counted(loops) == 0 && now() - began < 30 * 1000000000ull);
}

static void report(const struct loop *loops, uint64_t elapsed, uint64_t server, uint64_t own, uint64_t all)
{
	static struct histogram latency;
	uint64_t n = counted(loops), others = all > server + own ? all - server - own : 0;

	for (int i = 0; i < options.connections; i++)
		histogram_add(&latency, &loops[i].latency);
	errno = 0;
	if (n == 0)
		die("no request was answered in time");
	printf("{\"iops\": %.0f, \"mbps\": %.2f, \"p50_us\": %.2f, \"p99_us\": %.2f, \"server_us\": %.4f, \"client_us\": %.4f, "
	       "\"others\": %.2f, \"requests\": %lu}\n",
	       n * 1e9 / elapsed, n * 1e3 / elapsed * options.load.block, percentile(&latency, 50) / 1e3,
	       percentile(&latency, 99) / 1e3, server / 1e3 / n, own / 1e3 / n, (double)others / elapsed, (unsigned long)n);
	fflush(stdout);
}

// load is the timed run. What is written last is read back, which bounds what it may cost.
static void load(struct loop *loops)
{
	enum { READ_BACK_BYTES = 32 << 20 };
	uint64_t part = options.load.range / options.connections / options.load.block * options.load.block;
	uint64_t t, server, own, all;
	pthread_t *threads = calloc(options.connections, sizeof *threads);

	for (int i = 0; i < options.connections; i++) {
		loops[i].start = part * i;
		if (pthread_create(&threads[i], NULL, run, &loops[i]))
			die("thread");
	}
	sleep_for(options.warm / 2);
	server_cpu_watch(options.pid); // By now the server has made the processes that it makes for its clients.
	sleep_for(options.warm / 2);
	all = processor_cpu(options.processor), server = server_cpu(), own = own_cpu(), t = now();
	phase = TIMED;
	measure_time(loops);
	phase = DONE;
	t = now() - t, server = server_cpu() - server, own = own_cpu() - own, all = processor_cpu(options.processor) - all;
	for (int i = 0; i < options.connections; i++)
		pthread_join(threads[i], NULL);
	for (int i = 0; i < options.connections; i++) {
		uint64_t n = loops[i].nwritten, most = READ_BACK_BYTES / options.load.block;

		n = n < WRITTEN ? n : WRITTEN;
		loop_run(&loops[i], READ_BACK, 0, n < most ? n : most);
	}
	report(loops, t, server, own, all);
}

int main(int argc, char **argv)
{
	const char *mode = argc > 1 ? argv[1] : "";
	struct loop *loops;
	char c;

	if (argc < 2)
		usage();
	parse(argc - 1, argv + 1);
	signal(SIGPIPE, SIG_IGN); // TLS writes without MSG_NOSIGNAL.
	loops = connect_all();
	if (strcmp(mode, "fill") == 0) {
		loop_run(&loops[0], FILL, 0, options.load.range);
	} else if (strcmp(mode, "verify") == 0) {
		struct export e;
		int fd = dial(options.address, options.name, options.manner, &e);

		loop_run(&loops[0], CHECK, 0, options.load.range);
		verify(fd, &e, options.load.range);
		hang_up(fd);
	} else if (strcmp(mode, "load") == 0) {
		load(loops);
	} else {
		usage();
	}
	while (options.hold && read(0, &c, 1) > 0)
		;
	for (int i = 0; i < options.connections; i++)
		hang_up(loops[i].fd);
	return 0;
}
