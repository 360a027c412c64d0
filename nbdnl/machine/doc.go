// Package machine reads what a Linux machine shows of itself in the files of proc and sysfs: the
// kernel's release, mounts, processes, the numbers of block devices, and the incarnation of what a
// file of sysfs stands for.
//
// All of it is read below a [Root], which is the root directory, or where a container sees the
// host's, or where a test has put files of its own. Nothing here needs a privilege, nor changes
// anything. Outside Linux there is nothing to read.
package machine
