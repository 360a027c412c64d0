// Package memory is a sparse block device in memory: it takes memory when
// something is written, 64 KiB at a time, and gives it back when that is trimmed
// or zeroed. What was never written reads as zeros and costs nothing, so a
// device may be far larger than the machine.
//
// A device that has grown to what the machine can spare answers further writes
// to fresh places with ENOSPC, instead of calling the out-of-memory killer; see
// Options.Limit. Writes to places in use go on, and so do reads.
//
// Resize makes a device longer, which costs next to nothing, or shorter, which
// gives the memory of what is cut off back.
//
// Content does not outlive the process, so there is nothing to sync: a write is
// as durable as it will ever be when it returns.
package memory
