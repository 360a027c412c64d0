package main

import (
	"bytes"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/nbdctl/nbdctl/nbdnl"
	"github.com/nbdctl/nbdctl/nbdnl/claim"
	"github.com/nbdctl/nbdctl/nbdnl/nbdnltest"
)

// TestMain is the program itself when the test starts it.
func TestMain(m *testing.M) {
	if os.Getenv("POOL_PROGRAM") != "" {
		main()
		return
	}
	os.Exit(nbdnltest.Main(m))
}

// program returns the program with that command, which is a line of shell in which $0 is the
// device.
func program(t *testing.T, line string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, "sh", "-c", line)
	cmd.Env = append(os.Environ(), "POOL_PROGRAM=1")
	cmd.Stderr = os.Stderr
	return cmd
}

// ours returns the devices that the program has, or may have where the kernel does not show whose
// they are.
func ours(t *testing.T, c *nbdnl.Client) []nbdnl.Status {
	t.Helper()
	devices, err := c.Connected()
	if err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(devices, func(s nbdnl.Status) bool {
		return s.HasIdentifier && !strings.HasPrefix(s.Identifier, "pool-example:")
	})
}

// TestKernelPoolProgram has the program killed while it has a device, and runs it again.
func TestKernelPoolProgram(t *testing.T) {
	nbdnltest.RequireKernel(t)
	c, err := nbdnl.New()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	killed := program(t, "kill -9 $PPID")
	if err := killed.Run(); err == nil {
		t.Fatal("the program was not killed")
	}
	left := ours(t, c)
	if len(left) != 1 {
		t.Fatalf("the killed program has left %v, want a device", left)
	}
	if !left[0].HasIdentifier { // Before Linux 5.14 the program leaves it alone, for it can't know that it is its own.
		if err := c.Detach(t.Context(), left[0].Index, nbdnl.DetachOptions{Any: true, Dead: true}); err != nil {
			t.Fatal(err)
		}
	}

	cmd := program(t, "printf 'written by a command' >\"$0\"")
	snapshot, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	if len(snapshot) != size || !bytes.HasPrefix(snapshot, []byte("written by a command")) {
		t.Errorf("the snapshot has %d bytes and begins with %q", len(snapshot), snapshot[:min(len(snapshot), 20)])
	}
	if left := ours(t, c); len(left) > 0 {
		t.Errorf("%v are left, of one of the two", left)
	}
	if leases, err := claim.Dir("").Leased(); err != nil || len(leases) > 0 {
		t.Errorf("leases of %v are left, error %v", leases, err)
	}
}
