//go:build !linux

package server

// threadSwitches would tell how often the calling thread has slept and was preempted; nothing here does for one thread.
var threadSwitches func() (slept, preempted int64)
