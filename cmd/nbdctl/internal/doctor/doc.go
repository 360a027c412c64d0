// Package doctor finds out what keeps NBD devices from working on a machine,
// or from working well.
//
// What files tell it reads below a root directory, so that it can be shown any
// machine. What they do not tell it finds out on devices of its own, of memory,
// which it makes and ends: kernels differ in what they do, and distributions
// carry changes of later kernels to earlier ones.
package doctor
