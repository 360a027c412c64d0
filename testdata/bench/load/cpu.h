// CPU time, in nanoseconds, of the server under test, of this process, and of processors.
#pragma once

#include <stdint.h>

uint64_t now(void);

// server_cpu_watch notes pid and all its descendants, as they are now. 0: none.
void server_cpu_watch(int pid);
uint64_t server_cpu(void);
uint64_t own_cpu(void);
// processor_cpu is what all processes together used of one processor, or of all if it is negative. It has a resolution of
// 10 ms for each processor.
uint64_t processor_cpu(int processor);
