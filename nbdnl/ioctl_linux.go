package nbdnl

import "golang.org/x/sys/unix"

// ioctl makes an ioctl whose argument is a number.
func ioctl(fd int, request, arg uintptr) error {
	return unix.IoctlSetInt(fd, uint(request), int(arg))
}

// maskSignals keeps all signals from the calling thread, but for those that nothing keeps from it.
func maskSignals() error {
	var all unix.Sigset_t
	for i := range all.Val {
		all.Val[i] = ^all.Val[i]
	}
	return unix.PthreadSigmask(unix.SIG_SETMASK, &all, nil)
}

// threadID returns the calling thread's number.
func threadID() int { return unix.Gettid() }
