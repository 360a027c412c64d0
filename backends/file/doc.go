// Package file is a block device in a regular file or on another block device.
//
// Open takes a path and New an open file; both lock it. Sync is fdatasync, and a
// write with FUA is durable by itself where the file system can do that. Trim and
// Zero make holes where there can be holes.
//
// # Locks
//
// A file that is attached for writing is locked against everybody else, one that
// is attached read-only against writers. The locks are those of open file
// descriptions: they go with a descriptor that is passed to another process, end
// with its last copy, and keep qemu away too. Outside of Linux they are flock.
// A block device for writing is opened exclusively, which keeps out mounts,
// swap, RAID and whoever else does so; one that is read-only is not locked. A file on
// a file system without locks (NFS without a lock manager) is refused: a *NoLocksError.
// Options.NoLock does without.
//
// # What can't be written
//
// The page cache of a device acknowledges writes long before they reach the file, so
// whoever writes learns too late, or never, that all of them fail. What can be opened for
// writing and not written is therefore refused, with a *ReadOnlyError, unless
// Options.ReadOnly is set: a block device that is read-only (BLKROGET: a read-only loop
// device, a write-protected card, a partition of either, a read-only table of the device
// mapper), a file that is immutable or append-only, memory that is sealed, a file that is
// longer than this process may write (RLIMIT_FSIZE). Where that comes later, each write
// fails, and so does Sync.
//
// # Direct I/O
//
// With Options.Direct a file is read and written past the page cache (O_DIRECT):
// what the user of the device caches is not cached a second time, and there is no
// write-back that comes all at once. Reads are never served from memory then. For
// the same traffic, on ext4 on a virtual disk, of an image of 512 MiB that
// fits into the page cache (requests/s and µs of the server's CPU time for each):
//
//	                   cached          direct
//	4 KiB read, one    32k    20 µs    8.9k   71 µs
//	4 KiB read, 32    270k     3 µs     16k   38 µs
//	4 KiB write, one   13k    57 µs    8.5k   67 µs
//	4 KiB write, 32    22k    44 µs     15k   44 µs
//	128 KiB read, 16   22k    25 µs    3.6k   83 µs
//	128 KiB write, 16  10k    80 µs    4.1k   97 µs
//
// Afterwards the page cache had 512 MiB of the image, and 0 bytes.
//
// Requests are whole blocks: as the file system says since Linux 6.1, else sectors
// of its disk, else 4096 bytes. BlockSizes tells, so that a device gets blocks of
// that size; a disk with sectors of 4096 bytes thus hides the partitions of images
// that were made for 512. A file system in memory, or one without direct I/O, is
// refused: a *DirectError. Sync is fdatasync all the same, because the disk has a
// cache too, and so has the file system for where it has put the blocks. Others who
// read or write the file through the page cache see what the device does; the kernel
// keeps the two together, at the cost of writing back and dropping the cached pages.
//
// # Errors of Sync
//
// A kernel reports a failed write-back once, and may have thrown the data away by
// then: the next fdatasync succeeds. So the first error of a sync stays, and every
// later Sync and FUA write of the same File fails with it. Reading the file in a
// fresh one tells what is left.
package file
