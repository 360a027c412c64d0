#define _GNU_SOURCE
#include "cpu.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MAX_PIDS = 1024 };

static int pids[MAX_PIDS], npids;

static uint64_t read_clock(clockid_t clock)
{
	struct timespec t;

	if (clock_gettime(clock, &t))
		return 0;
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

uint64_t now(void)
{
	return read_clock(CLOCK_MONOTONIC);
}

uint64_t own_cpu(void)
{
	return read_clock(CLOCK_PROCESS_CPUTIME_ID);
}

static int parent_of(int pid)
{
	char line[1024], *p;
	int parent = 0;
	FILE *f;

	snprintf(line, sizeof line, "/proc/%d/stat", pid);
	f = fopen(line, "r");
	if (f == NULL)
		return 0;
	// The command's name stands in parentheses and may have some itself.
	if (fgets(line, sizeof line, f) && (p = strrchr(line, ')')))
		sscanf(p + 2, "%*c %d", &parent);
	fclose(f);
	return parent;
}

void server_cpu_watch(int pid)
{
	struct dirent *entry;
	DIR *dir;

	if (pid == 0 || npids == MAX_PIDS)
		return;
	pids[npids++] = pid;
	dir = opendir("/proc");
	while ((entry = readdir(dir))) {
		int child = atoi(entry->d_name);
		if (child > 0 && parent_of(child) == pid)
			server_cpu_watch(child);
	}
	closedir(dir);
}

uint64_t server_cpu(void)
{
	uint64_t sum = 0;
	clockid_t clock;

	for (int i = 0; i < npids; i++)
		if (clock_getcpuclockid(pids[i], &clock) == 0)
			sum += read_clock(clock);
	return sum;
}

uint64_t processor_cpu(int processor)
{
	unsigned long long user, nice, system, idle, iowait, irq, softirq;
	uint64_t sum = 0;
	char name[32], wanted[32], line[512];
	FILE *f = fopen("/proc/stat", "r");

	snprintf(wanted, sizeof wanted, processor < 0 ? "cpu" : "cpu%d", processor);
	while (f && fgets(line, sizeof line, f))
		if (sscanf(line, "%31s %llu %llu %llu %llu %llu %llu %llu", name, &user, &nice, &system, &idle, &iowait, &irq,
		           &softirq) == 8 && strcmp(name, wanted) == 0)
			sum = (user + nice + system + irq + softirq) * 10000000;
	if (f)
		fclose(f);
	return sum;
}
