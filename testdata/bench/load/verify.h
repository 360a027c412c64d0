#pragma once

#include <stdint.h>

#include "client.h"

// verify makes requests of many sizes at odd offsets, one after the other, compares what it reads with what it wrote, and
// leaves the fill pattern. range is the part of the device that may be used, in bytes.
void verify(int fd, const struct export *e, uint64_t range);
