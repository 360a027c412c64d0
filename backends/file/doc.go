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
// swap, RAID and whoever else does so; one that is read-only is not locked.
//
// # Errors of Sync
//
// A kernel reports a failed write-back once, and may have thrown the data away by
// then: the next fdatasync succeeds. So the first error of a sync stays, and every
// later Sync and FUA write of the same File fails with it. Reading the file in a
// fresh one tells what is left.
package file
