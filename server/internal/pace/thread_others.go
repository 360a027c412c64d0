//go:build !linux

package pace

// ThreadSwitches would tell how often the calling thread has slept and was preempted; nothing here
// does for one thread.
var ThreadSwitches func() (slept, preempted int64)
