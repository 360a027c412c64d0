package machine

// An Incarnation tells something in sysfs from what had its name before and what will have it
// after: two uses of an index, or two partitions of a disk. It is the number of a file
// that the driver makes at the beginning and removes at the end, and kernfs gives no number twice.
// So it can be compared, written down, and compared in another process, until the machine is booted
// anew. 0 is none: what it stands for is not there, or can't be seen.
type Incarnation uint64
