package nbdnltest

import (
	"fmt"
	"os"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nbdctl/nbdctl/nbdnl"
)

// PrivateNetwork returns the running system as it is seen from a new network namespace, where
// kernels up to Linux 6.1 hide the driver's netlink family.
func PrivateNetwork(t testing.TB) nbdnl.System {
	t.Helper()
	var ns *os.File
	made := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: the thread, which is in the namespace, ends with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			ns, err = os.Open(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()))
		}
		made <- err
	}()
	if err := <-made; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	return nbdnl.System{NetNS: ns}
}
