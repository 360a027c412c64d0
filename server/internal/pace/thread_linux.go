package pace

import "syscall"

// switches says how often the calling thread has given the processor away: because it had to sleep,
// and because somebody else was to have it (getrusage(2)). It takes a third of a microsecond.
func switches() (slept, preempted int64) {
	var u syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_THREAD, &u) != nil {
		return 0, 0
	}
	return int64(u.Nvcsw), int64(u.Nivcsw)
}

// ThreadSwitches is switches, or nil on systems that do not count.
var ThreadSwitches = switches
