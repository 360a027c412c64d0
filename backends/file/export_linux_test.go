package file

import (
	"testing"

	"golang.org/x/sys/unix"
)

// FailLocks makes the kernel have no locks until the end of the test.
func FailLocks(t testing.TB, err error) {
	setLock = func(uintptr, int, *unix.Flock_t) error { return err }
	t.Cleanup(func() { setLock = unix.FcntlFlock })
}
